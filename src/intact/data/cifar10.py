"""CIFAR-10 in its official binary layout: found, or downloaded with its hash checked, and read."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
import pooch  # type: ignore[import-untyped]

from intact.data import Dataset, Images, Labels
from intact.errors import DataError

__all__ = ["download", "load", "read", "read_records"]

ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
"""The name of the folder in the archive."""
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
CLASSES_FILE = "batches.meta.txt"
DIR_VARIABLE = "INTACT_DATA_DIR"

RECORDS = 10_000
"""Records in each file."""
SIDE = 32
RECORD_BYTES = 1 + 3 * SIDE * SIDE
"""A label, then 1,024 red, 1,024 green and 1,024 blue pixels, row by row."""
CLASSES = 10
CLASSES_FILE_LIMIT = 1_000
"""Bytes; the official file has 61."""
_REMEDY = f"Unpack {ARCHIVE_URL} again, all of it."


def load(data_dir: str | PathLike[str] | None = None) -> Dataset:
    """The 50,000 training and 10,000 test images, in the order of the files.

    Read from `data_dir`, else from the folder that the environment variable INTACT_DATA_DIR names,
    else from the user's cache, into which the official archive is downloaded once. A folder may be
    the one that holds the files, or the parent of `cifar-10-batches-bin`. Files of the user's own
    are checked for their structure, not for their hash.
    """
    given = data_dir if data_dir is not None else os.environ.get(DIR_VARIABLE)
    return read(find(Path(given)) if given else _cached())


def find(data_dir: Path) -> Path:
    """The folder with the files: `data_dir`, or `cifar-10-batches-bin` inside it."""
    for folder in (data_dir, data_dir / FOLDER):
        if any((folder / name).is_file() for name in (*TRAIN_FILES, TEST_FILE)):
            return folder
    raise DataError(
        f"{data_dir} holds neither {TRAIN_FILES[0]} nor a folder {FOLDER}. Point it at the "
        f"unpacked binary version of CIFAR-10, {ARCHIVE_URL}."
    )


def read(folder: Path) -> Dataset:
    """Read the files of `folder`; a missing or damaged one raises `DataError` that names it."""
    classes = _read_classes(folder / CLASSES_FILE)
    images = np.empty((len(TRAIN_FILES) * RECORDS, 3, SIDE, SIDE), np.uint8)
    labels = np.empty(len(images), np.int64)
    for i, name in enumerate(TRAIN_FILES):
        part = slice(i * RECORDS, (i + 1) * RECORDS)
        images[part], labels[part] = read_records(folder / name)
    return Dataset("cifar10", classes, images, labels, *read_records(folder / TEST_FILE))


def read_records(path: Path, records: int = RECORDS) -> tuple[Images, Labels]:
    """The images, uint8 `[records, 3, 32, 32]`, and labels, int64 `[records]`, of one file."""
    expected = records * RECORD_BYTES
    try:
        # One byte more shows that a file is too long, however long it is.
        with path.open("rb") as file:
            data = file.read(expected + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. {_REMEDY}") from error
    if len(data) != expected:
        found = f"{len(data):,} bytes" if len(data) < expected else f"more than {expected:,} bytes"
        raise DataError(
            f"{path} has {found}, but {records:,} records of {RECORD_BYTES:,} bytes make "
            f"{expected:,}. {_REMEDY}"
        )
    table = np.frombuffer(data, np.uint8).reshape(records, RECORD_BYTES)
    labels = table[:, 0].astype(np.int64)
    wrong = np.flatnonzero(labels >= CLASSES)
    if wrong.size:
        raise DataError(
            f"{path}: the label of record {wrong[0]}, counted from 0, is {labels[wrong[0]]}, not "
            f"0 to {CLASSES - 1}. {_REMEDY}"
        )
    return np.ascontiguousarray(table[:, 1:]).reshape(records, 3, SIDE, SIDE), labels


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            names = tuple(file.read(CLASSES_FILE_LIMIT).decode().split())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. {_REMEDY}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text. {_REMEDY}") from error
    if len(names) != CLASSES or len(set(names)) != CLASSES:
        raise DataError(f"{path} must name {CLASSES} classes, one on each line. {_REMEDY}")
    return names


# -- download ------------------------------------------------------------------------------------


def _cached() -> Path:
    cache = Path(pooch.os_cache("intact"))
    folder = cache / FOLDER
    return folder if folder.is_dir() else download(cache)


def download(cache: Path, url: str = ARCHIVE_URL, md5: str = ARCHIVE_MD5) -> Path:
    """Download and unpack the archive into `cache / "cifar-10-batches-bin"`, and return that.

    The folder appears complete or not at all. Any failure raises `DataError` and leaves nothing
    behind.
    """
    folder = cache / FOLDER
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as temporary:
            # What requests raises is an OSError, and a wrong hash a ValueError.
            archive = pooch.retrieve(url, f"md5:{md5}", "archive", temporary)
            unpacked = Path(temporary) / FOLDER
            _unpack(Path(archive), unpacked)
            if not folder.is_dir():  # another process may have been faster
                unpacked.replace(folder)
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded from {url}: {error}. Try again; or, without a "
            "network, bring the archive by other means, unpack it, and name the folder as the "
            f"data folder or in {DIR_VARIABLE}, or move it to {folder}."
        ) from error
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Write the archive's data files to a new `folder`; nothing else in it is looked at."""
    size = RECORDS * RECORD_BYTES
    wanted = {f"{FOLDER}/{name}": range(size, size + 1) for name in (*TRAIN_FILES, TEST_FILE)}
    wanted[f"{FOLDER}/{CLASSES_FILE}"] = range(CLASSES_FILE_LIMIT)
    folder.mkdir()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            sizes = wanted.pop(member.name, None)
            if sizes is None:
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None or member.size not in sizes:
                raise ValueError(f"{member.name} in the archive is not the file that it should be")
            # The path is ours, not the archive's, so that it cannot lead anywhere else.
            with content, (folder / Path(member.name).name).open("xb") as file:
                shutil.copyfileobj(content, file)
    if wanted:
        raise ValueError(f"the archive lacks {', '.join(sorted(wanted))}")
