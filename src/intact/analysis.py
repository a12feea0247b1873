"""What every tensor looks like before and after quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from intact.arithmetic import (
    QParams,
    accumulator_bits,
    code_range,
    dequantize,
    dyadic_shift,
)
from intact.engines.torch import TorchEngine
from intact.errors import DataError
from intact.network import Network
from intact.ops import Op, Reshape, Shape, accumulates, weighted
from intact.program import Program
from intact.recipe import Recipe
from intact.signature import Values, unwrapped, wrapped
from intact.significance import decibels
from intact.sketch import Sketch

__all__ = ["Analysis", "Histogram", "LayerAnalysis", "TensorAnalysis", "analyse"]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in uniform bins of real values: bin `i` of `n` spans `low + (high - low) * i / n` on.

    before   of the float values
    after    of the quantized values, in the same bins; as many as there are float values, though
             of activations fewer may have been looked at
    """

    low: float
    high: float
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TensorAnalysis:
    """One tensor (weights, or activations over the calibration data) and its quantization.

    min … std            of the float values, exact
    three_sigma          mean - 3 std, mean + 3 std
    outlier_fraction     fraction of float values outside of `three_sigma`
    clipped_fraction     fraction of float values that the clamp moved: those more than half a code
                         beyond `range`
    range                the real values of the lowest and the highest code in use
    scale                one value, or one per output channel
    codes                `codes[i]` = how often code `qmin + i` occurs
    code_usage           fraction of the type's 2**bits codes that occur at all
    sqnr_db              of the quantized against the float values; None if nothing was lost. For
                         activations: the program's tensor against the float network's, with all
                         noise of earlier layers
    channel_min, _max    per output channel (weights) or channel (activations)
    """

    shape: Shape
    count: int
    min: float
    max: float
    mean: float
    std: float
    three_sigma: tuple[float, float]
    outlier_fraction: float
    clipped_fraction: float
    range: tuple[float, float]
    type_name: str
    bits: int
    qmin: int
    qmax: int
    zero_point: int
    scale: tuple[float, ...]
    codes: tuple[int, ...]
    code_usage: float
    sqnr_db: float | None
    channel_min: tuple[float, ...]
    channel_max: tuple[float, ...]
    histogram: Histogram


