"""Converters of norms by the statistics of the sample at hand: layer, group, instance, RMS norm.

What divides by a standard deviation meets two difficulties at 8 bits. Deviations differ from
position to position, and where one is a tenth of the largest its square is a hundredth, less than
a code. And the reciprocal of what is nearly 0 is so large that it takes all codes of its grid. So
the division comes in two steps, after `d = x - mean(x)`:

    g = (mean(|d|) + sqrt(eps)) ** -0.5,   z = d * g
    y = z / sqrt(mean(z**2) + eps * g**2)

which is `d / sqrt(mean(d**2) + eps)` for every `g` there is. The first step makes deviations alike:
`z` has the square root of their spread, and its squares the spread itself. That `g` is rounded to a
code costs nothing, as the second step divides by what `z` came to be. Nor does either step have a
reciprocal that is out of all proportion where `d` is 0 throughout.

Of 96 channels with deviations that differ by position (lognormal, 0.4) as many as 25 dB are left,
as before with squares of `d` itself, which kept 24; but 6 dB where one position in 200 is constant,
here 25, and -2 dB where the deviations differ more (0.8), here 15. What is lost then is mostly the
rounding of `x`, of whose codes the positions with small deviations use only a few: 18 dB are left
of a float norm behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from intact.capturing.building import Builder, UnsupportedError, converts
from intact.capturing.layers import affine, normalize
from intact.ops import Add, Conv2d, GlobalAvgPool, Multiply, Shape, Subtract, Upsample
from intact.pointwise import Pointwise, X, call

__all__: list[str] = []

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm of an image `[C, H, W]`.

    groups   of adjacent channels, each of which has its own statistics
    spatial  whether statistics are over all positions, or of each position by itself
    centred  whether the mean is subtracted
    eps      what is added to the variance
    """

    groups: int
    spatial: bool
    centred: bool
    eps: float


@converts(_aten.group_norm.default)
def _group_norm(b: Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["input"])
    shape = b.tensors[x].shape
    channels, rest = shape[0], shape[1:]
    image = b.reshape(node, f"{b.base(node)}.image", x, _image(channels, rest))
    norm = _Norm(a["num_groups"], math.prod(rest) > 1, True, a["eps"])
    weight, bias = b.optional(a["weight"]), b.optional(a["bias"])
    result = _scaled(b, node, _normalized(b, node, image, norm), weight, bias)
    return b.reshape(node, f"{b.base(node)}.reshape", result, shape)


@converts(_aten.instance_norm.default)
def _instance_norm(b: Builder, node: Node, a: dict[str, Any]) -> str:
    if not a["use_input_stats"]:
        return normalize(b, node, a)
    groups = a["input"].meta["val"].shape[1]
    return _group_norm(b, node, {**a, "num_groups": groups})


@converts(_aten.layer_norm.default)
def _layer_norm(b: Builder, node: Node, a: dict[str, Any]) -> str:
    return _over_last(b, node, a, centred=True, eps=a["eps"])


@converts(_aten.rms_norm.default)
def _rms_norm(b: Builder, node: Node, a: dict[str, Any]) -> str:
    eps = torch.finfo(torch.float32).eps if a["eps"] is None else a["eps"]
    return _over_last(b, node, a, centred=False, eps=eps)


def _over_last(b: Builder, node: Node, a: dict[str, Any], *, centred: bool, eps: float) -> str:
    """A norm over the last axes: of each position of an image, or of whole images."""
    x, base = b.tensor(a["input"]), b.base(node)
    weight, bias = b.optional(a["weight"]), b.optional(a.get("bias"))
    shape, over = b.tensors[x].shape, len(a["normalized_shape"])
    if over > len(shape):
        raise UnsupportedError("It normalises over the batch, too. Name the axes of a sample.")
    if over == 1:
        last = len(shape) - 1
        x = b.permute(node, f"{base}.permute", x, (last, *range(last)))
        moved = b.tensors[x].shape
        x = b.reshape(node, f"{base}.image", x, _image(moved[0], moved[1:]))
        x = _normalized(b, node, x, _Norm(1, False, centred, eps))
        x = _scaled(b, node, x, weight, bias)
        x = b.reshape(node, f"{base}.reshape", x, moved)
        return b.permute(node, f"{base}.permute", x, (*range(1, len(shape)), 0))
    kept = shape[: len(shape) - over]
    whole = not kept  # then the first of the normalised axes may be one of channels
    channels, rest = (shape[0], shape[1:]) if whole else (math.prod(kept), shape[len(kept) :])
    factors = [_by_channel(c, whole=whole) for c in (weight, bias)]
    x = b.reshape(node, f"{base}.image", x, _image(channels, rest))
    x = _normalized(b, node, x, _Norm(1 if whole else channels, True, centred, eps))
    x = _scaled(b, node, x, *(None if f is None else f.expand(channels) for f in factors))
    return b.reshape(node, f"{base}.reshape", x, shape)


