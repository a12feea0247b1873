"""Generated kernels give the bits of the reference engine, whatever the program's shapes."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import strategies
from intact.arithmetic import QParams
from intact.engines import load_engine
from intact.engines.native import isas
from intact.engines.native.emit import generate
from intact.engines.native.emit_avx512 import Avx512Vnni
from intact.engines.native.plan import make_plan
from intact.engines.reference import ReferenceEngine
from intact.errors import EngineUnavailableError, ProgramError
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
    Requantize,
    Reshape,
    Slice,
    Subtract,
    Table,
    Upsample,
)
from intact.program import Program
from native_harness import Compiled, compiler, first_difference
from strategies import Builder, example

UINT8 = QParams((1.0,), 0, 0, 255, 8, False)
INT8 = QParams((1.0,), 4, -128, 127, 8, True)
KERNELS = ("portable", "avx2", "avx512vnni")
"""Those with a generator of their own that run without AMX; test_native_amx.py has the third."""


def runnable(isa: str) -> str:
    if reason := isas().get(isa):
        pytest.skip(reason)
    return isa


def codes_for(program: Program, n: int = 3, seed: int = 0) -> np.ndarray:
    spec = program.tensors[program.input]
    rng = np.random.default_rng(seed)
    codes = rng.integers(spec.qparams.qmin, spec.qparams.qmax + 1, (n, *spec.shape))
    return codes.astype(spec.qparams.dtype)


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-127, 128, shape).astype(np.int8)


def random_programs(count: int, folder, isa: str) -> None:
    runnable(isa)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data(), st.booleans())
    def agree(data, fuse):
        program = data.draw(strategies.programs())
        codes = data.draw(strategies.input_codes(program))
        if len(codes):
            assert first_difference(Compiled(program, isa, folder, fuse=fuse), codes) is None

    agree()


@pytest.mark.parametrize("isa", KERNELS)
def test_random_programs_run_like_the_reference(isa, tmp_path):
    random_programs(15, tmp_path, isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", KERNELS)
def test_many_random_programs_run_like_the_reference(isa, tmp_path):
    random_programs(600, tmp_path, isa)


def network(seed: int, first: tuple[int, int, int], grid: QParams) -> Program:
    """Channels and sizes that are multiples of nothing, fused pools and additions, every border."""
    rng = np.random.default_rng(seed)
    channels = first[0]
    b = Builder.start(first, grid, seed=seed)
    out = int(rng.choice([6, 15, 17, 33]))
    b.weighted(
        Conv2d("a", ("x",), padding=(2, 1, 0, 3)),
        weights(rng, out, channels, 5, 5),
        INT8,
        bias=rng.integers(-900, 900, out).astype(np.int32),
    )
    b.add(MaxPool2d("pool", ("a",), kernel=(2, 2), stride=(2, 2)), INT8)
    b.weighted(
        Conv2d("b", ("pool",), padding=(1, 1, 1, 1)), weights(rng, out, out, 3, 3), INT8, gain=4
    )
    b.weighted(Conv2d("c", ("pool",)), weights(rng, out, out, 1, 1), INT8, grid="float")
    narrow = QParams(INT8.scale, 4, -20, 90, 8, True)
    b.add(Add("sum", ("b", "c")), narrow)
    b.weighted(
        Conv2d("d", ("sum",), (2, 1), (1, 0, 2, 1), (1, 2), out),
        weights(rng, out, 1, 3, 3),
        UINT8,
    )
    size = int(np.prod(b.shape("d")))
    b.add(Reshape("flat", ("d",), (size,)), UINT8)
    b.weighted(Linear("e", ("flat",)), weights(rng, 21, size), UINT8)
    b.weighted(Linear("f", ("e",)), weights(rng, 10, 21), INT8, per_channel=False)
    return b.finish()


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("fuse", [True, False])
def test_odd_shapes(isa, fuse, tmp_path):
    runnable(isa)
    firsts = ((3, 16, 16), (1, 9, 13), (4, 11, 32), (5, 8, 20), (3, 13, 18))
    for seed, first in enumerate(firsts):
        program = network(seed, first, INT8 if seed % 2 else UINT8)
        compiled = Compiled(program, isa, tmp_path, fuse=fuse)
        assert first_difference(compiled, codes_for(program)) is None


def first_layers(count: int) -> list[Program]:
    """Convolutions of images, with a max pool or without, whose results lie densely."""
    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        kh, kw, sy, sx = (int(rng.integers(*ends)) for ends in ((1, 6), (1, 8), (1, 3), (1, 3)))
        pool = tuple(int(n) for n in rng.choice([1, 2, 2, 3], 2))
        height = kh + sy * pool[0] * int(rng.integers(1, 12))
        width = int(rng.choice([16, 32, 64, 96, 128, 160])) if seed % 2 else 0
        width = max(width, kw + sx * pool[1] * int(rng.integers(1, 40)))
        dilation = (2, 1) if height > 2 * kh and seed % 5 == 0 else (1, 1)
        grid = INT8 if seed % 3 else UINT8
        b = Builder.start((3, height, width), grid, seed)
        most = max(1, 24 // (pool[0] * pool[1]))
        out = int(rng.integers(1, most + 1))
        bias = rng.integers(-900, 900, out).astype(np.int32)
        op = Conv2d("conv", ("x",), (sy, sx), (0, 0, 0, 0), dilation)
        b.weighted(op, weights(rng, out, 3, kh, kw), UINT8, bias=bias)
        if all(n >= p for n, p in zip(b.shape("conv")[1:], pool, strict=True)):
            b.add(MaxPool2d("pool", ("conv",), kernel=pool, stride=pool), UINT8)
        found.append(b.finish())
    return found


@pytest.mark.parametrize("isa", KERNELS)
def test_first_layers_on_images_of_any_size(isa, tmp_path):
    runnable(isa)
    for program in first_layers(40):
        assert first_difference(Compiled(program, isa, tmp_path), codes_for(program)) is None


def test_vectors_run_on_from_row_to_row_where_that_takes_fewer():
    places = [make_plan(p, Avx512Vnni.layout).inputs[0] for p in first_layers(40)]
    windowed = [place for place in places if place.windows]
    assert {place.row_phases for place in windowed} >= {0, 1, 2, 4}
    lenet = Builder.start((3, 32, 32), UINT8)
    lenet.weighted(Conv2d("conv", ("x",)), weights(lenet.rng, 6, 3, 5, 5), UINT8)
    lenet.add(MaxPool2d("pool", ("conv",), (2, 2), (2, 2)), UINT8)
    place = make_plan(lenet.finish(), Avx512Vnni.layout).inputs[0]
    # 196 windows of 16 bytes lie side by side, by the parity of their rows and columns.
    assert (place.windows, place.phases, place.row_phases, place.row) == (4, 2, 2, 14 * 4)
    assert place.line(5) == place.row_phase + 2 * place.row


@pytest.mark.parametrize("isa", KERNELS)
def test_depthwise_and_grouped_convolutions(isa, tmp_path):
    runnable(isa)
    cases = ((1, 3), (16, 5), (64, 3), (70, 4), (130, 3))
    for i, (channels, kernel) in enumerate(cases):
        rng = np.random.default_rng(i)
        b = Builder.start((channels, 9, 11), INT8, seed=i)
        stride, dilation = 1 + i % 2, 1 + (i == 2)
        b.weighted(
            Conv2d("dw", ("x",), (stride, 1), (1, 2, 0, 1), (dilation, dilation), channels),
            weights(rng, channels, 1, kernel, kernel),
            INT8,
            bias=rng.integers(-500, 500, channels).astype(np.int32),
        )
        groups = 2 if channels % 2 == 0 else 1
        grouped = Conv2d("g", ("dw",), padding=(1, 1, 1, 1), groups=groups)
        b.weighted(grouped, weights(rng, 6, channels // groups, 3, 3), UINT8)
        program = b.finish()
        assert first_difference(Compiled(program, isa, tmp_path), codes_for(program)) is None


@pytest.mark.parametrize("isa", KERNELS)
def test_a_residual_block_with_a_rescaled_shortcut(isa, tmp_path):
    """Convolution, requantization of the shortcut and addition become one kernel."""
    runnable(isa)
    rng = np.random.default_rng(5)
    other = QParams((0.375,), 2)
    b = Builder.start((16, 6, 10), other, seed=5)
    b.weighted(Conv2d("conv", ("x",), padding=(1, 1, 1, 1)), weights(rng, 16, 16, 3, 3), INT8)
    b.rescaled(Requantize("shortcut", ("x",)), INT8)
    b.add(Add("sum", ("conv", "shortcut")), QParams(INT8.scale, 4, 4, 127))
    b.weighted(Conv2d("next", ("sum",), (2, 2), (1, 1, 1, 1)), weights(rng, 32, 16, 3, 3), INT8)
    b.add(Permute("turned", ("next",), (2, 0, 1)), INT8)
    b.add(Clamp("clamped", ("turned",)), QParams(INT8.scale, 4, -10, 10))
    program = b.finish()
    compiled = Compiled(program, isa, tmp_path)
    assert "shortcut" not in compiled.generated.traced
    assert first_difference(compiled, codes_for(program)) is None


@pytest.mark.parametrize("isa", KERNELS)
def test_accumulators_at_the_ends_of_their_range(isa, tmp_path):
    """Every product at its largest, over 70,000 terms, and multipliers that exceed int32."""
    runnable(isa)
    terms = 66_000
    for sign in (1, -1):
        b = Builder.start((terms,), INT8, seed=3)
        weight = np.full((3, terms), 127 * sign, np.int8)
        weight[1] = 1
        weight[2, ::2] = -weight[2, ::2]
        b.weighted(Linear("y", ("x",)), weight, INT8, gain=300, grid="float")
        program = b.finish()
        ends = np.array([INT8.qmin, INT8.qmax, 4], np.int8)
        codes = np.repeat(ends[:, None], terms, axis=1)
        assert first_difference(Compiled(program, isa, tmp_path), codes) is None


@pytest.mark.parametrize("isa", KERNELS)
def test_any_number_of_channels(isa, tmp_path):
    """Also where the last of several passes over an image has vectors that are not full."""
    runnable(isa)
    for i, out in enumerate((1, 15, 31, 49, 61, 97, 130)):
        b = Builder.start((33, 5, 18), INT8, seed=i)
        b.weighted(Conv2d("c", ("x",), (1, 2)), weights(b.rng, out, 33, 3, 3), UINT8)
        b.weighted(Conv2d("d", ("c",)), weights(b.rng, out + 1, out, 1, 1), INT8)
        program = b.finish()
        assert first_difference(Compiled(program, isa, tmp_path), codes_for(program)) is None


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("rescale", [True, False])
def test_an_input_added_to_its_own_convolution(isa, channels, rescale, tmp_path):
    """The one kernel reads it in two ways, so its pixels must lie as both expect."""
    runnable(isa)
    grid = QParams((2.0,), 4) if rescale else INT8
    for padding, kernel in (((1, 1, 1, 1), 3), ((0, 0, 0, 0), 1)):
        b = Builder.start((channels, 6, 32), INT8)
        conv = Conv2d("conv", ("x",), padding=padding)
        b.weighted(conv, weights(b.rng, channels, channels, kernel, kernel), grid)
        b.add(Add("sum", ("conv", b.on_grid("x", grid))), grid)
        program = b.finish()
        assert first_difference(Compiled(program, isa, tmp_path), codes_for(program)) is None


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("kind", ["linear", "concat"])
def test_a_view_that_is_first_read_as_it_is_and_then_stored(isa, kind, tmp_path):
    runnable(isa)
    b = Builder.start((4, 3, 3), INT8)
    b.weighted(Conv2d("conv", ("x",)), weights(b.rng, 4, 4, 1, 1), INT8)
    b.add(Permute("turned", ("conv",), (1, 2, 0)), INT8)
    b.add(Reshape("flat", ("turned",), (36,)), INT8)
    if kind == "linear":
        b.weighted(Linear("first", ("flat",)), weights(b.rng, 36, 36), INT8)
        b.add(Add("sum", ("first", "flat")), INT8)
    else:
        b.add(Concat("first", ("turned", "turned"), 1), INT8)
        b.add(Clamp("second", ("turned",)), INT8)
        b.add(Concat("both", ("first", "second"), 1), INT8)
    program = b.finish()
    assert first_difference(Compiled(program, isa, tmp_path), codes_for(program)) is None


def stack_bytes(source: str) -> int:
    """Of the largest local array."""
    sizes = [0]
    for width, dimensions in re.findall(r"^ +u?int(8|32)_t \w+((?:\[\d+\])+)", source, re.M):
        sizes.append(math.prod(map(int, re.findall(r"\d+", dimensions))) * int(width) // 8)
    return max(sizes)


@pytest.mark.parametrize("isa", KERNELS)
def test_large_kernels_and_images_leave_the_stack_alone(isa, tmp_path):
    """Threads may have half a megabyte of it."""
    runnable(isa)
    apart = Conv2d("conv", ("x",), dilation=(1, 2), groups=2)
    for shape, conv, weight in (
        ((3, 500, 310), Conv2d("conv", ("x",), (2, 2)), (4, 3, 5, 5)),
        ((3, 900, 9), Conv2d("conv", ("x",), (1, 2)), (4, 3, 5, 5)),
        ((3, 304, 302), Conv2d("conv", ("x",), padding=(1, 0, 2, 0)), (2, 3, 304, 301)),
        ((4, 192, 402), apart, (4, 2, 190, 199)),
    ):
        b = Builder.start(shape, INT8)
        b.weighted(conv, b.rng.integers(-1, 2, weight).astype(np.int8), INT8)
        b.add(MaxPool2d("pool", ("conv",)), INT8)
        program = b.finish()
        compiled = Compiled(program, isa, tmp_path)
        assert stack_bytes(compiled.generated.source) <= 2**18
        assert first_difference(compiled, codes_for(program, 1)) is None


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_permutations_are_loops(isa, axes, tmp_path):
    """Compilers take minutes over tables of a large image's elements."""
    runnable(isa)
    for stored in (True, False):
        b = Builder.start((3, 4, 10), INT8)
        b.weighted(Conv2d("conv", ("x",), padding=(1, 1, 1, 1)), weights(b.rng, 4, 3, 3, 3), INT8)
        b.add(Permute("turned", ("conv",), axes), INT8)
        if stored:
            b.add(Clamp("clamp", ("turned",)), INT8)
        b.add(Concat("output", (b.ops[-1].name, "turned"), 1), INT8)
        b.add(Permute("again", ("output",), axes), INT8)
        program = b.finish()
        compiled = Compiled(program, isa, tmp_path)
        assert not re.search(r"_from\d|_to\d|order_of_", compiled.generated.source)
        assert first_difference(compiled, codes_for(program)) is None


