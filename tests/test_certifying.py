"""The certificate: what is compared, and that whatever breaks an engine is found and named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

import intact
from blocks import BLOCKS
from intact import certifying
from intact.arithmetic import QParams, multiplier_value
from intact.certificate import (
    FLOAT_KINDS,
    KINDS,
    Certificate,
    EngineResult,
    FloatResult,
    certificate_table,
)
from intact.configurations import Configuration, FloatConfiguration, configurations, select
from intact.data import to_input
from intact.engines import onnxruntime, openvino, reference
from intact.engines.reference import ReferenceEngine
from intact.errors import EngineUnavailableError, IntactError, ProgramError, StorageError
from intact.ops import (
    Add,
    AvgPool2d,
    Conv2d,
    Linear,
    MaxPool2d,
    Multiply,
    Reshape,
    Slice,
    Subtract,
    Table,
    accumulates,
)
from intact.program import Program
from intact.recipe import PRESETS
from strategies import Builder, programs
from test_cli import intact_

QUICK = ["torch"]
"""An engine that is made in no time: for what is not about engines."""


def network(seed: int = 0, scale: float = 2.0**-7) -> Program:
    """Convolutions, an addition, pools and a linear layer; weights of all of int8.

    The multipliers of `conv2` are odd, so that of its accumulators few are ties.
    """
    b = Builder.start((3, 9, 9), QParams((float(np.float32(scale)),)), seed)
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return rng.integers(-128, 128, shape).astype(np.int8)

    grid = QParams((0.125,), 0, 0, 255, signed=False)
    bias = rng.integers(-5000, 5000, 6).astype(np.int32)
    b.weighted(Conv2d("conv1", ("x",), padding=(1, 1, 1, 1)), weight(6, 3, 3, 3), grid, bias=bias)
    b.weighted(Conv2d("conv2", ("conv1",), padding=(1, 1, 1, 1)), weight(6, 6, 3, 3), grid)
    b.add(Add("sum", ("conv1", "conv2")), grid)
    b.add(MaxPool2d("pool", ("sum",), (2, 2), (2, 2)), grid)
    b.rescaled(
        AvgPool2d("mean", ("pool",), (2, 2), (2, 2)), QParams((0.25,), 128, 0, 255, signed=False)
    )
    b.add(Reshape("flat", ("mean",), (24,)), b.tensors["mean"].qparams)
    b.weighted(Linear("fc", ("flat",)), weight(5, 24), QParams((0.5,)))
    program = b.finish()
    return with_multiplier(program, "conv2", program.parameters["conv2.multiplier"] | 1)


def with_multiplier(program: Program, layer: str, multiplier: np.ndarray) -> Program:
    """The layer's weight scale follows."""
    (op,) = (op for op in program.ops if op.name == layer)
    source, target = (program.tensors[name].qparams for name in (op.inputs[0], layer))
    real = multiplier_value(multiplier, target.bits).astype(np.float64)
    scale = (real * target.scale[0] / source.scale[0]).astype(np.float32)
    new = {f"{layer}.multiplier": multiplier, f"{layer}.weight_scale": scale}
    return replace(program, parameters={**program.parameters, **new})


PROGRAM = network()


def gated() -> Program:
    """A table per channel, products with a gate per channel, and a difference."""
    b = Builder.start((3, 5, 5), QParams((2.0**-7,)))
    b.parameters["table.table"] = b.rng.integers(-128, 128, (3, 256)).astype(np.int8)
    grid = QParams((0.125,), -128)
    b.add(Table("table", ("x",)), grid)
    b.add(Slice("gate", ("table",), 1, 0, 1), grid)
    b.add(Slice("gates", ("gate",), 2, 0, 1), grid)
    b.parameters["product.multiplier"] = np.array([300], np.int32)  # some products are ties
    b.add(Multiply("product", ("table", "gates")), grid)
    b.add(Subtract("difference", ("product", "table")), replace(grid, qmin=-100))
    return b.finish()


GATED = gated()


def broken(change: Callable[[Program], Program]) -> Configuration:
    """The reference engine on another program than it is given."""
    return Configuration("broken", lambda program: ReferenceEngine(change(program)))


def changed(name: str, step: int, index: int = 0) -> Callable[[Program], Program]:
    """A program with one parameter off, wherever it has that parameter."""

    def change(program: Program) -> Program:
        if name not in program.parameters:
            return program
        values = program.parameters[name].copy()
        values.flat[index] += step if values.flat[index] < 100 else -step
        layer, kind = name.rsplit(".", 1)
        if kind == "multiplier":
            return with_multiplier(program, layer, values)
        return replace(program, parameters={**program.parameters, name: values})

    return change


def certify(program: Program = PROGRAM, **options) -> Certificate:
    real = {"inputs": drawn(program)} if "inputs" not in options else {}
    return intact.certify(program, **{"engines": QUICK, "samples": 40, **real, **options})


def drawn(program: Program) -> np.ndarray:
    """What passes for real inputs here."""
    return certifying.stand_ins(program)[0]


def result(certificate: Certificate, name: str) -> EngineResult:
    (found,) = (engine for engine in certificate.engines if engine.name == name)
    return found


