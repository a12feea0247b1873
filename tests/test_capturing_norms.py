"""Norms by the statistics of the sample at hand: what they compute, and how exactly at 8 bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import intact
from intact.arithmetic import dequantize
from intact.capturing import capture
from intact.ops import Conv2d, Requantize
from test_capturing import Call, kinds
from test_capturing_ops import check

torch.set_num_threads(1)

IMAGE = (8, 6, 5)


class LayerNorm2d(nn.Module):
    """As the authors of ConvNeXt wrote it."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


NORMS = {
    "layer, last axis": (lambda: nn.LayerNorm(5), IMAGE),
    "layer, last axis of a sequence": (lambda: nn.LayerNorm(8), (7, 8)),
    "layer, a vector": (lambda: nn.LayerNorm(8), (8,)),
    "layer, windows": (lambda: nn.LayerNorm(8), (2, 3, 4, 8)),
    "layer, without weight": (lambda: nn.LayerNorm(5, elementwise_affine=False), IMAGE),
    "layer, without bias": (lambda: nn.LayerNorm(5, bias=False), IMAGE),
    "layer, whole images": (lambda: nn.LayerNorm(IMAGE, elementwise_affine=False), IMAGE),
    "layer, each channel": (lambda: nn.LayerNorm((6, 5), elementwise_affine=False), IMAGE),
    "layer, by hand": (lambda: LayerNorm2d(8), IMAGE),
    "layer, large eps": (lambda: nn.LayerNorm(5, eps=2.0), IMAGE),
    "group": (lambda: nn.GroupNorm(2, 8), IMAGE),
    "group, all channels": (lambda: nn.GroupNorm(1, 8), IMAGE),
    "group, each channel": (lambda: nn.GroupNorm(8, 8), IMAGE),
    "group, a line": (lambda: nn.GroupNorm(4, 8), (8, 20)),
    "group, a vector": (lambda: nn.GroupNorm(2, 8), (8,)),
    "instance": (lambda: nn.InstanceNorm2d(8), IMAGE),
    "instance, with weight": (lambda: nn.InstanceNorm2d(8, affine=True), IMAGE),
    "instance, a line": (lambda: nn.InstanceNorm1d(8), (8, 20)),
    "RMS": (lambda: nn.RMSNorm(5), IMAGE),
    "local response": (lambda: nn.LocalResponseNorm(5, alpha=0.5), IMAGE),
    "normalize": (lambda: Call(lambda x: x / x.abs().sum(1, keepdim=True)), IMAGE),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_what_torch_computes(name):
    make, shape = NORMS[name]
    check(make(), shape, least_db=24.0)


def test_group_norm_is_what_the_formula_says():
    torch.manual_seed(0)
    x = torch.randn(3, *IMAGE)
    parts = x.reshape(3, 2, -1)
    variance, mean = torch.var_mean(parts, -1, correction=0, keepdim=True)
    expected = ((parts - mean) / torch.sqrt(variance + 0.1)).reshape(x.shape)
    got = capture(nn.GroupNorm(2, 8, eps=0.1, affine=False), x)(x)
    torch.testing.assert_close(got, expected)
    other = capture(nn.GroupNorm(4, 8, eps=0.1, affine=False), x)(x)
    assert not torch.allclose(other, expected, atol=0.1)


def test_a_norm_reads_a_layers_result_on_the_grid_of_the_difference():
    """One rounding, not two: the mean is of no other use than to be subtracted."""
    module = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8, affine=False))
    program = intact.quantize(module, [torch.randn(16, *IMAGE)])
    assert not any(isinstance(op, Requantize) for op in program.ops)
    grids = {name: tensor.qparams.scale for name, tensor in program.tensors.items()}
    assert grids["0"] == grids["1.mean_1"] == grids["1.centred"]
    both_read = Call(
        lambda s, x: s.norm(y := s.conv(x)) + y, conv=nn.Conv2d(8, 8, 1), norm=nn.GroupNorm(2, 8)
    )
    program = intact.quantize(both_read, [torch.randn(16, *IMAGE)])
    assert sum(isinstance(op, Requantize) for op in program.ops) == 2


def test_norms_by_constant_statistics_fold_like_batch_norm():
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    network = check(nn.Sequential(nn.Conv2d(8, 4, 1), norm), IMAGE)
    assert kinds(network) == ["Conv2d"]


def test_layer_norm_of_permuted_images_permutes_nothing():
    """Of channels, as ConvNeXt has it between its stages: means over them are convolutions."""

    def forward(s, x):
        return s.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    network = check(Call(forward, norm=nn.LayerNorm(8)), IMAGE, least_db=24.0)
    assert not {"Permute", "Reshape"} & set(kinds(network))
    mean = next(op for op in network.ops if op.name == "norm.mean")
    assert isinstance(mean, Conv2d)
    assert network.parameters["norm.mean.weight"].unique().tolist() == [0.125]


def lognormal(size, spread):
    return torch.exp(spread * torch.randn(size))


SPREADS = {
    "alike": (lambda size: lognormal(size, 0), 34.0),
    "differ": (lambda size: lognormal(size, 0.4), 26.0),
    "differ much": (lambda size: lognormal(size, 0.8), 17.0),
    "a third is 0": (lambda size: lognormal(size, 0.4) * (torch.rand(size) > 0.3), 25.0),
    "few are 0": (lambda size: lognormal(size, 0.4) * (torch.rand(size) > 0.01), 25.0),
}


@pytest.mark.parametrize("name", SPREADS)
def test_a_norm_keeps_positions_of_every_deviation(name):
    """What its steps leave, if the input's codes are what is normalised.

    A square of 8-bit codes and its reciprocal root, without the first step, leave less: 6 dB where
    some positions are 0.
    """
    spread, least = SPREADS[name]
    torch.manual_seed(0)
    x = torch.randn(16, 49, 96) * spread((16, 49, 1))

    def decibels(norm):
        program = intact.quantize(nn.Sequential(nn.Hardtanh(-1e3, 1e3), norm), [x])
        codes = program.quantize_input(x.numpy())
        grid = program.tensors[program.input].qparams
        real = norm(torch.from_numpy(dequantize(codes, grid))).numpy()
        noise = program.run(x.numpy(), engine="native") - real
        return 10 * math.log10(np.square(real).sum() / np.square(noise).sum())

    got = decibels(nn.LayerNorm(96, elementwise_affine=False))
    assert got > least
    if name == "few are 0":

        def plain(x):
            d = x - x.mean(-1, keepdim=True)
            return d * (d.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

        assert decibels(Call(plain)) < least - 10


def test_a_norm_works_on_grids_with_negative_codes():
    """A variance has a sign there, and its reciprocal root no value for it."""
    torch.manual_seed(0)
    x = torch.randn(32, *IMAGE)
    module = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))
    with torch.no_grad():
        real = module(x).numpy()
    for recipe in ("lab", "default"):
        noise = intact.quantize(module, [x], recipe=recipe).run(x.numpy(), engine="native") - real
        assert 10 * math.log10(np.square(real).sum() / np.square(noise).sum()) > 25
