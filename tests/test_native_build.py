"""Compilers, flags, the cache and the choice of an instruction set of the native engine."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import intact.engines
from intact.engines import load_engine, native
from intact.engines.native import NativeEngine, build, cache, isas
from intact.engines.native.cpu import ISAS
from intact.errors import EngineUnavailableError, EngineWarning, ProgramError
from native_stub import codes_for, private_cache, the_compiler
from strategies import example

PROGRAM = example()
CODES = codes_for(PROGRAM, 40)
EXPECTED = load_engine("reference", PROGRAM)(CODES)
ON_X86 = build.platform.machine() in ("x86_64", "AMD64")


@pytest.fixture
def home(tmp_path):
    """A new, empty cache."""
    with private_cache(tmp_path / "home") as opened:
        the_compiler(opened)
        yield opened


@pytest.fixture(scope="module")
def warm_home(tmp_path_factory):
    """A cache in which the runtime and the build of `PROGRAM` are."""
    folder = tmp_path_factory.mktemp("warm")
    with private_cache(folder) as opened:
        the_compiler(opened)
        NativeEngine(PROGRAM, "portable")
        yield opened


@pytest.fixture
def warm(warm_home, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(warm_home.folder.parent, tmp_path / "home" / "intact")
    with private_cache(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: None)


@pytest.fixture
def untold(monkeypatch):
    """As in a process in which "auto" has not said anything yet."""
    monkeypatch.setattr(intact.engines, "_told", set())


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text), "utf-8")
    path.chmod(0o755)
    return str(path)


def real_compiler() -> str:
    return next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))


needs_a_system_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no cc, gcc or clang here"
)


def leftovers(opened: cache.Cache) -> list[Path]:
    return list(opened.folder.glob("tmp-*"))


def libraries(opened: cache.Cache) -> list[Path]:
    return sorted((opened.folder / "libraries").iterdir())


# -- finding a compiler ----------------------------------------------------------------------------


@needs_a_system_compiler
def test_cc_of_the_environment_comes_first_with_its_arguments(home, tmp_path, monkeypatch):
    wrapper = script(tmp_path / "my-cc", f'exec {real_compiler()} "$@"')
    monkeypatch.setenv("CC", f"{wrapper} -DMINE=1")
    found = build.find_compiler(home)
    assert found.command == (wrapper, "-DMINE=1")
    build.library(home, found, "#if MINE != 1\n#error not passed on\n#endif\nint x;\n", [])


@needs_a_system_compiler
@pytest.mark.parametrize("text", ["exit 1", 'test "$1" = --version && echo gcc'])
def test_a_compiler_that_makes_no_library_is_passed_over(home, tmp_path, monkeypatch, text):
    monkeypatch.setenv("CC", script(tmp_path / "broken-cc", text))
    found = build.find_compiler(home)
    assert Path(found.command[0]).name in {"cc", "gcc", "clang"}


@needs_a_system_compiler
def test_a_cc_that_is_no_command_is_passed_over(home, monkeypatch):
    for text in ('gcc "without an end', "/no/such/compiler", " "):
        monkeypatch.setenv("CC", text)
        found = build.find_compiler(home)
        assert Path(found.command[0]).name in {"cc", "gcc", "clang"}


@needs_a_system_compiler
def test_fast_math_of_the_environment_is_undone(home):
    """It would take a NaN for a number, and subnormal numbers for 0 in all of the process."""
    code = """
        import sys
        import numpy as np
        sys.path.insert(0, "FOLDER")
        from strategies import example
        x = np.zeros((2, 2, 5, 5), np.float32)
        program = example()
        program.run(x, engine="native")
        assert np.float32(1e-40) * np.float32(1) != 0
        x[1, 0, 2, 3] = np.nan
        try:
            program.run(x, engine="native")
        except Exception as error:
            print(error)
    """
    code = textwrap.dedent(code).replace("FOLDER", str(Path(__file__).parent))
    environment = {**os.environ, "CC": f"{real_compiler()} -ffast-math"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "NaN at index (1, 0, 2, 3)" in done.stdout


def test_another_version_of_the_compiler_gets_builds_of_its_own(home):
    compiler = the_compiler(home)
    newer = replace(compiler, identity=compiler.identity + " newer")
    keys = {build.library_key(c, "int x;", c.flags("portable")) for c in (compiler, newer)}
    assert len(keys) == 2


def test_without_a_compiler_native_says_how_to_get_one(home, no_compiler):
    with pytest.raises(EngineUnavailableError, match=r"pip install 'intact\[native\]'"):
        NativeEngine(PROGRAM)
    assert set(isas()) == set(ISAS)
    assert all("no C compiler" in reason for reason in isas().values())


def test_without_a_compiler_auto_says_so_once_and_runs(home, no_compiler, untold):
    with pytest.warns(EngineWarning, match=r"slower than native.*pip install 'intact\[native\]'"):
        assert np.array_equal(example().codes(CODES), EXPECTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(example().codes(CODES), EXPECTED)


def test_without_a_compiler_a_build_in_the_cache_is_used(warm, monkeypatch, no_compiler):
    monkeypatch.setattr(native, "ISAS", {"portable": ISAS["portable"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = load_engine("auto", PROGRAM)
    assert isinstance(engine, NativeEngine)
    assert np.array_equal(engine(CODES), EXPECTED)


def test_ziglang_serves_where_there_is_no_other_compiler(home, tmp_path, monkeypatch):
    """Slow the first time: zig builds parts of its own library."""
    if build.importlib.util.find_spec("ziglang") is None:
        pytest.skip("the package ziglang is not installed")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert build.find_compiler(home).kind == "zig"
    assert np.array_equal(NativeEngine(PROGRAM)(CODES), EXPECTED)


# -- flags -----------------------------------------------------------------------------------------

MACROS = {
    "avx2": "defined(__AVX2__)",
    "avx512f": "defined(__AVX512F__)",
    "avx512vnni": "defined(__AVX512VNNI__)",
    "avx512vbmi": "defined(__AVX512VBMI__)",
    "amx-int8": "(defined(__AMX_INT8__) || defined(__AMXINT8__))",  # older clang's spelling
}


@pytest.mark.skipif(not ON_X86, reason="instruction sets of x86")
@pytest.mark.parametrize("name", ["cc", "gcc", "clang", "zig"])
@pytest.mark.parametrize("isa", ISAS)
def test_an_isa_switches_on_its_own_features_and_no_other(warm, monkeypatch, name, isa):
    """Whatever CPU this is: a cache may be shared by machines."""
    monkeypatch.setenv("CC", f"{name} cc" if name == "zig" else name)
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name} here")
    compiler = build.find_compiler(warm)
    if not build.understands(warm, compiler, isa):
        pytest.skip(f"this {name} does not know {isa}")
    lines = []
    for feature, macro in MACROS.items():
        wanted = feature in ISAS[isa].features
        lines.append(f"#if {'!' if wanted else ''}{macro}\n#error {feature}\n#endif")
    build.library(warm, compiler, "\n".join([*lines, "int x;"]), compiler.flags(isa))


def test_fused_multiply_add_is_off(home):
    compiler = the_compiler(home)
    for isa in ISAS:
        flags = compiler.flags(isa)
        # What undoes fast math comes first: to clang it also undoes what was said of contraction.
        assert flags.index("-fno-fast-math") < flags.index("-ffp-contract=off")
        flags.remove("-fno-fast-math")
        assert not any("march=native" in flag or "fast" in flag for flag in flags)


def test_a_missing_feature_is_named():
    assert ISAS["avx2"].missing(set()) == "this CPU or its operating system lacks avx2"
    assert ISAS["avx2"].missing({"avx2"}) is None
    assert "amx-int8" in ISAS["amx"].missing(set(ISAS["avx512vnni"].features))


# -- compiling -------------------------------------------------------------------------------------


def test_an_error_of_the_compiler_ends_with_its_last_lines(home):
    compiler = the_compiler(home)
    with pytest.raises(ProgramError, match=r"failed with status 1:(.|\n)*undeclared_thing"):
        build.library(home, compiler, "int f(void) { return undeclared_thing; }\n", [])
    assert libraries(home) == []
    assert leftovers(home) == []


@needs_a_system_compiler
def test_a_compiler_that_is_killed_leaves_nothing(home, tmp_path, monkeypatch):
    flag = tmp_path / "die"
    text = f"""
        if test -e {flag}; then
            for last; do :; done
            printf half > program.so; printf half > library.so; kill -KILL $$
        fi
        exec {real_compiler()} "$@"
    """
    monkeypatch.setenv("CC", script(tmp_path / "my-cc", text))
    compiler = build.find_compiler(home)
    flag.touch()
    with pytest.raises(build.CompileError, match="ended by signal 9"):
        build.library(home, compiler, "int x;\n", compiler.flags("portable"))
    assert (libraries(home), leftovers(home)) == ([], [])
    flag.unlink()
    assert build.library(home, compiler, "int x;\n", compiler.flags("portable")).exists()


@needs_a_system_compiler
def test_a_compiler_that_hangs_is_ended_with_its_children(home, tmp_path, monkeypatch):
    flag, alive = tmp_path / "hang", tmp_path / "alive"
    text = f"""
        test -e {flag} && (sleep 1; touch {alive}) && exit 1
        exec {real_compiler()} "$@"
    """
    monkeypatch.setenv("CC", script(tmp_path / "my-cc", text))
    compiler = build.find_compiler(home)
    flag.touch()
    with home.work_folder() as work, pytest.raises(build.CompileError, match="ended after 0 s"):
        build.compile_c(home, compiler, "int x;\n", [], work / "x.so", seconds=0.2)
    time.sleep(1.2)
    assert not alive.exists()


@needs_a_system_compiler
def test_a_process_that_is_killed_while_compiling_harms_nobody(home, tmp_path, monkeypatch):
    started = tmp_path / "started"
    compiler = the_compiler(home)
    slow = script(tmp_path / "slow-cc", f"touch {started}; printf half > library.so; sleep 60")
    code = f"""
        from dataclasses import replace
        from intact.engines.native import build, cache
        opened = cache.open_cache()
        compiler = replace(build.find_compiler(opened), command=({slow!r},))
        build.library(opened, compiler, "int x;", [])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert libraries(home) == []
    (left,) = leftovers(home)
    assert build.library(home, compiler, "int x;", []).exists()
    assert left.exists()  # it could still be at work
    os.utime(left, (0, 0))
    build.library(home, compiler, "int y;", [])
    assert leftovers(home) == []


