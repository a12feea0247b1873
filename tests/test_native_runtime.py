"""The runtime of compiled programs: floats and codes, batches, threads, and the way from Python."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import intact.program
from intact.arithmetic import QParams, dequantize, quantize
from intact.engines import load_engine, native
from intact.engines.native import NativeEngine, runtime
from intact.errors import IntactError, ProgramError
from intact.ops import Permute, Reshape
from native_stub import (
    WHERE,
    codes_for,
    copy_module,
    copy_program,
    module,
    private_cache,
    tools,
)
from strategies import example, grids

SIZE = 333
"""Odd, and more than a few vectors."""


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A cache and a compiler."""
    with private_cache(tmp_path_factory.mktemp("cache")) as opened:
        yield tools(opened)


def variant(kit, kind: str) -> runtime.Runtime:
    """The runtime by another way, or as another CPU would run it."""
    if kind in {"extension", "ctypes"}:
        return runtime.load_runtime(kit.cache, kit.compiler, kind == "extension")
    # Without AVX-512, or without any of it: as if the CPU had no such feature.
    text = runtime.source_text().replace('"avx512f "', '"none "')
    if kind == "portable":
        text = text.replace('"avx2 "', '"none "')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "source_text", lambda: text)
        return runtime.load_runtime.__wrapped__(kit.cache, kit.compiler, False)


@pytest.fixture(scope="module", params=["extension", "ctypes", "avx2", "portable"])
def each(request, kit):
    return variant(kit, request.param)


@pytest.fixture(scope="module", params=["extension", "ctypes"])
def way(request, kit):
    return variant(kit, request.param)


@pytest.fixture(scope="module")
def engine(kit):
    return NativeEngine(example(), "portable", threads=2)


def test_the_ways_are_what_they_are_called(kit):
    assert type(variant(kit, "extension")).__name__ == "_Extension"
    assert type(variant(kit, "ctypes")).__name__ == "_Ctypes"
    assert "avx2" not in variant(kit, "portable").features()
    assert "avx512f" not in variant(kit, "avx2").features()


# -- floats and codes ------------------------------------------------------------------------------


