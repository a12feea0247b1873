"""Converters of what has weights: convolutions of every kind, linear layers, batch norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from intact.capturing.building import Builder, UnsupportedError, converts
from intact.ops import Conv2d, Linear, Padding, Pair, Shape, Slice

__all__ = ["affine", "along", "as_image", "normalize", "pair"]

_aten = torch.ops.aten


def pair(value: Sequence[int]) -> Pair:
    """Height and width; one number is both."""
    return (value[0], value[-1])


def as_image(b: Builder, node: Node, x: str) -> tuple[str, Callable[[str], str]]:
    """A sample `[C, L]` as an image `[C, 1, L]`, and the way back for a result."""
    channels, length = b.tensors[x].shape

    def back(result: str) -> str:
        shape = b.tensors[result].shape
        return b.reshape(node, f"{b.base(node)}.reshape", result, (shape[0], *shape[2:]))

    return b.reshape(node, f"{b.base(node)}.image", x, (channels, 1, length)), back


# -- convolutions ----------------------------------------------------------------------------------


def _same(dilation: Sequence[int], kernel: Sequence[int]) -> Padding:
    """The padding that keeps the size, as torch does it: what is odd goes below and right."""
    excess = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    top, left = excess[0] // 2, excess[1] // 2
    return (top, excess[0] - top, left, excess[1] - left)


@converts(_aten.conv2d.default, _aten.conv2d.padding)
def _conv2d(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["input"], ndim=3)
    weight = b.constant(a["weight"])
    dilation = pair(a["dilation"])
    if a["padding"] == "same":
        padding = _same(dilation, weight.shape[2:])
    elif a["padding"] == "valid":
        padding = (0, 0, 0, 0)
    else:
        top, left = pair(a["padding"])
        padding = (top, top, left, left)
    x, padding = b.absorb_padding(x, padding, 0.0)
    op = Conv2d(b.name(node), (x,), pair(a["stride"]), padding, dilation, a["groups"])
    return b.emit(node, op, b.shape(node), weight, b.optional(a["bias"]))


@converts(_aten.conv1d.default, _aten.conv1d.padding)
def _conv1d(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, back = as_image(b, node, b.tensor(a["input"], ndim=2))
    weight = b.constant(a["weight"]).unsqueeze(2)
    dilation = (1, a["dilation"][0])
    if a["padding"] == "same":
        padding = _same(dilation, weight.shape[2:])
    else:
        around = 0 if a["padding"] == "valid" else a["padding"][0]
        padding = (0, 0, around, around)
    x, padding = b.absorb_padding(x, padding, 0.0)
    channels, length = b.shape(node)
    op = Conv2d(b.name(node), (x,), (1, a["stride"][0]), padding, dilation, a["groups"])
    conv = b.emit(node, op, (channels, 1, length), weight, b.optional(a["bias"]))
    result = back(conv)
    b.layers[result] = (conv, 1)
    return result


@converts(_aten.conv_transpose2d.input)
def _conv_transpose2d(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["input"], ndim=3)
    return _transposed(b, node, a, x, b.constant(a["weight"]), b.shape(node))


@converts(_aten.conv_transpose1d.default)
def _conv_transpose1d(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, back = as_image(b, node, b.tensor(a["input"], ndim=2))
    channels, length = b.shape(node)
    a = {
        **a,
        "stride": (1, a["stride"][0]),
        "padding": (0, a["padding"][0]),
        "dilation": (1, a["dilation"][0]),
    }
    weight = b.constant(a["weight"]).unsqueeze(2)
    image = _transposed(b, node, a, x, weight, (channels, 1, length))
    result = back(image)
    b.layers[result] = b.layers.get(image, (image, 1))
    return result


def _transposed(
    b: Builder, node: Node, a: dict[str, Any], x: str, weight: torch.Tensor, shape: Shape
) -> str:
    """A transposed convolution as a convolution with a channel per phase of the result.

    Position `i` of the result, counted with the padding that is cut off, is phase `i % stride` of
    position `i // stride`: it sums `x[i // stride - m] * w[i % stride + stride * m]` over `m`. So a
    convolution with `stride**2` times as many channels and kernels of `kernel / stride` taps gives
    all phases, and moving them into place does the rest; no zeros are multiplied, but for a kernel
    that the stride does not divide. (Shi et al.: Is the deconvolution layer the same as a
    convolutional layer?, 2016.)
    """
    stride, cut, dilation = pair(a["stride"]), pair(a["padding"]), pair(a["dilation"])
    groups, size = a["groups"], b.tensors[x].shape[1:]
    inputs, per_group, kh, kw = weight.shape
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, (kh, kw), strict=True)]
    taps = [math.ceil(n / s) for n, s in zip(reach, stride, strict=True)]
    spread = weight.new_zeros(
        inputs, per_group, *(t * s for t, s in zip(taps, stride, strict=True))
    )
    spread[:, :, : reach[0] : dilation[0], : reach[1] : dilation[1]] = weight
    # [groups, C / g, O / g, taps, phases, taps, phases] -> [O, phases, phases, C / g, taps, taps]
    parts = spread.reshape(
        groups, inputs // groups, per_group, taps[0], stride[0], taps[1], stride[1]
    )
    kernel = parts.flip(3, 5).permute(0, 2, 4, 6, 1, 3, 5)
    kernel = kernel.reshape(-1, inputs // groups, *taps)
    before, after, rows, start = [], [], [], []
    for i in range(2):
        first = min(cut[i] // stride[i], taps[i] - 1)  # positions that are cut off altogether
        count = math.ceil((cut[i] + shape[1 + i]) / stride[i]) - first
        before.append(taps[i] - 1 - first)
        after.append(max(0, count + taps[i] - 1 - before[i] - size[i]))
        rows.append(size[i] + before[i] + after[i] - taps[i] + 1)
        start.append(cut[i] - first * stride[i])
    phases = stride[0] * stride[1]
    op = Conv2d(
        b.name(node), (x,), (1, 1), (before[0], after[0], before[1], after[1]), (1, 1), groups
    )
    bias = b.optional(a["bias"])
    bias = None if bias is None else bias.repeat_interleave(phases)
    channels = shape[0]
    conv = b.emit(node, op, (channels * phases, *rows), kernel, bias)
    base = b.base(node)
    result = conv
    if phases > 1:
        result = b.reshape(node, f"{base}.phases", conv, (channels, *stride, *rows))
        result = b.permute(node, f"{base}.interleave", result, (0, 3, 1, 4, 2))
        whole = (channels, rows[0] * stride[0], rows[1] * stride[1])
        result = b.reshape(node, f"{base}.reshape", result, whole)
    for i in range(2):
        have = b.tensors[result].shape
        if have[1 + i] != shape[1 + i]:
            cropped = (*have[: 1 + i], shape[1 + i], *have[2 + i :])
            crop = Slice(
                b.unique(f"{base}.crop"), (result,), 1 + i, start[i], start[i] + shape[1 + i]
            )
            result = b.emit(node, crop, cropped)
    b.layers[result] = (conv, phases)
    return result


@converts(_aten.linear.default)
def _linear(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x, weight = b.tensor(a["input"]), b.constant(a["weight"])
    if weight.ndim != 2:
        raise UnsupportedError(
            f"Its weight has {weight.ndim} dimension, not 2: [outputs, inputs]. Give it as "
            "weight[None], and take [:, 0] of the result."
        )
    op = Linear(b.name(node), (x,))
    return b.emit(node, op, b.shape(node), weight, b.optional(a["bias"]))


def along(b: Builder, node: Node, x: str, axis: int, matrix: torch.Tensor) -> str:
    """`matrix @ x` along one axis of the sample; matrix `[after, before]`."""
    base, order = b.base(node), list(range(len(b.tensors[x].shape)))
    order[axis], order[-1] = order[-1], order[axis]
    x = b.permute(node, f"{base}.permute", x, order)
    op = Linear(b.name(node), (x,))
    x = b.emit(node, op, (*b.tensors[x].shape[:-1], len(matrix)), matrix)
    return b.permute(node, f"{base}.permute", x, order)


_PRODUCT = (
    "It multiplies matrices that both depend on the input. Use nn.Linear or nn.Conv2d, whose "
    "weights are constants, and train again."
)


@converts(_aten.matmul.default, _aten.mm.default, _aten.bmm.default)
def _matmul(b: Builder, node: Node, a: dict[str, Any]) -> str:
    """A product with a constant matrix, on either side."""
    left, right = a["self"], a.get("other", a.get("mat2"))
    if right in b.constants and b.constants[right].ndim == 2:
        x = b.tensor(left)
        op = Linear(b.name(node), (x,))
        return b.emit(node, op, b.shape(node), b.constants[right].T)
    if left in b.constants and b.constants[left].ndim == 2:
        x = b.tensor(right)
        rank = len(b.tensors[x].shape)
        if rank > 1:
            return along(b, node, x, rank - 2, b.constants[left])
    if left in b.constants or right in b.constants:
        raise UnsupportedError(
            "It multiplies by a constant that is no matrix [inputs, outputs], or along the batch. "
            "Write x @ w with w of two dimensions; nn.Conv1d with groups has a matrix for each."
        )
    raise UnsupportedError(_PRODUCT)


@converts(_aten.addmm.default)
def _addmm(b: Builder, node: Node, a: dict[str, Any]) -> str:
    if a["mat2"] not in b.constants or a["self"] not in b.constants:
        raise UnsupportedError(_PRODUCT)
    x, bias = b.tensor(a["mat1"]), a["beta"] * b.constants[a["self"]]
    op = Linear(b.name(node), (x,))
    weight = a["alpha"] * b.constants[a["mat2"]].T
    return b.emit(node, op, b.shape(node), weight, bias.expand(1, len(weight))[0])


# -- factors and offsets ---------------------------------------------------------------------------


@converts(_aten._native_batch_norm_legit_no_training.default)
def normalize(b: Builder, node: Node, a: dict[str, Any]) -> str:
    """A norm by constant statistics: factors and offsets by channel."""
    x = b.tensor(a["input"])
    mean, variance = b.constant(a["running_mean"]), b.constant(a["running_var"])
    # y = (x - mean) * factor + beta, all in float64; rounded once, when the network is built.
    factor = (variance.double() + a["eps"]).rsqrt()
    gamma, beta = b.optional(a["weight"]), b.optional(a["bias"])
    if gamma is not None:
        factor = factor * gamma.double()
    offset = -mean.double() * factor
    if beta is not None:
        offset = offset + beta.double()
    return affine(b, node, x, factor, offset, 0)


def fold(
    b: Builder, x: str, factor: torch.Tensor, offset: torch.Tensor | None, axis: int | None
) -> bool:
    """`x * factor + offset` in the weights of the layer that computes `x`, if there is one.

    factor, offset  float64 `[C]`, or `[1]` with `axis` None
    axis            of the sample along which they differ
    """
    found = b.layer(x)
    if found is None:
        return False
    name, parts = found
    linear = isinstance(b.ops[name], Linear)
    if axis not in (None, len(b.tensors[x].shape) - 1 if linear else 0):
        return False
    weight = b.parameters[f"{name}.weight"].double()
    factor = factor.expand(len(weight) // parts).repeat_interleave(parts)
    bias = b.parameters.get(f"{name}.bias")
    b.parameters[f"{name}.weight"] = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    if bias is not None:
        b.parameters[f"{name}.bias"] = bias.double() * factor
    if offset is not None:
        offset = offset.expand(len(weight) // parts).repeat_interleave(parts)
        before = b.parameters.get(f"{name}.bias")
        b.parameters[f"{name}.bias"] = offset if before is None else before + offset
    return True


def affine(
    b: Builder, node: Node, x: str, factor: torch.Tensor, offset: torch.Tensor | None, axis: int
) -> str:
    """`x * factor + offset` along an axis of the sample: folded, or a depthwise 1x1 convolution.

    factor, offset  float64 `[C]`
    """
    if fold(b, x, factor, offset, axis):
        return x
    shape, name = b.tensors[x].shape, b.name(node)
    order = (axis, *(i for i in range(len(shape)) if i != axis))
    back = tuple(order.index(i) for i in range(len(shape)))
    x = b.permute(node, f"{name}.permute", x, order)
    moved = b.tensors[x].shape
    image = moved if len(shape) == 3 else (moved[0], math.prod(moved[1:]), 1)
    x = b.reshape(node, f"{name}.reshape", x, image)
    conv = Conv2d(name, (x,), groups=image[0])
    x = b.emit(node, conv, image, factor.reshape(-1, 1, 1, 1), offset)
    x = b.reshape(node, f"{name}.reshape", x, moved)
    return b.permute(node, f"{name}.permute", x, back)