@pytest.mark.parametrize("isa", KERNELS)
def test_large_kernels_are_loops(isa, tmp_path):
    """Written out tap by tap, they would take compilers minutes."""
    runnable(isa)
    for groups, out, kernel in ((3, 3, (31, 31)), (1, 2, (1, 90))):
        b = Builder.start((3, 40, 96), INT8)
        weight = weights(b.rng, out, 3 // groups, *kernel)
        b.weighted(Conv2d("conv", ("x",), groups=groups), weight, INT8)
        program = b.finish()
        compiled = Compiled(program, isa, tmp_path)
        assert compiled.generated.source.count("DOT(") < 1000
        assert first_difference(compiled, codes_for(program)) is None


def test_what_would_not_fit_the_memory_is_refused():
    """One reader pads a pixel to a row, another to a column, and both to 14 GB."""
    far, row, column = (60_000, 60_000), (0, 0, 60_000, 60_000), (60_000, 60_000, 0, 0)
    b = Builder.start((1, 1, 1), INT8)
    b.weighted(Conv2d("row", ("x",), far, row), np.ones((1, 1, 1, 1), np.int8), INT8)
    b.weighted(Conv2d("column", ("x",), far, column), np.ones((1, 1, 1, 1), np.int8), INT8)
    b.add(Reshape("turned", ("column",), b.shape("row")), INT8)
    b.add(Add("sum", ("row", "turned")), INT8)
    program = b.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EngineUnavailableError, match=r"'x' with its padding would take 14,4"):
            load_engine("native", program)
    assert program.codes(codes_for(program), engine="reference").shape == (3, 1, 1, 3)