def hard_values(grid: QParams, seed: int) -> np.ndarray:
    """Float32 `[2, SIZE]` that rounding, clamping and conversion could get wrong."""
    scale = np.float32(grid.scale[0])
    rng = np.random.default_rng(seed)
    steps = np.arange(-140, 140, dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        ties = (steps + np.float32(0.5)) * scale
        beside = [np.nextafter(ties, np.float32(s), dtype=np.float32) for s in (-np.inf, np.inf)]
        largest, tiny = np.finfo(np.float32).max, np.float32(1e-45)
        ends = [0.0, -0.0, np.inf, -np.inf, largest, -largest, tiny, -tiny, 1e-39, scale]
        around = rng.normal(0, 100, 300).astype(np.float32) * scale
    bits = rng.integers(0, 2**32, 300, np.uint32).view(np.float32)
    pool = np.concatenate([ties, *beside, np.array(ends, np.float32), around, bits])
    pool = pool[~np.isnan(pool)]
    return rng.choice(pool, (2, SIZE)).astype(np.float32)


ANY_SCALE = st.one_of(
    st.integers(-126, 119).map(lambda e: 2.0**e),
    st.floats(2.0**-126, 2.0**119, width=32),
    st.floats(2.0**-10, 2.0**3, width=32),
)


@settings(max_examples=60)
@given(data=st.data())
def test_quantizing_and_dequantizing_are_those_of_the_specification(kit, each, data):
    grid = data.draw(grids(scale=data.draw(ANY_SCALE)))
    program = copy_program(grid, SIZE)
    x = hard_values(grid, data.draw(st.integers(0, 2**32 - 1)))
    loaded = each.load(copy_module(kit, SIZE), program, 1)
    codes = quantize(x, grid)
    got = loaded.codes(x)
    assert got.dtype == codes.dtype
    assert np.array_equal(got, codes)
    assert (
        loaded.run(x).view(np.uint32).tolist() == dequantize(codes, grid).view(np.uint32).tolist()
    )
    assert np.array_equal(loaded.codes(codes), codes)
    assert np.array_equal(loaded.run(codes), dequantize(codes, grid))


def test_multiplying_by_the_reciprocal_would_be_noticed():
    """So the test above does meet values for which dividing is not the same."""
    grid = QParams((float(np.float32(0.1)),))
    x = np.concatenate([hard_values(grid, seed) for seed in range(20)])
    with np.errstate(over="ignore"):
        other = np.clip(np.rint(x * np.float32(1 / grid.scale[0])), -128, 127)
    assert (other != quantize(x, grid)).any()


def test_all_codes_and_all_their_ties(kit, each):
    grid = QParams((0.375,), 6, -100, 99)
    x = (np.arange(-400, 400, dtype=np.float32) / 2 * np.float32(0.375)).reshape(-1, 1)
    x = np.repeat(x, SIZE, axis=1)
    loaded = each.load(copy_module(kit, SIZE), copy_program(grid, SIZE), 1)
    assert np.array_equal(loaded.codes(x), quantize(x, grid))
    assert len(np.unique(quantize(x, grid))) == 200


@pytest.mark.parametrize("at", [(0, 0), (0, SIZE - 1), (700, 17), (999, SIZE - 1)])
def test_a_nan_is_refused_wherever_it_is(kit, each, at):
    x = np.ones((1000, SIZE), np.float32)
    for threads in (1, 4):
        loaded = each.load(copy_module(kit, SIZE), copy_program(QParams((0.125,)), SIZE), threads)
        assert loaded.codes(x) is not None
        x[at] = np.nan
        assert loaded.codes(x) is None
        assert loaded.run(x) is None
        x[at] = 1


@pytest.mark.parametrize(
    "grid", [QParams((1.0,), 0, -3, 100), QParams((1.0,), 4, 7, 250, signed=False)]
)
def test_a_code_outside_of_a_narrow_range_is_refused_wherever_it_is(kit, each, grid):
    loaded = each.load(copy_module(kit, SIZE), copy_program(grid, SIZE), 2)
    for code in range(256):
        value = np.array(code, np.uint8).view(grid.dtype)
        fits = grid.qmin <= int(value) <= grid.qmax
        for at in ((0, 0), (40, SIZE - 1)):
            codes = np.full((41, SIZE), grid.qmax, grid.dtype)
            codes[at] = value
            assert (loaded.codes(codes) is not None) == fits


# -- what Program.run does with it -----------------------------------------------------------------


@pytest.fixture(params=["extension", "ctypes"])
def native_program(request, kit, monkeypatch):
    if request.param == "ctypes":
        monkeypatch.setattr(native, "load_runtime", lambda *_: variant(kit, "ctypes"))
    return example()


def outcome(call):
    try:
        result = call()
    except IntactError as error:
        return type(error).__name__, str(error)
    return result.dtype.name, result.shape, result.tobytes()


def unusual_inputs() -> dict[str, object]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 2, 5, 5)).astype(np.float32)
    codes = codes_for(example(), 6)
    nan = x.copy()
    nan[4, 1, 2, 3] = np.nan
    locked = x.copy()
    locked.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    return {
        "floats": x,
        "codes": codes,
        "one": x[:1],
        "none": x[:0],
        "no codes": codes[:0],
        "list": x.tolist(),
        "float64": x.astype(np.float64),
        "float16": x.astype(np.float16),
        "reversed": x[::-1],
        "Fortran order": np.asfortranarray(x),
        "every other": np.repeat(x, 2, axis=0)[::2],
        "big endian": x.astype(">f4"),
        "unaligned": unaligned,
        "read-only": locked,
        "torch": torch.from_numpy(x),
        "memoryview": memoryview(x),
        "codes of the other type": codes.view(np.uint8),
        "bool": codes > 0,
        "int32": codes.astype(np.int32),
        "structured": np.zeros((6, 2, 5, 5), [("a", "f4")]),
        "a sample": x[0],
        "another shape": x.reshape(6, 50),
        "transposed shape": x.reshape(6, 5, 5, 2),
        "one dimension more": x[None],
        "scalar": np.float32(1),
        "text": "x",
        "None": None,
        "nan": nan,
        "infinite": np.full_like(x, -np.inf),
    }


@pytest.mark.parametrize("name", unusual_inputs())
def test_whatever_is_given_native_answers_as_the_reference_does(native_program, name):
    x = unusual_inputs()[name]
    for method in (native_program.codes, native_program.run):
        expected = outcome(functools.partial(method, x, engine="reference"))
        for _ in range(2):  # the second time with an engine that is ready
            assert outcome(functools.partial(method, x, engine="native")) == expected
    if name == "nan":
        assert "the input 'x' holds a NaN at index (4, 1, 2, 3)" in expected[1]


