"""Kernels on AMX tiles. They run on tiles where the CPU has them, and everywhere in an emulation
of the instructions, `amx_emulation.h`, compiled for AVX-512 with VNNI."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intact.arithmetic import QParams
from intact.engines import load_engine, native
from intact.engines.native import build, emit_amx
from intact.engines.native.cpu import ISAS
from intact.engines.native.emit import generate
from intact.engines.native.runtime import load_runtime, pack
from intact.ops import Add, Conv2d, GlobalAvgPool, Linear, MaxPool2d, Reshape, Table
from intact.program import Program
from intact.signature import Values, wrapped
from native_stub import codes_for, private_cache, tools
from strategies import Builder, input_codes, programs

EMULATION = Path(__file__).with_name("amx_emulation.h")
SIGNED = QParams((1.0,))
RELU = QParams((1.0,), -128, -128, 127)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A cache, a compiler, the runtime; `tiles` says whether there are tiles to run on."""
    with private_cache(tmp_path_factory.mktemp("cache")) as opened:
        kit = tools(opened)
        runtime = load_runtime(kit.cache, kit.compiler)
        reason = ISAS["avx512vnni"].missing(frozenset(runtime.features().split()))
        if reason:
            pytest.skip(reason)
        if not build.understands(kit.cache, kit.compiler, "avx512vnni"):
            pytest.skip(f"{kit.compiler.name} does not know AVX-512 VNNI")
        tiles = native.isas()["amx"] is None
        yield SimpleNamespace(cache=opened, compiler=kit.compiler, runtime=runtime, tiles=tiles)


def flags(kit, *, emulated: bool) -> list[str]:
    """The project's own flags; optimised less, which compiles in half the time."""
    if emulated:
        return [*kit.compiler.flags("avx512vnni"), "-O1", "-include", str(EMULATION)]
    return [*kit.compiler.flags("amx"), "-O1"]


def load(kit, program: Program, source: str, *, emulated: bool):
    """A compiled program, loaded by the project's runtime."""
    if emulated:  # the emulation asks the operating system for nothing
        source = source.replace("    init, run, trace, 1\n", "    init, run, trace, 0\n")
    path = build.library(kit.cache, kit.compiler, source, flags(kit, emulated=emulated))
    return kit.runtime.load(path, program, 1)


def differing(kit, program: Program, codes: Values, *, fuse: bool = True) -> list[str]:
    """Names of the tensors that differ from the reference engine's, on every way to run tiles."""
    generated = generate(program, "amx", fuse=fuse)
    expected: dict[str, np.ndarray] = {}
    output = load_engine("reference", program)(codes, expected.__setitem__)
    output = pack(wrapped(output, program.outputs))
    codes = pack(program.check_codes(codes))
    wrong = []
    for emulated in {True, not kit.tiles}:
        loaded = load(kit, program, generated.source, emulated=emulated)
        if not np.array_equal(loaded.codes(codes), output):
            wrong.append("the output")
        result, traced = loaded.trace(codes)
        if not np.array_equal(result, output):
            wrong.append("the output of trace")
        at = 0
        for name in generated.traced:
            spec = program.tensors[name]
            size = int(np.prod(spec.shape))
            got = np.ascontiguousarray(traced[:, at : at + size]).view(spec.qparams.dtype)
            at += size
            if not np.array_equal(got, expected[name].reshape(len(codes), size)):
                wrong.append(name)
        assert at == traced.shape[1]
    return wrong


class Choices:
    """Takes any tiling instead of the cheapest, so that all of them are tried."""

    def __init__(self, monkeypatch, seed: int) -> None:
        self.random = random.Random(seed)
        self.taken: list[emit_amx._Tiling] = []
        monkeypatch.setattr(emit_amx, "_cheapest", self.choose)
        monkeypatch.setattr(emit_amx.Amx, "pays", lambda *_: True)

    def choose(self, step) -> emit_amx._Tiling | None:
        kinds: dict[object, list[emit_amx._Tiling]] = {}
        for tiling in emit_amx._tilings(step):
            kinds.setdefault(self.kind(tiling), []).append(tiling)
        if not kinds:
            return None
        tiling = self.random.choice(kinds[self.random.choice(list(kinds))])
        self.taken.append(tiling)
        return tiling

    @staticmethod
    def kind(tiling: emit_amx._Tiling) -> tuple[object, ...]:
        unit = tiling.unit
        copied = "windows" if unit.grid.window else "patches" if unit.grid.patch else "direct"
        return (copied, unit.span, unit.flat, tiling.resident)


