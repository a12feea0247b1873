"""Programs with several inputs and outputs: the same codes in every engine, each at its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from intact.arithmetic import QParams, dequantize, quantize
from intact.configurations import evaluator
from intact.engines import load_engine
from intact.engines.native import NativeEngine, isas
from intact.engines.native.cache import open_cache
from intact.engines.native.plan import Layout, make_plan
from intact.engines.native.runtime import load_runtime, pack, unpack
from intact.engines.reference import ReferenceEngine
from intact.engines.torch import TorchEngine
from intact.errors import EngineUnavailableError, IntactError, ProgramError
from intact.export.onnx import FLAVOURS, TRACED, model
from intact.ops import Add, Clamp, Conv2d, Linear, MaxPool2d, Reshape, Upsample
from intact.program import Program
from intact.signature import in_order, listed, unwrapped
from intact.storage import from_bytes, to_bytes
from native_harness import Compiled, first_difference
from native_stub import the_compiler
from strategies import Builder, example, input_codes, programs

GRID = QParams((2.0**-4,), 0)
UNSIGNED = QParams((2.0**-5,), 0, 0, 255, signed=False)
NARROW = QParams((0.25,), 4, -100, 90)


def pyramid(seed: int = 0) -> Program:
    """An image (int8) and a vector (uint8) to two maps, one of them read on, and two vectors.

    Its outputs stand in another order than its ops; one is a view, one is clamped.
    """
    b = Builder.start((3, 16, 16), GRID, seed)
    b.input("facts", (5,), UNSIGNED)
    deep = b.weighted(
        Conv2d("deep", ("x",), (2, 2), (1, 1, 1, 1)),
        b.rng.integers(-99, 99, (8, 3, 3, 3)).astype(np.int8),
        NARROW,
    )
    pooled = b.add(MaxPool2d("pooled", (deep,)), NARROW)
    up = b.add(Upsample("up", (pooled,), (1, 2, 2)), NARROW)
    both = b.add(Add("both", (deep, up)), NARROW)
    flat = b.add(Reshape("flat", (pooled,), (128,)), NARROW)
    b.weighted(Linear("head", (flat,)), b.rng.integers(-99, 99, (5, 128)).astype(np.int8), UNSIGNED)
    b.weighted(
        Linear("mixed", ("facts",)), b.rng.integers(-99, 99, (5, 5)).astype(np.int8), UNSIGNED
    )
    b.add(Add("sum", ("head", "mixed")), UNSIGNED)
    return b.finish("sum", up, both, "mixed")


def batch(program: Program, n: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    grids = [program.tensors[name] for name in program.inputs]
    return tuple(
        rng.integers(g.qparams.qmin, g.qparams.qmax + 1, (n, *g.shape)).astype(g.qparams.dtype)
        for g in grids
    )


def as_tuple(values) -> tuple[np.ndarray, ...]:
    return values if isinstance(values, tuple) else (values,)


def assert_equal(got, expected) -> None:
    got, expected = as_tuple(got), as_tuple(expected)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.array_equal(one, other)


def traced(engine, codes):
    """All that a hook sees, in order, and the result of the same call."""
    seen: dict[str, list[np.ndarray]] = {}
    output = engine(codes, lambda name, values: seen.setdefault(name, []).append(values.copy()))
    return {name: np.concatenate(parts) for name, parts in seen.items()}, output


# -- the right codes at the right place ----------------------------------------------------------


def test_outputs_are_the_tensors_of_their_names_in_the_order_of_the_outputs():
    program = pyramid()
    codes = batch(program, 3)
    seen, outputs = traced(ReferenceEngine(program), codes)
    assert list(seen) == [*program.inputs, *(op.name for op in program.ops)]
    assert program.outputs == ("sum", "up", "both", "mixed")
    assert [output.shape[1:] for output in outputs] == [(5,), (8, 8, 8), (8, 8, 8), (5,)]
    for name, output in zip(program.outputs, outputs, strict=True):
        assert np.array_equal(output, seen[name])
    alone = replace(program, outputs=("both",))
    assert alone.codes(codes, engine="reference").shape == (3, 8, 8, 8)


ENGINES = {
    "torch": TorchEngine,
    "native": NativeEngine,
    "unfused": lambda program: NativeEngine(program, fuse=False),
    "onnxruntime": lambda program: load_engine("onnxruntime", program),
    "openvino": lambda program: load_engine("openvino", program),
}


def made(name: str, program: Program):
    try:
        return ENGINES[name](program)
    except EngineUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_gives_all_outputs_and_shows_every_tensor(name):
    program = pyramid()
    engine = made(name, program)
    for n in (1, 2, 16, 17, 33, 0):
        codes = batch(program, n)
        expected_tensors, expected = traced(ReferenceEngine(program), codes)
        assert_equal(engine(codes), expected)
        seen, shown = traced(engine, codes)
        assert_equal(shown, expected)
        for tensor, values in seen.items():
            assert np.array_equal(values, expected_tensors[tensor]), tensor
        assert set(program.outputs) <= set(seen) or not n


@pytest.mark.parametrize("name", ENGINES)
def test_a_swap_of_two_inputs_or_outputs_of_one_shape_is_seen(name):
    b = Builder.start((4,), GRID)
    b.input("y", (4,), GRID)
    for source in ("x", "y"):
        weight = b.rng.integers(-99, 99, (4, 4)).astype(np.int8)
        b.weighted(Linear(f"of_{source}", (source,)), weight, GRID)
    program = b.finish("of_x", "of_y")
    engine = made(name, program)
    x, y = batch(program, 9)
    right = ReferenceEngine(program)((x, y))
    assert_equal(engine((x, y)), right)
    for swapped in (
        replace(program, outputs=("of_y", "of_x")),
        replace(program, inputs=("y", "x")),
    ):
        other = made(name, swapped)((x, y))
        assert not np.array_equal(other[0], right[0])
        assert not np.array_equal(other[1], right[1])
    assert not np.array_equal(engine((y, x))[0], right[0])


@settings(max_examples=50)
@given(st.data())
def test_torch_and_reference_agree_on_random_programs(data):
    program = data.draw(programs(several=True))
    codes = data.draw(input_codes(program))
    expected, output = traced(ReferenceEngine(program), codes)
    seen, shown = traced(TorchEngine(program), codes)
    assert list(seen) == list(expected)
    for name, values in seen.items():
        assert np.array_equal(values, expected[name]), name
    assert_equal(shown, output)
    assert_equal(TorchEngine(program)(codes), output)


def random_kernels(isa: str, folder, count: int) -> None:
    if reason := isas().get(isa):
        pytest.skip(reason)

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data(), st.booleans())
    def agree(data, fuse):
        program = data.draw(programs(several=True))
        codes = data.draw(input_codes(program))
        if len(as_tuple(codes)[0]):
            assert first_difference(Compiled(program, isa, folder, fuse=fuse), codes) is None

    agree()


KERNELS = ("portable", "avx2", "avx512vnni", "amx")


@pytest.mark.parametrize("isa", KERNELS)
def test_kernels_agree_with_the_reference_on_random_programs(isa, tmp_path):
    random_kernels(isa, tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("isa", KERNELS)
def test_kernels_agree_with_the_reference_on_many_random_programs(isa, tmp_path):
    random_kernels(isa, tmp_path, 400)


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("fuse", [True, False])
def test_kernels_agree_on_a_pyramid_in_blocks_of_any_size(isa, fuse, tmp_path):
    if reason := isas().get(isa):
        pytest.skip(reason)
    program = pyramid()
    compiled = Compiled(program, isa, tmp_path, fuse=fuse)
    assert first_difference(compiled, batch(program, 3)) is None


def test_two_images_are_both_laid_out_for_the_kernel_that_reads_them(tmp_path):
    # Kernels across pixels want the columns of an input by phase; here of two inputs.
    b = Builder.start((3, 20, 32), UNSIGNED)
    b.input("right", (3, 20, 32), GRID)
    for source in ("x", "right"):
        weight = b.rng.integers(-99, 99, (6, 3, 5, 5)).astype(np.int8)
        conv = b.weighted(Conv2d(f"conv_{source}", (source,)), weight, NARROW)
        b.add(MaxPool2d(f"pool_{source}", (conv,)), NARROW)
    b.add(Add("both", ("pool_x", "pool_right")), NARROW)
    program = b.finish("both", "pool_x")
    for isa in KERNELS:
        if isas().get(isa) is None:
            compiled = Compiled(program, isa, tmp_path)
            assert first_difference(compiled, batch(program, 3)) is None, isa


def test_an_exchange_of_two_stores_in_the_generated_code_would_be_seen(tmp_path):
    program = pyramid()

    def exchanged(source: str) -> str:
        for old, new in (("store1(output", "storeX("), ("store2(output", "store1(output")):
            assert old in source
            source = source.replace(old, new)
        return source.replace("storeX(", "store2(output")

    compiled = Compiled(program, "portable", tmp_path, change=exchanged)
    assert first_difference(compiled, batch(program, 3)) == "a batch of 1"


def test_the_code_of_a_program_with_one_input_and_one_output_is_as_ever():
    source = Compiled.__init__.__globals__["generate"](example(), "portable").source
    assert "load(input + (size_t)s * 50, arena, s);" in source
    assert "store(output + (size_t)s * 3, arena, s);" in source
    assert "load0" not in source


@pytest.mark.parametrize("extension", [True, False])
def test_the_runtime_takes_packed_codes(extension, monkeypatch):
    program = pyramid()
    engine = made("native", program)
    runtime = load_runtime(open_cache(), the_compiler(open_cache()), extension)
    monkeypatch.setattr("intact.engines.native.load_runtime", lambda *_: runtime)
    engine = NativeEngine(program)
    for n in (1, 40):
        codes = batch(program, n)
        assert_equal(engine(codes), ReferenceEngine(program)(codes))


def test_packing_and_unpacking_give_the_codes_back():
    program = pyramid()
    codes = batch(program, 4)
    packed = pack(codes)
    assert packed.dtype == np.uint8
    assert packed.shape == (4, 3 * 16 * 16 + 5)
    assert_equal(unpack(packed, [program.tensors[name] for name in program.inputs]), codes)
    assert pack(codes[:1]) is codes[0]


def test_one_input_and_several_outputs_take_the_quick_way():
    b = Builder.start((4,), QParams((0.5,)))
    b.weighted(Linear("a", ("x",)), b.rng.integers(-99, 99, (3, 4)).astype(np.int8), UNSIGNED)
    b.weighted(Linear("b", ("x",)), b.rng.integers(-99, 99, (2, 4)).astype(np.int8), GRID)
    program = b.finish("b", "a")
    engine = made("native", program)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    expected = program.codes(x, engine="reference")
    assert_equal(engine.try_codes(x), expected)
    assert engine.try_codes(np.full((1, 4), np.nan, np.float32)) is None
    assert engine.try_run(x) is None
    assert_equal(engine.run(x), program.run(x, engine="reference"))
    for _ in range(2):
        assert_equal(program.codes(x, engine="native"), expected)
        assert_equal(program.run(x, engine="native"), program.run(x, engine="reference"))


# -- what users give and get ---------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "torch", "native"])
def test_floats_go_in_as_a_tuple_or_by_name_and_come_out_dequantized(engine):
    program = pyramid()
    if engine == "native":
        made("native", program)
    rng = np.random.default_rng(3)
    x, facts = rng.normal(size=(6, 3, 16, 16)), rng.uniform(0, 8, size=(6, 5))
    codes = (quantize(x.astype(np.float32), GRID), quantize(facts.astype(np.float32), UNSIGNED))
    assert_equal(program.quantize_input((x, facts)), codes)
    expected = ReferenceEngine(program)(codes)
    real = tuple(
        dequantize(array, program.tensors[name].qparams)
        for name, array in zip(program.outputs, expected, strict=True)
    )
    forms = [(x, facts), [x, facts], {"facts": facts, "x": x}, (codes[0], facts), codes]
    for given_form in (*forms, *forms):  # the second time the engine is ready
        assert_equal(program.codes(given_form, engine), expected)
        assert_equal(program.run(given_form, engine), real)
    assert all(array.dtype == np.float32 for array in program.run((x, facts), engine))
    single = example()
    one = np.zeros((1, 2, 5, 5), np.float32)
    assert_equal(single.run({"x": one}, engine), single.run(one, engine))


X, FACTS = np.zeros((2, 3, 16, 16), np.float32), np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (X, "has 2 inputs, 'x' and 'facts': give a tuple of as many batches.*not a ndarray"),
        ((X,), "has 2 inputs, 'x' and 'facts'.*not 1"),
        ((X, FACTS, FACTS), "not 3"),
        ({"x": X}, "nothing for the program's input 'facts'"),
        ({"x": X, "fact": FACTS}, "no input 'fact'; it has 'x' and 'facts'"),
        ((X, FACTS[:1]), "as many samples, but there are 2 of 'x', 1 of 'facts'"),
        ((FACTS, X), r"the input 'x' takes batches of shape \[N, 3, 16, 16\], not \[2, 5\]"),
        ((X, FACTS.astype(int)), "the input 'facts' is int64. Give float32 values, or codes as ui"),
        ((X, [[1.0], [1.0, 2.0]]), "the input 'facts' is no array"),
        ((X, FACTS + np.nan), "the input 'facts' holds a NaN"),
        ((X, np.zeros((2, 4), np.uint8)), r"of the input 'facts' must be uint8 of shape \[N, 5\]"),
    ],
)
@pytest.mark.parametrize("engine", ["reference", "native"])
def test_what_does_not_fit_the_inputs_is_refused_by_name(x, reason, engine):
    program = pyramid()
    if engine == "native":
        made("native", program)
    for _ in range(2):  # the second time the engine is ready
        with pytest.raises(IntactError, match=reason):
            program.run(x, engine=engine)
        program.run((X, FACTS), engine=engine)


def test_codes_outside_of_the_range_of_an_input_name_it():
    b = Builder.start((2,), GRID)
    b.input("narrow", (2,), NARROW)
    b.add(Clamp("a", ("x",)), GRID)
    b.add(Clamp("b", ("narrow",)), NARROW)
    program = b.finish("a", "b")
    good = np.zeros((1, 2), np.int8)
    for engine in ("reference", "torch"):
        program.codes((good + 127, good), engine=engine)
        with pytest.raises(ProgramError, match="of the input 'narrow' reach from 127 to 127"):
            program.codes((good, good + 127), engine=engine)


def test_what_works_with_one_input_and_output_only_says_so():
    program = pyramid()
    with pytest.raises(ProgramError, match="program has 2 inputs, 'x' and 'facts'; this works"):
        _ = program.input
    with pytest.raises(ProgramError, match="program has 4 outputs, 'sum', 'up', 'both' and 'mix"):
        _ = program.output
    assert not program.takes_pixels
    assert (example().input, example().output) == ("x", "fc")


def test_a_program_shows_all_its_inputs_and_outputs():
    shown = repr(pyramid())
    assert "x [3, 16, 16], facts [5] -> sum [5], up [8, 8, 8], both [8, 8, 8], mixed [5]," in shown
    table = pyramid()._repr_html_()
    assert table.count("<td>input</td>") == 2


def test_names_are_listed_as_in_a_sentence():
    assert [listed("abc"[:n]) for n in range(4)] == ["", "'a'", "'a' and 'b'", "'a', 'b' and 'c'"]
    assert unwrapped([1]) == 1
    assert unwrapped([1, 2]) == (1, 2)
    assert in_order((1, 2), ("x",), "network", IntactError) == ((1, 2),)


# -- the file, and ONNX ---------------------------------------------------------------------------


@settings(max_examples=30)
@given(programs(several=True))
def test_files_hold_all_inputs_and_outputs_in_their_order(program):
    loaded = from_bytes(to_bytes(program))
    assert (loaded.inputs, loaded.outputs) == (program.inputs, program.outputs)
    assert loaded == program
    if len(program.outputs) > 1:
        turned = replace(program, outputs=program.outputs[::-1])
        assert turned != program
        assert from_bytes(to_bytes(turned)).outputs == program.outputs[::-1]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("io", ["float", "integer"])
@pytest.mark.parametrize("trace", [False, True])
def test_an_onnx_file_has_all_inputs_and_outputs_under_their_names(flavour, io, trace):
    program = pyramid()
    file = model(program, flavour=flavour, io=io, trace=trace)
    assert [value.name for value in file.graph.input] == list(program.inputs)
    names = [value.name for value in file.graph.output]
    assert names[: len(program.outputs)] == list(program.outputs)
    codes = batch(program, 2)
    seen, expected = traced(ReferenceEngine(program), codes)
    grids = {name: spec.qparams for name, spec in program.tensors.items()}
    fed = dict(zip(program.inputs, codes, strict=True))
    if io == "float":
        fed = {name: dequantize(array, grids[name]) for name, array in fed.items()}
        expected = tuple(
            dequantize(array, grids[name])
            for name, array in zip(program.outputs, expected, strict=True)
        )
    got = evaluator(file).run(None, fed)
    assert_equal(tuple(got[: len(expected)]), expected)
    for name, values in zip(names[len(expected) :], got[len(expected) :], strict=True):
        assert np.array_equal(values, seen[name.removesuffix(TRACED)])


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_onnx_runtimes_agree_on_random_programs(data):
    program = data.draw(programs(several=True))
    codes = data.draw(input_codes(program))
    expected, output = traced(ReferenceEngine(program), codes)
    for name in ("onnxruntime", "openvino"):
        engine = made(name, program)
        seen, shown = traced(engine, codes)
        assert list(seen) == list(expected)
        for tensor, values in seen.items():
            assert np.array_equal(values, expected[tensor]), tensor
        assert_equal(shown, output)
        assert_equal(engine(codes), output)


def test_memory_of_a_block_counts_every_output_that_is_held():
    # Outputs of the head wait for the tail: what does not fit the cache makes the block smaller.
    b = Builder.start((8, 64, 64), GRID)
    for name in ("other", "conv"):
        weight = b.rng.integers(-9, 9, (8, 8, 1, 1)).astype(np.int8)
        b.weighted(Conv2d(name, ("x",)), weight, GRID)
    flat = b.add(Reshape("flat", ("conv",), (8 * 64 * 64,)), GRID)
    weight = b.rng.integers(-9, 9, (2, 8 * 64 * 64)).astype(np.int8)
    b.weighted(Linear("fc", (flat,)), weight, GRID)
    assert make_plan(b.finish("fc"), Layout()).block == 4
    program = b.finish("fc", "other")
    assert make_plan(program, Layout()).block == 2
    (codes,) = batch(program, 17)
    assert_equal(made("native", program)(codes), ReferenceEngine(program)(codes))
