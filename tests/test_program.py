from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intact.arithmetic import INT32_MAX, QParams
from intact.errors import IntactError, ProgramError
from intact.ops import (
    Add,
    Clamp,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Op,
    Permute,
    Reshape,
    accumulates,
)
from intact.program import Program, QTensor
from strategies import Builder, example, input_codes, programs

PROGRAM = example()
GRID = QParams((0.5,))


def rebuilt(program: Program = PROGRAM, **changes) -> Program:
    return replace(program, **changes)


def with_op(index: int, **changes) -> Program:
    ops = list(PROGRAM.ops)
    ops[index] = replace(ops[index], **changes)
    return rebuilt(ops=ops)


def with_tensor(name: str, tensor) -> Program:
    return rebuilt(tensors={**PROGRAM.tensors, name: tensor})


def with_grid(name: str, **changes) -> Program:
    tensor = PROGRAM.tensors[name]
    return with_tensor(name, QTensor(tensor.shape, replace(tensor.qparams, **changes)))


def with_parameter(name: str, array) -> Program:
    return rebuilt(parameters={**PROGRAM.parameters, name: array})


def single(op, shape, out_shape, **parameters) -> Program:
    """A program of one op named "y" on one grid."""
    tensors = {"x": QTensor(shape, GRID), "y": QTensor(out_shape, GRID)}
    named = {f"y.{name}": array for name, array in parameters.items()}
    return Program(("x",), ("y",), (op,), tensors, named)


def pool(shape, out_shape, **geometry) -> Program:
    return single(MaxPool2d("y", ("x",), **geometry), shape, out_shape)


ONE = np.array([1], np.float32)


# -- a value -------------------------------------------------------------------------------------


def test_programs_are_equal_when_their_files_are():
    assert example() == PROGRAM
    assert hash(example()) == hash(PROGRAM)
    assert len({example(), PROGRAM, example(seed=1)}) == 2
    assert PROGRAM != "program"
    assert rebuilt(info={"recipe": "other"}) != PROGRAM
    assert with_grid("x", qmin=-127) != PROGRAM


def test_one_code_of_one_weight_makes_another_program():
    weight = PROGRAM.parameters["fc.weight"].copy()
    weight[2, 3] ^= 1
    assert with_parameter("fc.weight", weight) != PROGRAM


def test_a_program_cannot_be_changed():
    with pytest.raises(AttributeError):
        PROGRAM.output = "conv1"
    with pytest.raises(TypeError):
        PROGRAM.parameters["fc.weight"] = 0
    with pytest.raises(TypeError):
        PROGRAM.tensors["x"] = 0
    with pytest.raises(ValueError, match="read-only"):
        PROGRAM.parameters["fc.weight"][0, 0] = 1


def test_a_program_does_not_follow_the_arrays_it_was_built_from():
    weight = PROGRAM.parameters["fc.weight"].copy()
    program = with_parameter("fc.weight", weight)
    weight[:] = 0
    assert program == PROGRAM


def test_repr_is_a_summary():
    assert repr(PROGRAM) == (
        f"<intact.Program x [2, 5, 5] -> fc [3], 5 ops, {4 * 25 * 18 + 48:,} MACs, "
        f"{72 + 48 + 16 + 16 + 12} bytes>"
    )
    assert "\n" not in repr(PROGRAM)


def test_facts_follow_the_weights():
    conv, *_, linear = PROGRAM.ops
    weight = PROGRAM.parameters["conv1.weight"].astype(object)
    bias = PROGRAM.parameters["conv1.bias"].astype(object)
    exact = [sum(abs(w).flat) * 128 + abs(b) for w, b in zip(weight, bias, strict=True)]
    assert PROGRAM.accumulator_bounds(conv).tolist() == exact
    assert 2 ** (PROGRAM.accumulator_bits(conv) - 1) > max(exact)
    assert 2 ** (PROGRAM.accumulator_bits(conv) - 2) <= max(exact)
    assert PROGRAM.macs(linear) == 48
    assert PROGRAM.macs(PROGRAM.ops[1]) == 0