# -- programs --------------------------------------------------------------------------------------


def convolution(
    b: Builder,
    source: str,
    channels: int,
    kernel: tuple[int, int],
    grid: QParams = RELU,
    **settings,
) -> str:
    shape = (channels, b.shape(source)[0], *kernel)
    weight = b.rng.integers(-128, 128, shape).astype(np.int8)
    bias = b.rng.integers(-9999, 9999, channels).astype(np.int32)
    op = Conv2d(b.new_name("conv"), (source,), **settings)
    return b.weighted(op, weight, grid, bias=bias)


def linear(b: Builder, source: str, channels: int) -> str:
    weight = b.rng.integers(-128, 128, (channels, *b.shape(source))).astype(np.int8)
    return b.weighted(Linear(b.new_name("linear"), (source,)), weight, RELU)


def flattened(b: Builder, source: str) -> str:
    size = int(np.prod(b.shape(source)))
    return b.add(Reshape(b.new_name("flatten"), (source,), (size,)), b.grid(source))


def lenet() -> Program:
    b = Builder.start((3, 32, 32), SIGNED)
    x = "x"
    for channels in (6, 16):
        x = convolution(b, x, channels, (5, 5))
        x = b.add(MaxPool2d(b.new_name("pool"), (x,), (2, 2), (2, 2)), RELU)
    x = flattened(b, x)
    for channels in (120, 84, 10):
        x = linear(b, x, channels)
    return b.finish()


def resnet() -> Program:
    """A block of each stage of ResNet-20."""
    b = Builder.start((3, 32, 32), SIGNED)
    pad = (1, 1, 1, 1)
    x = convolution(b, "x", 16, (3, 3), padding=pad)
    for channels, step in ((16, 1), (32, 2), (64, 2)):
        y = convolution(b, x, channels, (3, 3), padding=pad, stride=(step, step))
        y = convolution(b, y, channels, (3, 3), SIGNED, padding=pad)
        if step > 1:
            x = convolution(b, x, channels, (1, 1), SIGNED, stride=(step, step))
        else:
            x = b.on_grid(x, SIGNED)
        x = b.add(Add(b.new_name("add"), (y, x)), QParams((1.0,), 0, 0, 127))
    x = b.rescaled(GlobalAvgPool(b.new_name("mean"), (x,)), SIGNED)
    linear(b, flattened(b, x), 10)
    return b.finish()


def image(seed: int) -> Program:
    """A few layers of images that are large enough for tiles, of any shape."""
    r = random.Random(seed)
    channels = r.choice([1, 2, 3, 4, 6, 16, 20, 32, 48, 64])
    shape = (channels, r.randint(3, 22), r.choice([*range(3, 23), 34, 70]))
    b = Builder.start(shape, QParams((1.0,), r.choice([0, -128, 10])), seed)
    x = "x"
    for _ in range(r.randint(1, 3)):
        _, height, width = b.shape(x)
        kernel = (r.choice([1, 2, 3, min(5, height)]), r.choice([1, 2, 3, min(7, width)]))
        kernel = (min(kernel[0], height), min(kernel[1], width))
        stride = r.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)])
        dilation = r.choice([(1, 1), (1, 1), (1, 1), (2, 1), (1, 2)])
        if dilation[0] * (kernel[0] - 1) >= height or dilation[1] * (kernel[1] - 1) >= width:
            dilation = (1, 1)
        padding = tuple(r.choice([0, 0, 1, 2]) for _ in range(4))
        grid = QParams((1.0,), r.choice([0, -128, 4]))
        made = r.choice([1, 3, 4, 6, 8, 10, 16, 17, 24, 32, 40, 70])
        x = convolution(b, x, made, kernel, grid, stride=stride, dilation=dilation, padding=padding)
        _, height, width = b.shape(x)
        window = r.choice([(2, 2), (2, 2), (1, 2), (2, 1), (3, 1), (1, 3), (4, 1)])
        if r.random() < 0.5 and window[0] <= height and window[1] <= width:
            x = b.add(MaxPool2d(b.new_name("pool"), (x,), window, window), grid)
        elif r.random() < 0.3:
            y = convolution(b, x, made, (3, 3), grid, padding=(1, 1, 1, 1))
            x = b.add(Add(b.new_name("add"), (x, y)), grid)
    if r.random() < 0.5:
        x = flattened(b, x)
        for made in (r.choice([10, 33, 100]), r.choice([5, 16, 90])):
            x = linear(b, x, made)
    return b.finish()


