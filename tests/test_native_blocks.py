"""Native code on the blocks that networks are made of: excitation, shuffling, tables, pyramids.

`test_native_kernels.py` draws programs at random; what is typical of no random program stands here.
"""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest

from intact.arithmetic import QParams
from intact.engines.native.emit import generate
from intact.engines.native.emit_avx512 import Avx512Vnni
from intact.engines.native.plan import Concatenate, Gather, Lookup, MatMul, Product, make_plan
from intact.engines.reference import ReferenceEngine
from intact.ops import (
    Add,
    Clamp,
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
from native_harness import Compiled, first_difference
from strategies import Builder
from test_native_kernels import codes_for, runnable, weights

INT8 = QParams((1.0,), 4, -128, 127, 8, True)
RELU = QParams((1.0,), -128, -128, 127, 8, True)
UINT8 = QParams((0.5,), 0, 0, 255, 8, False)
UINT4 = QParams((0.5,), 2, 0, 15, 4, False)
INT3 = QParams((0.5,), -2, -4, 3, 3, True)

ISAS = ("portable", "avx2", "avx512vnni", "avx512vbmi")


def conv(b: Builder, source: str, out: int, kernel: int, grid: QParams = INT8, **fields) -> str:
    """A convolution that keeps height and width at stride 1."""
    pad = kernel // 2
    op = Conv2d(b.new_name("conv"), (source,), padding=(pad,) * 4, **fields)
    shape = (out, b.shape(source)[0] // op.groups, kernel, kernel)
    bias = b.rng.integers(-400, 400, out).astype(np.int32)
    return b.weighted(op, weights(b.rng, *shape), grid, bias=bias)


def table(b: Builder, source: str, grid: QParams = INT8, rows: int = 1) -> str:
    op = Table(b.new_name("table"), (source,))
    shape = (rows, 2 ** b.grid(source).bits)
    entries = b.rng.integers(grid.qmin, grid.qmax + 1, shape).astype(grid.dtype)
    b.parameters[f"{op.name}.table"] = entries
    return b.add(op, grid)


def multiply(b: Builder, first: str, second: str, grid: QParams = INT8, m: int = 700) -> str:
    op = Multiply(b.new_name("multiply"), (first, second))
    b.parameters[f"{op.name}.multiplier"] = np.array([m], np.int32)
    return b.add(op, grid)


def sliced(b: Builder, source: str, axis: int, start: int, stop: int, step: int = 1) -> str:
    op = Slice(b.new_name("slice"), (source,), axis, start, stop, step)
    return b.add(op, b.grid(source))


def reshaped(b: Builder, source: str, *shape: int) -> str:
    return b.add(Reshape(b.new_name("reshape"), (source,), shape), b.grid(source))


def permuted(b: Builder, source: str, *axes: int) -> str:
    return b.add(Permute(b.new_name("permute"), (source,), axes), b.grid(source))


def shuffled(b: Builder, source: str, groups: int) -> str:
    """The channel shuffle of ShuffleNet."""
    channels, height, width = b.shape(source)
    split = reshaped(b, source, groups, channels // groups, height, width)
    return reshaped(b, permuted(b, split, 1, 0, 2, 3), channels, height, width)


def upsampled(b: Builder, source: str, *factors: int) -> str:
    return b.add(Upsample(b.new_name("upsample"), (source,), factors), b.grid(source))


def padded(b: Builder, source: str, padding: tuple[int, ...], value: float) -> str:
    """With codes of the input's own type, so that the constant has one."""
    return b.add(Pad(b.new_name("pad"), (source,), padding, value), b.grid(source))


def agrees(program: Program, isa: str, folder) -> bool:
    """With everything fused and with everything stored."""
    return all(
        first_difference(Compiled(program, isa, folder, fuse=fuse), codes_for(program)) is None
        for fuse in (True, False)
    )


def excitation(b: Builder, source: str, grid: QParams = INT8) -> str:
    """Squeeze-and-excitation with a hard sigmoid."""
    channels = b.shape(source)[0]
    mean = b.rescaled(GlobalAvgPool(b.new_name("mean"), (source,)), b.grid(source))
    squeezed = conv(b, mean, max(1, channels // 4), 1, RELU)
    gate = table(b, conv(b, squeezed, channels, 1), UINT8)
    return multiply(b, source, gate, grid)


@pytest.mark.parametrize("isa", ISAS)
def test_squeeze_and_excitation_after_a_depthwise_convolution(isa, tmp_path):
    """As in MobileNetV3: hard swish and hard sigmoid are tables, and fused."""
    runnable(isa)
    for channels, stride in ((16, 1), (72, 2)):
        b = Builder.start((channels, 7, 9), INT8, channels)
        depthwise = conv(b, "x", channels, 5, groups=channels, stride=(stride, 1))
        hidden = table(b, depthwise, INT8)
        narrow = QParams((1.0,), 4, -100, 90)
        result = conv(b, excitation(b, hidden, narrow), 20, 1)
        b.add(Add("output", (result, result)), INT8)
        program = b.finish()
        assert agrees(program, isa, tmp_path)
        steps = make_plan(program, Avx512Vnni.layout).head
        assert not any(isinstance(step, Lookup) for step in steps)
        assert sum(isinstance(step, MatMul) and step.table is not None for step in steps) == 2
        assert sum(isinstance(step, Product) for step in steps) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_units_of_a_shuffle_net(isa, tmp_path):
    """Split, convolve one half, concatenate, shuffle: twice, so that a split reads a shuffle."""
    runnable(isa)
    b = Builder.start((3, 10, 14), INT8)
    last = conv(b, "x", 24, 3, RELU)
    for _ in range(2):
        left, right = sliced(b, last, 0, 0, 12), sliced(b, last, 0, 12, 24)
        right = conv(b, conv(b, right, 12, 1, RELU), 12, 3, RELU, groups=12)
        last = shuffled(b, b.add(Concat(b.new_name("concat"), (left, right)), RELU), 2)
    b.add(Clamp("output", (last,)), RELU)
    program = b.finish()
    assert agrees(program, isa, tmp_path)


@pytest.mark.parametrize("fuse", [True, False])
def test_channels_are_copied_in_runs(fuse):
    """Of a split no pixel takes a table of offsets, and half a pixel is one copy."""
    b = Builder.start((16, 112, 112), INT8)
    last = conv(b, "x", 64, 1)
    halves = sliced(b, last, 0, 0, 32), sliced(b, last, 0, 32, 64)
    b.add(Concat("swapped", halves[::-1]), INT8)
    b.add(Clamp("output", (shuffled(b, "swapped", 2),)), INT8)
    source = generate(b.finish(), "portable", fuse=fuse).source
    assert not re.search(r"_from\d|_to\d|order_of_", source)
    assert source.count(", 32);") >= 2
    assert len(source) < 40_000


@pytest.mark.parametrize("isa", ISAS)
def test_tables_of_every_width_and_rank(isa, tmp_path):
    """By channel, by what is axis 0 of other ranks, from and to narrow codes."""
    runnable(isa)
    for shape in ((5, 4, 6), (70, 3, 3), (9,), (3, 7), (3, 2, 4, 5)):
        b = Builder.start(shape, INT8, len(shape))
        last = "x"
        for grid in (UINT4, INT3, UINT8, INT8):
            last = table(b, table(b, last, grid), grid, rows=shape[0])
        b.add(Add("output", (last, "x")), INT8)
        compiled = Compiled(b.finish(), isa, tmp_path)
        assert first_difference(compiled, codes_for(compiled.program)) is None


@pytest.mark.parametrize("isa", ISAS)
def test_every_code_has_its_entry(isa, tmp_path):
    """All 256, in a tensor of whole vectors and a rest, for both types of code."""
    runnable(isa)
    for grid in (INT8, UINT8):
        b = Builder.start((1, 3, 107), grid)
        permutation = b.rng.permutation(256)[None].astype(np.uint8)
        b.parameters["table.table"] = permutation.view(grid.dtype)
        b.add(Table("table", ("x",)), grid)
        codes = np.resize(np.arange(grid.qmin, grid.qmax + 1), (1, 1, 3, 107)).astype(grid.dtype)
        compiled = Compiled(b.finish(), isa, tmp_path)
        assert first_difference(compiled, codes) is None
        looked_up = compiled.run(codes).reshape(-1)[:256]
        assert np.array_equal(looked_up.view(np.uint8), permutation[0])


@pytest.mark.parametrize("isa", ISAS)
def test_tables_are_fused_into_every_kind_of_layer(isa, tmp_path):
    """Pooled, added, rescaled, across pixels, depthwise, grouped, on a block of samples."""
    runnable(isa)
    b = Builder.start((3, 32, 32), UINT8)
    pooled = conv(b, "x", 6, 3)
    first = table(b, b.add(MaxPool2d("pool", (pooled,)), INT8))
    other = QParams((0.75,), 2)
    last = conv(b, first, 6, 3, other)
    added = b.add(Add("sum", (last, b.on_grid(first, other))), other)
    second = table(b, added, UINT4)
    third = table(b, conv(b, second, 18, 3, groups=3, stride=(2, 2)), INT8)
    fourth = table(b, conv(b, third, 18, 3, groups=18), UINT8)
    flat = reshaped(b, fourth, 18 * 64)
    b.weighted(Linear("fc1", (flat,)), weights(b.rng, 33, 18 * 64), INT8)
    b.weighted(Linear("fc2", (table(b, "fc1"),)), weights(b.rng, 21, 33), INT8)
    table(b, "fc2", INT3)
    program = b.finish()
    plan = make_plan(program, Avx512Vnni.layout)
    assert len(plan.tail) == 2
    steps = [*plan.head, *plan.tail]
    assert all(isinstance(step, MatMul) and step.table is not None for step in steps)
    assert len(steps) == 6
    assert plan.inputs[0].phases == 2  # the first one is computed across pixels
    assert agrees(program, isa, tmp_path)


def test_a_table_that_must_stay_apart_does(tmp_path):
    """Others read the layer, or it is the output, or has a table; or channels have their own."""
    for kind in ("read", "output", "rows", "second"):
        b = Builder.start((4, 5, 5), INT8)
        layer = conv(b, "x", 4, 1)
        looked_up = table(b, layer, rows=4 if kind == "rows" else 1)
        if kind == "read":
            b.add(Add("sum", (layer, looked_up)), INT8)
        if kind == "second":
            table(b, looked_up)
        program = b.finish(layer if kind == "output" else None)
        plan = make_plan(program, Avx512Vnni.layout)
        assert any(isinstance(step, Lookup) for step in plan.head), kind
        compiled = Compiled(program, "portable", tmp_path)
        assert first_difference(compiled, codes_for(program)) is None


@pytest.mark.parametrize("isa", ISAS)
def test_products_repeat_the_second_operand_along_any_axes(isa, tmp_path):
    runnable(isa)
    cases = {
        (5, 4, 6): ((5, 1, 1), (1, 4, 6), (1, 1, 6), (5, 4, 1), (1, 1, 1)),
        (7,): ((1,),),
        (3, 7): ((3, 1), (1, 7)),
        (2, 3, 4, 5): ((2, 1, 4, 5), (1, 3, 1, 1), (1, 1, 1, 5)),
    }
    grid = QParams((1.0,), 20, 3, 90)
    for shape, others in cases.items():
        b = Builder.start(shape, INT8)
        last = "x"
        for i, other in enumerate(others):
            second = "x"
            for axis, size in enumerate(other):
                if size != shape[axis]:
                    second = sliced(b, second, axis, 1, 2)
            product = multiply(b, last, second, grid, 2**15)
            last = product if not i else b.add(Add(b.new_name("sum"), (last, product)), grid)
        compiled = Compiled(b.finish(), isa, tmp_path)
        assert first_difference(compiled, codes_for(compiled.program)) is None, shape


@pytest.mark.parametrize("isa", ISAS)
def test_products_and_differences_of_views(isa, tmp_path):
    """Both operands are slices or turned, and a tensor is multiplied by itself."""
    runnable(isa)
    b = Builder.start((10, 6, 6), INT8)
    left, right = sliced(b, "x", 0, 0, 5), sliced(b, "x", 0, 1, 10, 2)
    turned = permuted(b, right, 0, 2, 1)
    product = multiply(b, left, turned, UINT8, 400)
    square = multiply(b, product, product, UINT8)
    tables = [table(b, square), table(b, product)]
    added = b.add(Add("sum", tuple(tables)), INT8)
    difference = b.add(Subtract("difference", (added, turned)), QParams((1.0,), 4, -90, 50))
    b.add(Subtract("nothing", (difference, difference)), INT8)
    b.add(Subtract("output", ("nothing", added)), INT8)
    assert agrees(b.finish(), isa, tmp_path)


@pytest.mark.parametrize("isa", ISAS)
def test_a_pyramid_of_upsampled_tensors(isa, tmp_path):
    """As in a U-Net: read by a padded convolution, and beside the tensor that it is joined with."""
    runnable(isa)
    b = Builder.start((6, 8, 12), INT8)
    down = b.add(MaxPool2d("down", (conv(b, "x", 17, 3),)), INT8)
    last = conv(b, upsampled(b, down, 1, 2, 2), 6, 3)
    joined = b.add(Concat("joined", (upsampled(b, down, 1, 2, 2), last, "x")), INT8)
    wide = upsampled(b, sliced(b, joined, 0, 3, 29, 5), 2, 1, 3)
    last = conv(b, wide, 5, 3)
    flat = reshaped(b, upsampled(b, sliced(b, last, 1, 2, 3), 2, 1, 1), 10 * 36)
    b.weighted(Linear("fc", (flat,)), np.full((4, 360), 127, np.int8), INT8, gain=0.3)
    program = b.finish()
    assert agrees(program, isa, tmp_path)
    # Each code counts twice, with a weight that int8 does not hold twice.
    assert isinstance(make_plan(program, Avx512Vnni.layout).head[-1], Gather)


@pytest.mark.parametrize("isa", ISAS)
def test_constants_around_a_tensor(isa, tmp_path):
    """Before a max pool; beside the border of a convolution; of a tensor that shares its bytes."""
    runnable(isa)
    b = Builder.start((5, 6, 7), INT8)
    around = padded(b, "x", (0, 0, 1, 1, 2, 0), -50.0)
    pooled = b.add(MaxPool2d("pool", (around,), (3, 3), (2, 2)), INT8)
    deep = padded(b, padded(b, pooled, (1, 2, 0, 0, 0, 1), 30.0), (0,) * 6, 3.0)
    last = conv(b, deep, 9, 3)
    last = padded(b, sliced(b, last, 0, 2, 7, 2), (0, 0, 1, 0, 0, 1), 0.0)
    last = conv(b, last, 4, 3)
    channels, height, width = b.shape(last)
    last = padded(b, reshaped(b, last, channels * height, width), (1, 0, 0, 2), 9.0)
    b.add(Clamp("output", (last,)), INT8)
    program = b.finish()
    assert agrees(program, isa, tmp_path)
    fills = [step.target.fill for step in make_plan(program, Avx512Vnni.layout).head]
    assert [fill for fill in fills if fill is not None] == [82, 162, 132, 141]


@pytest.mark.parametrize("isa", ISAS)
def test_an_input_that_a_convolution_and_a_view_read(isa, tmp_path):
    """The convolution alone could have its windows stored; the view needs pixels."""
    runnable(isa)
    b = Builder.start((3, 16, 16), INT8)
    last = conv(b, "x", 4, 1, stride=(2, 2))
    b.weighted(Conv2d("windows", ("x",)), weights(b.rng, 6, 3, 5, 5), INT8)
    b.weighted(Linear("fc1", (reshaped(b, "x", 768),)), weights(b.rng, 10, 768), INT8)
    b.weighted(Linear("fc2", (reshaped(b, "windows", 864),)), weights(b.rng, 10, 864), INT8)
    b.weighted(Linear("fc3", (reshaped(b, last, 256),)), weights(b.rng, 10, 256), INT8)
    b.add(Add("sum", ("fc1", "fc2")), INT8)
    b.add(Add("output", ("sum", "fc3")), INT8)
    assert agrees(b.finish(), isa, tmp_path)


def test_a_linear_layer_reads_part_of_a_tensor_in_place():
    """Unless it would read more zeros than codes."""
    for count, steps in ((40, 1), (20, 2)):
        b = Builder.start((64,), INT8)
        b.weighted(Linear("fc", (sliced(b, "x", 0, 3, 3 + count),)), weights(b.rng, 5, count), INT8)
        program = b.finish()
        plan = make_plan(program, Avx512Vnni.layout)
        assert len(plan.head) + len(plan.tail) == steps
        assert plan.tail[0].weight.shape == (5, 1, 1, count)


def test_stored_tensors_are_concatenated_as_they_are():
    b = Builder.start((8, 5, 5), INT8)
    stored = b.add(Clamp("clamped", (sliced(b, "x", 0, 0, 4),)), INT8)
    b.add(Concat("output", (stored, "x")), INT8)
    *_, last = make_plan(b.finish(), Avx512Vnni.layout).head
    assert isinstance(last, Concatenate)


@pytest.mark.parametrize("isa", ISAS)
def test_a_wrong_entry_of_a_table_is_noticed(isa, tmp_path):
    runnable(isa)
    for rows in (1, 3):
        b = Builder.start((3, 8, 9), INT8)
        table(b, "x", rows=rows)
        program = b.finish()
        codes = np.full((2, 3, 8, 9), -128, np.int8)

        def broken(source: str) -> str:
            start = re.search(r'_table\[\d+\] =\n    "\\', source).end()
            entry = int(source[start : start + 3], 8) ^ 1
            return source[:start] + f"{entry:03o}" + source[start + 3 :]

        assert first_difference(Compiled(program, isa, tmp_path), codes) is None
        assert first_difference(Compiled(program, isa, tmp_path, change=broken), codes) is not None


def test_broken_steps_are_noticed(tmp_path):
    """What the tests above compare can differ: a run's length, a constant, a zero point, a sign."""
    b = Builder.start((6, 5, 5), INT8)
    around = padded(b, sliced(b, "x", 0, 1, 5), (0, 0, 1, 1, 1, 1), 9.0)
    difference = b.add(Subtract("difference", (around, upsampled(b, around, 1, 1, 1))), INT8)
    product = multiply(b, around, around)
    b.add(Subtract("output", (product, difference)), INT8)
    program, codes = b.finish(), codes_for(b.finish())
    changes = {
        "run": lambda source: re.sub(r"(memcpy\(.*), 4\);", r"\1, 3);", source),
        "constant": lambda source: source.replace(", 141, ", ", 142, "),
        "zero point": lambda source: re.sub(r"- 132\) \* ", "- 130) * ", source),
        "sign": lambda source: re.sub(r" - (x1\[[^]]*\]) \+ 132", r" + \1 - 132", source),
    }
    whole = Compiled(program, "portable", tmp_path)
    assert first_difference(whole, codes) is None
    for name, change in changes.items():
        assert change(whole.generated.source) != whole.generated.source, name
        broken = Compiled(program, "portable", tmp_path, change=change)
        assert first_difference(broken, codes) is not None, name


def test_tensors_of_a_plan_cannot_meet_those_of_a_program(tmp_path):
    """A stranger's names are those of copies that plans make."""
    b = Builder.start((2, 3, 4), INT8)
    for name in ("fc (operand)", "fc (result)"):
        b.weighted(Linear(name, ("x",)), weights(b.rng, 4, 4), INT8)
    b.weighted(Linear("fc", ("x",)), weights(b.rng, 4, 4), INT8)
    b.add(Add("sum", ("fc (operand)", "fc (result)")), INT8)
    b.add(Add("output", ("sum", "fc")), INT8)
    program = b.finish()
    codes = codes_for(program)
    compiled = Compiled(program, "portable", tmp_path)
    assert np.array_equal(compiled.run(codes), ReferenceEngine(program)(codes))


def chain(seed: int) -> Program:
    """Layers that mostly read the one before, so that much is fused, in any order."""
    r = random.Random(seed)
    b = Builder.start((r.choice([3, 4, 16, 20]), r.randint(4, 9), r.randint(4, 20)), INT8, seed)
    last = "x"
    for _ in range(r.randint(6, 14)):
        if r.random() < 0.15:
            last = r.choice([name for name in b.tensors if len(b.shape(name)) == 3])
        channels, height, width = b.shape(last)
        size = channels * height * width
        kind = r.choice(["conv", "conv", "depthwise", "pool", "add", "gate"])
        kind = r.choice([kind, kind, "slice", "concat", "shuffle", "upsample", "pad", "subtract"])
        if kind == "depthwise":
            last = conv(b, last, channels, r.choice([1, 3, 5]), groups=channels)
        elif kind == "pool" and min(height, width) >= 2:
            last = b.add(MaxPool2d(b.new_name("pool"), (last,)), b.grid(last))
        elif kind in {"add", "subtract"}:
            other = conv(b, last, channels, r.choice([1, 3]), b.grid(last))
            pair = r.sample([last, other], 2)
            op = (Add if kind == "add" else Subtract)(b.new_name(kind), tuple(pair))
            last = b.add(op, b.grid(last))
        elif kind == "gate":
            last = excitation(b, last)
        elif kind == "slice":
            axis = r.randrange(3)
            start = r.randrange(b.shape(last)[axis])
            stop = r.randint(start + 1, b.shape(last)[axis])
            last = sliced(b, last, axis, start, stop, r.choice([1, 1, 2]))
        elif kind == "concat" and size < 2000:
            half = sliced(b, last, 0, 0, (channels + 1) // 2)
            names = tuple(r.sample([last, half, last], r.randint(1, 3)))
            last = b.add(Concat(b.new_name("concat"), names), b.grid(last))
        elif kind == "shuffle" and channels % 2 == 0:
            last = shuffled(b, last, 2)
        elif kind == "upsample" and size < 1000:
            last = upsampled(b, last, r.choice([1, 1, 2]), 2, 2)
        elif kind == "pad":
            last = padded(b, last, tuple(r.choice([0, 1]) for _ in range(6)), r.choice([0.0, 9.0]))
        else:
            last = conv(
                b, last, r.choice([3, 8, 16, 17, 33]), r.choice([1, 3]), r.choice([INT8, RELU])
            )
        while r.random() < 0.35:
            rows = r.choice([1, 1, 1, b.shape(last)[0]])
            last = table(b, last, r.choice([INT8, UINT8, RELU]), rows=rows)
    if r.random() < 0.5:
        size = math.prod(b.shape(last))
        flat = reshaped(b, last, size)
        op = Linear(b.new_name("linear"), (flat,))
        last = table(b, b.weighted(op, weights(b.rng, 18, size), INT8))
        op = Linear(b.new_name("linear"), (last,))
        b.weighted(op, weights(b.rng, 7, 18), INT8)
    elif isinstance(b.ops[-1], Slice | Reshape | Upsample):
        b.add(Clamp("output", (last,)), b.grid(last))
    return b.finish()


SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 150))]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_chains_of_layers(isa, seed, tmp_path):
    runnable(isa)
    program = chain(seed)
    compiled = Compiled(program, isa, tmp_path, fuse=seed % 4 != 3)
    assert first_difference(compiled, codes_for(program, seed=seed)) is None