@given(programs())
@settings(max_examples=60)
def test_drawn_programs_are_valid_and_their_scales_are_their_multipliers(program):
    for op in program.ops:
        if f"{op.name}.weight" not in program.parameters:
            continue
        shift = 24 - program.tensors[op.name].qparams.bits
        stored = program.parameters[f"{op.name}.multiplier"]
        x, y = program.tensors[op.inputs[0]].qparams, program.tensors[op.name].qparams
        scales = program.parameters[f"{op.name}.weight_scale"]
        for m, scale in zip(stored.tolist(), scales.tolist(), strict=True):
            exact = Fraction(m) if stored.dtype == np.float32 else Fraction(m, 2**shift)
            quotient = Fraction(x.scale[0]) * Fraction(scale) / Fraction(y.scale[0])
            assert abs(quotient / exact - 1) < Fraction(1, 2**23)


def test_the_strategy_draws_every_op_and_wide_accumulators():
    seen = set()
    widest = 0

    @given(st.data())
    @settings(max_examples=250, database=None, derandomize=True)
    def collect(data):
        nonlocal widest
        program = data.draw(programs())
        program.check_codes(data.draw(input_codes(program)))
        seen.update(type(op) for op in program.ops)
        widest = max(
            [widest, *(program.accumulator_bits(o) for o in program.ops if accumulates(o))]
        )

    collect()
    assert seen == set(get_args(Op))
    assert widest == 32


# -- running -------------------------------------------------------------------------------------


def test_codes_and_floats_go_in_codes_and_floats_come_out():
    codes = np.arange(-100, 100, dtype=np.int8).reshape(4, 2, 5, 5)
    result = PROGRAM.codes(codes, engine="reference")
    assert result.dtype == np.int8
    assert result.shape == (4, 3)
    real = codes.astype(np.float32) / 128
    assert np.array_equal(PROGRAM.codes(real, engine="reference"), result)
    assert np.array_equal(
        PROGRAM.codes(real.astype(np.float64).tolist(), engine="reference"), result
    )
    assert np.array_equal(PROGRAM.run(real, engine="reference"), result.astype(np.float32) / 8)


def test_an_empty_batch_gives_an_empty_result():
    assert PROGRAM.codes(np.empty((0, 2, 5, 5), np.int8), engine="reference").shape == (0, 3)


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.zeros((1, 2, 5, 4), np.float32), r"\[N, 2, 5, 5\], not \[1, 2, 5, 4\]"),
        (np.zeros((2, 5, 5), np.float32), r"not \[2, 5, 5\]"),
        (np.zeros((1, 2, 5, 4), np.int8), r"int8 of shape \[N, 2, 5, 5\], not int8 \[1, 2, 5, 4\]"),
        (np.float32(0), "takes batches"),
        (np.int8(0), "int8"),
        (np.zeros((1, 2, 5, 5), np.uint8), "uint8. Give float32 values, or codes as int8"),
        (np.zeros((1, 2, 5, 5), np.int64), "the input is int64"),
        (np.zeros((1, 2, 5, 5), bool), "the input is bool"),
        (np.zeros((1, 2, 5, 5), complex), "complex128"),
        ([[1.0], [1.0, 2.0]], "no array"),
        ("text", "the input is str"),
        (None, "the input is object"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, reason):
    with pytest.raises(ProgramError, match=reason):
        PROGRAM.codes(x, engine="reference")


def test_nan_names_the_input_and_the_place():
    x = np.zeros((2, 2, 5, 5), np.float32)
    x[1, 0, 3, 2] = np.nan
    with pytest.raises(IntactError, match=r"'x' holds a NaN at index \(1, 0, 3, 2\)"):
        PROGRAM.run(x)


def test_infinite_and_huge_values_saturate():
    x = np.full((1, 2, 5, 5), 1e300)
    assert (PROGRAM.quantize_input(x) == 127).all()
    assert (PROGRAM.quantize_input(np.float32(-np.inf) * np.ones_like(x)) == -128).all()


def test_codes_outside_of_the_input_range_are_refused():
    program = with_grid("x", qmin=-100, qmax=100)
    with pytest.raises(ProgramError, match=r"-128 to 0, outside .* \[-100, 100\]"):
        program.codes(np.array([0] * 49 + [-128], np.int8).reshape(1, 2, 5, 5))


def test_an_unknown_engine_is_refused_with_the_known_ones():
    with pytest.raises(ProgramError, match="reference"):
        PROGRAM.codes(np.zeros((1, 2, 5, 5), np.int8), engine="fpga")


# -- rules: structure ----------------------------------------------------------------------------


