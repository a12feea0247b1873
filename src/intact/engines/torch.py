"""The torch engine: exact integers computed with fast float kernels, on CPU and GPU.

A float sum of integers is exact, in any order, while every partial sum stays below `2**24` in
float32 or `2**53` in float64. The bound of each layer's actual weights decides which type it needs
(arithmetic.md, section 5); a layer whose bound exceeds `2**24` is computed in float64, which holds
every int32 accumulator. Tensors between ops hold `q - zero_point` as float32: at most 255 in
magnitude, so exact, and padding is plain 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from typing_extensions import assert_never

from intact.arithmetic import QParams, code_range, multiplier_value, quantize
from intact.engines import Arrays, CodesHook, in_slices
from intact.network import around, pad, strided, upsample
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
    Permute,
    Requantize,
    Reshape,
    Slice,
    Subtract,
    Table,
    Upsample,
    accumulates,
    last_uses,
    weighted,
)
from intact.program import Program
from intact.signature import Values

__all__ = ["TorchEngine"]

FLOAT32_EXACT = 2**24
"""Integers up to this magnitude, and their sums below it, are exact in float32."""

SLICE = 256
"""Samples at a time, at most."""
SLICE_ELEMENTS = 2**25
"""Elements of the largest tensor of a slice, about: bounds memory."""


class TorchEngine:
    """Runs a program on float kernels that its bounds prove exact."""

    def __init__(self, program: Program, device: torch.device | str = "cpu") -> None:
        self.program = program
        self.device = torch.device(device)
        self._freed = last_uses(program.ops, program.outputs)
        self._parameters: dict[str, torch.Tensor] = {}
        for op in program.ops:
            if accumulates(op):
                self._prepare(op)
            elif isinstance(op, Table):
                zero_point = program.tensors[op.name].qparams.zero_point
                table = program.parameters[f"{op.name}.table"].astype(np.float32) - zero_point
                self._parameters[f"{op.name}.table"] = torch.from_numpy(table).to(self.device)
        self._pooled = _pool_first(program)
        # A GPU library may pick Winograd or FFT, whose intermediate values are fractions; unfolding
        # leaves sums of products only. On the CPU torch convolves directly.
        self._unfolds = self.device.type != "cpu"
        largest = max(math.prod(tensor.shape) for tensor in program.tensors.values())
        self._slice = max(1, min(SLICE, SLICE_ELEMENTS // largest))

    def accumulator_dtype(self, op: Op) -> torch.dtype:
        """The cheapest float type in which the op's accumulators are proven exact."""
        bound = int(self.program.accumulator_bounds(op).max())
        return torch.float32 if bound <= FLOAT32_EXACT else torch.float64

    def _prepare(self, op: Op) -> None:
        dtype = self.accumulator_dtype(op)
        for kind in ("weight", "bias"):
            array = self.program.parameters.get(f"{op.name}.{kind}")
            if array is not None:
                tensor = torch.from_numpy(array.astype(np.float64)).to(self.device, dtype)
                self._parameters[f"{op.name}.{kind}"] = tensor
        stored = self.program.parameters[f"{op.name}.multiplier"]
        multiplier = multiplier_value(stored, self.program.tensors[op.name].qparams.bits)
        rank = len(self.program.tensors[op.name].shape)
        shape = (-1,) if isinstance(op, Linear) else (-1, *[1] * (rank - 1))
        if not weighted(op):
            shape = (1,)
        tensor = torch.from_numpy(multiplier.copy()).reshape(shape).to(self.device)
        self._parameters[f"{op.name}.multiplier"] = tensor

    def __call__(self, codes: Values, hook: CodesHook | None = None) -> Values:
        """Input codes `[N, *input shape]` to output codes `[N, *output shape]`; see `Engine`.

        hook  called per slice of at most `SLICE` samples
        """
        with _exact_kernels(self.device):
            return in_slices(self.program, codes, self._slice, lambda part: self._run(part, hook))

    def _run(self, codes: Arrays, hook: CodesHook | None) -> Arrays:
        program = self.program
        grid = {name: tensor.qparams for name, tensor in program.tensors.items()}
        values: dict[str, torch.Tensor] = {}
        for name, array in zip(program.inputs, codes, strict=True):
            x = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, torch.float32)
            zero_point = grid[name].zero_point
            values[name] = x - zero_point if zero_point else x
            if hook:
                hook(name, array)
        for op in program.ops:
            result = self._run_op(op, [values[i] for i in op.inputs])
            if accumulates(op) and (hook is not None or op.name not in self._pooled):
                result = self._requantize(op.name, result, grid[op.name])
            if not hook and isinstance(op, MaxPool2d) and op.inputs[0] in self._pooled:
                result = self._requantize(op.inputs[0], result, grid[op.name])
            values[op.name] = result
            if hook:
                hook(op.name, _codes(result, grid[op.name]))
            for tensor in self._freed.get(op.name, ()):
                del values[tensor]
        return tuple(_codes(values[name], grid[name]) for name in program.outputs)

    def _run_op(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        """One op on centred codes; ops that accumulate return their accumulators."""
        x = inputs[0]
        out = self.program.tensors[op.name].qparams
        match op:
            case Conv2d():
                return self._convolve(op, x)
            case Linear():
                weight = self._parameters[f"{op.name}.weight"]
                x = x.to(weight.dtype)
                return F.linear(x, weight, self._parameters.get(f"{op.name}.bias"))
            case AvgPool2d():
                x, padding = pad(x, op.padding, 0.0, op.kernel)
                x = x.to(self.accumulator_dtype(op))
                return F.avg_pool2d(x, op.kernel, op.stride, padding, divisor_override=1)
            case GlobalAvgPool():
                return x.to(self.accumulator_dtype(op)).sum((-2, -1), keepdim=True)
            case Requantize():
                return x.clone()
            case Multiply():
                return x * inputs[1]
            case Add() | Subtract():
                total = x - inputs[1] if isinstance(op, Subtract) else x + inputs[1]
                return total.clamp_(out.qmin - out.zero_point, out.qmax - out.zero_point)
            case Table():
                table = self._parameters[f"{op.name}.table"]
                grid = self.program.tensors[op.inputs[0]].qparams
                lowest = code_range(grid.bits, grid.signed)[0] - grid.zero_point
                entry = (x - lowest).to(torch.int32)
                if len(table) == 1:
                    return table[0][entry]
                row = torch.arange(len(table), device=x.device)
                return table[row.reshape(-1, *[1] * (x.ndim - 2)), entry]
            case Clamp():
                return x.clamp(out.qmin - out.zero_point, out.qmax - out.zero_point)
            case Concat():
                return torch.cat(inputs, dim=op.axis + 1)
            case MaxPool2d():
                x, padding = pad(x, op.padding, -torch.inf, op.kernel)
                return F.max_pool2d(x, op.kernel, op.stride, padding, op.dilation)
            case Reshape():
                return x.reshape(len(x), *op.shape)
            case Permute():
                return x.permute(0, *(a + 1 for a in op.axes))
            case Slice():
                return strided(x, op)
            case Pad():
                code = int(quantize(op.value, out))
                return F.pad(x, around(op), value=float(code - out.zero_point))
            case Upsample():
                return upsample(x, op)
            case _:
                assert_never(op)

    def _convolve(self, op: Conv2d, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters[f"{op.name}.weight"]
        bias = self._parameters.get(f"{op.name}.bias")
        x, padding = pad(x, op.padding, 0.0)
        x = x.to(weight.dtype)
        if not self._unfolds:
            return F.conv2d(x, weight, bias, op.stride, padding, op.dilation, op.groups)
        kernel = (weight.shape[2], weight.shape[3])
        columns = F.unfold(x, kernel, op.dilation, padding, op.stride)
        n, _, positions = columns.shape
        columns = columns.reshape(n, op.groups, -1, positions)
        rows = weight.reshape(op.groups, len(weight) // op.groups, -1)
        acc = (rows @ columns).reshape(n, *self.program.tensors[op.name].shape)
        return acc if bias is None else acc + bias.reshape(-1, 1, 1)

    def _requantize(self, name: str, acc: torch.Tensor, grid: QParams) -> torch.Tensor:
        """Accumulators to centred codes: `clamp(rint(float32(acc) * M))`, in place."""
        scaled = acc.to(torch.float32).mul_(self._parameters[f"{name}.multiplier"])
        return scaled.round_().clamp_(grid.qmin - grid.zero_point, grid.qmax - grid.zero_point)


def _pool_first(program: Program) -> frozenset[str]:
    """Ops whose accumulators are only read by one max pool: the pool can go first.

    Requantization is monotonic (multipliers are positive) and the same for all positions of a
    channel, so the maximum of the codes is the code of the maximum; and less is left to requantize.
    A `Linear` has its channels on the last axis, where a pool may mix them: not that one.
    """
    readers: dict[str, list[Op]] = {}
    for op in program.ops:
        for tensor in op.inputs:
            readers.setdefault(tensor, []).append(op)
    return frozenset(
        op.name
        for op in program.ops
        if accumulates(op)
        and not isinstance(op, Linear)
        and op.name not in program.outputs
        and len(readers.get(op.name, ())) == 1
        and isinstance(readers[op.name][0], MaxPool2d)
        and program.tensors[readers[op.name][0].name].qparams == program.tensors[op.name].qparams
    )


def _codes(centred: torch.Tensor, grid: QParams) -> npt.NDArray[Any]:
    codes = centred + grid.zero_point if grid.zero_point else centred
    dtype = torch.int8 if grid.signed else torch.uint8
    return codes.to(dtype).cpu().numpy()


@contextmanager
def _exact_kernels(device: torch.device) -> Iterator[None]:
    """Switch autocast off: it would return sums as 16-bit floats.

    Reduced precision of the *operands* (TF32, or bfloat16 under
    `torch.set_float32_matmul_precision("medium")`) does no harm: centred codes and weights are
    integers of at most 256 in magnitude, which even bfloat16 holds, and the sums stay float32.
    NNPACK, which torch takes where oneDNN is missing, convolves by Winograd and FFT: never here.
    """
    with (
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
        torch.backends.nnpack.flags(enabled=False),
    ):
        yield
