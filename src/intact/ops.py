"""The op set that float networks and integer programs share, and its geometry.

Shapes are those of one sample: no batch dimension. An op's result is a tensor that carries the
op's name. Every function here answers for all ops; the type checker names one that was forgotten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from typing_extensions import assert_never

from intact.errors import IntactError

__all__ = [
    "Add",
    "AvgPool2d",
    "Clamp",
    "Concat",
    "Conv2d",
    "GlobalAvgPool",
    "Linear",
    "MaxPool2d",
    "Multiply",
    "Op",
    "Pad",
    "Permute",
    "Requantize",
    "Reshape",
    "Shape",
    "Slice",
    "Subtract",
    "Table",
    "Upsample",
    "accumulates",
    "has_own_grid",
    "last_uses",
    "macs",
    "moves_codes",
    "output_shape",
    "pool_size",
    "weighted",
]

Shape: TypeAlias = tuple[int, ...]
Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = tuple[int, int, int, int]
"""Top, bottom, left, right."""


@dataclass(frozen=True, slots=True)
class Conv2d:
    """2-D cross-correlation, `[C, H, W] -> [O, H', W']`; weight `[O, C / groups, kh, kw]`."""

    name: str
    inputs: tuple[str, ...]
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Linear:
    """Matrix product over the last axis, `[..., K] -> [..., O]`; weight `[O, K]`."""

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Add:
    """Elementwise sum of two tensors of one shape (and, in a program, of one grid)."""

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Subtract:
    """Elementwise difference of two tensors of one shape (and, in a program, of one grid)."""

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Multiply:
    """Elementwise product; an axis along which the second tensor has length 1 is repeated."""

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Any function of one value, element by element; in a program a table of all codes.

    A program has it as `<op>.table`, one row for all elements or one per index of axis 0; a float
    network has the function, `intact.pointwise.Pointwise`.
    """

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """Concatenation along `axis` (of the sample, so 0 is the channel axis)."""

    name: str
    inputs: tuple[str, ...]
    axis: int = 0


@dataclass(frozen=True, slots=True)
class MaxPool2d:
    """Maximum over windows; padding never wins."""

    name: str
    inputs: tuple[str, ...]
    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)


@dataclass(frozen=True, slots=True)
class AvgPool2d:
    """Sum over windows (padding counts as 0) divided by the window's size, always `kh * kw`."""

    name: str
    inputs: tuple[str, ...]
    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Padding = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class GlobalAvgPool:
    """Mean over all positions, `[C, H, W] -> [C, 1, 1]`."""

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in row-major order under another shape."""

    name: str
    inputs: tuple[str, ...]
    shape: Shape = ()


@dataclass(frozen=True, slots=True)
class Permute:
    """Axes in another order: result axis `i` is input axis `axes[i]`."""

    name: str
    inputs: tuple[str, ...]
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Slice:
    """Indices `start`, `start + step`, … below `stop` of one axis (of the sample)."""

    name: str
    inputs: tuple[str, ...]
    axis: int = 0
    start: int = 0
    stop: int = 1
    step: int = 1


@dataclass(frozen=True, slots=True)
class Pad:
    """A constant around the tensor.

    padding  elements before and after it along each axis: `(before_0, after_0, before_1, …)`
    value    the constant as a real number; its code is `quantize(value)` on the result's grid
    """

    name: str
    inputs: tuple[str, ...]
    padding: tuple[int, ...] = ()
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Upsample:
    """Nearest neighbour: along axis `i` each element `factors[i]` times, one behind the other."""

    name: str
    inputs: tuple[str, ...]
    factors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Clamp:
    """A clamp that could not be fused into its producer; its bounds are those of its result."""

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Requantize:
    """Codes moved to another grid; the identity in a float network."""

    name: str
    inputs: tuple[str, ...]


Op: TypeAlias = (
    Conv2d
    | Linear
    | Add
    | Subtract
    | Multiply
    | Table
    | Concat
    | MaxPool2d
    | AvgPool2d
    | GlobalAvgPool
    | Reshape
    | Permute
    | Slice
    | Pad
    | Upsample
    | Clamp
    | Requantize
)


def weighted(op: Op) -> bool:
    """Whether the op has a weight and may have a bias."""
    return isinstance(op, Conv2d | Linear)


def accumulates(op: Op) -> bool:
    """Whether the op requantizes: it has a multiplier, and its result has a grid of its own."""
    return isinstance(op, Conv2d | Linear | AvgPool2d | GlobalAvgPool | Multiply | Requantize)


def has_own_grid(op: Op) -> bool:
    """Whether the op's result has a grid of its own, which its operands do not decide."""
    return accumulates(op) or isinstance(op, Table)


