"""Text and progress bars on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Tell: TypeAlias = Callable[[str, int, int], None]
"""Called as `tell(what is going on, steps done, steps in all)`; 0 in all if nobody knows."""


def terminal(*, stderr: bool = False) -> Console:
    """Shows text as it is: paths and names may look like markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str) -> Iterator[Tell]:
    """A progress bar on standard error, on a terminal only; it is gone in the end."""
    console = terminal(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None, count="")

        def tell(what: str, done: int, total: int) -> None:
            count = {0: f"{done:,}", 1: ""}.get(total, f"{done:,}/{total:,}")
            bar.update(task, description=what, completed=done, total=total or None, count=count)

        yield tell


def count(number: int, what: str, several: str = "") -> str:
    """`1 thread`, `2 threads`, or with a plural that is given: `2 classes`."""
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def aligned(rows: list[tuple[str, ...]], left: int = 2) -> str:
    """Columns of text, as wide as they need: a value that is cut off would be of no use.

    left  how many columns, from the first on, hold words; those behind hold numbers
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
