"""ONNX Runtime and OpenVINO, on files of ours, give the program's integers in every tensor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import intact
from blocks import BLOCKS
from intact.arithmetic import QParams, dequantize, multiplier_value
from intact.engines import load_engine
from intact.engines.reference import ReferenceEngine
from intact.errors import EngineUnavailableError, ProgramError
from intact.export.onnx import FLAVOURS, forms, model, saturates
from intact.ops import Conv2d, Linear, Permute, Requantize, Table
from intact.program import QTensor
from strategies import Builder, example, input_codes, programs

pytest.importorskip("onnx", reason="the package onnx is not installed")
HERE = Path(__file__).parent


def onnxruntime_engine(program, **options):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from intact.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(program, threads=1, **options)


def openvino_engine(program, **options):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from intact.engines.openvino import OpenVINOEngine

    return OpenVINOEngine(program, threads=1, **options)


ENGINES = [onnxruntime_engine, openvino_engine]


def trace(engine, codes):
    """Every tensor's codes, slices put together, and the output."""
    seen: dict[str, list] = {}
    output = engine(codes, lambda name, values: seen.setdefault(name, []).append(values))
    return {name: np.concatenate(parts) for name, parts in seen.items()}, output


def assert_same_codes(engine, program, codes):
    expected, output = trace(ReferenceEngine(program), codes)
    actual, traced_output = trace(engine, codes)
    assert list(actual) == list(expected)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        assert np.array_equal(actual[name], expected[name]), name
    for out in (traced_output, engine(codes)):
        assert out.dtype == output.dtype
        assert np.array_equal(out, output)


def run_openvino(made, fed):
    """What OpenVINO, with float32 as float32, makes of a model's only output."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(made.SerializeToString()), "CPU", options)
    return compiled(fed)[0]


# -- the same integers ---------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_onnxruntime_agrees_in_every_tensor(data):
    program = data.draw(programs())
    options = {
        "flavour": data.draw(st.sampled_from(FLAVOURS)),
        "level": data.draw(st.sampled_from(["all", "extended", "basic", "disabled"])),
    }
    codes = data.draw(input_codes(program))
    assert_same_codes(onnxruntime_engine(program, **options), program, codes)


@settings(max_examples=40)
@given(st.data())
def test_openvino_agrees_in_every_tensor(data):
    program = data.draw(programs())
    codes = data.draw(input_codes(program))
    assert_same_codes(openvino_engine(program), program, codes)


def openvino_flavours() -> list[str]:
    """Those that OpenVINO reads and that are exact on this CPU."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    from intact.engines.openvino import kernels_saturate

    return ["integer"] if kernels_saturate() else ["qdq", "integer"]


def check_openvino(program, codes, flavour):
    """From integer codes always; from floats where the scale is a power of two, ties included."""
    expected = ReferenceEngine(program)(codes)
    made = model(program, flavour=flavour, io="integer")
    assert np.array_equal(run_openvino(made, codes), expected)
    real = dequantize(codes, program.tensors[program.input].qparams)
    if np.array_equal(program.quantize_input(real), codes):
        made = model(program, flavour=flavour)
        grid = program.tensors[program.output].qparams
        assert np.array_equal(run_openvino(made, real), dequantize(expected, grid))


@settings(max_examples=40)
@given(st.data())
def test_openvino_agrees_on_the_files_that_it_reads(data):
    program = data.draw(programs())
    codes = data.draw(input_codes(program).filter(len))
    check_openvino(program, codes, data.draw(st.sampled_from(openvino_flavours())))


@pytest.mark.slow
@settings(max_examples=4_000)
@given(st.data())
def test_openvino_agrees_on_the_files_of_many_programs(data):
    program = data.draw(programs(max_ops=10))
    codes = data.draw(input_codes(program).filter(len))
    for flavour in openvino_flavours():
        check_openvino(program, codes, flavour)


def test_openvino_rounds_ties_of_inputs_as_the_program_does_on_a_scale_of_a_power_of_two():
    for zero_point in (0, -128, 4):
        builder = Builder.start((1,), QParams((2.0**-7,), zero_point))
        builder.rescaled(Requantize("same", ("x",)), builder.grid("x"))
        program = builder.finish()
        half = (np.arange(-400, 400, dtype=np.float32) + np.float32(0.5)) * np.float32(2.0**-7)
        beside = [np.nextafter(half, np.float32(end)) for end in (-np.inf, np.inf)]
        x = np.concatenate([half, *beside]).reshape(-1, 1)
        assert np.array_equal(run_openvino(model(program), x), program.run(x, "reference"))


