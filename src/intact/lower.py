"""Network + grids + recipe -> Program: integer weights, int32 biases, multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.arithmetic import (
    Grid,
    QParams,
    accumulator_scale,
    code_range,
    dequantize,
    grid_neighbours,
    multiplier_value,
    quantize,
)
from intact.errors import IntactError
from intact.network import Network
from intact.ops import (
    AvgPool2d,
    GlobalAvgPool,
    Multiply,
    Op,
    Shape,
    Table,
    has_own_grid,
    pool_size,
    weighted,
)
from intact.pointwise import Pointwise
from intact.program import Program, QTensor
from intact.ranges import row_limits
from intact.recipe import Recipe, WeightRecipe

__all__ = ["lower", "quantize_bias", "quantize_weight"]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

BIAS_LIMIT = 2**30
"""Bias codes stay below this, so that half of int32 is left for the products."""


def lower(
    network: Network,
    qparams: Mapping[str, QParams],
    recipe: Recipe,
    info: Mapping[str, str] | None = None,
) -> Program:
    """The integer program of an aligned network, op by op.

    network  as `choose.align` returns it
    qparams  tensor -> grid, from `choose.choose_qparams`
    info     free text that the program carries
    """
    parameters: dict[str, Array] = {}
    for op in network.ops:
        if not has_own_grid(op):
            continue
        try:
            parameters |= _lower_op(network, qparams, recipe, op)
        except IntactError as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"while lowering {op.name!r} ({type(op).__name__})")
            raise
    tensors = {name: QTensor(network.tensors[name].shape, qparams[name]) for name in qparams}
    return Program(
        network.inputs, network.outputs, network.ops, tensors, parameters, dict(info or {})
    )


def _lower_op(
    network: Network, qparams: Mapping[str, QParams], recipe: Recipe, op: Op
) -> dict[str, Array]:
    source, result = qparams[op.inputs[0]], qparams[op.name]
    if isinstance(op, Table):
        function, shape = network.functions[op.name], network.tensors[op.name].shape
        return {f"{op.name}.table": quantize_function(function, source, result, shape)}
    ratio = source.scale[0] / result.scale[0]  # float64
    if not weighted(op):
        if isinstance(op, AvgPool2d | GlobalAvgPool):
            ratio /= pool_size(op, network.tensors[op.inputs[0]].shape)
        if isinstance(op, Multiply):
            ratio *= qparams[op.inputs[1]].scale[0]
        return {f"{op.name}.multiplier": _nearest(ratio, recipe.grid, result.bits)}
    weight = network.parameters[f"{op.name}.weight"].detach().cpu().numpy()
    tensor = network.parameters.get(f"{op.name}.bias")
    bias = None if tensor is None else tensor.detach().cpu().numpy()
    codes, scale, multiplier = quantize_weight(
        weight, bias, ratio, source.scale[0], result.bits, recipe.for_weights(op.name), recipe.grid
    )
    parameters: dict[str, Array] = {
        f"{op.name}.weight": codes,
        f"{op.name}.weight_scale": scale,
        f"{op.name}.multiplier": multiplier,
    }
    if bias is not None:
        parameters[f"{op.name}.bias"] = quantize_bias(bias, source.scale[0], scale)
    return parameters


def quantize_weight(
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None,
    ratio: float,
    input_scale: float,
    bits: int,
    spec: WeightRecipe,
    grid: Grid,
) -> tuple[Array, npt.NDArray[np.float32], Array]:
    """Weights to codes, on scales that put the multiplier on its grid.

    weight       float32 [O, ...]
    bias         float32 [O] or None; only limits how small a scale may be
    ratio        scale_x / scale_y
    input_scale  scale_x
    bits         width of the result's codes, which sets the shift of the grid
    returns      codes int8 [O, ...], weight scales float32 [1 or O], multipliers [1 or O]

    The multiplier is chosen first: of the two on the grid next to `scale_x * scale_w / scale_y`,
    the one with the smaller squared weight error. The weights are then quantized with the scale
    that it implies, so the grid costs no accuracy. arithmetic.md, section 3.
    """
    wanted = _weight_scales(weight, spec)
    if not weight.any():  # nothing but a bias: its steps shall be much finer than the result's
        wanted = np.full_like(wanted, 2.0**-8 / ratio)
    if bias is not None:
        magnitude = np.abs(bias.astype(np.float64))
        wanted = np.maximum(
            wanted, (magnitude if spec.per_channel else magnitude.max()) / input_scale / BIAS_LIMIT
        )
    below, above = grid_neighbours(wanted * ratio, grid, bits)
    candidates = []
    for multiplier in (below, above):
        if grid == "float":
            scale = wanted.astype(np.float32)
        else:
            value = multiplier_value(multiplier, bits).astype(np.float64)
            scale = (value / ratio).astype(np.float32)
        candidates.append(_quantized(weight, scale, multiplier, spec))
    (codes, scale, multiplier, error), (codes_2, scale_2, multiplier_2, error_2) = candidates
    if not spec.per_channel:
        error, error_2 = error.sum(keepdims=True), error_2.sum(keepdims=True)
    better = error_2 < error
    rows = np.broadcast_to(better, len(weight)).reshape(-1, *[1] * (weight.ndim - 1))
    return (
        np.where(rows, codes_2, codes),
        np.where(better, scale_2, scale),
        np.where(better, multiplier_2, multiplier),
    )


def quantize_function(function: Pointwise, source: QParams, result: QParams, shape: Shape) -> Array:
    """A function as a table of codes, int8 or uint8 `[1 or C, 2**bits]`.

    source, result  the grids of what goes in and comes out
    shape           of a sample; axis 0 holds the channels of a function that differs by channel

    Row by row the results for all codes of the input's type, the lowest first; codes outside of
    its range have the entry of the nearest one inside. Computed in float64 (arithmetic.md, section
    4). A function without a value at some code raises `IntactError` that names the input.
    """
    low, high = code_range(source.bits, source.signed)
    used = np.clip(np.arange(low, high + 1), source.qmin, source.qmax)
    real = source.scale[0] * (used - source.zero_point).astype(np.float64)
    value = function.tabulate(real, shape)
    if np.isnan(value).any():
        at = real[np.argwhere(np.isnan(value))[0][1]]
        raise IntactError(
            f"{function.label} is not a number at {at:.6g}, which its input can be. Clamp the "
            "input to where the function has values."
        )
    with np.errstate(over="ignore"):  # an infinity saturates
        codes = np.rint(value / result.scale[0])
    codes = np.clip(codes, result.qmin - result.zero_point, result.qmax - result.zero_point)
    return np.asarray(codes + result.zero_point, result.dtype)


def quantize_bias(
    bias: npt.NDArray[np.float32], input_scale: float, weight_scale: npt.NDArray[np.float32]
) -> npt.NDArray[np.int32]:
    """Biases in units of the accumulator: `rint(bias / (scale_x * scale_w[o]))`, int32 [O].

    The quotient is float64 and saturates at the ends of int32. arithmetic.md, section 2.
    """
    codes = np.rint(bias.astype(np.float64) / accumulator_scale(input_scale, weight_scale))
    clipped: npt.NDArray[np.int32] = np.clip(codes, -(2**31), 2**31 - 1).astype(np.int32)
    return clipped


def _weight_scales(weight: npt.NDArray[np.float32], spec: WeightRecipe) -> Float64:
    """The scale that each channel (or the tensor) would like to have, float64 [1 or O]."""
    qmin, qmax = code_range(spec.bits, signed=True)
    rows = weight.reshape(len(weight) if spec.per_channel else 1, -1)
    scales = row_limits(rows, spec.range, spec.bits)
    scales /= -qmin if spec.scheme == "textbook" else qmax
    # A channel of zeros can have any scale: that of the coarsest channel puts it on the same grid.
    scales[scales == 0] = scales.max() or 1.0
    return scales


def _quantized(
    weight: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    multiplier: Array,
    spec: WeightRecipe,
) -> tuple[Array, npt.NDArray[np.float32], Array, Float64]:
    qmin, qmax = code_range(spec.bits, signed=True)
    axis = 0 if spec.per_channel else None
    qparams = QParams(tuple(map(float, scale)), 0, qmin, qmax, spec.bits, axis=axis)
    codes = quantize(weight, qparams)
    error = (weight.astype(np.float64) - dequantize(codes, qparams)) ** 2
    return codes, scale, multiplier, error.reshape(len(weight), -1).sum(axis=1)


def _nearest(ratio: float, grid: Grid, bits: int) -> Array:
    """The multiplier of the grid that is nearest to a ratio, shape [1]."""
    below, above = grid_neighbours(np.array([ratio]), grid, bits)
    distance = [abs(float(multiplier_value(m, bits)[0]) - ratio) for m in (below, above)]
    return below if distance[0] <= distance[1] else above
