"""Every rule speaks up in a case made for it, is silent in a healthy one, and its advice helps."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from intact.analysis import Analysis, LayerAnalysis, analyse
from intact.diagnosis import Finding, diagnose
from intact.network import Network, TensorSpec
from intact.ops import Add, Linear, Reshape
from intact.pipeline import quantize_network
from intact.ranges import MSE, Percentile
from intact.recipe import PRESETS, Override, Recipe
from intact.staged import StageResult, Stages, measure

torch.set_num_threads(1)
DEFAULT, LAB = PRESETS["default"], PRESETS["lab"]
PLENTY = 1000
WIDE = 32
RULES = {"accuracy", "few-images", "one-sided", "channel-spread", "outliers", "saturating"} | {
    "dead-channels",
    "few-codes",
    "noisy",
    "accumulators",
    "guessing",
}


def network(width: int = WIDE, **changes: np.ndarray) -> Network:
    """`hidden` (with ReLU) and `last`, Gaussian weights; `changes` replace parameters."""
    rng = np.random.default_rng(2)
    parameters: dict[str, Any] = {
        "hidden.weight": rng.normal(0, 0.2, (width, WIDE)),
        "hidden.bias": rng.normal(0.5, 0.1, width),
        "last.weight": rng.normal(0, 0.2, (10, width)),
        "last.bias": rng.normal(0, 0.1, 10),
    }
    parameters |= {name.replace("_", "."): value for name, value in changes.items()}
    return Network(
        ("x",),
        ("last",),
        (
            Reshape("flat", ("x",), (WIDE,)),
            Linear("hidden", ("flat",)),
            Linear("last", ("hidden",)),
        ),
        {
            "x": TensorSpec((2, WIDE // 2)),
            "flat": TensorSpec((WIDE,)),
            "hidden": TensorSpec((width,), low=0.0),
            "last": TensorSpec((10,)),
        },
        {name: torch.tensor(value, dtype=torch.float32) for name, value in parameters.items()},
    )


def parameter(name: str, width: int = WIDE) -> np.ndarray:
    return network(width).parameters[name].numpy().copy()


def inputs(count: int = 300, outlier: float = 0.0) -> torch.Tensor:
    x = np.random.default_rng(4).uniform(-1, 1, (count, 2, WIDE // 2)).astype(np.float32)
    x[0] += outlier
    return torch.from_numpy(x)


def run(net: Network, recipe: Recipe, x: torch.Tensor | None = None) -> tuple[Analysis, Stages]:
    x = inputs() if x is None else x
    q = quantize_network(net, [x], recipe)
    with torch.inference_mode():
        labels = net(x).argmax(1)  # float is right by definition
    analysis = analyse(q.network, q.program, q.sketches, recipe, [x])
    return analysis, measure(q.network, q.program, [(x, labels)])


def findings(net: Network, recipe: Recipe, x: torch.Tensor | None = None) -> list[Finding]:
    return list(diagnose(*run(net, recipe, x), PLENTY))


def rules(found: list[Finding] | tuple[Finding, ...], *severities: str) -> set[str]:
    return {f.rule for f in found if not severities or f.severity in severities}


def only(found: list[Finding] | tuple[Finding, ...], rule: str) -> Finding:
    (finding,) = (f for f in found if f.rule == rule)
    return finding


def with_bits(recipe: Recipe, bits: int) -> Recipe:
    return replace(
        recipe,
        weights=replace(recipe.weights, bits=bits),
        activations=replace(recipe.activations, bits=bits),
    )


def advised(recipe: Recipe, finding: Finding) -> Recipe:
    """The recipe with a finding's lines in it: what a user makes of them."""
    lines = Recipe.from_toml(finding.recipe)
    default = Recipe(name="custom")
    for section in ("weights", "activations", "output"):
        mine, theirs = getattr(recipe, section), getattr(lines, section)
        changed = {
            key: getattr(theirs, key)
            for key in theirs.__dataclass_fields__
            if getattr(theirs, key) != getattr(getattr(default, section), key)
            or f"{section}.{key}" in finding.recipe
        }
        recipe = replace(recipe, **{section: replace(mine, **changed)})
    return replace(recipe, overrides=recipe.overrides + lines.overrides)


# -- the healthy case, and every finding's form ----------------------------------------------------


