"""Codes that look for trouble find it: what they claim is recomputed in exact integers."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intact import adversarial
from intact.adversarial import (
    Accumulating,
    alone,
    boundary_codes,
    entries_of_all_codes,
    extreme_codes,
    products_of_all_codes,
    random_codes,
    structured_codes,
    sums_of_all_codes,
)
from intact.arithmetic import INT32_MAX, QParams, dyadic_shift
from intact.engines.reference import ReferenceEngine
from intact.ops import (
    Add,
    AvgPool2d,
    Conv2d,
    GlobalAvgPool,
    Linear,
    Multiply,
    Op,
    Requantize,
    Slice,
    Subtract,
    Table,
)
from intact.program import Program, QTensor
from strategies import Builder, grids, input_codes, programs

INT8 = QParams((1.0,))
RELU = QParams((1.0,), -128)
UINT8 = QParams((1.0,), 0, 0, 255, signed=False)


# -- what is expected: exact integers and fractions ----------------------------------------------


def float32(value: float) -> float:
    """The nearest float32, ties to even."""
    return struct.unpack("f", struct.pack("f", value))[0]


def scaled(acc: int, multiplier: Any, grid: QParams) -> Fraction:
    """What is rounded to a code, before that: `acc * M`.  arithmetic.md, section 3."""
    if multiplier.dtype == np.float32:
        return Fraction(float32(acc)) * Fraction(float(multiplier))
    return Fraction(acc * int(multiplier), 2 ** dyadic_shift(grid.bits))


def code_of(acc: int, multiplier: Any, grid: QParams) -> int:
    value = scaled(acc, multiplier, grid)
    if multiplier.dtype == np.float32 and abs(value) < 2**24:
        value = Fraction(float32(float(value)))  # the product has 48 bits, so a double holds it
    return min(max(round(value) + grid.zero_point, grid.qmin), grid.qmax)


def next_to_a_boundary(acc: int, multiplier: Any, grid: QParams) -> bool:
    codes = {code_of(a, multiplier, grid) for a in (acc - 1, acc, acc + 1) if abs(a) <= INT32_MAX}
    return len(codes) > 1


@dataclass
class Sums:
    """An op that accumulates, written as a convolution, which each of them is."""

    shape: tuple[int, int, int]
    weight: Any
    bias: Any
    zero_point: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    moved: bool = False

    @classmethod
    def of(cls, program: Program, op: Op) -> Sums:
        source = program.tensors[op.inputs[0]]
        shape, zero_point = source.shape, source.qparams.zero_point
        weight = program.parameters.get(f"{op.name}.weight")
        bias = program.parameters.get(f"{op.name}.bias", 0)
        match op:
            case Conv2d():
                geometry = (op.stride, op.padding, op.dilation)
                return cls(shape, weight.astype(int), bias, zero_point, *geometry)
            case Linear():
                flat = (shape[-1], math.prod(shape[:-1]), 1)
                return cls(flat, weight.astype(int)[:, :, None, None], bias, zero_point, moved=True)
            case AvgPool2d():
                ones = np.ones((shape[0], 1, *op.kernel), int)
                return cls(shape, ones, 0, zero_point, op.stride, op.padding)
            case GlobalAvgPool():
                return cls(shape, np.ones((shape[0], 1, *shape[1:]), int), 0, zero_point)
            case _:
                one = np.ones((1, 1, 1, 1), int)
                return cls((1, math.prod(shape), 1), one, 0, zero_point)

    def windows(self, x: Any) -> Iterator[Any]:
        """All windows over `[N, C, H, W]`, padded with 0: `[N, C, kh, kw]` each, row by row."""
        kh, kw = self.weight.shape[2:]
        (sh, sw), (dh, dw), (top, bottom, left, right) = self.stride, self.dilation, self.padding
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        for y in range(0, x.shape[2] - dh * (kh - 1), sh):
            for z in range(0, x.shape[3] - dw * (kw - 1), sw):
                yield x[:, :, y : y + dh * (kh - 1) + 1 : dh, z : z + dw * (kw - 1) + 1 : dw]

    def combined(self, x: Any, weight: Any) -> Any:
        """Sums of `weight` times each window, `[N, O, positions]`."""
        size = self.weight.shape[1]
        per_group = len(self.weight) // (x.shape[1] // size)
        return np.stack(
            [
                [
                    (window[:, o // per_group * size :][:, :size] * weight[o]).sum(axis=(1, 2, 3))
                    for o in range(len(weight))
                ]
                for window in self.windows(x)
            ],
            axis=-1,
        ).transpose(1, 0, 2) + np.reshape(self.bias, (1, -1, 1))

    def accumulators(self, codes: Any) -> Any:
        """Of codes `[N, *input shape]`: int64 `[N, O, positions]`."""
        centred = codes.astype(np.int64) - self.zero_point
        if self.moved:
            centred = centred.reshape(len(codes), *self.shape[1::-1]).transpose(0, 2, 1)
        return self.combined(centred.reshape(len(codes), *self.shape), self.weight)

    def ends(self, grid: QParams) -> tuple[Any, Any]:
        """The smallest and the largest accumulator of every channel and position, `[O, P]`."""
        inside = np.ones((1, *self.shape), np.int64)
        products = [self.weight * (q - grid.zero_point) for q in (grid.qmin, grid.qmax)]
        low, high = np.minimum(*products), np.maximum(*products)
        return self.combined(inside, low)[0], self.combined(inside, high)[0]


def result_codes(program: Program, op: Op, codes: Any) -> Any:
    """What the reference engine says of an op alone, `[N, channels, positions]`."""
    result = ReferenceEngine(alone(program, op))(codes).astype(int)
    if isinstance(op, Linear):
        return result.reshape(len(codes), -1, result.shape[-1]).transpose(0, 2, 1)
    channels = 1 if isinstance(op, Requantize) else result.shape[1]
    return result.reshape(len(codes), channels, -1)


def multipliers(program: Program, op: Op, channels: int) -> Any:
    return np.broadcast_to(program.parameters[f"{op.name}.multiplier"], channels)


def assert_true_claims(program: Program, op: Op, found: Any, samples: int) -> None:
    """Everything that a `Boundaries` says of one layer."""
    source, grid = program.tensors[op.inputs[0]], program.tensors[op.name].qparams
    assert found.codes.shape[1:] == source.shape
    assert found.codes.dtype == source.qparams.dtype
    assert len(found.codes) <= samples
    assert found.where.shape == (found.hit, 4)
    assert found.where.dtype == np.int64
    assert found.hit <= found.wanted
    if not len(found.codes):
        assert found.wanted == 0
        return
    # The engine refuses codes outside of the range.
    results = result_codes(program, op, found.codes)
    accumulators = Sums.of(program, op).accumulators(found.codes)
    multiplier = multipliers(program, op, accumulators.shape[1])
    ties = 0
    for sample, channel, position, acc in found.where.tolist():
        assert accumulators[sample, channel, position] == acc
        assert results[sample, channel, position] == code_of(acc, multiplier[channel], grid)
        assert next_to_a_boundary(acc, multiplier[channel], grid)
        ties += scaled(acc, multiplier[channel], grid).denominator == 2
    assert found.ties == ties
    places = found.where[:, :3]
    assert len(np.unique(places, axis=0)) == len(places)
    claims = found.where[:, [1, 3]]
    assert len(np.unique(claims, axis=0)) == len(claims)  # no search is made twice


# -- layers --------------------------------------------------------------------------------------


def layer(op: Op, shape, weight=None, *, source=INT8, target=INT8, grid="dyadic", **given):
    """A program of one op that accumulates; a weight's shape stands for random int8."""
    b = Builder.start(shape, source, seed=11)
    if weight is None:
        b.rescaled(op, target, grid)
    else:
        if isinstance(weight, tuple):
            weight = b.rng.integers(-128, 128, weight, np.int8)
        b.weighted(op, weight, target, grid=grid, **given)
    return b.finish()


