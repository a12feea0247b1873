"""`capture`, operation by operation: the network computes what the module computes, and so does
the program that it becomes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import intact
from intact.capturing import capture
from intact.choose import align
from intact.engines.reference import ReferenceEngine
from intact.engines.torch import TorchEngine
from intact.ops import Conv2d, Linear, MaxPool2d, Multiply, Pad, Reshape, Slice, Table
from test_capturing import Call, both, kinds, randomized

torch.set_num_threads(1)

CONV = nn.Conv2d(3, 4, 3, padding=1)
IMAGE, LINE, VECTOR = (3, 8, 8), (3, 9), (6,)


def check(module: nn.Module, shape, least_db: float = 25.0):
    """The network computes what the module does, and its program about that, in both engines."""
    network, got, expected = both(module, shape)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(1)) * 2
    program = intact.quantize(module, [x])
    codes = program.quantize_input(x.numpy())
    reference = ReferenceEngine(program)(codes)
    assert np.array_equal(TorchEngine(program)(codes), reference)
    with torch.no_grad():
        real = module(x).numpy()
    noise = program.run(x.numpy(), engine="reference") - real
    assert 10 * math.log10(np.square(real).sum() / np.square(noise).sum()) > least_db
    return network


FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.3, -0.2),
    "abs": torch.abs,
    "square": torch.square,
    "pow": lambda x: x**3,
    "exp": lambda x: torch.exp(-x.abs()),
    "sqrt": lambda x: torch.sqrt(x * x + 1),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "where": lambda x: torch.where(x > 0.5, x, 0.1 * x),
    "maximum": lambda x: torch.maximum(x, torch.tensor(0.25)),
    "manual swish": lambda x: x * torch.sigmoid(x),
    "manual hard-swish": lambda x: x * F.relu6(x + 3) / 6,
    "manual mish": lambda x: x * torch.tanh(F.softplus(x)),
    "sum of functions": lambda x: torch.sin(x) + 2 * torch.cos(x) - x,
    "reversed": lambda x: (1 - torch.sigmoid(x)) / 2,
    "reciprocal": lambda x: 1 / (1 + x.abs()),
    "scaled": lambda x: 3 * (x - 0.5) / 2 + 1,
    "sinh": lambda x: torch.sinh(x / 4),
    "log2": lambda x: torch.log2(x.abs() + 1),
    "remainder": lambda x: (x / 64 + 0.5) % 1.0,
    "masked": lambda x: x.masked_fill(x < 0, 0.0),
    "between": lambda x: x * ((x > 0) & (x < 99)).float(),
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.3),
    "power of a number": lambda x: 2 ** x.tanh(),
    "a constant bound": lambda x: x.clamp(max=torch.tensor(2.0)) * 1.5,
    "nan_to_num": lambda x: torch.nan_to_num(x.abs() + 1),
    "logit": lambda x: torch.logit(x.tanh() / 4 + 0.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_function_of_one_tensor_is_one_table(name):
    module = Call(lambda s, x: s.fc(FUNCTIONS[name](x)), fc=nn.Linear(8, 4))
    network = check(module, IMAGE)
    assert kinds(network) == ["Table", "Linear"]


def test_a_function_of_a_layer_reads_the_layers_result():
    network = check(Call(lambda s, x: F.silu(s.conv(x)), conv=CONV), IMAGE)
    assert kinds(network) == ["Conv2d", "Table"]
    assert network.ops[1].name == "silu"


def test_prelu_has_a_table_per_channel():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Flatten(), nn.PReLU())
    network = check(module, IMAGE)
    assert kinds(network) == ["Conv2d", "Table", "Reshape", "Table"]
    program = intact.quantize(module, [torch.randn(4, *IMAGE)])
    assert program.parameters["1.table"].shape == (4, 256)
    assert program.parameters["3.table"].shape == (1, 256)


def test_the_entries_of_a_table_are_the_function_rounded_once_in_float64():
    module = nn.Sequential(nn.Linear(6, 6), nn.SiLU())
    program = intact.quantize(module, [torch.randn(64, 6) * 3])
    source, result = (program.tensors[name].qparams for name in ("0", "1"))
    for code in range(256):
        x = source.scale[0] * (min(max(code, source.qmin), source.qmax) - source.zero_point)
        expected = round(x / (1 + math.exp(-x)) / result.scale[0]) + result.zero_point
        expected = min(max(expected, result.qmin), result.qmax)
        assert program.parameters["1.table"][0, code] == expected


def test_what_saturates_below_hard_swish_costs_its_input_no_codes():
    """A channel that reaches -30 is 0 behind hard-swish, as is everything below -3."""
    module = randomized(nn.Sequential(nn.Linear(6, 6), nn.Hardswish()))
    network = capture(module, torch.zeros(1, 6))
    assert network.tensors["0"].low == -3
    program = intact.quantize(module, [torch.randn(64, 6) * 30])
    grid = program.tensors["0"].qparams
    # The zero point is even, so the grid may reach two codes further than it must.
    assert grid.scale[0] * grid.zero_point < 3 + 2 * grid.scale[0]
    x = torch.linspace(-9, 9, 999)
    assert torch.equal(F.hardswish(x.clamp(min=-3)), F.hardswish(x))
    assert torch.equal(F.hardsigmoid(x.clamp(-3, 3)), F.hardsigmoid(x))


def test_a_function_without_a_value_is_refused_when_it_is_lowered():
    module = nn.Sequential(nn.Linear(6, 6), Call(torch.log), nn.Hardtanh())
    network = capture(module, torch.zeros(1, 6))
    assert kinds(network) == ["Linear", "Table"]
    with pytest.raises(intact.IntactError, match="NaN"):
        intact.quantize(module, [torch.randn(64, 6)])


# -- sums, differences, products -------------------------------------------------------------------


def test_squeeze_and_excitation_is_a_product_that_repeats_its_factor():
    def forward(s, x):
        y = s.conv(x)
        return y * F.hardsigmoid(s.excite(F.relu(s.squeeze(F.adaptive_avg_pool2d(y, 1)))))

    layers = {"squeeze": nn.Conv2d(4, 2, 1), "excite": nn.Conv2d(2, 4, 1)}
    network = check(Call(forward, conv=CONV, **layers), IMAGE)
    assert kinds(network) == ["Conv2d", "GlobalAvgPool", "Conv2d", "Conv2d", "Table", "Multiply"]
    assert network.ops[-1] == Multiply("mul", ("conv", "hardsigmoid"))


def test_a_factor_that_was_expanded_first_is_repeated_by_the_product():
    def forward(s, x):
        factor = torch.sigmoid(x.mean((2, 3)))[:, :, None, None]
        return factor.expand_as(x) * s.conv(x)

    network = check(Call(forward, conv=nn.Conv2d(3, 3, 1)), IMAGE)
    assert "Upsample" not in kinds(network)
    assert kinds(network)[-1] == "Multiply"


def test_spatial_attention_repeats_one_channel():
    network = check(Call(lambda s, x: x * torch.sigmoid(s.conv(x)), conv=nn.Conv2d(3, 1, 1)), IMAGE)
    assert kinds(network) == ["Conv2d", "Table", "Multiply"]


@pytest.mark.parametrize(
    "f",
    [
        lambda s, x: s.a(x) - s.b(x),
        lambda s, x: s.a(x) * s.b(x),
        lambda s, x: s.a(x) + s.b(x).mean((2, 3), keepdim=True),
        lambda s, x: s.a(x).mean((2, 3), keepdim=True) - s.b(x),
        lambda s, x: F.relu(s.a(x) - s.b(x)),
        lambda s, x: F.relu6(s.a(x) * s.b(x)),
        lambda s, x: s.a(x).mean(2, keepdim=True) * s.b(x).mean(3, keepdim=True),
        lambda s, x: torch.rsub(s.a(x), s.b(x)),
        lambda s, x: s.a(x) ** 2 + s.b(x),
    ],
)
def test_two_tensors_are_added_subtracted_and_multiplied(f):
    check(Call(f, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3)), IMAGE)


def test_constants_are_folded_into_the_layer_before_them():
    def forward(s, x):
        y = (s.conv(x) * s.gamma + 2) / 4 - s.beta
        return F.relu(3 - s.fc(y.flatten(1)) * 0.5)

    module = Call(forward, conv=nn.Conv2d(3, 4, 3, bias=False), fc=nn.Linear(144, 5))
    module.gamma, module.beta = (nn.Parameter(torch.rand(4, 1, 1) + 0.5) for _ in range(2))
    network = check(module, IMAGE)
    assert kinds(network) == ["Conv2d", "Reshape", "Linear"]
    assert network.tensors["fc"].low == 0


def test_a_constant_by_channel_without_a_layer_before_it_is_a_depthwise_convolution():
    mean, std = torch.tensor([0.4, 0.5, 0.3])[:, None, None], torch.tensor(0.25)
    network = check(Call(lambda s, x: s.conv((x - mean) / std), conv=CONV), IMAGE)
    assert kinds(network) == ["Conv2d", "Conv2d"]
    assert network.ops[0].groups == 3


def test_a_constant_along_the_last_axis_folds_into_a_linear_layer_on_an_image():
    def forward(s, x):
        return s.fc(x.permute(0, 2, 3, 1)) * torch.tensor([1.0, 2, 3, 4])

    network = check(Call(forward, fc=nn.Linear(3, 4)), IMAGE)
    assert kinds(network) == ["Permute", "Linear"]


def test_a_constant_factor_on_a_tensor_that_others_read_too_is_a_table():
    def forward(s, x):
        y = s.conv(x)
        return s.other(y) + 0.5 * y

    layers = {"conv": CONV, "other": nn.Conv2d(4, 4, 1)}
    assert kinds(check(Call(forward, **layers), IMAGE)) == ["Conv2d", "Conv2d", "Table", "Add"]


# -- lines, and transposed convolutions ------------------------------------------------------------


def test_layers_over_a_line_become_layers_over_an_image_of_one_row():
    module = nn.Sequential(
        nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Conv1d(4, 4, 3, padding="same", groups=2),
        nn.MaxPool1d(2),
        nn.AvgPool1d(2, 1),
        nn.AdaptiveAvgPool1d(1),
    )
    network = check(module, (3, 19))
    assert kinds(network) == [
        *("Reshape", "Conv2d", "Conv2d", "MaxPool2d", "AvgPool2d", "GlobalAvgPool", "Reshape")
    ]
    assert network.tensors["0"].low == 0


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_transposed_convolution_is_what_torch_computes(data):
    def pick(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = data.draw(st.sampled_from([1, 1, 2]))
    kernel, stride = (pick(1, 4), pick(1, 4)), (pick(1, 3), pick(1, 3))
    dilation = (pick(1, 2), pick(1, 2))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(pick(0, r) for r in reach)
    extra = tuple(pick(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
    size = (pick(1, 5), pick(1, 5))
    module = nn.ConvTranspose2d(
        2 * groups, 3 * groups, kernel, stride, padding, extra, groups, True, dilation
    )
    left = [
        (n - 1) * s - 2 * p + r + e + 1
        for n, s, p, r, e in zip(size, stride, padding, reach, extra, strict=True)
    ]
    if min(left) < 1:
        return  # the padding cuts off everything
    _, got, expected = both(module, (2 * groups, *size))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_transposed_convolution_is_one_convolution_that_takes_batch_norm_and_relu():
    module = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    network = check(module, IMAGE)
    assert [op.name for op in network.ops if isinstance(op, Conv2d)] == ["0", "3"]
    assert network.tensors["0"].low == 0
    assert network.parameters["0.weight"].shape == (16, 3, 2, 2)
    line = nn.Sequential(nn.ConvTranspose1d(3, 4, 3, 2, 1, 1), nn.BatchNorm1d(4))
    assert kinds(check(line, LINE)).count("Conv2d") == 1


# -- pools and means -------------------------------------------------------------------------------

POOLS = {
    "padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "ceil mode": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "ceil mode with padding": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "ceil mode, not counted": lambda x: F.avg_pool2d(x, (4, 3), 3, 1, True, False),
    "another divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive to more": lambda x: F.adaptive_avg_pool2d(x, (11, 4)),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(x, (3, 5)),
    "adaptive maximum to more": lambda x: F.adaptive_max_pool2d(x, (11, 1)),
    "maximum with dilation": lambda x: F.max_pool2d(x, 3, 2, 1, 2),
    "maximum in ceil mode": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "mean of rows": lambda x: x.mean(2),
    "mean of columns, kept": lambda x: x.mean(-1, keepdim=True),
    "mean of channels": lambda x: x.mean(1, keepdim=True),
    "mean of all, kept": lambda x: x.mean((1, 2, 3), keepdim=True),
    "sum": lambda x: x.sum((2, 3)),
    "maximum of the image": lambda x: x.amax((2, 3)),
    "maximum of channels": lambda x: x.amax(1, keepdim=True),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_of_every_kind_are_what_torch_computes(name):
    check(Call(lambda s, x: POOLS[name](s.conv(x)), conv=CONV), IMAGE)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_average_pools_of_any_geometry_are_what_torch_computes(data):
    size = [data.draw(st.integers(1, 9)) for _ in range(2)]
    kernel = [data.draw(st.integers(1, 4)) for _ in range(2)]
    arguments = {
        "stride": [data.draw(st.integers(1, 4)) for _ in range(2)],
        "padding": [data.draw(st.integers(0, k // 2)) for k in kernel],
        "ceil_mode": data.draw(st.booleans()),
        "count_include_pad": data.draw(st.booleans()),
    }
    if any(s + 2 * p < k for s, p, k in zip(size, arguments["padding"], kernel, strict=True)):
        return
    _, got, expected = both(Call(lambda x: F.avg_pool2d(x, kernel, **arguments)), (2, *size))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_large_pool_with_windows_of_many_sizes_goes_over_columns_and_then_over_rows():
    pool = Call(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    network = check(pool, (2, 20, 20), least_db=32.0)
    assert [tuple(weight.shape) for weight in network.parameters.values()] == [(20, 20)] * 2
    small = check(pool, IMAGE, least_db=32.0)
    assert [tuple(weight.shape) for weight in small.parameters.values()] == [(64, 64)]
    check(Call(lambda x: F.avg_pool2d(x, 3, 2, 1, True, divisor_override=5)), (2, 24, 24))


def test_a_pool_with_windows_of_many_sizes_divides_each_by_its_own_count():
    module = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    network = capture(module, torch.zeros(1, 2, 5, 5))
    assert kinds(network) == ["Reshape", "Linear", "Reshape"]
    program = intact.quantize(module, [torch.rand(8, 2, 5, 5)])
    (linear,) = (op for op in program.ops if isinstance(op, Linear))
    codes = program.parameters[f"{linear.name}.weight"]
    for row in codes:
        assert len(set(row[row != 0].tolist())) == 1
        assert (row != 0).sum() in (4, 6, 9)


# -- what moves values -----------------------------------------------------------------------------


def overwritten(x):
    x[:, 1:2, 3:] = torch.relu(x[:, :1, 3:])
    return x


def shifted(x):
    """Some channels one row down, some one up, as temporal shift modules have it."""
    y = torch.zeros_like(x)
    y[:, :1, 1:] = x[:, :1, :-1]
    y[:, 1:2, :-1] = x[:, 1:2, 1:]
    y[:, 2:] = x[:, 2:]
    return y


def framed(x):
    x[:, :, 0] = -0.5
    x[..., -1] = 0
    return x


MOVES = {
    "chunk": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "split": lambda x: torch.cat(torch.split(x, [1, 2], 1)[::-1], 1),
    "split of equal size": lambda x: torch.cat([t * 2 for t in x.split(3, 3)], 3),
    "unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "slices": lambda x: x[:, 1:, ::2, 1:-1:3],
    "negative": lambda x: x[:, -2:, -3],
    "narrow": lambda x: x.narrow(3, 2, 4),
    "select": lambda x: x.select(1, -1),
    "swapped channels": lambda x: torch.cat([x[:, 2:3], x[:, 1:2], x[:, 0:1]], 1),
    "stack": lambda x: torch.stack([x[:, 0], x[:, 2]], 2),
    "shuffle": lambda x: (
        torch.cat([x, x], 1).view(-1, 2, 3, 8, 8).transpose(1, 2).reshape(-1, 6, 8, 8)
    ),
    "channel shuffle": lambda x: F.channel_shuffle(torch.cat([x, x], 1), 2),
    "pixel shuffle": lambda x: F.pixel_shuffle(torch.cat([x, x, x, x], 1), 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2),
    "upsampling by two factors": lambda x: F.interpolate(x, size=(16, 24)),
    "exact upsampling": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "padding": lambda x: F.pad(x, (1, 2, 0, 3)),
    "padding of channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "a constant around": lambda x: F.pad(x, (1, 1, 1, 1), value=-0.75),
    "negative padding": lambda x: F.pad(x, (-1, 1, 2, -3)),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 5),
    "reflection": lambda x: F.pad(x, (3, 0, 1, 7), mode="reflect"),
    "replication": lambda x: F.pad(x, (3, 1, 0, 9), mode="replicate"),
    "a circle": lambda x: F.pad(x, (3, 1, 0, 8), mode="circular"),
    "flip": lambda x: x.flip(1, 3),
    "roll": lambda x: torch.roll(x, (3, -1), (2, 3)),
    "roll of windows": lambda x: torch.roll(x, 11, 2)[:, :, :4],
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat of one": lambda x: x.mean((2, 3), keepdim=True).repeat(1, 1, 4, 5),
    "tile": lambda x: x.tile(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "indices": lambda x: x[:, [2, 0, 1, 1]],
    "index_select": lambda x: x.index_select(2, torch.tensor([7, 0, 3, 3, 3, 4, 5])),
    "many indices": lambda x: x.flatten(1)[:, torch.arange(192) * 5 % 192],
    "hstack": lambda x: torch.hstack([x, x]),
    "dstack": lambda x: torch.dstack([x, x]),
    "max of a dim": lambda x: torch.max(x, 1, keepdim=True)[0],
    "min of a dim": lambda x: x.min(1).values,
    "amin": lambda x: x.amin((2, 3)),
    "larger": lambda x: torch.maximum(x, x.flip(1)),
    "larger of a row": lambda x: torch.max(x, x.mean((2, 3), keepdim=True)),
    "larger of vectors": lambda x: torch.maximum(x.mean((2, 3)), x[:, :, 0, 0]),
    "smaller": lambda x: torch.min(x, x.flip(1)),
    "zeros behind": lambda x: torch.cat([x, torch.zeros(len(x), 2, 8, 8)], 1),
    "constants everywhere": lambda x: torch.cat(
        [x.new_full((len(x), 1, 8, 8), 0.5), x, torch.zeros_like(x), x], 1
    ),
    "a part overwritten": lambda x: overwritten(x.clone()),
    "a shift of channels": shifted,
    "a constant written": lambda x: framed(x.clone()),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_values_moves_codes(name):
    check(Call(lambda s, x: MOVES[name](s.conv(x)), conv=nn.Conv2d(3, 3, 1)), IMAGE)


def test_what_is_chosen_and_padded_with_own_values_is_no_arithmetic():
    f = Call(lambda x: F.pad(x, (2, 2, 2, 2), mode="reflect").flip(2)[:, [1, 0, 2]])
    assert set(kinds(capture(f, torch.zeros(1, *IMAGE)))) == {"Slice", "Concat"}
    larger = capture(Call(lambda x: torch.maximum(x, x.flip(2))), torch.zeros(1, *IMAGE))
    assert set(kinds(larger)) == {"Slice", "Concat", "Reshape", "MaxPool2d"}


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_padding_with_own_values_is_what_torch_computes(data):
    mode = data.draw(st.sampled_from(["reflect", "replicate", "circular"]))
    size = [data.draw(st.integers(2, 5)) for _ in range(2)]
    most = [{"reflect": n - 1, "replicate": 9, "circular": n}[mode] for n in reversed(size)]
    widths = [data.draw(st.integers(0, n)) for n in most for _ in range(2)]
    module = Call(lambda x: F.pad(x, widths, mode=mode) * 1)
    if not any(widths):
        return
    _, got, expected = both(module, (2, *size))
    assert torch.equal(got, expected)


def test_a_line_is_upsampled_too():
    check(Call(lambda x: F.interpolate(x, scale_factor=3)), LINE)


RESIZED = {
    "linear": (LINE, {"scale_factor": 2, "mode": "linear"}),
    "by 2": (IMAGE, {"scale_factor": 2, "mode": "bilinear"}),
    "by 4 and 3": (IMAGE, {"scale_factor": (4, 3), "mode": "bilinear"}),
    "corners": (IMAGE, {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
    "to a size": (IMAGE, {"size": (13, 8), "mode": "bilinear"}),
    "to a smaller one": (IMAGE, {"size": (5, 3), "mode": "bilinear"}),
    "smoothed": (IMAGE, {"size": (5, 3), "mode": "bilinear", "antialias": True}),
    "a factor that is no whole one": (IMAGE, {"scale_factor": 1.7, "mode": "bilinear"}),
    "bicubic": (IMAGE, {"scale_factor": 2, "mode": "bicubic"}),
    "nearest": (IMAGE, {"size": (12, 7)}),
    "nearest, fewer": (IMAGE, {"size": (4, 4)}),
    "nearest, by a factor": (IMAGE, {"scale_factor": 1.3}),
}


@pytest.mark.parametrize("name", RESIZED)
def test_resizing_is_what_torch_computes_at_the_edges_too(name):
    shape, options = RESIZED[name]
    network = check(Call(lambda x: F.interpolate(x, **options)), shape, least_db=31.0)
    assert set(kinds(network)) <= {"Linear", "Permute"}


def test_bilinear_weights_are_those_of_the_textbook():
    network = capture(
        Call(lambda x: F.interpolate(x, scale_factor=2, mode="linear")), torch.zeros(1, 1, 3)
    )
    assert network.parameters["interpolate.weight"].tolist() == [
        [1, 0, 0],
        [0.75, 0.25, 0],
        [0.25, 0.75, 0],
        [0, 0.75, 0.25],
        [0, 0.25, 0.75],
        [0, 0, 1],
    ]


def test_padding_is_left_to_the_convolution_or_pool_that_reads_it():
    module = Call(lambda s, x: s.conv(F.pad(x, (0, 1, 2, 0))), conv=nn.Conv2d(3, 4, 3, padding=1))
    network = check(module, IMAGE)
    assert network.ops == (Conv2d("conv", ("input",), padding=(3, 1, 1, 2)),)

    pool = Call(lambda s, x: F.max_pool2d(F.pad(F.relu(s.conv(x)), (0, 1, 0, 1)), 3, 2), conv=CONV)
    assert kinds(check(pool, IMAGE)) == ["Conv2d", "MaxPool2d"]
    low = Call(
        lambda s, x: F.max_pool2d(F.pad(F.relu(s.conv(x))[:, 1:], (1, 0, 1, 0), value=-1e4), 3, 2),
        conv=CONV,
    )
    assert kinds(check(low, IMAGE)) == ["Conv2d", "Slice", "MaxPool2d"]
    infinite = Call(lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2))
    network = check(infinite, IMAGE)
    assert network.ops[0] == MaxPool2d("max_pool2d", ("input",), (3, 3), (2, 2), (0, 1, 0, 1))


def test_a_constant_may_surround_another_view_of_what_a_layer_computes():
    """The grid has to hold both, and they differ in their channels."""

    def forward(s, x):
        y = s.conv(x)
        return s.fc(F.pad(y.flatten(2).transpose(1, 2), (0, 1), value=-1.5)).mean(1) + y.mean(
            (2, 3)
        )

    network = check(Call(forward, conv=CONV, fc=nn.Linear(5, 4)), IMAGE)
    assert "Pad" in kinds(network)


def test_padding_that_a_maximum_could_take_stays():
    """Of negative values the largest would be the 0 that was padded."""
    module = Call(lambda s, x: F.max_pool2d(F.pad(s.conv(x), (0, 1, 0, 1)), 3, 2), conv=CONV)
    assert kinds(check(module, IMAGE)) == ["Conv2d", "Pad", "MaxPool2d"]

    def above(s, x):
        return F.max_pool2d(F.pad(F.relu(s.conv(x)), (0, 1, 0, 1), value=0.1), 3, 2)

    assert kinds(check(Call(above, conv=CONV), IMAGE)) == ["Conv2d", "Pad", "MaxPool2d"]


def test_padding_that_two_operations_read_stays():
    def forward(s, x):
        y = F.pad(x, (1, 1, 1, 1))
        return s.conv(y) + F.avg_pool2d(y, 3, 1).mean(1, keepdim=True)

    network = check(Call(forward, conv=nn.Conv2d(3, 4, 3)), IMAGE)
    assert sum(isinstance(op, Pad) for op in network.ops) == 1


def test_a_clamp_goes_through_slices_only_where_one_is_all_that_is_read():
    alone = capture(Call(lambda s, x: F.relu(s.conv(x)[:, :2]), conv=CONV), torch.zeros(1, *IMAGE))
    assert alone.tensors["conv"].low == 0

    def forward(s, x):
        left, right = s.conv(x).chunk(2, 1)
        return F.relu(left) + right

    network = check(Call(forward, conv=CONV), IMAGE)
    assert network.tensors["conv"].low == -math.inf


def test_reshapes_and_permutes_in_a_row_are_one():
    def forward(s, x):
        y = s.conv(x).flatten(1).view(-1, 4, 64).view(-1, 4, 8, 8)
        return s.other(y.permute(0, 2, 3, 1).permute(0, 3, 1, 2))

    module = Call(forward, conv=CONV, other=nn.Conv2d(4, 2, 1))
    assert kinds(check(module, IMAGE)) == ["Conv2d", "Conv2d"]


def two_views(f, **layers):
    layers = {"conv": CONV, "other": nn.Conv2d(4, 4, 3, padding=1), **layers}
    return Call(f, **layers)


VIEWS = {
    "permuted back": lambda s, x: (
        s.other((p := s.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()).flatten(1)
        + p.flatten(1)
    ),
    "viewed back": lambda s, x: (
        s.other((v := s.conv(x).flatten(2)).view(-1, 4, 8, 8).relu()).flatten(2) - v
    ),
    "norm behind a view": lambda s, x: (
        s.norm((v := s.conv(x).flatten(2)).view(-1, 4, 8, 8)).flatten(2) * v
    ),
    "constant behind a permute": lambda s, x: (
        ((p := s.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 2).flatten(1) + p.flatten(1)
    ),
    "tokens": lambda s, x: (
        (t := s.conv(x).flatten(2).transpose(1, 2))
        + s.fc(s.line(t.transpose(1, 2)).transpose(1, 2))
    ),
    "sum behind a view": lambda s, x: F.pixel_shuffle(s.conv(x), 2).sum(-1, keepdim=True),
    "gray to colours": lambda s, x: torch.stack([(g := s.conv(x)[:, 0]), g, g], 1),
    "steps": lambda s, x: s.other((s.conv(x) > 0).float()),
    "doubled phases": lambda s, x: s.up(x) * 2 - 0.5,
}


@pytest.mark.parametrize("name", VIEWS)
def test_several_views_of_one_tensor_are_read_apart(name):
    """What is fused behind one view must not reach the readers of another."""
    layers = {
        "norm": nn.BatchNorm2d(4),
        "line": nn.BatchNorm1d(4),
        "fc": nn.Linear(4, 4),
        "up": nn.ConvTranspose2d(3, 2, 2, 2),
    }
    network = check(two_views(VIEWS[name], **layers), IMAGE, least_db=15)
    read = {tensor for op in network.ops for tensor in op.inputs} | {network.output}
    assert {op.name for op in network.ops} <= read


def test_a_function_whose_parts_are_shared_many_times_over_is_looked_at_once():
    def forward(x):
        for _ in range(40):
            x = x + torch.sin(x)
        return x

    network = capture(Call(forward), torch.zeros(1, *VECTOR))
    assert not network.functions[network.output].per_channel


def test_a_module_that_is_called_twice_has_two_layers_with_equal_weights():
    network = check(Call(lambda s, x: s.fc(F.relu(s.fc(x))), fc=nn.Linear(6, 6)), VECTOR)
    assert [op.name for op in network.ops] == ["fc", "fc_1"]
    assert torch.equal(network.parameters["fc.weight"], network.parameters["fc_1.weight"])


def test_a_part_that_nobody_reads_is_no_slice():
    network = check(Call(lambda s, x: s.conv(x).chunk(2, 1)[1], conv=CONV), IMAGE)
    assert network.ops[1:] == (Slice("chunk", ("conv",), 0, 2, 4),)


def test_the_batch_may_be_indexed_as_a_whole():
    network = check(Call(lambda s, x: s.conv(x)[:, :, 0, None], conv=CONV), IMAGE)
    assert [type(op) for op in network.ops] == [Conv2d, Slice]
    assert not any(isinstance(op, Reshape | Table) for op in network.ops)


def test_randomized_weights_are_what_the_checks_run_on():
    """`check` would be of little use on layers that compute nearly nothing."""
    module = randomized(nn.Conv2d(3, 4, 3, padding=1))
    assert float(module.weight.detach().std()) > 0.2


MATRIX = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

PLACES = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))

COMPOSED = {
    "an embedding of positions": (lambda x: torch.relu(x) + PLACES, IMAGE),
    "an embedding for the whole batch": (lambda x: x + PLACES.repeat(len(x), 1, 1, 1), IMAGE),
    "factors by position": (lambda x: x * PLACES[:, :1] + 1, IMAGE),
    "factors by row and channel": (lambda x: PLACES[:, :, :, :1] - x, IMAGE),
    "an embedding of tokens": (lambda x: x + PLACES[0, 0, :, :3], (8, 3)),
    "softmax": (lambda x: torch.softmax(x, 1), IMAGE),
    "softmax of rows": (lambda x: F.softmax(x, -1), IMAGE),
    "softmax of a vector": (lambda x: F.softmax(x, dim=1), VECTOR),
    "softmin": (lambda x: F.softmin(x, 1), VECTOR),
    "log_softmax": (lambda x: F.log_softmax(x, 1), VECTOR),
    "logsumexp": (lambda x: torch.logsumexp(x, 1), IMAGE),
    "glu": (lambda x: F.glu(torch.cat([x, x], 1), 1), IMAGE),
    "addcmul": (lambda x: torch.addcmul(x, torch.sigmoid(x), x, value=0.5), IMAGE),
    "norm": (lambda x: x.norm(dim=(2, 3)), IMAGE),
    "norm of order 1": (lambda x: torch.linalg.vector_norm(x, 1, dim=1), IMAGE),
    "norm of order 3": (lambda x: torch.linalg.vector_norm(x, 3, dim=(1, 2)), IMAGE),
    "norm of order inf": (lambda x: torch.linalg.vector_norm(x, math.inf, dim=1), IMAGE),
    "norm of a function": (lambda x: torch.relu(x).square().norm(dim=1, keepdim=True), VECTOR),
    "normalize": (lambda x: F.normalize(x, dim=1), VECTOR),
    "normalize channels": (lambda x: F.normalize(x, dim=1), IMAGE),
    "variance": (lambda x: x.var((2, 3)), IMAGE),
    "deviation": (lambda x: x.std(1, unbiased=False, keepdim=True), VECTOR),
    "matmul": (lambda x: x.mean((2, 3)) @ MATRIX, IMAGE),
    "mm": (lambda x: torch.mm(x.mean((2, 3)), MATRIX), IMAGE),
    "addmm": (lambda x: torch.addmm(torch.arange(5.0), x.mean((2, 3)), MATRIX, alpha=2), IMAGE),
    "matmul from the left": (lambda x: MATRIX.T @ x[:, :, :3], IMAGE),
    "matmul of an image": (lambda x: x.permute(0, 2, 3, 1) @ MATRIX, IMAGE),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_function_of_many_values_is_composed_of_operations(name):
    f, shape = COMPOSED[name]
    check(Call(f), shape)


def test_a_constant_by_position_is_a_convolution_with_a_channel_for_each_that_differs():
    module = Call(lambda x: x * PLACES[:, :1])
    network = capture(module, torch.zeros(1, *IMAGE))
    assert kinds(network) == ["Permute", "Reshape", "Conv2d", "Reshape", "Permute"]
    assert torch.equal(network.parameters["mul.weight"].flatten(), PLACES[0, 0].flatten())


@pytest.mark.parametrize("count", [2, 16, 256])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_softmax_is_as_good_as_its_codes_however_many_values_it_is_over(count, spread):
    check(Call(lambda x: F.softmax(x * spread, 1)), (count,), least_db=24.0)


def test_a_softmax_rounds_its_input_once():
    module = Call(lambda s, x: F.softmax(s.fc(x), 1), fc=nn.Linear(6, 4))
    network = check(module, VECTOR)
    assert kinds(align(network)).count("Requantize") == 0
    largest, parts = ["Linear", "Reshape", "MaxPool2d"], ["GlobalAvgPool", "Table", "Multiply"]
    assert kinds(network) == [*largest, "Upsample", "Subtract", "Table", *parts, "Reshape"]


def test_what_others_read_too_is_not_rounded_as_a_softmax_would_have_it():
    def f(s, x):
        y = s.fc(x)
        return F.softmax(y, 1) * y

    assert kinds(align(check(Call(f, fc=nn.Linear(6, 4)), VECTOR))).count("Requantize") == 2