# -- the cache -------------------------------------------------------------------------------------


def test_a_second_start_neither_generates_nor_compiles(warm, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(native, "generate", never)
    monkeypatch.setattr(build, "compile_c", never)
    monkeypatch.setattr(native, "_seal", never)
    assert np.array_equal(NativeEngine(PROGRAM, "portable")(CODES), EXPECTED)
    with pytest.raises(AssertionError, match="called"):
        NativeEngine(example(seed=1), "portable")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "no digest", "no library"])
def test_a_damaged_library_is_made_anew(home, damage):
    data = bytes(range(256))
    path = home.library("key", lambda output: output.write_bytes(data))
    assert home.find("key") == path
    if damage == "no digest":
        (path.parent / cache.DIGEST).unlink()
    elif damage == "no library":
        path.unlink()
    else:
        changed = {"truncated": data[:100], "flipped": b"\1" + data[1:], "emptied": b""}
        path.write_bytes(changed[damage])
    assert home.find("key") is None
    assert home.library("key", lambda output: output.write_bytes(data)) == path
    assert (path.read_bytes(), home.find("key")) == (data, path)
    assert leftovers(home) == []


def test_an_engine_survives_the_loss_of_half_of_every_library(warm):
    for entry in libraries(warm):
        data = (entry / cache.LIBRARY).read_bytes()
        (entry / cache.LIBRARY).unlink()  # not in place: this process has it mapped
        (entry / cache.LIBRARY).write_bytes(data[: len(data) // 2])
    assert np.array_equal(NativeEngine(PROGRAM, "portable")(CODES), EXPECTED)


def test_a_damaged_fact_is_found_out_again(warm):
    for path in (warm.folder / "facts").iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert np.array_equal(NativeEngine(PROGRAM, "portable")(CODES), EXPECTED)


def test_processes_that_compile_the_same_at_once_do_not_disturb_each_other(home):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import numpy as np
        from native_stub import codes_for
        from strategies import example
        from intact.engines.native import NativeEngine
        program = example()
        sys.stdin.readline()
        print(NativeEngine(program, "portable")(codes_for(program, 40)).tobytes().hex())
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert said.strip() == EXPECTED.tobytes().hex()
    assert leftovers(home) == []
    assert [entry.name for entry in libraries(home) if not home.find(entry.name)] == []


def test_the_least_recently_used_go_first(home, monkeypatch):
    def make(name: str) -> None:
        home.library(name, lambda output: output.write_bytes(bytes(100_000)))

    for age, name in enumerate(["old", "older", "oldest"], start=1):
        make(name)
        os.utime(home.folder / "libraries" / name, (1000 - age, 1000 - age))
    assert home.find("oldest")  # which is a use
    monkeypatch.setattr(cache, "MAX_BYTES", 340_000)
    monkeypatch.setattr(cache, "PRUNE_EVERY", 1)
    make("new")
    assert {entry.name for entry in libraries(home)} == {"old", "oldest", "new"}


def test_the_cache_folder_is_private(home):
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, mode):
    folder = tmp_path / "intact" / "native"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.warns(EngineWarning, match=r"written to by others.*Each process compiles"):
        used = cache._open(folder)
    assert used.folder != folder
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(used.folder.stat().st_mode) == 0o700


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to chown")
@pytest.mark.parametrize("which", ["intact", "intact/native"])
def test_a_folder_of_somebody_else_is_not_used(tmp_path, which):
    folder = tmp_path / "intact" / "native"
    folder.mkdir(parents=True, mode=0o700)
    os.chown(tmp_path / which, 12345, 12345)
    with pytest.warns(EngineWarning, match="belongs to another user"):
        used = cache._open(folder)
    assert list(folder.iterdir()) == []
    assert used.folder != folder


def test_without_a_place_for_a_cache_programs_run_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(EngineWarning, match="no cache of compiled programs"):
        used = cache.open_cache()
    the_compiler(used)
    assert np.array_equal(NativeEngine(PROGRAM, "portable")(CODES), EXPECTED)


def test_code_that_the_cache_folder_may_not_hold_runs_from_another(warm, monkeypatch):
    """As on a file system that is mounted with `noexec`."""
    load = native.load_runtime

    def refuse(opened, compiler):
        if opened is warm:
            raise ImportError("failed to map segment")
        return load(opened, compiler)

    monkeypatch.setattr(native, "load_runtime", refuse)
    with pytest.warns(EngineWarning, match="failed to map segment"):
        engine = NativeEngine(PROGRAM, "portable")
    assert np.array_equal(engine(CODES), EXPECTED)


def test_a_relative_cache_home_is_ignored(monkeypatch):
    if sys.platform == "darwin":
        pytest.skip("macOS has no XDG_CACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache._user_folder() == Path("~/.cache").expanduser() / "intact" / "native"


# -- the choice of an instruction set --------------------------------------------------------------


def test_auto_takes_the_best_instruction_set_that_can_be_used(warm):
    best = next(isa for isa, reason in isas().items() if reason is None)
    assert NativeEngine(PROGRAM).isa == best
    assert isas()["portable"] is None


def test_every_instruction_set_that_can_be_used_is_exact(warm):
    for isa, reason in isas().items():
        if reason is None:
            for fuse in (True, False):
                assert np.array_equal(NativeEngine(PROGRAM, isa, fuse=fuse)(CODES), EXPECTED)
        else:
            with pytest.raises(EngineUnavailableError, match=f"'{isa}' cannot be used: "):
                NativeEngine(PROGRAM, isa)


def test_an_unknown_instruction_set_is_named_with_the_choices(warm):
    with pytest.raises(ProgramError, match="no instruction set 'mmx'; choose auto or one of amx"):
        NativeEngine(PROGRAM, "mmx")


def test_facts_of_an_engine(warm):
    engine = NativeEngine(PROGRAM, "portable")
    assert engine.isa == "portable"
    assert 1000 < engine.artefact_bytes < 200_000
    assert engine.arena_bytes == native.generate(PROGRAM, "portable").arena_bytes


def break_output(generate, isas_to_break):
    """A generator whose code has one wrong bit in one sample of some batches."""

    def broken(program, isa, *, fuse=True):
        generated = generate(program, isa, fuse=fuse)
        if isa not in isas_to_break:
            return generated
        wrong = """
            static void wrong(const uint8_t *in, uint8_t *out, uint32_t n, void *arena)
            {
                run(in, out, n, arena);
                if (n > 1) out[n - 1] ^= 1;
            }
            extern EXPORT"""
        source = generated.source.replace("extern EXPORT", wrong, 1)
        source = source.replace("init, run, trace", "init, wrong, trace")
        assert source.count("wrong") == 2
        return replace(generated, source=source)

    return broken


def test_a_build_that_differs_in_one_bit_is_refused(warm, monkeypatch):
    monkeypatch.setattr(native, "generate", break_output(native.generate, {"portable"}))
    for _ in range(2):  # and is not taken from the cache the second time
        with pytest.raises(EngineUnavailableError, match="build for portable is not exact"):
            NativeEngine(example(seed=2), "portable")


def test_auto_takes_the_next_best_exact_build(warm, monkeypatch):
    usable = [isa for isa, reason in isas().items() if reason is None]
    if len(usable) < 2:
        pytest.skip("this machine has one instruction set")
    monkeypatch.setattr(native, "generate", break_output(native.generate, usable[:1]))
    program = example(seed=2)
    with pytest.warns(EngineWarning, match=f"build for {usable[0]} is not exact"):
        engine = NativeEngine(program)
    assert engine.isa == usable[1]
    assert np.array_equal(engine(CODES), load_engine("reference", program)(CODES))


def test_auto_does_without_native_code_when_no_build_is_exact(warm, monkeypatch, untold):
    monkeypatch.setattr(native, "ISAS", {"portable": ISAS["portable"]})
    monkeypatch.setattr(native, "generate", break_output(native.generate, {"portable"}))
    program = example(seed=2)
    with pytest.warns(EngineWarning, match=r"slower than native code: .*not exact"):
        codes = program.codes(CODES)
    assert np.array_equal(codes, load_engine("reference", program)(CODES))


def test_a_compiler_that_does_not_know_an_instruction_set_is_not_asked_for_it(warm, monkeypatch):
    monkeypatch.setattr(build, "understands", lambda _opened, _compiler, isa: isa == "portable")
    assert NativeEngine(PROGRAM).isa == "portable"
    if ON_X86 and "avx2" in native._Tools().runtime.features().split():
        assert "does not know it" in isas()["avx512vnni"] or "lacks" in isas()["avx512vnni"]


@pytest.mark.skipif(not ON_X86, reason="AMX is of x86")
def test_amx_is_tried_in_a_process_of_its_own(warm, monkeypatch):
    compiler = the_compiler(warm)
    if not build.understands(warm, compiler, "amx"):
        pytest.skip("this compiler does not know AMX")
    here = "amx-int8" in native._Tools().runtime.features().split()
    assert native._amx_works(warm, compiler) is here
    for fatal in ("__builtin_trap();", "return 2;", "for (;;) sleep(1);"):
        text = f"#include <unistd.h>\nint main(void) {{ {fatal} }}\n"
        monkeypatch.setattr(native, "source_text", lambda text=text: text)
        monkeypatch.setattr(native, "PROBE_SECONDS", 0.2)
        assert native._amx_works(warm, compiler) is False
    monkeypatch.setattr(native, "source_text", lambda: "int main(void) { return 0; }\n")
    assert native._amx_works(warm, compiler) is True
