"""`open_samples`: whatever a user has, a path, a name or a Python object, as `Samples`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from intact.data import DATASETS, load_dataset
from intact.data.arrays import SUFFIXES as ARRAY_SUFFIXES
from intact.data.arrays import array_samples, read_arrays
from intact.data.folder import FOLDERS, Part, find_classes
from intact.data.folder import SUFFIXES as IMAGE_SUFFIXES
from intact.data.images import image_samples
from intact.data.iterables import iterable_samples
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.data.samples import Positions, Samples
from intact.errors import DataError, DataWarning
from intact.ops import Shape

__all__ = ["BUILT_IN", "open_samples"]

BUILT_IN = tuple(name for name in DATASETS if name != "folder")
"""Names of data sets that stand for themselves."""


def open_samples(
    source: object,
    *,
    preprocessing: Preprocessing | None = None,
    shape: Shape | None = None,
    workers: int = 0,
    skip_corrupt: bool = False,
    part: Part | None = None,
    data_dir: str | PathLike[str] | None = None,
    on_skip: Callable[[str], object] | None = None,
) -> Samples:
    """The samples of a source; nothing but what tells how many there are is read yet.

    source         a folder of images, with or without classes, see `folder.find_classes`; an image;
                   a .npy, .npz or .safetensors file, see `arrays.read_arrays`; the name of a data
                   set, "digits" or "cifar10" (write "./digits" for a folder of that name); or
                   a Python object, see `iterables.iterable_samples`
    preprocessing  what becomes of pixels: files of images need it, arrays and tensors of uint8 too;
                   for data sets it is `PRESETS["signed"]` by default. Floats are taken as they are
    shape          of a sample of the network, which all samples must have, or be brought to; None
                   where it is not known
    workers        processes that decode images; any number gives the same bits in the same order
    skip_corrupt   leave images out that cannot be read, instead of raising `DataError`
    part           which part is meant where the source has two: a data set, which needs it, or a
                   folder that holds `train` and `test`
    data_dir       where the data set is, see `load_dataset`
    on_skip        called once for each image that is left out, with the reason, which names the
                   file; None: a `DataWarning` says it

    Whatever cannot be used raises `DataError`.
    """
    if workers < 0:
        raise DataError(f"{workers} processes cannot read: give 0 or more.")
    if part not in (None, "train", "test"):
        raise DataError(f"there is no part {part!r}: it is train or test.")
    skipped = (on_skip or _warn) if skip_corrupt else None
    if isinstance(source, str) and source in BUILT_IN:
        return _data_set(source, preprocessing, shape, workers, part, data_dir)
    if data_dir is not None:
        raise DataError(f"only {' and '.join(BUILT_IN)} take a data folder besides their name.")
    if not isinstance(source, str | PathLike):
        return iterable_samples(source, f"the given {type(source).__name__}", preprocessing, shape)
    path = Path(os.fsdecode(source))
    if path.suffix.lower() in ARRAY_SUFFIXES and not path.is_dir():
        return array_samples(path.name, *read_arrays(path), preprocessing, shape, workers)
    if path.is_dir():
        root, (classes, found) = path, find_classes(path, part)
    elif path.suffix.lower() in IMAGE_SUFFIXES and path.exists():
        root, classes, found = path.parent, None, [(path, 0)]
    else:
        raise DataError(
            f"{path} is {'no data that can be read' if path.exists() else 'not there'}. Name a "
            "folder of images, an image, a .npy, .npz or .safetensors file, or "
            f"{' or '.join(BUILT_IN)}."
        )
    if preprocessing is None:
        raise DataError(
            f"{path} holds images, which must become the network's input as in its training. Say "
            f"how: `preprocessing`, one of PRESETS ({', '.join(PRESETS)}) or your own; on the "
            "command line --preset, or --mean and --std."
        )
    files, labels = [file for file, _ in found], np.array([label for _, label in found], np.int64)
    name = path.name or path.resolve().name
    # The folder that was chosen for the part, where there was a choice.
    tops = {file.relative_to(path).parts[0] for file in files} if path.is_dir() else set()
    if part is not None and len(tops) == 1 and tops <= set(FOLDERS[part]):
        name = f"{name}/{tops.pop()}"
    return image_samples(
        f"images of {name}",
        partial(_pick, files),
        len(files),
        None if classes is None else labels,
        classes,
        preprocessing,
        shape,
        workers,
        skipped,
        [file.relative_to(root).as_posix() for file in files],
    )


def _pick(files: list[Path], positions: Positions) -> list[Path]:
    return [files[i] for i in positions]


def _data_set(
    name: str,
    preprocessing: Preprocessing | None,
    shape: Shape | None,
    workers: int,
    part: Part | None,
    data_dir: str | PathLike[str] | None,
) -> Samples:
    """The images of a part of a data set that comes by its name."""
    if part is None:
        raise DataError(f"{name} has two parts: say which one is meant, train or test.")
    data = load_dataset(name, data_dir)
    images, labels = {
        "train": (data.train_images, data.train_labels),
        "test": (data.test_images, data.test_labels),
    }[part]
    return image_samples(
        f"{name}, {part} images",
        lambda at: list(images[at]),
        len(images),
        labels,
        data.classes,
        preprocessing or PRESETS["signed"],
        shape or images.shape[1:],
        workers,
    )


def _warn(message: str) -> None:
    warnings.warn(f"{message} It is left out.", DataWarning, stacklevel=2)
