"""What a run found, in the sentences that a statistician would write; plain text."""

from __future__ import annotations

from intact.report.numbers import count, decibel, size
from intact.report.value import Report
from intact.significance import SIGNIFICANCE, percent
from intact.staged import Result, StageResult, UnlabelledResult

__all__ = [
    "explanation",
    "headline",
    "outputs_note",
    "p_value",
    "sentence",
    "stage_title",
    "verdict",
]

_STAGES = {
    "float": ("Float network", "The trained network, as it was."),
    "weights": ("Weights", "Weights rounded to their integer codes; activations still float."),
    "activations": (
        "Weights and activations",
        "Both rounded to codes, simulated in float; biases still float.",
    ),
    "bias-unscaled": (
        "Bias left in real units",
        "The classical mistake, shown on purpose: the bias without the scale of its accumulator.",
    ),
    "integer": (
        "Integer program",
        "The program itself: integer codes, int32 biases, no float inside.",
    ),
}


def stage_title(name: str) -> str:
    """A stage's name for people."""
    return _STAGES.get(name, (name, ""))[0]


def explanation(name: str) -> str:
    """What a stage is, in a sentence; empty for a stage that is not one of ours."""
    return _STAGES.get(name, ("", ""))[1]


def p_value(p: float) -> str:
    """A p-value with the digits that matter: "p = 0.85", "p = 0.0012", "p < 0.001"."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.2g}"


def sentence(stage: Result, float_stage: Result) -> str:
    """One stage against the float network, in words.

    "52.11 % against 52.07 %: 131 images became right, 127 wrong; such a difference is noise,
    p = 0.85"; where the exact McNemar test rejects chance at `SIGNIFICANCE`, what the stage costs
    or gains, in percentage points with its 95 % interval. Float itself: its accuracy alone.

    Without labels: "98.20 % of the predictions are as in float; the outputs carry 31.2 dB"; float
    itself: on how many samples the others are compared with it.
    """
    if isinstance(stage, UnlabelledResult) or isinstance(float_stage, UnlabelledResult):
        return _compared(stage, float_stage)
    accuracy = percent(stage.accuracy, stage.total)
    if stage.name == float_stage.name:
        low, high = (f"{100 * bound:.1f}" for bound in stage.interval)
        return (
            f"{accuracy}: {count(stage.correct)} of {count(stage.total)} images are right "
            f"(95 % interval {low} to {high} %)"
        )
    against = f"{accuracy} against {percent(float_stage.accuracy, float_stage.total)}"
    if stage.flips_to_right == stage.flips_to_wrong == 0:
        same = stage.agreement == 1
        return f"{against}: " + (
            "every prediction is the same" if same else "no image became right or wrong"
        )
    return f"{against}: {_flips(stage)}; {_judgement(stage)}"


def outputs_note(report: Report) -> str:
    """What the figures of stages are about where there are several outputs; else empty."""
    outputs = report.program.outputs
    if len(outputs) == 1:
        return ""
    names = f"{', '.join(outputs[:-1])} and {outputs[-1]}"
    return (
        f"Of the {len(outputs)} outputs, {names}, the first one is what predictions are made from, "
        "and the SQNR is that of the output with the lowest."
    )


def headline(report: Report) -> Result:
    """The stage that the run is about: the integer program, or the last one measured."""
    return next((s for s in report.stages if s.name == "integer"), report.stages[-1])


def verdict(report: Report) -> str:
    """The whole run in two sentences: accuracy of the program against float, and its size."""
    first, last = report.stages[0], headline(report)
    what = "As integers only" if last.name == "integer" else stage_title(last.name)
    program = report.program
    sizes = f"{size(program.bytes)} instead of {size(program.float_bytes)}."
    if isinstance(first, UnlabelledResult) or isinstance(last, UnlabelledResult):
        return f"{what}: {_compared(last, first)}. {sizes}"
    accuracy = percent(last.accuracy, last.total)
    float_accuracy = percent(first.accuracy, first.total)
    if last.flips_to_right == last.flips_to_wrong == 0:
        same = "every prediction" if last.agreement == 1 else "the same images right"
        return f"{what}: {accuracy}, with {same} as in float. {sizes}"
    return (
        f"{what}: {accuracy} against {float_accuracy} in float; {_flips(last)}; "
        f"{_judgement(last)}. {sizes}"
    )


def _compared(stage: Result, float_stage: Result) -> str:
    """A stage against float, in words, without a word on what is right."""
    if stage.name == float_stage.name:
        return f"the yardstick, on {count(stage.total)} samples without labels"
    signal = f"; the outputs carry {decibel(stage.sqnr_db)}" if stage.sqnr_db is not None else ""
    if stage.agreement == 1:
        return f"every prediction is as in float{signal}"
    agreement = percent(stage.agreement, stage.total)
    return f"{agreement} of the predictions are as in float{signal}"


def _flips(stage: StageResult) -> str:
    images = "image" if stage.flips_to_right == 1 else "images"
    return (
        f"{count(stage.flips_to_right)} {images} became right, {count(stage.flips_to_wrong)} wrong"
    )


def _judgement(stage: StageResult) -> str:
    if stage.p_value >= SIGNIFICANCE:
        return f"such a difference is noise, {p_value(stage.p_value)}"
    loss = stage.difference < 0
    ends = sorted(-100 * d if loss else 100 * d for d in stage.difference_interval)
    points = abs(100 * stage.difference)
    # Two decimals where one would leave no digit that matters.
    digits = 1 if points >= 0.5 else 2
    low, high = (f"{end:.{digits}f}" for end in ends)
    return (
        f"such a difference is not noise, {p_value(stage.p_value)}: it "
        f"{'costs' if loss else 'gains'} {points:.{digits}f} points "
        f"(95 % interval {low} to {high})"
    )