def moves_codes(op: Op) -> bool:
    """Whether the op only moves or selects codes, so that its result keeps its input's grid."""
    return isinstance(op, MaxPool2d | Reshape | Permute | Slice | Pad | Upsample | Clamp)


def pool_size(op: AvgPool2d | GlobalAvgPool, input_shape: Shape) -> int:
    """How many positions one output of an average pool sums."""
    if isinstance(op, AvgPool2d):
        return op.kernel[0] * op.kernel[1]
    return input_shape[1] * input_shape[2]


def _fail(op: Op, message: str) -> IntactError:
    return IntactError(f"{type(op).__name__} {op.name!r}: {message}")


def _windows(
    op: Op, shape: Shape, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> Pair:
    """Height and width of the result of sliding a window over `[C, H, W]`."""
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise _fail(op, "kernel, stride and dilation must be positive, padding not negative.")
    sizes = []
    for i in range(2):
        size = shape[1 + i] + padding[2 * i] + padding[2 * i + 1]
        reach = dilation[i] * (kernel[i] - 1) + 1
        if reach > size:
            raise _fail(op, f"a window of {reach} does not fit the padded input, {size} wide.")
        sizes.append((size - reach) // stride[i] + 1)
    return sizes[0], sizes[1]


def _need(op: Op, shapes: Sequence[Shape], count: int, ndim: int | None) -> Shape:
    if len(shapes) != count:
        raise _fail(op, f"takes {count} input(s), not {len(shapes)}.")
    for shape in shapes:
        if ndim is not None and len(shape) != ndim:
            raise _fail(op, f"takes {ndim}-dimensional samples, not shape {list(shape)}.")
    return shapes[0]


def output_shape(op: Op, inputs: Sequence[Shape], weight: Shape | None = None) -> Shape:
    """The shape of an op's result, or an `IntactError` that says why there is none.

    inputs  one sample shape per input of the op
    weight  the weight's shape, for convolution and linear
    """
    match op:
        case Conv2d():
            c, *_ = shape = _need(op, inputs, 1, 3)
            if weight is None or len(weight) != 4:
                raise _fail(op, f"needs a 4-dimensional weight, not {weight}.")
            if op.groups < 1 or c != weight[1] * op.groups or weight[0] % op.groups:
                raise _fail(
                    op,
                    f"{c} input channels in {op.groups} group(s) do not fit a weight of shape "
                    f"{list(weight)}.",
                )
            kernel = (weight[2], weight[3])
            return (
                weight[0],
                *_windows(op, shape, kernel, op.stride, op.padding, op.dilation),
            )
        case Linear():
            shape = _need(op, inputs, 1, None)
            if weight is None or len(weight) != 2 or not shape or shape[-1] != weight[1]:
                raise _fail(op, f"input {list(shape)} does not fit a weight of shape {weight}.")
            return (*shape[:-1], weight[0])
        case Add() | Subtract():
            shape = _need(op, inputs, 2, None)
            if inputs[0] != inputs[1]:
                raise _fail(op, f"operands differ: {list(inputs[0])} and {list(inputs[1])}.")
            return shape
        case Multiply():
            shape = _need(op, inputs, 2, len(inputs[0]) if inputs else None)
            if any(n not in (1, size) for n, size in zip(inputs[1], shape, strict=True)):
                raise _fail(op, f"{list(inputs[1])} is not repeated to {list(shape)}.")
            return shape
        case Concat():
            if not inputs or not 0 <= op.axis < len(inputs[0]):
                raise _fail(op, f"there is no axis {op.axis} to concatenate along.")
            a = op.axis
            if any(s[:a] + s[a + 1 :] != inputs[0][:a] + inputs[0][a + 1 :] for s in inputs):
                raise _fail(op, f"shapes {[list(s) for s in inputs]} differ outside axis {a}.")
            return (*inputs[0][:a], sum(s[a] for s in inputs), *inputs[0][a + 1 :])
        case MaxPool2d():
            shape = _need(op, inputs, 1, 3)
            before, after = op.padding[0::2], op.padding[1::2]
            if any(
                p >= k
                for p, k in zip((*before, *after), op.kernel + op.kernel, strict=True)
                if op.dilation == (1, 1)
            ):
                raise _fail(op, "padding must be smaller than the kernel.")
            return (shape[0], *_windows(op, shape, op.kernel, op.stride, op.padding, op.dilation))
        case AvgPool2d():
            shape = _need(op, inputs, 1, 3)
            return (shape[0], *_windows(op, shape, op.kernel, op.stride, op.padding, (1, 1)))
        case GlobalAvgPool():
            return (_need(op, inputs, 1, 3)[0], 1, 1)
        case Reshape():
            shape = _need(op, inputs, 1, None)
            if any(n < 1 for n in op.shape) or math.prod(op.shape) != math.prod(shape):
                raise _fail(op, f"cannot view {list(shape)} as {list(op.shape)}.")
            return op.shape
        case Permute():
            shape = _need(op, inputs, 1, None)
            if sorted(op.axes) != list(range(len(shape))):
                raise _fail(op, f"{list(op.axes)} is no order of {len(shape)} axes.")
            return tuple(shape[a] for a in op.axes)
        case Slice():
            shape = _need(op, inputs, 1, None)
            if not (
                0 <= op.axis < len(shape)
                and 0 <= op.start < op.stop <= shape[op.axis]
                and op.step >= 1
            ):
                raise _fail(
                    op,
                    f"there are no indices {op.start}:{op.stop}:{op.step} along axis {op.axis} of "
                    f"{list(shape)}.",
                )
            length = math.ceil((op.stop - op.start) / op.step)
            return (*shape[: op.axis], length, *shape[op.axis + 1 :])
        case Pad():
            shape = _need(op, inputs, 1, None)
            if len(op.padding) != 2 * len(shape) or min(op.padding, default=-1) < 0:
                raise _fail(op, f"padding {list(op.padding)} does not fit {list(shape)}.")
            if not math.isfinite(op.value):
                raise _fail(op, f"the constant is {op.value}, but it must be finite.")
            ends = zip(op.padding[::2], op.padding[1::2], strict=True)
            return tuple(n + sum(pair) for n, pair in zip(shape, ends, strict=True))
        case Upsample():
            shape = _need(op, inputs, 1, None)
            if len(op.factors) != len(shape) or min(op.factors, default=0) < 1:
                raise _fail(op, f"factors {list(op.factors)} do not fit {list(shape)}.")
            return tuple(n * factor for n, factor in zip(shape, op.factors, strict=True))
        case Table() | Clamp() | Requantize():
            return _need(op, inputs, 1, None)
        case _:
            assert_never(op)


def macs(op: Op, inputs: Sequence[Shape], output: Shape, weight: Shape | None = None) -> int:
    """Multiply-accumulates of one sample; an average pool counts its additions."""
    match op:
        case Multiply():
            return math.prod(output)
        case Conv2d() | Linear():
            return math.prod(output) * math.prod(weight[1:]) if weight else 0
        case AvgPool2d() | GlobalAvgPool():
            return math.prod(output) * pool_size(op, inputs[0])
        case _:
            return 0


def last_uses(ops: Iterable[Op], keep: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """For each op's name, the tensors that nobody reads after it and that may be freed."""
    last: dict[str, str] = {}
    for op in ops:
        for tensor in (*op.inputs, op.name):
            last[tensor] = op.name
    kept = set(keep)
    freed: dict[str, list[str]] = {}
    for tensor, name in last.items():
        if tensor not in kept:
            freed.setdefault(name, []).append(tensor)
    return {name: tuple(tensors) for name, tensors in freed.items()}
