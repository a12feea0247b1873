"""Mistakes that people make with data are found, and what is right is not reported."""

from __future__ import annotations

import numpy as np
import pytest

from intact.data import load_dataset, to_input
from intact.data.channels import Channels
from intact.data.checking import (
    check_floats,
    check_labels,
    check_pixels,
    check_shape,
    other_classes,
    shape_hint,
    swapped_channels,
    unlike_calibration,
)
from intact.data.preprocessing import PRESETS
from intact.errors import DataError

IMAGENET = PRESETS["imagenet"]


def photos(count: int, seed: int, mean=(0.485, 0.456, 0.406)) -> np.ndarray:
    """Pixels uint8 [count, 3, 8, 8] with the colours of photos, which vary from one to the next."""
    rng = np.random.default_rng(seed)
    brightness = rng.normal(0, 0.12, (count, 1, 1, 1))
    tint = rng.normal(0, 0.04, (count, 3, 1, 1))
    detail = rng.normal(0, 0.2, (count, 1, 8, 8))
    values = np.reshape(mean, (3, 1, 1)) + brightness + tint + detail
    return (255 * values).clip(0, 255).astype(np.uint8)


NORMALISED = {
    "pixels": lambda pixels: pixels.astype(np.float32),
    "unit": lambda pixels: to_input(pixels, (0,), (1,)),
    "signed": to_input,
    "imagenet": IMAGENET.floats,
}


# -- channels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3, 4, 5), (7, 4), (7,)])
def test_channels_are_those_of_all_values_however_they_are_merged(shape):
    x = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
    whole = Channels.of(x)
    planes = np.moveaxis(x.reshape(7, -1) if x.ndim < 3 else x, 1, 0).astype(np.float64)
    planes = planes.reshape(len(planes), -1)
    assert whole.count == 7
    assert whole.low == tuple(planes.min(1))
    assert whole.high == tuple(planes.max(1))
    assert np.allclose(whole.mean, planes.mean(1), rtol=1e-12)
    assert np.allclose(whole.std, planes.std(1), rtol=1e-12)
    merged = Channels.of(x[:2]).merge(Channels.of(x[2:3])).merge(Channels.of(x[3:]))
    assert (merged.count, merged.low, merged.high) == (7, whole.low, whole.high)
    assert np.allclose(merged.mean, whole.mean, rtol=1e-12)
    assert np.allclose(merged.std, whole.std, rtol=1e-12)


def test_nothing_has_no_channels():
    with pytest.raises(DataError, match="no values to look at"):
        Channels.of(np.zeros((0, 3)))
    with pytest.raises(DataError, match="3 and 4 channels are not alike"):
        Channels.of(np.zeros((1, 3))).merge(Channels.of(np.zeros((1, 4))))


# -- shapes and types ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected", "hint"),
    [
        ((224, 224, 3), (3, 224, 224), "channels come last: move the channels with np.moveaxis"),
        ((28, 28, 1), (1, 28, 28), "channels come last"),
        ((28, 28, 1), (3, 28, 28), "seem to come last, and there are 1, not 3"),
        ((1, 28, 28), (3, 28, 28), "Those are gray images: repeat the channel"),
        ((4, 28, 28), (3, 28, 28), "They have 4 channels, not 3"),
        ((3, 32, 32), (3, 224, 224), "Resize or crop them"),
        ((8, 3, 32, 32), (3, 32, 32), "a batch already"),
        ((784,), (1, 28, 28), "number of values is right: reshape"),
        ((28, 28), (1, 28, 28), "number of values is right: reshape"),
        ((5,), (1, 28, 28), ""),
    ],
)
def test_what_is_wrong_with_a_shape_is_said(given, expected, hint):
    assert hint in shape_hint(given, expected)
    assert bool(shape_hint(given, expected)) == bool(hint)
    with pytest.raises(DataError, match=r"test\.npz holds samples of shape .* the network takes"):
        check_shape(given, expected, "test.npz")
    check_shape(expected, expected, "test.npz")


def test_pixels_are_not_taken_for_floats():
    with pytest.raises(DataError, match=r"uint8, which looks like pixels.* Say how: .*--preset"):
        check_floats(np.dtype(np.uint8), "x")
    for dtype in (np.int8, np.int64, np.bool_, np.complex64):
        with pytest.raises(DataError, match="but the network takes floats"):
            check_floats(np.dtype(dtype), "x")
    for dtype in (np.float16, np.float32, np.float64):
        check_floats(np.dtype(dtype), "x")


