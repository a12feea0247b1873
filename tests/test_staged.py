"""The staged experiment, against brute force on networks small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from operator import mul

import numpy as np
import pytest
import torch

from intact.arithmetic import dequantize, multiplier_value, quantize
from intact.engines.reference import ReferenceEngine
from intact.errors import DataError
from intact.network import Network, TensorSpec
from intact.ops import Linear
from intact.pipeline import Quantized, quantize_network
from intact.recipe import PRESETS
from intact.significance import mcnemar_p, paired_interval, wilson_interval
from intact.staged import Stages, UnlabelledResult, fake_quantize, fake_weights, measure

torch.set_num_threads(1)
RNG = np.random.default_rng(7)
INPUTS, HIDDEN, CLASSES = 6, 5, 4


def two_layers(bias: bool = True) -> Network:
    rng = np.random.default_rng(3)
    parameters = {
        "hidden.weight": rng.normal(0, 1, (HIDDEN, INPUTS)),
        "last.weight": rng.normal(0, 1, (CLASSES, HIDDEN)),
    }
    if bias:
        parameters |= {
            "hidden.bias": rng.normal(0, 2, HIDDEN),
            "last.bias": rng.normal(0, 2, CLASSES),
        }
    return Network(
        ("x",),
        ("last",),
        (Linear("hidden", ("x",)), Linear("last", ("hidden",))),
        {
            "x": TensorSpec((INPUTS,)),
            "hidden": TensorSpec((HIDDEN,), low=0.0),
            "last": TensorSpec((CLASSES,)),
        },
        {k: torch.tensor(v, dtype=torch.float32) for k, v in parameters.items()},
    )


X = RNG.normal(0, 1, (300, INPUTS)).astype(np.float32)
Y = RNG.integers(0, CLASSES, 300)
BATCHES = [(X[:128], Y[:128]), (X[128:], Y[128:])]


def quantized(recipe: str = "lab", bias: bool = True, bits: int | None = None) -> Quantized:
    chosen = PRESETS[recipe]
    if bits:
        chosen = replace(
            chosen,
            weights=replace(chosen.weights, bits=bits),
            activations=replace(chosen.activations, bits=bits),
        )
    return quantize_network(two_layers(bias), [torch.from_numpy(X)], chosen)


def stages_of(q: Quantized) -> Stages:
    return measure(q.network, q.program, BATCHES)


def brute_force_logits(q: Quantized) -> dict[str, np.ndarray]:
    """Every stage from its definition, in float64."""
    p = {k: v.double().numpy() for k, v in q.network.parameters.items()}
    w = {
        k: q.program.parameters[f"{k}.weight"].astype(np.float64)
        * q.program.parameters[f"{k}.weight_scale"].astype(np.float64)[:, None]
        for k in ("hidden", "last")
    }
    bias = {k: p.get(f"{k}.bias", np.zeros(1)) for k in ("hidden", "last")}
    grid = {k: t.qparams for k, t in q.program.tensors.items()}

    def fake(name: str, x: np.ndarray) -> np.ndarray:
        return dequantize(quantize(x, grid[name]), grid[name]).astype(np.float64)

    def run(weights: dict[str, np.ndarray], see) -> np.ndarray:
        x = see("x", X.astype(np.float64))
        h = see("hidden", np.maximum(x @ weights["hidden"].T + bias["hidden"], 0))
        return see("last", h @ weights["last"].T + bias["last"])

    def as_is(name: str, x: np.ndarray) -> np.ndarray:
        return x

    codes = ReferenceEngine(q.program)(q.program.quantize_input(X))
    return {
        "float": run({k: p[f"{k}.weight"] for k in w}, as_is),
        "weights": run(w, as_is),
        "activations": run(w, fake),
        "integer": dequantize(codes, grid["last"]).astype(np.float64),
    }


@pytest.mark.parametrize("recipe", ["lab", "default"])
@pytest.mark.parametrize("bits", [8, 3])
def test_every_figure_of_every_stage_is_what_its_definition_gives(recipe, bits):
    q = quantized(recipe, bits=bits)
    stages = stages_of(q)
    logits = brute_force_logits(q)
    assert [r.name for r in stages] == [
        "float",
        "weights",
        "activations",
        "bias-unscaled",
        "integer",
    ]
    first = logits["float"].argmax(1)
    for name, values in logits.items():
        result, mine = stages[name], values.argmax(1)
        assert np.array_equal(stages.predictions[name], mine)
        right, right_before = mine == Y, first == Y
        to_wrong = sum(1 for a, b in zip(right_before, right, strict=True) if a and not b)
        to_right = sum(1 for a, b in zip(right_before, right, strict=True) if b and not a)
        both = int((right & right_before).sum())
        assert (result.correct, result.total) == (int(right.sum()), 300)
        assert result.accuracy == result.correct / 300
        assert result.interval == wilson_interval(result.correct, 300)
        assert (result.flips_to_wrong, result.flips_to_right) == (to_wrong, to_right)
        assert result.p_value == mcnemar_p(to_wrong, to_right)
        assert result.difference == pytest.approx(result.accuracy - stages["float"].accuracy)
        assert result.agreement == (mine == first).mean()
        if name == "float":
            assert result.sqnr_db is None
            assert result.difference_interval == (0.0, 0.0)
            continue
        neither = 300 - both - to_wrong - to_right
        assert result.difference_interval == paired_interval(both, to_wrong, to_right, neither)
        noise = ((values - logits["float"]) ** 2).sum()
        expected = 10 * math.log10((logits["float"] ** 2).sum() / noise)
        assert result.sqnr_db == pytest.approx(expected, abs=1e-3)
    if bits == 3:  # the flips above were not all 0
        assert stages["integer"].agreement < 1
        assert stages["integer"].flips_to_wrong > 0


def test_the_last_stage_is_the_program_itself():
    """Other integers in the program, and only its own stage changes."""
    q = quantized(bias=False)
    before = stages_of(q)
    parameters = {**q.program.parameters, "last.weight": -q.program.parameters["last.weight"]}
    after = measure(two_layers(bias=False), replace(q.program, parameters=parameters), BATCHES)
    assert not np.array_equal(after.predictions["integer"], before.predictions["integer"])
    codes = ReferenceEngine(after.program)(after.program.quantize_input(X))
    assert np.array_equal(after.predictions["integer"], codes.argmax(1))
    assert np.array_equal(after.predictions["float"], before.predictions["float"])


def test_argmax_takes_the_first_of_equals():
    network = Network(
        ("x",),
        ("y",),
        (Linear("y", ("x",)),),
        {"x": TensorSpec((1,)), "y": TensorSpec((3,))},
        {"y.weight": torch.tensor([[-1.0], [1.0], [1.0]])},
    )
    x = np.array([[1.0], [0.5], [-1.0], [0.0]], np.float32)
    q = quantize_network(network, [torch.from_numpy(x)], PRESETS["lab"])
    stages = measure(q.network, q.program, [(x, np.zeros(4, np.int64))])
    for name in ("float", "weights", "activations", "integer"):
        assert stages.predictions[name].tolist() == [1, 1, 0, 0]
        assert stages.predictions[name].dtype == np.int64


def test_without_a_bias_there_is_no_unscaled_one():
    stages = stages_of(quantized(bias=False))
    assert [r.name for r in stages] == ["float", "weights", "activations", "integer"]
    with pytest.raises(KeyError, match="bias-unscaled"):
        stages["bias-unscaled"]


@pytest.mark.parametrize("recipe", ["lab", "default"])
def test_an_unscaled_bias_is_added_to_the_accumulator_as_it_is(recipe):
    """Integer accumulators, with the bias in real units: computed on codes, in exact fractions."""
    q = quantized(recipe)
    p = q.program
    predicted = []
    for row in p.quantize_input(X[:40]):
        x = [int(code) - p.tensors["x"].qparams.zero_point for code in row]
        for name in ("hidden", "last"):
            grid = p.tensors[name].qparams
            multipliers = multiplier_value(p.parameters[f"{name}.multiplier"], grid.bits)
            rows = p.parameters[f"{name}.weight"].tolist()
            bias = q.network.parameters[f"{name}.bias"].tolist()
            factors = np.broadcast_to(multipliers, len(rows)).tolist()
            acc = [sum(map(mul, x, w)) + Fraction(b) for w, b in zip(rows, bias, strict=True)]
            codes = [round(a * Fraction(m)) for a, m in zip(acc, factors, strict=True)]
            low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
            x = [min(max(code, low), high) for code in codes]
        predicted.append(x.index(max(x)))
    stages = measure(q.network, p, BATCHES)
    assert stages.predictions["bias-unscaled"][:40].tolist() == predicted


def test_the_unscaled_bias_costs_accuracy_and_the_scaled_one_does_not():
    q = quantized()
    truth = brute_force_logits(q)["float"].argmax(1)
    stages = measure(q.network, q.program, [(X, truth)])
    assert stages["float"].accuracy == 1
    assert stages["integer"].accuracy > 0.95
    assert stages["bias-unscaled"].accuracy < 0.9
    assert stages["bias-unscaled"].p_value < 1e-6


def test_batches_do_not_matter():
    q = quantized()
    whole, parts = measure(q.network, q.program, [(X, Y)]), stages_of(q)
    for name in whole.predictions:
        assert np.array_equal(whole.predictions[name], parts.predictions[name])
        assert whole[name].sqnr_db == pytest.approx(parts[name].sqnr_db)
    assert np.array_equal(whole.labels, Y)


def test_tensors_arrays_and_smaller_integers_are_all_fine():
    q = quantized()
    lists = [[torch.from_numpy(X), torch.from_numpy(Y.astype(np.uint8))]]
    assert (
        measure(q.network, q.program, lists).results
        == measure(q.network, q.program, [(X, Y)]).results
    )


def test_progress_counts_images():
    q = quantized()
    seen: list[int] = []
    measure(q.network, q.program, BATCHES, seen.append)
    assert seen == [128, 300]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there is no test data"),
        ([X], "a test batch is a pair"),
        ([(X, Y, Y)], "a test batch is a pair"),
        ([(X, Y[:-1])], "one per sample: 300 samples came with labels of shape"),
        ([(X, Y.astype(np.float32))], "labels must be integers"),
        ([(X, Y[:, None])], "labels must be integers"),
        ([(X, Y - 1)], "holds labels from -1 to 2, but the network has 4 outputs"),
        ([(X, Y + 1)], "labels from 1 to 4(.*)subtract 1"),
        ([((X * 10).astype(np.int64), Y)], "test inputs are torch.int64"),
    ],
)
def test_bad_test_data_is_refused(batches, message):
    q = quantized()
    with pytest.raises(DataError, match=message):
        measure(q.network, q.program, batches)


def test_empty_batches_among_others_change_nothing():
    q = quantized()
    batches = [(X[:0], Y[:0]), (X, Y)]
    assert (
        measure(q.network, q.program, batches).results
        == measure(q.network, q.program, [(X, Y)]).results
    )


def test_nothing_but_empty_batches_is_no_test_data():
    q = quantized()
    with pytest.raises(DataError, match="no test data"):
        measure(q.network, q.program, [(X[:0], Y[:0])])


def test_fake_quantization_yields_values_of_the_grid():
    q = quantized("default")
    for name, tensor in q.program.tensors.items():
        grid = tensor.qparams
        x = torch.linspace(-5, 5, 1001)
        faked = fake_quantize(x, grid, name)
        codes = faked.numpy() / np.float32(grid.scale[0]) + grid.zero_point
        assert np.allclose(codes, np.rint(codes), atol=1e-3)
        assert torch.equal(fake_quantize(faked, grid, name), faked)
        assert fake_quantize(x.double(), grid, name).dtype == torch.float64


def test_fake_weights_are_codes_times_scales_and_biases_stay():
    q = quantized("default")
    faked = fake_weights(q.network, q.program)
    for name, value in faked.parameters.items():
        if name.endswith(".bias"):
            assert torch.equal(value, q.network.parameters[name])
        else:
            codes = q.program.parameters[name].astype(np.float32)
            scale = q.program.parameters[f"{name}_scale"]
            assert np.array_equal(value.numpy(), codes * scale[:, None])
            assert not torch.equal(value, q.network.parameters[name])


def test_the_results_show_themselves():
    stages = stages_of(quantized())
    assert str(stages).splitlines()[0].startswith("stage")
    assert len(str(stages).splitlines()) == 6
    assert max(map(len, str(stages).splitlines())) <= 80
    assert repr(stages) == str(stages)
    html = stages._repr_html_()
    assert html.count("<tr>") == 6
    assert "bias-unscaled" in html


# -- without labels --------------------------------------------------------------------------------


def test_without_labels_stages_are_compared_with_float_alone():
    q = quantized(bits=3)
    labelled, stages = stages_of(q), measure(q.network, q.program, [(x, None) for x, _ in BATCHES])
    assert stages.labels is None
    for result in stages:
        name = result.name
        assert np.array_equal(stages.predictions[name], labelled.predictions[name])
        same = int((stages.predictions[name] == stages.predictions["float"]).sum())
        assert result == UnlabelledResult(
            name, same, 300, same / 300, wilson_interval(same, 300), labelled[name].sqnr_db
        )
    assert 0 < stages["integer"].agreement < 1  # three bits do change predictions


def test_the_table_without_labels_has_no_accuracies():
    q = quantized(bits=3)
    stages = measure(q.network, q.program, [(X, None)])
    heading, first, *rows = [line.split() for line in str(stages).splitlines()]
    assert heading == ["stage", "as", "in", "float", "95", "%", "interval", "other", "SQNR"]
    assert first == ["float"]
    last = stages["integer"]
    low, high = (f"{100 * end:.1f}" for end in last.interval)
    assert rows[-1] == [
        "integer", f"{100 * last.agreement:.1f}", "%", f"{low}–{high}", "%",
        str(300 - last.same), f"{last.sqnr_db:.1f}", "dB",
    ]  # fmt: skip
    assert "as in float" in stages._repr_html_()


def test_labels_for_some_batches_only_are_refused():
    q = quantized()
    with pytest.raises(DataError, match="only 128 of 300 samples came with labels"):
        measure(q.network, q.program, [BATCHES[0], (X[128:], None)])
