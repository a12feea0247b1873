"""What this machine's integer units can do at most: GMAC/s of `vpdpbusd` and `tdpbssd`.

Compiles `peak.c` with the system compiler (`$CC`, else `cc`), and runs it in rounds: the best round
counts, as whatever disturbs a machine only ever makes it slower.

    python benchmarks/peak.py [--threads 1 2] [--rounds 7] [--milliseconds 200]
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.c")


def peaks(threads: list[int], rounds: int, milliseconds: int) -> dict[str, dict[int, float]]:
    """Instruction -> number of threads -> GMAC/s of all threads together.

    Instructions that the processor lacks are left out. Raises `RuntimeError` where `peak.c` cannot
    be built.
    """
    found: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = _build(Path(folder) / "peak")
        for _ in range(rounds):
            for number in threads:
                for line in _output([str(program), str(number), str(milliseconds)]).splitlines():
                    name, _, rate = line.partition(" ")
                    if float(rate):
                        best = found.setdefault(name, {})
                        best[number] = max(best.get(number, 0.0), float(rate))
    return found


def _build(program: Path) -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not shutil.which(compiler[0]):
        raise RuntimeError(f"there is no compiler {compiler[0]!r}")
    _output([*compiler, "-O2", "-pthread", "-o", str(program), str(SOURCE)])
    return program


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{command[0]} failed: {error.stderr.strip()[:500]}") from error


def main() -> None:
    """Measure, and print one line per instruction and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--milliseconds", type=int, default=200)
    args = parser.parse_args()
    found = peaks(args.threads, args.rounds, args.milliseconds)
    for name, rates in found.items():
        for number, rate in rates.items():
            print(f"{name:10s} {number} thread(s)  {rate:8.0f} GMAC/s")
    if not found:
        print("this processor has neither AVX-512 VNNI nor AMX")


if __name__ == "__main__":
    main()
