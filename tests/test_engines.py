"""All engines give the same codes in every tensor; the reference engine gives the right ones."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from intact.arithmetic import QParams, multiplier_value
from intact.engines import load_engine
from intact.engines.reference import ReferenceEngine, convolve, windows
from intact.engines.torch import SLICE, TorchEngine
from intact.errors import ProgramError
from intact.ops import Conv2d, Linear, MaxPool2d, output_shape
from intact.program import Program, QTensor
from strategies import Builder, example, input_codes, programs


def trace(engine, codes):
    """Every tensor's codes, slices put together."""
    seen = defaultdict(list)
    output = engine(codes, lambda name, values: seen[name].append(values))
    return {name: np.concatenate(parts) for name, parts in seen.items()}, output


def assert_same_codes(program: Program, codes) -> None:
    expected, output = trace(ReferenceEngine(program), codes)
    actual, torch_output = trace(TorchEngine(program), codes)
    names = [program.input, *(op.name for op in program.ops)] if len(codes) else []
    assert list(actual) == list(expected) == names
    for name in expected:
        assert actual[name].dtype == expected[name].dtype == program.tensors[name].qparams.dtype
        assert np.array_equal(actual[name], expected[name]), name
        low, high = program.tensors[name].qparams.qmin, program.tensors[name].qparams.qmax
        assert ((expected[name] >= low) & (expected[name] <= high)).all()
    # Without a hook the torch engine takes short cuts.
    assert np.array_equal(TorchEngine(program)(codes), output)
    assert np.array_equal(torch_output, output)


@settings(max_examples=250)
@given(st.data())
def test_torch_and_reference_agree_on_random_programs(data):
    program = data.draw(programs())
    assert_same_codes(program, data.draw(input_codes(program)))


@pytest.mark.slow
@settings(max_examples=20_000)
@given(st.data())
def test_torch_and_reference_agree_on_many_random_programs(data):
    program = data.draw(programs(max_ops=10))
    assert_same_codes(program, data.draw(input_codes(program)))


def conv_program(weight, bias=None, *, grid=None, multiplier=None, **geometry) -> Program:
    """One convolution of a [C, H, W] input with zero point 4."""
    builder = Builder.start((weight.shape[1] * geometry.get("groups", 1), 6, 7), QParams((1.0,), 4))
    op = Conv2d("conv", ("x",), **geometry)
    m = np.array([3000], np.int32) if multiplier is None else multiplier
    scale = (multiplier_value(m, 8).astype(np.float64)).astype(np.float32)
    builder.parameters = {"conv.weight": weight, "conv.multiplier": m, "conv.weight_scale": scale}
    if bias is not None:
        builder.parameters["conv.bias"] = bias
    builder.ops.append(op)
    shape = output_shape(op, [builder.shape("x")], weight.shape)
    builder.tensors["conv"] = QTensor(shape, grid or QParams((1.0,), -6))
    return builder.finish()


