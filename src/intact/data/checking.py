"""Mistakes that people make with data: a function for each finds it and says how to repair it.

What cannot be used raises `DataError`. What can, but hardly is what was meant, is returned as a
message, or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.data import Labels
from intact.data.channels import Channels
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.data.samples import Positions
from intact.errors import DataError
from intact.ops import Shape

__all__ = [
    "as_floats",
    "as_labels",
    "channels_last_hint",
    "check_floats",
    "check_labels",
    "check_pixel_values",
    "check_pixels",
    "check_shape",
    "first_where",
    "other_classes",
    "shape_hint",
    "swapped_channels",
    "unlike_calibration",
]

Array = npt.NDArray[Any]

MOVE = " The channels come last: move the channels with np.moveaxis(x, -1, 1)."
LAYOUTS = {1: "one channel", 3: "3 channels", 4: "4 channels"}
ENOUGH = 16
"""Samples of which it can be said what samples look like: one photo may well be black."""
APART = 5 / 3
"""Factor between spreads that are called different. Pixels in [0, 1] and [-1, 1] differ by 2, those
normalised by ImageNet's figures from the latter by 2.2; halves of one data set hardly by 1.1."""
COLOUR_NOISE = 0.5
"""How much the mean colours of images vary, in standard deviations of their pixels: 0.5 to 0.6 on
CIFAR-10. With n images, means are this / sqrt(n) uncertain."""
CLEARLY = 2
"""How much better the reversed order must fit. On CIFAR-10, against 256 images, that found 98 % of
120 reversed sets of 300, all of 1,000, and none of sets as they are, of all classes or of one."""


# -- what cannot be used -------------------------------------------------------------------------


def shape_hint(given: Shape, expected: Shape) -> str:
    """What is probably wrong with a sample of shape `given`, as a sentence after a space, or ""."""
    if len(given) == len(expected) + 1 and given[1:] == expected:
        return " That is a batch already: give batches or samples, not batches of batches."
    if given == (1, *expected[1:]) and len(expected) == 3:
        return " Those are gray images: repeat the channel, as with np.repeat(x, 3, axis=1)."
    if len(given) == len(expected) == 3 and given[0] != expected[0]:
        if given[2] == expected[0]:
            return MOVE
        if given[2] in LAYOUTS and given[0] not in LAYOUTS:
            return (
                f" The channels seem to come last, and there are {given[2]}, not {expected[0]}: "
                "move the channels with np.moveaxis(x, -1, 1), and bring them to that number."
            )
        if given[0] in LAYOUTS:
            return f" They have {LAYOUTS[given[0]]}, not {expected[0]}."
    if len(given) == 3 and given[:1] == expected[:1]:
        return " Resize or crop them as for the training of the network."
    if math.prod(given) == math.prod(expected):
        return " The number of values is right: reshape them."
    return ""


def channels_last_hint(given: Shape) -> str:
    """As `shape_hint`, of a sample that a network fails on whose shape nobody knows."""
    if len(given) == 3 and given[2] in LAYOUTS and given[0] not in LAYOUTS:
        return MOVE
    return ""


def check_shape(shape: Shape, expected: Shape, name: str) -> None:
    """`DataError` unless a sample has the shape that the network takes.

    name  what the samples are called, as the subject of "holds": "test.npz", "element 3 of …"
    """
    if shape != expected:
        raise DataError(
            f"{name} holds samples of shape {list(shape)}, but the network takes {list(expected)}."
            f"{shape_hint(shape, expected)}"
        )


def check_floats(dtype: np.dtype[Any], name: str) -> None:
    """`DataError` unless samples are numbers with a fraction, as networks take them."""
    if dtype.kind == "f":
        return
    if dtype == np.uint8:
        raise DataError(
            f"{name} holds uint8, which looks like pixels, but the network takes floats that are "
            "normalised as in its training. Say how: `preprocessing`, on the command line "
            "--preset, or --mean and --std; or give float32."
        )
    raise DataError(
        f"{name} holds {dtype.name}, but the network takes floats that are normalised as in its "
        "training. Give float32; or uint8, if they are pixels from 0 to 255, and the preprocessing."
    )


