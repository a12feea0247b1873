"""Measuring: what a timing is, and what `bench` compares, shows and refuses."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import intact
from intact import bench as benchmark
from intact import engines, timing
from intact.arithmetic import QParams, dequantize
from intact.bench import FLOAT, bench, bench_table, float_twin, seconds
from intact.errors import EngineUnavailableError, IntactError, ProgramError
from intact.lower import quantize_function
from intact.ops import Table
from intact.pointwise import Pointwise, X
from intact.timing import Timing, interleave
from strategies import Builder, input_codes, programs
from test_cli import intact_


class Clock:
    """Time that passes only in calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "sleep", self.pass_by)

    def pass_by(self, duration: float) -> None:
        self.now += duration

    def contender(self, name: str, *durations: float):
        """Calls that take these times, the last one for ever."""
        left = list(durations)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


# -- timing --------------------------------------------------------------------------------------


def test_a_timing_is_the_median_and_the_quartiles():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0]).spread == (4.0 - 2.0) / 3.0


def test_calls_are_timed_one_by_one_whatever_the_others_take(clock):
    got = interleave({"a": clock.contender("a", 0.25), "b": clock.contender("b", 0.5)},
                     rounds=5, segment=1.0, budget=100)  # fmt: skip
    assert got == {"a": Timing(0.25, 0.25, 0.25, 5), "b": Timing(0.5, 0.5, 0.5, 5)}


def test_the_call_after_another_contender_and_the_pause_are_not_timed(clock):
    """Here every call but the first of a segment is quick: the caches are filled again."""
    fast = clock.contender("fast", 0.25)

    def call() -> None:
        cold = clock.calls[-1:] != ["fast"]
        fast()
        clock.now += 8.0 * cold

    other = clock.contender("other", 0.5)
    got = interleave({"fast": call, "other": other}, rounds=9, segment=1, pause=3.0, budget=500)
    assert got["fast"].median == 0.25
    assert got["other"].median == 0.5


def test_one_disturbed_round_does_not_move_the_median(clock):
    """Of 5 rounds with one timed call each, the third is slow."""
    disturbed = clock.contender("a", *[1.0] * 7, 50.0, 1.0)
    got = interleave({"a": disturbed}, rounds=5, segment=0.5, budget=1000)
    assert (got["a"].median, got["a"].high) == (1.0, 1.0)
    assert clock.now > 50


def test_a_slow_contender_takes_part_in_fewer_rounds_but_at_least_three(clock):
    makers = {"quick": 0.25, "slow": 4.0, "slowest": 100.0}
    got = interleave({n: clock.contender(n, t) for n, t in makers.items()},
                     rounds=20, segment=1.0, budget=40)  # fmt: skip
    assert {name: t.rounds for name, t in got.items()} == {"quick": 20, "slow": 5, "slowest": 3}


def test_everyone_follows_everyone_else_and_every_run_has_the_same_order(clock):
    def order() -> list[str]:
        clock.calls.clear()
        interleave({n: clock.contender(n, 1.0) for n in "abcd"}, rounds=30, segment=0.5, budget=99)
        turns = clock.calls[8::2]  # behind the warm-up; two calls are a segment
        assert Counter(turns) == dict.fromkeys("abcd", 30)
        return turns

    first = order()
    assert len({(a, b) for a, b in pairwise(first) if a != b}) == 12
    assert order() == first


def test_progress_is_told_after_every_round(clock):
    seen = []
    interleave({"a": clock.contender("a", 1.0)}, rounds=3, segment=0.5,
               progress=lambda *done: seen.append(done))  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.463e-6, "2.46 µs"), (24.63e-6, "24.6 µs"), (246.3e-6, "246 µs"), (0.0024634, "2.46 ms"),
        (2.4634, "2.46 s"), (24634, "24,634 s"), (1e-7, "0.10 µs"), (0.00099999, "1000 µs"),
    ],
)  # fmt: skip
def test_durations_have_three_digits_and_a_unit(value, shown):
    assert seconds(value).replace("1,000", "1000") == shown


# -- bench ---------------------------------------------------------------------------------------


def small() -> intact.Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return intact.quantize(model, [torch.randn(64, 3, 8, 8)])


@pytest.fixture(scope="module")
def program() -> intact.Program:
    return small()