def with_multiplier(program: Program, multiplier) -> Program:
    """A layer with a multiplier that is chosen, and the weight's scale that it needs."""
    (op,) = program.ops
    grid, source = program.tensors[op.name].qparams, program.tensors[program.input].qparams
    real = np.asarray(multiplier, np.float64)
    if multiplier.dtype != np.float32:
        real = real / 2 ** dyadic_shift(grid.bits)
    scale = (real * grid.scale[0] / source.scale[0]).astype(np.float32)
    changed = {f"{op.name}.multiplier": multiplier, f"{op.name}.weight_scale": scale}
    return replace(program, parameters={**program.parameters, **changed})


def conv(**geometry) -> Conv2d:
    return Conv2d("y", ("x",), **geometry)


BIAS = np.array([0, -900, 40_000, 7, -30_000, 5], np.int32)
LAYERS = {
    "convolution": layer(conv(padding=(1, 1, 1, 1)), (8, 6, 7), (6, 8, 3, 3), bias=BIAS),
    "float": layer(conv(), (8, 6, 7), (6, 8, 3, 3), grid="float", target=RELU, per_channel=False),
    "groups": layer(
        conv(stride=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2), groups=2),
        (4, 6, 9),
        (6, 2, 3, 2),
        source=QParams((0.5,), 4),
        target=UINT8,
        bias=BIAS,
    ),
    "depthwise": layer(conv(padding=(0, 1, 1, 0), groups=4), (4, 7, 6), (4, 1, 3, 3), source=UINT8),
    "two per group": layer(
        conv(stride=(3, 2), groups=3), (3, 7, 9), (6, 1, 3, 3), target=RELU, grid="power_of_two"
    ),
    "larger than its input": layer(
        conv(padding=(2, 2, 3, 1)), (3, 2, 2), (4, 3, 5, 5), source=QParams((1.0,), 10, 0, 127)
    ),
    "4 bits": layer(
        conv(padding=(1, 1, 1, 1)),
        (4, 5, 5),
        (4, 4, 3, 3),
        source=QParams((1.0,), 2, -8, 7, 4),
        target=QParams((1.0,), 0, 0, 15, 4, signed=False),
    ),
    "linear": layer(Linear("y", ("x",)), (64,), (6, 64), bias=BIAS, target=RELU),
    "linear on rows": layer(Linear("y", ("x",)), (3, 40), (6, 40), source=UINT8, bias=BIAS),
    "linear on cubes": layer(Linear("y", ("x",)), (2, 3, 40), (4, 40), grid="float"),
    "average": layer(
        AvgPool2d("y", ("x",), (3, 2), (2, 1), (1, 0, 1, 1)),
        (3, 6, 5),
        source=QParams((1.0,), -20, -100, 127),
        target=QParams((0.75,), 8),
    ),
    "global average": layer(GlobalAvgPool("y", ("x",)), (5, 6, 7), target=QParams((0.125,), -128)),
    "requantize": layer(
        Requantize("y", ("x",)), (2, 3, 4), source=UINT8, target=QParams((2.25,), -6), grid="float"
    ),
    "requantize a vector": layer(Requantize("y", ("x",)), (9,), target=QParams((4.0,))),
}