@pytest.mark.parametrize("seed", range(4))
def test_openvino_agrees_on_convolutions_that_it_computes_wrongly_if_written_plainly(seed):
    """One channel per group, strides, padding as wide as the kernel or wider than the input."""
    rng = np.random.default_rng(seed)
    for _ in range(12):
        groups, outs = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        height, width, kh, kw = (int(v) for v in rng.integers(1, 7, 4))
        padding = tuple(int(v) for v in rng.integers(0, 4, 4))
        stride = tuple(int(v) for v in rng.integers(1, 4, 2))
        if kh > height + sum(padding[:2]) or kw > width + sum(padding[2:]):
            continue
        builder = Builder.start((groups, height, width), QParams((1.0,), 18), seed)
        weight = rng.integers(-8, 8, (groups * outs, 1, kh, kw)).astype(np.int8)
        op = Conv2d("conv", ("x",), stride, padding, (1, 1), groups)
        builder.weighted(op, weight, QParams((1.0,)))
        program = builder.finish()
        codes = rng.integers(-128, 128, (2, groups, height, width)).astype(np.int8)
        for flavour in openvino_flavours():
            check_openvino(program, codes, flavour)


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_openvino_survives_a_permutation_before_a_grouped_convolution(axes):
    """Written plainly, with a zero point, the process ends with a segmentation fault."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    rng = np.random.default_rng(0)
    builder = Builder.start((6, 4, 3), QParams((1.0,), 4))
    builder.add(Permute("turned", ("x",), axes), builder.grid("x"))
    channels = builder.shape("turned")[0]
    weight = rng.integers(-9, 9, (channels, 1, 2, 2)).astype(np.int8)
    builder.weighted(Conv2d("conv", ("turned",), groups=channels), weight, QParams((1.0,)))
    program = builder.finish()
    codes = rng.integers(-128, 128, (2, 6, 4, 3)).astype(np.int8)
    for flavour in openvino_flavours():
        check_openvino(program, codes, flavour)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("make", ENGINES)
def test_blocks_of_known_networks_agree_in_every_tensor(make, block):
    program = BLOCKS[block](1)
    source = program.tensors[program.input]
    codes = np.random.default_rng(1).integers(-128, 128, (3, *source.shape)).astype(np.int8)
    flavours = openvino_flavours() if make is openvino_engine else FLAVOURS
    for flavour in flavours:
        engine = make(program, flavour=flavour)
        assert_same_codes(engine, program, codes)
        assert_same_codes(engine, program, codes[:1])


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (8, 2), (8, 8), (2, 1), (1, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_openvino_agrees_on_convolutions_that_yield_one_position(samples, channels, groups, kernel):
    """Written plainly, with a multiplier per channel, one sample alone becomes zeros."""
    rng = np.random.default_rng(0)
    builder = Builder.start((channels, *kernel), QParams((1.0,)))
    weight = rng.integers(-128, 128, (8, channels // groups, *kernel)).astype(np.int8)
    builder.weighted(Conv2d("conv", ("x",), groups=groups), weight, QParams((1.0,)))
    program = builder.finish()
    codes = rng.integers(-128, 128, (samples, channels, *kernel)).astype(np.int8)
    for flavour in openvino_flavours():
        check_openvino(program, codes, flavour)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("power", [2**12, 2**13, 2**14])
@pytest.mark.parametrize("odd", [1, 3, 5, 7])
def test_openvino_agrees_on_ties_of_multipliers_with_few_bits(groups, power, odd):
    """Fused, all products with them are exact; but if `odd` is not 1, their inverses are not."""
    rng = np.random.default_rng(0)
    builder = Builder.start((8, 8, 8), QParams((1.0,)))
    weight = rng.integers(-8, 9, (8, 8 // groups, 1, 1)).astype(np.int8)
    builder.ops.append(Conv2d("conv", ("x",), groups=groups))
    builder.tensors["conv"] = QTensor((8, 8, 8), QParams((1.0,)))
    multiplier = np.array([odd * power], np.int32)
    scale = multiplier_value(multiplier, 8)
    values = {"weight": weight, "multiplier": multiplier, "weight_scale": scale}
    builder.parameters.update({f"conv.{kind}": value for kind, value in values.items()})
    program = builder.finish()
    assert forms(program) == {"conv": "fused" if odd == 1 else "float"}
    codes = rng.integers(-128, 128, (12, 8, 8, 8)).astype(np.int8)
    for flavour in openvino_flavours():
        check_openvino(program, codes, flavour)


@pytest.mark.parametrize("make", ENGINES)
def test_a_changed_weight_multiplier_or_bias_is_seen(make):
    rng = np.random.default_rng(2)
    builder = Builder.start((40,), QParams((1.0,)))
    weight = rng.integers(-128, 128, (3, 40)).astype(np.int8)
    bias = rng.integers(-999, 999, 3).astype(np.int32)
    builder.weighted(Linear("fc", ("x",)), weight, QParams((1.0,)), bias=bias)
    codes = rng.integers(-128, 128, (200, 40)).astype(np.int8)
    right = make(builder.finish())(codes)
    assert np.array_equal(right, ReferenceEngine(builder.finish())(codes))
    for kind, step in (("weight", 1), ("bias", 800)):
        kept = builder.parameters[f"fc.{kind}"]
        changed = kept.copy()
        changed.flat[0] += step if changed.flat[0] < 127 else -step
        builder.parameters[f"fc.{kind}"] = changed
        wrong = make(builder.finish())(codes)
        builder.parameters[f"fc.{kind}"] = kept
        assert (wrong != right).any(axis=0).tolist() == [True, False, False]


@pytest.mark.parametrize("make", ENGINES)
def test_a_changed_entry_of_a_table_is_seen(make):
    builder = Builder.start((2, 16, 16), QParams((1.0,)))
    table = builder.rng.integers(-128, 128, (2, 256)).astype(np.int8)
    builder.parameters["t.table"] = table
    builder.add(Table("t", ("x",)), QParams((1.0,)))
    codes = np.tile(np.arange(-128, 128, dtype=np.int8).reshape(16, 16), (1, 2, 1, 1))
    right = make(builder.finish())(codes)
    assert np.array_equal(right.reshape(2, 256), table)
    changed = table.copy()
    changed[1, 200] ^= 1
    builder.parameters["t.table"] = changed
    assert np.argwhere(make(builder.finish())(codes) != right).tolist() == [[0, 1, 12, 8]]


# -- engines as engines --------------------------------------------------------------------------


@pytest.mark.parametrize("make", ENGINES)
def test_batches_of_any_size_and_layout_give_the_same_codes(make, monkeypatch):
    program = example()
    codes = np.random.default_rng(4).integers(-128, 128, (23, 2, 5, 5)).astype(np.int8)
    expected = ReferenceEngine(program)(codes)
    monkeypatch.setattr(sys.modules[make(program).__class__.__module__], "SLICE", 5)
    engine = make(program)
    assert_same_codes(engine, program, codes)
    assert np.array_equal(engine(np.asfortranarray(codes)), expected)
    assert np.array_equal(engine(codes[::-1]), expected[::-1])
    empty = engine(codes[:0])
    assert (empty.shape, empty.dtype) == ((0, 3), np.int8)
    with pytest.raises(ProgramError, match="codes of the input must be int8"):
        engine(codes.astype(np.uint8))


@pytest.mark.parametrize("make", ENGINES)
def test_results_of_two_calls_do_not_share_memory(make):
    engine = make(example())
    first = engine(np.full((1, 2, 5, 5), 1, np.int8))
    kept = first.copy()
    engine(np.full((1, 2, 5, 5), -100, np.int8))
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_are_loaded_by_name_and_named_where_a_package_is_missing(name, monkeypatch):
    pytest.importorskip(name, reason=f"{name} is not installed")
    codes = np.zeros((2, 2, 5, 5), np.int8)
    assert np.array_equal(load_engine(name, example())(codes), example().codes(codes, "reference"))
    for package in (name, "onnx"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(EngineUnavailableError, match=f"{package}, which is not installed"):
                load_engine(name, example())


@pytest.mark.parametrize("make", ENGINES)
def test_a_cpu_whose_kernels_saturate_gets_the_integer_flavour(make, monkeypatch):
    module = sys.modules[make(example()).__class__.__module__]
    monkeypatch.setattr(module, "kernels_saturate", lambda: True)
    engine = make(example())
    assert engine.flavour == "integer"
    codes = np.random.default_rng(5).integers(-128, 128, (9, 2, 5, 5)).astype(np.int8)
    assert_same_codes(engine, example(), codes)
    with pytest.raises(EngineUnavailableError, match="could saturate"):
        make(example(), flavour="qdq")
    builder = Builder.start((4,), QParams((1.0,)))
    weight = np.full((2, 4), 60, np.int8)
    builder.weighted(Linear("fc", ("x",)), weight, QParams((1.0,)))
    assert make(builder.finish()).flavour != "integer"  # no two weights of it are too large
    monkeypatch.setattr(module, "kernels_saturate", lambda: False)
    assert make(example()).flavour != "integer"


def test_openvino_names_the_flavours_that_it_reads():
    with pytest.raises(EngineUnavailableError, match="take the flavour 'qdq' or 'integer'"):
        openvino_engine(example(), flavour="qoperator")


def test_an_unknown_level_is_named_with_the_choices():
    with pytest.raises(ProgramError, match="no level 'some'; choose one of all, extended"):
        onnxruntime_engine(example(), level="some")


# -- other CPUs and real data --------------------------------------------------------------------

CPU_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_onnx_engines import check_a_cpu_without_vnni
check_a_cpu_without_vnni()
"""


