"""What is wrong, in words, and what to do about it: rules over a run's layers and stages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from intact.analysis import Analysis, LayerAnalysis, TensorAnalysis
from intact.significance import SIGNIFICANCE, guessing_p
from intact.staged import StageResult, Stages

__all__ = ["Finding", "diagnose"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a rule found.

    rule      short identifier: "outliers", "one-sided", "dead-channels", …
    severity  "problem" costs accuracy now; "advice" would help; "note" is good to know
    layer     the layer it is about, or "" for the whole run
    message   what was seen, with its figures
    advice    what to do
    recipe    recipe lines (TOML) to paste, or "". Dotted keys: the lines of different findings
              make one valid recipe together
    """

    rule: str
    severity: Literal["problem", "advice", "note"]
    layer: str
    message: str
    advice: str
    recipe: str = ""


FAR_OUT = 6.0
"""An extreme this many standard deviations out is an outlier: of a Gaussian's values, 1 in 5e8."""
GAUSSIAN_OUTSIDE = 0.0027
"""Fraction of a Gaussian beyond 3 sigma: the yardstick for an outlier fraction."""
WORTHWHILE_DB = 1.0
"""A range is too wide if a narrower one, outliers clipped, has so much less noise in the end."""
SATURATING = 0.01
SATURATING_BITS = 5
"""With fewer bits the range of least error clips more than `SATURATING` of a Gaussian itself."""
SPREAD = 8.0
"""A channel whose range is 8 times smaller than its tensor's loses 3 of its bits."""
FEW_IMAGES = 128
FEW_CODES = 0.5
NOISY_DB = 20.0
"""Below this, a tenth of the signal's amplitude is noise."""

_ORDER = {"problem": 0, "advice": 1, "note": 2}


def diagnose(analysis: Analysis, stages: Stages, calibration_images: int) -> tuple[Finding, ...]:
    """Apply every rule; problems first, then advice, then notes.

    analysis            of the program, on its calibration data
    stages              of the same program, on the test set
    calibration_images  how many images the ranges were chosen from
    """
    findings = [
        *_guessing(stages),
        *_accuracy(stages),
        *_few_images(calibration_images),
        *_one_sided(analysis),
        *_channel_spread(analysis),
        *_outliers(analysis),
        *_saturating(analysis),
        *_dead_channels(analysis),
        *_few_codes(analysis),
        *_noisy(analysis),
        *_accumulators(analysis),
    ]
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))


def _guessing(stages: Stages) -> Iterator[Finding]:
    """The float network itself is no better than guessing, so no other figure means anything."""
    program = stages.program
    classes = math.prod(program.tensors[program.outputs[0]].shape)
    first = next(iter(stages))
    if not isinstance(first, StageResult) or classes < 2:
        return
    p = guessing_p(first.correct, first.total, classes)
    if p >= SIGNIFICANCE:
        yield Finding(
            "guessing",
            "problem",
            "",
            f"The float network is right on {first.correct:,} of {first.total:,} images, and "
            f"guessing among {classes:,} classes is at least as often right with p = {p:.2g}: the "
            "order of the labels, how images are prepared, or the weights are wrong.",
            "Repair that first: no other figure here means anything. Labels are numbers of the "
            "network's outputs, and folders are numbered in the order of their names; images must "
            "be prepared as in the training.",
        )


def _accuracy(stages: Stages) -> Iterator[Finding]:
    """The integer program is significantly worse than the float network."""
    labelled = {stage.name: stage for stage in stages if isinstance(stage, StageResult)}
    if not labelled:
        return
    final = labelled["integer"]
    if final.p_value >= SIGNIFICANCE or final.difference >= 0:
        return
    accuracy = {name: stage.accuracy for name, stage in labelled.items()}
    steps = {
        "quantizing the weights": accuracy["weights"] - accuracy["float"],
        "quantizing the activations": accuracy["activations"] - accuracy["weights"],
        "integer arithmetic (multipliers and biases)": final.accuracy - accuracy["activations"],
    }
    worst = min(steps, key=lambda step: steps[step])
    yield Finding(
        "accuracy",
        "problem",
        "",
        f"The integer program is {-final.difference * 100:.2f} points below float "
        f"({final.flips_to_wrong} images became wrong, {final.flips_to_right} right, "
        f"p = {final.p_value:.2g}). The largest step down, {-steps[worst] * 100:.2f} points, is "
        f"{worst}.",
        "Follow the findings below, and compare with the default recipe: per-channel weights, "
        "affine activations, ranges chosen by error.",
    )