@pytest.fixture(params=LAYERS)
def one(request) -> Program:
    return LAYERS[request.param]


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_expected_sums_are_those_of_a_convolution_written_out():
    program = LAYERS["groups"]
    (op,), weight = program.ops, program.parameters["y.weight"]
    codes = random_codes(program.tensors["x"], 2, generator())
    got = Sums.of(program, op).accumulators(codes)
    height, width = program.tensors["y"].shape[1:]
    for n, o, i, j in np.ndindex(2, 6, height, width):
        acc = int(BIAS[o])
        for c, u, v in np.ndindex(2, 3, 2):
            row, column = 2 * i + u - 1, j + 2 * v - 2
            if 0 <= row < 6 and 0 <= column < 9:
                code = int(codes[n, o // 3 * 2 + c, row, column])
                acc += (code - 4) * int(weight[o, c, u, v])
        assert got[n, o, i * width + j] == acc


# -- programs of one layer -----------------------------------------------------------------------


def assert_the_same_alone(program: Program, codes: Any) -> int:
    """Run every op that can be by itself; returns how many there are."""
    seen = {}
    ReferenceEngine(program)(codes, lambda name, values: seen.__setitem__(name, values.copy()))
    ops = [op for op in program.ops if isinstance(op, Accumulating | Table)]
    for op in ops:
        single = alone(program, op)
        assert single.ops == (op,)
        assert np.array_equal(ReferenceEngine(single)(seen[op.inputs[0]]), seen[op.name])
    return len(ops)


def test_a_layer_alone_gives_the_codes_that_it_has_in_its_program():
    b = Builder.start((4, 9, 8), QParams((2.0**-7,), 4), seed=5)

    def weights(*shape):
        return b.rng.integers(-128, 128, shape, np.int8)

    relu = QParams((2.0**-4,), -128)
    a = b.weighted(Conv2d("a", ("x",), padding=(1, 0, 2, 1)), weights(6, 4, 3, 3), relu, bias=BIAS)
    c = Conv2d("c", (a,), (2, 1), (0, 1, 1, 0), (1, 2), 2)
    c = b.weighted(c, weights(6, 3, 3, 2), INT8, grid="float")
    d = b.weighted(Conv2d("d", (c,), padding=(1, 1, 1, 1), groups=6), weights(6, 1, 3, 3), relu)
    e = b.rescaled(AvgPool2d("e", (d,), (3, 2), (2, 2), (1, 0, 1, 1)), QParams((2.0**-5,), 2))
    f = b.weighted(Linear("f", (e,)), weights(5, b.shape(e)[-1]), UINT8, per_channel=False)
    g = b.rescaled(GlobalAvgPool("g", (f,)), QParams((0.75,), 0, 0, 255, signed=False))
    h = b.rescaled(Requantize("h", (g,)), QParams((1.5,), -6, -100, 50))
    b.add(Add("sum", (h, h)), b.grid(h))
    program = b.finish()
    assert assert_the_same_alone(program, random_codes(program.tensors["x"], 5, generator())) == 7


@settings(max_examples=150)
@given(st.data())
def test_any_layer_alone_gives_the_codes_that_it_has_in_its_program(data):
    program = data.draw(programs(max_ops=4))
    codes = data.draw(input_codes(program))
    if len(codes):
        assert_the_same_alone(program, codes)


@settings(max_examples=25)
@given(st.data())
def test_every_sum_and_difference_of_two_codes_is_asked_for_once(data):
    grid = data.draw(grids())
    b = Builder.start((2, 3), grid)
    low = data.draw(st.integers(grid.qmin, grid.qmax))
    narrow = replace(grid, qmin=low, qmax=data.draw(st.integers(low, grid.qmax)))
    twice = b.add(Add("twice", ("x", "x")), narrow)
    b.add(Add("sum", ("x", twice)), narrow)
    b.add(Subtract("difference", ("x", twice)), narrow)
    program = b.finish()
    zero = grid.zero_point
    pairs = [(p, q) for p in range(grid.qmin, grid.qmax + 1) for q in range(grid.qmin, p + 1)]
    for op in program.ops:
        made, codes = sums_of_all_codes(program, op)
        seen = {}
        result = ReferenceEngine(made)(codes, lambda name, v, to=seen: to.__setitem__(name, v))
        assert len(codes) == 1
        left, right = (seen[name].reshape(-1).tolist() for name in made.ops[-1].inputs)
        table = dict(zip(zip(left, right, strict=True), result.reshape(-1).tolist(), strict=True))
        assert len(table) == len(left) == (grid.qmax - grid.qmin + 1) ** 2
        sign = -1 if isinstance(op, Subtract) else 1
        for a, b_ in pairs:
            for p, q in ((a, b_), (b_, a)):
                total = (p - zero) + sign * (q - zero) + zero
                assert table[p, q] == min(max(total, narrow.qmin), narrow.qmax)


@pytest.mark.parametrize("name", ["rows", "columns", "s" * 200])
def test_an_addition_of_any_name_can_be_asked_for_every_sum(name):
    b = Builder.start((2,), INT8)
    b.add(Add(name, ("x", "x")), INT8)
    program = b.finish()
    made, codes = sums_of_all_codes(program, program.ops[0])
    assert made.output == name
    assert np.unique(ReferenceEngine(made)(codes)).tolist() == list(range(-128, 128))


def test_operands_with_different_code_ranges_meet_in_all_codes_of_either():
    b = Builder.start((4,), QParams((1.0,), 4, -100, -90))
    weight = np.ones((4, 4), np.int8)
    b.weighted(Linear("other", ("x",)), weight, QParams((1.0,), 4, 20, 30))
    for operands in (("x", "other"), ("other", "x")):
        b.add(Add(b.new_name("sum"), operands), QParams((1.0,), 4))
    program = b.finish()
    for op in program.ops[-2:]:
        made, codes = sums_of_all_codes(program, op)
        assert np.unique(codes).tolist() == list(range(-100, 31))
        assert ReferenceEngine(made)(codes).shape == (1, 1, 131, 131)


PRODUCTS = [
    ((3,), (3,)),  # one by one
    ((1,), (1,)),
    ((4, 5, 7), (4, 1, 1)),  # a gate for every channel
    ((3, 2, 20), (1, 2, 20)),  # for every position
    ((2, 30, 20), (2, 1, 20)),
    ((2, 30, 20), (1, 1, 1)),
]


def product(shape, other, grids) -> Program:
    """`x`, sliced to `other` and brought to a grid of its own, times `x`."""
    b = Builder.start(shape, grids[0])
    last = "x"
    for axis, (size, n) in enumerate(zip(shape, other, strict=True)):
        if n != size:
            last = b.add(Slice(b.new_name("slice"), (last,), axis, 0, 1), grids[0])
    last = b.rescaled(Requantize("other", (last,)), grids[1])
    b.parameters["product.multiplier"] = np.array([777], np.int32)
    b.add(Multiply("product", ("x", last)), grids[2])
    return b.finish()


@pytest.mark.parametrize(("shape", "other"), PRODUCTS)
@settings(max_examples=8)
@given(data=st.data())
def test_every_product_of_two_codes_is_asked_for_in_the_shapes_of_the_op(shape, other, data):
    program = product(shape, other, [data.draw(grids()) for _ in range(3)])
    op = program.ops[-1]
    made, codes = products_of_all_codes(program, op)
    seen = {}
    keep = lambda name, v: seen.setdefault(name, []).append(v)  # noqa: E731
    ReferenceEngine(made)(codes, keep)
    left, right, got = (np.concatenate(seen[n]) for n in (*made.ops[-1].inputs, "product"))
    assert (left.shape[1:], right.shape[1:]) == (shape, other)
    for tensor, name in zip(made.ops[-1].inputs, op.inputs, strict=True):
        assert made.tensors[tensor] == program.tensors[name]
    left, right, got = (a.reshape(-1) for a in np.broadcast_arrays(left, right, got))
    a, b, out = (program.tensors[name].qparams for name in (*op.inputs, op.name))
    pairs = dict(zip(zip(left.tolist(), right.tolist(), strict=True), got.tolist(), strict=True))
    assert len(pairs) == (a.qmax - a.qmin + 1) * (b.qmax - b.qmin + 1)
    multiplier = program.parameters["product.multiplier"][0]
    for (p, q), code in list(pairs.items())[:: max(1, len(pairs) // 500)]:
        assert code == code_of((p - a.zero_point) * (q - b.zero_point), multiplier, out)


@pytest.mark.parametrize("name", [*adversarial._NAMES, "p" * 200])
def test_a_multiplication_of_any_name_can_be_asked_for_every_product(name):
    b = Builder.start((2,), INT8)
    b.parameters[f"{name}.multiplier"] = np.array([2**9], np.int32)
    b.add(Multiply(name, ("x", "x")), INT8)
    program = b.finish()
    made, codes = products_of_all_codes(program, program.ops[0])
    assert made.output == name
    assert len(np.unique(ReferenceEngine(made)(codes))) > 200


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 7, 11), (1, 40, 40)])
@pytest.mark.parametrize("grid", [INT8, UINT8, QParams((1.0,), 2, -3, 20, 6)])
def test_every_entry_of_a_table_is_asked_for_at_every_index_of_its_first_axis(shape, grid):
    b = Builder.start(shape, grid)
    b.parameters["t.table"] = np.zeros((shape[0], 2**grid.bits), np.int8)
    b.add(Table("t", ("x",)), INT8)
    program = b.finish()
    codes = entries_of_all_codes(program, program.ops[0])
    alone(program, program.ops[0]).check_codes(codes)
    for channel in np.moveaxis(codes, 1, 0):
        assert np.unique(channel).tolist() == list(range(grid.qmin, grid.qmax + 1))


# -- any tensor ----------------------------------------------------------------------------------

TENSORS = [
    QTensor((5,), INT8),
    QTensor((3, 4), UINT8),
    QTensor((2, 3, 3), QParams((1.0,), 0, -8, 7, 4)),
    QTensor((20, 2, 3), QParams((1.0,), -128, -128, 90)),
    QTensor((4, 3, 2), QParams((1.0,), 100, 20, 30)),  # the zero point is outside of the range
    QTensor((4, 3, 2), QParams((1.0,), 2, 9, 12, 4, signed=False)),
    QTensor((1,), QParams((1.0,), 0, 5, 5)),
]


@pytest.mark.parametrize("tensor", TENSORS)
def test_random_codes_are_all_codes_of_the_range_and_no_other(tensor):
    grid = tensor.qparams
    codes = random_codes(tensor, 3000, generator())
    assert codes.shape == (3000, *tensor.shape)
    assert codes.dtype == grid.dtype
    assert np.unique(codes).tolist() == list(range(grid.qmin, grid.qmax + 1))
    counts = np.unique(codes, return_counts=True)[1] * (grid.qmax - grid.qmin + 1) / codes.size
    assert (abs(counts - 1) < 0.6).all()  # far beyond chance
    assert random_codes(tensor, 0, generator()).shape == (0, *tensor.shape)


def test_random_codes_follow_from_the_state_of_the_generator():
    rng = generator(3)
    first, second = (random_codes(TENSORS[0], 50, rng) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(random_codes(TENSORS[0], 50, generator(3)), first)


@pytest.mark.parametrize("tensor", TENSORS)
def test_structured_codes_hold_the_samples_that_are_documented(tensor):
    grid, shape = tensor.qparams, tensor.shape
    low, high = grid.qmin, grid.qmax
    codes = structured_codes(tensor)
    assert codes.dtype == grid.dtype
    assert codes.shape[1:] == shape
    assert 9 <= len(codes) <= 25
    assert codes.min() == low
    assert codes.max() == high
    seen = {sample.tobytes() for sample in codes}

    def holds(code) -> bool:
        """Whether there is the sample that has `code(place)` everywhere."""
        sample = np.empty(shape, grid.dtype)
        for place in np.ndindex(shape):
            sample[place] = code(place)
        return sample.tobytes() in seen

    nearest_to_zero = sorted((low, grid.zero_point, high))[1]
    for constant in (low, high, nearest_to_zero):
        assert holds(lambda _, constant=constant: constant)
    for even, odd in ((low, high), (high, low)):
        assert holds(lambda place, even=even, odd=odd: odd if sum(place) % 2 else even)
        assert holds(lambda place, even=even, odd=odd: odd if place[0] % 2 else even)
    order = {place: n % (high - low + 1) for n, place in enumerate(np.ndindex(shape))}
    assert holds(lambda place: low + order[place])
    assert holds(lambda place: high - order[place])
    for inner, outer in ((low, high), (high, low)):
        out = [
            c
            for c in range(shape[0])
            if holds(lambda at, c=c, inner=inner, outer=outer: inner if at[0] == c else outer)
        ]
        if low < high and shape[0] > 2:  # otherwise this is one of the samples above
            assert len(out) == min(shape[0], 8)
            assert {0, shape[0] - 1} <= set(out)


# -- boundaries ----------------------------------------------------------------------------------


def test_boundary_codes_are_what_they_claim(one):
    (op,) = one.ops
    for samples in (1, 2, 3, 40):
        found = boundary_codes(one, op, samples, generator(samples))
        assert_true_claims(one, op, found, samples)
        assert found.hit > 0


@settings(max_examples=250)
@given(st.data())
def test_boundary_codes_of_any_layer_are_what_they_claim(data):
    program = data.draw(programs(max_ops=3))
    samples, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2**32 - 1))
    for op in (op for op in program.ops if isinstance(op, Accumulating)):
        found = boundary_codes(program, op, samples, generator(seed))
        assert_true_claims(program, op, found, samples)


