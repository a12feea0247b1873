"""Converters of what works element by element: functions of one tensor, sums, products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from intact.capturing.building import (
    Builder,
    Function,
    UnsupportedError,
    Value,
    converts,
    function_name,
)
from intact.capturing.layers import affine, fold
from intact.ops import Add, Concat, MaxPool2d, Multiply, Shape, Subtract, Upsample
from intact.pointwise import Pointwise, X, call

__all__: list[str] = []

_aten = torch.ops.aten

MOST_POSITIONS = 2**16
"""With a constant each: to engines they are channels of a depthwise convolution."""


# -- functions of one tensor -----------------------------------------------------------------------


def _operands(b: Builder, node: Node) -> list[Node]:
    """The operands that depend on the input, each once."""
    return list(dict.fromkeys(n for n in node.all_input_nodes if n not in b.constants))


def _root(value: Value) -> str:
    return value if isinstance(value, str) else value.root


def _common_root(b: Builder, node: Node) -> str | None:
    """The one tensor that all operands are functions of; None where they stem from several."""
    roots = {_root(b.bound[n]) for n in _operands(b, node)}
    return roots.pop() if len(roots) == 1 else None


def _composed(b: Builder, node: Node, root: str) -> Function:
    """The node as a function of the one tensor that all its operands are functions of."""
    _check_shape(b, node, root)
    rank = len(b.tensors[root].shape) + 1

    def part(operand: Node) -> Any:
        if operand in b.constants:
            value = b.constants[operand]
            by_channel = node.target is _aten.prelu.default or not _axes(value, rank) - {1}
            if not by_channel:
                raise UnsupportedError(
                    "A constant in it differs by position, not only by channel. Use constants of "
                    "shape [C, 1, 1], and train again."
                )
            return value
        bound = b.bound[operand]
        return bound.function if isinstance(bound, Function) else X

    args, kwargs = map_arg((node.args, node.kwargs), part)
    target: Any = node.target
    return Function(root, Pointwise(target, tuple(args), dict(kwargs), function_name(node)))


def _check_shape(b: Builder, node: Node, root: str) -> None:
    if b.sample(node.meta["val"]) != b.tensors[root].shape:
        raise UnsupportedError(
            f"Its constant makes samples of {list(b.sample(node.meta['val']))} of samples of "
            f"{list(b.tensors[root].shape)}. Expand the tensor first: x.expand(...)."
        )


def _check_ranks(*operands: Node) -> None:
    ranks = {operand.meta["val"].ndim for operand in operands}
    if len(ranks) > 1 and 1 in ranks:
        raise UnsupportedError(
            "It combines one number per sample, [N], with a tensor of more axes, along whose last "
            "one torch repeats it. Write g[:, None], with as many axes as the other has."
        )


def _axes(constant: Any, rank: int) -> set[int]:
    """The axes of a batch of so many dimensions along which a constant differs."""
    if not isinstance(constant, torch.Tensor):
        return set()
    return {rank - constant.ndim + i for i, n in enumerate(constant.shape) if n > 1}


@converts(
    torch.Tag.pointwise,
    _aten.abs.default,
    _aten.acos.default,
    _aten.asin.default,
    _aten.atan.default,
    _aten.celu.default,
    _aten.cos.default,
    _aten.elu.default,
    _aten.erf.default,
    _aten.exp.default,
    _aten.expm1.default,
    _aten.floor.default,
    _aten.ceil.default,
    _aten.round.default,
    _aten.gelu.default,
    _aten.hardshrink.default,
    _aten.hardsigmoid.default,
    _aten.hardswish.default,
    _aten.leaky_relu.default,
    _aten.log.default,
    _aten.log1p.default,
    _aten.log_sigmoid.default,
    _aten.mish.default,
    _aten.neg.default,
    _aten.pow.Tensor_Scalar,
    _aten.prelu.default,
    _aten.reciprocal.default,
    _aten.rsqrt.default,
    _aten.selu.default,
    _aten.sigmoid.default,
    _aten.sign.default,
    _aten.silu.default,
    _aten.sin.default,
    _aten.softplus.default,
    _aten.softshrink.default,
    _aten.sqrt.default,
    _aten.square.default,
    _aten.tanh.default,
    _aten.threshold.default,
    _aten.gt.Scalar,
    _aten.ge.Scalar,
    _aten.lt.Scalar,
    _aten.le.Scalar,
    _aten.where.self,
    _aten.where.ScalarOther,
    _aten.where.ScalarSelf,
)
def _pointwise(b: Builder, node: Node, _: dict[str, Any]) -> Function:
    root = _common_root(b, node)
    if root is None:
        raise UnsupportedError(
            "It combines two tensors. Functions are of one tensor; of two there are sums, "
            "differences, products, quotients, maximum and minimum. torch.where(c, x, y) is "
            "y + c * (x - y), with c = (...).float()."
        )
    return _composed(b, node, root)


@converts(_aten.maximum.default, _aten.max.other)
def _maximum(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    if _common_root(b, node) is not None:
        return _pointwise(b, node, a)
    _check_ranks(a["self"], a["other"])
    return _larger(b, node, [b.tensor(a["self"]), b.tensor(a["other"])])


@converts(_aten.minimum.default, _aten.min.other)
def _minimum(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    """The maximum of what has the other sign."""
    if _common_root(b, node) is not None:
        return _pointwise(b, node, a)
    _check_ranks(a["self"], a["other"])
    operands = []
    for operand in (a["self"], a["other"]):
        root, inner = b.expression(operand)
        operands.append(b.table(node, "negative", root, call(_aten.neg.default, inner)))
    return Function(_larger(b, node, operands), call(_aten.neg.default, X))


def _larger(b: Builder, node: Node, operands: Sequence[str]) -> str:
    """The maximum of two tensors: a pool over both, one below the other. It chooses codes."""
    base, shape = b.base(node), b.shape(node)
    line = (shape[0], 1, math.prod(shape[1:]))
    lines = []
    for tensor in operands:
        expanded = _broadcast(b, node, tensor, shape)
        lines.append(b.reshape(node, f"{base}.line", expanded, line))
    both = Concat(b.unique(f"{base}.both"), tuple(lines), 1)
    op = MaxPool2d(b.name(node), (b.emit(node, both, (line[0], 2, line[2])),), (2, 1), (2, 1))
    return b.reshape(node, f"{base}.reshape", b.emit(node, op, line), shape)


_BOUNDS: dict[Any, tuple[float, float]] = {
    _aten.relu.default: (0.0, math.inf),
    _aten.relu6.default: (0.0, 6.0),
}


@converts(
    *_BOUNDS,
    _aten.hardtanh.default,
    _aten.clamp.default,
    _aten.clip.default,
    _aten.clamp_min.default,
    _aten.clamp_max.default,
)
def _clamp(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    """Fused into the producer where that is possible."""
    low, high = _BOUNDS.get(node.target, (a.get("min"), a.get("max")))
    if low is None:
        low = a.get("min_val", -math.inf)
    if high is None:
        high = a.get("max_val", math.inf)
    bound = b.bound[a["self"]]
    before = (-math.inf, math.inf)
    if isinstance(bound, Function):
        if bound.bounds is None:
            return _pointwise(b, node, a)
        before = bound.bounds
    elif b.clamp(bound, low, high):
        return bound
    composed = _composed(b, node, _root(bound))
    # Where low > high everything becomes high, as in torch.
    least, most = (float(min(max(end, low), high)) for end in before)
    return Function(composed.root, composed.function, (least, most))


# -- arithmetic ------------------------------------------------------------------------------------


def _constant(b: Builder, value: Any) -> torch.Tensor | None:
    """A number or constant tensor in float64; None for what depends on the input."""
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float64)
    if value in b.constants:
        return torch.as_tensor(b.constants[value]).double()
    return None


def _of_a_sample(constant: torch.Tensor | None, rank: int) -> torch.Tensor | None:
    """A constant that was made for a whole batch, as one sample has it, where all have the same."""
    if constant is not None and constant.ndim == rank and bool((constant == constant[:1]).all()):
        return constant[:1]
    return constant


def _scaled(
    b: Builder, node: Node, x: Node, factor: torch.Tensor | None, offset: torch.Tensor | None
) -> Value:
    """`x * factor + offset` with constants: folded into a layer, a table, or a layer of its own."""
    bound = b.bound[x]
    _check_shape(b, node, _root(bound))
    rank = len(b.tensors[_root(bound)].shape) + 1
    factor, offset = _of_a_sample(factor, rank), _of_a_sample(offset, rank)
    constants = [c for c in (factor, offset) if c is not None]
    axes = set().union(*(_axes(c, rank) for c in constants))
    if 0 in axes:
        raise UnsupportedError(
            "Its constant differs from sample to sample of a batch. Use one of shape [1, ...]."
        )
    if len(axes) > 1:
        return _by_position(
            b, node, b.tensor(x), factor, offset, [axis - 1 for axis in sorted(axes)]
        )
    axis = axes.pop() - 1 if axes else None
    size = 1 if axis is None else b.tensors[_root(bound)].shape[axis]
    one = torch.ones(1, dtype=torch.float64)
    factor = (one if factor is None else factor.reshape(-1)).expand(size)
    offset = None if offset is None else offset.reshape(-1).expand(size)
    if bool((factor == 1).all()) and (offset is None or not offset.any()):
        return bound
    if isinstance(bound, str) and fold(b, bound, factor, offset, axis):
        return bound
    if axis is None:
        return _composed(b, node, _root(bound))
    return affine(b, node, b.tensor(x), factor, offset, axis)


def _by_position(
    b: Builder,
    node: Node,
    x: str,
    factor: torch.Tensor | None,
    offset: torch.Tensor | None,
    axes: Sequence[int],
) -> str:
    """`x * factor + offset` with constants that differ along several axes of the sample.

    Its positions become channels of an image, and those have a factor and an offset each.
    """
    shape, base = b.tensors[x].shape, b.base(node)
    rest = [i for i in range(len(shape)) if i not in axes]
    count = math.prod(shape[i] for i in axes)
    if count > MOST_POSITIONS:
        raise UnsupportedError(
            f"Its constant differs by position, and there are {count:,}, more than "
            f"{MOST_POSITIONS:,}. Use one of shape [C, 1, 1], and train again."
        )

    def spread(constant: torch.Tensor) -> torch.Tensor:
        whole = constant.expand(1, *shape)[0].permute(*axes, *rest)
        return whole.reshape(count, -1)[:, 0]

    order = [*axes, *rest]
    moved = b.permute(node, f"{base}.permute", x, order)
    image = (count, math.prod(shape[i] for i in rest), 1)
    view = b.reshape(node, f"{base}.positions", moved, image)
    one = torch.ones(count, dtype=torch.float64)
    result = affine(
        b,
        node,
        view,
        one if factor is None else spread(factor),
        None if offset is None else spread(offset),
        0,
    )
    result = b.reshape(node, f"{base}.reshape", result, tuple(shape[i] for i in order))
    return b.permute(node, f"{base}.permute", result, [order.index(i) for i in range(len(shape))])


@converts(_aten.add.Tensor, _aten.add.Scalar)
@converts(_aten.sub.Tensor, _aten.sub.Scalar, _aten.rsub.Scalar, _aten.rsub.Tensor)
def _add(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    left, right, alpha = a["self"], a["other"], a.get("alpha", 1)
    minus = node.target not in (_aten.add.Tensor, _aten.add.Scalar)
    if node.target in (_aten.rsub.Scalar, _aten.rsub.Tensor):
        left, right = right, left
    constants = _constant(b, left), _constant(b, right)
    if alpha == 1 or constants[1] is not None:
        sign = torch.tensor([-1.0 if minus else 1.0], dtype=torch.float64)
        if constants[1] is not None:
            return _scaled(b, node, left, None, alpha * sign * constants[1])
        if constants[0] is not None:
            return _scaled(b, node, right, sign, constants[0])
    if composed := _same_root(b, node):
        return composed
    if alpha != 1:
        raise UnsupportedError(
            f"It adds alpha = {alpha} times a tensor. Put the factor into the weights of the layer "
            "before it."
        )
    _check_ranks(left, right)
    shape = b.shape(node)
    operands = tuple(_broadcast(b, node, b.tensor(n), shape) for n in (left, right))
    kind = Subtract if minus else Add
    return b.emit(node, kind(b.name(node), operands), shape)


@converts(_aten.mul.Tensor, _aten.mul.Scalar)
def _mul(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    left, right = a["self"], a["other"]
    constants = _constant(b, left), _constant(b, right)
    if constants[1] is not None:
        return _scaled(b, node, left, constants[1], None)
    if constants[0] is not None:
        return _scaled(b, node, right, constants[0], None)
    if composed := _same_root(b, node, squares=True):
        return composed
    _check_ranks(left, right)
    return _product(b, node, left, b.tensor(right))


def _product(b: Builder, node: Node, left: Node, right: str) -> str:
    """`left * right`, where one of them is repeated along axes of length 1."""
    shape = b.shape(node)
    first, second = (_repeated(b, tensor) for tensor in (b.tensor(left), right))
    if b.tensors[first].shape != shape:
        first, second = second, first
    first = _broadcast(b, node, first, shape)
    if len(b.tensors[second].shape) != len(shape):
        second = _broadcast(b, node, second, shape)
    return b.emit(node, Multiply(b.name(node), (first, second)), shape)


@converts(_aten.div.Tensor, _aten.div.Scalar)
def _div(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    constant = _constant(b, a["other"])
    if constant is not None:
        if not bool(constant.all()):
            raise UnsupportedError("It divides by a constant that holds 0. Correct the constant.")
        return _scaled(b, node, a["self"], 1 / constant, None)
    if composed := _same_root(b, node, squares=True):
        return composed
    _check_ranks(a["self"], a["other"])
    return _product(b, node, a["self"], _reciprocal(b, node, a["other"]))


def _reciprocal(b: Builder, node: Node, divisor: Node) -> str:
    """1 / divisor as a table, which takes in the function that the divisor may be."""
    root, inner = b.expression(divisor)
    return b.table(node, "reciprocal", root, call(_aten.reciprocal.default, inner))


def _same_root(b: Builder, node: Node, *, squares: bool = False) -> Function | None:
    """Sum or product as one function, where an operand is a function of what the other is.

    squares  whether two times the same tensor is one, too
    """
    if not squares and not any(isinstance(b.bound[n], Function) for n in _operands(b, node)):
        return None
    root = _common_root(b, node)
    return None if root is None else _composed(b, node, root)


def _repeated(b: Builder, tensor: str) -> str:
    """A tensor that was expanded as it was before: a product repeats it itself."""
    op = b.ops.get(tensor)
    if not isinstance(op, Upsample) or tensor in b.shared:
        return tensor
    source = b.tensors[op.inputs[0]].shape
    stretched = (n for n, factor in zip(source, op.factors, strict=True) if factor > 1)
    return b.drop(tensor) if all(n == 1 for n in stretched) else tensor


def _broadcast(b: Builder, node: Node, tensor: str, shape: Shape) -> str:
    """A tensor repeated along axes of length 1 to a shape."""
    given = b.tensors[tensor].shape
    if given == shape:
        return tensor
    if len(given) != len(shape):
        raise UnsupportedError(
            f"It broadcasts a sample of {list(given)} to {list(shape)}. Give both operands the "
            "same number of axes: x[:, :, None, None]."
        )
    factors = tuple(n // m for n, m in zip(shape, given, strict=True))
    op = Upsample(b.unique(f"{b.base(node)}.expand"), (tensor,), factors)
    return b.emit(node, op, shape)