def test_a_healthy_network_under_the_default_recipe_gets_notes_only():
    found = findings(network(), DEFAULT)
    assert rules(found) == {"accumulators"}
    assert rules(found, "problem", "advice") == set()


def troubled() -> list[Finding]:
    """Many findings in one run."""
    weight, bias = parameter("hidden.weight"), parameter("hidden.bias")
    weight[3, 7] = 4.0
    weight[5], bias[5] = 0, 0
    recipe = replace(with_bits(LAB, 4), overrides=(Override("last", "weights", "bits", 8),))
    narrow = Override("last", "weights", "range", "percentile:80")
    recipe = replace(recipe, overrides=(*recipe.overrides, narrow))
    return list(diagnose(*run(network(hidden_weight=weight, hidden_bias=bias), recipe), 20))


def test_the_recipe_lines_of_all_findings_together_are_one_recipe():
    found = troubled()
    assert len({f.recipe for f in found if f.recipe}) >= 3
    text = "".join(f.recipe for f in found)
    recipe = Recipe.from_toml(text)
    assert recipe.weights.per_channel
    assert recipe.activations.scheme == "affine"
    for finding in found:
        Recipe.from_toml(finding.recipe)


def test_problems_come_first_and_texts_are_sentences():
    found = troubled()
    order = ["problem", "advice", "note"]
    assert [f.severity for f in found] == sorted((f.severity for f in found), key=order.index)
    assert rules(found) <= RULES
    for f in found:
        assert f.message.endswith((".", ")"))
        assert f.advice.endswith(".")
        assert not re.search(r"\bnan\b|\binf\b|None", f.message)
        assert f.layer in ("", "hidden", "last")


# -- accuracy --------------------------------------------------------------------------------------


def stage(name: str, correct: int, p: float = 1.0, wrong: int = 0, right: int = 0) -> StageResult:
    difference = (correct - 900) / 1000
    return StageResult(
        name, correct, 1000, correct / 1000, (0.0, 1.0), wrong, right, p, difference,
        (difference, difference), 1.0, None,
    )  # fmt: skip


def stages(weights: int, activations: int, integer: int, p: float) -> Stages:
    results = (
        stage("float", 900),
        stage("weights", weights),
        stage("activations", activations),
        stage("integer", integer, p, 40, 40 - 900 + integer),
    )
    _, real = run(network(), DEFAULT)
    return replace(real, results=results)


@pytest.mark.parametrize(
    ("counts", "culprit"),
    [
        ((870, 868, 867), "quantizing the weights"),
        ((899, 872, 870), "quantizing the activations"),
        ((899, 898, 870), "integer arithmetic"),
    ],
)
def test_a_significant_loss_is_a_problem_and_names_its_step(counts, culprit):
    analysis, _ = run(network(), DEFAULT)
    finding = only(diagnose(analysis, stages(*counts, p=0.001), PLENTY), "accuracy")
    assert finding.severity == "problem"
    assert culprit in finding.message
    assert f"{(900 - counts[2]) / 10:.2f} points below float" in finding.message
    assert "40 images became wrong" in finding.message
    assert "p = 0.001" in finding.message


@pytest.mark.parametrize(("integer", "p"), [(890, 0.2), (930, 0.0001), (900, 1.0)])
def test_noise_and_gains_are_no_problem(integer, p):
    analysis, _ = run(network(), DEFAULT)
    assert "accuracy" not in rules(diagnose(analysis, stages(900, 900, integer, p), PLENTY))


# -- calibration images ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fires"), [(1, True), (127, True), (128, False), (50_000, False)]
)
def test_few_calibration_images_are_pointed_out(count, fires):
    found = diagnose(*run(network(), DEFAULT), count)
    assert ("few-images" in rules(found)) == fires
    if fires:
        plural = "" if count == 1 else "s"
        assert f"only {count} calibration image{plural}:" in only(found, "few-images").message


# -- a symmetric grid for one-sided data -----------------------------------------------------------


def test_a_relu_on_a_symmetric_grid_wastes_half_of_the_codes():
    finding = only(findings(network(), LAB), "one-sided")
    assert finding.layer == "hidden"
    assert "The results of hidden are never negative" in finding.message
    assert finding.recipe == 'activations.scheme = "affine"\n'
    assert "one-sided" not in rules(findings(network(), advised(LAB, finding)))