def test_boundary_codes_are_claimed_truly_when_some_boundaries_are_drawn(one, monkeypatch):
    """Of a layer with very many boundaries, and of one that memory holds in pieces only."""
    monkeypatch.setattr(adversarial, "MOST_THRESHOLDS", 24)
    monkeypatch.setattr(adversarial, "CHUNK_ELEMENTS", 1000)
    (op,) = one.ops
    found = boundary_codes(one, op, 16, generator())
    assert_true_claims(one, op, found, 16)
    channels = len(Sums.of(one, op).weight)
    assert 0 < found.hit <= 2 * channels * (2 + max(2, 24 // channels))


def test_nearly_all_boundaries_of_an_ordinary_layer_are_met():
    for grid in ("dyadic", "float"):
        program = layer(
            conv(padding=(1, 1, 1, 1)), (16, 9, 9), (8, 16, 3, 3), grid=grid, target=RELU
        )
        found = boundary_codes(program, program.ops[0], 512, generator())
        assert found.wanted > 3000
        assert found.hit > 0.99 * found.wanted
        # Of each channel, accumulators for almost every change of the code.
        for channel in range(8):
            accs = found.where[found.where[:, 1] == channel, 3].tolist()
            multiplier = program.parameters["y.multiplier"][channel]
            assert len({code_of(acc, multiplier, RELU) for acc in accs}) > 240


def test_boundary_codes_follow_from_the_state_of_the_generator():
    program = LAYERS["groups"]
    first, again, other = (
        boundary_codes(program, program.ops[0], 6, generator(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.codes, again.codes)
    assert np.array_equal(first.where, again.where)
    assert (first.wanted, first.ties, first.out_of_reach) == (
        again.wanted,
        again.ties,
        again.out_of_reach,
    )
    assert not np.array_equal(first.codes, other.codes)


def boundary_accumulators(multiplier, grid: QParams, reach: int) -> set[int]:
    """All accumulators within `reach` of 0 beside which the code changes."""
    codes = {acc: code_of(acc, multiplier, grid) for acc in range(-reach - 1, reach + 2)}
    return {
        acc
        for acc in range(-reach, reach + 1)
        if codes[acc - 1] != codes[acc] or codes[acc] != codes[acc + 1]
    }


@pytest.mark.parametrize("grid", ["dyadic", "float"])
@pytest.mark.parametrize("source", [QParams((1.0,), 2, -4, 3, 3), QParams((1.0,), -4, 1, 3, 3)])
def test_what_is_out_of_reach_is_exactly_what_no_codes_have(grid, source):
    """Three codes of three bits: all inputs are tried."""
    weight = np.array([[6, -4, 10], [1, 2, 3], [0, 0, 5], [-1, -3, 1]], np.int8)
    bias = np.array([1, 0, -2, 700], np.int32)
    target = QParams((1.0,), 0, -8, 7, 4)
    program = layer(
        Linear("y", ("x",)), (3,), weight, source=source, target=target, grid=grid, bias=bias
    )
    all_codes = np.stack(np.meshgrid(*[range(source.qmin, source.qmax + 1)] * 3), axis=-1)
    sums = (all_codes.reshape(-1, 3) - source.zero_point) @ weight.astype(int).T + bias
    found = boundary_codes(program, program.ops[0], 1000, generator())
    assert_true_claims(program, program.ops[0], found, 1000)
    beyond = 0
    for channel in range(4):
        wanted = boundary_accumulators(program.parameters["y.multiplier"][channel], target, 4000)
        reached = wanted & set(sums[:, channel].tolist())
        assert set(found.where[found.where[:, 1] == channel, 3].tolist()) == reached
        beyond += len(wanted - reached)
    assert found.out_of_reach == beyond > 0
    assert found.wanted == found.hit


def test_each_accumulator_is_searched_for_once_though_codes_change_at_both_its_sides():
    """With a multiplier above 1/2 an accumulator stands next to two boundaries, or to many."""
    for scale in (1.0, 0.5, 1.25, 1 / 16):
        source, target = QParams((1.0,), 0, -8, 7, 4), QParams((scale,))
        program = layer(Requantize("y", ("x",)), (3,), source=source, target=target)
        found = boundary_codes(program, program.ops[0], 100, generator())
        assert sorted(found.where[:, 3].tolist()) == list(range(-8, 8))
        assert found.wanted == 16
        assert found.ties == (8 if 1 / scale == 1.5 else 0)


def test_the_ends_of_int32_are_no_boundaries():
    """They may be reached, but the code does not change there, for all its steps that are left."""
    weight = np.array([[-127, -5], [127, 5]], np.int8)
    bias = np.array([1, -1], np.int32) * (INT32_MAX - 132 * 128)
    program = layer(Linear("y", ("x",)), (2,), weight, grid="float", bias=bias)
    program = with_multiplier(program, np.full(2, 2.0**-30, np.float32))
    sums = Sums.of(program, program.ops[0]).accumulators(np.full((1, 2), -128, np.int8))
    assert sums.reshape(-1).tolist() == [INT32_MAX, -INT32_MAX]
    found = boundary_codes(program, program.ops[0], 600, generator())
    assert_true_claims(program, program.ops[0], found, 600)
    # acc * 2**-30 passes -1.5, -0.5, 0.5 and 1.5, so far from the bias that no codes reach it.
    assert (found.wanted, found.out_of_reach) == (0, 2 * 2 * 4)


def test_windows_in_the_padding_reach_sums_that_others_cannot():
    """With a code range that leaves out the zero point, fewer codes make smaller sums."""
    source = QParams((1.0,), 0, 10, 20)
    weight = np.ones((1, 1, 3, 3), np.int8)
    program = layer(conv(padding=(1, 1, 1, 1)), (1, 2, 2), weight, source=source)
    program = with_multiplier(program, np.array([2**16], np.int32))  # every accumulator counts
    found = boundary_codes(program, program.ops[0], 1000, generator())
    assert_true_claims(program, program.ops[0], found, 1000)
    assert set(found.where[:, 3].tolist()) == set(range(40, 81))  # four codes of nine
    assert found.out_of_reach <= 256 - 41


def test_ties_come_first_then_the_ends_of_the_code_range(monkeypatch):
    program = layer(conv(), (16, 3, 3), (3, 16, 3, 3), source=UINT8)
    ties = with_multiplier(program, np.full(3, 3 * 2**3, np.int32))
    found = boundary_codes(ties, ties.ops[0], 30, generator())
    assert found.ties == found.hit > 25
    # With an odd multiplier, ties lie at odd multiples of 2**15 alone: here those saturate.
    odd = np.full(3, 401, np.int32)
    none = with_multiplier(program, odd)
    found = boundary_codes(none, none.ops[0], 12, generator())
    assert (found.ties, found.hit) == (0, 12)
    monkeypatch.setattr(adversarial, "MOST_THRESHOLDS", 6)
    drawn = boundary_codes(none, none.ops[0], 100, generator())
    ends = [-128, -127, 126, 127]
    for channel in range(3):
        first, some = (
            [code_of(a, odd[0], INT8) for a in f.where[f.where[:, 1] == channel, 3].tolist()]
            for f in (found, drawn)
        )
        assert sorted(first) == ends
        assert set(ends) < set(some)


def test_a_layer_with_one_code_has_no_boundaries():
    program = layer(conv(), (2, 3, 3), (2, 2, 3, 3), target=QParams((1.0,), 0, 5, 5))
    found = boundary_codes(program, program.ops[0], 10, generator())
    assert_true_claims(program, program.ops[0], found, 10)
    assert (found.wanted, found.hit, found.ties, found.out_of_reach) == (0, 0, 0, 0)


def test_boundary_codes_catch_rounding_half_up_and_random_codes_miss_it():
    program = layer(conv(padding=(1, 1, 1, 1)), (16, 6, 6), (4, 16, 3, 3), target=RELU)
    program = with_multiplier(program, np.full(4, 12, np.int32))
    (op,) = program.ops

    def differing(codes) -> int:
        """Results that are different where a kernel rounds half up."""
        products = Sums.of(program, op).accumulators(codes) * 12
        half_up = np.clip(((products + 2**15) >> 16) - 128, -128, 127)
        return int((half_up != result_codes(program, op, codes)).sum())

    found = boundary_codes(program, op, 40, generator())
    assert len(found.codes) == 40
    # Of neighbouring ties every second one has an even code below it.
    assert differing(found.codes) > found.ties / 3 > 20
    assert differing(random_codes(program.tensors["x"], 40, generator())) == 0


# -- ends of accumulators ------------------------------------------------------------------------


def test_extreme_codes_drive_every_channel_to_both_its_ends(one):
    (op,) = one.ops
    source = one.tensors["x"]
    codes = extreme_codes(one, op, 64, generator())
    assert codes.shape[1:] == source.shape
    assert codes.dtype == source.qparams.dtype
    one.check_codes(codes)
    sums = Sums.of(one, op)
    accumulators = sums.accumulators(codes)
    lowest, highest = sums.ends(source.qparams)
    assert ((lowest <= accumulators) & (accumulators <= highest)).all()
    if one is LAYERS["larger than its input"]:  # no window has all weights: the ends of some window
        assert (accumulators.min(axis=0) == lowest).any(axis=1).all()
        assert (accumulators.max(axis=0) == highest).any(axis=1).all()
    else:
        assert np.array_equal(accumulators.min(axis=(0, 2)), lowest.min(axis=1))
        assert np.array_equal(accumulators.max(axis=(0, 2)), highest.max(axis=1))


@settings(max_examples=150)
@given(st.data())
def test_extreme_codes_of_any_layer_are_codes_that_it_may_run(data):
    program, samples = data.draw(programs(max_ops=3)), data.draw(st.integers(1, 5))
    for op in (op for op in program.ops if isinstance(op, Accumulating)):
        single = alone(program, op)
        codes = extreme_codes(program, op, samples, generator())
        assert 1 <= len(codes) <= samples
        assert np.array_equal(codes, extreme_codes(program, op, samples, generator()))
        single.check_codes(codes)
        # The first channel always finds room: one of its ends is met in some window.
        sums = Sums.of(program, op)
        ends = sums.ends(single.tensors[single.input].qparams)
        first = sums.accumulators(codes)[:, 0]
        assert any((first == end[0]).any() for end in ends)


def test_extreme_codes_catch_a_register_that_is_too_narrow_and_random_codes_miss_it():
    program = LAYERS["convolution"]
    (op,) = program.ops
    assert program.accumulator_bits(op) == 21
    multiplier = program.parameters["y.multiplier"]

    def differing(codes) -> int:
        """Results that are different where sums wrap to 20 bits."""
        sums = Sums.of(program, op).accumulators(codes)
        wrapped = (sums + 2**19) % 2**20 - 2**19
        changed = np.argwhere(wrapped != sums)
        right = result_codes(program, op, codes)
        return sum(
            code_of(int(wrapped[n, o, p]), multiplier[o], INT8) != right[n, o, p]
            for n, o, p in changed.tolist()
        )

    assert differing(extreme_codes(program, op, 8, generator())) > 0
    assert differing(random_codes(program.tensors["x"], 40, generator())) == 0