def quick(program: intact.Program, **options):
    return bench(program, **{"engines": ["reference", "torch"], "rounds": 3, **options})


def test_every_engine_is_measured_at_every_batch_size_beside_the_float_network(program):
    told = []
    got = quick(program, batches=(8, 1), progress=lambda *args: told.append(args))
    assert [(m.name, m.batch) for m in got.measured] == [
        (name, batch) for batch in (1, 8) for name in ("reference", "torch", FLOAT)
    ]
    for m in got.measured:
        assert 0 < m.call.low <= m.call.median <= m.call.high
        assert m.throughput == m.batch / m.call.median
    assert set(got.start) == {"reference", "torch", FLOAT}
    assert got.missing == {}
    assert (got.program, got.threads, got.codes) == (program.sha256, 1, False)
    assert got.macs == 36 * 4 * 27 + 144 * 5
    assert got.machine["processor"]
    assert ("timing batches of 8", 3, 3) in told


def test_from_codes_to_codes_there_is_no_float_network(program):
    got = quick(program, codes=True, batches=(2,))
    assert {m.name for m in got.measured} == {"reference", "torch"}
    assert got.codes


def test_an_engine_that_is_not_here_is_reported_and_the_others_measured(program, monkeypatch):
    def load(name, program, threads=None):
        if name == "torch":
            raise EngineUnavailableError("the engine 'torch' needs PyTorch, which is …")
        return engines.load_engine(name, program, threads)

    monkeypatch.setattr(benchmark, "load_engine", load)
    got = quick(program, batches=(1,))
    assert got.missing == {"torch": "the engine 'torch' needs PyTorch, which is …"}
    assert {m.name for m in got.measured} == {"reference", FLOAT}


def test_engines_with_different_codes_are_not_compared(program, monkeypatch):
    def load(name, program, threads=None):
        engine = engines.load_engine(name, program, threads)
        return (lambda codes: engine(codes) ^ 1) if name == "torch" else engine

    monkeypatch.setattr(benchmark, "load_engine", load)
    with pytest.raises(IntactError, match=r"reference and torch give different codes.*certify"):
        quick(program)


def test_a_call_that_would_take_too_long_is_left_out_with_its_reason(program, monkeypatch):
    monkeypatch.setattr(benchmark, "LONGEST_CALL", 0.0)
    got = quick(program, batches=(1, 4))
    assert {m.batch for m in got.measured} == {1}
    assert set(got.missing) == {f"{name}, batch 4" for name in got.start}
    assert all("a call would take about" in reason for reason in got.missing.values())


def test_the_first_batch_is_left_out_too_if_it_would_take_too_long(program, monkeypatch):
    def load(name, program, threads=None):
        engine = engines.load_engine(name, program, threads)
        return lambda codes: (time.sleep(0.05 * len(codes)), engine(codes))[1]

    monkeypatch.setattr(benchmark, "load_engine", load)
    monkeypatch.setattr(benchmark, "LONGEST_CALL", 4.0)
    got = quick(program, engines=["reference"], codes=True, batches=(100,))
    assert got.measured == ()
    assert list(got.missing) == ["reference, batch 100"]


def test_the_instruction_set_of_an_engine_is_part_of_its_name(program, monkeypatch):
    def load(name, program, threads=None):
        engine = engines.load_engine("reference", program, threads)
        engine.isa = "amx"
        return engine

    monkeypatch.setattr(benchmark, "load_engine", load)
    got = quick(program, engines=["native"], codes=True, batches=(1,))
    assert [m.name for m in got.measured] == ["native (amx)"]


def test_the_threads_of_torch_are_those_that_were_asked_for_and_then_as_before(
    program, monkeypatch
):
    before, seen = torch.get_num_threads(), set()

    def load(name, program, threads=None):
        assert threads == 3
        engine = engines.load_engine(name, program, threads)
        return lambda codes: (seen.add(torch.get_num_threads()), engine(codes))[1]

    monkeypatch.setattr(benchmark, "load_engine", load)
    quick(program, codes=True, batches=(1,), threads=3)
    assert seen == {3}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"batches": (0,)}, {"threads": 0}, {"rounds": 0}])
def test_sizes_below_one_are_refused(program, wrong):
    with pytest.raises(IntactError, match="are positive"):
        quick(program, **wrong)