def test_codes_outside_of_the_input_range_are_named_as_ever(kit, native_program):
    narrow = QParams((2.0**-7,), 0, -50, 50)
    tensors = {**native_program.tensors, "x": replace(native_program.tensors["x"], qparams=narrow)}
    program = replace(native_program, tensors=tensors)
    codes = codes_for(program, 3)
    for bad in (None, -51, 51):
        if bad is not None:
            codes[1, 0, 2, 2] = bad
        expected = outcome(lambda: program.codes(codes, engine="reference"))
        for _ in range(2):
            assert outcome(lambda: program.codes(codes, engine="native")) == expected
    assert "reach from -50 to 51" in expected[1]


def test_a_ready_engine_takes_a_batch_in_one_call(native_program, monkeypatch):
    """NumPy's checks would take longer than a small network."""
    x = unusual_inputs()["floats"]
    expected = native_program.run(x, engine="native", threads=2)

    def never(*args, **kwargs):
        raise AssertionError("called")

    for name in ("_as_array", "quantize", "dequantize"):
        monkeypatch.setattr(intact.program, name, never)
    monkeypatch.setattr(intact.program.Program, "check_codes", never)
    assert np.array_equal(native_program.run(x, engine="native", threads=2), expected)
    with pytest.raises(AssertionError, match="called"):
        native_program.run(x.astype(np.float64), engine="native", threads=2)


def test_run_of_the_engine_is_run_of_the_program(engine):
    x = unusual_inputs()
    for name in ("floats", "codes", "list", "float64", "every other"):
        assert np.array_equal(engine.run(x[name]), engine.program.run(x[name], engine="reference"))
    with pytest.raises(IntactError, match="NaN at index"):
        engine.run(x["nan"])


def test_results_are_new_arrays(engine):
    codes = codes_for(engine.program, 2)
    first = engine(codes)
    kept = first.copy()
    engine(codes_for(engine.program, 2, seed=1))
    assert np.array_equal(first, kept)
    assert first.flags.writeable
    assert first.flags.owndata


# -- tracing ---------------------------------------------------------------------------------------


def traced(run, codes) -> dict[str, np.ndarray]:
    slices: dict[str, list[np.ndarray]] = {}
    run(codes, lambda name, tensor: slices.setdefault(name, []).append(tensor.copy()))
    return {name: np.concatenate(parts) for name, parts in slices.items()}


@pytest.mark.parametrize("kind", ["extension", "ctypes"])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("slice_bytes", [1, 2**26])
def test_a_hook_sees_the_tensors_of_the_reference(kit, monkeypatch, kind, fuse, slice_bytes):
    monkeypatch.setattr(native, "TRACE_BYTES", slice_bytes)
    monkeypatch.setattr(native, "load_runtime", lambda *_: variant(kit, kind))
    program = example()
    codes = codes_for(program, 5)
    run = NativeEngine(program, "portable", fuse=fuse)
    expected = traced(load_engine("reference", program), codes)
    got = traced(run, codes)
    renamed = {op.name for op in program.ops if isinstance(op, Reshape | Permute)}
    stored = set(expected) - renamed
    assert (stored <= set(got)) if not fuse else ({"x", "fc"} <= set(got) < stored)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype
        assert np.array_equal(tensor, expected[name])
    assert np.array_equal(run(codes, lambda *_: None), run(codes))


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["extension", "ctypes"])
def test_results_do_not_depend_on_threads(kit, monkeypatch, kind, threads):
    monkeypatch.setattr(native, "load_runtime", lambda *_: variant(kit, kind))
    program = example()
    run = NativeEngine(program, threads=threads)
    reference = load_engine("reference", program)
    for n in (1, 2, 15, 16, 17, 64, 1001):
        codes = codes_for(program, n, seed=n)
        assert np.array_equal(run(codes), reference(codes))


def arenas_used(loaded, n: int) -> np.ndarray:
    """The numbers of the arenas that the samples of a batch were computed in."""
    result = loaded.codes(np.zeros((n, 4), np.uint8))
    assert (result == result[:, :1]).all()
    return result[:, 0]