# -- what is compared ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything() -> Certificate:
    """The program on all that this machine has."""
    return intact.certify(PROGRAM, drawn(PROGRAM), samples=40)


def test_every_setting_of_every_engine_here_gives_the_same_codes(everything):
    here, missing = configurations()
    assert [engine.name for engine in everything.engines] == [c.name for c in here]
    assert dict(everything.missing) == missing
    assert everything.ok
    assert everything.different == 0
    assert everything.first is None
    assert everything.reasons() == ()
    assert "all are equal" in everything.sentence()


def test_every_layer_is_compared_on_every_kind_of_input(everything):
    """Where an engine fuses, what it does not store cannot be seen: of that it shows the result."""
    size = {op.name: int(np.prod(PROGRAM.tensors[op.name].shape)) for op in PROGRAM.ops}
    samples = {inputs.kind: inputs.samples for inputs in everything.inputs}
    assert list(samples) == [k for k in KINDS if k not in ("stand-in", "products", "entries")]
    assert samples["data"] == samples["random"] == 40
    assert samples["sums"] == 1
    torch = result(everything, "torch")
    counted = {(c.layer, c.kind): c.compared for c in torch.counts}
    for op in PROGRAM.ops:
        for kind in ("data", "random", "structured"):
            calls = samples[kind]
            if op.name == PROGRAM.output:  # with a hook and without one, and of single samples
                calls = 3 * samples[kind] + 3
            assert counted[op.name, kind] == calls * size[op.name], (op.name, kind)
        assert accumulates(op) == ((op.name, "boundaries") in counted)
        assert accumulates(op) == ((op.name, "extremes") in counted)
        assert isinstance(op, Add) == ((op.name, "sums") in counted)
    assert counted["sum", "sums"] == 2 * 256 * 256  # in a batch of one, and once more as single
    for engine in everything.engines:
        layers = {c.layer for c in engine.counts if c.kind == "random"}
        whole = "unfused" in engine.name or not engine.name.startswith("native")
        assert layers <= set(size)
        if whole:  # but for a reshape, which native code never stores
            assert layers >= set(size) - {"flat"}
        assert {c.layer for c in engine.counts if c.kind == "boundaries"} == {
            op.name for op in PROGRAM.ops if accumulates(op)
        }


