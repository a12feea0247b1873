"""A function over many items on several processes, with the results in the order of the items."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from threading import Thread
from typing import TypeVar

from intact.errors import DataError

__all__ = ["in_order"]

AHEAD = 4
"""Items per process that are handed out before the first result is awaited; bounds memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """`map(function, items)`, computed by so many processes; 0: by this one.

    function  a function of a module, or a `partial` of one; so are items and results what `pickle`
              can move

    What the function raises is raised here. The processes end when the iterator does: at the end,
    at an error, at an interrupt, when it is closed, and when this process dies.
    """
    if workers == 0:
        yield from map(function, items)
        return
    # Imported here: they take as long to import as everything else in this package.
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # Forked processes would inherit locks that threads of torch or OpenMP may hold.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_live_with_the_parent)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads samples has died. In a script of your own, put what it does "
            'below `if __name__ == "__main__":`, as new processes import the script; and if '
            "memory ran out, take fewer processes, or none."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _live_with_the_parent() -> None:
    """Let the parent alone decide when this process ends, and end with it whatever ends it."""
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal interrupts the parent as well
    parent = parent_process()

    def wait() -> None:
        if parent is not None:  # None is for a process that has none
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()
