"""What every tensor looks like: against brute force from float values and reference codes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from intact.analysis import Analysis, TensorAnalysis, analyse
from intact.arithmetic import accumulator_bits, dequantize
from intact.engines.reference import ReferenceEngine
from intact.errors import DataError
from intact.network import Network, TensorSpec
from intact.ops import Add, Conv2d, GlobalAvgPool, Linear, MaxPool2d, Requantize, Reshape
from intact.pipeline import Quantized, quantize_network
from intact.ranges import MinMax, Percentile
from intact.recipe import PRESETS, Recipe

torch.set_num_threads(1)
Array = np.ndarray[Any, Any]
IMAGES = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (60, 3, 8, 8)).astype(np.float32))


def residual() -> Network:
    """Two convolutions with a shortcut around the second, pools, and a linear layer."""
    rng = np.random.default_rng(11)
    parameters = {
        "conv1.weight": rng.normal(0, 0.3, (4, 3, 3, 3)) * [[[[0.1]]], [[[1]]], [[[1]]], [[[2]]]],
        "conv1.bias": rng.normal(0, 0.3, 4),
        "conv2.weight": rng.normal(0, 0.3, (4, 4, 3, 3)),
        "fc.weight": rng.normal(0, 1, (5, 4)),
        "fc.bias": rng.normal(0, 1, 5),
    }
    return Network(
        ("x",),
        ("fc",),
        (
            Conv2d("conv1", ("x",), padding=(1, 1, 1, 1)),
            Conv2d("conv2", ("conv1",), padding=(1, 1, 1, 1)),
            Add("add", ("conv2", "conv1")),
            MaxPool2d("pool", ("add",)),
            GlobalAvgPool("mean", ("pool",)),
            Reshape("flat", ("mean",), shape=(4,)),
            Linear("fc", ("flat",)),
        ),
        {
            "x": TensorSpec((3, 8, 8)),
            "conv1": TensorSpec((4, 8, 8), low=0.0),
            "conv2": TensorSpec((4, 8, 8)),
            "add": TensorSpec((4, 8, 8), low=0.0, high=3.0),
            "pool": TensorSpec((4, 4, 4)),
            "mean": TensorSpec((4, 1, 1)),
            "flat": TensorSpec((4,)),
            "fc": TensorSpec((5,)),
        },
        {k: torch.tensor(v, dtype=torch.float32) for k, v in parameters.items()},
    )


NARROW = replace(
    PRESETS["default"],
    weights=replace(PRESETS["default"].weights, range=Percentile(90.0), bits=5),
    activations=replace(PRESETS["default"].activations, range=Percentile(95.0), bits=6),
)
RECIPES = {
    "default": PRESETS["default"],
    "lab": PRESETS["lab"],
    "clips a lot": NARROW,
    "power of two": replace(PRESETS["default"], grid="power_of_two"),
}


def analysed(recipe: Recipe, images: torch.Tensor = IMAGES) -> tuple[Quantized, Analysis]:
    q = quantize_network(residual(), [IMAGES], recipe)
    batches = torch.split(images, 25)
    return q, analyse(q.network, q.program, q.sketches, recipe, batches)


def truth(q: Quantized) -> tuple[dict[str, Array], dict[str, Array]]:
    """Every tensor's float values and codes."""
    floats: dict[str, Array] = {}
    codes: dict[str, list[Array]] = {}

    def keep(name: str, x: torch.Tensor) -> torch.Tensor:
        floats[name] = x.numpy()
        return x

    with torch.inference_mode():
        q.network(IMAGES, keep)
    ReferenceEngine(q.program)(
        q.program.quantize_input(IMAGES.numpy()),
        lambda name, part: codes.setdefault(name, []).append(part.copy()),
    )
    return floats, {name: np.concatenate(parts) for name, parts in codes.items()}


def activations(q: Quantized, analysis: Analysis) -> dict[str, TensorAnalysis]:
    layers = {layer.name: layer.activation for layer in analysis.layers}
    return {**analysis.inputs, **layers}


def decibels(real: Array, approximate: Array) -> float:
    real = real.astype(np.float64)
    return 10 * math.log10((real**2).sum() / ((approximate - real) ** 2).sum())


def assert_fraction_outside(fraction: float, real: Array, low: float, high: float) -> None:
    """A sketch counts to within a bucket, 1/128 of the bound."""
    least, most = (((real < low * f) | (real > high * f)).mean() for f in (129 / 128, 127 / 128))
    assert least <= fraction <= most