def where(kit, way, threads: int, block: int = 4):
    """A module whose samples take a millisecond each, and tell where they were computed."""
    program = copy_program(QParams((1.0,), 0, 0, 255, signed=False), 4)
    path = module(kit, WHERE % {"size": 4} + f"/* {type(way).__name__} {threads} */", 4, block)
    return way.load(path, program, threads)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_a_batch_is_shared_by_so_many_threads_each_with_an_arena_of_its_own(kit, way, threads):
    loaded = where(kit, way, threads)
    for _ in range(3):
        used = arenas_used(loaded, 48)
        assert set(used) == set(range(1, threads + 1))
    assert len(set(arenas_used(loaded, 1))) == 1


def test_threads_are_balanced(kit, way):
    """No thread computes much more than its part, though all samples take the same time."""
    loaded = where(kit, way, 2, block=16)
    used = arenas_used(loaded, 70)
    counts = np.bincount(used)[1:]
    assert counts.sum() == 70
    assert counts.min() >= 20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is a matter of Linux")
def test_a_worker_that_shares_the_cpu_of_the_thread_that_submits_is_moved(kit, way):
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("there is one CPU")
    way.stop()
    tasks = Path("/proc/self/task")
    before = set(tasks.iterdir())
    loaded = where(kit, way, 2)
    arenas_used(loaded, 16)
    (made,) = set(tasks.iterdir()) - before
    worker = int(made.name)
    here = min(everywhere)
    os.sched_setaffinity(worker, {here})
    for _ in range(100):
        os.sched_setaffinity(0, {here})
        arenas_used(loaded, 4)  # both there; as nothing else is allowed, so be it
        assert os.sched_getaffinity(worker) == {here}
        os.sched_setaffinity(0, everywhere)
        arenas_used(loaded, 16)  # still there, most likely
        if os.sched_getaffinity(worker) != {here}:
            break
    assert os.sched_getaffinity(worker) == everywhere - {here}


def test_several_python_threads_may_share_an_engine(kit, way):
    loaded = where(kit, way, 2)
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda n: arenas_used(loaded, n), [9, 10, 11, 12] * 3))
    used = set(np.concatenate(results))
    assert 0 not in used  # every arena was made ready
    assert 255 not in used  # and never used by two threads at once
    assert len(used) > 2


def test_several_python_threads_get_their_own_results(engine):
    reference = load_engine("reference", engine.program)
    batches = [codes_for(engine.program, n, seed=n) for n in (1, 3, 17, 100, 333)]
    expected = [reference(codes) for codes in batches]

    def check(i: int) -> bool:
        return np.array_equal(engine(batches[i % 5]), expected[i % 5])

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(check, range(400)))


def test_python_goes_on_while_a_batch_runs(kit, way):
    loaded = where(kit, way, 1)
    loaded.codes(np.zeros((1, 4), np.uint8))
    done = threading.Event()
    ticks = 0

    def compute() -> None:
        loaded.codes(np.zeros((200, 4), np.uint8))
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()
    while not done.is_set():
        ticks += 1
        time.sleep(0.002)
    thread.join()
    assert ticks > 20


def test_work_goes_on_after_the_pool_was_stopped(kit, way):
    loaded = where(kit, way, 3)
    assert set(arenas_used(loaded, 30)) == {1, 2, 3}
    way.stop()
    way.stop()
    assert set(arenas_used(loaded, 30)) == {1, 2, 3}