@pytest.mark.parametrize("isa", KERNELS)
def test_broken_kernels_are_noticed(isa, tmp_path):
    """What the tests above compare can differ: a weight, a bias, a multiplier, the rounding."""
    runnable(isa)
    program = network(0, (4, 12, 12), INT8)
    codes = codes_for(program, 4)

    def weight(source: str) -> str:
        start = source.index('"\\', source.index("_weight["))
        octal = source[start + 2 : start + 5]
        return source[: start + 2] + f"{int(octal, 8) ^ 0o150:03o}" + source[start + 5 :]

    def bias(source: str) -> str:
        start = source.index("{\n", source.index("_bias[")) + 2
        end = source.index(",", start)
        return source[:start] + f"    {int(source[start:end]) + 4000}" + source[end:]

    def multiplier(source: str) -> str:
        start = source.index("{\n", source.index("_multiplier[")) + 2
        end = source.index(",", start)
        value = float.fromhex(source[start:end].strip().removesuffix("f"))
        return source[:start] + f"    {(value * 1.5).hex()}f" + source[end:]

    def rounding(source: str) -> str:
        if isa == "portable":
            return source.replace("(p + 12582912.0f) - 12582912.0f", "p")
        width = 256 if isa == "avx2" else 512
        return source.replace(f"_mm{width}_cvtps_epi32(", f"_mm{width}_cvttps_epi32(")

    def border(source: str) -> str:
        return source.replace("memset(x - ", "if (0) memset(x - ").replace(
            "memset(to - ", "if (0) memset(to - "
        )

    for change in (weight, bias, multiplier, rounding, border):
        whole = Compiled(program, isa, tmp_path)
        broken = Compiled(program, isa, tmp_path, change=change)
        assert whole.generated.source == broken.generated.source
        assert change(whole.generated.source) != whole.generated.source
        assert first_difference(whole, codes) is None
        assert first_difference(broken, codes) is not None, change.__name__