def test_the_graph_is_acyclic_and_in_order():
    with pytest.raises(ProgramError, match="'conv1' reads 'fc', which is not computed before it"):
        with_op(0, inputs=("fc",))
    with pytest.raises(ProgramError, match="cycle"):
        with_op(2, inputs=("add", "add"))
    with pytest.raises(ProgramError, match="out of order"):
        rebuilt(ops=PROGRAM.ops[::-1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ops": ()}, "1 to 10000 ops"),
        ({"ops": PROGRAM.ops * 2001}, "1 to 10000 ops"),
        ({"ops": (*PROGRAM.ops, PROGRAM.ops[0])}, "same name"),
        ({"ops": PROGRAM.ops[:-1]}, "one to one: 'fc'"),
        ({"ops": ("conv",)}, "is no op"),
        ({"inputs": ("fc",)}, "same name"),
        ({"inputs": ("x", "x")}, "same name"),
        ({"inputs": ("z",)}, "one to one: 'x', 'z'"),
        ({"inputs": "x"}, "inputs is 'x', but must be a tuple"),
        ({"inputs": ()}, "one to one: 'x'"),
        (
            {"inputs": ("x", "z"), "tensors": {**PROGRAM.tensors, "z": PROGRAM.tensors["x"]}},
            "the input 'z' is read by no op",
        ),
        ({"outputs": ("x",)}, "computed by no op"),
        ({"outputs": ("fc", "z")}, "the output 'z' is computed by no op"),
        ({"outputs": ("fc", "add", "fc")}, "the output 'fc' is given out twice"),
        ({"outputs": ()}, "at least one input and one output"),
        ({"outputs": ["fc"]}, r"outputs is \['fc'\], but must be a tuple"),
        ({"tensors": {**PROGRAM.tensors, "z": PROGRAM.tensors["x"]}}, "one to one: 'z'"),
        ({"tensors": {**PROGRAM.tensors, "x": GRID}}, "no QTensor"),
        ({"tensors": {**PROGRAM.tensors, "x": QTensor((2, 5, 5), None)}}, "no QParams"),
        ({"info": {"a": 1}}, "text to text"),
        ({"info": {"a": "\x1b[31m"}}, "only line feed and tab"),
        ({"info": {"a": "\ud800"}}, "only line feed and tab"),
        ({"info": {"a": "x" * 2**20}}, "1,048,577 characters"),
    ],
)
def test_a_structure_that_does_not_hold_together_is_refused(changes, reason):
    with pytest.raises(ProgramError, match=reason):
        rebuilt(**changes)


NAMES = ["", "a\nb", "a\0", "\x1b[2J", "x" * 201, "\u202egnp", "\ud800", None, 1, ("x",), ["x"]]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_short_and_printable(name):
    with pytest.raises(ProgramError, match=r"no name of a tensor|is no str"):
        with_op(0, name=name)
    with pytest.raises(ProgramError, match="no name of a tensor"):
        rebuilt(inputs=(name,))
    with pytest.raises(ProgramError, match="no name of a tensor"):
        rebuilt(outputs=(name,))


@pytest.mark.parametrize("name", ["a", "x" * 200, "Schicht 1/größe.conv", "層", "a.weight", "__x"])
def test_any_printable_name_is_legal(name):
    op = Clamp(name, ("x",))
    program = Program(
        ("x",), (name,), (op,), {"x": QTensor((1,), GRID), name: QTensor((1,), GRID)}, {}
    )
    assert program.output == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stride", [1, 1]),
        ("stride", (1,)),
        ("stride", (1, True)),
        ("stride", (1, np.int64(1))),
        ("stride", (1, 10**5000)),
        ("padding", (1, 1)),
        ("padding", (1.0, 1, 1, 1)),
        ("groups", True),
        ("groups", 1.0),
        ("groups", 2**31),
        ("inputs", "x"),
        ("inputs", ["x"]),
        ("inputs", (1,)),
    ],
)
def test_fields_of_ops_have_exactly_their_types(field, value):
    with pytest.raises(ProgramError, match=f"Conv2d 'conv1': {field} is .* which is no "):
        with_op(0, **{field: value})


def test_fields_of_grids_have_exactly_their_types():
    for changes in ({"qmin": -127.0}, {"bits": np.int64(8)}, {"signed": 1}, {"scale": [0.5]}):
        with pytest.raises(ProgramError, match="tensor 'x': "):
            with_grid("x", **changes)
    with pytest.raises(ProgramError, match="activations are per tensor"):
        with_grid("x", axis=0)


