"""Programs of the blocks that known networks are made of, with weights by chance.

`BLOCKS` names functions from a seed to a program; all ops of `ops.py` occur in one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from intact.arithmetic import QParams, code_range, dequantize, grid_neighbours, quantize
from intact.ops import (
    Add,
    AvgPool2d,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Multiply,
    Pad,
    Permute,
    Reshape,
    Slice,
    Subtract,
    Table,
    Upsample,
)
from intact.program import Program
from strategies import Builder

INT8 = QParams((2.0**-4,))
UNIT = QParams((float(np.float32(1 / 255)),), -128)
"""Of a sigmoid's results."""


def hard_sigmoid(x: Any) -> Any:
    return np.clip(x / 6 + 0.5, 0, 1)


def hard_swish(x: Any) -> Any:
    return x * hard_sigmoid(x)


def tabulated(b: Builder, source: str, function: Callable[[Any], Any], grid: QParams) -> str:
    """A table of a function of real values, `[n]` to `[n]` or to a row for each channel."""
    given = b.grid(source)
    low, high = code_range(given.bits, given.signed)
    real = dequantize(np.arange(low, high + 1), given)
    name = b.new_name("table")
    b.parameters[f"{name}.table"] = np.atleast_2d(quantize(function(real), grid))
    return b.add(Table(name, (source,)), grid)


def multiplied(b: Builder, one: str, other: str, grid: QParams) -> str:
    name = b.new_name("multiply")
    quotient = b.grid(one).scale[0] * b.grid(other).scale[0] / grid.scale[0]
    b.parameters[f"{name}.multiplier"] = grid_neighbours([quotient], "dyadic", grid.bits)[0]
    return b.add(Multiply(name, (one, other)), grid)


def convolved(
    b: Builder, source: str, channels: int, grid: QParams = INT8, size: int = 1, **geometry: Any
) -> str:
    inside = b.shape(source)[0] // geometry.get("groups", 1)
    weight = b.rng.integers(-128, 128, (channels, inside, size, size)).astype(np.int8)
    bias = b.rng.integers(-2000, 2000, channels).astype(np.int32)
    op = Conv2d(b.new_name("conv"), (source,), **geometry)
    return b.weighted(op, weight, grid, bias=bias)


def squeeze_excitation(seed: int = 0) -> Program:
    """MobileNetV3: hard-swish behind a depthwise convolution, then channels times their gates."""
    b = Builder.start((8, 6, 5), INT8, seed)
    wide = convolved(b, "x", 16)
    deep = convolved(b, wide, 16, size=3, padding=(1, 1, 1, 1), groups=16)
    swished = tabulated(b, deep, hard_swish, QParams((2.0**-5,), -116))
    pooled = b.rescaled(GlobalAvgPool("pool", (swished,)), QParams((2.0**-6,), -116))
    squeezed = convolved(b, pooled, 4, QParams((2.0**-5,), -128))
    gates = tabulated(b, convolved(b, squeezed, 16), hard_sigmoid, UNIT)
    scaled = multiplied(b, swished, gates, QParams((2.0**-5,), -116))
    narrow = convolved(b, scaled, 8)
    b.add(Add("sum", (narrow, "x")), INT8)
    return b.finish()


def shuffle_unit(seed: int = 0) -> Program:
    """ShuffleNetV2: half of the channels go another way, then all are shuffled."""
    b = Builder.start((8, 5, 6), QParams((2.0**-4,), 4), seed)
    grid = b.grid("x")
    kept = b.add(Slice("kept", ("x",), 0, 0, 4), grid)
    way = convolved(b, b.add(Slice("changed", ("x",), 0, 4, 8), grid), 4, grid)
    way = convolved(b, way, 4, grid, size=3, padding=(1, 1, 1, 1), groups=4)
    both = b.add(Concat("both", (kept, convolved(b, way, 4, grid))), grid)
    pairs = b.add(Reshape("pairs", (both,), (2, 4, 5, 6)), grid)
    turned = b.add(Permute("turned", (pairs,), (1, 0, 2, 3)), grid)
    shuffled = b.add(Reshape("shuffled", (turned,), (8, 5, 6)), grid)
    odd = b.add(Slice("odd", (shuffled,), 0, 1, 8, 2), grid)
    convolved(b, odd, 4, size=3, groups=4, stride=(2, 2))
    return b.finish()


def enlarging(seed: int = 0) -> Program:
    """A decoder: nearest upsampling between convolutions, beside what comes from the encoder."""
    b = Builder.start((4, 6, 4), QParams((2.0**-4,), -18), seed)
    low = convolved(b, "x", 6, size=3, padding=(1, 1, 1, 1), stride=(2, 2))
    high = b.add(Upsample("double", (low,), (1, 2, 2)), INT8)
    skipped = b.add(Subtract("detail", (convolved(b, "x", 6), high)), INT8)
    both = b.add(Concat("both", (high, skipped)), INT8)
    deep = convolved(b, both, 12, size=3, padding=(1, 1, 1, 1), groups=12)
    wide = b.add(Upsample("uneven", (deep,), (1, 3, 1)), INT8)
    convolved(b, wide, 2, size=3)
    return b.finish()


def padded_pools(seed: int = 0) -> Program:
    """Constants around maps, with the least code and with others, then pools and a linear layer."""
    b = Builder.start((3, 7, 7), QParams((2.0**-4,), -4), seed)
    grid = b.grid("x")
    around = (0, 0, 1, 1, 0, 1)
    lowest = b.add(Pad("lowest", ("x",), around, -100.0), grid)
    largest = b.add(MaxPool2d("largest", (lowest,), (3, 3), (2, 2)), grid)
    ones = b.add(Pad("ones", (largest,), (1, 0, 1, 1, 1, 1), 1.0), grid)
    mean = b.rescaled(AvgPool2d("mean", (ones,), (2, 2), (1, 1)), INT8)
    deep = convolved(b, b.add(Pad("zeros", (mean,), around), INT8), 4, size=2, groups=4)
    weight = b.rng.integers(-128, 128, (5, b.shape(deep)[2])).astype(np.int8)
    b.weighted(Linear("rows", (deep,)), weight, INT8)
    return b.finish()


def prelu(seed: int = 0) -> Program:
    """A slope for every channel, behind a convolution and behind a linear layer."""
    b = Builder.start((3, 5, 5), INT8, seed)
    wide = convolved(b, "x", 6, size=3)
    slopes = b.rng.uniform(-1, 1, (6, 1))
    bent = tabulated(b, wide, lambda x: np.where(x < 0, slopes * x, x), QParams((2.0**-4,), 6))
    deep = convolved(b, bent, 6, size=3, groups=6)
    flat = b.add(Reshape("flat", (deep,), (6,)), INT8)
    weight = b.rng.integers(-128, 128, (7, 6)).astype(np.int8)
    unsigned = QParams((2.0**-3,), 128, 0, 255, signed=False)
    dense = b.weighted(Linear("fc", (flat,)), weight, unsigned)
    slopes = b.rng.uniform(-1, 1, (7, 1))
    tabulated(b, dense, lambda x: np.where(x < 0, slopes * x, x), QParams((2.0**-3,), -60))
    return b.finish()


BLOCKS: dict[str, Callable[[int], Program]] = {
    "squeeze and excitation": squeeze_excitation,
    "shuffle unit": shuffle_unit,
    "enlarging": enlarging,
    "padded pools": padded_pools,
    "prelu": prelu,
}