def test_an_output_that_is_never_negative_has_a_section_of_its_own():
    net = network(last_weight=np.abs(parameter("last.weight")), last_bias=np.ones(10))
    finding = only(findings(net, LAB), "one-sided")
    assert finding.recipe == 'activations.scheme = "affine"\noutput.scheme = "affine"\n'
    assert "one-sided" not in rules(findings(net, advised(LAB, finding)))


def test_a_symmetric_grid_for_two_sided_data_is_fine():
    net = network()
    tensors = {**net.tensors, "hidden": TensorSpec((WIDE,))}  # no ReLU
    assert "one-sided" not in rules(findings(replace(net, tensors=tensors), LAB))


# -- channels of different size --------------------------------------------------------------------


def test_one_scale_for_very_different_channels_is_pointed_out():
    weight = parameter("hidden.weight")
    weight[3] *= 20
    net = network(hidden_weight=weight)
    finding = only(findings(net, LAB), "channel-spread")
    assert finding.layer == "hidden"
    reach = np.abs(weight).max(axis=1)
    assert f"hidden ({reach.max() / reach.min():.0f} times" in finding.message
    assert f"{2 * reach.min() / reach.max() * 128:.0f} of 256 codes" in finding.message
    assert "channel-spread" not in rules(findings(net, advised(LAB, finding)))


def test_two_such_layers_make_one_finding():
    hidden, last = parameter("hidden.weight"), parameter("last.weight")
    hidden[3] *= 20
    last[0] *= 20
    finding = only(findings(network(hidden_weight=hidden, last_weight=last), LAB), "channel-spread")
    assert finding.layer == ""
    assert "hidden (" in finding.message
    assert " and last (" in finding.message


def test_channels_of_similar_size_and_channels_of_zeros_are_fine():
    weight = parameter("hidden.weight")
    weight[3] *= 3
    weight[4] = 0
    assert "channel-spread" not in rules(findings(network(hidden_weight=weight), LAB))


# -- outliers --------------------------------------------------------------------------------------


def advice_on_outliers(found: list[Finding]) -> list[Finding]:
    return [f for f in found if f.rule == "outliers" and f.severity == "advice"]


def test_outliers_among_weights_that_decide_the_range_are_pointed_out():
    weight = parameter("hidden.weight")
    weight[3, 7] = 2.0
    net, recipe = network(hidden_weight=weight), with_bits(LAB, 4)
    (finding,) = advice_on_outliers(findings(net, recipe))
    sigma = (2.0 - weight.mean()) / weight.std()
    assert f"weights of hidden ({sigma:.1f} sigma, " in finding.message
    assert re.search(r"[2-9] dB to gain", finding.message)
    assert finding.layer == "hidden"
    assert finding.recipe == 'weights.range = "mse"\n'
    better = advised(recipe, finding)
    assert advice_on_outliers(findings(net, better)) == []
    before, after = (run(net, r)[0].layers[0].weight.sqnr_db for r in (recipe, better))
    assert after > before + 2


def test_outliers_among_activations_that_decide_the_range_are_pointed_out():
    net, recipe, x = network(), with_bits(LAB, 4), inputs(3000, outlier=6.0)
    (finding,) = advice_on_outliers(findings(net, recipe, x))
    assert "activations of hidden (" in finding.message
    assert "last" not in finding.message  # the output keeps its whole range
    assert finding.recipe == 'activations.range = "mse"\n'
    better = findings(net, advised(recipe, finding), x)
    assert advice_on_outliers(better) == []
    assert "outliers" in rules(better, "note")


def test_an_outlier_that_is_worth_its_range_is_a_note():
    """One weight of 1,024: at 8 bits clipping it would cost more than all others could gain."""
    weight = parameter("hidden.weight")
    weight[3, 7] = 2.0
    finding = only(findings(network(hidden_weight=weight), DEFAULT), "outliers")
    assert finding.severity == "note"
    assert "weights of hidden (" in finding.message
    assert finding.recipe == ""


def test_gaussian_weights_have_no_outliers():
    assert "outliers" not in rules(findings(network(), LAB))