@pytest.mark.parametrize("name", RECIPES)
def test_activations_are_what_brute_force_finds(name):
    q, analysis = analysed(RECIPES[name])
    floats, codes = truth(q)
    seen = activations(q, analysis)
    assert set(seen) == set(codes) - {"flat"}  # a reshape has nothing of its own
    for tensor, a in seen.items():
        grid = q.program.tensors[tensor].qparams
        real, got = floats[tensor], codes[tensor].astype(int)
        assert (a.min, a.max) == (real.min(), real.max())
        assert a.count == real.size
        assert a.mean == pytest.approx(real.astype(np.float64).mean(), rel=1e-9, abs=1e-12)
        assert a.std == pytest.approx(real.astype(np.float64).std(), rel=1e-9)
        assert a.three_sigma == pytest.approx((a.mean - 3 * a.std, a.mean + 3 * a.std))
        assert a.scale == grid.scale
        assert a.zero_point == grid.zero_point
        wanted = [int((got == code).sum()) for code in range(grid.qmin, grid.qmax + 1)]
        assert list(a.codes) == wanted
        assert sum(a.codes) == real.size
        assert a.code_usage == len(np.unique(got)) / 2**grid.bits
        assert a.sqnr_db == pytest.approx(decibels(real, dequantize(codes[tensor], grid)), rel=1e-6)
        low, high = ((q - grid.zero_point) * grid.scale[0] for q in (grid.qmin, grid.qmax))
        assert a.range == pytest.approx((low, high))
        half = grid.scale[0] / 2
        assert_fraction_outside(a.clipped_fraction, real, low - half, high + half)
        assert_fraction_outside(a.outlier_fraction, real, *a.three_sigma)
        channels = np.moveaxis(real, 1, 0).reshape(real.shape[1], -1)
        assert a.channel_min == tuple(channels.min(1))
        assert a.channel_max == tuple(channels.max(1))


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_what_brute_force_finds(name):
    recipe = RECIPES[name]
    q, analysis = analysed(recipe)
    bits = recipe.weights.bits
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for layer in analysis.layers:
        if layer.name not in ("conv1", "conv2", "fc"):
            assert layer.weight is None
            continue
        a = layer.weight
        real = q.network.parameters[f"{layer.name}.weight"].numpy()
        codes = q.program.parameters[f"{layer.name}.weight"].astype(int)
        scale = q.program.parameters[f"{layer.name}.weight_scale"]
        assert len(scale) == (len(real) if recipe.weights.per_channel else 1)
        shaped = scale.reshape(-1, *[1] * (real.ndim - 1))
        assert a.scale == tuple(scale)
        assert (a.type_name, a.qmin, a.qmax, a.zero_point) == (f"int{bits}", low, high, 0)
        assert list(a.codes) == [int((codes == code).sum()) for code in range(low, high + 1)]
        assert a.code_usage == len(np.unique(codes)) / 2**bits
        steps = real.astype(np.float64) / shaped
        assert a.clipped_fraction == ((steps < low - 0.5) | (steps > high + 0.5)).mean()
        assert a.sqnr_db == pytest.approx(decibels(real, codes * shaped), rel=1e-6)
        rows = real.reshape(len(real), -1)
        assert a.channel_min == tuple(rows.min(1))
        assert a.channel_max == tuple(rows.max(1))
        assert a.range == pytest.approx((low * scale.max(), high * scale.max()))
    if name == "clips a lot":
        assert (
            max(layer.weight.clipped_fraction for layer in analysis.layers if layer.weight) > 0.02
        )


@pytest.mark.parametrize("name", RECIPES)
def test_histograms_hold_every_value_before_and_after(name):
    q, analysis = analysed(RECIPES[name])
    tensors = [*activations(q, analysis).values()]
    tensors += [layer.weight for layer in analysis.layers if layer.weight]
    for a in tensors:
        assert sum(a.histogram.before) == pytest.approx(a.count)
        assert sum(a.histogram.after) == pytest.approx(a.count)
        assert min(a.histogram.before) >= 0
        assert min(a.histogram.after) >= 0
        assert len(a.histogram.before) == len(a.histogram.after)
        assert (a.histogram.low, a.histogram.high) == (a.min, a.max)


def test_the_histogram_after_shows_what_was_clipped():
    """Beyond the range nothing is left, and its last bins hold what was moved there."""
    q, analysis = analysed(NARROW)
    a = activations(q, analysis)["conv2"]
    h = a.histogram
    edges = np.linspace(h.low, h.high, len(h.before) + 1)
    beyond = edges[:-1] > a.range[1] + a.scale[0] / 2
    assert sum(np.array(h.before)[beyond]) > 0
    assert sum(np.array(h.after)[beyond]) == 0


def test_less_data_than_was_calibrated_on_gives_histograms_of_one_size():
    q, analysis = analysed(PRESETS["default"], IMAGES[:20])
    a = activations(q, analysis)["conv1"]
    assert a.count == 60 * 4 * 64
    assert sum(a.codes) == 20 * 4 * 64
    assert sum(a.histogram.after) == pytest.approx(sum(a.histogram.before))


