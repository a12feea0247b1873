"""Data sets of labelled images: what a network is trained, calibrated and tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

import numpy as np
import numpy.typing as npt

from intact.errors import DataError

__all__ = ["DATASETS", "Dataset", "batches", "load_dataset", "spread", "to_input"]

DATASETS = ("digits", "cifar10", "folder")

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, split into a training and a test set.

    name                       as `load_dataset` takes it
    classes                    class names; a label is an index into them
    train_images, test_images  uint8 `[N, 3, H, W]`, RGB; N >= 1
    train_labels, test_labels  int64 `[N]`

    The arrays are read-only. Data that does not fit this raises `DataError`.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise DataError(
                    f"{self.name}: {part} images must be uint8 [N, 3, H, W], not {images.dtype} "
                    f"{list(images.shape)}."
                )
            if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
                raise DataError(
                    f"{self.name}: {part} labels must be int64 [{len(images)}], not {labels.dtype} "
                    f"{list(labels.shape)}."
                )
            if not len(images):
                raise DataError(f"{self.name}: there are no {part} images.")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise DataError(
                    f"{self.name}: {part} labels reach from {labels.min()} to {labels.max()}, but "
                    f"there are {len(self.classes)} classes."
                )
            for field, array in ((f"{part}_images", images), (f"{part}_labels", labels)):
                frozen = array.view()
                frozen.flags.writeable = False
                object.__setattr__(self, field, frozen)

    @cached_property
    def sha256(self) -> str:
        """The hash, in hex, of all images and labels: two data sets with it are the same.

        Over, for the training and then the test set: the images' shape as decimal text, the
        pixels, the labels as little-endian int64.
        """
        digest = hashlib.sha256()
        for images, labels in (
            (self.train_images, self.train_labels),
            (self.test_images, self.test_labels),
        ):
            digest.update(repr(images.shape).encode())
            digest.update(np.ascontiguousarray(images).data)
            digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
        return digest.hexdigest()


def to_input(
    pixels: Images, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
) -> npt.NDArray[np.float32]:
    """Pixels to a network's input: float32 `(p / 255 - mean) / std`, by default within [-1, 1].

    mean, std  one for all channels, or one per channel

    Each operation is rounded to float32, so the bits are those of torchvision's `ToTensor`
    followed by `Normalize(mean, std)`.
    """
    x = pixels.astype(np.float32)
    x /= np.float32(255)
    x -= _per_channel(mean)
    x /= _per_channel(std)
    return x


def _per_channel(values: Sequence[float]) -> npt.NDArray[np.float32]:
    array = np.array(values, np.float32)
    return array.reshape(()) if len(values) == 1 else array.reshape(-1, 1, 1)


def batches(
    images: Images, labels: Labels, batch_size: int
) -> Iterator[tuple[npt.NDArray[np.float32], Labels]]:
    """The images in order as network input, float32 `[B, 3, H, W]`, with their labels int64 `[B]`.

    Every batch holds `batch_size` images, the last one what is left.
    """
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        yield to_input(images[part]), labels[part]


def spread(count: int, most: int | None) -> npt.NDArray[np.int64]:
    """At most `most` of the positions 0 to `count - 1`, evenly over all of them; None: all."""
    if most is None or count <= most:
        return np.arange(count)
    positions: npt.NDArray[np.int64] = np.linspace(0, count - 1, most).round().astype(np.int64)
    return positions


def load_dataset(name: str, data_dir: str | PathLike[str] | None = None) -> Dataset:
    """Load a data set by name.

    digits   scikit-learn's embedded digits at 3x32x32; takes no `data_dir`
    cifar10  CIFAR-10 in its official binary layout; see `intact.data.cifar10.load`
    folder   images in `data_dir`, one folder per class; see `intact.data.folder.load`

    Data that is missing or damaged raises `DataError`.
    """
    # Imported when asked for: each needs a library that the others do without.
    if name == "digits":
        from intact.data.digits import load as load_digits

        if data_dir is not None:
            raise DataError("the digits are embedded in scikit-learn: leave the data folder out.")
        return load_digits()
    if name == "cifar10":
        from intact.data.cifar10 import load as load_cifar10

        return load_cifar10(data_dir)
    if name == "folder":
        from intact.data.folder import load as load_folder

        if data_dir is None:
            raise DataError("the data set 'folder' needs a data folder: say where the images are.")
        return load_folder(data_dir)
    raise DataError(f"there is no data set {name!r}. There are: {', '.join(DATASETS)}.")
