"""Many processes do what one does, in its order, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from intact.data.processes import AHEAD, in_order
from intact.errors import DataError

SCRIPT = """
import multiprocessing, time
from intact.data.processes import in_order
if __name__ == "__main__":
    results = in_order(abs, iter(range(10**9)), 2)
    next(results)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    for _ in results:
        time.sleep(0.01)
"""


def test_results_come_in_order_from_many_processes_and_few_items_are_taken_ahead():
    taken = []

    def items():
        for i in range(40):
            taken.append(i)
            yield -i

    results = in_order(abs, items(), 2)
    assert next(results) == 0
    assert len(taken) == 2 * AHEAD + 1
    assert list(results) == list(range(1, 40)) == list(in_order(abs, range(-1, -40, -1), 0))


def test_an_error_in_another_process_is_the_error_here():
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(in_order(int, ["1", "x"], 1))


def test_a_process_that_dies_is_an_error_that_says_what_to_do():
    with pytest.raises(DataError, match=r"has died\. In a script of your own, put .*__main__"):
        list(in_order(os._exit, [3], 1))


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_when_this_one_is_interrupted_or_killed(tmp_path, ended_by):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    children = [int(word) for word in process.stdout.readline().split()]
    assert len(children) == 2
    assert all(map(alive, children))  # the check can fail
    if ended_by == signal.SIGINT:  # as a terminal does it: all processes at once
        os.killpg(process.pid, ended_by)
    else:
        process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -ended_by
    until = time.monotonic() + 20
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, children))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # of a process that has ended, but that nobody waited for
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