def test_an_unknown_engine_is_refused(program):
    with pytest.raises(ProgramError, match="there is no engine 'abacus'"):
        quick(program, engines=["abacus"])


# -- the float twin ------------------------------------------------------------------------------


def test_the_float_twin_computes_what_the_program_approximates(program):
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = float_twin(program)(x).numpy()
    noise = program.run(x.numpy(), engine="torch") - expected
    assert 10 * math.log10(expected.var() / noise.var()) > 20


def test_the_float_twin_has_the_relu_of_the_network(program):
    twin = float_twin(program)
    lows = {name: spec.low for name, spec in twin.tensors.items()}
    assert [lows[op.name] for op in twin.ops] == [0, -math.inf, -math.inf]  # once, as there
    assert lows[twin.input] == -math.inf


def tabled(function: Pointwise) -> intact.Program:
    """One table, of three channels."""
    source, result = QParams((2.0**-5,), -18), QParams((2.0**-6,), -40)
    builder = Builder.start((3, 10, 10), source)
    builder.add(Table("table", ("x",)), result)
    table = quantize_function(function, source, result, (3, 10, 10))
    builder.parameters["table.table"] = table
    return builder.finish()


@pytest.mark.parametrize("function", benchmark.KNOWN)
def test_the_float_twin_has_the_activation_whose_table_the_program_has(function):
    x = torch.linspace(-3, 3, 300).reshape(1, 3, 10, 10)
    assert torch.equal(float_twin(tabled(Pointwise(function, (X,))))(x), function(x))


@pytest.mark.parametrize(
    "function",
    [
        Pointwise(torch.sin, (X,)),
        Pointwise(F.prelu, (X, torch.tensor([0.5, -0.25, 1.0]))),  # it differs by channel
    ],
)
def test_the_float_twin_looks_up_what_is_no_activation_of_torch(function):
    program = tabled(function)
    grids = [program.tensors[name].qparams for name in ("x", "table")]
    codes = np.arange(-128, 128).astype(np.int8).reshape(-1, 1, 1, 1).repeat(3, axis=1)
    codes = np.broadcast_to(codes, (256, 3, 10, 10))
    real = torch.from_numpy(dequantize(codes, grids[0]))
    expected = dequantize(program.codes(codes, "reference"), grids[1])
    for nudge in (-0.4, 0.0, 0.4):  # of a step: the nearest entry is the same
        got = float_twin(program)(real + nudge * grids[0].scale[0]).numpy()
        assert np.array_equal(got, expected)


@settings(max_examples=40)
@given(st.data())
def test_every_program_has_a_float_twin(data):
    """Its values on the codes of a program without rounding would be those; shapes always are."""
    program = data.draw(programs())
    codes = data.draw(input_codes(program))
    x = torch.from_numpy(dequantize(codes, program.tensors[program.input].qparams))
    result = float_twin(program)(x)
    assert result.shape == (len(codes), *program.tensors[program.output].shape)
    assert torch.isfinite(result).all()


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "p.safetensors"
    program.save(path)
    return path


def test_the_table_has_a_line_per_engine_the_fastest_first(program, path):
    ran = intact_("bench", path, "--engines", "reference,torch", "--rounds", 3, "--batch", "1,4")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == str(path)
    assert "4,608 MACs per sample; 1 thread; float32 to float32; 3 rounds" in lines[1]
    table = lines[lines.index("") + 1 :]
    assert table[0].split("  ")[0] == "engine"
    assert [h for h in ("batch 1", "batch 4", "IQR", "per second") if h not in table[0]] == []
    assert {line.split()[0] for line in table[1:]} == {"reference", "torch", FLOAT.split()[0]}
    assert ran.err == ""


def test_rows_are_in_the_order_of_speed(program):
    got = quick(program, batches=(1, 4))
    rows = bench_table(got)
    median = {m.name: m.call.median for m in got.measured if m.batch == 4}
    assert [row[0] for row in rows[1:]] == sorted(median, key=median.__getitem__)
    assert {len(row) for row in rows} == {2 + 2 + 3}


