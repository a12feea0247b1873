"""The float network: typed ops in topological order, and the one interpreter that runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from typing_extensions import assert_never

from intact.errors import IntactError
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
    Shape,
    Slice,
    Subtract,
    Table,
    Upsample,
    last_uses,
    output_shape,
    weighted,
)
from intact.pointwise import Pointwise
from intact.signature import Values, in_order, signature_error, the_only, unwrapped

__all__ = ["Hook", "Network", "TensorSpec", "around", "pad", "strided", "upsample"]

Hook = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a float network: the shape of one sample, and the clamp fused into it.

    `low = 0` is a ReLU; `low = 0, high = 6` a ReLU6; the defaults are no clamp at all. `pixels`
    says of an input that it holds 8-bit pixels, whole numbers from 0 to 255.
    """

    shape: Shape
    low: float = -math.inf
    high: float = math.inf
    pixels: bool = False


@dataclass(frozen=True, eq=False)
class Network:
    """A float network, captured: batch norm folded, dropout gone, activations fused.

    inputs      names of the input tensors, in the order in which they are given; each is read by
                some op
    outputs     names of the output tensors, in the order in which a result has them: results of
                ops, each once
    ops         in topological order; an op's result carries its name
    tensors     every input's and every op's name -> `TensorSpec`
    parameters  `<op>.weight` and, where there is one, `<op>.bias` -> float32
    sources     op -> the user's source line, for messages
    functions   every `Table` -> what it computes
    returned    output -> where it stands in what the captured module returns, as `['boxes'][0]`;
                empty where that is one tensor

    `network(x)` runs it in torch, differentiably, on whatever device the parameters are.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    tensors: Mapping[str, TensorSpec]
    parameters: Mapping[str, torch.Tensor]
    sources: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Pointwise] = field(default_factory=dict)
    returned: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tensors", "parameters", "sources", "functions", "returned"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        known = set(self.inputs)
        for op in self.ops:
            for tensor in op.inputs:
                if tensor not in known:
                    raise IntactError(f"op {op.name!r} reads {tensor!r} before it is computed.")
            if op.name in known or op.name not in self.tensors:
                raise IntactError(f"op {op.name!r} is defined twice or has no TensorSpec.")
            known.add(op.name)
            weight = self.parameters.get(f"{op.name}.weight")
            if weighted(op) and weight is None:
                raise IntactError(f"op {op.name!r} has no weight.")
            if isinstance(op, Table) and op.name not in self.functions:
                raise IntactError(f"op {op.name!r} has no function.")
            shapes = [self.tensors[i].shape for i in op.inputs]
            shape = output_shape(op, shapes, None if weight is None else tuple(weight.shape))
            if shape != self.tensors[op.name].shape:
                raise IntactError(
                    f"op {op.name!r} yields {list(shape)}, but its TensorSpec says "
                    f"{list(self.tensors[op.name].shape)}."
                )
        if wrong := signature_error(self.inputs, self.outputs, self.ops):
            raise IntactError(f"{wrong}.")

    @property
    def input(self) -> str:
        """Name of the only input; `IntactError` where there are several."""
        return the_only("input", self.inputs, "network", IntactError)

    @property
    def output(self) -> str:
        """Name of the only output; `IntactError` where there are several."""
        return the_only("output", self.outputs, "network", IntactError)

    def __call__(self, x: Values, hook: Hook | None = None) -> Values:
        """Run a batch: `[N, *input shape]` float32 -> `[N, *output shape]` float32.

        x     of several inputs, a tuple in the order of `inputs` or a mapping from their names
        hook  called as `hook(name, tensor)` for every input and every op's result, fused clamp
              applied; what it returns takes the tensor's place. Calibration looks and returns the
              tensor, fake quantization returns another.

        Returns a tuple in the order of `outputs` where there are several.
        """
        see = hook or (lambda _, tensor: tensor)
        freed = last_uses(self.ops, self.outputs)
        given = in_order(x, self.inputs, "network", IntactError)
        for name, tensor in zip(self.inputs, given, strict=True):
            shape = self.tensors[name].shape
            if tuple(tensor.shape[1:]) != shape:
                which = "" if len(self.inputs) == 1 else f" of {name!r}"
                raise IntactError(
                    f"the network takes batches{which} of shape [N, "
                    f"{', '.join(map(str, shape))}], not {list(tensor.shape)}."
                )
        values = {n: see(n, tensor) for n, tensor in zip(self.inputs, given, strict=True)}
        for op in self.ops:
            result = self._run(op, [values[i] for i in op.inputs])
            out = self.tensors[op.name]
            if out.low == 0 and out.high == math.inf:
                # In place where the result is a tensor of its own: no room for a second one.
                result = result.relu_() if isinstance(op, Conv2d | Linear | Add) else result.relu()
            elif out.low != -math.inf or out.high != math.inf:
                result = torch.clamp(result, out.low, out.high)
            values[op.name] = see(op.name, result)
            for tensor in freed.get(op.name, ()):
                del values[tensor]
        return unwrapped(values[name] for name in self.outputs)

    def run_op(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The result of one op on batches, before its fused clamp."""
        return self._run(op, inputs)

    def _run(self, op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
        x = inputs[0]
        match op:
            case Conv2d():
                weight = self.parameters[f"{op.name}.weight"]
                bias = self.parameters.get(f"{op.name}.bias")
                x, padding = pad(x, op.padding, 0.0)
                return F.conv2d(x, weight, bias, op.stride, padding, op.dilation, op.groups)
            case Linear():
                weight = self.parameters[f"{op.name}.weight"]
                return F.linear(x, weight, self.parameters.get(f"{op.name}.bias"))
            case Add():
                return x + inputs[1]
            case Subtract():
                return x - inputs[1]
            case Multiply():
                return x * inputs[1]
            case Table():
                return self.functions[op.name](x)
            case Concat():
                return torch.cat(inputs, dim=op.axis + 1)
            case MaxPool2d():
                x, padding = pad(x, op.padding, -math.inf, op.kernel)
                return F.max_pool2d(x, op.kernel, op.stride, padding, op.dilation)
            case AvgPool2d():
                x, padding = pad(x, op.padding, 0.0, op.kernel)
                return F.avg_pool2d(x, op.kernel, op.stride, padding)
            case GlobalAvgPool():
                return x.mean((-2, -1), keepdim=True)
            case Reshape():
                return x.reshape(len(x), *op.shape)
            case Permute():
                return x.permute(0, *(a + 1 for a in op.axes))
            case Slice():
                return strided(x, op)
            case Pad():
                return F.pad(x, around(op), value=op.value)
            case Upsample():
                return upsample(x, op)
            case Clamp() | Requantize():
                return x
            case _:
                assert_never(op)

    def with_parameters(self, parameters: Mapping[str, torch.Tensor]) -> Network:
        """The same network with some parameters replaced, each by one of the same shape."""
        for name, tensor in parameters.items():
            if name not in self.parameters or tensor.shape != self.parameters[name].shape:
                raise IntactError(f"there is no parameter {name!r} of shape {list(tensor.shape)}.")
        return replace(self, parameters={**self.parameters, **parameters})

    def to(self, device: torch.device | str) -> Network:
        """The same network with its parameters on another device."""
        return replace(self, parameters={k: v.to(device) for k, v in self.parameters.items()})


def strided(x: torch.Tensor, op: Slice) -> torch.Tensor:
    """The indices of a `Slice`: `[N, *shape]` to `[N, *output shape]`."""
    chosen = slice(op.start, op.stop, op.step)
    return x[(slice(None),) * (op.axis + 1) + (chosen,)]


def around(op: Pad) -> list[int]:
    """The padding of a `Pad` in the order that `torch.nn.functional.pad` wants: last axis first."""
    pairs = zip(op.padding[::2], op.padding[1::2], strict=True)
    return [n for pair in reversed(list(pairs)) for n in pair]


def upsample(x: torch.Tensor, op: Upsample) -> torch.Tensor:
    """`[N, *shape]` with every element repeated along each axis of the sample."""
    for axis, factor in enumerate(op.factors, 1):
        if factor > 1:
            x = x.repeat_interleave(factor, dim=axis)
    return x


def pad(
    x: torch.Tensor, padding: Padding, value: float, pool: Pair | None = None
) -> tuple[torch.Tensor, Pair]:
    """Leave to the kernel what it can pad itself, and pad the rest here.

    pool     the window of a pool, which pads half of it at most; a convolution pads anything
    returns  the padded tensor, and the symmetric padding that is left to the kernel

    This is how torch pads for "same", so the bits are those of the module.
    """
    top, bottom, left, right = padding
    height, width = min(top, bottom), min(left, right)
    if pool is not None:
        height, width = min(height, pool[0] // 2), min(width, pool[1] // 2)
    rest = (left - width, right - width, top - height, bottom - height)
    return (F.pad(x, rest, value=value) if any(rest) else x), (height, width)