def test_the_source_is_the_same_in_every_process(tmp_path):
    program = example()
    program.save(tmp_path / "p.safetensors")
    code = (
        "import sys, intact, hashlib\n"
        "from intact.engines.native.emit import generate\n"
        f"p = intact.load({str(tmp_path / 'p.safetensors')!r})\n"
        "text = ''.join(generate(p, isa).source for isa in ('portable', 'avx512vnni'))\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1
    assert len(hashes.pop()) == 65


@pytest.mark.parametrize("isa", KERNELS)
def test_names_from_strangers_stay_names(isa, tmp_path):
    runnable(isa)
    name = '*/ int main; #define " \\ ü ??/' * 3
    b = Builder.start((2, 5, 5), UINT8)
    b.weighted(Conv2d(name, ("x",)), weights(np.random.default_rng(0), 3, 2, 3, 3), UINT8)
    program = b.finish()
    assert first_difference(Compiled(program, isa, tmp_path), codes_for(program)) is None


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ProgramError, match="there is no instruction set 'mmx'"):
        generate(example(), "mmx")


@pytest.mark.parametrize("compiler_name", ["gcc", "clang"])
def test_portable_kernels_are_strict_c99(compiler_name, tmp_path):
    compiler()
    if shutil.which(compiler_name) is None:
        pytest.skip(f"there is no {compiler_name} here")
    for seed, fuse in itertools.product((0, 1), (True, False)):
        program = block() if seed else network(seed, (3, 12, 12), INT8)
        source = tmp_path / f"{seed}{fuse}.c"
        source.write_text(generate(program, "portable", fuse=fuse).source)
        flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Wno-overlength-strings"]
        flags += ["-Wno-type-limits", "-Wno-unused-function"]
        subprocess.run([compiler_name, *flags, "-fsyntax-only", str(source)], check=True)


