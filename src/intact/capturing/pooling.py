"""Converters of pools and means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from intact.capturing.building import Builder, Function, UnsupportedError, Value, converts
from intact.capturing.layers import along, as_image, pair
from intact.ops import (
    AvgPool2d,
    Concat,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Padding,
    Pair,
    Shape,
    Slice,
    Subtract,
    Upsample,
)
from intact.pointwise import Pointwise, X, call

__all__: list[str] = []

_aten = torch.ops.aten

MOST_WEIGHTS = 2**22
"""Of an average pool with irregular windows, which is a matrix product, along an axis."""
MOST_TOGETHER = 2**16
"""Of the same over both axes at once."""
MOST_WINDOWS = 64
"""Rows and columns of an irregular max pool, each of which takes three operations."""


def _overhang(a: dict[str, Any], size: Shape, out: Shape, dilation: Pair) -> Padding:
    """Padding of a pool, with what ceil mode adds below and on the right."""
    kernel, padding = pair(a["kernel_size"]), pair(a["padding"])
    stride = pair(a["stride"] or kernel)
    after = []
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        needed = (out[i] - 1) * stride[i] + reach - size[i] - padding[i]
        after.append(max(padding[i], needed))
    return (padding[0], after[0], padding[1], after[1])


def _on_image(b: Builder, node: Node, x: str, pool: Callable[[str, Shape], str]) -> str:
    """A pool over `[C, H, W]`, or over `[C, L]` as one over `[C, 1, L]`.

    pool  called with the image and the shape of its result
    """
    shape = b.shape(node)
    if len(b.tensors[x].shape) == 3:
        return pool(x, shape)
    image, back = as_image(b, node, x)
    return back(pool(image, (shape[0], 1, *shape[1:])))


def _widened(a: dict[str, Any], *, one_dimensional: bool) -> dict[str, Any]:
    """The arguments of a pool over a line as those of one over an image of one row."""
    if not one_dimensional:
        return a
    wide: dict[str, Any] = dict(a)
    for key, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        if a.get(key):
            wide[key] = (neutral, a[key][0])
    return wide


# -- maxima ----------------------------------------------------------------------------------------


@converts(
    _aten.max_pool2d.default,
    _aten.max_pool2d_with_indices.default,
    _aten.max_pool1d.default,
    _aten.max_pool1d_with_indices.default,
)
def _max_pool(b: Builder, node: Node, a: dict[str, Any]) -> str:
    line = "1d" in str(node.target)
    x = b.tensor(a.get("self", a.get("input")), ndim=2 if line else 3)
    a = _widened(a, one_dimensional=line)

    def pool(x: str, shape: Shape) -> str:
        size = b.tensors[x].shape[1:]
        kernel, dilation = pair(a["kernel_size"]), pair(a["dilation"])
        stride = pair(a["stride"] or kernel)
        padding = _overhang(a, size, shape[1:], dilation)
        if dilation == (1, 1):  # else a window may step over all that is no padding
            x, padding = b.absorb_padding(x, padding, -math.inf, kernel)
        _check_windows(b.tensors[x].shape[1:], shape[1:], kernel, stride, padding, dilation)
        op = MaxPool2d(b.name(node), (x,), kernel, stride, padding, dilation)
        return b.emit(node, op, shape)

    return _on_image(b, node, x, pool)


def _check_windows(
    size: Shape, out: Shape, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> None:
    for i in range(2):
        for start in range(-padding[2 * i], out[i] * stride[i] - padding[2 * i], stride[i]):
            # A dilated window can step over the whole input.
            if not any(0 <= start + dilation[i] * j < size[i] for j in range(kernel[i])):
                raise UnsupportedError(
                    "A window sees nothing but padding, so its maximum is -inf. Pad less, or take "
                    "a smaller dilation."
                )


@converts(_aten.adaptive_max_pool2d.default, _aten.adaptive_max_pool1d.default)
def _adaptive_max_pool(b: Builder, node: Node, a: dict[str, Any]) -> str:
    def pool(x: str, shape: Shape) -> str:
        size = b.tensors[x].shape
        if shape == size:
            return x
        for axis in (1, 2):
            x = _max_along(b, node, x, axis, _adaptive(size[axis], shape[axis]))
        return x

    x = b.tensor(a["self"], ndim=2 if "1d" in str(node.target) else 3)
    size, out = b.tensors[x].shape, b.shape(node)
    if size != out and all(n % m == 0 for n, m in zip(size[1:], out[1:], strict=True)):

        def regular(x: str, shape: Shape) -> str:
            windows = pair([n // m for n, m in zip(b.tensors[x].shape[1:], shape[1:], strict=True)])
            return b.emit(node, MaxPool2d(b.name(node), (x,), windows, windows), shape)

        return _on_image(b, node, x, regular)
    return _on_image(b, node, x, pool)


def _max_along(b: Builder, node: Node, x: str, axis: int, windows: Sequence[Pair]) -> str:
    """The maximum over windows of rows (axis 1) or columns (axis 2) that differ in size."""
    if len(windows) > MOST_WINDOWS:
        raise UnsupportedError(
            f"Its windows differ in size, and there are {len(windows)} along an axis, more than "
            f"{MOST_WINDOWS}. Choose an output size that divides the input's."
        )
    base, size = b.base(node), b.tensors[x].shape
    if all(stop - start == 1 for start, stop in windows) and len(windows) == size[axis]:
        return x
    b.shared.add(x)
    parts = []
    for start, stop in windows:
        cut = (*size[:axis], stop - start, *size[axis + 1 :])
        part = b.emit(node, Slice(b.unique(f"{base}.window"), (x,), axis, start, stop), cut)
        kernel = (stop - start, 1) if axis == 1 else (1, stop - start)
        one = (*size[:axis], 1, *size[axis + 1 :])
        op = MaxPool2d(b.unique(f"{base}.max"), (part,), kernel, kernel)
        parts.append(b.emit(node, op, one))
    joined = (*size[:axis], len(windows), *size[axis + 1 :])
    return b.emit(node, Concat(b.unique(base), tuple(parts), axis), joined)


def _largest(b: Builder, node: Node, x: str, dim: int | Sequence[int] | None) -> str:
    x, count, shape = _reduced(b, node, x, dim)
    if count > 1:
        op = MaxPool2d(b.name(node), (x,), (1, count), (1, count))
        x = b.emit(node, op, (*b.tensors[x].shape[:2], 1))
    return b.reshape(node, f"{b.base(node)}.reshape", x, shape)


@converts(_aten.amax.default, _aten.max.dim)
def _amax(b: Builder, node: Node, a: dict[str, Any]) -> str:
    return _largest(b, node, b.tensor(a["self"]), a["dim"])


@converts(_aten.amin.default, _aten.min.dim)
def _amin(b: Builder, node: Node, a: dict[str, Any]) -> Function:
    """The maximum of what has the other sign."""
    root, inner = b.expression(a["self"])
    opposite = b.table(node, "negative", root, call(_aten.neg.default, inner))
    return Function(_largest(b, node, opposite, a["dim"]), call(_aten.neg.default, X))


# -- averages --------------------------------------------------------------------------------------


def _adaptive(size: int, out: int) -> list[Pair]:
    """First and last-but-one position of each window of an adaptive pool, as torch has them."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


