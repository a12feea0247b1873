"""Converters of what moves values: views, joins, cuts, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from intact.capturing.building import (
    Builder,
    Function,
    Parts,
    UnsupportedError,
    Value,
    converts,
)
from intact.capturing.layers import along
from intact.ops import Concat, Pad, Shape, Slice, Upsample
from intact.pointwise import Pointwise

__all__: list[str] = []

_aten = torch.ops.aten

MOST_AXES = 4
"""Of a sample that is padded: two numbers for each are as many as a field of an op may hold."""
MOST_WEIGHTS = 2**22
"""Of a matrix along one axis."""
MOST_RUNS = 64
"""Slices that are joined to one tensor; what takes more is a matrix product."""


def _axis(b: Builder, tensor: str, dim: int, advice: str) -> int:
    """An axis of the sample, from one of the batch."""
    axis = dim % (len(b.tensors[tensor].shape) + 1) - 1
    if axis < 0:
        raise UnsupportedError(advice)
    return axis


# -- the same elements -----------------------------------------------------------------------------


@converts(
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
)
def _reshape(b: Builder, node: Node, a: dict[str, Any]) -> str:
    return b.reshape(node, b.base(node), b.tensor(a["self"]), b.shape(node))


def _permute_axes(b: Builder, node: Node, x: str, order: Sequence[int]) -> str:
    axes = [d % len(order) for d in order]
    if axes[0] != 0:
        raise UnsupportedError(
            "It moves the batch, which must stay the first axis. Move others: x.permute(0, ...)."
        )
    return b.permute(node, b.base(node), x, [d - 1 for d in axes[1:]])


@converts(_aten.permute.default)
def _permute(b: Builder, node: Node, a: dict[str, Any]) -> str:
    return _permute_axes(b, node, b.tensor(a["self"]), a["dims"])


@converts(_aten.transpose.int)
def _transpose(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    order = list(range(len(b.tensors[x].shape) + 1))
    i, j = a["dim0"], a["dim1"]
    order[i], order[j] = order[j], order[i]
    return _permute_axes(b, node, x, order)


@converts(_aten.pixel_shuffle.default)
def _pixel_shuffle(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, factor = b.tensor(a["self"], ndim=3), a["upscale_factor"]
    channels, height, width = b.tensors[x].shape
    base = b.base(node)
    parts = (channels // factor**2, factor, factor, height, width)
    x = b.reshape(node, f"{base}.phases", x, parts)
    x = b.permute(node, f"{base}.permute", x, (0, 3, 1, 4, 2))
    return b.reshape(node, base, x, b.shape(node))


@converts(_aten.pixel_unshuffle.default)
def _pixel_unshuffle(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, factor = b.tensor(a["self"], ndim=3), a["downscale_factor"]
    channels, height, width = b.tensors[x].shape
    base = b.base(node)
    parts = (channels, height // factor, factor, width // factor, factor)
    x = b.reshape(node, f"{base}.phases", x, parts)
    x = b.permute(node, f"{base}.permute", x, (0, 2, 4, 1, 3))
    return b.reshape(node, base, x, b.shape(node))


@converts(_aten.channel_shuffle.default)
def _channel_shuffle(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, groups = b.tensor(a["self"]), a["groups"]
    channels, *rest = b.tensors[x].shape
    base = b.base(node)
    x = b.reshape(node, f"{base}.groups", x, (groups, channels // groups, *rest))
    x = b.permute(node, f"{base}.permute", x, (1, 0, *range(2, len(rest) + 2)))
    return b.reshape(node, base, x, b.shape(node))


@converts(
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten._to_copy.default,
    _aten.contiguous.default,
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.lift_fresh_copy.default,
)
def _nothing(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    if node.meta["val"].dtype != torch.float32:
        raise UnsupportedError(
            f"It converts to {node.meta['val'].dtype}; float32 is needed. Leave the conversion out."
        )
    bound = b.bound[a["self"]]
    if isinstance(bound, Function) and a["self"].meta["val"].dtype == torch.bool:
        ends = (torch.tensor(1.0), torch.tensor(0.0))
        chosen = Pointwise(_aten.where.self, (bound.function, *ends), label=bound.function.label)
        return Function(bound.root, chosen)
    return bound


# -- joins and cuts --------------------------------------------------------------------------------


@converts(_aten.full_like.default)
def _full_like(_: Builder, node: Node, a: dict[str, Any]) -> torch.Tensor:
    return torch.full(node.meta["val"].shape, a["fill_value"], dtype=node.meta["val"].dtype)


@converts(_aten.copy.default)
def _copy(b: Builder, node: Node, a: dict[str, Any]) -> Value | torch.Tensor:
    """What is written over a tensor takes its place."""
    shape = node.meta["val"].shape
    if a["src"] in b.constants:
        return b.constant(a["src"]).expand(shape)
    if a["src"].meta["val"].shape == shape:
        return b.bound[a["src"]]
    advice = "It writes a tensor over a larger one. Expand it first: y.expand(...)."
    return _repeat(b, node, b.tensor(a["src"]), b.shape(node), advice)


@converts(_aten.cat.default, _aten.concat.default, _aten.concatenate.default)
def _cat(b: Builder, node: Node, a: dict[str, Any]) -> str:
    advice = "It joins along the batch. Choose another axis; 1 is the channels'."
    parts = [b.constants[t] if t in b.constants else b.tensor(t) for t in a["tensors"]]
    first = next(part for part in parts if isinstance(part, str))
    return _joined(b, node, parts, _axis(b, first, a["dim"], advice))


def _joined(
    b: Builder, node: Node, parts: Sequence[str | torch.Tensor], axis: int, name: str = ""
) -> str:
    """Tensors one behind the other; constants among them surround their neighbours.

    parts  tensors, and constants `[N, *sample shape]` that hold one value
    axis   of the sample
    name   of the join, where it is not the whole of the operation
    """
    tensors: list[str] = []
    missing = 0, 0.0  # how much of which constant comes before the first tensor
    for part in parts:
        before, (waiting, value) = 0, missing
        if isinstance(part, str):
            if not waiting:
                tensors.append(part)
                continue
            source, before, after = part, waiting, 0
            missing = 0, 0.0
        else:
            first = float(part.flatten()[0])
            if bool((part != first).any()) or (waiting and first != value):
                raise UnsupportedError(
                    "A constant among what it joins holds more than one value. Leave it out: what "
                    "a layer makes of a constant is its bias."
                )
            value, length = first, part.shape[axis + 1]
            if not tensors:
                missing = waiting + length, value
                continue
            source, after = tensors.pop(), length
        rank = len(b.tensors[source].shape)
        if rank > MOST_AXES:
            raise UnsupportedError(_TOO_MANY_AXES.format(rank))
        ends = [(before, after) if i == axis else (0, 0) for i in range(rank)]
        size = b.tensors[source].shape
        padded = (*size[:axis], size[axis] + before + after, *size[axis + 1 :])
        pad = Pad(b.unique(f"{b.base(node)}.pad"), (source,), tuple(sum(ends, ())), float(value))
        tensors.append(b.emit(node, pad, padded))
    if len(tensors) == 1:
        return tensors[0]
    shapes = [b.tensors[tensor].shape for tensor in tensors]
    joined = (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
    join = b.unique(f"{b.base(node)}.{name}") if name else b.name(node)
    return b.emit(node, Concat(join, tuple(tensors), axis), joined)


@converts(_aten.stack.default)
def _stack(b: Builder, node: Node, a: dict[str, Any]) -> str:
    shape = b.shape(node)
    axis = a["dim"] % (len(shape) + 1) - 1
    if axis < 0:
        raise UnsupportedError("It stacks along the batch. Choose another axis.")
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    base = b.base(node)
    names = [b.tensor(t) for t in a["tensors"]]
    b.shared.update(name for name in names if names.count(name) > 1)
    inputs = tuple(b.reshape(node, f"{base}.reshape", name, one) for name in names)
    return b.emit(node, Concat(b.name(node), inputs, axis), shape)


def _cut(b: Builder, node: Node, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    """Indices of one axis; the tensor itself where they are all of it."""
    shape = b.tensors[x].shape
    if (start, stop, step) == (0, shape[axis], 1):
        return x
    length = math.ceil((stop - start) / step)
    result = (*shape[:axis], length, *shape[axis + 1 :])
    return b.emit(node, Slice(b.name(node), (x,), axis, start, stop, step), result)


_BATCH = "It takes single samples out of the batch. Index the other axes: x[:, ...]."


@converts(_aten.slice.Tensor)
def _slice(b: Builder, node: Node, a: dict[str, Any]) -> Value:
    x = b.tensor(a["self"])
    dim = a["dim"] % (len(b.tensors[x].shape) + 1)
    if dim == 0 and b.sample(node.meta["val"]) == b.tensors[x].shape:
        return b.bound[a["self"]]
    axis = _axis(b, x, dim, _BATCH)
    size = b.tensors[x].shape[axis]
    start, stop, _ = slice(a["start"], a["end"]).indices(size)
    if start >= stop:
        raise UnsupportedError("It takes nothing: the slice is empty. Leave it out.")
    return _cut(b, node, x, axis, start, stop, a["step"])


@converts(_aten.narrow.default)
def _narrow(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    axis = _axis(b, x, a["dim"], _BATCH)
    start = a["start"] % b.tensors[x].shape[axis]
    return _cut(b, node, x, axis, start, start + a["length"])


@converts(_aten.select.int)
def _select(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    axis = _axis(b, x, a["dim"], _BATCH)
    index = a["index"] % b.tensors[x].shape[axis]
    part = _cut(b, node, x, axis, index, index + 1)
    return b.reshape(node, f"{b.base(node)}.reshape", part, b.shape(node))


@converts(
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.split.sizes,
    _aten.chunk.default,
    _aten.tensor_split.sections,
    _aten.unbind.int,
)
def _split(b: Builder, node: Node, a: dict[str, Any]) -> Parts:
    """One slice per part that somebody reads."""
    x = b.tensor(a["self"])
    axis = _axis(b, x, a["dim"], _BATCH)
    used = {user.args[1] for user in node.users}
    if len(used) > 1:
        b.shared.add(x)
    parts: dict[int, str] = {}
    start = 0
    for i, value in enumerate(node.meta["val"]):
        unbound = node.target is _aten.unbind.int
        length = 1 if unbound else b.sample(value)[axis]
        if i in used:
            parts[i] = _cut(b, node, x, axis, start, start + length)
            if unbound:
                base = f"{b.base(node)}.reshape"
                parts[i] = b.reshape(node, base, parts[i], b.sample(value))
        start += length
    return parts


def _take(b: Builder, node: Node, x: str, axis: int, positions: Sequence[int]) -> str:
    """Positions along an axis in any order, any number of times: slices, joined.

    A slice takes positions that ascend by one, or one position, which is then repeated. More than
    `MOST_RUNS` of them are a product with a matrix that holds a 1 in each row.
    """
    shape = b.tensors[x].shape
    runs: list[list[int]] = []
    for position in positions:
        run = runs[-1] if runs else []
        step = position - run[-1] if run else None
        if step in (0, 1) and (len(run) == 1 or step == run[1] - run[0]):
            run.append(position)
        else:
            runs.append([position])
    if len(runs) > MOST_RUNS:
        if len(positions) * shape[axis] > MOST_WEIGHTS:
            raise UnsupportedError(
                f"It takes {len(positions):,} of {shape[axis]:,} positions in an order that takes "
                "a weight for each pair: too many. Reorder the weights around it instead."
            )
        return along(b, node, x, axis, torch.eye(shape[axis])[list(positions)])
    if len(runs) > 1:
        b.shared.add(x)
    parts: list[str | torch.Tensor] = []
    for run in runs:
        repeated = len(run) > 1 and run[0] == run[1]
        part = _cut(b, node, x, axis, run[0], run[-1] + 1)
        if repeated:
            result = (*shape[:axis], len(run), *shape[axis + 1 :])
            part = _repeat(b, node, part, result, "")
        parts.append(part)
    return _joined(b, node, parts, axis, "join")


@converts(_aten.flip.default)
def _flip(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    for dim in a["dims"]:
        axis = _axis(b, x, dim, "It reverses the batch. Name other axes: x.flip(3).")
        x = _take(b, node, x, axis, range(b.tensors[x].shape[axis])[::-1])
    return x


@converts(_aten.roll.default)
def _roll(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    for shift, dim in zip(a["shifts"], a["dims"] or [0], strict=True):
        axis = _axis(b, x, dim, "It moves the batch. Name another axis: torch.roll(x, 1, 2).")
        size = b.tensors[x].shape[axis]
        x = _take(b, node, x, axis, [(i - shift) % size for i in range(size)])
    return x


@converts(_aten.repeat.default)
def _repeat_tensor(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, (batch, *counts) = b.tensor(a["self"]), a["repeats"]
    if batch != 1 or len(counts) != len(b.tensors[x].shape):
        raise UnsupportedError(
            "It repeats the batch, or adds axes. Give one number for each axis, 1 for the batch: "
            "x.repeat(1, 2, 1, 1)."
        )
    for axis, (count, size) in enumerate(zip(counts, b.tensors[x].shape, strict=True)):
        x = _take(b, node, x, axis, [*range(size)] * count)
    return x


@converts(_aten.index_select.default)
def _index_select(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    return _take(b, node, x, _axis(b, x, a["dim"], _BATCH), b.constant(a["index"]).tolist())


@converts(_aten.index.Tensor)
def _index(b: Builder, node: Node, a: dict[str, Any]) -> str:
    given = [dim for dim, index in enumerate(a["indices"]) if index is not None]
    x = b.tensor(a["self"])
    positions = a["indices"][given[0]]
    if len(given) > 1 or positions not in b.constants or positions.meta["val"].ndim != 1:
        raise UnsupportedError(
            "It picks values by indices that are computed from the input, or along several axes at "
            "once. Index one axis after the other, by numbers that are known: x[:, [2, 0, 1]]."
        )
    axis = _axis(b, x, given[0], _BATCH)
    return _take(b, node, x, axis, (b.constants[positions] % b.tensors[x].shape[axis]).tolist())


@converts(_aten.slice_scatter.default)
def _slice_scatter(b: Builder, node: Node, a: dict[str, Any]) -> str:
    if a["step"] != 1:
        raise UnsupportedError(
            "It writes into every other position. Write torch.stack((x, y), 3).flatten(2), or use "
            "nn.PixelShuffle."
        )
    size = node.meta["val"].shape[a["dim"]]
    start, stop, _ = slice(a["start"], a["end"]).indices(size)
    new = a["src"]
    part = b.constants[new] if new in b.constants else b.tensor(new)
    return _overwritten(b, node, a["self"], a["dim"], start, stop, part)


@converts(_aten.select_scatter.default)
def _select_scatter(b: Builder, node: Node, a: dict[str, Any]) -> str:
    value, new, base = node.meta["val"], a["src"], b.base(node)
    index = a["index"] % value.shape[a["dim"]]
    part: str | torch.Tensor
    if new in b.constants:
        part = b.constants[new].unsqueeze(a["dim"])
    else:
        shape = b.sample(value.narrow(a["dim"], index, 1))
        part = b.reshape(node, f"{base}.reshape", b.tensor(new), shape)
    return _overwritten(b, node, a["self"], a["dim"], index, index + 1, part)


def _overwritten(
    b: Builder, node: Node, old: Node, dim: int, start: int, stop: int, new: str | torch.Tensor
) -> str:
    """A tensor of which a part along an axis was overwritten: what is before it, it, the rest."""
    shape = b.sample(node.meta["val"])
    axis = dim % (len(shape) + 1) - 1
    if axis < 0:
        if isinstance(new, str) and b.tensors[new].shape == shape and start == 0:
            return new
        raise UnsupportedError("It writes into single samples. Write to all: x[:, ...] = y.")
    parts: list[str | torch.Tensor] = [new]
    for first, last in ((0, start), (stop, shape[axis])):
        if first == last:
            continue
        if old in b.constants:
            rest: str | torch.Tensor = b.constants[old].narrow(axis + 1, first, last - first)
        else:
            x = b.tensor(old)
            b.shared.add(x)
            rest = _cut(b, node, x, axis, first, last)
        parts.insert(len(parts) if first else 0, rest)
    return _joined(b, node, parts, axis, "join")


# -- more elements ---------------------------------------------------------------------------------


_TOO_MANY_AXES = f"It pads samples of {{}} axes, more than {MOST_AXES}. Pad under another view."


@converts(_aten.constant_pad_nd.default, _aten.pad.default)
def _pad(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, shape = b.tensor(a["self"]), b.shape(node)
    widths, value = list(a["pad"]), float(a["value"] or 0)
    if a.get("mode", "constant") != "constant":
        return _pad_with_values(b, node, x, widths, a["mode"])
    widths += [0] * (2 * len(shape) - len(widths))
    if len(widths) > 2 * len(shape):
        raise UnsupportedError(
            "It pads the batch, which must stay as it is. Give widths for the other axes alone."
        )
    if math.isnan(value):
        raise UnsupportedError("It pads with NaN, which no code stands for. Pad with a number.")
    if len(shape) > MOST_AXES:
        raise UnsupportedError(_TOO_MANY_AXES.format(len(shape)))
    # torch begins with the last axis.
    pairs = [(widths[2 * i], widths[2 * i + 1]) for i in range(len(shape))][::-1]
    for axis, (before, after) in enumerate(pairs):
        size = b.tensors[x].shape[axis]
        if before < 0 or after < 0:
            x = _cut(b, node, x, axis, max(0, -before), size - max(0, -after))
    pairs = [(max(0, before), max(0, after)) for before, after in pairs]
    if not any(map(any, pairs)):
        return x
    padding = tuple(n for both in pairs for n in both)
    return b.emit(node, Pad(b.name(node), (x,), padding, value), shape)


def _pad_with_values(b: Builder, node: Node, x: str, widths: Sequence[int], mode: str) -> str:
    """Padding with the tensor's own values: what each position shows is known beforehand."""
    for i in range(len(widths) // 2):  # torch begins with the last axis
        axis = len(b.tensors[x].shape) - 1 - i
        size, positions = b.tensors[x].shape[axis], []
        for position in range(-widths[2 * i], b.tensors[x].shape[axis] + widths[2 * i + 1]):
            if mode == "circular":
                positions.append(position % size)
            elif mode == "replicate":
                positions.append(min(max(position, 0), size - 1))
            else:  # "reflect", by less than the size, so at one end at most
                positions.append(size - 1 - abs(size - 1 - abs(position)))
        x = _take(b, node, x, axis, positions)
    return x


def _repeat(b: Builder, node: Node, x: str, shape: Shape, advice: str) -> str:
    given = b.tensors[x].shape
    if shape == given:
        return x
    if len(shape) != len(given) or any(n % m for n, m in zip(shape, given, strict=True)):
        raise UnsupportedError(advice)
    factors = tuple(n // m for n, m in zip(shape, given, strict=True))
    return b.emit(node, Upsample(b.name(node), (x,), factors), shape)


@converts(
    _aten.upsample_nearest2d.vec,
    _aten.upsample_nearest2d.default,
    _aten.upsample_nearest1d.vec,
    _aten.upsample_nearest1d.default,
    _aten._upsample_nearest_exact2d.vec,
    _aten._upsample_nearest_exact1d.vec,
    _aten.upsample_linear1d.vec,
    _aten.upsample_linear1d.default,
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_bilinear2d.default,
    _aten.upsample_bicubic2d.vec,
    _aten.upsample_bicubic2d.default,
    _aten._upsample_bilinear2d_aa.vec,
    _aten._upsample_bilinear2d_aa.default,
    _aten._upsample_bicubic2d_aa.vec,
    _aten._upsample_bicubic2d_aa.default,
)
def _resize(b: Builder, node: Node, a: dict[str, Any]) -> str:
    """Moved codes where every value is repeated equally often; else a matrix product per axis."""
    x = b.tensor(a.get("input", a.get("self")))
    wanted = b.shape(node)
    matrices = [_weights(node, b.tensors[x].shape, axis) for axis in range(1, len(wanted))]
    if all(torch.equal(m, _repetition(*m.shape)) for m in matrices):
        return _repeat(b, node, x, wanted, "")
    for axis, matrix in reversed(list(enumerate(matrices, 1))):
        results, size = matrix.shape
        if torch.equal(matrix, torch.eye(size)):
            continue
        if matrix.numel() > MOST_WEIGHTS:
            raise UnsupportedError(
                f"It resizes {size:,} positions to {results:,}, which takes a weight for each "
                "pair: too many. Take mode='nearest' with a whole scale_factor, and train again."
            )
        x = along(b, node, x, axis, matrix)
    return x


def _repetition(results: int, size: int) -> torch.Tensor:
    """The matrix that repeats each of `size` values equally often, where that is possible."""
    return torch.eye(size).repeat_interleave(max(1, results // size), dim=0)


def _weights(node: Node, shape: Shape, axis: int) -> torch.Tensor:
    """What each position along an axis takes from those before: float32 `[after, before]`.

    torch is asked, column by column, as the positions follow a scale_factor that is given, not the
    sizes alone. Resizing does one axis after the other, so the others may be constant.
    """
    target: Any = node.target
    keywords = {key: value for key, value in node.kwargs.items() if key not in ("input", "self")}
    columns = []
    for i in range(shape[axis]):
        x = torch.zeros(1, 1, *shape[1:])
        x.select(axis + 1, i).fill_(1)
        y = target(x, *node.args[1:], **keywords)
        columns.append(y.movedim(axis + 1, -1).reshape(-1, y.shape[axis + 1])[0])
    return torch.stack(columns, dim=1)


@converts(_aten.expand.default)
def _expand(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, shape = b.tensor(a["self"]), b.shape(node)
    if len(shape) != len(b.tensors[x].shape):
        raise UnsupportedError("It expands to more axes. Add them first: x[:, :, None, None].")
    return _repeat(
        b,
        node,
        x,
        shape,
        "It repeats an axis that is longer than 1. Write torch.cat([x, x], axis).",
    )
