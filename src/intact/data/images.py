"""Images as `Samples`: decoded when they are needed, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from intact.data import Images, Labels
from intact.data.folder import read_image
from intact.data.preprocessing import Preprocessing
from intact.data.processes import in_order
from intact.data.samples import Listed, Numbered, Positions, Samples
from intact.errors import DataError
from intact.ops import Shape

__all__ = ["image_samples"]

CHUNK = 16
"""Images that a process decodes at a time: enough that handing them over costs nothing, and few
enough that all processes have work."""

Image = Path | Images
"""A file, or the pixels uint8 `[C, H, W]`, RGB or gray."""
Decoded = tuple[Images, npt.NDArray[np.bool_], list[str]]
"""The images uint8 `[k, C, H, W]` of those that could be read, which these are, and what is wrong
with the others."""


def image_samples(
    name: str,
    fetch: Callable[[Positions], Sequence[Image]],
    count: int,
    labels: Labels | None,
    classes: tuple[str, ...] | None,
    preprocessing: Preprocessing,
    shape: Shape | None,
    workers: int = 0,
    skipped: Callable[[str], object] | None = None,
    names: Sequence[str] | None = None,
) -> Samples:
    """Images that are read when a batch of them is.

    fetch     from positions of images, 0 to `count - 1`, to the images, one each
    labels    int64 `[count]`
    shape     of a sample of the network; None where it is not known
    workers   processes that decode; any number gives the same bits in the same order
    skipped   called, once for each, with the reason why an image is left out; None: an image that
              cannot be read is a `DataError`
    names     of the images, by position, where they have any

    When all images have been left out, that is a `DataError`, too.
    """
    made = preprocessing.shape(shape)
    decode = partial(_decode, preprocessing=preprocessing, shape=made)
    told: set[str] = set()

    def read(positions: Positions, size: int) -> Iterator[Numbered]:
        batches = [positions[i : i + size] for i in range(0, len(positions), size)]
        chunks = (fetch(batch[i : i + CHUNK]) for batch in batches for i in _starts(batch))
        nothing = True
        with closing(in_order(decode, chunks, workers)) as results:
            for batch in batches:
                parts = [next(results) for _ in _starts(batch)]
                for message in (message for part in parts for message in part[2]):
                    if skipped is None:
                        raise DataError(message)
                    if message not in told:
                        told.add(message)
                        skipped(message)
                readable = np.concatenate([part[1] for part in parts])
                if readable.any():
                    nothing = False
                    x = preprocessing.floats(np.concatenate([part[0] for part in parts]))
                    at = batch[readable]
                    yield at, x, None if labels is None else labels[at]
        if nothing:
            raise DataError(f"{name}: none of {len(positions)} images can be read.")

    return Listed(
        name=name,
        shape=made,
        labelled=labels is not None,
        classes=classes,
        preprocessing=preprocessing,
        names=names,
        reader=read,
        positions=np.arange(count),
    )


def _starts(batch: Positions) -> range:
    return range(0, len(batch), CHUNK)


def _decode(images: Sequence[Image], preprocessing: Preprocessing, shape: Shape) -> Decoded:
    readable = np.ones(len(images), np.bool_)
    pixels, problems = [], []
    for i, image in enumerate(images):
        try:
            pixels.append(
                read_image(image, preprocessing, shape)
                if isinstance(image, Path)
                else preprocessing.pixels(image, shape)
            )
        except DataError as error:
            readable[i] = False
            problems.append(str(error))
    return np.array(pixels, np.uint8).reshape(-1, *shape), readable, problems