@converts(_aten.avg_pool2d.default, _aten.avg_pool1d.default)
def _avg_pool(b: Builder, node: Node, a: dict[str, Any]) -> str:
    line = "1d" in str(node.target)
    x = b.tensor(a["self"], ndim=2 if line else 3)
    a = _widened(a, one_dimensional=line)

    def pool(x: str, shape: Shape) -> str:
        size, kernel = b.tensors[x].shape[1:], pair(a["kernel_size"])
        stride, around = pair(a["stride"] or kernel), pair(a["padding"])
        padding = _overhang(a, size, shape[1:], (1, 1))
        symmetric = (padding[1], padding[3]) == (padding[0], padding[2])
        divisor = a.get("divisor_override")
        counts_padding = a["count_include_pad"] or not any(padding)
        if symmetric and counts_padding and divisor in (None, kernel[0] * kernel[1]):
            x, padding = b.absorb_padding(x, padding, 0.0)
            return b.emit(node, AvgPool2d(b.name(node), (x,), kernel, stride, padding), shape)
        windows, counts = [], []
        for i in range(2):
            # As torch: a window ends at the padding's end, and with ceil mode may begin in it.
            starts = [j * stride[i] - around[i] for j in range(shape[1 + i])]
            ends = [min(start + kernel[i], size[i] + around[i]) for start in starts]
            inside = [(max(0, s), min(size[i], e)) for s, e in zip(starts, ends, strict=True)]
            whole = [e - s for s, e in zip(starts, ends, strict=True)]
            windows.append(inside)
            counts.append(whole if a["count_include_pad"] else [e - s for s, e in inside])
        return _irregular(b, node, x, shape, windows, counts, divisor)

    return _on_image(b, node, x, pool)


