"""The staged experiment: what every step of quantization costs, and whether that is noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from intact.arithmetic import QParams, accumulator_scale, dequantize, quantize
from intact.calibrate import split
from intact.data.checking import check_labels
from intact.engines.torch import TorchEngine
from intact.errors import DataError
from intact.network import Hook, Network
from intact.ops import weighted
from intact.program import Program
from intact.signature import in_order, unwrapped, wrapped
from intact.significance import decibels, mcnemar_p, paired_interval, percent, wilson_interval

__all__ = [
    "Result",
    "StageResult",
    "Stages",
    "UnlabelledResult",
    "measure",
    "stage_table",
    "unscaled_bias",
]

Logits = npt.NDArray[np.float32]
Inputs: TypeAlias = tuple[torch.Tensor, ...]
Model = Callable[[Inputs], tuple[Logits, ...]]
"""From all inputs to all outputs."""


@dataclass(frozen=True, slots=True)
class StageResult:
    """One stage, measured on a labelled test set, and paired with the float network.

    Of several outputs the first one holds the logits, which all but `sqnr_db` is about.

    name                 "float", "weights", "activations", "bias-unscaled", "integer"
    correct, total       images
    accuracy             correct / total
    interval             95 % Wilson interval of the accuracy
    flips_to_wrong       images that float had right and this stage has wrong
    flips_to_right       images that float had wrong and this stage has right
    p_value              exact two-sided McNemar test of the flips; 1.0 for float itself
    difference           accuracy minus float's
    difference_interval  95 % interval of the paired difference
    agreement            fraction of images with the prediction of float, right or wrong
    sqnr_db              signal-to-quantization-noise ratio of the logits against float's, in dB;
                         None where they are equal (float itself). Of several outputs the lowest;
                         `Stages.sqnr_db` has all
    """

    name: str
    correct: int
    total: int
    accuracy: float
    interval: tuple[float, float]
    flips_to_wrong: int
    flips_to_right: int
    p_value: float
    difference: float
    difference_interval: tuple[float, float]
    agreement: float
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class UnlabelledResult:
    """One stage, measured on a test set without labels: only against the float network.

    name         as in `StageResult`
    same, total  samples with the prediction of float; all samples
    agreement    same / total
    interval     95 % Wilson interval of the agreement
    sqnr_db      as in `StageResult`
    """

    name: str
    same: int
    total: int
    agreement: float
    interval: tuple[float, float]
    sqnr_db: float | None


Result: TypeAlias = StageResult | UnlabelledResult
"""All stages of a run are of one of the two."""


@dataclass(frozen=True, eq=False)
class Stages:
    """All stages of one program on one test set.

    results      in order: float, weights, activations, bias-unscaled (where there is a bias),
                 integer; with labels `StageResult`, without `UnlabelledResult`
    predictions  stage -> int64 [images], the class with the largest logit of the first output; the
                 first of equals
    sqnr_db      stage -> output -> as in `StageResult`, of this output alone
    labels       int64 [images]; None for a test set without
    program      what the last stage ran
    """

    results: tuple[Result, ...]
    predictions: Mapping[str, npt.NDArray[np.int64]]
    sqnr_db: Mapping[str, Mapping[str, float | None]]
    labels: npt.NDArray[np.int64] | None
    program: Program

    def __getitem__(self, name: str) -> Result:
        return {r.name: r for r in self.results}[name]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __str__(self) -> str:
        return stage_table(self.results)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        head, *body = stage_rows(self.results)
        rows = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in body)
        return f"<table><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr>{rows}</table>"


def stage_rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """The table of stages as text, a tuple per row; the first one is the heading."""
    results = list(results)
    heading: tuple[str, ...] = ("stage", "as in float", "95 % interval", "other", "SQNR")
    if all(isinstance(r, StageResult) for r in results):
        heading = ("stage", "accuracy", "95 % interval", "to wrong", "to right", "p", "SQNR")
    return [
        heading,
        *(_labelled_row(r) if isinstance(r, StageResult) else _unlabelled_row(r) for r in results),
    ]


def _labelled_row(r: StageResult) -> tuple[str, ...]:
    low, high = r.interval
    p = f"{r.p_value:.2g}" if r.p_value else "<1e-300"
    compared = (str(r.flips_to_wrong), str(r.flips_to_right), p)
    return (
        r.name,
        percent(r.accuracy, r.total),
        f"{100 * low:.1f}–{100 * high:.1f} %",
        *(("", "", "") if r.name == "float" else compared),
        _sqnr(r),
    )


def _unlabelled_row(r: UnlabelledResult) -> tuple[str, ...]:
    low, high = r.interval
    compared = (
        percent(r.agreement, r.total),
        f"{100 * low:.1f}–{100 * high:.1f} %",
        str(r.total - r.same),
    )
    return (r.name, *(("", "", "") if r.name == "float" else compared), _sqnr(r))


def _sqnr(r: Result) -> str:
    return "" if r.sqnr_db is None else f"{round(r.sqnr_db, 1) + 0.0:.1f} dB"


def stage_table(results: Iterable[Result]) -> str:
    """The table of stages in plain text, 80 columns wide at most."""
    rows = stage_rows(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def measure(
    network: Network,
    program: Program,
    batches: Iterable[Any],
    progress: Callable[[int], object] | None = None,
    *,
    corrected: Network | None = None,
) -> Stages:
    """Run every stage on a test set, in one pass.

    network   the aligned float network that the program stands for
    batches   of `(float32 [N, ...], integer labels [N])`, tensors or arrays; in all of them, None
              for labels that are not known. For several inputs see `calibrate.split`
    progress  called after each batch with the number of images seen so far
    corrected the network with the biases that were lowered, where they are not its own; the stages
              from the activations on have them
    """
    models = _models(network, program, corrected or network)
    noise = {name: np.zeros(len(program.outputs)) for name in models}
    signal = np.zeros(len(program.outputs))
    predicted: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in models}
    labels: list[npt.NDArray[np.int64]] = []
    seen = 0
    for batch in batches:
        x, y = _pair(batch, network.inputs)
        if not len(x[0]):
            continue
        outputs = {name: model(x) for name, model in models.items()}
        reference = [output.astype(np.float64) for output in outputs["float"]]
        if y is not None:
            check_labels(y, reference[0][0].size, "the test data")
            labels.append(y)
        signal += [np.square(output).sum() for output in reference]
        for name, made in outputs.items():
            logits = made[0].reshape(len(x[0]), -1)
            predicted[name].append(logits.argmax(axis=1).astype(np.int64))
            pairs = zip(made, reference, strict=True)
            noise[name] += [np.square(output - right).sum() for output, right in pairs]
        seen += len(x[0])
        if progress:
            progress(seen)
    if not seen:
        raise DataError("there is no test data: the batches hold no images.")
    truth = np.concatenate(labels) if labels else None
    if truth is not None and len(truth) < seen:
        raise DataError(
            f"only {len(truth):,} of {seen:,} samples came with labels: give all of them, or none."
        )
    predictions = {name: np.concatenate(parts) for name, parts in predicted.items()}
    ratios = {
        name: {
            output: decibels(float(signal[i]), float(noise[name][i]))
            for i, output in enumerate(program.outputs)
        }
        for name in models
    }
    results = tuple(
        _result(name, predictions[name], predictions["float"], truth, _lowest(ratios[name]))
        for name in models
    )
    return Stages(results, predictions, ratios, truth, program)


def _lowest(ratios: Mapping[str, float | None]) -> float | None:
    """The lowest ratio; None where no output has any noise."""
    return min((ratio for ratio in ratios.values() if ratio is not None), default=None)


def unscaled_bias(network: Network, program: Program) -> Network:
    """The classical mistake: biases left in real units.

    A bias belongs into an accumulator, in units of `scale_x * scale_w[o]`. One that is added there
    as it is counts for `bias * scale_x * scale_w[o]`, and is as good as lost. The network returned
    has these biases.
    """
    biases = {}
    for op in network.ops:
        name = f"{op.name}.bias"
        if name in network.parameters:
            scale = program.tensors[op.inputs[0]].qparams.scale[0]
            unit = accumulator_scale(scale, program.parameters[f"{op.name}.weight_scale"])
            biases[name] = network.parameters[name] * torch.from_numpy(unit)
    return network.with_parameters(biases)


def fake_quantize(x: torch.Tensor, qparams: QParams, name: str) -> torch.Tensor:
    """Float to float, through the codes: what the float network sees of a quantized tensor."""
    codes = quantize(x.detach().cpu().numpy(), qparams, name)
    return torch.from_numpy(dequantize(codes, qparams)).to(x)


def fake_weights(network: Network, program: Program) -> Network:
    """The float network with the real values of the program's weight codes; biases stay float."""
    weights = {}
    for op in network.ops:
        if weighted(op):
            codes = program.parameters[f"{op.name}.weight"]
            scale = program.parameters[f"{op.name}.weight_scale"]
            shaped = scale.reshape(-1, *[1] * (codes.ndim - 1))
            weights[f"{op.name}.weight"] = torch.from_numpy(codes * shaped)
    return network.with_parameters(weights)