@pytest.mark.parametrize("isa", KERNELS)
def test_kernels_stay_within_their_memory(isa, tmp_path):
    """Under the address and undefined-behaviour sanitizers, with exact buffers around the calls."""
    runnable(isa)
    wide = Builder.start((3, 5, 64), INT8)  # windows of many pixels
    wide.weighted(Conv2d("conv", ("x",)), weights(wide.rng, 2, 3, 1, 61), INT8)
    # The codes sum to more than an int32 holds, less their zero points they do not.
    mean = Builder.start((1, 3000, 3000), QParams((1.0,), 254, 254, 255, 8, False))
    mean.rescaled(GlobalAvgPool("mean", ("x",)), UINT8)
    sanitize(tmp_path, isa, [(wide.finish(), True), (mean.finish(), True)])
    sanitize(tmp_path, isa, [(network(s, (3, 16, 16), INT8), f) for s in (0, 1) for f in (1, 0)])
    sanitize(tmp_path, isa, [(program, True) for program in first_layers(12)])
    sanitize(tmp_path, isa, [(block(), True), (block(), False)])


def block() -> Program:
    """Tables, a product, slices, constants and upsampled codes, of sizes that fill no vector."""
    b = Builder.start((7, 5, 9), INT8)
    b.weighted(Conv2d("conv", ("x",), padding=(1, 1, 1, 1)), weights(b.rng, 21, 7, 3, 3), INT8)
    for name, source, rows in (("fused", "conv", 1), ("apart", "fused", 1), ("rows", "apart", 21)):
        b.parameters[f"{name}.table"] = b.rng.integers(-128, 128, (rows, 256)).astype(np.int8)
        b.add(Table(name, (source,)), INT8)
    b.rescaled(GlobalAvgPool("mean", ("rows",)), INT8)
    b.parameters["product.multiplier"] = np.array([900], np.int32)
    b.add(Multiply("product", ("apart", "mean")), INT8)
    b.add(Subtract("difference", ("product", "rows")), INT8)
    b.add(Slice("slice", ("difference",), 0, 2, 21, 3), INT8)
    b.add(Upsample("upsample", ("slice",), (1, 2, 3)), INT8)
    b.add(Pad("pad", ("upsample",), (0, 1, 2, 0, 0, 3), 7.0), INT8)
    weight = weights(b.rng, 8, 1, 5, 5)
    b.weighted(Conv2d("deep", ("pad",), padding=(2, 2, 2, 2), groups=8), weight, INT8)
    return b.finish()