@pytest.mark.parametrize(
    "shape",
    [(), (0, 5, 5), (-2, 5, 5), (2, 5, 5.0), [2, 5, 5], (2, True, 5), (2**14, 2**14, 2), (1,) * 9],
)
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ProgramError, match="tensor 'x'"):
        with_tensor("x", QTensor(shape, GRID))


def test_all_tensors_together_are_bounded():
    shape = (2**28,)
    names = ["x", *(f"y{i}" for i in range(8))]
    ops = [Clamp(b, (a,)) for a, b in pairwise(names)]
    with pytest.raises(ProgramError, match="2,415,919,104 elements together"):
        Program(("x",), ("y7",), ops, dict.fromkeys(names, QTensor(shape, GRID)), {})


# -- rules: geometry -----------------------------------------------------------------------------


def test_results_have_the_shape_that_their_op_yields():
    with pytest.raises(ProgramError, match=r"'fc' yields \[3\], not \[4\]"):
        with_tensor("fc", QTensor((4,), PROGRAM.tensors["fc"].qparams))
    with pytest.raises(ProgramError, match=r"'conv1' yields \[4, 3, 3\]"):
        with_op(0, stride=(2, 2))


@pytest.mark.parametrize(
    ("op", "out_shape"),
    [
        (Concat("y", ()), (1, 4, 4)),
        (Concat("y", ("x",), 3), (1, 4, 4)),
        (Concat("y", ("x",), -1), (1, 4, 4)),
        (Add("y", ("x",)), (1, 4, 4)),
        (Add("y", ("x", "x", "x")), (1, 4, 4)),
        (MaxPool2d("y", ("x",), (0, 1)), (1, 4, 4)),
        (MaxPool2d("y", ("x",), stride=(0, 1)), (1, 4, 4)),
        (MaxPool2d("y", ("x",), dilation=(0, 1)), (1, 4, 4)),
        (MaxPool2d("y", ("x",), padding=(-1, 0, 0, 0)), (1, 1, 2)),
        (MaxPool2d("y", ("x",), (5, 5)), (1, 1, 1)),
        (MaxPool2d("y", ("x",), dilation=(2**30, 1)), (1, 1, 2)),
        (Permute("y", ("x",), (0, 1)), (1, 4)),
        (Permute("y", ("x",), (0, 1, 1)), (1, 4, 4)),
        (Permute("y", ("x",), (0, 1, -1)), (1, 4, 4)),
        (Reshape("y", ("x",), (-1,)), (16,)),
        (Reshape("y", ("x",), (-4, -4)), (4, 4)),
        (Reshape("y", ("x",), (17,)), (17,)),
        (Reshape("y", ("x",), (1,) * 9), (16,)),
    ],
)
def test_ops_without_a_meaning_are_refused(op, out_shape):
    with pytest.raises(ProgramError, match="'y'"):
        single(op, (1, 4, 4), out_shape)


@pytest.mark.parametrize("groups", [0, -1, 2, 3, 4])
def test_groups_divide_the_channels(groups):
    with pytest.raises(ProgramError, match="group"):
        with_op(0, groups=groups)


def test_every_window_of_a_max_pool_sees_the_input():
    assert pool((1, 1, 4), (1, 2, 4), kernel=(2, 1), stride=(1, 1), padding=(1, 1, 0, 0))
    with pytest.raises(ProgramError, match="padding"):
        pool((1, 1, 4), (1, 3, 4), kernel=(2, 1), stride=(1, 1), padding=(2, 1, 0, 0))
    # Taps 0 and 3 of a window that begins 2 before a single row: both are padding.
    with pytest.raises(ProgramError, match="lies in the padding altogether"):
        pool(
            (1, 1, 4),
            (1, 2, 4),
            kernel=(2, 1),
            stride=(1, 1),
            padding=(2, 2, 0, 0),
            dilation=(3, 1),
        )
    with pytest.raises(ProgramError, match="lies in the padding altogether"):
        pool(
            (1, 4, 2),
            (1, 4, 5),
            kernel=(1, 2),
            stride=(1, 1),
            padding=(0, 0, 1, 4),
            dilation=(1, 2),
        )