@converts(_aten.avg_pool3d.default)
def _avg_pool_3d(b: Builder, node: Node, a: dict[str, Any]) -> str:
    """Over the first of three axes alone: so local response norm averages over channels."""
    x = b.tensor(a["self"])
    shape, size = b.shape(node), a["kernel_size"]
    plain = not any(a["padding"]) and not a["ceil_mode"] and a["divisor_override"] is None
    if len(shape) != 4 or size[1:] != [1, 1] or (a["stride"] or size)[1:] != [1, 1] or not plain:
        raise UnsupportedError(
            "It pools over more than one of three axes. Fold the depth into the channels, pool "
            "over two axes, and train again."
        )
    channels, depth, *rest = b.tensors[x].shape
    x = b.reshape(node, f"{b.base(node)}.image", x, (channels, depth, math.prod(rest)))
    kernel, stride = (size[0], 1), ((a["stride"] or size)[0], 1)
    op = AvgPool2d(b.name(node), (x,), kernel, stride)
    pooled = b.emit(node, op, (channels, shape[1], math.prod(rest)))
    return b.reshape(node, f"{b.base(node)}.reshape", pooled, shape)


@converts(
    _aten.adaptive_avg_pool2d.default,
    _aten._adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool1d.default,
)
def _adaptive_avg_pool(b: Builder, node: Node, a: dict[str, Any]) -> str:
    def pool(x: str, shape: Shape) -> str:
        size = b.tensors[x].shape
        if shape == size:
            return x
        if shape[1:] == (1, 1):
            return b.emit(node, GlobalAvgPool(b.name(node), (x,)), shape)
        if all(n % m == 0 for n, m in zip(size[1:], shape[1:], strict=True)):
            windows = pair([n // m for n, m in zip(size[1:], shape[1:], strict=True)])
            return b.emit(node, AvgPool2d(b.name(node), (x,), windows, windows), shape)
        sides = [_adaptive(n, m) for n, m in zip(size[1:], shape[1:], strict=True)]
        counts = [[stop - start for start, stop in side] for side in sides]
        return _irregular(b, node, x, shape, sides, counts, None)

    return _on_image(b, node, b.tensor(a["self"], 2 if "1d" in str(node.target) else 3), pool)


def _irregular(
    b: Builder,
    node: Node,
    x: str,
    shape: Shape,
    windows: Sequence[Sequence[Pair]],
    counts: Sequence[Sequence[int]],
    divisor: int | None,
) -> str:
    """An average pool whose windows differ in size, as a matrix product over all positions.

    windows, counts  of rows and of columns: where each window begins and ends, and how many
                     positions it counts
    divisor          of all windows, instead of what they count

    Each row of the matrix holds one value and zeros, so its codes are exact, and its scale makes
    its own multiplier: every position divides by its own count. More than `MOST_TOGETHER` weights
    become a product along columns and one along rows, which rounds once more, but over the 35x35
    positions of an Inception takes 70 multiplications a value instead of 1,225.
    """
    channels, *size = b.tensors[x].shape
    if divisor is not None:
        counts = [[1] * shape[1], [divisor] * shape[2]]
    sides = []
    for n, side, sizes in zip(size, windows, counts, strict=True):
        matrix = torch.zeros(len(side), n, dtype=torch.float64)
        for row, (start, stop), count in zip(matrix, side, sizes, strict=True):
            row[start:stop] = 1 / count
        if matrix.numel() > MOST_WEIGHTS:
            raise UnsupportedError(
                f"Its windows differ in size, which takes a weight per pair of {n:,} positions and "
                f"{len(side):,} results along an axis: too many. Choose an output size that "
                "divides the input's, or count_include_pad=True without ceil_mode."
            )
        sides.append(matrix)
    if sides[0].numel() * sides[1].numel() > MOST_TOGETHER:
        for axis in (2, 1):
            x = along(b, node, x, axis, sides[axis - 1])
        return x
    base = b.base(node)
    flat = b.reshape(node, f"{base}.flatten", x, (channels, math.prod(size)))
    op = Linear(b.name(node), (flat,))
    pooled = b.emit(node, op, (channels, math.prod(shape[1:])), torch.kron(*sides))
    return b.reshape(node, f"{base}.reshape", pooled, shape)


# -- over any axes ---------------------------------------------------------------------------------


def _axes(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """Axes of a batch as an operation names them, in order; none where it names none."""
    dims = dim if isinstance(dim, Sequence) else [] if dim is None else [dim]
    return sorted({d % rank for d in dims})


def _reduced(
    b: Builder, node: Node, x: str, dim: int | Sequence[int] | None
) -> tuple[str, int, Shape]:
    """What is reduced as an image `[kept, 1, reduced]`, how many values each result stands for, and
    the shape of the results.
    """
    size = b.tensors[x].shape
    axes = _axes(dim, len(size) + 1)
    if not axes or 0 in axes:
        raise UnsupportedError(
            "It reduces the batch, too. Name the axes, without the first one: x.mean((2, 3))."
        )
    reduced = [d - 1 for d in axes]
    kept = [i for i in range(len(size)) if i not in reduced]
    base, count = b.base(node), math.prod(size[i] for i in reduced)
    x = b.permute(node, f"{base}.permute", x, (*kept, *reduced))
    image = (math.prod(size[i] for i in kept), 1, count)
    return b.reshape(node, f"{base}.image", x, image), count, b.shape(node)


def _average(b: Builder, node: Node, x: str, dim: int | Sequence[int] | None) -> str:
    size = b.tensors[x].shape
    if len(size) == 3 and _axes(dim, 4) == [2, 3]:
        name = b.emit(node, GlobalAvgPool(b.name(node), (x,)), (size[0], 1, 1))
        return b.reshape(node, f"{name}.reshape", name, b.shape(node))
    image, _, shape = _reduced(b, node, x, dim)
    pooled = (*b.tensors[image].shape[:1], 1, 1)
    name = b.emit(node, GlobalAvgPool(b.name(node), (image,)), pooled)
    return b.reshape(node, f"{name}.reshape", name, shape)


@converts(_aten.mean.dim)
def _mean(b: Builder, node: Node, a: dict[str, Any]) -> str:
    return _average(b, node, b.tensor(a["self"]), a["dim"])


def _total(b: Builder, node: Node, x: str, dim: int | Sequence[int] | None) -> Function:
    """The mean, and then the count as a factor."""
    size = math.prod(b.tensors[x].shape)
    name = _average(b, node, x, dim)  # which may take back the op that made `x`
    count = size // math.prod(b.shape(node))
    b.shared.add(name)  # the factor must not be folded into anything but a table
    return Function(name, Pointwise(_aten.mul.Tensor, (X, count), label="sum"))


@converts(_aten.sum.dim_IntList)
def _sum(b: Builder, node: Node, a: dict[str, Any]) -> Function:
    return _total(b, node, b.tensor(a["self"]), a["dim"])


@converts(_aten.linalg_vector_norm.default)
def _vector_norm(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    """A root of the sum of powers; of order infinity the largest."""
    order = float(a["ord"])
    if order <= 0:
        raise UnsupportedError(f"Its order is {a['ord']}; it must be positive: take ord=2.")
    root, inner = b.expression(a["self"])
    size = call(_aten.abs.default, inner)
    if order == math.inf:
        return _largest(b, node, b.table(node, "size", root, size), a["dim"])
    powers = b.table(node, "power", root, call(_aten.pow.Tensor_Scalar, size, order))
    total = _total(b, node, powers, a["dim"])
    return Function(total.root, call(_aten.pow.Tensor_Scalar, total.function, 1 / order))


@converts(_aten.var.correction)
def _variance(b: Builder, node: Node, a: dict[str, Any]) -> Function:
    """The mean square of what is left without the mean."""
    x = b.tensor(a["self"])
    image, count, shape = _reduced(b, node, x, a["dim"])
    correction = 1 if a["correction"] is None else a["correction"]
    if count <= correction:
        raise UnsupportedError("It is the variance of single values. Leave it out.")
    base, kept = b.base(node), (b.tensors[image].shape[0], 1, 1)
    b.shared.update((x, image))

    def mean(name: str, source: str) -> str:
        return b.emit(node, GlobalAvgPool(b.unique(f"{base}.{name}"), (source,)), kept)

    centre = Upsample(b.unique(f"{base}.expand"), (mean("mean", image),), (1, 1, count))
    operands = (image, b.emit(node, centre, b.tensors[image].shape))
    rest = b.emit(node, Subtract(b.unique(f"{base}.centred"), operands), b.tensors[image].shape)
    power = mean("power", b.table(node, "square", rest, call(_aten.square.default, X)))
    name = b.reshape(node, f"{base}.reshape", power, shape)
    b.shared.add(name)
    return Function(name, call(_aten.mul.Tensor, X, count / (count - correction)))
