"""An ONNX file computes the program's integers, in ONNX Runtime and in `onnx` itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import intact
from blocks import BLOCKS, squeeze_excitation
from intact.arithmetic import QParams, dequantize, multiplier_value
from intact.configurations import evaluator
from intact.engines.reference import ReferenceEngine
from intact.errors import ExportError, StorageError
from intact.export.onnx import (
    FLAVOURS,
    FLOAT32_EXACT,
    IOS,
    MAX_PAIR,
    forms,
    model,
    saturates,
    saturation_probe,
)
from intact.ops import (
    Conv2d,
    Linear,
    MaxPool2d,
    Multiply,
    Pad,
    Requantize,
    Slice,
    Table,
    Upsample,
    accumulates,
)
from intact.program import Program, QTensor
from strategies import Builder, example, input_codes, programs

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
LEVELS = runtime.GraphOptimizationLevel


def run(made, fed, level=LEVELS.ORT_ENABLE_ALL):
    """What ONNX Runtime makes of a model's first output."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: fed})[0]


def run_evaluator(made, fed):
    """What the reference evaluator of `onnx` makes of it: the specification, in NumPy."""
    return evaluator(made).run(None, {made.graph.input[0].name: fed})[0]


def fed_and_expected(program: Program, codes, io):
    """What goes into a model, and what must come out."""
    if io == "integer":
        return codes, ReferenceEngine(program)(codes)
    real = dequantize(codes, program.tensors[program.input].qparams)
    # Not all scales bring all codes back, so the program says what they are now.
    out = ReferenceEngine(program)(program.quantize_input(real))
    return real, dequantize(out, program.tensors[program.output].qparams)


def assert_equal(got, expected):
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected)


def linear(weight, multiplier, *, bias=None, source=None, target=None) -> Program:
    """One linear layer."""
    source, target = source or QParams((1.0,)), target or QParams((1.0,))
    builder = Builder.start((weight.shape[1],), source)
    builder.ops.append(Linear("fc", ("x",)))
    builder.tensors["fc"] = QTensor((len(weight),), target)
    builder.parameters = {
        "fc.weight": weight,
        "fc.multiplier": multiplier,
        "fc.weight_scale": multiplier_value(multiplier, target.bits),
    }
    if bias is not None:
        builder.parameters["fc.bias"] = bias
    return builder.finish()


# -- the same integers ---------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data())
def test_every_flavour_computes_the_programs_integers(data):
    program = data.draw(programs())
    codes = data.draw(input_codes(program).filter(len))
    flavour, io = (data.draw(st.sampled_from(c)) for c in (FLAVOURS, IOS))
    made = model(program, flavour=flavour, io=io)
    fed, expected = fed_and_expected(program, codes, io)
    for level in (LEVELS.ORT_ENABLE_ALL, LEVELS.ORT_DISABLE_ALL):
        assert_equal(run(made, fed, level), expected)


@pytest.mark.slow
@settings(max_examples=5_000)
@given(st.data())
def test_every_flavour_computes_the_integers_of_many_programs(data):
    program = data.draw(programs(max_ops=10))
    codes = data.draw(input_codes(program).filter(len))
    flavour, io = (data.draw(st.sampled_from(c)) for c in (FLAVOURS, IOS))
    made = model(program, flavour=flavour, io=io)
    fed, expected = fed_and_expected(program, codes, io)
    for level in LEVELS.__members__.values():
        assert_equal(run(made, fed, level), expected)


@settings(max_examples=100)
@given(st.data())
def test_the_reference_evaluator_agrees(data):
    """The specification's own reading of the operators, not an engine's."""
    program = data.draw(programs(max_ops=4))
    codes = data.draw(input_codes(program).filter(len))
    flavour, io = (data.draw(st.sampled_from(c)) for c in (FLAVOURS, IOS))
    fed, expected = fed_and_expected(program, codes, io)
    assert_equal(run_evaluator(model(program, flavour=flavour, io=io), fed), expected)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)])