def test_reference_convolution_is_the_sum_that_the_specification_writes():
    rng = np.random.default_rng(0)
    weight = rng.integers(-128, 128, (4, 2, 3, 2)).astype(np.int8)
    bias = rng.integers(-5000, 5000, 4).astype(np.int32)
    program = conv_program(
        weight, bias, stride=(2, 1), padding=(1, 0, 2, 1), dilation=(1, 2), groups=2
    )
    x = rng.integers(-128, 128, (2, 4, 6, 7)).astype(np.int8)
    out = ReferenceEngine(program)(x)
    m, zero_point = 3000, -6
    for n, o, i, j in np.ndindex(out.shape):
        acc = int(bias[o])
        for c, u, v in np.ndindex(2, 3, 2):
            row, column = i * 2 + u - 1, j + 2 * v - 2
            if 0 <= row < 6 and 0 <= column < 7:
                acc += (int(x[n, (o // 2) * 2 + c, row, column]) - 4) * int(weight[o, c, u, v])
        expected = round(Fraction(acc * m, 2**16)) + zero_point
        assert out[n, o, i, j] == min(max(expected, -128), 127)


def test_reference_geometry_is_that_of_torch():
    rng = np.random.default_rng(1)
    x = rng.integers(-9, 10, (2, 4, 9, 8))
    weight = rng.integers(-9, 10, (6, 2, 3, 2)).astype(np.int8)
    got = convolve(x, weight, (2, 1), (1, 2), 2)
    as_double = [torch.from_numpy(a.astype(np.float64)) for a in (x, weight)]
    assert np.array_equal(got, F.conv2d(*as_double, None, (2, 1), 0, (1, 2), 2).numpy())
    pooled = windows(x, (3, 2), (2, 2), (2, 1)).max((-2, -1))
    expected = F.max_pool2d(as_double[0], (3, 2), (2, 2), 0, (2, 1)).numpy()
    assert np.array_equal(pooled, expected)


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_one_changed_weight_multiplier_or_bias_is_seen(engine):
    rng = np.random.default_rng(2)
    weight = rng.integers(-128, 128, (3, 2, 3, 3)).astype(np.int8)
    bias = np.array([10, -20, 30], np.int32)
    multiplier = np.array([40, 41, 42], np.int32)
    program = conv_program(weight, bias, multiplier=multiplier)
    x = rng.integers(-128, 128, (64, 2, 6, 7)).astype(np.int8)
    right = load_engine(engine, program)(x)
    assert np.mean((right > -128) & (right < 127)) > 0.9  # nothing hides in saturation
    for name, index in (("conv.weight", (1, 0, 2, 2)), ("conv.bias", (1,))):
        broken = {k: v.copy() for k, v in program.parameters.items()}
        broken[name][index] += 1 if name == "conv.weight" else 800
        wrong = load_engine(engine, replace(program, parameters=broken))(x)
        differing = (wrong != right).any(axis=(0, 2, 3))
        assert differing.tolist() == [False, True, False]


def test_half_up_rounding_would_be_seen():
    """Accumulators on a tie: the even neighbour, not the upper one."""
    weight = np.ones((1, 1, 1, 1), np.int8)
    program = conv_program(weight, multiplier=np.array([2**15], np.int32))
    x = np.arange(-128, 128, dtype=np.int8).reshape(-1, 1, 1, 1)
    wide = np.broadcast_to(x, (256, 1, 6, 7)).copy()
    acc = np.arange(-128, 128) - 4
    even = np.array([round(Fraction(int(a), 2)) for a in acc]) - 6
    half_up = np.floor(acc / 2 + 0.5).astype(int) - 6
    assert (even != half_up).sum() == 64  # so this test would notice
    for engine in ("reference", "torch"):
        assert np.array_equal(load_engine(engine, program)(wide)[:, 0, 0, 0], even)


def linear_program(weight, bias, multiplier) -> Program:
    builder = Builder.start((weight.shape[1],), QParams((1.0,), 0, 0, 255, signed=False))
    builder.ops.append(Linear("fc", ("x",)))
    builder.tensors["fc"] = QTensor((len(weight),), QParams((1.0,)))
    builder.parameters = {
        "fc.weight": weight,
        "fc.bias": bias,
        "fc.multiplier": multiplier,
        "fc.weight_scale": multiplier_value(multiplier, 8).astype(np.float32),
    }
    return builder.finish()


def test_a_bound_above_two_to_the_24_is_computed_in_float64():
    """One more than 2**24 has no float32: the engine must know before it adds."""
    weight = np.full((1, 600), 127, np.int8)
    program = linear_program(weight, np.array([3], np.int32), np.array([1], np.int32))
    engine = TorchEngine(program)
    assert engine.accumulator_dtype(program.ops[0]) is torch.float64
    codes = np.full((1, 600), 255, np.uint8)
    assert np.array_equal(engine(codes), ReferenceEngine(program)(codes))
    small = linear_program(weight[:, :500], np.array([0], np.int32), np.array([1], np.int32))
    assert TorchEngine(small).accumulator_dtype(small.ops[0]) is torch.float32


def test_float32_would_be_wrong_above_two_to_the_24():
    """The check above matters: cancelling sums lose their last bits in float32."""
    weight = np.full((1, 2001), 127, np.int8)
    weight[0, 1000:2000] = -127
    weight[0, 2000] = 1
    codes = np.full((1, 2001), 255, np.uint8)
    codes[0, 2000] = 1  # the exact sum is 1
    exact = int((weight.astype(np.int64) * codes).sum())
    assert exact == 1
    in_order = np.float32(0)
    for term in (weight.astype(np.float32) * codes)[0, ::-1]:
        in_order = np.float32(in_order + term)
    assert int(in_order) != exact
    program = linear_program(weight, np.array([0], np.int32), np.array([2**20], np.int32))
    for engine in ("reference", "torch"):
        assert load_engine(engine, program)(codes).tolist() == [[16]]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_precision_settings_of_the_process_change_nothing(precision):
    rng = np.random.default_rng(3)
    program = linear_program(
        rng.integers(-128, 128, (32, 500)).astype(np.int8),
        rng.integers(-9999, 9999, 32).astype(np.int32),
        np.full(32, 7, np.int32),
    )
    codes = rng.integers(0, 256, (64, 500)).astype(np.uint8)
    expected = ReferenceEngine(program)(codes)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(TorchEngine(program)(codes), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore:TF32:UserWarning")  # from asking for the flags
def test_kernels_by_winograd_are_never_taken():
    """Without oneDNN torch convolves with NNPACK, whose sums pass through fractions."""
    rng = np.random.default_rng(8)
    weight = rng.integers(-128, 128, (32, 16, 3, 3)).astype(np.int8)
    program = conv_program(weight, padding=(1, 1, 1, 1), multiplier=np.array([300], np.int32))
    codes = rng.integers(-128, 128, (64, 16, 6, 7)).astype(np.int8)
    expected = ReferenceEngine(program)(codes)
    with torch.backends.mkldnn.flags(enabled=False):
        assert np.array_equal(TorchEngine(program)(codes), expected)


def test_gpu_convolution_path_is_exact(monkeypatch):
    """Devices other than the CPU convolve by unfolding; that path runs here on the CPU."""
    rng = np.random.default_rng(4)
    weight = rng.integers(-128, 128, (4, 2, 3, 2)).astype(np.int8)
    program = conv_program(
        weight,
        np.array([1, 2, 3, 4], np.int32),
        stride=(2, 1),
        padding=(1, 0, 2, 1),
        dilation=(1, 2),
        groups=2,
    )
    x = rng.integers(-128, 128, (3, 4, 6, 7)).astype(np.int8)
    engine = TorchEngine(program)
    monkeypatch.setattr(engine, "_unfolds", True)
    assert np.array_equal(engine(x), ReferenceEngine(program)(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@settings(max_examples=100)
@given(st.data())
def test_cuda_agrees_with_the_reference(data):
    program = data.draw(programs())
    codes = data.draw(input_codes(program))
    assert np.array_equal(TorchEngine(program, "cuda")(codes), ReferenceEngine(program)(codes))


def test_a_pool_over_the_channels_of_a_linear_comes_after_requantization():
    """Each channel has its own multiplier, so the largest accumulator need not be the winner."""
    builder = Builder.start((1, 1, 1), QParams((1.0,), 0, 0, 255, signed=False))
    builder.ops += [
        Linear("fc", ("x",)),
        MaxPool2d("pool", ("fc",), kernel=(1, 2), stride=(1, 2)),
    ]
    builder.tensors["fc"] = QTensor((1, 1, 2), QParams((1.0,)))
    builder.tensors["pool"] = QTensor((1, 1, 1), QParams((1.0,)))
    multiplier = np.array([65536, 655], np.int32)
    builder.parameters = {
        "fc.weight": np.array([[1], [50]], np.int8),
        "fc.multiplier": multiplier,
        "fc.weight_scale": multiplier_value(multiplier, 8),
    }
    program = builder.finish()
    codes = np.array([100], np.uint8).reshape(1, 1, 1, 1)  # accumulators 100 and 5000
    for engine in ("reference", "torch"):
        assert load_engine(engine, program)(codes).tolist() == [[[[100]]]]


@pytest.mark.parametrize("engine", ["reference", "torch"])
def test_batches_of_any_size_give_the_same_codes(engine):
    program = example()
    spec = program.tensors[program.input]
    rng = np.random.default_rng(5)
    shape = (SLICE + 37, *spec.shape)
    codes = rng.integers(spec.qparams.qmin, spec.qparams.qmax + 1, shape).astype(spec.qparams.dtype)
    run = load_engine(engine, program)
    whole = run(codes)
    assert np.array_equal(whole[100:101], run(codes[100:101]))
    assert np.array_equal(whole[:7], run(codes[:7]))
    empty = run(codes[:0])
    assert (empty.shape, empty.dtype) == ((0, *whole.shape[1:]), whole.dtype)


def test_memory_layout_of_the_input_does_not_matter():
    program = example()
    spec = program.tensors[program.input]
    rng = np.random.default_rng(6)
    shape = (5, *spec.shape)
    codes = rng.integers(spec.qparams.qmin, spec.qparams.qmax + 1, shape).astype(spec.qparams.dtype)
    for engine in ("reference", "torch"):
        run = load_engine(engine, program)
        assert np.array_equal(run(np.asfortranarray(codes)), run(codes))
        assert np.array_equal(run(codes[::-1])[::-1], run(codes))


def test_an_unknown_engine_is_named_with_the_choices():
    with pytest.raises(ProgramError, match="no engine 'tpu'; choose one of auto, native, ref"):
        load_engine("tpu", example())


def test_a_stored_program_loads_and_runs_without_torch(tmp_path):
    """In a process where importing torch fails."""
    program = example()
    path = tmp_path / "program.safetensors"
    program.save(path)
    spec = program.tensors[program.input]
    codes = np.full((2, *spec.shape), spec.qparams.qmin, spec.qparams.dtype)
    np.save(tmp_path / "codes.npy", codes)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np, intact
program = intact.load({str(path)!r})
np.save({str(tmp_path / "out.npy")!r}, program.codes(np.load({str(tmp_path / "codes.npy")!r})))
assert not [m for m in sys.modules if m.split(".")[0] in ("scipy", "jinja2", "rich", "sklearn")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.array_equal(np.load(tmp_path / "out.npy"), program.codes(codes, "torch"))