def _few_images(count: int) -> Iterator[Finding]:
    if count < FEW_IMAGES:
        yield Finding(
            "few-images",
            "advice",
            "",
            f"Ranges were chosen from only {count} calibration image{'s' if count > 1 else ''}: "
            "larger values, which other images are likely to have, saturate.",
            f"Calibrate with {FEW_IMAGES} images or more: --calibration 1000. Memory does not grow "
            "with their number.",
        )


def _one_sided(analysis: Analysis) -> Iterator[Finding]:
    """Never negative, yet on a signed grid around 0: half of the codes cannot occur."""
    wasted = [
        layer
        for layer in analysis.layers
        if layer.multiplier
        and _decider(analysis, layer.name) == layer.name
        and layer.activation.min >= 0
        and layer.activation.max > 0
        and layer.activation.zero_point == 0
        and layer.activation.type_name.startswith("int")
    ]
    if wasted:
        given_out = [layer.name in analysis.outputs for layer in wasted]
        sections = [
            *([] if all(given_out) else ["activations"]),
            *(["output"] if any(given_out) else []),
        ]
        yield Finding(
            "one-sided",
            "advice",
            wasted[0].name if len(wasted) == 1 else "",
            f"The results of {_list([layer.name for layer in wasted])} are never negative, but "
            "their grids are symmetric: the negative half of the codes cannot occur, and one bit "
            "of resolution is lost.",
            "Use an affine grid: all codes then lie within the range.",
            "".join(f'{section}.scheme = "affine"\n' for section in sections),
        )


def _channel_spread(analysis: Analysis) -> Iterator[Finding]:
    """One scale for channels of very different size."""
    spread: list[str] = []
    for layer in analysis.layers:
        if layer.weight is None or len(layer.weight.scale) > 1:
            continue
        reach = [r for r in _channel_reach(layer.weight) if r > 0]
        if reach and max(reach) / min(reach) >= SPREAD:
            codes = 2 * min(reach) / layer.weight.scale[0]
            spread.append(
                f"{layer.name} ({max(reach) / min(reach):.0f} times; {codes:.0f} of "
                f"{2**layer.weight.bits} codes for the smallest)"
            )
    if spread:
        yield Finding(
            "channel-spread",
            "advice",
            spread[0].split(" (")[0] if len(spread) == 1 else "",
            "All output channels of a layer share one weight scale, but the largest reaches much "
            f"further than the smallest: {_list(spread)}.",
            "Use one scale per output channel.",
            "weights.per_channel = true\n",
        )


def _outliers(analysis: Analysis) -> Iterator[Finding]:
    """A few values far out decide the range, and the rest gets few codes."""
    for kind in ("weights", "activations"):
        harmful: list[str] = []
        harmless: list[str] = []
        for what, layer, tensor in _tensors(analysis):
            if what != kind or tensor.std == 0:
                continue
            if kind == "activations" and _decider(analysis, layer.name) != layer.name:
                continue
            reach = max(tensor.max - tensor.mean, tensor.mean - tensor.min) / tensor.std
            if reach < FAR_OUT:
                continue
            gain = _clipping_gain(tensor)
            seen = f"{reach:.1f} sigma, {tensor.outlier_fraction:.2%} beyond 3"
            # A logit that saturates can no longer win: the output keeps its whole range.
            is_output = kind == "activations" and layer.name in analysis.outputs
            if gain < WORTHWHILE_DB or is_output:
                harmless.append(f"{layer.name} ({seen})")
            else:
                harmful.append(f"{layer.name} ({seen}; {gain:.0f} dB to gain)")
        if harmful:
            yield Finding(
                "outliers",
                "advice",
                harmful[0].split(" (")[0] if len(harmful) == 1 else "",
                f"Outliers decide the range of the {kind} of {_list(harmful)}. All other values "
                "share what few codes are left. (Of a Gaussian's values "
                f"{GAUSSIAN_OUTSIDE:.2%} lie beyond 3 sigma, and none beyond {FAR_OUT:.0f}.)",
                "Choose the range by error: clipping a few values makes the steps finer for all "
                "others.",
                f'{kind}.range = "mse"\n',
            )
        if harmless:
            yield Finding(
                "outliers",
                "note",
                harmless[0].split(" (")[0] if len(harmless) == 1 else "",
                f"There are outliers among the {kind} of {_list(harmless)}.",
                "Nothing to do: clipping them would cost about what finer steps would gain.",
            )