def _by_channel(constant: torch.Tensor | None, *, whole: bool) -> torch.Tensor | None:
    """Weight or bias of a norm over several axes, one value for all or one per channel."""
    if constant is None:
        return None
    rows = constant.flatten(1) if whole else constant.reshape(1, -1)
    if bool((rows != rows[:, :1]).any()):
        raise UnsupportedError(
            "Its weight or bias differs by position, not only by channel. Use nn.GroupNorm(1, C), "
            "which normalises over the same values, and train again."
        )
    return rows[:, 0]


def _image(channels: int, rest: Shape) -> Shape:
    """`[C, H, W]` for channels and any other axes."""
    if len(rest) == 2:
        return (channels, *rest)
    return (channels, 1, math.prod(rest))


def _scaled(
    b: Builder, node: Node, x: str, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> str:
    """`x * weight + bias` by channel."""
    if weight is None and bias is None:
        return x
    factor = torch.ones(b.tensors[x].shape[0]) if weight is None else weight
    return affine(b, node, x, factor.double(), None if bias is None else bias.double(), 0)


def _normalized(b: Builder, node: Node, x: str, norm: _Norm) -> str:
    """What a norm makes of an image before its weight and bias; see the module's docstring."""
    base, shape = b.base(node), b.tensors[x].shape
    count = shape[0] // norm.groups * (math.prod(shape[1:]) if norm.spatial else 1)
    if count == 1:
        raise UnsupportedError("It normalises single values, so its result is a constant.")

    def table(name: str, source: str, function: Pointwise, *, positive: bool = False) -> str:
        if positive:  # no code below 0 then, where the function may have no value
            b.clamp(source, 0.0, math.inf)
        return b.table(node, name, source, function)

    def mean(name: str, source: str) -> str:
        channels = shape[0]
        if norm.spatial:
            pool = GlobalAvgPool(b.unique(f"{base}.{name}"), (source,))
            source = b.emit(node, pool, (channels, 1, 1))
        members = channels // norm.groups
        if members == 1:
            return source
        conv = Conv2d(b.unique(f"{base}.{name}"), (source,), groups=norm.groups)
        weight = torch.full((norm.groups, members, 1, 1), 1 / members, dtype=torch.float64)
        return b.emit(node, conv, (norm.groups, *b.tensors[source].shape[1:]), weight)

    def repeated(name: str, source: str, wanted: Shape) -> str:
        given = b.tensors[source].shape
        if given == wanted:
            return source
        factors = tuple(n // m for n, m in zip(wanted, given, strict=True))
        return b.emit(node, Upsample(b.unique(f"{base}.{name}"), (source,), factors), wanted)

    def times(name: str, source: str, factor: str) -> str:
        groups, *rest = b.tensors[factor].shape
        if groups > 1:  # a product repeats single channels itself
            factor = repeated(f"{name}.expand", factor, (shape[0], *rest))
        op = Multiply(b.unique(f"{base}.{name}"), (source, factor))
        return b.emit(node, op, shape)

    difference = x
    if norm.centred:
        b.shared.add(x)
        centre = repeated("mean.expand", mean("mean", x), shape)
        op = Subtract(b.unique(f"{base}.centred"), (x, centre))
        difference = b.emit(node, op, shape)
    b.shared.add(difference)
    size = mean("size", table("abs", difference, call(_aten.abs.default, X)))
    around = call(_aten.add.Tensor, X, math.sqrt(norm.eps))
    gain = table("gain", size, call(_aten.rsqrt.default, around), positive=True)
    z = times("scaled", difference, gain)
    b.shared.update((gain, z))
    power = mean("power", table("square", z, call(_aten.square.default, X)))
    if norm.eps:
        square = call(_aten.square.default, X)
        rest = table("eps", gain, call(_aten.mul.Tensor, square, norm.eps))
        power = b.emit(
            node, Add(b.unique(f"{base}.variance"), (power, rest)), b.tensors[rest].shape
        )
    inverse = table("inverse", power, call(_aten.rsqrt.default, X), positive=True)
    return times("normalized", z, inverse)
