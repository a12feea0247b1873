"""`Report` <-> JSON text, strictly and exactly: `results.json`."""

from __future__ import annotations

from typing import cast

from intact.analysis import TensorAnalysis
from intact.errors import StorageError
from intact.report.value import Report
from intact.strict_json import parse_document, plain, read_value, write_document

__all__ = ["FORMAT", "report_from_json", "report_to_json"]

FORMAT = 2
"""Version of the layout of `results.json`. Raised when a reader of the old one would be misled."""


def report_to_json(report: Report) -> str:
    """The report as JSON text: UTF-8 safe, keys in the order of the dataclasses, no NaN.

    Floats are written with the digits that read back to the same bits, so that
    `report_from_json(report_to_json(report)) == report`. Raises `StorageError` for a value that
    JSON cannot hold, and says where it is.
    """
    return write_document({"format": FORMAT, **plain(report, "report")})


def report_from_json(text: str) -> Report:
    """Read what `report_to_json` wrote; anything else is a `StorageError` that says where."""
    document = parse_document(text, "results.json", FORMAT, "Run the experiment again")
    report = cast("Report", read_value(document, Report, "report"))
    _check(report)
    return report


def _check(report: Report) -> None:
    """Rules that types cannot say, and that a page of the report relies on."""
    if not report.stages or any(s.total < 1 for s in report.stages):
        raise StorageError("report.stages must name at least one stage, with at least one image.")
    if len({type(stage) for stage in report.stages}) > 1:
        raise StorageError("report.stages has stages with accuracies, and stages without.")
    if not report.inputs:
        raise StorageError("report.inputs must name at least one input.")
    tensors = {f"report.inputs.{name}": tensor for name, tensor in report.inputs.items()}
    for i, layer in enumerate(report.layers):
        tensors[f"report.layers[{i}].activation"] = layer.activation
        if layer.weight is not None:
            tensors[f"report.layers[{i}].weight"] = layer.weight
    for where, tensor in tensors.items():
        if problem := _tensor_problem(tensor):
            raise StorageError(f"{where}: {problem}.")


def _tensor_problem(tensor: TensorAnalysis) -> str:
    histogram = tensor.histogram
    if not 1 <= tensor.bits <= 8:  # arithmetic.md, section 1
        return f"bits is {tensor.bits}, not 1 to 8"
    if len(tensor.codes) != tensor.qmax - tensor.qmin + 1:
        return "codes does not have one count per code from qmin to qmax"
    if not histogram.before or len(histogram.before) != len(histogram.after):
        return "the histogram must have as many counts after as before, and at least one"
    if min(*histogram.before, *histogram.after, *tensor.codes) < 0:
        return "a count is negative"
    if histogram.low > histogram.high:
        return "the histogram ends before it begins"
    reals = (*tensor.range, *tensor.three_sigma, *tensor.scale, histogram.low, histogram.high)
    reals = (*reals, tensor.min, tensor.max, *tensor.channel_min, *tensor.channel_max)
    if max(map(abs, reals)) > 1e39:
        return "a value is beyond what float32 can hold"
    if len(tensor.channel_min) != len(tensor.channel_max) or not tensor.scale:
        return "channel_min, channel_max and scale do not fit each other"
    return ""