def test_what_is_not_measured_leaves_its_cells_empty_and_is_named(path, monkeypatch):
    monkeypatch.setattr(benchmark, "LONGEST_CALL", 0.0)
    ran = intact_("bench", path, "--engines", "torch", "--rounds", 3, "--batch", "1,4")
    assert ran.code == 0, ran.err
    assert "not measured: torch, batch 4: a call would take about 0 s" in ran.out
    assert "batch 4 " not in ran.out.partition("not measured")[0]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_where_no_engine_can_be_measured_the_status_is_1(path, monkeypatch, as_json):
    def load(name, program, threads=None):
        raise EngineUnavailableError("it is not here.")

    monkeypatch.setattr(benchmark, "load_engine", load)
    ran = intact_("bench", path, "--engines", "native, torch", "--codes", *as_json)
    assert ran.code == 1
    if as_json:
        assert json.loads(ran.out)["missing"] == dict.fromkeys(
            ["native", "torch"], "it is not here."
        )
    else:
        assert "not measured: native: it is not here.\nnot measured: torch: it" in ran.out
        assert "ready in" not in ran.out


def test_json_holds_everything(program, path):
    ran = intact_("bench", path, "--engines", "reference", "--rounds", 3, "--batch", "2", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["program"] == program.sha256
    assert [(m["name"], m["batch"]) for m in facts["measured"]] == [("reference", 2), (FLOAT, 2)]
    for m in facts["measured"]:
        assert m["samples_per_second"] == pytest.approx(2 / m["call"]["median"])
        assert m["call"]["rounds"] == 3


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--batch", "many"], 2, "takes numbers with commas between them"),
        (["--batch", "0"], 1, "are positive numbers"),
        (["--engines", "abacus"], 1, "there is no engine 'abacus'"),
        (["--engines", " , "], 2, "takes names with commas between them"),
        (["--rounds", "0"], 2, "--rounds"),
    ],
)
def test_wrong_options_are_refused(path, options, code, message):
    ran = intact_("bench", path, *options)
    assert ran.code == code
    assert message in " ".join(ran.err.replace("│", " ").split())
    assert ran.out == ""


def test_the_native_engine_is_measured_where_there_is_one(program):
    if not _native(program):
        pytest.skip("the native engine does not run here")
    got = bench(program, engines=["native", "reference"], rounds=3, batches=(1,))
    assert any(m.name.startswith("native (") for m in got.measured)


def _native(program: intact.Program) -> bool:
    try:
        engines.load_engine("native", program)
    except EngineUnavailableError:
        return False
    return True


def test_numbers_of_the_samples_do_not_depend_on_the_run(program):
    first, again = (benchmark._samples(program, 5) for _ in range(2))
    assert np.array_equal(first, again)
    spec = program.tensors[program.input].qparams
    assert first.dtype == spec.dtype
    assert (first.min(), first.max()) == (spec.qmin, spec.qmax)


# -- the benchmarks of the repository ------------------------------------------------------------

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or not shutil.which("cc"),
    reason="peak.c is for Linux on x86-64 with a C compiler",
)
def test_the_peak_is_that_of_the_instructions_that_the_processor_has():
    ran = script("peak.py", "--threads", "1", "--rounds", "1", "--milliseconds", "5")
    assert ran.returncode == 0, ran.stderr
    flags = (
        Path("/proc/cpuinfo").read_text("utf-8").partition("flags")[2].partition("\n")[0].split()
    )
    rates = {line.split()[0]: float(line.split()[3]) for line in ran.stdout.splitlines()
             if "GMAC/s" in line}  # fmt: skip
    assert ("vpdpbusd" in rates) == ("avx512_vnni" in flags)
    assert all(rate > 1 for rate in rates.values())


@pytest.mark.slow
def test_the_comparison_with_other_engines_runs(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("openvino", reason="openvino is not installed")
    if not _native(small()):
        pytest.skip("the native engine does not run here")
    out = tmp_path / "out.json"
    ran = script("engines.py", "--networks", "lenet", "--threads", "1", "--rounds", "3",
                 "--json", str(out))  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "| lenet | 256 | 1 |" in ran.stdout
    result = json.loads(out.read_text("utf-8"))
    assert [line["batch"] for line in result["lines"]] == [1, 256]
    for line in result["lines"]:
        assert {"intact", "ONNX Runtime float32", "OpenVINO int8 (our file)"} <= set(
            line["seconds"]
        )
        assert not any(
            "differ from the program's" in reason for reason in line["left_out"].values()
        )
    assert result["builds"]["lenet"]["artefact_bytes"] > 0
