"""Files of arrays, .npy, .npz and .safetensors: their samples, read where they are needed."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.format import MAGIC_PREFIX
from safetensors import SafetensorError, safe_open

from intact.data.checking import as_floats, as_labels, check_floats, check_pixels, check_shape
from intact.data.images import image_samples
from intact.data.preprocessing import Preprocessing
from intact.data.samples import Listed, Numbered, Positions, Samples
from intact.errors import DataError
from intact.ops import Shape

__all__ = [
    "LABEL_NAMES",
    "SUFFIXES",
    "Array",
    "Rows",
    "array_samples",
    "in_memory",
    "npz_bytes",
    "open_arrays",
    "read_arrays",
    "readable",
]

SUFFIXES = frozenset({".npy", ".npz", ".safetensors"})
SAMPLE_NAMES = ("x", "images", "inputs")
LABEL_NAMES = ("y", "labels")
"""What the array of the labels may be called."""
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, SafetensorError)
"""What reading a file raises that is damaged or packed in an unknown way."""

Array = npt.NDArray[Any]


class Rows(Protocol):
    """What is read of an array of samples: an array in memory or in a file."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of every number."""

    @property
    def shape(self) -> Shape:
        """`[N, …]`."""

    def __getitem__(self, positions: Positions, /) -> Array:
        """The samples at some positions, in memory."""


@dataclass(frozen=True, eq=False)
class _Stored:
    """An array in a .safetensors file, of which rows are read when they are asked for."""

    rows: Any
    dtype: np.dtype[Any]
    shape: Shape

    def __getitem__(self, positions: Positions) -> Array:
        rows = np.empty((len(positions), *self.shape[1:]), self.dtype)
        for i, position in enumerate(positions.tolist()):
            rows[i] = self.rows[position : position + 1][0]
        return rows


def read_arrays(path: Path) -> tuple[Rows, Array | None]:
    """The samples `[N, …]` of a .npy, .npz or .safetensors file and their labels, if it has any.

    Samples are the array called x, images or inputs, or the only one; labels, those called y or
    labels. Of a .npy or .safetensors file only the samples that are asked for are in memory. A
    pickle is never loaded. What cannot be read, or is a single number, raises `DataError`.
    """
    with readable(path):
        arrays = open_arrays(path)
        labels = next((arrays[name]() for name in LABEL_NAMES if name in arrays), None)
        others = [name for name in arrays if name not in LABEL_NAMES]
        chosen = next((name for name in SAMPLE_NAMES if name in arrays), None)
        if chosen is None and len(others) == 1:
            (chosen,) = others
        if chosen is None:
            names = f" ({', '.join(others[:5])})" if others else ""
            raise DataError(
                f"{path} holds {len(others)} arrays{names}: give a file with one, or call that "
                f"of the samples {SAMPLE_NAMES[0]!r}, and that of the labels {LABEL_NAMES[0]!r}."
            )
        rows = arrays[chosen]()
    if not rows.shape:
        raise DataError(f"{path} holds a single number, not a batch of samples.")
    return rows, None if labels is None else in_memory(labels)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever keeps a file of arrays from being read is a `DataError` that names it."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower().rstrip(".")
        raise DataError(f"{path} cannot be read as an array: {reason}. Check the path.") from error
    except (ValueError, EOFError, MemoryError, *DAMAGED) as error:
        # NumPy takes whatever it does not know for a pickle, and recommends to load that.
        pickled = "allow_pickle" in str(error) or "Python objects" in str(error)
        reason = "it holds no numbers" if pickled else str(error).rstrip(".")
        raise DataError(
            f"{path} cannot be read as an array: {reason}. Write it with numpy.save."
        ) from error


def in_memory(rows: Rows) -> Array:
    """All of an array."""
    return rows if isinstance(rows, np.ndarray) else rows[np.arange(rows.shape[0])]


def open_arrays(path: Path) -> dict[str, Callable[[], Rows]]:
    """The names of the arrays of a file, and what reads them; both fail as `readable` says.

    The array of a .npy file is called as samples are.
    """
    if path.suffix.lower() == ".safetensors":
        file: Any = safe_open(path, "np")
        return {name: partial(_stored, path, file, name) for name in file.keys()}  # noqa: SIM118
    with path.open("rb") as opened:
        if opened.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
            return {SAMPLE_NAMES[0]: partial(_mapped, path)}
        opened.seek(0)
        names = np.load(opened, allow_pickle=False).files
    return {name: partial(_packed, path, name) for name in names}


def _mapped(path: Path) -> Array:
    """The array of a .npy file, of which the system reads what is looked at."""
    return np.asarray(np.load(path, "r", allow_pickle=False))


def _packed(path: Path, name: str) -> Array:
    """An array of a .npz file, all of it, as it may be compressed."""
    with np.load(path, allow_pickle=False) as content:
        array: Array = content[name]
    return array


NUMPYS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64")
"""Types of safetensors that NumPy has of its own."""


def _stored(path: Path, file: Any, name: str) -> Rows:
    rows = file.get_slice(name)
    shape = tuple(rows.get_shape())
    if not shape or not shape[0]:
        array: Array = file.get_tensor(name)
        return array
    # NumPy knows others only where some package has taught it them.
    if rows.get_dtype() not in NUMPYS:
        raise DataError(
            f"{path} holds {name!r} as {rows.get_dtype()}, which NumPy lacks. Store float32."
        )
    return _Stored(rows, rows[:1].dtype, shape)


def array_samples(
    name: str,
    rows: Rows,
    labels: Array | None,
    preprocessing: Preprocessing | None,
    shape: Shape | None,
    workers: int = 0,
) -> Samples:
    """The samples of an array `[N, …]`, floats that are ready for the network, or pixels.

    rows           floats `[N, *shape]`, taken as they are; or, with `preprocessing`, RGB or gray
                   images uint8 `[N, C, H, W]` of any size
    labels         as `checking.as_labels` takes them
    preprocessing  what becomes of pixels
    shape          of a sample of the network; None where it is not known
    workers        processes that prepare pixels

    What does not fit raises `DataError`.
    """
    count = rows.shape[0]
    indices = None if labels is None else as_labels(labels, count, name)
    if rows.dtype == np.uint8 and preprocessing is not None:
        check_pixels(rows.shape, name)
        return image_samples(
            name, lambda at: list(rows[at]), count, indices, None, preprocessing, shape, workers
        )
    check_floats(rows.dtype, name)
    if shape is not None:
        check_shape(rows.shape[1:], shape, name)

    def read(positions: Positions, size: int) -> Iterator[Numbered]:
        for start in range(0, len(positions), size):
            at = positions[start : start + size]
            yield at, as_floats(rows[at], name, at), None if indices is None else indices[at]

    return Listed(
        name=name,
        shape=rows.shape[1:],
        labelled=indices is not None,
        reader=read,
        positions=np.arange(count),
    )


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """As `numpy.savez`, but the same bytes for the same arrays: members carry no time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return buffer.getvalue()