def test_the_reference_evaluator_pools_codes_with_a_stride_of_1(signed, padding):
    grid = QParams((1.0,), 0) if signed else QParams((1.0,), 0, 0, 255, signed=False)
    top, bottom, left, right = padding
    shape = (2, 3 + top + bottom, 3 + left + right)
    program = Program(
        ("x",),
        ("y",),
        (MaxPool2d("y", ("x",), (3, 3), (1, 1), padding),),
        {"x": QTensor((2, 5, 5), grid), "y": QTensor(shape, grid)},
        {},
    )
    rng = np.random.default_rng(0)
    codes = rng.integers(grid.qmin, grid.qmax + 1, (7, 2, 5, 5)).astype(grid.dtype)
    made = model(program, io="integer")
    assert_equal(run_evaluator(made, codes), ReferenceEngine(program)(codes))


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_known_networks_are_exact_in_every_flavour(block):
    program = BLOCKS[block](0)
    source = program.tensors[program.input]
    codes = np.random.default_rng(0).integers(-128, 128, (3, *source.shape)).astype(np.int8)
    expected = ReferenceEngine(program)(codes)
    assert len(np.unique(expected)) > 10  # it is no block of constants
    for flavour in FLAVOURS:
        made = model(program, flavour=flavour, io="integer")
        for level in LEVELS.__members__.values():
            assert_equal(run(made, codes, level), expected)
            assert_equal(run(made, codes[:1], level), expected[:1])
        assert_equal(run_evaluator(made, codes), expected)


def all_pairs_on_ties() -> tuple[Program, np.ndarray]:
    """Every accumulator from -12,928 to 12,827, times multipliers that make many of them ties."""
    multipliers = np.array([2**15, 2**13, 3 * 2**12, 771 * 2, 3, 7, 11, 1], np.int32)
    weight = np.tile(np.array([[100, 1]], np.int8), (len(multipliers), 1))
    bias = np.array([0, 1, -3, 17, 0, -25, 5, 10**6], np.int32)
    a, b = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128), indexing="ij")
    codes = np.stack([a.ravel(), b.ravel()], 1).astype(np.int8)
    return linear(weight, multipliers, bias=bias, target=QParams((1.0,), -6)), codes


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("level", LEVELS.__members__)
def test_accumulators_on_and_beside_ties_round_to_even(flavour, level):
    program, codes = all_pairs_on_ties()
    expected = ReferenceEngine(program)(codes)
    acc = codes.astype(int) @ program.parameters["fc.weight"].T + program.parameters["fc.bias"]
    product = acc * program.parameters["fc.multiplier"].astype(np.int64)
    assert (product % 2**16 == 2**15).sum() > 20_000  # on a tie
    assert (abs(product % 2**16 - 2**15) == 1).sum() >= 10  # as near to one as can be
    exact = round(Fraction(int(product[777, 0]), 2**16)) - 6
    assert expected[777, 0] == min(max(exact, -128), 127)
    made = model(program, flavour=flavour, io="integer")
    assert np.array_equal(run(made, codes, LEVELS.__members__[level]), expected)


