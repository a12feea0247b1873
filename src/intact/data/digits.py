"""Handwritten digits that come with scikit-learn: a data set that needs no network."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from intact.data import Dataset, Images
from intact.errors import DataError

__all__ = ["enlarge", "load"]

SIDE = 32
TEST_IMAGES = 500
INK = 16
"""The digits' pixels count ink, from 0 to 16."""


def load() -> Dataset:
    """The 1,797 digits at 3x32x32, all three channels equal; the last 500 are the test set.

    The digits are in the order of their writers, so the split in order keeps almost every writer
    on one side of it: the test set shows how well a network reads people that it has not met.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: "
            "python -m pip install scikit-learn."
        ) from error
    ink, labels = load_digits(return_X_y=True)
    gray = enlarge(ink.reshape(-1, 8, 8))
    images = np.ascontiguousarray(np.broadcast_to(gray[:, None], (len(gray), 3, SIDE, SIDE)))
    labels = labels.astype(np.int64)
    split = len(images) - TEST_IMAGES
    return Dataset(
        "digits",
        tuple(map(str, range(10))),
        images[:split],
        labels[:split],
        images[split:],
        labels[split:],
    )


def enlarge(ink: npt.NDArray[np.float64]) -> Images:
    """Ink counts `[N, 8, 8]`, 0 to 16, to gray levels uint8 `[N, 32, 32]`, bilinearly.

    A new pixel lies between the centres of up to four old ones; at the border the old ones are
    repeated. The weights are eighths, so the integers below are exact, and the result is rounded
    half up.
    """
    old = ink.shape[-1]
    step = SIDE // old
    # Centres of new pixels in units of 1 / (2 * step) of an old one, as offsets from its centre.
    centre = np.clip(2 * np.arange(SIDE) + 1 - step, 0, 2 * step * (old - 1))
    low, share = np.divmod(centre, 2 * step)
    weight = np.zeros((SIDE, old), np.int64)
    weight[np.arange(SIDE), low] += 2 * step - share
    weight[np.arange(SIDE), np.minimum(low + 1, old - 1)] += share
    total = weight @ ink.astype(np.int64) @ weight.T
    full = INK * (2 * step) ** 2
    levels: Images = ((2 * 255 * total + full) // (2 * full)).astype(np.uint8)
    return levels