# -- the kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lenet, resnet])
def test_networks_have_the_bits_of_the_reference(kit, make):
    program = make()
    assert generate(program, "amx").source.count("_tile_dpbusd(") > 50
    # A block of 16 samples and one that is alone, which has a way of its own.
    assert differing(kit, program, codes_for(program, 17)) == []


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(s, marks=pytest.mark.slow) for s in range(4, 200))]
)
def test_every_tiling_has_the_bits_of_the_reference(kit, monkeypatch, seed):
    choices = Choices(monkeypatch, seed)
    program = image(seed)
    codes = codes_for(program, 1 + seed % 3 * 8, seed)
    assert differing(kit, program, codes, fuse=seed % 4 != 3) == []
    assert choices.taken


def test_there_are_tilings_of_all_kinds(monkeypatch):
    choices = Choices(monkeypatch, 0)
    for seed in range(60):
        generate(image(seed), "amx")
    copied, spans, flat, resident = map(set, zip(*map(choices.kind, choices.taken), strict=True))
    assert copied == {"direct", "windows", "patches"}
    assert spans == {1, 2, 4}
    assert flat == resident == {True, False}
    assert {tiling.unit.lanes for tiling in choices.taken} == {4, 8, 16}


@pytest.mark.parametrize("shape", [(20, 3), (3, 1, 20), (3, 2, 20), (3, 5, 33), (3, 4, 15)])
def test_three_channels_are_read_in_their_order(kit, monkeypatch, shape):
    b = Builder.start(shape, SIGNED)
    if len(shape) == 3:
        convolution(b, "x", 5, (1, 3))
    else:
        weight = b.rng.integers(-128, 128, (5, 3)).astype(np.int8)
        b.weighted(Linear("linear", ("x",)), weight, RELU)
    Choices(monkeypatch, 0)
    assert differing(kit, b.finish(), codes_for(b.finish(), 2)) == []


@pytest.mark.parametrize("seed", range(3))
def test_tables_are_looked_up_behind_tiles(kit, monkeypatch, seed):
    """Fused into a convolution, one with an addition, and layers on a block of samples."""
    choices = Choices(monkeypatch, seed)
    b = Builder.start((16, 8, 20), SIGNED, seed)

    def table(source: str) -> str:
        op = Table(b.new_name("table"), (source,))
        b.parameters[f"{op.name}.table"] = b.rng.integers(-128, 128, (1, 256)).astype(np.int8)
        return b.add(op, SIGNED)

    x = table(convolution(b, "x", 24, (3, 3), padding=(1, 1, 1, 1)))
    y = convolution(b, x, 24, (1, 1), SIGNED)
    x = table(b.add(Add("sum", (x, y)), SIGNED))
    x = table(linear(b, flattened(b, x), 40))
    table(linear(b, x, 18))
    program = b.finish()
    assert generate(program, "amx").traced == ("x", "table1", "table4", "table7", "table9")
    assert differing(kit, program, codes_for(program, 17)) == []
    assert choices.taken


@pytest.mark.parametrize("n", [1, 2, 5, 15, 16])
def test_any_part_of_a_block_has_the_bits_of_the_reference(kit, monkeypatch, n):
    b = Builder.start((130,), SIGNED)
    linear(b, linear(b, "x", 70), 9)
    program = b.finish()
    monkeypatch.setattr(emit_amx, "MOST_TWICE", 0)  # on tiles, even one sample
    monkeypatch.setattr(emit_amx.Amx, "pays", lambda *_: True)
    assert "_few" not in generate(program, "amx").source
    assert differing(kit, program, codes_for(program, n)) == []