def test_ties_of_float_inputs_round_as_the_program_rounds_them():
    """Values half way between two codes, and the floats next to them, for any kind of scale."""
    for scale in (2.0**-7, 0.0123, 3.0):
        builder = Builder.start((1,), QParams((float(np.float32(scale)),), 4))
        grid = builder.grid("x")
        builder.rescaled(Requantize("same", ("x",)), grid)
        program = builder.finish()
        half = (np.arange(-140, 140, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
        beside = [np.nextafter(half, np.float32(end)) for end in (-np.inf, np.inf)]
        special = np.array([np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-45], np.float32)
        x = np.concatenate([half, *beside, special]).reshape(-1, 1)
        for flavour in FLAVOURS:
            for level in (LEVELS.ORT_ENABLE_ALL, LEVELS.ORT_DISABLE_ALL):
                got = run(model(program, flavour=flavour), x, level)
                assert np.array_equal(got, program.run(x, "reference"))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_changed_weight_bias_or_multiplier_is_seen(flavour):
    rng = np.random.default_rng(1)
    weight = rng.integers(-128, 128, (4, 40)).astype(np.int8)
    bias = rng.integers(-999, 999, 4).astype(np.int32)
    program = linear(weight, np.array([40, 41, 42, 43], np.int32), bias=bias)
    codes = rng.integers(-128, 128, (200, 40)).astype(np.int8)
    expected = ReferenceEngine(program)(codes)
    assert np.mean(abs(expected.astype(int)) < 127) > 0.9  # nothing hides in saturation
    made = model(program, flavour=flavour, io="integer")
    assert np.array_equal(run(made, codes), expected)
    kinds = [t.name for t in made.graph.initializer if t.name.startswith("fc")]
    assert {"fc.weight", "fc.bias", "fc/multiplier"} <= set(kinds)
    for kind in ("fc.weight", "fc.bias", "fc/multiplier"):
        broken = onnx.ModelProto()
        broken.CopyFrom(made)
        stored = next(t for t in broken.graph.initializer if t.name == kind)
        array = onnx.numpy_helper.to_array(stored).copy()
        array.flat[0] += 800 if kind == "fc.bias" else 1 if kind == "fc.weight" else 2.0**-16
        stored.CopyFrom(onnx.numpy_helper.from_array(array, kind))
        assert not np.array_equal(run(broken, codes), expected)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_changed_entry_of_a_table_is_seen_at_its_code_and_in_its_channel(flavour, per_channel):
    rng = np.random.default_rng(3)
    builder = Builder.start((3, 16, 16), QParams((1.0,), 6))
    rows = 3 if per_channel else 1
    builder.parameters["t.table"] = rng.integers(-128, 128, (rows, 256)).astype(np.int8)
    builder.add(Table("t", ("x",)), QParams((1.0,), -128))
    program = builder.finish()
    codes = np.broadcast_to(np.arange(-128, 128, dtype=np.int8).reshape(16, 16), (2, 3, 16, 16))
    codes = np.ascontiguousarray(codes)
    made = model(program, flavour=flavour, io="integer")
    expected = ReferenceEngine(program)(codes)
    assert_equal(run(made, codes), expected)
    stored = next(t for t in made.graph.initializer if t.name == "t.table")
    entries = onnx.numpy_helper.to_array(stored).copy()
    entries[256 * (rows - 1) + 128 - 77] ^= 1  # of code -77 in the last row
    stored.CopyFrom(onnx.numpy_helper.from_array(entries, "t.table"))
    wrong = run(made, codes) != expected
    last = np.arange(3).reshape(3, 1, 1) >= rows - 1 if per_channel else True
    assert np.array_equal(wrong, (codes == -77) & last)


# -- how layers are written ----------------------------------------------------------------------


def test_a_layer_is_fused_only_where_its_multiplier_is_a_power_of_two_and_float32_holds_its_sums():
    weight = np.full((1, 500), 100, np.int8)
    for m, form in ((1, "fused"), (2, "fused"), (2**12, "fused"), (3, "float"), (257, "float")):
        assert forms(linear(weight, np.array([m], np.int32))) == {"fc": form}
    # 500 * 100 * 128 = 6,400,000 is below 2**24; with a bias it need not be.
    for bias, form in ((10_377_216, "fused"), (10_377_217, "integer")):
        biased = linear(weight, np.array([2], np.int32), bias=np.array([bias], np.int32))
        assert forms(biased) == {"fc": form}
    narrow = linear(weight, np.array([1], np.int32), target=QParams((1.0,), 0, -100, 100))
    assert forms(narrow) == {"fc": "float"}


def test_float32_would_be_wrong_where_the_proof_fails():
    """A layer just beyond the proof, written as if it held, is wrong without a fused kernel."""
    rng = np.random.default_rng(2)
    weight = rng.integers(-128, 128, (8, 600)).astype(np.int8)
    program = linear(weight, np.full(8, 24 * 257 // 16 * 2 + 1, np.int32))
    assert forms(program) == {"fc": "float"}
    codes = rng.integers(-128, 128, (4000, 600)).astype(np.int8)
    acc = codes.astype(np.int64) @ weight.T
    factor = multiplier_value(program.parameters["fc.multiplier"], 8)
    naive = codes.astype(np.float32) @ (weight.astype(np.float32) * factor[:, None]).T
    exact = acc * program.parameters["fc.multiplier"].astype(np.int64) / 2**16
    assert (naive != exact).any()  # so the proof is needed
    expected = ReferenceEngine(program)(codes)
    for level in LEVELS.__members__.values():
        assert np.array_equal(run(model(program, io="integer"), codes, level), expected)


def test_sums_beyond_float32_are_added_in_int32_part_by_part():
    weight = np.full((1, 2001), 127, np.int8)
    weight[0, 1000:2000] = -127
    weight[0, 2000] = 1
    codes = np.full((1, 2001), 255, np.uint8)
    codes[0, 2000] = 1  # the sum is 1, by way of 32 million
    source = QParams((1.0,), 0, 0, 255, signed=False)
    program = linear(weight, np.array([2**20], np.int32), source=source)
    assert int(program.accumulator_bounds(program.ops[0]).max()) > 3 * FLOAT32_EXACT
    assert forms(program) == {"fc": "integer"}
    made = model(program, io="integer")
    assert [n.op_type for n in made.graph.node].count("MatMulInteger") == 4
    for flavour in FLAVOURS:
        assert run(model(program, flavour=flavour, io="integer"), codes).tolist() == [[16]]


def test_every_form_is_taken_where_it_belongs():
    assert set(forms(example()).values()) == {"float"}
    assert forms(example(), "integer") == {"conv1": "integer", "fc": "integer"}
    assert forms(example(), "qoperator") == {"conv1": "qlinear", "fc": "qlinear"}
    biased = linear(np.ones((1, 2), np.int8), np.array([1], np.int32), bias=np.ones(1, np.int32))
    assert forms(biased, "qoperator") == {"fc": "integer"}  # QLinearMatMul has no bias
    free = linear(np.ones((1, 2), np.int8), np.array([0.3], np.float32))
    assert forms(free, "qoperator") == {"fc": "integer"}


def test_a_multiplier_off_the_dyadic_grid_is_never_left_to_the_type_in_which_it_is_multiplied():
    """A sum whose product is a tie in float32 and next to one in float64, in a convolution."""
    rng = np.random.default_rng(0)
    sums = np.arange(-(2**20), 2**20)
    while True:
        m = np.float32(rng.uniform(5e-5, 1e-4))
        differ = np.rint(sums.astype(np.float32) * m) != np.rint(sums * np.float64(m))
        if differ.any():
            break
    weight = np.zeros((1, 1, 1, 1), np.int8)
    bias = sums[differ][:1].astype(np.int32)
    builder = Builder.start((1, 1, 1), QParams((1.0,)))
    builder.weighted(Conv2d("conv", ("x",)), weight, QParams((1.0,)), grid="float", bias=bias)
    new = {"conv.multiplier": np.array([m]), "conv.weight_scale": np.array([m])}
    program = replace(builder.finish(), parameters={**builder.parameters, **new})
    codes = np.zeros((1, 1, 1, 1), np.int8)
    expected = ReferenceEngine(program)(codes)
    for flavour in FLAVOURS:
        made = model(program, flavour=flavour, io="integer")
        assert_equal(run_evaluator(made, codes), expected)
        assert_equal(run(made, codes), expected)


def test_a_product_is_multiplied_as_the_definition_says_in_every_flavour():
    program = squeeze_excitation()
    product = next(op.name for op in program.ops if isinstance(op, Multiply))
    for flavour in FLAVOURS:
        assert forms(program, flavour)[product] == "float"
        made = {node.name: node for node in model(program, flavour=flavour).graph.node}
        steps = [product, f"{product}/integers", f"{product}/scaled", f"{product}/rounded"]
        assert [made[name].op_type for name in steps] == ["Mul", "Round", "Mul", "Round"]


def test_codes_are_moved_by_the_operators_that_engines_know():
    def written(op, shape, flavour="qdq", **parameters):
        builder = Builder.start(shape, QParams((1.0,), 4))
        builder.parameters.update(parameters)
        builder.add(op, builder.grid("x"))
        made = model(builder.finish(), flavour=flavour, io="integer")
        kinds = [node.op_type for node in made.graph.node]
        return [kind for kind in kinds if kind not in ("QuantizeLinear", "DequantizeLinear")]

    table = {"t.table": np.zeros((1, 256), np.int8)}
    assert written(Table("t", ("x",)), (4,), **table) == ["Cast", "Add", "Gather"]
    found = ["Cast", "Reshape", "GatherElements", "Reshape"]  # which ONNX Runtime has a kernel for
    assert written(Table("t", ("x",)), (4,), "qoperator", **table) == found
    assert written(Slice("s", ("x",), 0, 1, 4, 2), (4,)) == ["Slice"]
    assert written(Pad("p", ("x",), (1, 0), 3.0), (4,)) == ["Pad"]
    assert written(Upsample("u", ("x",), (1, 2, 3)), (2, 3, 3)) == ["Resize"]
    assert written(Upsample("u", ("x",), (2, 1, 3)), (2, 3, 3)) == ["Gather", "Gather"]
    assert written(Upsample("u", ("x",), (1, 1)), (2, 3)) == ["Gather"]


def test_operators_are_standard_and_those_of_the_flavour():
    kinds = {
        flavour: {n.op_type for n in model(example(), flavour=flavour).graph.node}
        for flavour in FLAVOURS
    }
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "MatMul"} <= kinds["qdq"]
    assert {"QLinearConv", "QLinearMatMul"} <= kinds["qoperator"]
    assert {"ConvInteger", "MatMulInteger"} <= kinds["integer"]
    for flavour in FLAVOURS:
        made = model(example(), flavour=flavour)
        assert [(o.domain, o.version) for o in made.opset_import] == [("", 19)]


def test_weights_that_could_saturate_vpmaddubsw_are_told_from_those_that_cannot():
    assert 255 * MAX_PAIR <= 2**15 - 1 < 255 * (MAX_PAIR + 1)
    grid = np.array([1], np.int32)

    def risky(*weights: int) -> bool:
        program = linear(np.array([weights], np.int8), grid)
        return saturates(program, program.ops[0])

    assert not risky(64, 64, -64, -64)
    assert risky(65, 0, 64)
    assert risky(-65, 3, -64)
    assert not risky(127, -128)  # of two signs, they cancel
    assert not risky(127)  # alone in its channel


def test_only_the_integer_flavour_keeps_off_kernels_for_int8_weights():
    kinds = {}
    for flavour in FLAVOURS:
        made = model(example(), flavour=flavour)
        stored = next(t for t in made.graph.initializer if t.name == "conv1.weight")
        kinds[flavour] = onnx.TensorProto.DataType.Name(stored.data_type)
    assert kinds == {"qdq": "INT8", "qoperator": "INT8", "integer": "UINT8"}


def test_the_saturation_probe_has_the_output_that_it_states():
    program, codes, expected = saturation_probe()
    assert np.array_equal(ReferenceEngine(program)(codes), expected)
    assert all(saturates(program, op) for op in program.ops if isinstance(op, Conv2d | Linear))


# -- the file ------------------------------------------------------------------------------------


def test_names_are_the_users_and_batches_have_any_size():
    program = example()
    for flavour in FLAVOURS:
        for io in IOS:
            made = model(program, flavour=flavour, io=io)
            graph = made.graph
            assert {op.name for op in program.ops} <= {n.name for n in graph.node}
            assert [graph.input[0].name, graph.output[0].name] == [program.input, program.output]
            for value in (*graph.input, *graph.output, *graph.value_info):
                assert value.type.tensor_type.shape.dim[0].dim_param == "N"
            codes = np.zeros((7, 2, 5, 5), np.int8)
            fed, expected = fed_and_expected(program, codes, io)
            assert_equal(run(made, fed), expected)
            assert_equal(run(made, fed[:1]), expected[:1])


def test_names_that_collide_with_ours_are_kept():
    builder = Builder.start((4,), QParams((1.0,)))
    names = ["fc", "fc/multiplier", "fc/rounded", "fc/codes", "int8/0", "x/codes"]
    source = "x"
    for name in names:
        weight = np.eye(4, dtype=np.int8) * 64
        source = builder.weighted(Linear(name, (source,)), weight, QParams((1.0,)))
    program = builder.finish()
    codes = np.arange(-60, 60, dtype=np.int8).reshape(-1, 4)
    expected = ReferenceEngine(program)(codes)
    for flavour in FLAVOURS:
        for trace in (False, True):
            made = model(program, flavour=flavour, io="integer", trace=trace)
            assert set(names) <= {n.name for n in made.graph.node}
            assert np.array_equal(run(made, codes), expected)


def test_the_metadata_holds_the_real_scales_and_the_hash():
    program = example()
    for flavour, raised in (("qdq", 0), ("qoperator", 128), ("integer", 128)):
        made = model(program, flavour=flavour, io="integer")
        facts = {p.key: p.value for p in made.metadata_props}
        assert facts["intact.program"] == program.sha256
        assert facts["intact.version"] == intact.__version__
        assert [facts[f"intact.{k}"] for k in ("flavour", "io")] == [flavour, "integer"]
        assert json.loads(facts["intact.info"]) == dict(program.info)
        tensors, layers = (json.loads(facts[f"intact.{k}"]) for k in ("tensors", "layers"))
        for name, tensor in program.tensors.items():
            assert tensors[name]["scale"] == tensor.qparams.scale[0]
            assert tensors[name]["zero_point"] == tensor.qparams.zero_point
            assert tensors[name]["raised_by"] == raised
        assert set(layers) == {op.name for op in program.ops if accumulates(op)}
        assert layers["conv1"]["saturates_without_vnni"] is (flavour != "integer")
        scales = np.array(layers["conv1"]["weight_scale"], np.float32)
        assert np.array_equal(scales, program.parameters["conv1.weight_scale"])
        assert made.producer_name == "intact"
        assert program.sha256 in made.doc_string
        conv = next(n for n in made.graph.node if n.name == "conv1")
        assert conv.doc_string.startswith("Conv2d, ")


def test_the_file_is_whole_checked_and_the_same_every_time(tmp_path):
    program = example()
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    intact.export.onnx(program, first)
    intact.export.onnx(intact.load(saved(program, tmp_path)), second)
    assert first.read_bytes() == second.read_bytes()
    made = onnx.load(first, load_external_data=False)
    onnx.checker.check_model(made, full_check=True)
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in made.graph.initializer)
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)
    known = {v.name for v in (*inferred.graph.value_info, *inferred.graph.output)}
    assert {n.output[0] for n in made.graph.node} <= known
    x = np.linspace(-1, 1, 3 * 50, dtype=np.float32).reshape(3, 2, 5, 5)
    assert_equal(run(made, x), program.run(x, "reference"))


def saved(program, folder):
    program.save(folder / "p.safetensors")
    return folder / "p.safetensors"


def test_equal_bytes_in_another_process(tmp_path):
    path = saved(example(), tmp_path)
    code = f"import intact; intact.export.onnx(intact.load({str(path)!r}), {str(tmp_path / 'o')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    intact.export.onnx(example(), tmp_path / "here")
    assert (tmp_path / "o").read_bytes() == (tmp_path / "here").read_bytes()


def test_traced_models_give_out_every_tensor_in_the_programs_own_codes():
    program = example()
    codes = np.random.default_rng(3).integers(-128, 128, (4, 2, 5, 5)).astype(np.int8)
    expected: dict[str, np.ndarray] = {}
    ReferenceEngine(program)(codes, lambda name, values: expected.update({name: values}))
    for flavour in FLAVOURS:
        made = model(program, flavour=flavour, io="integer", trace=True)
        session = runtime.InferenceSession(
            made.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for op in program.ops:
            got = session.run([f"{op.name}/traced"], {"x": codes})[0]
            assert_equal(got, expected[op.name])


# -- refusals ------------------------------------------------------------------------------------


def test_options_that_do_not_exist_are_named_with_the_choices():
    for option, match in (
        ({"flavour": "qdqq"}, "no flavour 'qdqq'; choose one of qdq, qoperator, integer"),
        ({"io": "int"}, "no io 'int'; choose one of float, integer"),
    ):
        with pytest.raises(ExportError, match=match):
            model(example(), **option)


def test_a_model_beyond_two_gib_is_refused(monkeypatch, tmp_path):
    whole = model(example()).ByteSize()
    for limit in (100, whole - 1):  # reached by the weights, and by the whole
        monkeypatch.setattr(sys.modules["intact.export.onnx"], "MAX_BYTES", limit)
        with pytest.raises(ExportError, match="larger than 2 GiB"):
            intact.export.onnx(example(), tmp_path / "big.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"pip install 'intact\[onnx\]'"):
        model(example())


def test_nothing_is_left_where_a_file_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        intact.export.onnx(example(), tmp_path / "none" / "o.onnx")
    assert not list(tmp_path.iterdir())


def test_importing_the_exporter_loads_neither_onnx_nor_torch():
    code = "import sys, intact.export; print('onnx' in sys.modules or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- the command line ----------------------------------------------------------------------------


def cli(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "intact", "export", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_writes_beside_the_program(tmp_path):
    done = cli(saved(example(), tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "layers: 2 as float operators on integers" in done.stdout
    assert "2 layers could saturate" in done.stdout
    made = onnx.load(tmp_path / "p.onnx")
    assert made == model(example())


def test_the_command_takes_every_option_and_speaks_json(tmp_path):
    out = tmp_path / "q.onnx"
    words = ["--to", "onnx", "--flavour", "qoperator", "--io", "integer"]
    done = cli(saved(example(), tmp_path), "-o", out, *words, "--json")
    facts = json.loads(done.stdout)
    assert facts["bytes"] == out.stat().st_size
    assert facts["forms"] == {"conv1": "qlinear", "fc": "qlinear"}
    assert facts["program"] == example().sha256
    assert facts["saturate_without_vnni"] == ["conv1", "fc"]
    assert onnx.load(out) == model(example(), flavour="qoperator", io="integer")


def test_the_command_fails_with_one_line(tmp_path):
    program = saved(example(), tmp_path)
    before = program.read_bytes()
    for out, message in ((tmp_path, "is a folder"), (program, "is the program. Name another")):
        done = cli(program, "-o", out)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {out} {message}")
        assert done.stderr.count("\n") == 1
    assert program.read_bytes() == before


def test_the_command_makes_the_folder(tmp_path):
    out = tmp_path / "a" / "b" / "o.onnx"
    assert cli(saved(example(), tmp_path), "-o", out).returncode == 0
    assert onnx.load(out) == model(example())


def test_programs_of_unsigned_codes_need_no_raising():
    grid = QParams((1.0,), 0, 0, 255, signed=False)
    program = linear(
        np.ones((2, 3), np.int8), np.array([2**15], np.int32), source=grid, target=grid
    )
    codes = np.arange(60, dtype=np.uint8).reshape(-1, 3)
    made = model(program, flavour="qoperator", io="integer")
    assert_equal(run(made, codes), ReferenceEngine(program)(codes))
    assert [n.op_type for n in made.graph.node] == ["QLinearMatMul"]
    signed = replace(
        program,
        tensors={
            name: replace(t, qparams=QParams((1.0,), -128)) for name, t in program.tensors.items()
        },
    )
    shifted = (codes.astype(int) - 128).astype(np.int8)
    made = model(signed, flavour="qoperator", io="integer")
    assert_equal(run(made, shifted), ReferenceEngine(signed)(shifted))