@pytest.mark.slow
@pytest.mark.parametrize("isa", KERNELS)
def test_random_programs_stay_within_their_memory(isa, tmp_path):
    runnable(isa)
    programs = []

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(strategies.programs(), st.booleans())
    def collect(program, fuse):
        programs.append((program, fuse))

    collect()
    sanitize(tmp_path, isa, programs)


EMULATED = {
    "avx2 on Haswell": ("avx2", None, ("qemu-x86_64", "-cpu", "Haswell")),
    "portable on Nehalem": ("portable", None, ("qemu-x86_64", "-cpu", "Nehalem")),
    "portable on ARM64": (
        "portable",
        "aarch64-linux-gnu-gcc",
        ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EMULATED)
def test_other_cpus_give_the_same_bits(name, tmp_path):
    isa, cross, emulator = EMULATED[name]
    if missing := [tool for tool in (cross, emulator[0]) if tool and not shutil.which(tool)]:
        pytest.skip(f"{missing[0]} is not installed")
    tool = compiler()
    for program in (*(network(seed, (3, 16, 16), INT8) for seed in range(4)), block()):
        generated = generate(program, isa)
        (tmp_path / "a.c").write_text(generated.source + MAIN)
        flags = [f for f in tool.flags(isa) if f not in {"-shared", "-fPIC"}]
        command = [cross, "-ffp-contract=off"] if cross else [*tool.command, *flags]
        command += ["-std=gnu11", "-O3", "-static", str(tmp_path / "a.c")]
        subprocess.run([*command, "-o", str(tmp_path / "a")], check=True)
        codes = codes_for(program, generated.block)
        (tmp_path / "in").write_bytes(codes.tobytes())
        files = [str(tmp_path / each) for each in ("a", "in", "out")]
        subprocess.run([*emulator, *files], check=True, stderr=subprocess.DEVNULL)
        assert (tmp_path / "out").read_bytes() == ReferenceEngine(program)(codes).tobytes()


MAIN = """
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv)
{
    const intact_module *m = &intact_program;
    const uint32_t n = m->block;
    uint8_t *in = malloc((size_t)n * m->input_bytes), *out = malloc((size_t)n * m->output_bytes);
    uint8_t *traced = malloc(m->trace_bytes), *arena;
    FILE *f = fopen(argv[1], "rb");
    if (argc != 3 || !f || fread(in, m->input_bytes, n, f) != n)
        return 2;
    fclose(f);
    if (posix_memalign((void **)&arena, 64, m->arena_bytes))
        return 3;
    m->init(arena);
    m->run(in, out, n, arena);
    m->trace(in, out, traced, arena);
    m->run(in, out, 1, arena);
    m->run(in, out, n, arena);
    f = fopen(argv[2], "wb");
    fwrite(out, m->output_bytes, n, f);
    fclose(f);
    free(in); free(out); free(traced); free(arena);
    return 0;
}
"""


def sanitize(folder, isa: str, programs) -> None:
    tool = compiler()
    for i, (program, fuse) in enumerate(programs):
        generated = generate(program, isa, fuse=bool(fuse))
        source, binary = folder / f"{i}.c", folder / f"{i}.out"
        source.write_text(generated.source + MAIN)
        flags = [f for f in tool.flags(isa) if f not in {"-shared", "-fPIC"}]
        flags += ["-O1", "-std=gnu11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        done = subprocess.run([*tool.command, *flags, str(source), "-o", str(binary)], check=False)
        if done.returncode:
            pytest.skip("this compiler has no sanitizers")
        codes = codes_for(program, generated.block, seed=i)
        (folder / "in").write_bytes(codes.tobytes())
        subprocess.run([str(binary), str(folder / "in"), str(folder / "out")], check=True)
        expected = ReferenceEngine(program)(codes)
        assert (folder / "out").read_bytes() == expected.tobytes()