def test_images_have_their_channels_first():
    check_pixels((5, 3, 8, 8), "x")
    check_pixels((5, 1, 8, 8), "x")
    with pytest.raises(DataError, match=r"uint8 \[5, 8, 8, 3\].* The channels come last"):
        check_pixels((5, 8, 8, 3), "x")
    with pytest.raises(DataError, match=r"uint8 \[8, 8\], but images are uint8 \[N, C, H, W\]"):
        check_pixels((8, 8), "x")


# -- labels --------------------------------------------------------------------------------------


def test_labels_without_an_output_are_refused():
    check_labels(np.array([0, 9, 3]), 10, "x")
    for labels, hint in (
        ([1, 10, 3], "from 1 to 10, but the network has 10 outputs.* seem to count from 1"),
        ([-1, 3], "A negative label often marks samples without one"),
        ([0, 10], "Check that they belong to this network"),
    ):
        with pytest.raises(DataError, match=hint):
            check_labels(np.array(labels), 10, "x")


def test_folders_for_some_of_the_classes_are_reported():
    assert other_classes(("a", "b"), 2, "x") is None
    message = other_classes(("n01440764", "n03888257"), 1000, "images of val")
    assert "images of val has 2 classes, but the network has 1000 outputs" in message
    assert "'n01440764' is 0 and 'n03888257' is 1" in message


# -- normalisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("given", NORMALISED)
@pytest.mark.parametrize("seen", ["unit", "signed", "imagenet"])
@pytest.mark.parametrize("data", ["photos", "digits"])
def test_another_normalisation_is_reported_and_the_same_is_not(seen, given, data):
    if data == "photos":
        calibration, test = photos(100, 0), photos(40, 1)
    else:
        digits = load_dataset("digits")
        calibration, test = digits.train_images[:100], digits.test_images[:40]
    message = unlike_calibration(
        Channels.of(NORMALISED[seen](calibration)), Channels.of(NORMALISED[given](test)), "t.npz"
    )
    assert (message is None) == (seen == given)
    if given == "pixels":
        assert "look like pixels from 0 to 255" in message
    if given == "unit" and message:
        assert "look like pixels between 0 and 1, of which no mean was subtracted" in message


def test_ranges_are_in_the_message():
    seen, given = np.array([-2.125, 2.625]), np.array([0.0, 255.0])
    message = unlike_calibration(
        Channels.of(np.repeat(seen, 20)), Channels.of(np.repeat(given, 20)), "test.npz"
    )
    assert "test.npz reaches from 0 to 255" in message
    assert "the calibration saw -2.12 to 2.62" in message
    assert "Give both the same preprocessing" in message


def test_few_or_other_images_are_not_reported_but_one_value_out_of_reach_is():
    x = to_input(photos(100, 0))
    seen = Channels.of(x)
    assert unlike_calibration(seen, Channels.of(x[:1]), "x") is None
    assert unlike_calibration(seen, Channels.of(np.full((1, 3, 8, 8), -1.0)), "x") is None
    assert unlike_calibration(seen, Channels.of(x[x.mean((1, 2, 3)) > 0]), "x") is None
    x[17, 1, 2, 3] = 1e6
    assert "reaches from -1 to 1e+06" in unlike_calibration(seen, Channels.of(x), "x")
    constant = Channels.of(np.zeros((20, 3)))
    assert unlike_calibration(constant, constant, "x") is None


# -- order of channels ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unit", "signed", "imagenet"])
@pytest.mark.parametrize("known", [False, True])
def test_reversed_channels_are_reported_and_straight_ones_are_not(name, known):
    seen = Channels.of(NORMALISED[name](photos(256, 0)))
    for seed in range(1, 21):
        test = photos(500, seed)
        straight, reverse = (
            swapped_channels(
                seen,
                Channels.of(NORMALISED[name](pixels)),
                "test.npz",
                PRESETS[name] if known else None,
            )
            for pixels in (test, test[:, ::-1])
        )
        assert straight is None, seed
        assert "the channels of test.npz seem to be in reverse order, BGR" in reverse, seed


def test_nothing_is_said_of_gray_images_of_other_colours_and_of_few_images():
    seen = Channels.of(to_input(photos(256, 0)))
    gray = Channels.of(to_input(photos(256, 1, (0.45, 0.45, 0.45))))
    green = Channels.of(to_input(photos(256, 1, (0.3, 0.6, 0.3))))
    assert swapped_channels(seen, gray, "x") is None
    assert swapped_channels(gray, seen, "x") is None
    assert swapped_channels(seen, green, "x") is None
    assert swapped_channels(seen, Channels.of(to_input(photos(2, 1)[:, ::-1])), "x") is None
    digits = load_dataset("digits")
    pair = (Channels.of(to_input(p)) for p in (digits.train_images, digits.test_images))
    assert swapped_channels(*pair, "x") is None
    flat = Channels.of(np.zeros((20, 5)))
    assert swapped_channels(flat, flat, "x") is None
