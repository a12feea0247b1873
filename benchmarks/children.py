"""One measurement in a process of its own: how long it took, and how much memory it needed.

The child prints what `report` makes as its last line. Peak memory is the kernel's own high-water
mark of the process (`VmHWM`), so Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What a child measured.

    seconds  of the work alone, without imports and without making the network
    cpu      seconds of processor time in it, all threads together
    before   resident bytes when the work began
    peak     most resident bytes in the process's life
    """

    seconds: float
    cpu: float
    before: int
    peak: int


def memory(field: str) -> int:
    """Bytes of a field of this process's status: `VmRSS`, now, or `VmHWM`, at most so far."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"the kernel does not tell {field} of a process.")


def report(work: Callable[[], object]) -> None:
    """In a child: do the work, and print the `Outcome` as JSON."""
    before = memory("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps(asdict(Outcome(seconds, used, before, memory("VmHWM")))))


def call(script: Path, arguments: Sequence[str], python: str = sys.executable) -> str:
    """What a script prints, run in a child; its last lines are the error if it fails."""
    done = subprocess.run(  # noqa: S603  # our own scripts, by an interpreter that the user names
        [python, str(script), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-3:]))
    return done.stdout


def run(script: Path, arguments: Sequence[str], python: str = sys.executable) -> Outcome:
    """What a script measured that ends with `report`."""
    return Outcome(**json.loads(call(script, arguments, python).strip().splitlines()[-1]))
