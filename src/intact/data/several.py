"""Samples of several inputs: a file, or a folder of .npy files, with an array for each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from intact.data.arrays import LABEL_NAMES, Rows, in_memory, open_arrays, read_arrays, readable
from intact.data.checking import as_floats, as_labels, check_shape
from intact.data.folder import Part, find_part
from intact.data.samples import Listed, Numbered, Positions, Samples
from intact.errors import DataError
from intact.ops import Shape
from intact.signature import listed

__all__ = ["open_several"]

SUFFIXES = (".npz", ".safetensors")
"""Of files that can hold several arrays."""


def open_several(
    source: str | PathLike[str], shapes: Mapping[str, Shape | None], *, part: Part | None = None
) -> Samples:
    """The samples of a network with several inputs: of each input an array, called as it is.

    source  a .npz or .safetensors file, or a folder of .npy files, called as their arrays are
    shapes  input -> the shape of one sample, or None where it is not known; in the order of the
            inputs, which is that of the tuples in every batch
    part    which folder is meant of those where the folder holds `train` and `test`, and no .npy
            file itself; see `folder.find_part`

    Arrays hold floats `[N, *shape]`, taken as they are, all with the same N. One more may hold
    labels, as `checking.as_labels` takes them: `y`, or `labels`, unless an input is called so. Of a
    folder or a .safetensors file only the batch in hand is in memory.

    Nothing is guessed: an array that is missing, or that is none of these, raises `DataError`, and
    so does whatever else does not fit.
    """
    path = Path(source)
    name = path.name or path.resolve().name
    with readable(path):
        if path.is_dir() and not _files(path):
            path, parts = find_part(path, part)
            name = f"{name}/{path.name}" if parts else name
        arrays = _arrays(path, shapes)
        _check_names(name, arrays, shapes)
        rows = {each: arrays[each]() for each in shapes}
        labelled = next((each for each in _label_names(shapes) if each in arrays), None)
        given = None if labelled is None else in_memory(arrays[labelled]())
    for each, shape in shapes.items():
        _check(rows[each], shape, each, name)
    counts = {each: array.shape[0] for each, array in rows.items()}
    count = next(iter(counts.values()))
    if len(set(counts.values())) > 1:
        sizes = ", ".join(f"{n} of {each!r}" for each, n in counts.items())
        raise DataError(f"every input must have as many samples, but {name} holds {sizes}.")
    labels = None if given is None else as_labels(given, count, name)

    def read(positions: Positions, size: int) -> Iterator[Numbered]:
        for start in range(0, len(positions), size):
            at = positions[start : start + size]
            x = tuple(as_floats(rows[each][at], _called(each, name), at) for each in shapes)
            yield at, x, None if labels is None else labels[at]

    return Listed(
        name=name,
        shape=tuple(array.shape[1:] for array in rows.values()),
        labelled=labels is not None,
        inputs=tuple(shapes),
        reader=read,
        positions=np.arange(count),
    )


def _arrays(path: Path, inputs: Collection[str]) -> dict[str, Callable[[], Rows]]:
    """The names of the arrays of a file or folder, and what reads them."""
    if path.is_dir():
        return {file.stem: partial(_of_file, file) for file in _files(path)}
    if path.suffix.lower() in SUFFIXES:
        return open_arrays(path)
    raise DataError(
        f"{path} cannot hold samples of the network's {len(inputs)} inputs, {listed([*inputs])}. "
        "Name a .npz or .safetensors file, or a folder of .npy files, with an array for each, "
        "called as the input is."
    )


def _files(folder: Path) -> list[Path]:
    """The .npy files directly in a folder, but for names that begin with a dot."""
    files = sorted(folder.iterdir())
    return [file for file in files if file.suffix.lower() == ".npy" and file.name[0] != "."]


def _of_file(file: Path) -> Rows:
    return read_arrays(file)[0]


def _label_names(inputs: Collection[str]) -> list[str]:
    """What the array of the labels may be called beside these inputs."""
    return [name for name in LABEL_NAMES if name not in inputs]


def _check_names(name: str, given: Collection[str], inputs: Collection[str]) -> None:
    """`DataError` unless there is an array for every input, and no other but the labels."""
    labels = _label_names(inputs)
    missing = [each for each in inputs if each not in given]
    # Of two that could be the labels, one is left over.
    known = {*inputs, *[each for each in labels if each in given][:1]}
    extra = [each for each in given if each not in known]
    if not missing and not extra:
        return
    if not extra:
        advice = f"Add {listed(missing)}."
    elif not missing:
        advice = f"Leave out {listed(extra)}."
    elif len(missing) == len(extra) == 1:
        advice = f"If {extra[0]!r} is meant for {missing[0]!r}, rename it."
    else:
        advice = (
            f"Rename of {listed(extra)} what is meant for {listed(missing)}, each to the name of "
            "its input, and leave out the rest."
        )
    raise DataError(
        f"{name} holds {'the arrays ' + listed([*given]) if given else 'no arrays'}, but the "
        f"network's inputs are {listed([*inputs])}: there must be one array for each, called as "
        "it is"
        + (f", and labels, if any, as {' or '.join(map(repr, labels))}" if labels else "")
        + f". {advice}"
    )


def _check(rows: Rows, shape: Shape | None, each: str, name: str) -> None:
    """`DataError` unless an array can hold samples of an input; `shape` as in `open_several`."""
    called = _called(each, name)
    if rows.dtype.kind != "f":
        raise DataError(
            f"{called} holds {rows.dtype.name}, but every input of a network with several takes "
            "floats that are ready for it, prepared as in its training. Give float32."
        )
    if len(rows.shape) < (2 if shape is None else 1):
        raise DataError(
            f"{called} has the shape {list(rows.shape)}, but arrays of samples are [N, …]. Reshape "
            "single numbers to [N, 1]."
        )
    if shape is not None:
        check_shape(rows.shape[1:], shape, called)


def _called(each: str, name: str) -> str:
    """The array of an input in a message."""
    return f"{each!r} of {name}"