@pytest.mark.parametrize("kind", ["extension", "ctypes"])
def test_a_forked_child_runs_with_threads_of_its_own(kit, kind):
    code = f"""
        import os, signal, sys, sysconfig, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import numpy as np
        from native_stub import codes_for
        from strategies import example
        if {kind!r} == "ctypes":
            sysconfig.get_path = lambda name: "/nowhere"
        from intact.engines import load_engine
        from intact.engines.native import NativeEngine
        program = example()
        codes = codes_for(program, 5000)
        expected = load_engine("reference", program)(codes)
        engine = NativeEngine(program, "portable", threads=3)
        print(type(engine._loaded).__name__)
        assert np.array_equal(engine(codes), expected)
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(30)  # a child that waits for threads of its parent would wait for ever
                status = 1
                try:
                    status = 0 if np.array_equal(engine(codes), expected) else 2
                finally:
                    os._exit(status)
            assert np.array_equal(engine(codes), expected)
            assert os.waitpid(child, 0)[1] == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == ("Engine" if kind == "extension" else "_CtypesLoaded")


def test_a_process_ends_while_its_pool_sleeps_or_works(kit):
    code = f"""
        import sys, threading
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from native_stub import codes_for
        from strategies import example
        from intact.engines.native import NativeEngine
        program = example()
        engine = NativeEngine(program, "portable", threads=3)
        codes = codes_for(program, 20000)
        def forever():
            while True:
                engine(codes)
        threading.Thread(target=forever, daemon=True).start()
        engine(codes)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_an_impossible_number_of_threads_is_refused(kit, threads):
    with pytest.raises(ProgramError, match=f"threads is {threads}, but must be 1 to 1024"):
        NativeEngine(example(), threads=threads)
    with pytest.raises(ProgramError, match=f"threads is {threads}"):
        load_engine("native", example(), threads)


def test_threads_of_other_engines_are_their_own_business():
    codes = codes_for(example(), 3)
    for name in ("reference", "torch"):
        assert np.array_equal(example().codes(codes, name, threads=2), example().codes(codes, name))


# -- loading ---------------------------------------------------------------------------------------


def test_without_the_headers_of_python_ctypes_is_the_way(kit, monkeypatch, tmp_path):
    load = runtime.load_runtime.__wrapped__
    monkeypatch.setattr(runtime.sysconfig, "get_path", lambda _: str(tmp_path))
    assert isinstance(load(kit.cache, kit.compiler), runtime._Ctypes)
    (tmp_path / "Python.h").write_text("#error of another Python\n", "utf-8")
    assert isinstance(load(kit.cache, kit.compiler), runtime._Ctypes)


def test_a_library_that_is_no_program_is_refused(kit, way, tmp_path):
    program = example()
    with pytest.raises(OSError, match="no-such-file"):
        way.load(tmp_path / "no-such-file.so", program, 1)
    other = native.build.library(kit.cache, kit.compiler, "int x;\n", [])
    with pytest.raises(OSError, match="holds no program of version 1"):
        way.load(other, program, 1)
    source = (
        '#include <stdint.h>\n__attribute__((visibility("default"))) '
        "const uint64_t intact_program[9] = {999};\n"
    )
    newer = native.build.library(kit.cache, kit.compiler, source, [])
    with pytest.raises(OSError, match="holds no program of version 1"):
        way.load(newer, program, 1)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_an_engine_that_is_gone_is_unloaded(kit, way):
    size = 12
    path = copy_module(kit, size)
    loaded = way.load(path, copy_program(QParams((1.0,)), size), 2)
    assert str(path) in Path("/proc/self/maps").read_text("utf-8")
    del loaded
    assert str(path) not in Path("/proc/self/maps").read_text("utf-8")


def test_references_are_neither_lost_nor_kept(kit):
    """Thousands of calls, of which many end early, leave the counts of what they touch alone."""
    program = copy_program(QParams((0.5,), 0, -100, 100), 8)
    loaded = variant(kit, "extension").load(copy_module(kit, 8), program, 1)
    good, bad = np.zeros((2, 8), np.int8), np.full((2, 8), 127, np.int8)
    real, other = np.zeros((1, 8), np.float32), np.zeros((2, 9), np.int8)
    touched = [good, bad, real, other, np.dtype(np.float32), np.empty, (2, 8)]
    before = [sys.getrefcount(x) for x in touched]
    for _ in range(2000):
        assert loaded.codes(good) is not None
        assert loaded.codes(bad) is None
        assert loaded.run(real) is not None
        assert loaded.trace(good) is not None
        assert loaded.trace(bad) is None
        assert loaded.codes(other) is None
        assert loaded.codes("text") is None
    assert [sys.getrefcount(x) for x in touched] == before


def test_the_c_of_the_runtime_has_no_warnings(kit, tmp_path):
    for flags in ([], ["-DINTACT_PYTHON", f"-I{runtime.sysconfig.get_path('include')}"]):
        if flags and not (Path(flags[1][2:]) / "Python.h").exists():
            continue
        strict = [*kit.compiler.flags("portable"), "-std=gnu11", "-Wall", "-Wextra", "-Werror"]
        native.build.library(kit.cache, kit.compiler, runtime.source_text(), [*strict, *flags])
