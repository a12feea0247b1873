"""Cross-layer equalization: the channels of a tensor are scaled to ranges that are more alike.

M. Nagel et al.: Data-Free Quantization Through Weight Equalization and Bias Correction (2019).
What scales a channel of a tensor down in the layers that make it, and up in those that read it,
leaves the function as it is, as long as everything between is homogeneous: f(s x) = s f(x), s > 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from intact.errors import CalibrationError
from intact.network import Network
from intact.ops import (
    Add,
    AvgPool2d,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Op,
    Requantize,
    Reshape,
    weighted,
)
from intact.sketch import Sketch

__all__ = ["equalize", "has_depthwise"]

Float64 = npt.NDArray[np.float64]

LEAST = 2.0**-10
"""Of a channel's range, as a part of its tensor's: one that is narrower is dead, and stays."""


def equalize(network: Network, sketches: Mapping[str, Sketch]) -> Network:
    """The same function, with the channels of its tensors scaled; calibrate it anew.

    network   as it was captured, before `align`
    sketches  tensor -> `Sketch` of this network, whose extremes per channel are what counts
    returns   a network whose results are those of `network` up to float rounding, for data that
              exceeds no channel's extremes

    Channels are divided by `s = sqrt(a / max(a))`, `a` their largest magnitude: half of the way to
    equal ranges, as the layers that read them multiply their weights by `s`, and their ranges of
    weights grow apart by as much as those of the channels come together. Tensors whose channels
    belong together, such as operands and result of an add, have one `s`, from the largest
    `a / max(a)` of them.

    A ReLU6 stays: as `s <= 1`, channels are scaled up at most, and `a / s <= max(a) <= 6`. A
    channel that never reached 6 is then cut at `6 s >= a` instead, in its old units: nothing on the
    data seen, and `sqrt(6 / a)` above its extreme on other data (where `max(a)` is 6).
    """
    parameters = dict(network.parameters)
    producers = {op.name: op for op in network.ops}
    for tensors in _classes(network):
        sources = [producers[t] for t in tensors if t in producers and weighted(producers[t])]
        readers = [op for op in network.ops if weighted(op) and op.inputs[0] in tensors]
        if not sources or not readers:
            continue
        scale = torch.from_numpy(_scale(tensors, sketches))
        for op in sources:
            for name in (f"{op.name}.weight", f"{op.name}.bias"):
                if name in parameters:
                    parameters[name] = _times(parameters[name], 1 / scale, axis=0)
        for op in readers:
            name = f"{op.name}.weight"
            axis = 0 if _depthwise(network, op) else 1
            parameters[name] = _times(parameters[name], scale, axis)
    return replace(network, parameters=parameters)


def has_depthwise(network: Network) -> bool:
    """Whether some convolution computes each channel from one channel alone."""
    return any(_depthwise(network, op) for op in network.ops)


def _depthwise(network: Network, op: Op) -> bool:
    if not isinstance(op, Conv2d) or op.groups == 1:
        return False
    channels, per_group, *_ = network.parameters[f"{op.name}.weight"].shape
    return per_group == 1 and channels == op.groups


def _classes(network: Network) -> Iterator[list[str]]:
    """Tensors whose channels can only be scaled together, class by class, if they can be at all."""
    parent = {name: name for name in network.tensors}

    def root(tensor: str) -> str:
        while parent[tensor] != tensor:
            tensor = parent[tensor]
        return tensor

    fixed = {*network.inputs, *network.outputs}
    for op in network.ops:
        tensors = (*op.inputs, op.name)
        before, after = network.tensors[op.inputs[0]], network.tensors[op.name]
        match op:
            case Conv2d():
                if op.groups > 1 and not _depthwise(network, op):
                    fixed.add(op.inputs[0])
            case Linear() if len(before.shape) == 1:
                pass
            case Add() | MaxPool2d() | AvgPool2d() | GlobalAvgPool() | Requantize():
                for tensor in tensors:
                    parent[root(tensor)] = root(op.name)
            case Reshape() if before.shape == (*after.shape, 1, 1):
                parent[root(op.inputs[0])] = root(op.name)
            case _:  # not homogeneous, or its channels are others: no scaling is always right
                fixed.update(tensors)
        if (after.low, after.high) != (-math.inf, math.inf) and not 0 == after.low < after.high:
            fixed.add(op.name)
    classes: dict[str, list[str]] = {}
    for tensor in network.tensors:
        classes.setdefault(root(tensor), []).append(tensor)
    pinned = {root(tensor) for tensor in fixed}
    return (tensors for name, tensors in classes.items() if name not in pinned)


def _scale(tensors: list[str], sketches: Mapping[str, Sketch]) -> Float64:
    """What the channels of a class are divided by: float64 [C] in (0, 1]."""
    parts = []
    for tensor in tensors:
        if tensor not in sketches:
            raise CalibrationError(f"tensor {tensor!r} has no Sketch: calibrate the same network.")
        sketch = sketches[tensor]
        reach = np.maximum(-sketch.channel_min, sketch.channel_max).astype(np.float64)
        parts.append(reach / (sketch.absmax or 1.0))
    part = np.max(parts, axis=0)
    scale: Float64 = np.sqrt(np.where(part < LEAST, 1.0, part))
    return scale


def _times(values: torch.Tensor, factors: torch.Tensor, axis: int) -> torch.Tensor:
    """Parameters times one float64 factor for each index of an axis, rounded to float32 once."""
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    product = values.detach().double() * factors.to(values.device).reshape(shape)
    return product.to(values.dtype)