def any_program(kit, monkeypatch, data):
    program = data.draw(programs(several=data.draw(st.booleans())))
    seed, codes = data.draw(st.integers(0, 9)), data.draw(input_codes(program))
    if len(wrapped(codes, program.inputs)[0]):
        with monkeypatch.context() as patch:
            Choices(patch, seed)
            assert differing(kit, program, codes, fuse=data.draw(st.booleans())) == []


SHARED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=6, suppress_health_check=SHARED)
@given(data=st.data())
def test_any_program_has_the_bits_of_the_reference(kit, monkeypatch, data):
    any_program(kit, monkeypatch, data)


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=SHARED)
@given(data=st.data())
def test_many_programs_have_the_bits_of_the_reference(kit, monkeypatch, data):
    any_program(kit, monkeypatch, data)


def test_one_wrong_weight_is_seen(kit, monkeypatch):
    Choices(monkeypatch, 0)
    weights = emit_amx._Tiles._weights

    def broken(self, vectors):
        packed = weights(self, vectors)
        packed[np.flatnonzero(packed)[0]] ^= 1
        return packed

    program = lenet()
    codes = codes_for(program, 2)
    assert differing(kit, program, codes) == []
    monkeypatch.setattr(emit_amx._Tiles, "_weights", broken)
    assert "the output" in differing(kit, program, codes)


def test_a_program_without_tiles_asks_for_none():
    b = Builder.start((1, 2, 2), SIGNED)
    convolution(b, "x", 1, (2, 2))
    source = generate(b.finish(), "amx").source
    assert "init, run, trace, 0\n" in source
    assert "_tile_loadconfig(" not in source
    assert "init, run, trace, 1\n" in generate(lenet(), "amx").source


def test_compilers_take_the_instructions_themselves(kit):
    if not build.understands(kit.cache, kit.compiler, "amx"):
        pytest.skip(f"{kit.compiler.name} does not know AMX")
    source = generate(lenet(), "amx").source
    build.library(kit.cache, kit.compiler, source, flags(kit, emulated=False))


# -- the emulation ---------------------------------------------------------------------------------

FRAME = """
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#ifndef INTACT_AMX_EMULATED
#include <sys/syscall.h>
#include <unistd.h>
#endif

static struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} c = {.palette = 1};

static void shape(int tile, int rows, int bytes)
{
    c.rows[tile] = (uint8_t)rows;
    c.bytes[tile] = (uint16_t)bytes;
}

int main(void)
{
    static uint8_t in[2][1024], out[1024];
#ifndef INTACT_AMX_EMULATED
    if (syscall(SYS_arch_prctl, 0x1023, 18))
        return 2;
#endif
    %s
    return 0;
}
"""


def run_tiles(kit, tmp_path, statements: str, *, emulated: bool, given: bytes = b""):
    """Compile and run statements on tiles."""
    work = tmp_path / ("emulated" if emulated else "real")
    work.mkdir(exist_ok=True)
    build.compile_c(
        kit.cache, kit.compiler, FRAME % statements, flags(kit, emulated=emulated), work / "tiles"
    )
    return subprocess.run([work / "tiles"], input=given, capture_output=True, check=False)


M, N, K = 5, 7, 12  # of nothing is there as much as fits
PRODUCT = f"""
    shape(0, {M}, {4 * N}), shape(1, {M}, {K}), shape(2, {K // 4}, {4 * N}), shape(3, 16, 64);
    if (fread(in, 1, sizeof in, stdin) != sizeof in)
        return 3;
    _tile_loadconfig(&c);
    _tile_loadd(0, in[0], 60);
    _tile_loadd(1, in[0] + 500, 20);
    _tile_stream_loadd(2, in[1] + 1, 33);
    NAME(0, 1, 2);
    NAME(0, 1, 2);
    _tile_stored(0, out, 36);
    _tile_loadd(3, in[1], 0);
    _tile_stored(3, out + 200, 40);
    _tile_zero(2);
    _tile_stored(2, out + 900, 30);
    _tile_release();
    fwrite(out, 1, sizeof out, stdout);
"""