# -- saturation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weights", "activations"])
def test_a_range_that_clips_a_lot_is_a_problem(kind):
    narrow = replace(DEFAULT, **{kind: replace(getattr(DEFAULT, kind), range=Percentile(90.0))})
    found = [f for f in findings(network(), narrow) if f.rule == "saturating"]
    finding = found[0]
    assert finding.severity == "problem"
    assert finding.layer == "hidden"
    assert f"of the {kind} of hidden lie outside" in finding.message
    assert finding.recipe == f'layers."hidden".{kind}.range = "minmax"\n'
    better = findings(network(), advised(narrow, finding))
    assert not any(f.rule == "saturating" and f.layer == "hidden" for f in better)


def test_the_one_code_that_the_textbook_scheme_clips_is_no_saturation():
    """A clamp that many values reach: all of them saturate by a single code."""
    net = network()
    tensors = {**net.tensors, "hidden": TensorSpec((WIDE,), low=0.0, high=0.5)}
    analysis, results = run(replace(net, tensors=tensors), LAB)
    assert analysis.layers[0].activation.clipped_fraction > 0.1
    assert "saturating" not in rules(diagnose(analysis, results, PLENTY))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_range_of_least_error_is_never_called_saturating(bits):
    recipe = replace(
        DEFAULT,
        weights=replace(DEFAULT.weights, bits=bits, range=MSE()),
        activations=replace(DEFAULT.activations, bits=bits, range=MSE()),
    )
    assert "saturating" not in rules(findings(network(), recipe))


# -- dead channels ---------------------------------------------------------------------------------


def test_dead_channels_are_named():
    weight, bias = parameter("hidden.weight"), parameter("hidden.bias")
    weight[5], bias[5] = 0, 0
    bias[9] = -100
    found = findings(network(hidden_weight=weight, hidden_bias=bias), DEFAULT)
    finding = only(found, "dead-channels")
    assert (finding.severity, finding.layer) == ("note", "hidden")
    assert "2 of 32 channels of hidden" in finding.message
    assert finding.message.endswith("5 and 9.")


def test_many_dead_channels_are_counted_not_listed():
    bias = np.full(WIDE, -100.0)
    bias[:4] = 1
    finding = only(findings(network(hidden_bias=bias), DEFAULT), "dead-channels")
    assert "4, 5, 6, 7, 8, 9, 10, 11 and 20 more." in finding.message


# -- few codes -------------------------------------------------------------------------------------


def test_a_range_far_too_wide_is_pointed_out():
    weight = parameter("hidden.weight", 2048)
    weight[3, 7] = 6.0
    net, recipe = network(2048, hidden_weight=weight), with_bits(LAB, 6)
    (finding,) = (f for f in findings(net, recipe) if f.rule == "few-codes")
    assert finding.layer == "hidden"
    assert re.search(r"The weights of hidden use \d+ of 64 codes\.", finding.message)
    assert finding.recipe == 'layers."hidden".weights.range = "mse"\n'
    assert "few-codes" not in rules(findings(net, advised(recipe, finding)))


def test_the_half_that_a_relu_leaves_unused_is_not_counted_twice():
    assert "few-codes" not in rules(findings(network(), LAB))


def test_a_small_operand_of_an_addition_is_explained():
    """Its grid is the addition's: advice for the operand alone would change nothing."""
    net = network(last_weight=parameter("last.weight"))
    rng = np.random.default_rng(0)
    small = torch.tensor(rng.normal(0, 0.01, (10, WIDE)), dtype=torch.float32)
    net = Network(
        ("x",),
        ("sum",),
        (*net.ops, Linear("small", ("hidden",)), Add("sum", ("last", "small"))),
        {**net.tensors, "small": TensorSpec((10,)), "sum": TensorSpec((10,))},
        {**net.parameters, "small.weight": small},
    )
    (finding,) = (f for f in findings(net, LAB) if f.rule == "few-codes")
    assert (finding.severity, finding.layer, finding.recipe) == ("note", "small", "")
    assert "They share their grid with sum" in finding.message


def test_advice_for_a_saturating_operand_names_the_addition():
    analysis, results = run(network(), DEFAULT)
    hidden, last = analysis.layers
    clipped = replace(hidden.activation, clipped_fraction=0.2, max=2 * hidden.activation.range[1])
    layers = (replace(hidden, activation=clipped), addition(last, hidden))
    (finding,) = (
        f
        for f in diagnose(replace(analysis, layers=layers), results, PLENTY)
        if f.rule == "saturating"
    )
    assert finding.layer == "hidden"
    assert finding.recipe == 'layers."sum".activations.range = "minmax"\n'


