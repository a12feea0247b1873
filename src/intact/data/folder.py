"""Images of the user's own: a folder tree with one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from intact.data import Dataset, Images, Labels
from intact.errors import DataError

__all__ = ["find_images", "load", "read_images"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
TEST_EVERY = 5
"""Of a tree without `train` and `test`, every fifth image of a class is for the test."""

Files = list[tuple[Path, int]]
"""Image files with their labels."""


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
        if classes != test_classes:
            different = sorted(set(classes) ^ set(test_classes))
            raise DataError(
                f"{train_dir} and {test_dir} must have the same classes, but only one of them has "
                f"{', '.join(different)}."
            )
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


def read_images(files: Sequence[Path], height: int, width: int) -> Images:
    """Image files as RGB, uint8 `[N, 3, height, width]`, resized bilinearly.

    A file that cannot be decoded raises `DataError`. At no time is there more than one image at its
    original size.
    """
    from PIL import Image

    images = np.empty((len(files), 3, height, width), np.uint8)
    for i, path in enumerate(files):
        try:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow's decoders raise whatever they like on damaged files
            raise DataError(
                f"{path} cannot be read as an image: {error}. Repair or remove the file."
            ) from error
        images[i] = np.asarray(small).transpose(2, 0, 1)
    return images


def _is_image(path: Path) -> bool:
    """Whether a path has the suffix of an image, and no part that begins with a dot."""
    return path.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in path.parts)


def _list(root: Path) -> tuple[tuple[str, ...], Files]:
    """The classes of a tree `root/CLASS/IMAGE`, and its files, both in the order of the names."""
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        files: Files = []
        for label, folder in enumerate(folders):
            images = sorted(p for p in folder.iterdir() if _is_image(Path(p.name)))
            if not images:
                raise DataError(
                    f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}). Remove the folder, "
                    "or put images of that class into it."
                )
            files += [(image, label) for image in images]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    if not folders:
        raise DataError(
            f"{root} holds no folders. It must hold one per class with the images in it, or two "
            "folders, train and test, that do."
        )
    return tuple(folder.name for folder in folders), files


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
    images = read_images([path for path, _ in files], size, size)
    return images, np.array([label for _, label in files], np.int64)
