"""Grids are chosen, and weights, biases and multipliers quantized, as the specification says."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import intact
from intact.arithmetic import QParams, code_range, multiplier_value
from intact.calibrate import calibrate
from intact.capturing import capture
from intact.choose import align, choose_qparams, grid_for_range
from intact.errors import CalibrationError, ProgramError, RecipeError
from intact.lower import lower, quantize_bias, quantize_weight
from intact.ops import Add, Concat, Requantize
from intact.pipeline import quantize_network
from intact.ranges import MinMax
from intact.recipe import PRESETS, ActivationRecipe, InputRecipe, Recipe, WeightRecipe

torch.set_num_threads(1)

DEFAULT, LAB = PRESETS["default"], PRESETS["lab"]


# -- grids ---------------------------------------------------------------------------------------


@given(
    low=st.floats(-1e3, 0, width=32),
    high=st.floats(0, 1e3, width=32),
    bits=st.integers(2, 8),
)
def test_an_affine_grid_covers_its_range_with_the_finest_even_zero_point(low, high, bits):
    if high - low < 1e-3:
        return
    grid = grid_for_range(low, high, ActivationRecipe(bits=bits))
    assert (grid.qmin, grid.qmax) == code_range(bits, signed=False)
    assert grid.zero_point % 2 == 0
    scale = grid.scale[0]
    slack = 1 + 2**-23  # the scale is rounded to float32
    assert scale * (grid.qmin - grid.zero_point) <= low / slack + 1e-30
    assert scale * (grid.qmax - grid.zero_point) * slack >= high
    for z in range(0, grid.qmax, 2):
        needed = max(-low / z if z else (np.inf if low < 0 else 0), high / (grid.qmax - z))
        assert needed * slack >= scale


def test_schemes_are_what_they_say():
    assert grid_for_range(0.0, 2.0, ActivationRecipe()).zero_point == 0
    assert grid_for_range(0.0, 2.55, ActivationRecipe()).scale[0] == np.float32(0.01)
    assert grid_for_range(-1.0, 1.27, ActivationRecipe(scheme="symmetric")) == QParams(
        (float(np.float32(0.01)),)
    )
    assert grid_for_range(-1.28, 1.0, ActivationRecipe(scheme="textbook")) == QParams(
        (float(np.float32(0.01)),)
    )
    assert grid_for_range(0.0, 0.0, ActivationRecipe()).scale == (1.0,)


def quantized(module, x, recipe=DEFAULT):
    return quantize_network(capture(module, x), [x], recipe)


@pytest.mark.parametrize(
    ("low", "high", "scale", "signed"),
    [(-1.0, 1.0, 2**-7, True), (0.0, 1.0, 2**-8, False), (-3.0, 1.0, 2**-5, True)],
)
def test_the_input_has_a_power_of_two_scale_and_zero_point_0(low, high, scale, signed):
    x = torch.linspace(low, high, 128).reshape(2, 1, 8, 8)
    program = quantized(nn.Conv2d(1, 2, 3), x).program
    grid = program.tensors[program.input].qparams
    assert (grid.scale, grid.zero_point, grid.signed) == ((scale,), 0, signed)


def test_without_power_of_two_the_input_follows_its_scheme():
    recipe = Recipe(input=InputRecipe(scheme="affine", power_of_two=False))
    x = torch.linspace(-1, 3, 128).reshape(2, 1, 8, 8)
    program = quantized(nn.Conv2d(1, 2, 3), x, recipe).program
    grid = program.tensors[program.input].qparams
    assert (grid.zero_point, grid.signed) == (64, False)


# -- weights -------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), per_channel=st.booleans(), bits=st.integers(2, 8))
def test_weights_are_quantized_after_their_multiplier_is_on_the_dyadic_grid(
    seed, per_channel, bits
):
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(5, 3, 2, 2)) * rng.uniform(0.01, 2, (5, 1, 1, 1))).astype(np.float32)
    ratio, spec = (
        float(rng.uniform(0.01, 2)),
        WeightRecipe(bits, "symmetric", per_channel, MinMax()),
    )
    codes, scale, m = quantize_weight(weight, None, ratio, 1.0, 8, spec, "dyadic")
    assert m.dtype == np.int32
    assert (m >= 1).all()
    assert scale.shape == m.shape == ((5,) if per_channel else (1,))
    implied = (m / 2**16 / ratio).astype(np.float32)
    assert np.array_equal(scale, implied)
    steps = weight / scale.reshape(-1, 1, 1, 1)
    top = 2 ** (bits - 1)
    assert np.array_equal(codes, np.clip(np.rint(steps), -top, top - 1))
    # Of the two multipliers next to the wish, the one with the smaller error was taken.
    wish = np.abs(weight).reshape(5, -1).max(axis=1) / (top - 1)
    wish = (wish if per_channel else wish.max(keepdims=True)) * ratio * 2**16
    for other in (np.maximum(np.floor(wish), 1), np.floor(wish) + 1):
        s = (other / 2**16 / ratio).astype(np.float32).reshape(-1, 1, 1, 1)
        error = (s * np.clip(np.rint(weight / s), -top, top - 1) - weight).astype(np.float64) ** 2
        mine = (scale.reshape(-1, 1, 1, 1) * codes.astype(np.float32) - weight) ** 2
        if per_channel:
            error, mine = (e.reshape(5, -1).sum(axis=1) for e in (error, mine))
            assert (mine <= error * (1 + 1e-4)).all()
        else:
            assert mine.sum() <= error.sum() * (1 + 1e-4)


def test_the_grid_costs_next_to_no_accuracy():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 64, 3, 3)).astype(np.float32)
    error = {}
    for grid in ("float", "dyadic", "power_of_two"):
        codes, scale, _ = quantize_weight(weight, None, 0.02, 0.01, 8, WeightRecipe(), grid)
        error[grid] = float(((codes * scale.reshape(-1, 1, 1, 1) - weight) ** 2).sum())
    assert error["dyadic"] < 1.1 * error["float"] < error["power_of_two"]


def test_a_channel_of_zeros_is_harmless():
    weight = np.zeros((3, 4), np.float32)
    weight[1] = [1, -2, 3, -4]
    for grid in ("float", "dyadic", "power_of_two"):
        codes, scale, _ = quantize_weight(weight, None, 0.1, 1.0, 8, WeightRecipe(), grid)
        assert not codes[[0, 2]].any()
        assert codes[1].any()
        assert np.isfinite(scale).all()
    codes, _, _ = quantize_weight(weight * 0, None, 0.1, 1.0, 8, WeightRecipe(), "dyadic")
    assert not codes.any()


def test_biases_are_in_units_of_the_accumulator():
    bias = np.array([1.0, -2.5, 0.0, 1e9], np.float32)
    scale = np.array([0.5, 0.25, 1.0, 1e-3], np.float32)
    expected = [
        round(Fraction(float(b)) / (Fraction(0.5) * Fraction(float(s))))
        for b, s in zip(bias, scale, strict=True)
    ]
    expected[3] = 2**31 - 1
    assert quantize_bias(bias, 0.5, scale).tolist() == expected


@pytest.mark.parametrize("grid", ["float", "dyadic"])
def test_a_tiny_weight_with_a_large_bias_still_fits_int32(grid):
    """As batch norm leaves it for a channel that hardly varies."""
    conv = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 1e-12]).reshape(2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([0.0, 5.0]))
    x = torch.rand(8, 1, 4, 4)
    program = quantized(conv, x, replace(DEFAULT, grid=grid)).program
    error = np.abs(program.run(x.numpy()) - conv(x).detach().numpy())
    assert error.max() < 0.03


# -- shared grids --------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 1),
        )
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a(x))
        x = x + self.b(x)
        return self.fc(x.mean((2, 3)))


def test_operands_of_an_add_are_requantized_straight_to_the_common_scale_where_possible():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    made = quantized(Residual(), x)
    program = made.program
    adds = [op for op in program.ops if isinstance(op, Add)]
    assert len(adds) == 2
    for op in adds:
        grids = {
            (program.tensors[t].qparams.scale, program.tensors[t].qparams.zero_point)
            for t in (*op.inputs, op.name)
        }
        assert len(grids) == 1
        kinds = sorted(type(o).__name__ for o in program.ops if o.name in op.inputs)
        assert kinds == ["Conv2d", "Requantize"]  # the branch directly, the trunk on its own
    names = [op.name for op in program.ops if isinstance(op, Requantize)]
    assert all(name.startswith(tuple(a.name for a in adds)) for name in names)
    with torch.inference_mode():
        real = made.network(x).numpy()
    noise = ((program.run(x.numpy()) - real) ** 2).sum()
    assert 10 * np.log10((real**2).sum() / noise) > 25


def test_aligning_changes_nothing_in_float():
    torch.manual_seed(1)
    x = torch.randn(4, 3, 8, 8)
    network = capture(Residual(), x)
    with torch.inference_mode():
        assert torch.equal(align(network)(x), network(x))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(9, 2, 1)

    def forward(self, x):
        return self.c(torch.cat([torch.relu(self.a(x)), self.b(x), x], dim=1))


def test_parts_of_a_concat_share_one_grid_and_keep_their_own_code_ranges():
    torch.manual_seed(2)
    x = torch.randn(16, 3, 6, 6)
    program = quantized(Concatenated(), x).program
    (cat,) = [op for op in program.ops if isinstance(op, Concat)]
    whole = program.tensors[cat.name].qparams
    for part in cat.inputs:
        grid = program.tensors[part].qparams
        assert (grid.scale, grid.zero_point) == (whole.scale, whole.zero_point)
    assert program.tensors["a"].qparams.qmin == whole.zero_point  # its ReLU
    assert program.tensors["b"].qparams.qmin == 0


def test_relu6_and_relu_become_code_ranges():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return torch.relu(self.b(nn.functional.relu6(self.a(x))))

    torch.manual_seed(3)
    net = Net()
    with torch.no_grad():
        net.a.weight *= 20
    x = torch.randn(16, 1, 4, 4)
    recipe = replace(LAB, grid="dyadic")
    program = quantized(net, x, recipe).program
    a, b = (program.tensors[n].qparams for n in "ab")
    assert (a.qmin, a.qmax) == (0, 127)
    assert a.scale[0] == np.float32(6 / 128)
    assert (b.qmin, b.qmax) == (0, 127)


def sqnr(module: nn.Module, x: torch.Tensor, recipe=DEFAULT) -> float:
    with torch.inference_mode():
        real = module.eval()(x).numpy().astype(np.float64)
    got = intact.quantize(module, [x], recipe).run(x.numpy())
    return float(10 * np.log10((real**2).sum() / ((got - real) ** 2).sum()))


@pytest.mark.parametrize("grid", ["dyadic", "power_of_two", "float"])
@pytest.mark.parametrize(
    "pool", [nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(3), nn.AvgPool2d(5, 2)], ids=str
)
def test_the_grid_of_multipliers_costs_an_average_pool_nothing(pool, grid):
    """The scale of its result absorbs what the multiplier loses."""
    x = torch.rand(4, 2, 112, 112, generator=torch.Generator().manual_seed(0)) + 0.2
    assert sqnr(nn.Sequential(pool), x, replace(DEFAULT, grid=grid)) > 40


@pytest.mark.parametrize("grid", ["dyadic", "power_of_two", "float"])
def test_the_grid_of_multipliers_costs_a_residual_sum_little(grid):
    torch.manual_seed(5)
    assert sqnr(Residual(), torch.randn(32, 3, 8, 8), replace(DEFAULT, grid=grid)) > 27


def test_an_add_is_scaled_for_its_own_operands_and_not_for_those_of_an_earlier_one():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
            nn.init.constant_(self.a.bias, -50.0)
            nn.init.constant_(self.b.bias, 50.0)

        def forward(self, x):
            y = torch.relu(self.a(x) + self.b(x))
            return torch.relu(y + self.c(y))

    torch.manual_seed(6)
    x = torch.randn(32, 2, 4, 4)
    program = quantized(Twice(), x).program
    first, second = (op.name for op in program.ops if isinstance(op, Add))
    assert program.tensors[first].qparams.scale[0] > 0.3
    assert program.tensors[second].qparams.scale[0] < 0.1


def test_many_doublings_are_quantized_in_no_time():
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            x = self.conv(x)
            for _ in range(24):  # 2**24 sketches would be merged if adds looked through adds
                x = x + x
            return x

    assert sqnr(Doubling(), torch.rand(4, 1, 4, 4)) > 25


def test_a_layer_with_nothing_but_a_bias_keeps_it():
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.1, -0.1, 0.05, -0.02]))
    assert sqnr(layer, torch.randn(16, 8)) > 40


# -- the front door ------------------------------------------------------------------------------


def small_net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5),
    ).eval()


def test_quantize_takes_tensors_pairs_and_generators_and_gives_the_same_program():
    x, y = torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)
    model = small_net()
    plain = intact.quantize(model, [x[:32], x[32:]])
    pairs = intact.quantize(model, ((x[i : i + 32], y[i : i + 32]) for i in (0, 32)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    assert plain == pairs == intact.quantize(model, loader)
    assert plain.info["recipe"] == DEFAULT.to_toml()


def test_quantize_keeps_most_of_the_signal_at_8_bits_and_less_at_4():
    model, x = small_net(), torch.randn(256, 1, 8, 8)
    with torch.inference_mode():
        real = model(x).numpy()
    ratio = {}
    for bits in (8, 4):
        recipe = Recipe(weights=WeightRecipe(bits=bits), activations=ActivationRecipe(bits=bits))
        got = intact.quantize(model, [x], recipe).run(x.numpy())
        ratio[bits] = 10 * np.log10((real**2).sum() / ((got - real) ** 2).sum())
    assert ratio[8] > 32
    assert 10 < ratio[4] < ratio[8] - 10


def test_multipliers_are_dyadic_by_default_and_float_in_the_lab():
    model, x = small_net(), torch.randn(64, 1, 8, 8)
    default, lab = intact.quantize(model, [x]), intact.quantize(model, [x], "lab")
    for name, array in default.parameters.items():
        if name.endswith(".multiplier"):
            assert array.dtype == np.int32
            assert len(array) > 1
            stored = lab.parameters[name]
            assert stored.dtype == np.float32
            assert len(stored) == 1
            assert np.all(multiplier_value(array, 8) < 1)


def test_mistakes_are_explained():
    model, x = small_net(), torch.randn(8, 1, 8, 8)
    with pytest.raises(CalibrationError, match="no calibration data"):
        intact.quantize(model, [])
    with pytest.raises(RecipeError, match="no layer matches"):
        intact.quantize(model, [x], Recipe.from_toml("[layers.nope.weights]\nbits = 4"))
    network = align(capture(model, x))
    with pytest.raises(CalibrationError, match="has no Sketch"):
        choose_qparams(network, {}, DEFAULT)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[layers.max.activations]\nbits = 4",
            "'max', which keeps a grid that another layer decides",
        ),
        ("[layers.max.weights]\nbits = 4", "'max', which has no weights"),
    ],
)
def test_an_override_that_would_change_nothing_is_an_error(toml, message):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.max = nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)

        def forward(self, x):
            return self.max(self.conv(x))

    with pytest.raises(RecipeError, match=message):
        intact.quantize(Net(), [torch.randn(4, 1, 8, 8)], Recipe.from_toml(toml))
    fine = Recipe.from_toml('[layers."*".activations]\nbits = 4')
    assert intact.quantize(Net(), [torch.randn(4, 1, 8, 8)], fine)


def test_an_accumulator_that_could_leave_int32_is_refused():
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(140_000, 1, bias=False)
            nn.init.ones_(self.fc.weight)

        def forward(self, x):
            return self.fc(x)

    with pytest.raises(ProgramError, match="which int32 cannot hold"):
        intact.quantize(Wide(), [torch.rand(2, 140_000)], "lab")


def test_calibration_in_another_order_gives_the_same_program():
    model, x = small_net(), torch.randn(96, 1, 8, 8)
    batches = [x[:32], x[32:64], x[64:]]
    assert intact.quantize(model, batches) == intact.quantize(model, batches[::-1])


def test_lowering_needs_the_sketches_of_the_same_network():
    model, x = small_net(), torch.randn(8, 1, 8, 8)
    network = capture(model, x)
    sketches = calibrate(network, [x])
    aligned = align(network)
    qparams = choose_qparams(aligned, sketches, DEFAULT)
    program = lower(aligned, qparams, DEFAULT, {"origin": "a test"})
    assert program.info == {"origin": "a test"}
    assert [op.name for op in program.ops] == [op.name for op in network.ops]