def _models(network: Network, program: Program, corrected: Network) -> dict[str, Model]:
    """Stage name -> float32 batch to float32 logits."""
    weights = fake_weights(network, program)
    lowered = fake_weights(corrected, program)
    # In float64, for the codes that exact sums give: in float32, the sums of LeNet on CIFAR-10
    # moved a logit of 35 images in 10,000 by a code, and the prediction of one.
    precise = replace(lowered, parameters={n: p.double() for n, p in lowered.parameters.items()})

    def hook(name: str, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, program.tensors[name].qparams, name)

    def floating(
        network: Network, dtype: torch.dtype = torch.float32, hook: Hook | None = None
    ) -> Model:
        def run(x: Inputs) -> tuple[Logits, ...]:
            with torch.inference_mode():
                results = network(unwrapped(part.to(dtype) for part in x), hook)
                results = wrapped(results, network.outputs)
                return tuple(result.to(torch.float32).numpy() for result in results)

        return run

    engine = TorchEngine(program)

    def integer(x: Inputs) -> tuple[Logits, ...]:
        codes = engine(program.quantize_input(unwrapped(part.numpy() for part in x)))
        return wrapped(program.dequantize_output(codes), program.outputs)

    models: dict[str, Model] = {
        "float": floating(network),
        "weights": floating(weights),
        "activations": floating(precise, torch.float64, hook),
    }
    if any(name.endswith(".bias") for name in program.parameters):
        unscaled = unscaled_bias(precise, program)
        models["bias-unscaled"] = floating(unscaled, torch.float64, hook)
    models["integer"] = integer
    return models