@given(
    size=st.integers(1, 6),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    before=st.integers(0, 6),
    after=st.integers(0, 6),
    dilation=st.integers(2, 4),
)
@settings(max_examples=300)
def test_max_pool_windows_by_brute_force(size, kernel, stride, before, after, dilation):
    reach = dilation * (kernel - 1) + 1
    starts = range(-before, size + after - reach + 1, stride)
    if not starts:
        return
    taps = [[s + dilation * t for t in range(kernel)] for s in starts]
    good = all(any(0 <= position < size for position in window) for window in taps)
    for transposed in (False, True):

        def turn(pair, transposed=transposed):
            return pair[::-1] if transposed else pair

        def build(turn=turn, transposed=transposed):
            pad = (before, after, 0, 0)
            return pool(
                (1, *turn((size, 1))),
                (1, *turn((len(starts), 1))),
                kernel=turn((kernel, 1)),
                stride=turn((stride, 1)),
                padding=pad[2:] + pad[:2] if transposed else pad,
                dilation=turn((dilation, 1)),
            )

        if good:
            build()
        else:
            with pytest.raises(ProgramError, match="padding altogether"):
                build()


def test_what_a_small_file_makes_an_engine_do_is_bounded():
    weight = np.ones((1, 1, 1, 1), np.int8)
    grid = {"weight": weight, "multiplier": ONE, "weight_scale": ONE}
    with pytest.raises(ProgramError, match="at most 65536"):
        single(Conv2d("y", ("x",), (10**9, 1), (10**9, 0, 0, 0)), (1, 1, 1), (1, 2, 1), **grid)
    padding = (2**15, 2**15, 2**15, 2**15)
    with pytest.raises(ProgramError, match="pads its input"):
        single(Conv2d("y", ("x",), (2**16, 2**16), padding), (1, 1, 1), (1, 2, 2), **grid)
    with pytest.raises(ProgramError, match="steps for one sample"):
        pool((1, 2**14, 2**14), (1, 2**13, 2**13), kernel=(2**13 + 1,) * 2, stride=(1, 1))


# -- rules: parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("fc.weight", np.ones((3, 16), np.int16), "fc.weight is int16, not int8"),
        ("fc.weight", np.ones((3, 15), np.int8), "does not fit a weight"),
        ("fc.weight", np.ones((3, 16, 1, 1), np.int8), "does not fit a weight"),
        ("conv1.weight", np.ones((4, 18), np.int8), "4-dimensional weight"),
        ("fc.weight", np.ones((0, 16), np.int8), "empty or misshapen"),
        ("conv1.bias", np.zeros(3, np.int32), r"conv1.bias must have shape \[4\]"),
        ("conv1.bias", np.zeros(4, np.int64), "int64, not int32"),
        ("conv1.bias", np.zeros(4, ">i4"), "not int32"),
        ("pool1.bias", np.zeros(4, np.int32), "no op uses: .*pool1.bias"),
        ("fc.multiplier", np.ones(2, np.int32), "1 or 3 values"),
        ("fc.multiplier", np.ones((3, 1), np.int32), "1 or 3 values"),
        ("fc.multiplier", np.zeros(3, np.int32), r"\[1, 2\*\*24\)"),
        ("fc.multiplier", np.full(3, -1, np.int32), r"\[1, 2\*\*24\)"),
        ("fc.multiplier", np.full(3, 2**24, np.int32), r"\[1, 2\*\*24\)"),
        ("fc.multiplier", np.ones(3, np.int64), "not int32 or float32"),
        ("fc.multiplier", np.ones(3, np.float64), "not int32 or float32"),
        ("fc.multiplier", np.zeros(3, np.float32), "2..-126"),
        ("fc.multiplier", np.full(3, np.nan, np.float32), "2..-126"),
        ("fc.multiplier", np.full(3, np.inf, np.float32), "2..-126"),
        ("fc.multiplier", np.full(3, 1e-40, np.float32), "2..-126"),
        ("fc.multiplier", np.ones(3, np.float32), "contradicts the scales"),
        ("fc.weight_scale", np.zeros(3, np.float32), "2..-126"),
        ("fc.weight_scale", np.full(3, np.nan, np.float32), "2..-126"),
        ("fc.weight_scale", np.full(3, 1e38, np.float32), "2..-126"),
        ("fc.weight_scale", np.ones(3), "float64, not float32"),
        ("fc.weight_scale", np.ones(2, np.float32), "1 or 3 values"),
    ],
)
def test_parameters_that_break_a_rule_are_refused(name, array, reason):
    with pytest.raises(ProgramError, match=reason):
        with_parameter(name, array)