def check_a_cpu_without_vnni() -> None:
    """Runs where int8 kernels saturate: the integer flavour is exact, the others are not."""
    from intact.engines import onnxruntime as ort_module
    from intact.engines import openvino as ov_module

    assert ort_module.kernels_saturate()
    assert ov_module.kernels_saturate()
    rng = np.random.default_rng(6)
    builder = Builder.start((8, 12, 12), QParams((1.0,)))
    last = "x"
    for i in range(3):
        weight = rng.integers(-128, 128, (8, 8, 3, 3)).astype(np.int8)
        last = builder.weighted(Conv2d(f"conv{i}", (last,)), weight, QParams((1.0,)))
    weight = rng.integers(-128, 128, (10, 6)).astype(np.int8)
    builder.weighted(Linear("fc", (last,)), weight, QParams((1.0,)))
    program = builder.finish()
    assert all(saturates(program, op) for op in program.ops)
    codes = rng.integers(100, 128, (20, 8, 12, 12)).astype(np.int8)
    for engine in (
        ort_module.OnnxRuntimeEngine(program, threads=1),
        ov_module.OpenVINOEngine(program, threads=1),
    ):
        assert engine.flavour == "integer"
        assert_same_codes(engine, program, codes)
    expected = ReferenceEngine(program)(codes)
    made = model(program, io="integer")
    assert not np.array_equal(run_openvino(made, codes), expected)
    made = model(program, flavour="qoperator", io="integer")
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=providers)
    assert not np.array_equal(session.run(None, {"x": codes})[0], expected)


