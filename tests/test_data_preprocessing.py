"""From images to inputs: the bits of torchvision's transforms, written out in Pillow and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from intact.data.folder import read_image
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.errors import DataError


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth enough that interpolation matters, rough enough that every pixel does."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = large + rng.integers(-20, 20, large.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def torchvision_input(image, resize, crop, mean, std, resample) -> torch.Tensor:
    """`Resize`, `CenterCrop`, `ToTensor`, `Normalize` as in torchvision 0.20, on one image."""
    image = image.convert("RGB")
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    new_short, new_long = resize, int(resize * long / short)
    image = image.resize((new_short, new_long) if w <= h else (new_long, new_short), resample)
    top = round((image.height - crop[0]) / 2.0)
    left = round((image.width - crop[1]) / 2.0)
    image = image.crop((left, top, left + crop[1], top + crop[0]))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    x = x.to(torch.float32).div(255)
    shape = (-1, 1, 1)
    return x.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


@pytest.mark.parametrize(
    "size", [(50, 40), (40, 50), (41, 53), (67, 43), (40, 40), (9, 7), (45, 200)]
)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_crop_and_normalise_have_the_bits_of_torchvision(size, interpolation):
    mean, std = PRESETS["imagenet"].mean, PRESETS["imagenet"].std
    resample = Image.Resampling[interpolation.upper()]
    for resize, crop in ((32, (28, 28)), (33, (28, 17)), (29, (29, 29))):
        made = Preprocessing(
            resize=resize, crop=crop, mean=mean, std=std, interpolation=interpolation
        )
        image = photo(*size)
        x = made.floats(made.pixels(image, made.shape((3, *crop))))
        assert x.dtype == np.float32
        expected = torchvision_input(image, resize, crop, mean, std, resample)
        assert np.array_equal(x, expected.numpy())


def test_the_preset_of_imagenet_is_torchvisions():
    image = photo(300, 260)
    made = PRESETS["imagenet"]
    x = made.floats(made.pixels(image, made.shape()))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = torchvision_input(image, 256, (224, 224), mean, std, Image.Resampling.BILINEAR)
    assert np.array_equal(x, expected.numpy())


def test_without_a_shorter_side_images_go_straight_to_the_size():
    image = photo(50, 40)
    pixels = PRESETS["unit"].pixels(image, PRESETS["unit"].shape((3, 6, 8)))
    small = image.resize((8, 6), Image.Resampling.BILINEAR)
    assert np.array_equal(pixels, np.asarray(small).transpose(2, 0, 1))
    x = PRESETS["unit"].floats(pixels)
    assert (x.min() >= 0, x.max() <= 1) == (True, True)
    assert np.array_equal(x, pixels.astype(np.float32) / np.float32(255))


def test_the_order_of_channels_can_be_reversed():
    image = photo(20, 20)
    rgb = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    bgr = Preprocessing(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), order="bgr")
    straight, reverse = (made.pixels(image, (3, 20, 20)) for made in (rgb, bgr))
    assert np.array_equal(reverse, straight[::-1])
    # Mean and deviation are those of the network's channels: the first belongs to blue now.
    expected = (straight[2] / np.float32(255) - np.float32(0.1)) / np.float32(1)
    assert np.array_equal(bgr.floats(reverse)[0], expected)


def test_the_preset_of_caffe_is_blue_green_red_less_the_mean():
    made = PRESETS["caffe"]
    image = Image.new("RGB", (256, 256), (10, 20, 30))
    x = made.floats(made.pixels(image, made.shape()))
    expected = np.array([30 - 103.939, 20 - 116.779, 10 - 123.68])
    assert np.abs(x[:, 0, 0] - expected).max() < 1e-4


def test_a_network_of_one_channel_gets_gray_images():
    image = photo(20, 20)
    pixels = PRESETS["signed"].pixels(image, PRESETS["signed"].shape((1, 20, 20)))
    assert np.array_equal(pixels, np.asarray(image.convert("L"))[None])
    with pytest.raises(DataError, match="3 numbers were given to normalise the one channel"):
        Preprocessing(mean=(0, 0, 0), std=(1,)).shape((1, 20, 20))


def test_pixels_of_an_array_are_an_image():
    pixels = np.asarray(photo(20, 30)).transpose(2, 0, 1)
    made = Preprocessing(resize=10, crop=8, mean=(0.5,), std=(0.5,))
    assert np.array_equal(made.pixels(pixels, (3, 8, 8)), made.pixels(photo(20, 30), (3, 8, 8)))
    assert np.array_equal(PRESETS["unit"].pixels(pixels, (3, 30, 20)), pixels)
    gray = PRESETS["unit"].pixels(pixels[:1], (3, 30, 20))
    assert np.array_equal(gray, np.repeat(pixels[:1], 3, axis=0))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused_as_they_would_become_white(tmp_path, mode):
    deep = np.full((8, 8), 1000, np.float32).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode])
    image = Image.fromarray(deep)
    assert image.mode == mode
    path = tmp_path / "deep.tiff"
    image.save(path)
    with pytest.raises(DataError, match=r"deep\.tiff cannot be .* more than 8 bits"):
        read_image(path, PRESETS["unit"], (3, 8, 8))


def test_the_orientation_that_a_camera_noted_is_left_alone(tmp_path):
    image = photo(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png", PRESETS["unit"], (3, 10, 20))
    assert np.array_equal(read, np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0, 0)}, "2 numbers were given to normalise 3 channels: give 1 or 3"),
        ({"mean": (float("nan"),)}, "must be finite"),
        ({"std": (0.0,)}, "must be positive"),
        ({"std": (1e-50,)}, "must be positive"),
        ({"mean": (1e39,)}, "must be finite, in float32 too"),
        ({"crop": 0}, "images must be 1 to 65,536 pixels"),
        ({"crop": (8, 2**16 + 1)}, "images must be 1 to 65,536 pixels"),
        ({"resize": -1}, "images must be 1 to 65,536 pixels"),
        ({"resize": 20, "crop": 24}, "shorter side is 20 pixels cannot be cropped to 24"),
        ({"interpolation": "nice"}, "no interpolation 'nice'. There are: bilinear, bicubic"),
        ({"order": "grb"}, "no order 'grb'. There are: rgb, bgr"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        Preprocessing(**{"mean": (0.5,), "std": (0.5,), **options})


def test_what_does_not_fit_the_network_is_refused_with_what_to_do():
    imagenet, signed = PRESETS["imagenet"], PRESETS["signed"]
    assert imagenet.shape() == imagenet.shape((3, 224, 224)) == (3, 224, 224)
    for made, shape, message in (
        (imagenet, (3, 299, 299), "cropped to 224 x 224, but the network takes 299 x 299"),
        (signed, None, "give `crop`, the size to crop to; on the command line --crop, or --input"),
        (Preprocessing(crop=9, mean=(0,), std=(1,)), (3, 8, 8), r"--crop 8\.$"),
        (imagenet, (3, 64, 96), r"with --crop 64,96, and resize as in its training"),
        (signed, (4, 8, 8), r"shape \[4, 8, 8\], which are no images of 1 or 3 channels"),
        (signed, (10,), r"float32 \[N, 10\] in a \.npy file"),
        (Preprocessing(resize=9, mean=(0,), std=(1,)), (3, 9, 10), "cannot be cropped to the 9 x"),
        (Preprocessing(mean=(0,), std=(1,), order="bgr"), (1, 9, 9), "no order of channels"),
    ):
        with pytest.raises(DataError, match=message):
            made.shape(shape)
