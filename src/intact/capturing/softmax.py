"""Converters of softmax and its logarithm, along any axis.

    d = x - max(x),   e = exp(d),   softmax = e * (1 / sum(e)),   log_softmax = d - log(sum(e))

No `d` is above 0, so that no `e` is above 1 and no sum below it: `e` and its sum have all their
codes where values matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from intact.capturing.building import Builder, UnsupportedError, converts
from intact.ops import GlobalAvgPool, MaxPool2d, Multiply, Subtract, Upsample
from intact.pointwise import X, call

__all__: list[str] = []

_aten = torch.ops.aten


@converts(_aten.softmax.int, _aten._softmax.default)
def _softmax(b: Builder, node: Node, a: dict[str, Any]) -> str:
    return _normalized(b, node, a, logarithm=False)


@converts(_aten.log_softmax.int, _aten._log_softmax.default)
def _log_softmax(b: Builder, node: Node, a: dict[str, Any]) -> str:
    return _normalized(b, node, a, logarithm=True)


def _normalized(b: Builder, node: Node, a: dict[str, Any], *, logarithm: bool) -> str:
    x, base = b.tensor(a["self"]), b.base(node)
    rank = len(b.tensors[x].shape)
    axis = a["dim"] % (rank + 1) - 1
    if axis < 0:
        raise UnsupportedError("It is over the samples of the batch. Name another axis: dim=1.")
    order = [*(i for i in range(rank) if i != axis), axis]
    x = b.permute(node, f"{base}.permute", x, order)
    moved = b.tensors[x].shape
    count, rows = moved[-1], math.prod(moved[:-1])
    image, single = (rows, 1, count), (rows, 1, 1)
    x = b.reshape(node, f"{base}.image", x, image)
    b.shared.add(x)

    def minus(name: str, left: str, right: str) -> str:
        expand = Upsample(b.unique(f"{base}.expand"), (right,), (1, 1, count))
        op = Subtract(b.unique(f"{base}.{name}"), (left, b.emit(node, expand, image)))
        return b.emit(node, op, image)

    largest = MaxPool2d(b.unique(f"{base}.max"), (x,), (1, count), (1, count))
    difference = minus("difference", x, b.emit(node, largest, single))
    exponential = b.table(node, "exp", difference, call(_aten.exp.default, X))
    pool = GlobalAvgPool(b.unique(f"{base}.mean"), (exponential,))
    mean = b.emit(node, pool, single)
    b.clamp(mean, 1 / count, math.inf)  # it holds a 1
    total = call(_aten.mul.Tensor, X, count)
    if logarithm:
        logarithms = b.table(node, "log", mean, call(_aten.log.default, total))
        result = minus("normalized", difference, logarithms)
    else:
        inverse = b.table(node, "inverse", mean, call(_aten.reciprocal.default, total))
        op = Multiply(b.unique(f"{base}.normalized"), (exponential, inverse))
        result = b.emit(node, op, image)
    result = b.reshape(node, f"{base}.reshape", result, moved)
    return b.permute(node, f"{base}.permute", result, [order.index(i) for i in range(rank)])