def test_slices_and_batches_do_not_matter():
    """The engine takes 256 samples at a time: float values must be paired with their own codes."""
    images = IMAGES.repeat(6, 1, 1, 1)[
        torch.randperm(360, generator=torch.Generator().manual_seed(0))
    ]
    q = quantize_network(residual(), [images], PRESETS["default"])
    common = (q.network, q.program, q.sketches, PRESETS["default"])
    whole, parts = analyse(*common, [images]), analyse(*common, torch.split(images, 50))
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.activation.codes == other.activation.codes
        assert one.sqnr_db == pytest.approx(other.sqnr_db, rel=1e-6)
        assert one.sqnr_db > 25  # values paired with another image's codes would be all noise


def test_progress_counts_images_and_no_data_is_an_error():
    q = quantize_network(residual(), [IMAGES], PRESETS["default"])
    common = (q.network, q.program, q.sketches, PRESETS["default"])
    seen: list[int] = []
    analyse(*common, torch.split(IMAGES, 25), seen.append)
    assert seen == [25, 50, 60]
    with pytest.raises(DataError, match="no data to analyse"):
        analyse(*common, [])


def test_layers_come_in_order_with_their_facts():
    q, analysis = analysed(PRESETS["default"])
    layers = {layer.name: layer for layer in analysis.layers}
    inserted = [op.name for op in q.network.ops if isinstance(op, Requantize)]
    assert inserted == ["add.requantize1"]  # conv1 has two readers
    assert list(layers) == ["conv1", "conv2", "add.requantize1", "add", "pool", "mean", "fc"]
    conv1, conv2, fc = layers["conv1"], layers["conv2"], layers["fc"]
    assert (conv1.op, conv1.inputs) == ("Conv2d", ("x",))
    assert (conv1.input_shape, conv1.output_shape) == ((3, 8, 8), (4, 8, 8))
    assert conv1.macs == 4 * 64 * 27
    assert conv1.bytes == 4 * 27 + 4 * 4 + 4 * 4  # weights, biases, multipliers
    assert [layer.relu for layer in analysis.layers[:4]] == [True, False, False, True]
    bias = q.network.parameters["fc.bias"]
    assert fc.bias_range == (float(bias.min()), float(bias.max()))
    stored = q.program.parameters["fc.bias"]
    assert fc.inputs == ("mean",)  # not "flat": a reshape is no layer
    assert fc.bias_codes == (stored.min(), stored.max())
    assert conv2.bias_range is None
    assert conv2.bias_codes is None
    assert (layers["add"].multiplier, layers["add"].shift) == ((), None)
    assert (layers["add"].accumulator_bits, layers["add"].accumulator_bound) == (0, 0)
    assert conv1.shift == 16
    assert conv1.multiplier == tuple(q.program.parameters["conv1.multiplier"])
    x = q.program.tensors["x"].qparams.max_magnitude
    weight = q.program.parameters["conv1.weight"].astype(int)
    bound = (np.abs(weight).sum((1, 2, 3)) * x + np.abs(q.program.parameters["conv1.bias"])).max()
    assert conv1.accumulator_bound == bound
    assert conv1.accumulator_bits == accumulator_bits(int(bound))
    assert layers["mean"].accumulator_bits > 0
    assert all(layer.sqnr_db == layer.activation.sqnr_db for layer in analysis.layers)


def test_float_multipliers_have_no_shift():
    _, analysis = analysed(PRESETS["lab"])
    conv1 = analysis.layers[0]
    assert conv1.shift is None
    assert len(conv1.multiplier) == 1
    assert 0 < conv1.multiplier[0] < 1


def test_the_textbook_scheme_clips_the_largest_value_by_one_code():
    """`128 / max|t|`: the largest value would be code 128."""
    q, analysis = analysed(PRESETS["lab"])
    layers = activations(q, analysis)
    for name in ("x", "conv1", "mean", "fc"):  # the others serve the grid of the add
        a = layers[name]
        assert max(-a.min, a.max) == pytest.approx(128 * a.scale[0])
        assert a.range[1] == pytest.approx(127 * a.scale[0])


def test_a_tensor_of_zeros_can_be_analysed():
    network = residual()
    zero = {name: torch.zeros_like(p) for name, p in network.parameters.items()}
    network = network.with_parameters(zero)
    q = quantize_network(
        network,
        [IMAGES],
        Recipe(activations=replace(PRESETS["default"].activations, range=MinMax())),
    )
    analysis = analyse(q.network, q.program, q.sketches, q.recipe, [IMAGES])
    for layer in analysis.layers:
        assert layer.sqnr_db is None
        assert layer.activation.clipped_fraction == 0
        assert sum(layer.activation.histogram.before) == layer.activation.count
        assert sum(layer.activation.histogram.after) == layer.activation.count