def check_pixels(shape: Shape, name: str) -> None:
    """`DataError` unless an array of uint8 can be a batch of images `[N, C, H, W]`."""
    if len(shape) != 4 or shape[1] not in (1, 3):
        last = len(shape) == 4 and shape[3] in (1, 3)
        raise DataError(
            f"{name} holds uint8 {list(shape)}, but images are uint8 [N, C, H, W] with 1 or 3 "
            f"channels.{MOVE if last else ''}"
        )


def check_pixel_values(batch: npt.NDArray[np.float32], name: str) -> None:
    """`DataError` unless all values are whole numbers from 0 to 255."""
    if not ((batch >= 0) & (batch <= 255) & (batch == np.rint(batch))).all():
        raise DataError(
            f"{name} holds values that are no pixels, whole numbers from 0 to 255, so a program "
            "that takes pixels cannot take them. Give images, or an array of uint8."
        )


def first_where(found: npt.NDArray[np.bool_]) -> tuple[int, list[int]] | None:
    """The first sample of a batch in which something was found, and the place in it; or None."""
    if not found.any():
        return None
    sample, *place = (int(i) for i in np.argwhere(found)[0])
    return sample, place


def as_floats(
    given: Array, name: str, numbers: Sequence[int] | Positions
) -> npt.NDArray[np.float32]:
    """A batch of floats as float32; `DataError` for a NaN or an infinity in it.

    numbers  of the samples of the batch, to name the one that is to blame
    """
    with np.errstate(over="ignore"):  # what overflows is found next
        batch = given.astype(np.float32)
    found = first_where(~np.isfinite(batch))
    if found is not None:
        sample, place = found
        value = batch[sample][tuple(place)]
        raise DataError(
            f"{name} holds {'a NaN' if np.isnan(value) else 'an infinite value'} in sample "
            f"{int(numbers[sample])}, at {place}. Look for a division by zero or an overflow in "
            "whatever produced it, such as a standard deviation of 0."
        )
    return batch


def as_labels(given: Array, count: int, name: str) -> Labels:
    """Labels as int64 `[count]`.

    given  whole numbers of any type, `[count]` or `[count, 1]`; anything else is a `DataError`
    """
    if given.shape == (count, 1):
        given = given[:, 0]
    if given.dtype.kind not in "iu" or given.shape != (count,):
        one_hot = given.ndim == 2 and given.shape[0] == count
        raise DataError(
            f"{name} holds labels {given.dtype.name} {list(given.shape)}, but labels are the "
            f"indices of classes, int64 [{count}]."
            + (" If they are one-hot, take labels.argmax(1)." if one_hot else "")
            + " Leave out what is none."
        )
    return given.astype(np.int64)


def check_labels(labels: Labels, outputs: int, name: str) -> None:
    """`DataError` for labels that the network has no output for.

    labels   int64 `[N]`, N >= 1
    outputs  number of the network's outputs, one per class
    """
    low, high = int(labels.min()), int(labels.max())
    if low >= 0 and high < outputs:
        return
    hint = "Check that they belong to this network."
    if low == 1 and high == outputs:
        hint = "They seem to count from 1: subtract 1."
    elif low < 0:
        hint = "A negative label often marks samples without one: leave these out."
    raise DataError(
        f"{name} holds labels from {low} to {high}, but the network has {outputs} outputs, for "
        f"labels from 0 to {outputs - 1}. {hint}"
    )


# -- what is hardly meant ------------------------------------------------------------------------


