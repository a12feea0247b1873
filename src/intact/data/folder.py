"""Images of the user's own in folders: found, sorted into classes and parts, and read."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from intact.data import Dataset, Images, Labels
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.errors import DataError
from intact.ops import Shape

__all__ = [
    "Files",
    "Part",
    "find_classes",
    "find_images",
    "find_part",
    "load",
    "read_image",
    "read_images",
]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TEST_EVERY = 5
"""Of a tree without `train` and `test`, every fifth image of a class is for the test."""

Files = list[tuple[Path, int]]
"""Image files with their labels."""
Part = Literal["train", "test"]
FOLDERS = {"train": ("train",), "test": ("test", "val")}
"""Names that the folder of a part may have."""


def load(data_dir: str | PathLike[str], size: int = 32) -> Dataset:
    """The images of `data_dir`, as RGB, resized to `size` x `size` pixels.

    Either `train/CLASS/IMAGE` and `test/CLASS/IMAGE`, with the same classes in both; or
    `CLASS/IMAGE`, of which every fifth image of each class, in the order of their names, is for the
    test. Classes are in the order of their names, and so are the images of a class. Only files with
    the suffix of an image format are looked at; names that begin with a dot are not.

    Data that is missing, unreadable or not an image raises `DataError` that names the file.
    """
    root = Path(data_dir)
    train_dir, test_dir = root / "train", root / "test"
    if train_dir.is_dir() and test_dir.is_dir():
        classes, train = _list(train_dir)
        test_classes, test = _list(test_dir)
        _check_same(train_dir, classes, test_dir, test_classes)
    else:
        classes, files = _list(root)
        train, test = _split(files, classes)
    # All files are known to exist before the first one is decoded.
    return Dataset("folder", classes, *_read(train, size), *_read(test, size))


def find_images(folder: str | PathLike[str]) -> list[Path]:
    """The image files below a folder, however deep, in the order of their paths.

    Files count as in `load`. A folder that cannot be read, or has none, raises `DataError`.
    """
    root = Path(folder)
    try:
        found = sorted(path for path in root.rglob("*") if _is_image(path.relative_to(root)))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    if not found:
        raise DataError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}).")
    return found


def find_classes(
    folder: str | PathLike[str], part: Part | None = None
) -> tuple[tuple[str, ...] | None, Files]:
    """The classes of a folder of images, and the image files in it with their labels.

    part  which folder is meant of those where `folder` holds `train` and `test` (or `val`), with
          the same classes in both. Elsewhere it does not matter

    A folder with images directly in it has no classes: all images below it belong together, and
    have the label 0. Otherwise each folder in it is a class, with all images below. Classes are in
    the order of their names, the order of torchvision's `ImageFolder`, which puts "10" before "2".
    """
    chosen, parts = find_part(Path(folder), part)
    classes, files = _find_classes(chosen)
    for other in parts:
        if classes is not None and other != chosen:
            names = tuple(path.name for path in _folders(other))
            _check_same(chosen, classes, other, names)
    return classes, files


def find_part(root: Path, part: Part | None) -> tuple[Path, list[Path]]:
    """The folder of a part where `root` holds `train` and `test` (or `val`), and all such folders.

    Elsewhere `root` itself, and none. Where there is no folder of that part, or where `part` does
    not say which is meant, `DataError`.
    """
    folders = {path.name: path for path in _folders(root)}
    train, test = ([folders[n] for n in names if n in folders] for names in FOLDERS.values())
    if not ((train and test) or (folders and len(train + test) == len(folders))):
        return root, []
    chosen = {"train": train, "test": test, None: train + test}[part]
    there = " and ".join(path.name for path in train + test)
    if not chosen:
        raise DataError(
            f"{root} holds {there}, but nothing to {part} with. Name the folder itself."
        )
    if len(chosen) > 1 or part is None:
        raise DataError(
            f"{root} holds {there}: say which of them is meant, train or test, or name that folder."
        )
    return chosen[0], train + test


def _find_classes(root: Path) -> tuple[tuple[str, ...] | None, Files]:
    """As `find_classes`, for a folder without parts."""
    if not any(_is_image(Path(path.name)) and path.is_file() for path in _entries(root)):
        return _list(root)
    return None, [(path, 0) for path in find_images(root)]


def read_image(path: Path, preprocessing: Preprocessing, shape: Shape) -> Images:
    """An image file as uint8 `[C, H, W]`, not normalised yet; see `Preprocessing.pixels`.

    A file that cannot be decoded raises `DataError`.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return preprocessing.pixels(image, shape)
    except Exception as error:  # Pillow's decoders raise whatever they like on damaged files
        raise DataError(
            f"{path} cannot be read as an image: {error}. Repair or remove the file."
        ) from error


def read_images(files: Sequence[Path], preprocessing: Preprocessing, shape: Shape) -> Images:
    """Image files as uint8 `[N, C, H, W]`; see `read_image`.

    At no time is there more than one image at its original size.
    """
    images = np.empty((len(files), *shape), np.uint8)
    for i, path in enumerate(files):
        images[i] = read_image(path, preprocessing, shape)
    return images


def _is_image(path: Path) -> bool:
    """Whether a path has the suffix of an image, and no part that begins with a dot."""
    return path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.parts)


def _entries(root: Path) -> list[Path]:
    """What a folder holds, in the order of the names."""
    try:
        return sorted(root.iterdir())
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _folders(root: Path) -> list[Path]:
    return [path for path in _entries(root) if path.is_dir() and not path.name.startswith(".")]


def _list(root: Path) -> tuple[tuple[str, ...], Files]:
    """The classes of a tree `root/CLASS/IMAGE`, and its files, both in the order of the names."""
    folders = _folders(root)
    if not folders:
        raise DataError(
            f"{root} holds no folders. It must hold one per class with the images in it, or two "
            "folders, train and test, that do."
        )
    files = [
        (image, label) for label, folder in enumerate(folders) for image in find_images(folder)
    ]
    return tuple(folder.name for folder in folders), files


def _check_same(
    one_dir: Path, one: tuple[str, ...], other_dir: Path, other: tuple[str, ...]
) -> None:
    if one != other:
        raise DataError(
            f"{one_dir} and {other_dir} must have the same classes, but only one of them has "
            f"{', '.join(sorted(set(one) ^ set(other)))}."
        )


def _split(files: Files, classes: tuple[str, ...]) -> tuple[Files, Files]:
    """Every fifth image of each class, the fifth being the first one, is for the test."""
    train: Files = []
    test: Files = []
    for label, name in enumerate(classes):
        images = [pair for pair in files if pair[1] == label]
        if len(images) < TEST_EVERY:
            raise DataError(
                f"class {name!r} has {len(images)} images, but at least {TEST_EVERY} are needed, "
                f"because every {TEST_EVERY}th is for the test. Add some, or sort the images into "
                "train and test folders yourself."
            )
        test += images[TEST_EVERY - 1 :: TEST_EVERY]
        train += [pair for i, pair in enumerate(images) if (i + 1) % TEST_EVERY]
    return train, test


def _read(files: Files, size: int) -> tuple[Images, Labels]:
    # The pixels alone: a data set is not normalised. Straight to the size, as the preset does it.
    images = read_images([path for path, _ in files], PRESETS["signed"], (3, size, size))
    return images, np.array([label for _, label in files], np.int64)
