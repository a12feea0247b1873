"""A folder of compiled libraries, private to the user and safe against whatever else happens to it.

    <cache>/intact/native/libraries/<key>/library.so   and its SHA-256 beside it
    <cache>/intact/native/facts/<key>.json             small results that took time to find out

Keys are hashes of everything that the content depends on. An entry is made in a folder of its own
and renamed to its place, so it is there in full or not at all, whoever else writes at the same time
and whenever a process is killed. A library that is not what was written is made anew.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from intact.errors import EngineWarning

__all__ = ["Cache", "key_of", "open_cache"]

MAX_BYTES = 2**29
"""Beyond this size the entries that were not used for longest go."""
PRUNE_EVERY = 32
"""Libraries that a process makes between two looks at how large the cache has become: a look takes
longer the fuller it is."""
STALE_SECONDS = 3600
"""A folder of work in progress that is older belongs to a process that was killed."""

LIBRARY = "library.so"
DIGEST = "sha256"


def key_of(*parts: object) -> str:
    """A key for whatever depends on `parts` and on nothing else: SHA-256, in hex."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


class Cache:
    """Libraries and facts below a folder that nobody else can write to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made = 0  # libraries, by this process
        for name in ("libraries", "facts"):
            (folder / name).mkdir(exist_ok=True)

    @contextmanager
    def work_folder(self) -> Iterator[Path]:
        """A folder for work in progress, gone afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def find(self, key: str) -> Path | None:
        """The library of this key, if it is there and whole."""
        entry = self.folder / "libraries" / key
        try:
            digest = hashlib.sha256((entry / LIBRARY).read_bytes()).hexdigest()
            if digest != (entry / DIGEST).read_text("ascii"):
                return None
            os.utime(entry)  # pruning spares what was used
        except (OSError, ValueError):
            return None
        return entry / LIBRARY

    def library(self, key: str, make: Callable[[Path], None]) -> Path:
        """The library of this key; `make` is called to write it where it is missing or damaged."""
        if found := self.find(key):
            return found
        entry = self.folder / "libraries" / key
        self._remove_stale()
        with self.work_folder() as work:
            make(work / LIBRARY)
            made = work / "entry"
            made.mkdir()
            (work / LIBRARY).rename(made / LIBRARY)
            digest = hashlib.sha256((made / LIBRARY).read_bytes()).hexdigest()
            (made / DIGEST).write_text(digest, "ascii")
            for _ in range(10):
                with suppress(OSError):  # there is one already: another process's, or a damaged one
                    made.rename(entry)
                    break
                if self.find(key):
                    break
                shutil.rmtree(entry, ignore_errors=True)
        if self._made % PRUNE_EVERY == 0:
            self._prune(spare=entry)
        self._made += 1
        if found := self.find(key):
            return found
        raise OSError(f"the library that was just written to {entry} is not there.")

    def fact(self, key: str) -> dict[str, Any] | None:
        """What `remember` stored under this key, if anything."""
        path = self.folder / "facts" / f"{key}.json"
        try:
            fact = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return fact if isinstance(fact, dict) else None

    def remember(self, key: str, fact: dict[str, Any]) -> None:
        """Store a fact; a folder that has become read-only or full merely forgets it."""
        with suppress(OSError), self.work_folder() as work:
            (work / "fact").write_text(json.dumps(fact), "utf-8")
            (work / "fact").replace(self.folder / "facts" / f"{key}.json")

    def _remove_stale(self) -> None:
        for folder in self.folder.glob("tmp-*"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, spare: Path) -> None:
        entries = []
        for path in (*self.folder.glob("libraries/*"), *self.folder.glob("facts/*")):
            with suppress(OSError):
                files = list(path.iterdir()) if path.is_dir() else [path]
                # At least a disk block each: so facts are bounded in number, too.
                size = sum(max(4096, f.stat().st_size) for f in files)
                entries.append((path.stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= MAX_BYTES:
                return
            if path == spare:
                continue
            total -= size
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def open_cache() -> Cache:
    """The user's cache, or where that is not possible one of this process alone.

    A folder that belongs to somebody else, or that others may write to, is not used: what it holds
    is run.
    """
    return _open(_user_folder())


@cache
def _open(folder: Path | None) -> Cache:
    if folder is None:
        reason = "there is no home folder"
    else:
        reason = _make_private(folder)
        if not reason:
            with suppress(OSError):
                return Cache(folder)
            reason = f"{folder} cannot be written to"
    warnings.warn(
        f"no cache of compiled programs: {reason}. Each process compiles what it runs.",
        EngineWarning,
        stacklevel=2,
    )
    return temporary_cache()


@cache
def temporary_cache() -> Cache:
    """A cache that ends with this process."""
    folder, owner = tempfile.mkdtemp(prefix="intact-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a child of fork()
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Cache(Path(folder))


def _user_folder() -> Path | None:
    if sys.platform == "darwin":
        base = Path("~/Library/Caches")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # as the XDG specification says
            base = Path("~/.cache")
    try:
        return base.expanduser() / "intact" / "native"
    except RuntimeError:
        return None


def _make_private(folder: Path) -> str:
    """Make the folder if it is not there; why it is not to be trusted, or an empty string."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        # Who may write to the parent may put another folder in its place. Its group may: what the
        # group puts there is then found to belong to somebody else.
        for path, others in ((folder.parent, stat.S_IWOTH), (folder, stat.S_IWGRP | stat.S_IWOTH)):
            facts = path.stat()
            if facts.st_uid != os.geteuid():
                return f"{path} belongs to another user"
            if facts.st_mode & others:
                return f"{path} can be written to by others (chmod go-w would help)"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written to"