def other_classes(classes: tuple[str, ...], outputs: int, name: str) -> str | None:
    """Whether the classes of a folder tree can be those of a network with so many outputs.

    Ten folders of ImageNet's classes have labels from 0 to 9 in the order of their names, which a
    network with 1,000 outputs takes for its first ten classes.
    """
    if len(classes) == outputs:
        return None
    return (
        f"{name} has {len(classes)} classes, but the network has {outputs} outputs. Labels are the "
        f"positions of the folders in the order of their names, so {classes[0]!r} is 0 and "
        f"{classes[-1]!r} is {len(classes) - 1}: unless the network numbers its classes like that, "
        "the accuracy means nothing. Give the labels as the network numbers them, in a .npz file."
    )


def unlike_calibration(seen: Channels, given: Channels, name: str) -> str | None:
    """Whether samples look as if they were not normalised like those of the calibration.

    seen   what the calibration's samples look like
    given  what the samples in question look like

    Reported are, over all channels: values that lie beyond all that was seen by more than its whole
    range; and, with at least `ENOUGH` samples on both sides, a standard deviation and a range that
    are both larger or both smaller by more than `APART`, or means that are off by more than a
    standard deviation. A standard deviation alone varies from class to class, a range alone with
    the number of samples.
    """
    low, high = min(seen.low), max(seen.high)
    extent, spread = high - low, _overall(seen.std)
    if not extent or not spread:
        return None
    least, most = min(given.low), max(given.high)
    factors = (_overall(given.std) / spread, (most - least) / extent)
    shift = _overall([a - b for a, b in zip(given.mean, seen.mean, strict=True)]) / spread
    beyond = most > high + extent or least < low - extent
    differ = shift > 1 or min(factors) > APART or max(factors) < 1 / APART
    if not (beyond or (differ and min(seen.count, given.count) >= ENOUGH)):
        return None
    guess = ""
    if least >= 0 and 1 < most <= 255 and most > high:
        guess = " They look like pixels from 0 to 255 that were not normalised."
    elif least >= 0 and most <= 1:
        guess = " They look like pixels between 0 and 1, of which no mean was subtracted."
    return (
        f"{name} reaches from {least:.3g} to {most:.3g} (standard deviation "
        f"{_overall(given.std):.2g}), but the calibration saw {low:.3g} to {high:.3g} (standard "
        f"deviation {spread:.2g}).{guess} Give both the same preprocessing, that of the training."
    )


def _overall(values: Sequence[float]) -> float:
    """The root of the mean square."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def swapped_channels(
    seen: Channels, given: Channels, name: str, preprocessing: Preprocessing | None = None
) -> str | None:
    """Whether samples look as if their channels were in another order than the calibration's.

    seen, given    as in `unlike_calibration`
    preprocessing  whose mean and deviation both were normalised with, channel by channel; None
                   where it is not known: whatever was the same for all channels, or ImageNet's

    Means and standard deviations of the channels are compared with those of the calibration
    straight and reversed, before they were normalised, as that makes every channel look alike. The
    order is reported where they fit `CLEARLY` better reversed, and straight differ by four times
    the uncertainty of means of so many images; so gray images never are.
    """
    if len(seen.mean) != 3 or len(given.mean) != 3:
        return None
    known = (preprocessing,) if preprocessing else (PRESETS["unit"], PRESETS["imagenet"])
    for assumed in known:
        mean, std = np.array(assumed.mean), np.array(assumed.std)
        was, now = (np.array([c.mean * std + mean, c.std * std]) for c in (seen, given))
        straight = float(np.linalg.norm(now - was))
        reverse = float(np.linalg.norm(now[:, ::-1] - was))
        noise = COLOUR_NOISE * _overall(was[1]) * math.sqrt(1 / seen.count + 1 / given.count)
        if straight > 4 * noise and reverse * CLEARLY < straight:
            return (
                f"the channels of {name} seem to be in reverse order, BGR instead of RGB or the "
                "other way round: reversed, they look much more like those of the calibration. "
                "OpenCV reads BGR: reverse with x[:, ::-1], or give both the same preprocessing."
            )
    return None
