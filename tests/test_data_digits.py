"""Data sets in general, and the embedded digits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from intact.data import Dataset, batches, load_dataset, to_input
from intact.data.digits import enlarge
from intact.errors import DataError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def tiny() -> Dataset:
    images = np.arange(7 * 3 * 2 * 2, dtype=np.uint8).reshape(7, 3, 2, 2)
    labels = np.array([0, 1, 0, 1, 1, 0, 1], np.int64)
    return Dataset("tiny", ("a", "b"), images[:5], labels[:5], images[5:], labels[5:])


# -- pixels to input -----------------------------------------------------------------------------


def test_input_has_the_bits_of_to_tensor_and_normalize():
    pixels = np.arange(256, dtype=np.uint8)
    # The calls of torchvision's ToTensor and Normalize(0.5, 0.5).
    expected = torch.from_numpy(pixels).to(torch.float32).div(255).sub_(0.5).div_(0.5)
    got = to_input(pixels)
    assert got.dtype == np.float32
    assert got.tobytes() == expected.numpy().tobytes()
    assert (got[0], got[255]) == (-1, 1)


def test_pixels_stay_as_they_are_when_they_become_input():
    data = tiny()
    before = data.train_images.copy()
    to_input(data.train_images)
    assert np.array_equal(data.train_images, before)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_batches_hold_every_image_once_and_in_order(size):
    data = tiny()
    got = list(batches(data.train_images, data.train_labels, size))
    assert [len(x) for x, _ in got[:-1]] == [size] * (len(got) - 1)
    assert np.array_equal(np.concatenate([x for x, _ in got]), to_input(data.train_images))
    assert np.array_equal(np.concatenate([y for _, y in got]), data.train_labels)


# -- Dataset -------------------------------------------------------------------------------------


def test_the_arrays_of_a_dataset_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        tiny().train_images[0] = 0


def test_the_hash_sees_every_pixel_every_label_and_the_split():
    data = tiny()
    assert data.sha256 == tiny().sha256
    hashes = {data.sha256}
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        array = getattr(data, field).copy()
        array.flat[-1] ^= 1
        hashes.add(replace(data, **{field: array}).sha256)
    images = np.concatenate([data.train_images, data.test_images])
    labels = np.concatenate([data.train_labels, data.test_labels])
    hashes.add(Dataset("t", data.classes, images[:4], labels[:4], images[4:], labels[4:]).sha256)
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((5, 1, 2, 2), np.uint8)}, r"train images must be uint8 \[N, 3"),
        ({"test_images": np.zeros((2, 3, 2, 2), np.float32)}, "test images must be uint8"),
        ({"test_labels": np.zeros(3, np.int64)}, r"test labels must be int64 \[2\]"),
        ({"train_labels": np.zeros(5, np.int32)}, "train labels must be int64"),
        ({"train_labels": np.array([0, 1, 2, 0, 0])}, "labels reach from 0 to 2, but there are 2"),
        ({"test_labels": np.array([0, -1])}, "labels reach from -1 to 0"),
        (
            {"test_images": np.zeros((0, 3, 2, 2), np.uint8), "test_labels": np.zeros(0, np.int64)},
            "there are no test images",
        ),
    ],
)
def test_a_dataset_cannot_be_built_wrong(change, message):
    with pytest.raises(DataError, match=message):
        replace(tiny(), **change)


def test_an_unknown_data_set_is_refused_with_the_names_that_exist():
    with pytest.raises(
        DataError, match=r"no data set 'mnist'\. There are: digits, cifar10, folder"
    ):
        load_dataset("mnist")


def test_loading_data_does_not_load_torch():
    code = (
        "import sys; from intact.data import load_dataset; load_dataset('digits'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- digits --------------------------------------------------------------------------------------


def test_digits_are_all_1797_with_the_last_500_for_the_test(digits):
    labels = load_digits().target
    assert digits.train_images.shape == (1297, 3, 32, 32)
    assert digits.test_images.shape == (500, 3, 32, 32)
    assert np.array_equal(np.concatenate([digits.train_labels, digits.test_labels]), labels)
    assert digits.classes == tuple("0123456789")
    # The classes are balanced on both sides.
    assert np.bincount(digits.train_labels).min() >= 120
    assert np.bincount(digits.test_labels).min() >= 45


def test_digits_are_gray_and_the_same_everywhere(digits):
    assert np.array_equal(digits.train_images[:, 0], digits.train_images[:, 1])
    assert np.array_equal(digits.train_images[:, 0], digits.train_images[:, 2])
    assert digits.sha256 == "a770adf48e8d897ed21557111fcc169b9c6b44e8381f1898065c976589103f58"


def test_digits_are_enlarged_bilinearly_and_rounded_half_up():
    """Against exact fractions, from the definition: interpolate between the four old centres."""
    rng = np.random.default_rng(0)
    ink = rng.integers(0, 17, (8, 8))

    def neighbours(i: int) -> list[tuple[int, Fraction]]:
        centre = Fraction(2 * i + 1, 8) - Fraction(1, 2)  # in old pixels; 0 is the first centre
        low = centre.__floor__()
        inside = [min(max(k, 0), 7) for k in (low, low + 1)]
        return list(zip(inside, (1 - (centre - low), centre - low), strict=True))

    got = enlarge(ink[None].astype(float))[0]
    for y in range(32):
        for x in range(32):
            exact = sum(
                wy * wx * Fraction(int(ink[r, c]) * 255, 16)
                for r, wy in neighbours(y)
                for c, wx in neighbours(x)
            )
            assert got[y, x] == (exact + Fraction(1, 2)).__floor__()


def test_the_range_of_ink_becomes_the_range_of_pixels():
    assert (enlarge(np.full((1, 8, 8), 16.0)) == 255).all()
    assert (enlarge(np.zeros((1, 8, 8))) == 0).all()


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load_dataset("digits")


def test_digits_take_no_data_folder(tmp_path):
    with pytest.raises(DataError, match="leave the data folder out"):
        load_dataset("digits", tmp_path)