@pytest.mark.slow
def test_the_integer_flavour_is_exact_on_an_emulated_haswell():
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64 is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    command = [emulator, "-cpu", "Haswell", sys.executable, "-c", CPU_SCRIPT, str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_real_normalised_images_meet_no_tie_and_no_engine_differs():
    """All of CIFAR-10's test images, as floats, through every flavour."""
    pytest.importorskip("torch", reason="torch is not installed")
    if "INTACT_DATA_DIR" not in os.environ:
        pytest.skip("INTACT_DATA_DIR does not name a folder with CIFAR-10")
    from intact.data import batches, load_dataset
    from intact.zoo.lenet import load_lenet

    data = load_dataset("cifar10")
    calibration = [x for x, _ in batches(data.train_images[:500], data.train_labels[:500], 100)]
    program = intact.quantize(load_lenet("cifar10", "last"), calibration)
    scale = program.tensors[program.input].qparams.scale[0]
    engines = [onnxruntime_engine(program, flavour=f) for f in FLAVOURS]
    engines.append(openvino_engine(program))
    floats = model(program)
    for x, _ in batches(data.test_images, data.test_labels, 1000):
        values = np.asarray(x, np.float32)
        distance = np.abs(values / scale - np.floor(values / scale) - 0.5)
        assert distance.min() > 2.0**-10  # far from what any rounding could move
        codes = program.quantize_input(values)
        expected = program.codes(codes, "torch")
        for engine in engines:
            assert np.array_equal(engine(codes), expected)
        assert np.array_equal(run_openvino(floats, values), program.run(values, "torch"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_an_interruption_is_one_when_engines_of_openvino_have_come_and_gone(tmp_path):
    """In the order in which OpenVINO left a stack for signals behind that was gone."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    example(0).save(tmp_path / "program.safetensors")
    code = """
import signal
import intact
from intact.engines import load_engine
program = intact.load("program.safetensors")
first, second = (load_engine("openvino", program) for _ in range(2))
del first
del second
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "interrupted\n"), ran.stderr
