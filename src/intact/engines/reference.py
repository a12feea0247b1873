"""The reference engine: NumPy, integers only, the definition of every op.

Each op is a few lines of `docs/arithmetic.md`. Short before fast: sums are int64, in which nothing
that a valid program can do overflows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from typing_extensions import assert_never

from intact.arithmetic import code_range, quantize, requantize
from intact.engines import Arrays, CodesHook, in_slices
from intact.ops import (
    Add,
    AvgPool2d,
    Clamp,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Multiply,
    Op,
    Pad,
    Padding,
    Pair,
    Permute,
    Requantize,
    Reshape,
    Slice,
    Subtract,
    Table,
    Upsample,
    last_uses,
)
from intact.program import Program
from intact.signature import Values

__all__ = ["ReferenceEngine"]

Array = npt.NDArray[Any]

SLICE_ELEMENTS = 2**22
"""Elements of the largest tensor of a slice of the batch, about: bounds memory."""


class ReferenceEngine:
    """Runs a program in NumPy, op by op, on codes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._freed = last_uses(program.ops, program.outputs)
        largest = max(math.prod(tensor.shape) for tensor in program.tensors.values())
        self._slice = max(1, SLICE_ELEMENTS // largest)

    def __call__(self, codes: Values, hook: CodesHook | None = None) -> Values:
        """Input codes `[N, *input shape]` to output codes `[N, *output shape]`; see `Engine`.

        hook  called per slice of the batch
        """
        return in_slices(self.program, codes, self._slice, lambda part: self._run(part, hook))

    def _run(self, codes: Arrays, hook: CodesHook | None) -> Arrays:
        values = dict(zip(self.program.inputs, codes, strict=True))
        if hook:
            for name in self.program.inputs:
                hook(name, values[name])
        for op in self.program.ops:
            values[op.name] = run_op(self.program, op, [values[i] for i in op.inputs])
            if hook:
                hook(op.name, values[op.name])
            for tensor in self._freed.get(op.name, ()):
                del values[tensor]
        return tuple(values[name] for name in self.program.outputs)


def run_op(program: Program, op: Op, inputs: list[Array]) -> Array:
    """One op: codes `[N, ...]` in, codes `[N, ...]` out.  arithmetic.md, sections 2 to 4."""
    out = program.tensors[op.name].qparams
    zeros = [program.tensors[i].qparams.zero_point for i in op.inputs]
    q = inputs[0]
    match op:
        case Conv2d():
            weight = program.parameters[f"{op.name}.weight"]
            x = pad(q.astype(np.int64) - zeros[0], op.padding, 0)
            return _finish(program, op, convolve(x, weight, op.stride, op.dilation, op.groups), 1)
        case Linear():
            weight = program.parameters[f"{op.name}.weight"]
            x = q.astype(np.int64) - zeros[0]
            return _finish(program, op, x @ weight.astype(np.int64).T, -1)
        case AvgPool2d():
            x = pad(q.astype(np.int64) - zeros[0], op.padding, 0)
            return _finish(program, op, windows(x, op.kernel, op.stride, (1, 1)).sum((-2, -1)), 1)
        case GlobalAvgPool():
            x = q.astype(np.int64) - zeros[0]
            return _finish(program, op, x.sum((-2, -1), keepdims=True), 1)
        case Requantize():
            return _finish(program, op, q.astype(np.int64) - zeros[0], 1)
        case Multiply():
            acc = (q.astype(np.int64) - zeros[0]) * (inputs[1].astype(np.int64) - zeros[1])
            return _finish(program, op, acc, 1)
        case Add() | Subtract():
            sign = -1 if isinstance(op, Subtract) else 1
            acc = (q.astype(np.int64) - zeros[0]) + sign * (inputs[1].astype(np.int64) - zeros[1])
            summed: Array = np.clip(acc + out.zero_point, out.qmin, out.qmax).astype(out.dtype)
            return summed
        case Table():
            table = program.parameters[f"{op.name}.table"]
            grid = program.tensors[op.inputs[0]].qparams
            entry = q.astype(np.int64) - code_range(grid.bits, grid.signed)[0]
            row = np.arange(q.shape[1]).reshape(-1, *[1] * (q.ndim - 2)) if len(table) > 1 else 0
            return np.asarray(table[row, entry])
        case Clamp():
            return np.clip(q, out.qmin, out.qmax)
        case Concat():
            return np.concatenate(inputs, axis=op.axis + 1)
        case MaxPool2d():
            x = pad(q, op.padding, np.iinfo(q.dtype).min)
            largest: Array = windows(x, op.kernel, op.stride, op.dilation).max((-2, -1))
            return largest
        case Reshape():
            return q.reshape(len(q), *op.shape)
        case Permute():
            return np.transpose(q, (0, *(a + 1 for a in op.axes)))
        case Slice():
            return q[(slice(None),) * (op.axis + 1) + (slice(op.start, op.stop, op.step),)]
        case Pad():
            widths = [(0, 0), *zip(op.padding[::2], op.padding[1::2], strict=True)]
            return np.pad(q, widths, constant_values=quantize(op.value, out))
        case Upsample():
            for axis, factor in enumerate(op.factors, 1):
                q = np.repeat(q, factor, axis)
            return q
        case _:
            assert_never(op)


def _finish(program: Program, op: Op, acc: Array, axis: int) -> Array:
    """Add the bias and requantize; `axis` of the accumulators is that of the output channels."""
    shape = [1] * acc.ndim
    shape[axis] = -1
    bias = program.parameters.get(f"{op.name}.bias")
    if bias is not None:
        acc = acc + bias.astype(np.int64).reshape(shape)
    multiplier = program.parameters[f"{op.name}.multiplier"].reshape(shape)
    return requantize(acc, multiplier, program.tensors[op.name].qparams)


def pad(x: Array, padding: Padding, value: int) -> Array:
    """Pad height and width of `[N, C, H, W]` with a constant."""
    top, bottom, left, right = padding
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value)


def windows(x: Array, kernel: Pair, stride: Pair, dilation: Pair) -> Array:
    """All windows over `[N, C, H, W]`: a view of shape `[N, C, H', W', kh, kw]`."""
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    view = sliding_window_view(x, reach, axis=(2, 3))
    (sh, sw), (dh, dw) = stride, dilation
    return np.asarray(view[:, :, ::sh, ::sw, ::dh, ::dw])


def convolve(x: Array, weight: Array, stride: Pair, dilation: Pair, groups: int) -> Array:
    """Cross-correlation of integers: `[N, C, H, W]`, `[O, C / g, kh, kw]` -> `[N, O, H', W']`.

    Summed position by position of the kernel, so that no patches need to be laid out.
    """
    out_channels, in_channels, kh, kw = weight.shape
    taps = windows(x, (kh, kw), stride, dilation)
    n, _, height, width = taps.shape[:4]
    kernel = weight.astype(np.int64).reshape(groups, out_channels // groups, in_channels, kh, kw)
    acc = np.zeros((n, groups, out_channels // groups, height * width), np.int64)
    for i, j in np.ndindex(kh, kw):
        tap = taps[..., i, j].reshape(n, groups, in_channels, height * width)
        acc += kernel[..., i, j] @ tap  # [g, O / g, C / g] times [N, g, C / g, H'W']
    return acc.reshape(n, out_channels, height, width)