@pytest.mark.parametrize("a", ["s", "u"])
@pytest.mark.parametrize("b", ["s", "u"])
def test_the_emulation_multiplies_as_numpy_does(kit, tmp_path, a, b):
    memory = np.random.default_rng(0).integers(0, 256, (2, 1024)).astype(np.uint8)
    statements = PRODUCT.replace("NAME", f"_tile_dpb{a}{b}d")
    done = run_tiles(kit, tmp_path, statements, emulated=True, given=memory.tobytes())
    assert done.returncode == 0

    def rows(start: int, stride: int, count: int, size: int) -> np.ndarray:
        flat = memory.reshape(-1)
        return np.stack([flat[start + i * stride :][:size] for i in range(count)])

    kinds = {"s": np.int8, "u": np.uint8}
    left = rows(500, 20, M, K).view(kinds[a]).astype(np.int64)
    right = rows(1025, 33, K // 4, 4 * N).view(kinds[b]).reshape(K // 4, N, 4)
    sums = np.ascontiguousarray(rows(0, 60, M, 4 * N)).view(np.int32).astype(np.int64)
    sums += 2 * left @ right.transpose(0, 2, 1).reshape(K, N).astype(np.int64)
    expected = np.zeros(1024, np.uint8)
    for m in range(M):  # modulo 2**32
        expected[36 * m : 36 * m + 4 * N] = sums[m].astype(np.uint32).view(np.uint8)
    for m in range(16):
        expected[200 + 40 * m : 264 + 40 * m] = memory[1, :64]
    assert np.array_equal(np.frombuffer(done.stdout, np.uint8), expected)
    if kit.tiles:
        real = run_tiles(kit, tmp_path, statements, emulated=False, given=memory.tobytes())
        assert real.stdout == done.stdout


USE = (
    "_tile_loadconfig(&c); _tile_loadd(0, in, 64); _tile_loadd(1, in, 64); _tile_loadd(2, in, 64);"
)
SHAPES = "shape(0, 16, 64); shape(1, 16, 64); shape(2, 16, 64);"


@pytest.mark.parametrize(
    ("statements", "why"),
    [
        ("shape(0, 17, 64); _tile_loadconfig(&c);", "more than 16 rows"),
        ("shape(0, 16, 65); _tile_loadconfig(&c);", "more than 64 bytes"),
        ("shape(8, 1, 4); _tile_loadconfig(&c);", "eight tiles"),
        ("c.palette = 2; _tile_loadconfig(&c);", "no such palette"),
        ("c.reserved[3] = 1; _tile_loadconfig(&c);", "reserved byte"),
        ("shape(0, 1, 0); _tile_loadconfig(&c);", "rows without columns"),
        ("_tile_loadd(0, in, 64);", "not configured"),
        ("c.palette = 0; _tile_loadconfig(&c); _tile_zero(0);", "not configured"),
        (SHAPES + "_tile_loadconfig(&c); _tile_release(); _tile_zero(1);", "not configured"),
        (SHAPES + "_tile_loadconfig(&c); _tile_zero(3);", "no rows or columns"),
        (SHAPES + USE + "_tile_dpbusd(0, 1, 1);", "not three"),
        (SHAPES + "shape(1, 15, 64);" + USE + "_tile_dpbusd(0, 1, 2);", "M differs"),
        (SHAPES + "shape(1, 16, 60);" + USE + "_tile_dpbusd(0, 1, 2);", "K differs"),
        (SHAPES + "shape(2, 16, 60);" + USE + "_tile_dpbusd(0, 1, 2);", "N differs"),
        (SHAPES + "shape(1, 16, 63);" + USE + "_tile_dpbusd(0, 1, 2);", "groups of four"),
    ],
)  # fmt: skip
def test_the_emulation_aborts_where_the_manual_has_a_fault(kit, tmp_path, statements, why):
    done = run_tiles(kit, tmp_path, statements + "(void)in; (void)out;", emulated=True)
    assert done.returncode != 0
    assert why in done.stderr.decode()
    if kit.tiles:
        real = run_tiles(kit, tmp_path, statements + "(void)in; (void)out;", emulated=False)
        assert real.returncode not in {0, 2}
