"""Pixels in: networks that take raw pixels, and the programs that they become."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intact.arithmetic import QParams, quantize
from intact.capturing import capture
from intact.data import to_input
from intact.engines.reference import ReferenceEngine
from intact.errors import IntactError
from intact.pipeline import quantize_network
from intact.pixels import take_pixels
from intact.recipe import PRESETS
from test_capturing import Call, kinds, randomized

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8), np.uint8)


def networks(padding: int, groups: int = 1):
    module = randomized(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=padding, groups=groups), nn.ReLU(), nn.Flatten())
    )
    network = capture(module, torch.zeros(1, 3, 8, 8))
    return network, take_pixels(network, MEAN, STD)


@pytest.mark.parametrize(("padding", "groups"), [(0, 1), (0, 3), (1, 1), (1, 3)])
def test_the_float_function_of_pixels_is_that_of_normalised_ones(padding, groups):
    network, taking = networks(padding, groups)
    expected = network(torch.from_numpy(to_input(PIXELS, MEAN, STD)))
    got = taking(torch.from_numpy(PIXELS).float())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_without_padding_the_normalisation_is_in_the_weights():
    network, taking = networks(padding=0)
    assert taking.ops == network.ops
    assert set(taking.parameters) == {"0.weight", "0.bias"}


def test_with_padding_a_table_for_each_channel_comes_first():
    """Padding is a normalised 0, which is no pixel."""
    _, taking = networks(padding=1)
    assert kinds(taking) == ["Table", "Conv2d", "Reshape"]
    assert taking.functions["normalise"].per_channel


@pytest.mark.parametrize("padding", [0, 1])
def test_a_pixel_is_its_own_code_whatever_was_calibrated_on(padding):
    _, taking = networks(padding)
    dark = torch.from_numpy(PIXELS // 8).float()
    program = quantize_network(taking, [dark], PRESETS["default"]).program
    assert program.tensors[program.input].qparams == QParams((1.0,), 0, 0, 255, signed=False)
    assert np.array_equal(program.quantize_input(PIXELS.astype(np.float32)), PIXELS)
    codes = program.codes(PIXELS, engine="reference")
    assert np.array_equal(codes, program.codes(PIXELS.astype(np.float32), engine="torch"))


def test_the_table_gives_the_codes_that_normalised_floats_would_have():
    _, taking = networks(padding=1)
    calibration = [torch.from_numpy(PIXELS).float()]
    program = quantize_network(taking, calibration, PRESETS["default"]).program
    seen = {}
    ReferenceEngine(program)(PIXELS, lambda name, codes: seen.update({name: codes}))
    real = to_input(PIXELS, MEAN, STD)
    grid = program.tensors["normalise"].qparams
    # Both round once: the table from float64, `quantize` from float32.
    ties = np.abs(real / grid.scale[0] % 1 - 0.5) < 1e-4
    assert np.array_equal(seen["normalise"][~ties], quantize(real, grid)[~ties])
    assert ties.mean() < 0.01


def test_one_mean_serves_all_channels_and_a_name_that_is_taken_is_left_alone():
    module = Call(lambda s, x: s.normalise(x) + F.relu(x), normalise=nn.Conv2d(1, 1, 3, padding=1))
    network = capture(randomized(module), torch.zeros(1, 1, 8, 8))
    taking = take_pixels(network, (0.5,), (0.25,))
    assert taking.ops[0].name == "normalise_"
    pixels = PIXELS[:, :1]
    expected = network(torch.from_numpy(to_input(pixels, (0.5,), (0.25,))))
    torch.testing.assert_close(taking(torch.from_numpy(pixels).float()), expected)


@pytest.mark.parametrize(
    ("shape", "mean", "std", "message"),
    [
        ((6,), (0.5,), (0.5,), "no images"),
        ((3, 8, 8), (0.5, 0.5), (0.5,), "the mean is .* 3 channels"),
        ((3, 8, 8), (0.5,), (0.5, 0.0, 0.5), "must be positive"),
        ((3, 8, 8), (float("nan"),), (0.5,), "one finite number"),
    ],
)
def test_what_cannot_be_normalised_is_refused(shape, mean, std, message):
    network = capture(nn.Linear(shape[-1], 2), torch.zeros(1, *shape))
    with pytest.raises(IntactError, match=message):
        take_pixels(network, mean, std)
