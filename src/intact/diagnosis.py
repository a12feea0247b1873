"""What is wrong, in words, and what to do about it: rules over a run's layers and stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from intact.analysis import Analysis, LayerAnalysis, TensorAnalysis
from intact.staged import Stages

__all__ = ["Finding", "diagnose"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a rule found.

    rule      short identifier: "outliers", "one-sided", "dead-channels", …
    severity  "problem" costs accuracy now; "advice" would help; "note" is good to know
    layer     the layer it is about, or "" for the whole run
    message   what was seen, with its figures
    advice    what to do
    recipe    recipe lines (TOML) to paste, or ""
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
COVERED = 0.95
"""A range that reaches this far towards the extremes was not chosen with outliers in mind."""
SATURATING = 0.01
SPREAD = 8.0
"""A channel whose range is 8 times smaller than its tensor's loses 3 of its bits."""
FEW_IMAGES = 128
FEW_CODES = 0.5
NOISY_DB = 20.0
"""Below this, a tenth of the signal's amplitude is noise."""
SIGNIFICANT = 0.05

_ORDER = {"problem": 0, "advice": 1, "note": 2}


def diagnose(analysis: Analysis, stages: Stages, calibration_images: int) -> tuple[Finding, ...]:
    """Apply every rule; problems first, then advice, then notes.

    analysis            of the program, on its calibration data
    stages              of the same program, on the test set
    calibration_images  how many images the ranges were chosen from
    """
    findings = [
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


def _accuracy(stages: Stages) -> Iterator[Finding]:
    """The integer program is significantly worse than the float network."""
    final = stages["integer"]
    if final.p_value >= SIGNIFICANT or final.difference >= 0:
        return
    steps = {
        "quantizing the weights": stages["weights"].accuracy - stages["float"].accuracy,
        "quantizing the activations": stages["activations"].accuracy - stages["weights"].accuracy,
        "integer biases": final.accuracy - stages["activations"].accuracy,
    }
    worst = min(steps, key=lambda step: steps[step])
    yield Finding(
        "accuracy",
        "problem",
        "",
        f"The integer program is {-final.difference * 100:.2f} points below float "
        f"({final.flips_to_wrong} images became wrong, {final.flips_to_right} right, "
        f"p = {final.p_value:.2g}). Most of it, {-steps[worst] * 100:.2f} points, comes from "
        f"{worst}.",
        "Follow the findings below. The default recipe (per-channel weights, affine activations, "
        "ranges chosen by error) loses least.",
    )


def _few_images(count: int) -> Iterator[Finding]:
    if count < FEW_IMAGES:
        yield Finding(
            "few-images",
            "advice",
            "",
            f"Ranges were chosen from {count} calibration images; what the test set holds beyond "
            "them saturates.",
            f"Calibrate with at least {FEW_IMAGES} images: --calibration 1000. Memory does not "
            "grow with their number.",
        )


def _one_sided(analysis: Analysis) -> Iterator[Finding]:
    """Never negative, yet on a signed grid around 0: half of the codes cannot occur."""
    wasted = [
        layer.name
        for layer in analysis.layers
        if layer.multiplier
        and layer.activation.min >= 0
        and layer.activation.max > 0
        and layer.activation.zero_point == 0
        and layer.activation.type_name.startswith("int")
    ]
    if wasted:
        yield Finding(
            "one-sided",
            "advice",
            wasted[0] if len(wasted) == 1 else "",
            f"After a ReLU no value is negative, but the grid of {_list(wasted)} is symmetric: "
            "half of the codes cannot occur, so one bit of resolution is lost.",
            "Use an affine grid for activations.",
            '[activations]\nscheme = "affine"\n',
        )


def _channel_spread(analysis: Analysis) -> Iterator[Finding]:
    """One scale for channels of very different size."""
    for layer in analysis.layers:
        if layer.weight is None or len(layer.weight.scale) > 1:
            continue
        reach = [r for r in _channel_reach(layer.weight) if r > 0]
        if len(reach) > 1 and max(reach) / min(reach) >= SPREAD:
            yield Finding(
                "channel-spread",
                "advice",
                layer.name,
                f"The weights of {layer.name} share one scale, but the largest channel reaches "
                f"{max(reach) / min(reach):.0f} times as far as the smallest, which is left with "
                f"{2 * min(reach) / layer.weight.scale[0]:.0f} of {2**layer.weight.bits} codes.",
                "Use one scale per output channel.",
                "[weights]\nper_channel = true\n",
            )


def _outliers(analysis: Analysis) -> Iterator[Finding]:
    """A few values far out decide the range, and the rest gets few codes."""
    for kind in ("weights", "activations"):
        covered: list[str] = []
        clipped: list[str] = []
        for what, layer, tensor in _tensors(analysis):
            if what != kind or tensor.std == 0:
                continue
            reach = max(tensor.max - tensor.mean, tensor.mean - tensor.min)
            if reach < FAR_OUT * tensor.std:
                continue
            spent = max(-tensor.range[0], tensor.range[1]) / max(-tensor.min, tensor.max)
            (covered if spent > COVERED else clipped).append(
                f"{layer.name} ({reach / tensor.std:.1f} sigma; {tensor.outlier_fraction:.2%} "
                "beyond 3)"
            )
        if covered:
            yield Finding(
                "outliers",
                "advice",
                "",
                f"Far outliers decide the range of the {kind} of {_list(covered)}. All but a few "
                f"values lie within 3 sigma (of a Gaussian's, {GAUSSIAN_OUTSIDE:.2%} do not), and "
                "share what few codes are left.",
                "Choose the range by error: clipping a few values makes the steps finer for all "
                "others.",
                f'[{kind}]\nrange = "mse"\n',
            )
        if clipped:
            yield Finding(
                "outliers",
                "note",
                "",
                f"Far outliers among the {kind} of {_list(clipped)}.",
                "Nothing to do: their ranges leave the farthest of them outside.",
            )


def _saturating(analysis: Analysis) -> Iterator[Finding]:
    for kind, layer, tensor in _tensors(analysis):
        if tensor.clipped_fraction > SATURATING:
            yield Finding(
                "saturating",
                "problem",
                layer.name,
                f"{tensor.clipped_fraction:.1%} of the {kind} of {layer.name} lie outside of its "
                f"range, [{tensor.range[0]:.3g}, {tensor.range[1]:.3g}], and saturate.",
                "Choose a wider range.",
                f'[layers."{layer.name}".{kind}]\nrange = "minmax"\n',
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
                f"{len(dead)} of {len(tensor.channel_min)} channels of {layer.name} were constant "
                f"for all calibration images: {_list([str(i) for i in dead])}.",
                "They cost work and carry nothing: remove them from the network and fine-tune, or "
                "make sure that the calibration images are representative.",
            )


def _few_codes(analysis: Analysis) -> Iterator[Finding]:
    """Codes that could occur, but hardly any does: the range is too wide for the data."""
    for kind, layer, tensor in _tensors(analysis):
        possible = (tensor.qmax - tensor.qmin + 1) / 2**tensor.bits
        enough = tensor.count >= 4 * 2**tensor.bits
        if enough and tensor.code_usage < FEW_CODES * possible:
            yield Finding(
                "few-codes",
                "advice",
                layer.name,
                f"The {kind} of {layer.name} use {tensor.code_usage:.0%} of the {2**tensor.bits} "
                "codes of their type.",
                "Choose a narrower range.",
                f'[layers."{layer.name}".{kind}]\nrange = "mse"\n',
            )


def _noisy(analysis: Analysis) -> Iterator[Finding]:
    """Where the noise comes in: the layers that lose most, if the result is noisy at all."""
    if not analysis.layers:
        return
    last = analysis.layers[-1].sqnr_db
    if last is None or last >= NOISY_DB:
        return
    known: dict[str, float] = {}
    drops: list[tuple[float, LayerAnalysis]] = []
    for layer in analysis.layers:
        if layer.sqnr_db is None:
            continue
        before = min((known[i] for i in layer.inputs if i in known), default=None)
        if before is None:
            before = analysis.input.sqnr_db if analysis.input.sqnr_db is not None else 99.0
        known[layer.name] = layer.sqnr_db
        drops.append((before - layer.sqnr_db, layer))
    drop, worst = max(drops, key=lambda pair: pair[0])
    yield Finding(
        "noisy",
        "advice",
        worst.name,
        f"The result's signal-to-noise ratio is {last:.1f} dB. The largest step down is "
        f"{worst.name}: {drop:.1f} dB, to {worst.sqnr_db:.1f} dB.",
        "Give this layer more bits or a range of its own, or see what else is said about it here.",
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
    """Weights and activations of every layer that has a multiplier, as ("weights", …)."""
    for layer in analysis.layers:
        if layer.weight is not None:
            yield "weights", layer, layer.weight
        if layer.multiplier:
            yield "activations", layer, layer.activation


def _channel_reach(tensor: TensorAnalysis) -> list[float]:
    pairs = zip(tensor.channel_min, tensor.channel_max, strict=True)
    return [max(abs(low), abs(high)) for low, high in pairs]


def _list(names: list[str], most: int = 8) -> str:
    """`a, b and c`, or the first few and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