def _pair(batch: Any, names: Sequence[str]) -> tuple[Inputs, npt.NDArray[np.int64] | None]:
    if len(names) == 1 and not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise DataError(
            "a test batch is a pair (inputs, labels), or (inputs, None) if they have none."
        )
    given, labels = split(batch, len(names))
    x = tuple(map(torch.as_tensor, in_order(given, names, "network", DataError)))
    for part in x:
        if not part.dtype.is_floating_point:
            raise DataError(f"test inputs are {part.dtype}; the stages start from float32 values.")
    x = tuple(part.to(torch.float32) for part in x)
    if labels is None:
        return x, None
    y = np.asarray(labels)
    if y.shape != (len(x[0]),) or y.dtype.kind not in "iu":
        raise DataError(
            f"labels must be integers, one per sample: {len(x[0])} samples came with labels of "
            f"shape {list(y.shape)}, {y.dtype}."
        )
    return x, y.astype(np.int64)


def _result(
    name: str,
    predicted: npt.NDArray[np.int64],
    reference: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64] | None,
    sqnr_db: float | None,
) -> Result:
    if labels is None:
        same, total = int((predicted == reference).sum()), len(predicted)
        interval = wilson_interval(same, total)
        return UnlabelledResult(name, same, total, same / total, interval, sqnr_db)
    right, float_right = predicted == labels, reference == labels
    correct, total = int(right.sum()), len(labels)
    to_wrong = int((float_right & ~right).sum())
    to_right = int((~float_right & right).sum())
    neither = int((~float_right & ~right).sum())
    return StageResult(
        name=name,
        correct=correct,
        total=total,
        accuracy=correct / total,
        interval=wilson_interval(correct, total),
        flips_to_wrong=to_wrong,
        flips_to_right=to_right,
        p_value=mcnemar_p(to_wrong, to_right),
        difference=(to_right - to_wrong) / total,
        difference_interval=(
            (0.0, 0.0)
            if name == "float"
            else paired_interval(correct - to_right, to_wrong, to_right, neither)
        ),
        agreement=float((predicted == reference).mean()),
        sqnr_db=sqnr_db,
    )
