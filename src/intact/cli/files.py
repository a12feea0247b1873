"""Files and folders that a command reads and writes, checked before it works."""

from __future__ import annotations

import os
from pathlib import Path

from intact.errors import IntactError


def read_text(path: Path, advice: str) -> str:
    """The text of a file; `IntactError` with the advice if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntactError(f"{path} cannot be read: {reason(error)}. {advice}") from error


def check_folder(folder: Path) -> None:
    """Raise `IntactError` unless files can be written to a folder, which need not exist yet.

    It is made only when there is something to put into it: a run that fails leaves nothing.
    """
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if not existing.is_dir():
        raise IntactError(f"{existing} is a file, not a folder. Choose another folder with -o.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise IntactError(f"the folder {existing} is read-only. Choose another folder with -o.")


def check_file(path: Path, program: Path) -> None:
    """Raise `IntactError` unless a file can be written there that is not the program itself.

    Its folder need not exist yet.
    """
    if path.is_dir():
        raise IntactError(f"{path} is a folder. Name a file in it with -o.")
    if path.exists() and program.exists() and path.samefile(program):
        raise IntactError(f"{path} is the program. Name another file with -o.")
    check_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those it is in, unless it exists; `IntactError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IntactError(
            f"the folder {folder} cannot be made: {reason(error)}. Choose another one with -o."
        ) from error


def reason(error: Exception) -> str:
    """What the system says about a file, without its number and the name again."""
    return (getattr(error, "strerror", None) or str(error)).lower()