@dataclass(frozen=True, slots=True)
class LayerAnalysis:
    """One op of the program that has codes of its own.

    op                "Conv2d", "Linear", "MaxPool2d", …
    inputs            the layers that it reads, or the program's input; reshapes are skipped
    activation        of the layer's result; `relu` tells whether a clamp at 0 is fused into it
    weight            None for ops without weights
    bias_range        of the float bias, and `bias_codes` of the int32 bias; None without bias
    multiplier        `m` (integers, `M = m / 2**shift`) or, with `shift` None, float32 `M`
    accumulator_bits  width that the accumulator needs, proven from the weights; 0 if it has none
    sqnr_db           that of the activation
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    input_shape: Shape
    output_shape: Shape
    macs: int
    bytes: int
    relu: bool
    weight: TensorAnalysis | None
    activation: TensorAnalysis
    bias_range: tuple[float, float] | None
    bias_codes: tuple[int, int] | None
    multiplier: tuple[float, ...]
    shift: int | None
    accumulator_bits: int
    accumulator_bound: int
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Analysis:
    """The analysis of a program: its inputs, and its layers in the order of execution.

    inputs   name -> the tensor, in the program's order
    outputs  names of the layers whose results are the program's outputs, in their order; of a
             reshape, the layer that it reshapes
    """

    inputs: Mapping[str, TensorAnalysis]
    layers: tuple[LayerAnalysis, ...]
    outputs: tuple[str, ...]


BINS = 96


def analyse(
    network: Network,
    program: Program,
    sketches: Mapping[str, Sketch],
    recipe: Recipe,
    batches: Iterable[Values],
    progress: Callable[[int], object] | None = None,
) -> Analysis:
    """Compare every tensor of a program with the float network's, on calibration data.

    network   the aligned float network that `program` was lowered from
    sketches  tensor -> `Sketch` of the float values, from `calibrate` on the same data
    recipe    that made the program
    batches   float32 [N, ...] each, of several inputs a tuple of these; the data may be less than
              was calibrated on
    progress  called after each batch with the number of samples seen so far
    """
    meters = {name: _Meter(tensor.qparams) for name, tensor in program.tensors.items()}
    engine = TorchEngine(program)
    done = 0
    for batch in batches:
        floats: dict[str, npt.NDArray[np.float32]] = {}

        def keep(
            name: str, x: torch.Tensor, floats: dict[str, npt.NDArray[np.float32]] = floats
        ) -> torch.Tensor:
            floats[name] = x.numpy()
            return x

        with torch.inference_mode():
            network(batch, keep)
        seen = dict.fromkeys(floats, 0)

        def compare(
            name: str,
            codes: npt.NDArray[Any],
            floats: dict[str, npt.NDArray[np.float32]] = floats,
            seen: dict[str, int] = seen,
        ) -> None:
            start = seen[name]  # an engine may take the batch in slices
            seen[name] += len(codes)
            meters[name].add(floats[name][start : seen[name]], codes)

        parts = wrapped(batch, program.inputs)
        engine(program.quantize_input(unwrapped(part.numpy() for part in parts)), compare)
        done += len(parts[0])
        if progress:
            progress(done)
    if not done:
        raise DataError("there is no data to analyse: the batches hold no images.")
    return Analysis(
        {name: _activation(program, name, sketches, meters[name]) for name in program.inputs},
        tuple(
            _layer(network, program, op, sketches, recipe, meters[op.name])
            for op in program.ops
            if not isinstance(op, Reshape)
        ),
        tuple(_behind_reshapes(program, name) for name in program.outputs),
    )


class _Meter:
    """Counts the codes of one tensor, and measures their noise."""

    def __init__(self, qparams: QParams) -> None:
        self.qparams = qparams
        self.low, high = code_range(qparams.bits, qparams.signed)
        self.codes = np.zeros(high - self.low + 1, np.int64)
        self.signal = self.noise = 0.0

    def add(self, floats: npt.NDArray[np.float32], codes: npt.NDArray[Any]) -> None:
        shifted = codes.reshape(-1).astype(np.int64) - self.low
        self.codes += np.bincount(shifted, minlength=len(self.codes))
        real = floats.astype(np.float64)
        self.signal += float(np.square(real).sum())
        self.noise += float(np.square(dequantize(codes, self.qparams) - real).sum())


def _activation(
    program: Program, name: str, sketches: Mapping[str, Sketch], meter: _Meter
) -> TensorAnalysis:
    source = name
    while source not in sketches:  # an inserted Requantize is the identity in float
        source = next(op for op in program.ops if op.name == source).inputs[0]
    sketch, grid = sketches[source], meter.qparams
    low = grid.scale[0] * (grid.qmin - 0.5 - grid.zero_point)
    high = grid.scale[0] * (grid.qmax + 0.5 - grid.zero_point)
    clipped = sketch.fraction_outside(low, high)
    return _tensor(program.tensors[name].shape, sketch, meter, meter.codes[None], clipped)


def _weight(network: Network, program: Program, recipe: Recipe, op: Op) -> TensorAnalysis:
    real = network.parameters[f"{op.name}.weight"].detach().cpu().numpy()
    codes = program.parameters[f"{op.name}.weight"]
    scale = program.parameters[f"{op.name}.weight_scale"]
    bits = recipe.for_weights(op.name).bits
    low, high = code_range(bits, signed=True)
    axis = 0 if len(scale) > 1 else None
    qparams = QParams(tuple(map(float, scale)), 0, low, high, bits, axis=axis)
    meter = _Meter(qparams)
    meter.add(real, codes)
    sketch = Sketch.of(real.reshape(len(real), -1).T)  # each output channel is one of its channels
    rows = codes.reshape(len(scale), -1).astype(np.int64) - low
    per_scale = np.stack([np.bincount(row, minlength=len(meter.codes)) for row in rows])
    steps = real.astype(np.float64) / qparams.per_channel(real.ndim)
    clipped = float(((steps < low - 0.5) | (steps > high + 0.5)).mean())
    return _tensor(real.shape, sketch, meter, per_scale, clipped)


def _tensor(
    shape: Shape,
    sketch: Sketch,
    meter: _Meter,
    per_scale: npt.NDArray[np.int64],
    clipped: float,
) -> TensorAnalysis:
    """per_scale: int64 [scales, codes], how often each code occurs under each scale."""
    qparams = meter.qparams
    scales = np.asarray(qparams.scale, np.float64)
    codes = np.arange(qparams.qmin, qparams.qmax + 1)
    lows = scales * (qparams.qmin - qparams.zero_point)
    highs = scales * (qparams.qmax - qparams.zero_point)
    used = meter.codes[codes - meter.low]
    return TensorAnalysis(
        shape=tuple(shape),
        count=sketch.count,
        min=sketch.min,
        max=sketch.max,
        mean=sketch.mean,
        std=sketch.std,
        three_sigma=sketch.three_sigma,
        outlier_fraction=sketch.fraction_outside(*sketch.three_sigma),
        clipped_fraction=clipped,
        range=(float(lows.min()), float(highs.max())),
        type_name=qparams.type_name,
        bits=qparams.bits,
        qmin=qparams.qmin,
        qmax=qparams.qmax,
        zero_point=qparams.zero_point,
        scale=qparams.scale,
        codes=tuple(used.tolist()),
        code_usage=float((used > 0).sum() / len(meter.codes)),
        sqnr_db=decibels(meter.signal, meter.noise),
        channel_min=tuple(sketch.channel_min.tolist()),
        channel_max=tuple(sketch.channel_max.tolist()),
        histogram=_histogram(sketch, meter, per_scale),
    )


def _histogram(sketch: Sketch, meter: _Meter, per_scale: npt.NDArray[np.int64]) -> Histogram:
    """Float and quantized values in the same bins; each code is spread over its own interval."""
    low, high = sketch.min, sketch.max
    if low == high:  # nothing to see; any width will do
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    below = np.zeros(BINS + 1)
    borders = np.arange(len(meter.codes) + 1) + meter.low - 0.5 - meter.qparams.zero_point
    for scale, counts in zip(meter.qparams.scale, per_scale, strict=True):
        cumulative = np.concatenate([[0], np.cumsum(counts)])
        part = np.interp(edges, scale * borders, cumulative)
        part[0], part[-1] = 0, cumulative[-1]  # the half intervals that reach beyond the ends
        below += part
    before = _levels(sketch, edges)
    if before is None:
        before = sketch.histogram(BINS, low, high)
    after = np.diff(below) * (sketch.count / int(per_scale.sum()))
    return Histogram(low, high, tuple(before.tolist()), tuple(after.tolist()))


def _levels(sketch: Sketch, edges: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """The histogram of values on equally spaced levels, each spread over its own interval.

    Pixels are such values: of 256 levels some bins would get two and some three, and the picture
    would show a comb that is not in the data. None for other data.
    """
    start, end, mass = sketch.density
    steps = np.diff(start)
    if len(start) < BINS // 2 or np.any(end > start) or np.ptp(steps) > 0.01 * steps.mean():
        return None
    borders = np.concatenate([edges[:1], start[:-1] + steps / 2, edges[-1:]])
    below: npt.NDArray[np.float64] = np.interp(edges, borders, np.r_[0.0, np.cumsum(mass)])
    return np.diff(below)


def _behind_reshapes(program: Program, tensor: str) -> str:
    """The tensor whose elements these are: a reshape is no layer of its own."""
    reshapes = {op.name: op.inputs[0] for op in program.ops if isinstance(op, Reshape)}
    while tensor in reshapes:
        tensor = reshapes[tensor]
    return tensor


def _layer(
    network: Network,
    program: Program,
    op: Op,
    sketches: Mapping[str, Sketch],
    recipe: Recipe,
    meter: _Meter,
) -> LayerAnalysis:
    activation = _activation(program, op.name, sketches, meter)
    float_bias = network.parameters.get(f"{op.name}.bias")
    bias = program.parameters.get(f"{op.name}.bias")
    multiplier = program.parameters.get(f"{op.name}.multiplier")
    bound = int(program.accumulator_bounds(op).max()) if accumulates(op) else 0
    dyadic = multiplier is not None and multiplier.dtype != np.float32
    return LayerAnalysis(
        name=op.name,
        op=type(op).__name__,
        inputs=tuple(_behind_reshapes(program, tensor) for tensor in op.inputs),
        input_shape=program.tensors[op.inputs[0]].shape,
        output_shape=program.tensors[op.name].shape,
        macs=program.macs(op),
        bytes=program.op_bytes(op),
        relu=network.tensors[op.name].low == 0,
        weight=_weight(network, program, recipe, op) if weighted(op) else None,
        activation=activation,
        bias_range=(
            None if float_bias is None else (float(float_bias.min()), float(float_bias.max()))
        ),
        bias_codes=None if bias is None else (int(bias.min()), int(bias.max())),
        multiplier=() if multiplier is None else tuple(multiplier.tolist()),
        shift=dyadic_shift(activation.bits) if dyadic else None,
        accumulator_bits=accumulator_bits(bound) if bound else 0,
        accumulator_bound=bound,
        sqnr_db=activation.sqnr_db,
    )
