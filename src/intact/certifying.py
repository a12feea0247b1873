"""One program on every engine of this machine, compared code by code: makes a `Certificate`.

The reference engine says what is right. Every other engine, in each of its settings, runs the same
codes; every tensor that it shows is compared with `==`. Then each layer runs alone, on codes that
are made to meet the boundaries of rounding and the ends of accumulators (see `adversarial`).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from intact import machine
from intact.adversarial import (
    Accumulating,
    alone,
    boundary_codes,
    entries_of_all_codes,
    extreme_codes,
    products_of_all_codes,
    random_codes,
    structured_codes,
    sums_of_all_codes,
)
from intact.arithmetic import QParams, dequantize, is_power_of_two
from intact.certificate import (
    KINDS,
    Boundary,
    Certificate,
    Count,
    Difference,
    EngineResult,
    FloatResult,
    Inputs,
    Layer,
)
from intact.configurations import (
    Configuration,
    FloatConfiguration,
    Floats,
    compiler,
    configurations,
    float_configurations,
    select,
)
from intact.data import spread
from intact.engines import Arrays, CodesHook, Engine
from intact.engines.reference import ReferenceEngine
from intact.errors import EngineUnavailableError, IntactError, ProgramError
from intact.ops import Add, Linear, Multiply, Op, Subtract, Table
from intact.program import Program
from intact.signature import Values, in_order, unwrapped, wrapped

__all__ = ["SAMPLES", "certify", "stand_ins"]

SAMPLES = 1000
"""Of each kind, if not said otherwise and if the program is small enough."""
FLOAT_SAMPLES = 200
WORK = 2**31
"""Multiply-accumulates of a kind of input: seconds for the reference engine."""
LAYER_WORK = 2**28
"""The same, for a kind of input of one layer."""
LAYER_SAMPLES = 4096
BLOCK_BYTES = 2**27
"""Memory of the codes that are expected; where they do not fit, they come in several blocks."""
SINGLE = 3
"""Samples that are run one at a time too: engines have kernels for a batch of 1."""

Codes: TypeAlias = npt.NDArray[Any]
Progress: TypeAlias = Callable[[str, int, int], object]
"""Called as `progress(what is going on, steps done, steps in all)`."""


def certify(
    program: Program,
    inputs: Values | None = None,
    *,
    samples: int | None = None,
    engines: Sequence[str] | None = None,
    also: Sequence[Configuration] = (),
    description: str = "",
    seed: int = 0,
    date: str = "",
    progress: Progress | None = None,
) -> Certificate:
    """Run a program on every engine of this machine and compare all codes with the reference's.

    inputs       real ones, float32 `[N, *input shape]`, or codes of the input's own type; of
                 several inputs, what `Program.codes` takes; None: random floats take their place,
                 see `stand_ins`, and the certificate says so
    samples      of each kind of input, as far as there are so many; None: 1,000, or less where the
                 program is large, which the certificate then notes
    engines      names, in full ("native avx2") or their first words ("onnxruntime"); None: all
    also         engines of your own to compare, such as a simulator of your hardware
    description  of the inputs, for the certificate
    date         for the certificate; it is not looked up, so that equal runs give equal bytes

    Differences are no error: see `Certificate.ok`. Raises `IntactError` for an unknown engine or
    inputs that the program does not take.
    """
    tell = progress or (lambda *_: None)
    if samples is not None and samples < 1:
        raise IntactError(f"samples is {samples}; compare at least one.")
    tell("looking for engines", 0, 1)
    here, missing = configurations()
    names = select(engines, [*(c.name for c in here), *missing])
    for own in also:
        if not own.name.strip() or own.name in (*(c.name for c in here), *missing):
            raise IntactError(f"an engine of your own cannot be called {own.name!r}: rename it.")
    chosen = [c for c in here if c.name in names] + list(also)
    floats = [c for c in float_configurations() if c.name in names]
    notes: list[str] = []
    kind = "data"
    if inputs is None:
        kind = "stand-in"
        inputs, description = stand_ins(program)
        notes.append(
            f"No real inputs were given. In their place are {description}; --data, or `inputs`, "
            "names real ones."
        )
    rng = np.random.default_rng(seed)
    tell("choosing inputs", 0, 1)
    data = _chosen(program, inputs, _samples(program, samples, notes))
    subjects = _subjects(program, kind, data, _samples(program, samples, []), rng, tell)
    tallies = {c.name: _Tally(program) for c in chosen}
    steps = len(chosen) * len(subjects) + len(floats)
    for i, subject in enumerate(subjects):
        _run(subject, chosen, tallies, lambda what, n, i=i: tell(what, i * len(chosen) + n, steps))  # type: ignore[misc]
    missing |= {name: t.unavailable for name, t in tallies.items() if t.unavailable}
    floats = [c for c in floats if c.name not in missing]
    results: list[FloatResult] = []
    batches = _float_batches(program, kind, inputs, len(data[0]), rng)
    expected = _expected_of_floats(program, batches) if floats else {}
    for i, configuration in enumerate(floats):
        tell(f"floats on {configuration.name}", steps - len(floats) + i, steps)
        results += _run_floats(program, configuration, batches, expected)
    if used := compiler():
        versions = {**machine.versions(), "compiler": used}
    else:
        versions = machine.versions()
    return Certificate(
        program=program.sha256,
        layers=tuple(
            Layer(op.name, type(op).__name__, program.tensors[op.name].shape) for op in program.ops
        ),
        inputs=_described(subjects, description or "inputs that were given"),
        boundaries=tuple(s.boundary for s in subjects if s.boundary is not None),
        engines=tuple(tallies[c.name].result(c.name) for c in chosen if c.name not in missing),
        floats=tuple(results),
        missing={name: why for name, why in missing.items() if name in names or name in tallies},
        notes=tuple(notes),
        machine=machine.describe(),
        versions=versions,
        seed=seed,
        date=date,
    )


def stand_ins(program: Program) -> tuple[Values, str]:
    """Inputs for a program of which no data is at hand, and what they are.

    Normally distributed floats; the range of the input's grid is six standard deviations wide.
    """
    rng = np.random.default_rng(0)
    drawn, ranges = [], []
    for name in program.inputs:
        spec = program.tensors[name]
        ends = dequantize(np.array([spec.qparams.qmin, spec.qparams.qmax]), spec.qparams)
        values = rng.normal(ends.mean(), np.ptp(ends) / 6, (SAMPLES, *spec.shape))
        drawn.append(values.astype(np.float32))
        low, high = ends.tolist()
        ranges.append(f"{low:.4g} to {high:.4g}")
    whose = "the input's range" if len(ranges) == 1 else "the inputs' ranges"
    words = f"random floats, normally distributed over {whose}, {', '.join(ranges)}"
    return unwrapped(drawn), words


# -- what is run ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Subject:
    """A program, and codes of its inputs to run it on by their kind.

    compared  the program's op whose results count, if only one does: of a layer alone
    """

    program: Program
    codes: Mapping[str, Arrays]
    compared: Op | None = None
    boundary: Boundary | None = None

    @property
    def what(self) -> str:
        return f"{self.compared.name} alone" if self.compared else "the program"


def _samples(program: Program, samples: int | None, notes: list[str]) -> int:
    """How many samples there shall be of each kind."""
    if samples is not None:
        return samples
    work = sum(map(program.macs, program.ops))
    affordable = max(1, WORK // max(1, work))
    if affordable < SAMPLES:
        notes.append(
            f"A sample takes {work:,} multiply-accumulates, so there are at most {affordable:,} "
            f"samples of each kind instead of {SAMPLES:,}; ask for more with `samples`."
        )
    return min(SAMPLES, affordable)


def _chosen(program: Program, inputs: Values, samples: int) -> Arrays:
    """At most so many of the inputs, as codes, spread over all of them."""
    codes = program.check_codes(program.input_codes(unwrapped(_spread(program, inputs, samples))))
    if not len(codes[0]):
        raise ProgramError("there is no input to compare: the batch is empty.")
    return codes


def _spread(program: Program, inputs: Values, samples: int) -> Arrays:
    chosen: list[Codes] = []
    for given in in_order(inputs, program.inputs, "program", ProgramError):
        array: Codes = np.asarray(given)
        if not array.ndim:
            raise ProgramError("the input is a single number, not a batch of samples.")
        chosen.append(array if len(array) <= samples else array[spread(len(array), samples)])
    return tuple(chosen)


def _structured(program: Program) -> Arrays:
    """`structured_codes` of all inputs; of those that have fewer, again from the first one on."""
    parts = [structured_codes(program.tensors[name]) for name in program.inputs]
    most = max(map(len, parts))
    return tuple(part[np.arange(most) % len(part)] for part in parts)


def _subjects(
    program: Program,
    kind: str,
    data: Arrays,
    samples: int,
    rng: np.random.Generator,
    tell: Progress,
) -> list[_Subject]:
    sources = [program.tensors[name] for name in program.inputs]
    subjects = [
        _Subject(
            program,
            {
                kind: data,
                "random": tuple(random_codes(source, samples, rng) for source in sources),
                "structured": tuple(part[:samples] for part in _structured(program)),
            },
        )
    ]
    for i, op in enumerate(program.ops):
        tell(f"making inputs of {op.name}", i, len(program.ops))
        if isinstance(op, Multiply):
            made, pairs = products_of_all_codes(program, op)
            subjects.append(_Subject(made, {"products": (pairs,)}, op))
        elif isinstance(op, Add | Subtract):
            made, pairs = sums_of_all_codes(program, op)
            subjects.append(_Subject(made, {"sums": (pairs,)}, op))
        elif isinstance(op, Table):
            entries = {"entries": (entries_of_all_codes(program, op),)}
            subjects.append(_Subject(alone(program, op), entries, op))
        elif isinstance(op, Accumulating):
            most = max(1, min(LAYER_SAMPLES, LAYER_WORK // max(1, program.macs(op))))
            found = boundary_codes(program, op, most, rng)
            counts = (found.wanted, found.hit, found.ties, found.out_of_reach)
            codes = {
                "boundaries": (found.codes,),
                "extremes": (extreme_codes(program, op, most, rng),),
            }
            boundary = Boundary(op.name, len(found.codes), *counts)
            subjects.append(_Subject(alone(program, op), codes, op, boundary))
    return subjects


def _described(subjects: Sequence[_Subject], description: str) -> tuple[Inputs, ...]:
    described = []
    for kind, words in KINDS.items():
        codes = [subject.codes[kind] for subject in subjects if kind in subject.codes]
        if codes:
            digest = hashlib.sha256()
            for part in chain.from_iterable(codes):
                digest.update(np.ascontiguousarray(part).data)
            text = description if kind in ("data", "stand-in") else words
            samples = sum(len(parts[0]) for parts in codes)
            described.append(Inputs(kind, text, samples, digest.hexdigest()))
    return tuple(described)


# -- comparing codes -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Piece:
    """Samples of one kind, from number `start` on, and all codes that they must have."""

    kind: str
    start: int
    codes: Arrays
    expected: dict[str, Codes] = field(default_factory=dict)


class _BrokenEngineError(Exception):
    """An engine did not give what an engine gives: wrong shapes, or too few values."""


class _Tally:
    """What comparing one engine has found so far."""

    def __init__(self, program: Program) -> None:
        self._order = {op.name: i for i, op in enumerate(program.ops)}
        self._linear = {op.name for op in program.ops if isinstance(op, Linear)}
        self._compared: Counter[tuple[str, str]] = Counter()
        self._different: Counter[tuple[str, str]] = Counter()
        self._first: Difference | None = None
        self.failure = ""
        self.unavailable = ""

    def compare(self, piece: _Piece, layer: str, offset: int, got: Codes) -> None:
        """Compare the codes of a layer for the samples from `offset` in the piece on."""
        expected = piece.expected[layer][offset : offset + len(got)]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise _BrokenEngineError(
                f"{layer} came as {got.dtype} {list(got.shape)}, not {expected.dtype} "
                f"{list(expected.shape)}"
            )
        wrong = got != expected
        count = int(np.count_nonzero(wrong))
        self._compared[layer, piece.kind] += wrong.size
        self._different[layer, piece.kind] += count
        if count and (self._first is None or self._key(layer) < self._key(self._first.layer)):
            place = tuple(int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
            sample, *index = place
            self._first = Difference(
                layer=layer,
                kind=piece.kind,
                sample=piece.start + offset + sample,
                channel=index[-1 if layer in self._linear else 0],
                index=tuple(index),
                expected=int(expected[place]),
                got=int(got[place]),
            )

    def _key(self, layer: str) -> int:
        return self._order[layer]

    def result(self, name: str) -> EngineResult:
        counts = [
            Count(layer, kind, self._compared[layer, kind], self._different[layer, kind])
            for layer in self._order
            for kind in KINDS
            if (layer, kind) in self._compared
        ]
        return EngineResult(name, tuple(counts), self._first, self.failure)


def _run(
    subject: _Subject,
    chosen: Sequence[Configuration],
    tallies: Mapping[str, _Tally],
    tell: Callable[[str, int], object],
) -> None:
    """Run a subject on all engines, block by block."""
    for block in _blocks(subject):
        for n, configuration in enumerate(chosen):
            tell(f"{subject.what} on {configuration.name}", n)
            tally = tallies[configuration.name]
            if tally.failure or tally.unavailable:
                continue
            try:
                engine = configuration.make(subject.program)
                for piece in block:
                    _compare(subject, piece, engine, _most(configuration, subject), tally)
            except Exception as error:  # noqa: BLE001 (whatever breaks an engine is a result)
                reason = str(error).strip() or type(error).__name__
                if isinstance(error, EngineUnavailableError) and subject.compared is None:
                    tally.unavailable = reason.rstrip(".")  # of this program, on this machine
                else:
                    tally.failure = f"{subject.what}: {reason}"


def _most(configuration: Configuration, subject: _Subject) -> int | None:
    """Most samples of a kind that an engine is given, or None."""
    if configuration.work is None:
        return None
    work = sum(map(subject.program.macs, subject.program.ops))
    return max(1, configuration.work // max(1, work))


def _blocks(subject: _Subject) -> Iterator[list[_Piece]]:
    """All samples with the codes that they must have, as much as memory holds at a time."""
    program = subject.program
    size = sum(math.prod(tensor.shape) for tensor in program.tensors.values())
    room = most = max(1, BLOCK_BYTES // size)
    reference = ReferenceEngine(program)
    block: list[_Piece] = []
    for kind, codes in subject.codes.items():
        start = 0
        while start < len(codes[0]):
            part = tuple(array[start : start + room] for array in codes)
            block.append(_expected(reference, subject, _Piece(kind, start, part)))
            start, room = start + len(part[0]), room - len(part[0])
            if not room:
                yield block
                block, room = [], most
    if block:
        yield block


def _expected(reference: ReferenceEngine, subject: _Subject, piece: _Piece) -> _Piece:
    parts: dict[str, list[Codes]] = {}
    reference(
        unwrapped(piece.codes),
        lambda name, codes: parts.setdefault(name, []).append(codes.copy()),
    )
    for op in subject.program.ops:
        if subject.compared is None or op.name == subject.compared.name:
            piece.expected[op.name] = np.concatenate(parts[op.name])
    return piece


def _compare(
    subject: _Subject, piece: _Piece, engine: Engine, most: int | None, tally: _Tally
) -> None:
    """Compare what an engine says of a piece: all tensors that it shows, and its plain result.

    The plain result comes from a call of its own, since with a hook an engine may fuse less; and
    from calls with one sample each, for which it may have other kernels.
    """
    n = len(piece.codes[0]) if most is None else min(len(piece.codes[0]), most - piece.start)
    if n <= 0:
        return

    def compare(offset: int, end: int, hook: CodesHook | None = None) -> None:
        results = engine(unwrapped(array[offset:end] for array in piece.codes), hook)
        outputs = subject.program.outputs
        for name, got in zip(outputs, wrapped(results, outputs), strict=True):
            tally.compare(piece, name, offset, got)

    if subject.compared is None:
        shown: Counter[str] = Counter()

        def hook(name: str, got: Codes) -> None:
            if name in piece.expected:
                tally.compare(piece, name, shown[name], got)
                shown[name] += len(got)

        compare(0, n, hook)
        for name, count in shown.items():
            if count != n:
                raise _BrokenEngineError(f"{name} came for {count} samples of {n}")
    compare(0, n)
    for i in range(min(SINGLE, n)):
        compare(i, i + 1)


# -- comparing floats ----------------------------------------------------------------------------


def _float_batches(
    program: Program, kind: str, inputs: Values, samples: int, rng: np.random.Generator
) -> dict[str, Floats]:
    """Floats of every kind of `FLOAT_KINDS`; few, as they are not about the program's integers.

    Where the scale of an input is no power of two, samples of the other kinds that hold a value of
    it next to a tie count as `ties`.
    """
    size = sum(math.prod(tensor.shape) for tensor in program.tensors.values())
    n = min(FLOAT_SAMPLES, samples, max(1, BLOCK_BYTES // 4 // size))
    specs = [program.tensors[name] for name in program.inputs]
    data, steps, ties = [], [], []
    for spec, given in zip(specs, _spread(program, inputs, n), strict=True):
        grid, scale = spec.qparams, np.float32(spec.qparams.scale[0])
        real = dequantize(given, grid) if given.dtype == grid.dtype else given
        data.append(np.asarray(real, np.float32))
        step = rng.uniform(*_beyond(grid), (n, *spec.shape)).astype(np.float32)
        step += np.where(np.abs(step - np.floor(step) - 0.5) < 2**-8, np.float32(0.25), 0)
        steps.append(step.astype(np.float32) * scale)
        halves = rng.integers(*_beyond(grid), (n, *spec.shape)) + np.float32(0.5)
        tie = halves.astype(np.float32) * scale
        aside = rng.integers(-1, 2, tie.shape)
        away = np.where(aside > 0, np.float32(np.inf), np.float32(-np.inf))
        ties.append(np.where(aside == 0, tie, np.nextafter(tie, away)).astype(np.float32))
    batches, near = {}, [tuple(ties)]
    for name, x in ((kind, tuple(data)), ("random", tuple(steps))):
        there = np.zeros(len(x[0]), bool)
        for spec, part in zip(specs, x, strict=True):
            scale = np.float32(spec.qparams.scale[0])
            if not is_power_of_two(float(scale)):
                there |= _near_ties(part, scale)
        near.append(tuple(part[there] for part in x))
        batches[name] = tuple(part[~there] for part in x)
    return {**batches, "ties": tuple(map(np.concatenate, zip(*near, strict=True)))}


def _near_ties(x: npt.NDArray[np.float32], scale: np.float32) -> npt.NDArray[np.bool_]:
    """Which samples hold a value whose quotient by the scale is within two ulps of a tie."""
    quotient = x / scale
    distance = np.abs(np.abs(quotient - np.rint(quotient)) - np.float32(0.5))
    return np.asarray((distance <= 2 * np.spacing(np.abs(quotient))).reshape(len(x), -1).any(1))


def _beyond(grid: QParams) -> tuple[int, int]:
    """The range of `q - zero_point` and a little more, which saturates."""
    return grid.qmin - grid.zero_point - 3, grid.qmax - grid.zero_point + 3


def _expected_of_floats(
    program: Program, batches: Mapping[str, Floats]
) -> dict[str, dict[str, Codes]]:
    """Per kind, the codes of every op."""
    reference, subject = ReferenceEngine(program), _Subject(program, {})
    expected = {}
    for kind, x in batches.items():
        if len(x[0]):
            codes = program.check_codes(program.quantize_input(unwrapped(x)))
            expected[kind] = _expected(reference, subject, _Piece(kind, 0, codes)).expected
    return expected


def _run_floats(
    program: Program,
    configuration: FloatConfiguration,
    batches: Mapping[str, Floats],
    all_expected: Mapping[str, Mapping[str, Codes]],
) -> Iterator[FloatResult]:
    # By a power of two engines divide exactly, however they do it.
    scales = [program.tensors[name].qparams.scale[0] for name in program.inputs]
    exact = all(map(is_power_of_two, scales))
    engine = None
    for kind, expected in all_expected.items():
        x = batches[kind]
        n = len(x[0])
        tolerated = kind == "ties" and configuration.rounds_otherwise and not exact
        compared = different = 0
        wrong, failure = np.zeros(n, bool), ""
        grids = {name: program.tensors[name].qparams for name in program.outputs}
        real = [dequantize(expected[name], grid) for name, grid in grids.items()]
        try:
            engine = engine or configuration.make(program)
            outputs, codes = engine(x)
            pairs: list[tuple[Codes, Codes]] = list(zip(outputs, real, strict=True))
            pairs += [(codes[name], expected[name]) for name in expected]
            for got, right in pairs:
                if got.shape != right.shape or got.dtype != right.dtype:
                    raise _BrokenEngineError(f"a tensor came as {got.dtype} {list(got.shape)}")
                unequal = (got != right).reshape(n, -1)
                compared += unequal.size
                different += int(unequal.sum())
                wrong |= unequal.any(axis=1)
        except Exception as error:  # noqa: BLE001 (whatever breaks an engine is a result)
            failure = str(error).strip() or type(error).__name__
        counts = (n, int(wrong.sum()), compared, different)
        yield FloatResult(configuration.name, kind, *counts, tolerated, failure)