def _saturating(analysis: Analysis) -> Iterator[Finding]:
    """More than the odd value is clipped, and by more than the one code of the textbook scheme."""
    for kind, layer, tensor in _tensors(analysis):
        clips = tensor.clipped_fraction > SATURATING and _overshoots(tensor)
        if clips and tensor.bits >= SATURATING_BITS:
            yield Finding(
                "saturating",
                "problem",
                layer.name,
                f"{tensor.clipped_fraction:.1%} of the {kind} of {layer.name} lie outside of their "
                f"range, [{tensor.range[0]:.3g}, {tensor.range[1]:.3g}], and saturate; they reach "
                f"from {tensor.min:.3g} to {tensor.max:.3g}.",
                "Choose a wider range.",
                _override(analysis, layer, kind, "minmax"),
            )


def _dead_channels(analysis: Analysis) -> Iterator[Finding]:
    """Channels that were constant over all calibration data, or whose weights are all 0."""
    for layer in analysis.layers:
        tensor = layer.activation
        pairs = zip(tensor.channel_min, tensor.channel_max, strict=True)
        dead = [i for i, (low, high) in enumerate(pairs) if low == high]
        if dead and layer.weight is not None:
            yield Finding(
                "dead-channels",
                "note",
                layer.name,
                f"{len(dead)} of {len(tensor.channel_min)} channels of {layer.name} had the same "
                f"value for all calibration images: {_list([str(i) for i in dead])}.",
                "They cost work and carry nothing: remove them from the network and fine-tune, or "
                "make sure that the calibration images are representative.",
            )


def _few_codes(analysis: Analysis) -> Iterator[Finding]:
    """Codes that could occur, but hardly any does: the range is too wide for the data."""
    for kind, layer, tensor in _tensors(analysis):
        possible = tensor.qmax - tensor.qmin + 1
        used = sum(count > 0 for count in tensor.codes)
        # Few values cannot use many codes: it takes four for each to say that one is left out.
        if sum(tensor.codes) < 4 * 2**tensor.bits or used >= FEW_CODES * possible:
            continue
        seen = f"The {kind} of {layer.name} use {used} of {possible} codes."
        decider = _decider(analysis, layer.name) if kind == "activations" else layer.name
        if decider != layer.name:
            yield Finding(
                "few-codes",
                "note",
                layer.name,
                f"{seen} They share their grid with {decider}, whose range is wider.",
                "Nothing to do: operands of an addition need one grid.",
            )
        elif _clipping_gain(tensor) >= WORTHWHILE_DB:
            yield Finding(
                "few-codes",
                "advice",
                layer.name,
                f"{seen} The range is wider than most of the data.",
                "Choose a narrower range.",
                _override(analysis, layer, kind, "mse"),
            )


def _noisy(analysis: Analysis) -> Iterator[Finding]:
    """Where the noise comes in, if the result is noisy at all: the input, a layer, or many."""
    ratios = [layer.sqnr_db for layer in analysis.layers if layer.name in analysis.outputs]
    last = min((ratio for ratio in ratios if ratio is not None), default=None)
    if last is None or last >= NOISY_DB:
        return
    said = f"The result's signal-to-noise ratio is {last:.1f} dB."
    ratio_of = {name: tensor.sqnr_db for name, tensor in analysis.inputs.items()}
    known = {name: ratio for name, ratio in ratio_of.items() if ratio is not None}
    first = min(known.values(), default=99.0)
    noisiest = min(known, key=known.__getitem__, default="")
    drops: list[tuple[float, LayerAnalysis]] = []
    for layer in analysis.layers:
        if layer.sqnr_db is None:
            continue
        before = min((known[i] for i in layer.inputs if i in known), default=first)
        known[layer.name] = layer.sqnr_db
        drops.append((before - layer.sqnr_db, layer))
    drop, worst = max(drops, key=lambda pair: pair[0])
    if drop < WORTHWHILE_DB:
        told = (
            f"{said} No layer is to blame: the largest step down, {worst.name}, is {drop:.1f} dB."
        )
        advice = "Give all weights or all activations more bits."
        if first < NOISY_DB:
            which = "the input" if len(analysis.inputs) == 1 else f"the input {noisiest}"
            told += f" The codes of {which} alone leave {first:.1f} dB."
            advice = f"Give {which} more bits, or a range that suits the data."
        yield Finding("noisy", "advice", "", told, advice)
        return
    yield Finding(
        "noisy",
        "advice",
        worst.name,
        f"{said} The largest step down is {worst.name}: {drop:.1f} dB, to {worst.sqnr_db:.1f} dB.",
        "Start with what else is said about this layer here; else give it more bits, or another "
        "range.",
    )


