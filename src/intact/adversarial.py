"""Input codes that look for trouble, and programs of one layer to run them on.

Random codes seldom put an accumulator on a boundary of rounding, and never at an end of its range:
a kernel that rounds half up or that saturates too early may pass millions of them. Here codes are
made for it. Everything follows from the program, its arithmetic and a seeded generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from intact.arithmetic import QParams, multiplier_value, requantize
from intact.ops import (
    Add,
    AvgPool2d,
    Conv2d,
    GlobalAvgPool,
    Linear,
    Multiply,
    Op,
    Permute,
    Requantize,
    Reshape,
    Shape,
    Slice,
    Subtract,
    Table,
)
from intact.program import Program, QTensor

__all__ = [
    "Accumulating",
    "Boundaries",
    "alone",
    "boundary_codes",
    "entries_of_all_codes",
    "extreme_codes",
    "products_of_all_codes",
    "random_codes",
    "structured_codes",
    "sums_of_all_codes",
]

Accumulating: TypeAlias = Conv2d | Linear | AvgPool2d | GlobalAvgPool | Requantize
"""The ops that `ops.accumulates` is true for, but for `Multiply`: of that all pairs of codes are
tried, which no search improves on."""

MOST_THRESHOLDS = 2**19
"""Of a layer, all its channels together; in a layer with more some are drawn."""
CHUNK_ELEMENTS = 2**21
"""Weights of the boundaries that are searched for at a time: bounds memory."""
CODES = 2**8
"""Most codes of a grid."""
STEPS = 128
"""Codes of a sum that the search adjusts one by one."""
TRIES = 48
"""Pairs of codes that the search then tries."""
SINGLED_OUT = 8
"""Channels that stand out, one at a time, in `structured_codes`."""

Codes: TypeAlias = npt.NDArray[Any]
Int64: TypeAlias = npt.NDArray[np.int64]


# -- programs of one layer -----------------------------------------------------------------------


def alone(program: Program, op: Accumulating | Table) -> Program:
    """The program that consists of this op alone, with its parameters, names and grids."""
    source = op.inputs[0]
    kinds = ("weight", "bias", "weight_scale", "multiplier", "table")
    names = (f"{op.name}.{kind}" for kind in kinds)
    return Program(
        (source,),
        (op.name,),
        (op,),
        {name: program.tensors[name] for name in (source, op.name)},
        {name: program.parameters[name] for name in names if name in program.parameters},
    )


def sums_of_all_codes(program: Program, op: Add | Subtract) -> tuple[Program, Codes]:
    """A program that adds or subtracts as this op does, and the one sample that asks it for every
    sum or difference.

    Row i of the sample holds code i. With its transpose, every pair of codes meets once.
    """
    grids = [program.tensors[name].qparams for name in op.inputs]
    grid = replace(grids[0], qmin=min(g.qmin for g in grids), qmax=max(g.qmax for g in grids))
    rows = np.arange(grid.qmin, grid.qmax + 1).astype(grid.dtype)
    shape = (1, len(rows), len(rows))
    source, turned = [name for name in ("rows", "columns", "codes") if name != op.name][:2]
    made = Program(
        (source,),
        (op.name,),
        (Permute(turned, (source,), (0, 2, 1)), replace(op, inputs=(source, turned))),
        {
            source: QTensor(shape, grid),
            turned: QTensor(shape, grid),
            op.name: QTensor(shape, program.tensors[op.name].qparams),
        },
        {},
    )
    return made, np.broadcast_to(rows[:, None], (1, *shape)).copy()


def products_of_all_codes(program: Program, op: Multiply) -> tuple[Program, Codes]:
    """A program that multiplies as this op does, and samples that ask it for every product.

    The operands have their own shapes, so that what repeats the second one is what runs. Their
    grids differ, and the program has one input: that holds numbers of codes, those of the first
    operand before those of the second, and tables make codes of them.
    """
    operands = [program.tensors[name] for name in op.inputs]
    sizes = [math.prod(operand.shape) for operand in operands]
    counts = [operand.qparams.qmax - operand.qparams.qmin + 1 for operand in operands]
    names = iter(name for name in _NAMES if name != op.name)
    source = next(names)
    number = QParams((1.0,), 0, 0, CODES - 1, signed=False)
    tensors = {source: QTensor((sum(sizes),), number), op.name: program.tensors[op.name]}
    ops: list[Op] = []
    parameters = {f"{op.name}.multiplier": program.parameters[f"{op.name}.multiplier"]}
    for operand, begin, end, count in zip(
        operands, (0, sizes[0]), (sizes[0], sum(sizes)), counts, strict=True
    ):
        part, code, shaped = next(names), next(names), next(names)
        ops += [
            Slice(part, (source,), 0, begin, end),
            Table(code, (part,)),
            Reshape(shaped, (code,), operand.shape),
        ]
        tensors[part] = QTensor((end - begin,), number)
        tensors[code] = QTensor((end - begin,), operand.qparams)
        tensors[shaped] = operand
        entries = operand.qparams.qmin + np.minimum(np.arange(CODES), count - 1)
        parameters[f"{code}.table"] = entries[None].astype(operand.qparams.dtype)
    ops.append(replace(op, inputs=(ops[2].name, ops[5].name)))
    made = Program((source,), (op.name,), tuple(ops), tensors, parameters)
    # Each element of the second operand meets `repeats` of the first: a block of so many codes.
    repeats = sizes[0] // sizes[1]
    blocks = -(-counts[0] // repeats)  # until the second code has met all first ones
    block = np.arange(-(-counts[1] * blocks // sizes[1]) * sizes[1]) % (counts[1] * blocks)
    first = (block % blocks * repeats)[:, None] + np.arange(repeats)
    place = np.arange(sizes[1]).reshape(operands[1].shape)
    meets = np.argsort(np.broadcast_to(place, operands[0].shape).reshape(-1), kind="stable")
    samples = np.empty((len(block) // sizes[1], sum(sizes)), np.uint8)
    samples[:, meets] = (first % counts[0]).reshape(len(samples), -1)
    samples[:, sizes[0] :] = (block // blocks).reshape(len(samples), -1)
    return made, samples


_NAMES = ("codes", "first", "second", "third", "fourth", "fifth", "sixth", "seventh")
"""Of the tensors of `products_of_all_codes`, and one to spare."""


def entries_of_all_codes(program: Program, op: Table) -> Codes:
    """Samples of a table's input that hold every code of its range at every index of axis 0."""
    source = program.tensors[op.inputs[0]]
    count = source.qparams.qmax - source.qparams.qmin + 1
    row = math.prod(source.shape[1:])
    samples = -(-count // row)
    codes = source.qparams.qmin + np.arange(samples * row) % count
    rows = codes.reshape(samples, 1, *source.shape[1:])
    shaped = np.broadcast_to(rows, (samples, *source.shape))
    return shaped.astype(source.qparams.dtype)


# -- any tensor ----------------------------------------------------------------------------------


def random_codes(tensor: QTensor, samples: int, rng: np.random.Generator) -> Codes:
    """Uniform over the code range, `[samples, *shape]`."""
    low, high = tensor.qparams.qmin, tensor.qparams.qmax
    codes = rng.integers(low, high + 1, (samples, *tensor.shape), np.int16)
    return codes.astype(tensor.qparams.dtype)


def structured_codes(tensor: QTensor) -> Codes:
    """Samples of extremes: `[N, *shape]`, N from 11 to 25.

    All at the lowest code, the highest, or the zero point; both alternating, from one position to
    the next and from one channel to the next; all codes in turn, up and down; and up to
    `SINGLED_OUT` channels at one end of the range while all others are at the other end.
    """
    grid, shape = tensor.qparams, tensor.shape
    low, high = grid.qmin, grid.qmax
    place = np.indices(shape).sum(axis=0) % 2
    channel = np.indices(shape)[0]
    ramp = np.arange(math.prod(shape)).reshape(shape) % (high - low + 1)
    zero = min(max(grid.zero_point, low), high)
    samples = [np.full(shape, code) for code in (low, high, zero)]
    samples += [np.where(place == phase, low, high) for phase in (0, 1)]
    samples += [np.where(channel % 2 == phase, low, high) for phase in (0, 1)]
    samples += [low + ramp, high - ramp]
    chosen = np.linspace(0, shape[0] - 1, min(shape[0], SINGLED_OUT)).round()
    for c in chosen:
        samples += [np.where(channel == c, *ends) for ends in ((high, low), (low, high))]
    return np.stack(samples).astype(grid.dtype)


# -- accumulators --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Samples for a layer whose accumulators stand where its codes change.

    codes         `[N, *input shape]` of the layer
    wanted        accumulators next to a boundary that were searched for
    hit           how many of them some place of `codes` has
    ties          how many of those are exactly half way between two codes
    out_of_reach  accumulators next to a boundary that no codes have: beyond what the weights reach,
                  or no multiple of their greatest common divisor
    where         int64 [hit, 4]: sample, channel, position in that channel, accumulator
    """

    codes: Codes
    wanted: int
    hit: int
    ties: int
    out_of_reach: int
    where: Int64


def boundary_codes(
    program: Program, op: Accumulating, samples: int, rng: np.random.Generator
) -> Boundaries:
    """Codes of a layer's input for which accumulators lie on both sides of boundaries.

    samples  most samples. Windows that do not overlap each hold a search of their own; where there
             are more boundaries than that, exact ties come first, then the ends of the code range,
             then others by chance

    A boundary is where the result's code changes: `acc * M` passes `k + 1/2`. It is found by
    bisection of `requantize` itself, for both kinds of multiplier. The accumulators next to it are
    then put together from codes: scaled to about the wanted sum, adjusted code by code from the
    largest weight to the smallest, and for the rest by pairs of codes.
    """
    layer = _Layer.of(program, op)
    targets = _targets(layer, rng)
    legal = layer.reaches(targets.channel, targets.accumulator)
    chosen = targets.take(np.flatnonzero(legal)[: layer.fields(samples)])
    sample, field = layer.place(chosen.channel)
    chosen, sample, field = (
        chosen.take(sample < samples),
        *(a[sample < samples] for a in (sample, field)),
    )
    codes = random_codes(layer.source, int(sample.max(initial=-1)) + 1, rng)
    channel, accumulator = chosen.channel, chosen.accumulator
    hit = np.zeros(len(channel), bool)
    for part in _chunks(len(channel), layer.weight.shape[1]):
        weight = layer.rows(channel[part], field[part])
        sums = accumulator[part] - layer.bias[channel[part]]
        centred, hit[part] = _sums_to(weight, sums, *layer.range, rng)
        layer.write(codes, sample[part], channel[part], field[part], centred)
    found = (sample[hit], channel[hit], layer.positions[field[hit]], accumulator[hit])
    return Boundaries(
        codes=codes,
        wanted=len(channel),
        hit=int(hit.sum()),
        ties=int((hit & chosen.tie).sum()),
        out_of_reach=int((~legal).sum()),
        where=np.stack(found, axis=1),
    )


def extreme_codes(
    program: Program, op: Accumulating, samples: int, rng: np.random.Generator
) -> Codes:
    """Codes of a layer's input that drive accumulators to both ends of their range.

    The largest code where a weight is positive and the smallest where it is negative, and the other
    way round, for every channel; at most `samples` samples.
    """
    layer = _Layer.of(program, op)
    channel = np.repeat(np.arange(len(layer.weight)), 2)
    upward = np.arange(len(channel)) % 2 == 0
    sample, field = layer.place(channel)
    codes = random_codes(layer.source, min(samples, int(sample.max()) + 1), rng)
    chosen = np.flatnonzero(sample < samples)
    low, high = layer.range
    for part in _chunks(len(chosen), layer.weight.shape[1]):
        these = chosen[part]
        weight = layer.rows(channel[these], field[these])
        up = (weight > 0) == upward[these, None]
        centred = np.where(weight == 0, rng.integers(low, high + 1, weight.shape), 0)
        centred = np.where(weight == 0, centred, np.where(up, high, low))
        layer.write(codes, sample[these], channel[these], field[these], centred)
    return codes


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(width, CODES))
    return (slice(i, i + step) for i in range(0, count, step))


@dataclass(frozen=True, eq=False)
class _Layer:
    """An op that accumulates, as sums of products over fields of its input.

    weight      int64 [O, K]; an average pool's and a requantization's are 1
    bias        int64 [O]
    multiplier  as stored, [O]
    taps        int64 [F, K]: per field, the place of each code among the flattened codes of one
                group; -1 where it is padding. The first `first` fields do not overlap, and neither
                do the others
    positions   int64 [F]: the place of each field's result among those of one channel
    groups      channels are divided evenly into groups that read codes of their own
    """

    source: QTensor
    target: QParams
    weight: Int64
    bias: Int64
    multiplier: Codes
    taps: Int64
    first: int
    positions: Int64
    groups: int

    @classmethod
    def of(cls, program: Program, op: Accumulating) -> _Layer:
        source, target = program.tensors[op.inputs[0]], program.tensors[op.name]
        groups, weight = 1, np.ones((1, 1), np.int64)
        match op:
            case Conv2d():
                stored = program.parameters[f"{op.name}.weight"]
                weight, groups = stored.reshape(len(stored), -1).astype(np.int64), op.groups
                fields = _windows(op, source.shape, target.shape, stored.shape)
            case Linear():
                weight = program.parameters[f"{op.name}.weight"].astype(np.int64)
                taps = np.arange(math.prod(source.shape)).reshape(-1, weight.shape[1])
                fields = [taps], [np.arange(len(taps))]
            case AvgPool2d():
                groups = source.shape[0]
                weight = np.ones((groups, math.prod(op.kernel)), np.int64)
                fields = _windows(op, source.shape, target.shape, (groups, 1, *op.kernel))
            case GlobalAvgPool():
                groups = source.shape[0]
                weight = np.ones((groups, math.prod(source.shape[1:])), np.int64)
                fields = [np.arange(weight.shape[1])[None]], [np.zeros(1, np.int64)]
            case Requantize():
                taps = np.arange(math.prod(source.shape))[:, None]
                fields = [taps], [taps[:, 0]]
            case _:
                assert_never(op)
        bias = program.parameters.get(f"{op.name}.bias", np.zeros(len(weight), np.int32))
        multiplier = program.parameters[f"{op.name}.multiplier"]
        return cls(
            source,
            target.qparams,
            weight,
            bias.astype(np.int64),
            np.broadcast_to(multiplier, len(weight)),
            np.concatenate(fields[0]),
            len(fields[0][0]),
            np.concatenate(fields[1]),
            groups,
        )

    @property
    def range(self) -> tuple[int, int]:
        """The lowest and highest `q - zero_point` of the input."""
        grid = self.source.qparams
        return grid.qmin - grid.zero_point, grid.qmax - grid.zero_point

    def reaches(self, channel: Int64, accumulator: Int64) -> npt.NDArray[np.bool_]:
        """Whether a sum of products, and the bias, can be this; False where it cannot."""
        low, high = self.range
        if (self.taps < 0).any():  # padding adds 0, which the code range may leave out
            low, high = min(low, 0), max(high, 0)
        up, down = np.maximum(self.weight, 0).sum(axis=1), np.minimum(self.weight, 0).sum(axis=1)
        lowest, highest = up * low + down * high, up * high + down * low
        divisor = np.maximum(np.gcd.reduce(self.weight, axis=1), 1)
        sums = accumulator - self.bias[channel]
        within = (lowest[channel] <= sums) & (sums <= highest[channel])
        return np.asarray(within & (sums % divisor[channel] == 0))

    def fields(self, samples: int) -> int:
        """How many sums find a place in so many samples, if their channels are spread evenly."""
        return max(1, len(self.taps) * samples // self.parts) * self.groups

    @property
    def parts(self) -> int:
        """Into how many sets of fields that do not overlap `taps` is divided."""
        return 1 if len(self.taps) == self.first else 2

    def place(self, channel: Int64) -> tuple[Int64, Int64]:
        """For sums of these channels, in this order, a sample and a field each; none twice.

        Samples alternate between the fields before `first` and those after.
        """
        rank = _ranks(channel // (len(self.weight) // self.groups))
        fields = len(self.taps)
        field = rank % fields
        return self.parts * (rank // fields) + (field >= self.first), field

    def rows(self, channel: Int64, field: Int64) -> Int64:
        """The weights [T, K] that sums have; 0 where a field lies in the padding."""
        return np.where(self.taps[field] >= 0, self.weight[channel], 0)

    def write(
        self, codes: Codes, sample: Int64, channel: Int64, field: Int64, centred: Int64
    ) -> None:
        """Put `q - zero_point` [T, K] into the fields of the samples."""
        group = channel // (len(self.weight) // self.groups)
        size = math.prod(self.source.shape) // self.groups
        taps = self.taps[field]
        inside = taps >= 0
        place = np.where(inside, taps + (group * size + sample * size * self.groups)[:, None], 0)
        codes.reshape(-1)[place[inside]] = (centred + self.source.qparams.zero_point)[inside]


def _ranks(group: Int64) -> Int64:
    """Per item, how many of those before it are of its group."""
    order = np.argsort(group, kind="stable")
    counts = np.bincount(group)
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def _windows(
    op: Conv2d | AvgPool2d, source: Shape, target: Shape, weight: Shape
) -> tuple[list[Int64], list[Int64]]:
    """Taps and positions of windows that do not overlap: from the first one on, from the last.

    Where some windows lie within the input, only those; so a sum has all its weights.
    """
    dilation = op.dilation if isinstance(op, Conv2d) else (1, 1)
    kernel, begin = weight[2:], op.padding[0::2]
    taps, positions = [], []
    for backward in (False, True):
        axes, chosen = [], []
        for axis in range(2):
            reach = dilation[axis] * (kernel[axis] - 1) + 1
            starts = np.arange(target[1 + axis]) * op.stride[axis] - begin[axis]
            whole = np.flatnonzero((starts >= 0) & (starts + reach <= source[1 + axis]))
            able = whole if len(whole) else np.arange(len(starts))
            step = -(-reach // op.stride[axis])
            outputs = np.sort(able[::-step]) if backward else able[::step]
            chosen.append(outputs)
            axes.append(starts[outputs][:, None] + np.arange(kernel[axis]) * dilation[axis])
        y, x = axes
        inside = ((y >= 0) & (y < source[1]))[:, None, :, None]
        inside = inside & ((x >= 0) & (x < source[2]))[None, :, None, :]
        plane = y[:, None, :, None] * source[2] + x[None, :, None, :]
        channels = np.arange(weight[1])[:, None, None] * (source[1] * source[2])
        places = np.where(inside[:, :, None], plane[:, :, None] + channels, -1)
        taps.append(places.reshape(places.shape[0] * places.shape[1], -1))
        positions.append((chosen[0][:, None] * target[2] + chosen[1]).reshape(-1))
    if np.array_equal(taps[0], taps[1]):
        return taps[:1], positions[:1]
    return taps, positions


@dataclass(frozen=True, eq=False)
class _Targets:
    """Accumulators that are worth a search, and whether each is half way between two codes."""

    channel: Int64
    accumulator: Int64
    tie: npt.NDArray[np.bool_]

    def take(self, index: npt.NDArray[Any]) -> _Targets:
        return _Targets(self.channel[index], self.accumulator[index], self.tie[index])


def _targets(layer: _Layer, rng: np.random.Generator) -> _Targets:
    """The accumulators on both sides of boundaries, the most important ones first."""
    channels, grid = len(layer.weight), layer.target
    codes = np.arange(grid.qmin, grid.qmax)
    most = max(2, MOST_THRESHOLDS // channels)
    if len(codes) > most:
        codes = np.union1d(codes[[0, -1]], rng.choice(codes, most, replace=False))
    channel, code = np.repeat(np.arange(channels), len(codes)), np.tile(codes, channels)
    above = _thresholds(layer, channel, code)
    there = (above > -(2**31)) & (above < 2**31)
    channel, code = np.tile(channel[there], 2), np.tile(code[there], 2)
    accumulator = np.concatenate([above[there] - 1, above[there]])
    # A product of two float32 numbers is exact in float64.
    exact = multiplier_value(layer.multiplier, grid.bits)[channel].astype(np.float64)
    exact *= accumulator.astype(np.float32)
    tie = exact - np.floor(exact) == 0.5
    end = (code == grid.qmin) | (code == grid.qmax - 1)
    importance = np.where(tie, 0, np.where(end, 1, 2)) + rng.random(len(tie))
    order = np.lexsort((importance, accumulator, channel))
    # With a multiplier above 1/2 an accumulator is next to several boundaries: it counts once.
    new = np.diff(np.stack([channel, accumulator])[:, order], prepend=-1).any(axis=0)
    order = order[new]
    # Channel by channel in turn, so that each gets its share of what there is room for.
    order = order[np.lexsort((importance[order], channel[order]))]
    order = order[np.lexsort((channel[order], _ranks(channel[order])))]
    return _Targets(channel, accumulator, tie).take(order)


def _thresholds(layer: _Layer, channel: Int64, code: Int64) -> Int64:
    """Per channel and code, the smallest accumulator whose code is larger.

    Searched for in all int32 values. A code that does not change among them gives 2**31, or no
    more than -2**31.
    """
    below = np.full(len(channel), -(2**31) - 1, np.int64)
    above = np.full(len(channel), 2**31, np.int64)
    multiplier = layer.multiplier[channel]
    while (gap := above - below).max(initial=0) > 1:
        middle = below + gap // 2
        larger = requantize(middle, multiplier, layer.target).astype(np.int64) > code
        above, below = np.where(larger, middle, above), np.where(larger, below, middle)
    return above


def _sums_to(
    weight: Int64, wanted: Int64, low: int, high: int, rng: np.random.Generator
) -> tuple[Int64, npt.NDArray[np.bool_]]:
    """Numbers `x` [T, K] within `[low, high]` whose products with `weight` [T, K] add to `wanted`.

    Also returns for which rows that was achieved.
    """
    x = rng.integers(low, high + 1, weight.shape)
    missing = wanted - (weight * x).sum(axis=1)
    # Towards the end of the range by the share that is missing.
    up = (weight > 0) == (missing > 0)[:, None]
    way = np.where(weight == 0, 0, np.where(up, high, low) - x)
    most = (weight * way).sum(axis=1)
    share = np.clip(missing / np.where(most == 0, 1, most), 0, 1)
    x += np.rint(way * share[:, None]).astype(np.int64)
    missing = wanted - (weight * x).sum(axis=1)
    missing = _adjust(weight, x, missing, low, high)
    if weight.shape[1] > 1:
        for _ in range(TRIES):
            open_ = np.flatnonzero(missing)
            if not len(open_):
                break
            rows, left = x[open_], missing[open_]
            _try_pairs(weight[open_], rows, left, low, high, rng)
            x[open_], missing[open_] = rows, left
    return x, missing == 0


def _adjust(weight: Int64, x: Int64, missing: Int64, low: int, high: int) -> Int64:
    """Change codes one after the other, largest weights first; returns what is still missing."""
    rows = np.arange(len(weight))
    size = np.abs(weight)
    order = np.argsort(-size, axis=1, kind="stable")
    used = (size > 0).sum(axis=1)  # zeros stand last
    for step in range(min(STEPS, weight.shape[1])):
        column = order[rows, np.maximum(used - min(STEPS, weight.shape[1]) + step, 0)]
        w, before = weight[rows, column], x[rows, column]
        steps = np.sign(missing) * np.sign(w) * (np.abs(missing) // np.maximum(np.abs(w), 1))
        after = np.clip(before + steps, low, high)
        x[rows, column] = after
        missing = missing - (after - before) * w
    return missing


def _try_pairs(
    weight: Int64, x: Int64, missing: Int64, low: int, high: int, rng: np.random.Generator
) -> None:
    """Choose two codes of each row at random and set them so that nothing is missing, if possible.

    In place. All values of the first code are tried; the second then has one at most.
    """
    rows = np.arange(len(weight))
    chances = rng.random(weight.shape) * (weight != 0)
    first = chances.argmax(axis=1)
    chances[rows, first] = -1
    second = chances.argmax(axis=1)
    a, b = weight[rows, first], weight[rows, second]
    rest = missing + a * x[rows, first] + b * x[rows, second]
    values = np.arange(low, high + 1)
    left = rest[:, None] - a[:, None] * values
    divisor = np.where(b == 0, 1, b)[:, None]
    partner = left // divisor
    works = (partner * divisor == left) & (low <= partner) & (partner <= high) & (b != 0)[:, None]
    choice = (works * rng.random(works.shape)).argmax(axis=1)
    solved = works[rows, choice]
    at = rows[solved]
    x[at, first[solved]] = values[choice[solved]]
    x[at, second[solved]] = partner[at, choice[solved]]
    missing[solved] = 0