def test_products_tables_and_differences_are_asked_for_all_codes():
    counted = {
        (c.layer, c.kind): c.compared for c in result(certify(GATED, samples=10), "torch").counts
    }
    assert {key for key in counted if key[1] in ("boundaries", "extremes")} == set()
    # Once in a batch, and the first samples once more as single ones: each meets 25 codes of one
    # operand with one of the other, in 3 channels.
    samples = -(-256 * -(-256 // 25) // 3)
    assert counted["product", "products"] == (samples + 3) * 75
    assert counted["difference", "sums"] == 2 * 256 * 256
    assert counted["table", "entries"] == (11 + 3) * 75
    alone = ("products", "sums", "entries")
    assert sum(kind in alone for _, kind in counted) == 3


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_known_networks_are_certified(block):
    engines = ["torch", "onnxruntime qoperator all", "openvino qdq", "onnx-evaluator qdq"]
    engines = [name for name in engines if here(name)]
    certificate = intact.certify(BLOCKS[block](2), engines=engines, samples=5)
    assert len(certificate.engines) == len(engines)
    assert certificate.ok, certificate.reasons()


def here(name: str) -> bool:
    """Some CPUs saturate, and have not all flavours."""
    return any(c.name == name for c in configurations()[0])


def test_boundaries_are_found_for_every_layer_that_accumulates(everything):
    assert [b.layer for b in everything.boundaries] == [
        op.name for op in PROGRAM.ops if accumulates(op)
    ]
    for boundary in everything.boundaries:
        assert 0 < boundary.hit <= boundary.wanted
        assert boundary.ties <= boundary.hit
    assert sum(boundary.ties for boundary in everything.boundaries) > 100


def test_engines_that_take_floats_get_floats_of_every_kind(everything):
    engines = dict.fromkeys(r.engine for r in everything.floats)
    assert [(r.engine, r.kind) for r in everything.floats] == [
        (name, kind) for name in engines for kind in FLOAT_KINDS if kind != "stand-in"
    ]
    for each in everything.floats:
        # The scale is a power of two: so nobody may differ, ties or not.
        assert (each.different, each.tolerated, each.failure) == (0, False, "")
        assert each.compared > each.samples > 0


def test_the_hashes_are_those_of_the_codes():
    rng = np.random.default_rng(3)
    codes = rng.integers(-128, 128, (7, 3, 9, 9)).astype(np.int8)
    certificate = certify(inputs=codes)
    (data,) = (inputs for inputs in certificate.inputs if inputs.kind == "data")
    assert (data.samples, data.sha256) == (7, hashlib.sha256(codes.tobytes()).hexdigest())
    assert certificate.program == PROGRAM.sha256
    as_floats = certify(inputs=codes.astype(np.float32) * np.float32(2.0**-7))
    assert as_floats.inputs[0].sha256 == data.sha256


def test_equal_runs_give_equal_certificates_and_other_seeds_other_codes():
    assert certify().to_json() == certify().to_json()
    one, other = certify(), certify(seed=1)
    kinds = {i.kind for i, j in zip(one.inputs, other.inputs, strict=True) if i.sha256 != j.sha256}
    assert kinds >= {"random", "boundaries"}
    assert "structured" not in kinds


def test_samples_are_spread_over_all_that_were_given():
    codes = np.zeros((100, 3, 9, 9), np.int8)
    codes[:, 0, 0, 0] = np.arange(100)
    certificate = certify(inputs=codes, samples=4)
    wanted = codes[[0, 33, 66, 99]]
    assert certificate.inputs[0].sha256 == hashlib.sha256(wanted.tobytes()).hexdigest()


def test_a_large_program_gets_fewer_samples_and_the_certificate_says_so(monkeypatch):
    monkeypatch.setattr(certifying, "WORK", 10 * sum(map(PROGRAM.macs, PROGRAM.ops)))
    certificate = intact.certify(PROGRAM, drawn(PROGRAM), engines=QUICK)
    assert certificate.inputs[0].samples == 10
    (note,) = certificate.notes
    assert "at most 10 samples" in note
    assert not certify().notes


def test_codes_that_do_not_fit_in_memory_come_in_blocks(monkeypatch):
    whole = certify()
    monkeypatch.setattr(certifying, "BLOCK_BYTES", 40_000)
    parts = certify()
    assert parts.inputs == whole.inputs
    assert parts.ok
    once, again = (
        [c for c in result(certificate, "torch").counts if c.kind == "data" and c.layer != "fc"]
        for certificate in (whole, parts)
    )
    assert once == again
    # Of each block the first samples are run one at a time too.
    assert parts.compared > whole.compared
    assert not certify(also=[broken(changed("fc.weight", 1))]).ok


@settings(max_examples=15)
@given(programs())
def test_any_program_can_be_certified(program):
    certificate = intact.certify(program, engines=QUICK, samples=3)
    assert certificate.ok, certificate.reasons()
    assert {c.layer for c in certificate.engines[0].counts} == {op.name for op in program.ops}


def test_where_no_data_is_given_random_floats_take_its_place_under_a_name_of_their_own():
    certificate = intact.certify(PROGRAM, engines=[*QUICK, "onnxruntime"], samples=5)
    first, *others = certificate.inputs
    words = "random floats, normally distributed over the input's range, -1 to 0.9922"
    assert (first.kind, first.description, first.samples) == ("stand-in", words, 5)
    kinds = {i.kind for i in others} | {c.kind for e in certificate.engines for c in e.counts}
    kinds |= {result.kind for result in certificate.floats}
    assert "data" not in kinds
    assert "stand-in" in kinds
    (note,) = certificate.notes
    assert note.startswith(f"No real inputs were given. In their place are {words}; --data")
    assert certificate.ok
    assert Certificate.from_json(certificate.to_json()) == certificate
    x, _ = certifying.stand_ins(PROGRAM)
    assert len(np.unique(PROGRAM.quantize_input(x))) > 200
    codes = PROGRAM.quantize_input(x[[0, 250, 500, 749, 999]])
    assert first.sha256 == hashlib.sha256(codes.tobytes()).hexdigest()


# -- it can fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "parameter", "step"),
    [
        ("conv1", "weight", 1),
        ("conv2", "weight", -1),
        ("fc", "weight", 1),
        ("conv1", "bias", 1),
        ("conv1", "multiplier", 1),
        ("conv2", "multiplier", 1),
        ("fc", "multiplier", -1),
    ],
)
def test_a_parameter_that_is_off_by_one_is_found_and_its_layer_and_channel_named(
    layer, parameter, step
):
    """Boundaries show a bias of 1 too many, which moves one code in hundreds."""
    change = changed(f"{layer}.{parameter}", step)
    certificate = certify(also=[broken(change)])
    assert not certificate.ok
    assert result(certificate, "torch").ok
    found = result(certificate, "broken")
    assert found.first is not None
    assert (found.first.layer, found.first.expected != found.first.got) == (layer, True)
    if PROGRAM.parameters[f"{layer}.{parameter}"].size > 1:
        assert found.first.channel == 0
    assert certificate.first == ("broken", found.first)
    (reason,) = certificate.reasons()
    assert reason.startswith(f"broken: {layer} is the first layer that differs: ")
    assert found.of_layer(layer)[1] > 0


def test_the_place_that_is_named_is_where_the_engine_differs():
    codes = np.random.default_rng(0).integers(-128, 128, (5, 3, 9, 9)).astype(np.int8)
    change = changed("conv1.weight", 9, index=-1)  # of the last channel
    first = result(certify(inputs=codes, also=[broken(change)]), "broken").first
    assert (first.layer, first.kind, first.channel) == ("conv1", "data", 5)
    seen: list[dict[str, np.ndarray]] = [{}, {}]
    for program, tensors in zip((PROGRAM, change(PROGRAM)), seen, strict=True):
        ReferenceEngine(program)(codes, lambda name, c, t=tensors: t.__setitem__(name, c.copy()))
    right, wrong = (tensors["conv1"] for tensors in seen)
    place = (first.sample, *first.index)
    assert (first.expected, first.got) == (right[place], wrong[place])
    flat = int(np.ravel_multi_index(place, right.shape))
    assert np.array_equal(right.reshape(-1)[:flat], wrong.reshape(-1)[:flat])


def rounding(round_: Callable[[np.ndarray], np.ndarray], before: bool = False) -> Configuration:
    """The reference engine with another rounding; `before`: the zero point is added first."""

    def wrong(acc, multiplier, grid, channel_axis=None):
        m = multiplier_value(multiplier, grid.bits).astype(np.float64)
        if channel_axis is not None and m.size > 1:
            m = m.reshape([-1 if a == channel_axis % acc.ndim else 1 for a in range(acc.ndim)])
        zero = grid.zero_point
        scaled = acc * m
        codes = round_(scaled + zero) if before else round_(scaled) + zero
        return np.clip(codes, grid.qmin, grid.qmax).astype(grid.dtype)

    class Engine(ReferenceEngine):
        def __call__(self, codes, hook=None):
            kept, reference.requantize = reference.requantize, wrong
            try:
                return super().__call__(codes, hook)
            finally:
                reference.requantize = kept

    return Configuration("rounding", Engine)


def half_up(x: np.ndarray) -> np.ndarray:
    return np.floor(x + 0.5)


def half_away(x: np.ndarray) -> np.ndarray:
    return np.trunc(x + np.copysign(0.5, x))


def test_rounding_as_the_specification_says_is_found_to_be_right():
    """So what the next test finds is the rounding, not the way in which it is put in."""
    assert certify(also=[rounding(np.rint)]).ok
    assert certify(also=[rounding(np.rint, before=True)]).ok  # as zero points are even


@pytest.mark.parametrize("round_", [half_up, half_away, np.floor, np.ceil, np.trunc])
def test_another_rounding_is_found(round_):
    certificate = certify(also=[rounding(round_)])
    found = result(certificate, "rounding")
    assert not certificate.ok
    assert {c.layer for c in found.counts if c.kind == "boundaries" and c.different} == {
        op.name for op in PROGRAM.ops if accumulates(op)
    }


@pytest.mark.parametrize("round_", [half_up, half_away])
def test_another_rounding_of_products_is_found(round_):
    found = result(certify(GATED, also=[rounding(round_)]), "rounding")
    assert {c.layer for c in found.counts if c.kind == "products" and c.different} == {"product"}


def test_one_entry_of_a_table_that_is_off_is_found_in_its_channel():
    change = changed("table.table", 1, index=2 * 256 + 200)
    found = result(certify(GATED, also=[broken(change)]), "broken")
    differing = {(c.layer, c.kind): c.different for c in found.counts if c.different}
    # Of 11 samples with 25 positions, 256 hold each code once; the last 19 begin again.
    assert differing["table", "entries"] == 1
    assert (found.first.layer, found.first.channel) == ("table", 2)


def test_boundaries_find_a_rounding_that_random_codes_do_not():
    """`conv2` alone, whose accumulators are ties once in 2**16: random codes miss half up."""
    op = next(op for op in PROGRAM.ops if op.name == "conv2")
    found = result(certify(certifying.alone(PROGRAM, op), also=[rounding(half_up)]), "rounding")
    assert found.of_kind("boundaries")[1] > 0
    assert found.of_kind("random")[1] < found.of_kind("random")[0] / 1000


def saturating(limit: int) -> Configuration:
    """The reference engine with accumulators that saturate."""
    original = reference.requantize

    def wrong(acc, *rest, **options):
        return original(np.clip(acc, -limit - 1, limit), *rest, **options)

    class Engine(ReferenceEngine):
        def __call__(self, codes, hook=None):
            reference.requantize = wrong
            try:
                return super().__call__(codes, hook)
            finally:
                reference.requantize = original

    return Configuration("saturating", Engine)


def test_an_accumulator_that_saturates_is_found_where_random_codes_never_reach():
    """The ends of the sums of 49 products are twelve standard deviations away."""
    b = Builder.start((1, 7, 7), QParams((2.0**-7,)))
    signs = np.random.default_rng(0).choice([-127, 127], (1, 1, 7, 7)).astype(np.int8)
    b.weighted(Conv2d("conv", ("x",)), signs, QParams((16.0,)), gain=0.05)
    program = b.finish()
    bound = int(program.accumulator_bounds(program.ops[0]).max())
    assert certify(program, also=[saturating(bound)]).ok
    narrow = result(certify(program, also=[saturating(bound // 2)]), "saturating")
    assert [narrow.of_kind(kind)[1] for kind in ("data", "random")] == [0, 0]
    assert narrow.of_kind("extremes")[1] > 0


def test_an_engine_that_is_wrong_only_for_single_samples_is_found():
    class Engine(ReferenceEngine):
        def __call__(self, codes, hook=None):
            out = super().__call__(codes, hook)
            return out ^ 1 if len(codes) == 1 and hook is None else out

    certificate = certify(also=[Configuration("single", Engine)])
    assert not result(certificate, "single").ok


def test_an_engine_that_is_wrong_only_without_a_hook_is_found():
    class Engine(ReferenceEngine):
        def __call__(self, codes, hook=None):
            out = super().__call__(codes, hook)
            return out if hook else out ^ 1

    assert not certify(also=[Configuration("fused", Engine)]).ok


class Crashes(ReferenceEngine):
    def __call__(self, *_):
        raise RuntimeError("no kernel for this")


class WrongShape(ReferenceEngine):
    def __call__(self, codes, hook=None):
        return super().__call__(codes, hook)[:, :1]


class WrongType(ReferenceEngine):
    def __call__(self, codes, hook=None):
        return super().__call__(codes, hook).astype(np.int64)


class TooFew(ReferenceEngine):
    def __call__(self, codes, hook=None):
        return super().__call__(codes, hook and (lambda name, c: hook(name, c[:-1])))


class Silent(ReferenceEngine):
    def __call__(self, codes, *_):
        return super().__call__(codes)


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (Crashes, "the program: no kernel for this"),
        (WrongShape, "the program: fc came as int8 [40, 1], not int8 [40, 5]"),
        (WrongType, "the program: fc came as int64 [40, 5], not int8 [40, 5]"),
        (TooFew, "the program: conv1 came for 39 samples of 40"),
    ],
)
def test_an_engine_that_fails_or_gives_something_else_is_no_equal_engine(engine, reason):
    certificate = certify(also=[Configuration("odd", engine)])
    odd = result(certificate, "odd")
    assert (odd.ok, odd.failure, certificate.ok) == (False, reason, False)
    assert certificate.reasons() == (f"odd: {reason}",)
    assert "1 run failed" in certificate.sentence()
    assert certificate_table(certificate)[-1][-1] == "failed"


def test_an_engine_that_shows_nothing_is_compared_by_its_result():
    silent = result(certify(also=[Configuration("silent", Silent)]), "silent")
    assert silent.ok
    assert {c.layer for c in silent.counts if c.kind == "data"} == {"fc"}


def test_an_interrupt_ends_it():
    class Interrupted(ReferenceEngine):
        def __call__(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify(also=[Configuration("interrupted", Interrupted)])


# -- floats --------------------------------------------------------------------------------------


def float_engine(quantize: Callable[[Program, np.ndarray], np.ndarray]) -> FloatConfiguration:
    """An engine that is exact but for how it quantizes its input."""

    def make(program: Program):
        def run(inputs):
            tensors: dict[str, np.ndarray] = {}
            codes = quantize(program, inputs[0])
            ReferenceEngine(program)(codes, lambda n, c: tensors.__setitem__(n, c.copy()))
            tensors.pop(program.input)
            return (program.run(codes, "reference"),), tensors

        return run

    return FloatConfiguration("torch", make, rounds_otherwise=True)


def by_inverse(program: Program, x: np.ndarray) -> np.ndarray:
    """Multiplies by the inverse of the scale, which parts from a division next to ties."""
    grid = program.tensors[program.input].qparams
    scaled = np.rint(x * (np.float32(1) / np.float32(grid.scale[0])))
    return np.clip(scaled + grid.zero_point, grid.qmin, grid.qmax).astype(grid.dtype)


def rounds_up(program: Program, x: np.ndarray) -> np.ndarray:
    grid = program.tensors[program.input].qparams
    scaled = np.floor(x / np.float32(grid.scale[0]) + np.float32(0.5))
    return np.clip(scaled + grid.zero_point, grid.qmin, grid.qmax).astype(grid.dtype)


@pytest.mark.parametrize(
    ("scale", "quantize", "tolerated", "ok"),
    [
        (2.0**-7, by_inverse, False, True),
        (2.0**-7, rounds_up, False, False),
        (0.0078, by_inverse, True, True),
        (0.0078, rounds_up, True, True),
    ],
)
def test_only_where_the_scale_is_no_power_of_two_may_floats_next_to_a_tie_differ(
    monkeypatch, scale, quantize, tolerated, ok
):
    monkeypatch.setattr(certifying, "float_configurations", lambda: (float_engine(quantize),))
    certificate = certify(network(scale=scale))
    ties = certificate.floats[-1]
    assert [r.kind for r in certificate.floats] == ["data", "random", "ties"]
    assert ties.tolerated is tolerated
    assert certificate.ok is ok
    assert [r.different for r in certificate.floats[:2]] == [0, 0]
    if tolerated:
        assert ties.different > 0
        assert certificate.tolerated == ties.samples_different
        assert certificate.different == 0
        counted = (*certificate.engines, *certificate.floats[:2])
        assert certificate.compared == sum(run.compared for run in counted)


def test_real_inputs_that_meet_a_tie_are_counted_with_the_ties(monkeypatch):
    monkeypatch.setattr(certifying, "float_configurations", lambda: (float_engine(by_inverse),))
    program = network(scale=0.0078)
    scale = np.float32(program.tensors["x"].qparams.scale[0])
    x = np.random.default_rng(0).uniform(-1, 1, (30, 3, 9, 9)).astype(np.float32)
    x[:10, 0, 4, 4] = (np.arange(10).astype(np.float32) * 12 - 60 + np.float32(0.5)) * scale
    certificate = certify(program, inputs=x)
    data, random, ties = certificate.floats
    assert certificate.ok
    assert data.samples <= 20
    assert data.samples + random.samples + ties.samples == 3 * 30
    exact = certify(inputs=x)
    assert [r.samples for r in exact.floats] == [30, 30, 30]


def test_an_engine_that_is_wrong_for_floats_away_from_ties_is_not_tolerated(monkeypatch):
    def shifted(program: Program, x: np.ndarray) -> np.ndarray:
        return program.quantize_input(x + np.float32(0.004))

    monkeypatch.setattr(certifying, "float_configurations", lambda: (float_engine(shifted),))
    certificate = certify(network(scale=0.0078))
    assert not certificate.ok
    assert certificate.reasons()[0].startswith("torch, floats: ")


# -- what can be asked ---------------------------------------------------------------------------


def test_engines_are_chosen_by_their_first_words():
    names = ["native avx2", "native avx2 unfused", "native portable", "torch"]
    assert select(None, names) == tuple(names)
    assert select(["native avx2"], names) == ("native avx2", "native avx2 unfused")
    assert select(["torch", "native"], names) == tuple(names)
    with pytest.raises(IntactError, match=r"no engine 'nat' here; choose of native, torch\."):
        select(["nat"], names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0; compare at least one"),
        ({"engines": ["tensorflow"]}, "there is no engine 'tensorflow' here"),
        ({"inputs": 3.0}, "a single number, not a batch"),
        ({"inputs": np.zeros((0, 3, 9, 9), np.int8)}, "the batch is empty"),
        ({"also": [Configuration("torch", ReferenceEngine)]}, "cannot be called 'torch'"),
        ({"also": [Configuration("", ReferenceEngine)]}, "cannot be called ''"),
    ],
)
def test_a_wrong_question_is_an_error(options, message):
    with pytest.raises(IntactError, match=message):
        certify(**options)


def test_inputs_that_do_not_fit_are_an_error():
    with pytest.raises(ProgramError):
        certify(inputs=np.zeros((2, 3, 9, 8), np.float32))
    with pytest.raises(IntactError, match="NaN"):
        certify(inputs=np.full((2, 3, 9, 9), np.nan, np.float32))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "openvino"])
def test_an_engine_whose_package_is_missing_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for engine in (onnxruntime, openvino):
        engine.kernels_saturate.cache_clear()  # each remembers what it found
    here, missing = configurations()
    family = {"onnx": "onnx-evaluator"}.get(package, package)
    assert package in missing[family]
    assert not [c for c in here if c.name.split()[0] == family]
    assert any(c.name == "torch" for c in here)


def test_an_engine_that_cannot_run_this_program_is_named_and_not_compared():
    def refuse(program: Program):
        raise EngineUnavailableError("there is no kernel for it.")

    certificate = certify(also=[Configuration("picky", refuse)])
    assert certificate.ok
    assert certificate.missing["picky"] == "there is no kernel for it"
    assert [engine.name for engine in certificate.engines] == ["torch"]


def test_where_only_the_reference_is_left_nothing_is_certified(monkeypatch):
    monkeypatch.setattr(certifying, "configurations", lambda: ((), {"torch": "not installed"}))
    monkeypatch.setattr(certifying, "float_configurations", lambda: ())
    certificate = intact.certify(PROGRAM, samples=3)
    assert not certificate.ok
    assert certificate.sentence() == "No engine was compared with the reference engine."


def test_progress_is_told_and_reaches_its_end():
    told: list[tuple[str, int, int]] = []
    certify(progress=lambda *step: told.append(step))
    assert any("conv1 alone on torch" in what for what, _, _ in told)
    running = [(done, total) for what, done, total in told if " on torch" in what]
    assert all(0 <= done < total for done, total in running)
    assert [done for done, _ in running] == sorted(done for done, _ in running)


# -- as a value ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing() -> Certificate:
    change = changed("conv2.weight", 1)
    return certify(also=[broken(change), Configuration("odd", Crashes)], date="2026-01-01")


@pytest.mark.parametrize("which", ["everything", "failing"])
def test_json_reads_back_to_the_same_certificate(which, request):
    certificate = request.getfixturevalue(which)
    text = certificate.to_json()
    assert Certificate.from_json(text) == certificate
    assert Certificate.from_json(text).to_json() == text
    document = json.loads(text)
    assert document["result"]["ok"] is certificate.ok
    assert list(document)[:2] == ["format", "result"]
    names = {field.name for field in dataclasses.fields(Certificate)}
    assert set(document) == {"format", "result", *names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "has format 2"),
        (lambda d: d["result"].update(ok=True), "is not what follows from the counts"),
        (lambda d: d["engines"][1]["counts"][0].update(compared=1), "not what follows"),
        (lambda d: d["engines"][1]["counts"][0].update(different=-1), "cannot differ"),
        (lambda d: d["engines"][1]["counts"][0].update(layer="conv9"), "is called 'conv9'"),
        (lambda d: d["engines"][1]["first"].update(layer="conv9"), "is called 'conv9'"),
        (lambda d: d["inputs"][0].update(kind="luck"), "is called 'luck'"),
        (lambda d: d.pop("seed"), "lacks 'seed'"),
        (lambda d: d.update(program=3), "certificate.program must be of type str"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(failing, change, message):
    document = json.loads(failing.to_json())
    change(document)
    with pytest.raises(StorageError, match=message):
        Certificate.from_json(json.dumps(document))


def test_what_is_no_json_is_refused():
    with pytest.raises(StorageError, match="Run `intact certify` again"):
        Certificate.from_json("<html>")


def test_the_table_has_a_column_per_engine_and_says_what_differs(everything, failing):
    heading, settings, *kinds, different = certificate_table(everything)
    assert heading == ("", *everything.families())
    assert settings[0] == "settings"
    assert sum(map(int, settings[1:])) == len(everything.engines)
    assert [row[0] for row in kinds] == [inputs.kind for inputs in everything.inputs]
    assert different[0] == "different"
    assert set(different[1:]) == {"0"}
    columns = {column[0]: column for column in zip(*certificate_table(failing), strict=True)}
    assert " of " in columns["broken"][2]
    assert columns["broken"][-1] == f"{result(failing, 'broken').different:,}"
    assert columns["odd"][-1] == "failed"


def test_a_notebook_shows_the_result_and_escapes_names(failing):
    page = failing._repr_html_()
    assert "conv2 is the first layer that differs" in page
    assert "<script>" not in replace(failing, engines=(
        replace(failing.engines[0], name="<script>"),))._repr_html_()  # fmt: skip
    assert failing.sentence() in repr(failing)


def test_a_float_run_that_failed_is_told():
    run = FloatResult("onnxruntime qdq all", "data", 3, 0, 0, 0, False, "out of memory")
    certificate = replace(certify(), floats=(run,))
    assert not certificate.ok
    assert certificate.reasons() == ("onnxruntime qdq all, floats: out of memory",)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `intact lenet` leaves."""
    path = tmp_path_factory.mktemp("certified")
    assert intact_("lenet", "--calibration", 50, "-o", path).code == 0
    return path


def test_the_command_writes_the_certificate_and_draws_it_into_the_report(folder):
    before = (folder / "report.html").read_text("utf-8")
    assert "Not certified yet" in before
    ran = intact_("certify", folder / "program.safetensors", "--engines", "torch", "--samples", 20)
    assert (ran.code, ran.err) == (0, "")
    certificate = Certificate.from_json((folder / "certificate.json").read_text("utf-8"))
    assert certificate.ok
    assert certificate.sentence() in " ".join(ran.out.split())
    page = (folder / "report.html").read_text("utf-8")
    assert "Not certified yet" not in page
    assert certificate.sentence().replace("-", "\N{MINUS SIGN}") in page
    assert all(inputs.sha256[:16] in page for inputs in certificate.inputs)
    assert intact_("report", folder).code == 0
    assert (folder / "report.html").read_text("utf-8") == page


def test_a_certificate_of_another_program_is_not_shown(folder, tmp_path):
    for name in ("results.json", "report.html"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "certificate.json").write_text(certify().to_json(), "utf-8")
    assert intact_("report", tmp_path).code == 0
    assert "Not certified yet" in (tmp_path / "report.html").read_text("utf-8")


def test_the_command_fails_with_1_and_names_the_place(folder, tmp_path, monkeypatch):
    change = changed("fc1.weight", 1)
    monkeypatch.setattr(certifying, "configurations", lambda: ((broken(change),), {}))
    monkeypatch.setattr(certifying, "float_configurations", lambda: ())
    out = tmp_path / "c.json"
    program = folder / "program.safetensors"
    ran = intact_("certify", program, "--samples", 20, "-o", out)
    assert ran.code == 1
    assert "broken: fc1 is the first layer that differs" in " ".join(ran.out.split())
    assert not Certificate.from_json(out.read_text("utf-8")).ok
    as_json = intact_("certify", program, "--samples", 20, "-o", out, "--json")
    assert as_json.code == 1
    assert not Certificate.from_json(as_json.out).ok


def test_inputs_of_ones_own_are_certified(folder, tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    program = folder / "program.safetensors"
    options = ("--engines", "torch", "-o", tmp_path / "c.json")
    assert intact_("certify", program, "--data", tmp_path / "x.npy", *options).code == 0
    data = Certificate.from_json((tmp_path / "c.json").read_text("utf-8")).inputs[0]
    assert (data.samples, data.description) == (4, "x.npy")
    codes = intact.load(program).quantize_input(x)
    assert (data.kind, data.sha256) == ("data", hashlib.sha256(codes.tobytes()).hexdigest())
    assert intact_("certify", program, "--data", "digits", "--samples", 9, *options).code == 0
    data = Certificate.from_json((tmp_path / "c.json").read_text("utf-8")).inputs[0]
    assert (data.samples, data.description) == (9, "digits, test images")
    Image.fromarray(np.full((9, 7, 3), 200, np.uint8)).save(tmp_path / "a.png")
    assert intact_("certify", program, "--data", tmp_path / "a.png", *options).code == 0
    data = Certificate.from_json((tmp_path / "c.json").read_text("utf-8")).inputs[0]
    pixels = to_input(np.full((1, 3, 32, 32), 200, np.uint8))
    codes = intact.load(program).quantize_input(pixels)
    assert data.sha256 == hashlib.sha256(codes.tobytes()).hexdigest()
    plain = intact_("certify", program, "--samples", 2, *options)
    assert plain.out.splitlines()[2].split()[0] == "stand-in"
    assert "note: No real inputs were given. In their place are random floats" in plain.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["-o", "folder"], 1, "folder is a folder. Name a file in it"),
        (["-o", "/dev/null/c.json"], 1, "/dev/null is a file, not a folder"),
        (["--data", "empty.npy"], 1, "empty.npy: there are no samples"),
        (["--data", "x.npy", "--preset", "unit"], 1, "leave --preset out"),
        (["--data-dir", "folder"], 2, "give --data too"),
        (["--crop", "32"], 2, "give --data too"),
        (["--engines", ","], 2, "--engines takes names with commas between them"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(
    folder, tmp_path, monkeypatch, options, code, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    np.save("empty.npy", np.zeros((0, 3, 32, 32), np.float32))
    np.save("x.npy", np.zeros((1, 3, 32, 32), np.float32))
    monkeypatch.setattr(certifying, "configurations", lambda: pytest.fail("it has begun"))
    ran = intact_("certify", folder / "program.safetensors", *options)
    assert (ran.code, ran.out) == (code, "")
    assert message in " ".join(ran.err.replace("│", " ").split())


def test_what_is_not_here_for_the_same_reason_is_told_once(folder, tmp_path, monkeypatch):
    missing = {"native amx": "no compiler", "native portable": "no compiler", "torch": "not here"}
    monkeypatch.setattr(certifying, "configurations", lambda: ((), missing))
    monkeypatch.setattr(certifying, "float_configurations", lambda: ())
    ran = intact_("certify", folder / "program.safetensors", "-o", tmp_path / "c.json")
    assert ran.code == 1
    lines = [line for line in ran.out.splitlines() if line.startswith("not here")]
    assert lines == [
        "not here: native amx, native portable: no compiler",
        "not here: torch: not here",
    ]


# -- at length -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_million_values_of_lenet_and_resnet20_are_equal():
    import torch

    from intact.data import load_dataset, to_input
    from intact.errors import DataError
    from intact.zoo import ResNet20, load_lenet

    try:
        images = to_input(load_dataset("cifar10").test_images)
    except DataError:
        images = to_input(load_dataset("digits").test_images)
    torch.manual_seed(0)
    batch = torch.from_numpy(images[:128])
    resnet = ResNet20().train()
    with torch.no_grad():
        for _ in range(3):
            resnet(batch)  # batch norm gets statistics
    for model in (load_lenet("cifar10", "last"), load_lenet("cifar10", "none"), resnet.eval()):
        for recipe in PRESETS.values():
            program = intact.quantize(model, [batch], recipe)
            certificate = intact.certify(
                program, images, samples=1000 if model is not resnet else 40
            )
            assert certificate.ok, certificate.reasons()
            assert certificate.compared > 10**8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "lacking"),
    [
        ("Haswell", ["amx", "avx512vbmi", "avx512vnni", "avx512"]),
        ("Skylake-Server", ["amx", "avx512vbmi", "avx512vnni"]),
    ],
)
def test_on_a_cpu_without_vnni_all_that_is_exact_there_is_certified(folder, tmp_path, cpu, lacking):
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-x86_64 is not installed")
    out = tmp_path / "c.json"
    command = ["-m", "intact", "certify", folder / "program.safetensors", "--samples", "10"]
    done = subprocess.run(
        [emulator, "-cpu", cpu, sys.executable, "-W", "ignore", *command, "-o", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    certificate = Certificate.from_json(out.read_text("utf-8"))
    assert certificate.ok
    families = certificate.families()
    assert set(families) == {"torch", "native", "onnxruntime", "openvino", "onnx-evaluator"}
    assert all(f"native {isa}" in certificate.missing for isa in lacking)
    # What would be wrong there is not run, and the reason is given.
    assert {run.name.split()[1] for run in families["onnxruntime"]} == {"integer"}
    assert "saturate" in certificate.missing["onnxruntime qoperator"]
    assert "saturate" in certificate.missing["openvino qdq"]


ARM64_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[3])
import numpy as np
import intact
program = intact.load(sys.argv[1])
x = np.random.default_rng(0).uniform(-1, 1, (10, 3, 32, 32)).astype(np.float32)
engines = ["onnxruntime", "openvino", "onnx-evaluator"]
certificate = intact.certify(program, x, samples=10, engines=engines)
open(sys.argv[2], "w").write(certificate.to_json())
"""


@pytest.mark.slow
def test_the_exported_files_are_exact_on_arm64(folder, tmp_path):
    command = os.environ.get("INTACT_ARM64_PYTHON")
    if not command:
        pytest.skip("INTACT_ARM64_PYTHON does not name a Python of ARM64; see CONTRIBUTING.md")
    out = tmp_path / "c.json"
    words = [*shlex.split(command), "-W", "ignore", "-c", ARM64_SCRIPT]
    words += [str(folder / "program.safetensors"), str(out), str(Path(intact.__file__).parents[1])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    certificate = Certificate.from_json(out.read_text("utf-8"))
    assert certificate.ok, certificate.reasons()
    assert "aarch64" in certificate.machine["system"]
    assert {run.name for run in certificate.engines} >= {
        "onnxruntime qdq all", "onnxruntime qoperator all", "onnxruntime integer all",
        "openvino qdq",
    }  # fmt: skip