def _accumulators(analysis: Analysis) -> Iterator[Finding]:
    """How wide the accumulators of a chip have to be: proven, not observed."""
    wide = max(analysis.layers, key=lambda layer: layer.accumulator_bits, default=None)
    if wide is not None and wide.accumulator_bits:
        yield Finding(
            "accumulators",
            "note",
            wide.name,
            f"No accumulator needs more than {wide.accumulator_bits} bits, whatever the input: the "
            f"widest is that of {wide.name}, with magnitudes up to {wide.accumulator_bound:,}.",
            "Registers of that width are enough in hardware; int32 always is.",
        )


def _tensors(analysis: Analysis) -> Iterator[tuple[str, LayerAnalysis, TensorAnalysis]]:
    """Every weight, and every activation that an op makes new codes for, as ("weights", …)."""
    for layer in analysis.layers:
        if layer.weight is not None:
            yield "weights", layer, layer.weight
        if layer.multiplier or layer.op in ("Add", "Concat"):
            yield "activations", layer, layer.activation


def _decider(analysis: Analysis, name: str) -> str:
    """The layer that decides the grid of another's result: an addition decides for its operands."""
    for layer in analysis.layers:
        if name in layer.inputs and layer.op in ("Add", "Concat"):
            return _decider(analysis, layer.name)
        if name in layer.inputs and layer.op in ("MaxPool2d", "Permute", "Clamp"):
            decider = _decider(analysis, layer.name)
            if decider != layer.name:
                return decider
    return name


def _override(analysis: Analysis, layer: LayerAnalysis, kind: str, method: str) -> str:
    """Recipe lines that choose another range for one layer's weights or activations."""
    name = _decider(analysis, layer.name) if kind == "activations" else layer.name
    return f'layers."{name}".{kind}.range = "{method}"\n'


def _overshoots(tensor: TensorAnalysis) -> bool:
    """Whether values are clipped, by more than the one code of the textbook scheme."""
    beyond = max(tensor.max - tensor.range[1], tensor.range[0] - tensor.min)
    return beyond > 1.5 * max(tensor.scale)


def _clipping_gain(tensor: TensorAnalysis) -> float:
    """By how many dB a narrower range would lower the noise of rounding and clipping together.

    Estimated from the codes, in units of a step: rounding costs 1/12 for each value but 0, and
    less by `shrink**2` on a grid that is shrunk to clip what lies beyond `shrink * reach`. 0 where
    the range clips already: how far the values went beyond it, the codes do not tell.
    """
    if _overshoots(tensor):
        return 0.0
    counts = {q: n for q, n in enumerate(tensor.codes, tensor.qmin - tensor.zero_point) if q and n}
    reach = max(abs(tensor.qmin - tensor.zero_point), abs(tensor.qmax - tensor.zero_point))
    rounding = sum(counts.values()) / 12
    least = rounding
    for shrink in (2 ** (-i / 8) for i in range(64)):
        limit = shrink * reach
        clipping = sum(n * (abs(q) - limit) ** 2 for q, n in counts.items() if abs(q) > limit)
        least = min(least, rounding * shrink**2 + clipping)
    return 10 * math.log10(rounding / least) if least > 0 else 0.0


def _channel_reach(tensor: TensorAnalysis) -> list[float]:
    pairs = zip(tensor.channel_min, tensor.channel_max, strict=True)
    return [max(abs(low), abs(high)) for low, high in pairs]


def _list(names: list[str], most: int = 8) -> str:
    """`a, b and c`, or the first few and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
