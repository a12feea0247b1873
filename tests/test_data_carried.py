"""The preprocessing that a program carries: canonical text, read strictly, part of the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import intact
from intact.data.carried import KEY, carried_by, from_toml, pixels_alone, to_toml
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.errors import DataError, IntactError, StorageError
from intact.program import Program

SHAPE = (3, 6, 8)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 6, 5))
    return intact.quantize(net, [torch.randn(16, *SHAPE)])


def saying(program: Program, text: str) -> Program:
    return replace(program, info={**program.info, KEY: text})


def floats(count: int, low: float) -> st.SearchStrategy:
    number = st.floats(low, 1e6, width=64, allow_subnormal=False)
    return st.lists(number, min_size=count, max_size=count).map(tuple)


@given(
    resize=st.none() | st.integers(8, 2**16),
    channels=st.sampled_from([1, 3]),
    data=st.data(),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    normalise=st.booleans(),
)
def test_what_is_written_reads_back_to_the_same_bits(
    resize, channels, data, interpolation, normalise
):
    given = Preprocessing(
        resize=resize,
        mean=data.draw(floats(channels, -1e6)),
        std=data.draw(floats(channels, 1e-6)),
        interpolation=interpolation,
        order=data.draw(st.sampled_from(["rgb", "bgr"])) if channels == 3 else "rgb",
        normalise=normalise,
    )
    shape = (channels, 6, 8)
    text = to_toml(given, shape)
    read = from_toml(text).settled(shape)
    assert read == given.settled(shape)
    assert to_toml(read, shape) == text


def test_the_text_is_for_people_too():
    assert to_toml(replace(PRESETS["imagenet"], crop=(6, 8)), SHAPE) == (
        "resize = 256\n"
        "crop = [6, 8]\n"
        'interpolation = "bilinear"\n'
        'order = "rgb"\n'
        "mean = [0.485, 0.456, 0.406]\n"
        "std = [0.229, 0.224, 0.225]\n"
    )
    pixels = replace(PRESETS["signed"], normalise=False)
    assert to_toml(pixels, SHAPE) == ('crop = [6, 8]\ninterpolation = "bilinear"\norder = "rgb"\n')
    assert PRESETS["signed"].settled(SHAPE).words() == (
        "resized to 6×8 (bilinear), RGB, mean 0.5, std 0.5"
    )
    assert replace(PRESETS["imagenet"], crop=(6, 8)).settled(SHAPE).words() == (
        "shorter side resized to 256 (bilinear), 6×8 from the centre, RGB, "
        "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225"
    )
    assert pixels.settled((1, 6, 8)).words() == (
        "resized to 6×8 (bilinear), gray, pixels as they are"
    )


def test_two_that_do_the_same_to_every_image_are_one_text():
    three = Preprocessing(crop=(6, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert to_toml(three, SHAPE) == to_toml(PRESETS["signed"], SHAPE)
    assert to_toml(PRESETS["unit"], SHAPE) != to_toml(PRESETS["signed"], SHAPE)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    made = [p.floats(p.pixels(image, SHAPE)) for p in (three, PRESETS["signed"])]
    assert np.array_equal(*made)


def test_a_program_carries_it_in_its_file_and_in_its_hash(program, tmp_path):
    assert carried_by(program) is None
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 6, 5))
    with_it, other = (
        intact.quantize(net, [torch.randn(16, *SHAPE)], preprocessing=p)
        for p in (PRESETS["signed"], PRESETS["unit"])
    )
    with_it.save(tmp_path / "p.safetensors")
    read = intact.load(tmp_path / "p.safetensors")
    assert carried_by(read) == PRESETS["signed"].settled(SHAPE)
    assert not pixels_alone(read)
    assert len({with_it.sha256, other.sha256}) == 2
    with pytest.raises(DataError, match=r"cropped to 224 x 224, but the network takes 6 x 8"):
        intact.quantize(net, [torch.randn(16, *SHAPE)], preprocessing=PRESETS["imagenet"])


GOOD = 'crop = [6, 8]\ninterpolation = "bilinear"\norder = "rgb"\nmean = [0.5]\nstd = [0.5]\n'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (GOOD, "", "lacks 'crop'"),
        (GOOD, "crop", "not TOML: "),
        (GOOD, "a = " + 9000 * "[", "not TOML: "),
        ("crop", "size = 3\ncrop", "an unknown key, 'size'"),
        ("[6, 8]", "6", "crop must be a list, but is int"),
        ("[6, 8]", "[6]", "crop must be a list of 2"),
        ("[6, 8]", "[6, true]", r"crop\[1\] must be of type int, but is bool"),
        ("[6, 8]", "[6, 9]", "cropped to 6 x 9, but the network takes 6 x 8"),
        ("crop", "resize = 0x" + 5000 * "f" + "\ncrop", "must be 1 to 65,536 pixels"),
        ("crop", "resize = 4\ncrop", "cannot be cropped"),
        ("bilinear", "nearest", "interpolation must be one of 'bilinear', 'bicubic'"),
        ("rgb", "grb", "order must be one of"),
        ("mean = [0.5]", "mean = [nan]", r"mean\[0\] must be a finite number"),
        ("mean = [0.5]", "mean = [1e300]", "must be finite, in float32 too"),
        ("mean = [0.5]", "mean = [0.5, 0.5]", "2 numbers were given"),
        ("mean = [0.5]", "mean = []", "0 numbers were given"),
        ("mean = [0.5]", "", "both mean and std, or none"),
        ("std = [0.5]", "std = [0]", "must be positive"),
        ("std = [0.5]", "std = ['a']", r"std\[0\] must be a number"),
        ("mean = [0.5]\nstd = [0.5]\n", "", "takes pixels as they are, but its input has another"),
    ],
)
def test_a_strangers_text_is_refused_with_what_is_wrong(program, old, new, message):
    assert old in GOOD
    assert carried_by(saying(program, GOOD)) == PRESETS["signed"].settled(SHAPE)
    with pytest.raises(StorageError, match=message) as error:
        carried_by(saying(program, GOOD.replace(old, new)))
    assert "quantize`" in str(error.value)


def test_a_program_that_takes_no_images_can_carry_none():
    program = intact.quantize(nn.Linear(4, 2), [torch.randn(8, 4)])
    with pytest.raises(IntactError, match=r"shape \[4\], which are no images"):
        carried_by(saying(program, GOOD))


def test_programs_with_several_inputs_carry_none():
    class Two(nn.Module):
        def forward(self, a, b):
            return a - b

    batch = torch.randn(8, *SHAPE), torch.randn(8, *SHAPE)
    two = intact.quantize(Two(), [batch])
    assert carried_by(two) is None
    assert not pixels_alone(two)
    with pytest.raises(StorageError, match="has 2 inputs, 'a' and 'b'; this works with one input"):
        carried_by(saying(two, GOOD))
    with pytest.raises(IntactError, match="has 2 inputs, 'a' and 'b'; this works with one input"):
        intact.quantize(Two(), [batch], preprocessing=PRESETS["signed"])