def addition(like: LayerAnalysis, operand: LayerAnalysis) -> LayerAnalysis:
    return replace(
        like, name="sum", op="Add", inputs=(operand.name,), weight=None, multiplier=()
    )  # fmt: skip


# -- guessing --------------------------------------------------------------------------------------


def labelled(net: Network, labels: torch.Tensor) -> list[Finding]:
    x = inputs()
    q = quantize_network(net, [x], DEFAULT)
    analysis = analyse(q.network, q.program, q.sketches, DEFAULT, [x])
    return list(diagnose(analysis, measure(q.network, q.program, [(x, labels)]), PLENTY))


def test_a_float_network_no_better_than_guessing_is_a_problem_whatever_else_is_right():
    net = network()
    with torch.inference_mode():
        right = net(inputs()).argmax(1)
    assert "guessing" not in rules(labelled(net, right))
    shifted = only(labelled(net, (right + 3) % 10), "guessing")
    assert shifted.severity == "problem"
    assert "right on 0 of 300 images, and guessing among 10 classes" in shifted.message
    assert "at least as often right with p = 1:" in shifted.message
    # 42 of 300 is more than guessing reaches in 19 of 20 cases, 38 is not.
    few = (right + 3) % 10
    few[:38] = right[:38]
    assert "guessing" in rules(labelled(net, few))
    few[:42] = right[:42]
    assert "guessing" not in rules(labelled(net, few))


# -- noise, accumulators ---------------------------------------------------------------------------


def test_a_noisy_result_names_the_layer_where_the_noise_comes_in():
    low = Recipe.from_toml('layers."hidden".weights.bits = 2\n')
    finding = only(findings(network(), low), "noisy")
    assert finding.layer == "hidden"
    assert re.search(r"The result's signal-to-noise ratio is \d+\.\d dB", finding.message)
    low = Recipe.from_toml('layers."last".weights.bits = 2\n')
    assert only(findings(network(), low), "noisy").layer == "last"


def test_a_layer_is_not_blamed_for_the_noise_that_it_is_given():
    analysis, results = run(network(), DEFAULT)
    hidden, last = (
        replace(layer, sqnr_db=sqnr)
        for layer, sqnr in zip(analysis.layers, (12.0, 9.0), strict=True)
    )
    noisy = replace(analysis, layers=(hidden, last))
    finding = only(diagnose(noisy, results, PLENTY), "noisy")
    assert finding.layer == "hidden"
    assert "is 9.0 dB" in finding.message
    assert f"{analysis.inputs['x'].sqnr_db - 12:.1f} dB, to 12.0 dB" in finding.message
    clean = replace(noisy, inputs={"x": replace(noisy.inputs["x"], sqnr_db=13.0)})
    assert only(diagnose(clean, results, PLENTY), "noisy").layer == "last"


def test_no_layer_is_blamed_for_a_tenth_of_a_decibel():
    analysis, results = run(network(), DEFAULT)
    layers = tuple(replace(layer, sqnr_db=12.0) for layer in analysis.layers)
    given = {"x": replace(analysis.inputs["x"], sqnr_db=12.1)}
    finding = only(
        diagnose(replace(analysis, inputs=given, layers=layers), results, PLENTY), "noisy"
    )
    assert finding.layer == ""
    assert "No layer is to blame: the largest step down, hidden, is 0.1 dB" in finding.message
    assert "The codes of the input alone leave 12.1 dB" in finding.message
    assert "the input more bits" in finding.advice
    several = {"quiet": replace(given["x"], sqnr_db=40.0), "noisy": given["x"]}
    finding = only(
        diagnose(replace(analysis, inputs=several, layers=layers), results, PLENTY), "noisy"
    )
    assert "The codes of the input noisy alone leave 12.1 dB" in finding.message


def test_a_clear_result_is_not_called_noisy():
    assert "noisy" not in rules(findings(network(), DEFAULT))


def test_the_widest_accumulator_is_named():
    analysis, results = run(network(), DEFAULT)
    finding = only(diagnose(analysis, results, PLENTY), "accumulators")
    widest = max(analysis.layers, key=lambda layer: layer.accumulator_bits)
    assert finding.layer == widest.name
    assert f"more than {widest.accumulator_bits} bits" in finding.message
    assert f"{widest.accumulator_bound:,}" in finding.message