@pytest.mark.parametrize("name", [n for n in PROGRAM.parameters if not n.endswith(".bias")])
def test_missing_parameters_are_named(name):
    parameters = {n: a for n, a in PROGRAM.parameters.items() if n != name}
    with pytest.raises(ProgramError, match=f"missing: .*{name}"):
        rebuilt(parameters=parameters)


def test_multipliers_and_scales_agree_to_a_few_ulp():
    scales = PROGRAM.parameters["fc.weight_scale"]
    with_parameter("fc.weight_scale", np.nextafter(scales, np.float32(1)))
    with pytest.raises(ProgramError, match="contradicts the scales"):
        with_parameter("fc.weight_scale", scales * np.float32(1.0001))


def test_an_accumulator_may_reach_the_end_of_int32_and_not_go_beyond():
    weight = np.full((1, 1000), -128, np.int8)
    room = INT32_MAX - 1000 * 128 * 128

    def build(bias):
        parameters = {"weight": weight, "multiplier": ONE, "weight_scale": ONE}
        return single(
            Linear("y", ("x",)), (1000,), (1,), bias=np.array([bias], np.int32), **parameters
        )

    assert build(room).accumulator_bits(build(room).ops[0]) == 32
    assert build(-room).accumulator_bounds(build(-room).ops[0]) == INT32_MAX
    for bias in (room + 1, -room - 1, -(2**31)):
        with pytest.raises(ProgramError, match="int32 cannot hold"):
            build(bias)


def test_an_average_pool_cannot_overflow_either():
    shape = (1, 2**13, 2**12)
    with pytest.raises(ProgramError, match="4,294,967,296, which int32 cannot hold"):
        single(GlobalAvgPool("y", ("x",)), shape, (1, 1, 1), multiplier=ONE)


# -- rules: grids --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-127, 2.0**-149, 2.0**120])
def test_scales_that_would_vanish_or_overflow_are_refused(scale):
    with pytest.raises(ProgramError, match=r"the scale of tensor 'x' must lie within"):
        with_grid("x", scale=(scale,))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**119])
def test_extreme_scales_that_are_legal_run(scale):
    grid = QParams((scale,), 254, 0, 255, signed=False)
    b = Builder.start((2,), grid)
    b.add(Clamp("y", ("x",)), grid)
    result = b.finish().run(np.array([[0, 255]], np.uint8), engine="reference")
    assert result.tolist() == [[-254 * scale, scale]]


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": (0.25,)},
        {"zero_point": 0},
        {"bits": 7, "qmin": -64, "qmax": 63, "zero_point": -64},
        {"signed": False, "qmin": 0, "zero_point": 0},
    ],
)
def test_ops_without_a_multiplier_keep_the_grid(changes):
    with pytest.raises(ProgramError, match="must share scale and zero point"):
        with_grid("pool1", **changes)


def test_only_clamp_and_add_narrow_the_code_range():
    with pytest.raises(ProgramError, match="'pool1' cannot narrow the code range of 'conv1'"):
        with_grid("pool1", qmin=-127)
    relu = PROGRAM.tensors["add"].qparams
    narrow = QTensor((4, 2, 2), replace(relu, qmax=100))
    flat = QTensor((16,), replace(relu, qmax=100))
    tensors = {**PROGRAM.tensors, "add": narrow, "flatten": flat}
    assert rebuilt(tensors=tensors).tensors["add"].qparams.qmax == 100


def test_programs_can_be_copied():
    assert copy.copy(PROGRAM) == PROGRAM


def test_a_notebook_shows_every_op_and_trusts_no_name():
    program = example()
    page = program._repr_html_()
    for op in program.ops:
        assert f"<td>{op.name}</td>" in page
    hostile = "<script>alert(1)</script>"
    builder = Builder.start((2, 3, 3), QParams((1.0,)))
    builder.add(GlobalAvgPool(hostile, ("x",)), QParams((1.0,)))
    builder.parameters[f"{hostile}.multiplier"] = np.array([7281], np.int32)
    assert "<script>" not in builder.finish()._repr_html_()


def test_a_program_can_be_copied_and_sent_to_other_processes():
    program = example()
    assert copy.deepcopy(program) == program
    assert pickle.loads(pickle.dumps(program)) == program  # noqa: S301
