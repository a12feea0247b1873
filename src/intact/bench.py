"""How fast a program is on each engine of this machine, beside its float network.

All contenders are timed interleaved, see `timing`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from intact import machine
from intact.adversarial import random_codes
from intact.arithmetic import QParams, accumulator_scale, code_range, dequantize
from intact.engines import ENGINES, Engine, load_engine
from intact.errors import EngineUnavailableError, IntactError
from intact.lower import quantize_function
from intact.network import Network, TensorSpec
from intact.ops import Clamp, Concat, Op, Table, moves_codes, weighted
from intact.pointwise import Pointwise, X
from intact.program import Program, QTensor
from intact.signature import Values, unwrapped, wrapped
from intact.timing import Timing, interleave

__all__ = ["FLOAT", "Bench", "Measured", "bench", "bench_table", "float_twin"]

FLOAT = "float32 torch"
"""The contender that is no engine: the float network in torch."""

LONGEST_CALL = 10.0
"""Seconds; an engine that would take longer for one call is left out of that batch size.

How long is told by the next smaller batch, or by one call with a single sample.
"""

KNOWN: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    F.hardswish,
    F.hardsigmoid,
    F.silu,
    F.sigmoid,
    F.gelu,
    partial(F.gelu, approximate="tanh"),
    F.tanh,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.mish,
    F.softplus,
)
"""Functions that a program's table may be of, for which torch has one fast operation."""

Batch = Values
"""Of all inputs, or of all outputs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender at one batch size.

    name    an engine, with the instruction set in brackets where it has several; or `FLOAT`
    batch   samples of a call
    call    seconds of a call
    """

    name: str
    batch: int
    call: Timing

    @property
    def throughput(self) -> float:
        """Samples per second."""
        return self.batch / self.call.median


@dataclass(frozen=True, slots=True)
class Bench:
    """What `bench` measured.

    codes     whether calls were from codes to codes; else from float32 to float32
    start     contender -> seconds to get it ready, its first call included
    missing   what was not measured -> why
    """

    program: str
    macs: int
    threads: int
    codes: bool
    measured: tuple[Measured, ...]
    start: dict[str, float]
    missing: dict[str, str]
    machine: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As plain values; a measurement has its throughput too."""
        measured = [{**asdict(m), "samples_per_second": m.throughput} for m in self.measured]
        return {**asdict(self), "measured": measured}


def bench(
    program: Program,
    *,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 64),
    threads: int = 1,
    codes: bool = False,
    rounds: int = 25,
    progress: Callable[[str, int, int], object] | None = None,
) -> Bench:
    """Measure a program on engines, and its float network in torch, interleaved.

    engines   names as `load_engine` takes them, all if left out; one that this machine lacks is
              reported as missing
    batches   samples per call
    threads   for engines that can use several
    codes     measure from codes to codes, not from float32 to float32
    progress  called as `progress(what is going on, done, all)`

    Before it is timed, every engine must give the codes that the others give: `IntactError` if not.
    The samples are random codes, the same in every run.
    """
    tell = progress or (lambda *_: None)
    if min(*batches, threads, rounds) < 1:
        raise IntactError("batch sizes, threads and rounds are positive numbers.")
    names = engines or [name for name in ENGINES if name != "auto"]
    start: dict[str, float] = {}
    missing: dict[str, str] = {}
    measured: list[Measured] = []
    with _torch_threads(threads):
        one = _samples(program, 1)
        runners: dict[str, Callable[[Batch], Batch]] = {}
        per_sample: dict[str, float] = {}
        seen: dict[str, Batch] = {}
        for done, name in enumerate(names):
            tell(f"preparing {name}", done, len(names))
            before = time.perf_counter()
            try:
                engine = load_engine(name, program, threads=threads)
                result = engine(one)
            except EngineUnavailableError as error:
                missing[name] = str(error)
                continue
            shown = _shown(name, engine)
            start[shown] = time.perf_counter() - before
            seen[shown] = result
            runners[shown] = engine if codes else _from_floats(program, name, threads)
            per_sample[shown] = _took(engine, one)
        _check_equal(program, seen)
        if not codes:
            tell("preparing the float network", 0, 1)
            before = time.perf_counter()
            runners[FLOAT] = _float_runner(program)
            runners[FLOAT](_floats(program, one))
            start[FLOAT] = time.perf_counter() - before
            per_sample[FLOAT] = _took(runners[FLOAT], _floats(program, one))
        for batch in sorted(set(batches)):
            sample = _samples(program, batch)
            x = sample if codes else _floats(program, sample)
            calls = {}
            for name, run in runners.items():
                expected = per_sample[name] * batch
                if batch > 1 and expected > LONGEST_CALL:
                    missing[f"{name}, batch {batch}"] = f"a call would take about {expected:.0f} s"
                else:
                    calls[name] = _call(run, x)
            text = f"timing batches of {batch}"
            tell(text, 0, rounds)
            # Worker threads of an engine may go on spinning for some milliseconds after a call.
            timings = interleave(
                calls,
                rounds=rounds,
                pause=0.005 if threads > 1 else 0.0,
                progress=lambda done, rounds, text=text: tell(text, done, rounds),  # type: ignore[misc]
            )
            for name, timing in timings.items():
                measured.append(Measured(name, batch, timing))
                per_sample[name] = timing.median / batch
    return Bench(
        program=program.sha256,
        macs=sum(map(program.macs, program.ops)),
        threads=threads,
        codes=codes,
        measured=tuple(measured),
        start=start,
        missing=missing,
        machine={**machine.describe(), **machine.versions()},
    )


def float_twin(program: Program) -> Network:
    """The float network of a program: its ops and shapes, weights and biases as real values.

    Its speed is that of the network that the program was made from, which is not in the file. The
    end of a code range that was narrowed, as a fused ReLU does, becomes a clamp. A table that is,
    entry by entry, that of one of torch's activations becomes this activation. Any other becomes a
    look-up in real values, which may take more or less time than the function did.
    """
    parameters: dict[str, torch.Tensor] = {}
    for op in program.ops:
        if not weighted(op):
            continue
        weight = program.parameters[f"{op.name}.weight"]
        scale = program.parameters[f"{op.name}.weight_scale"]
        grid = QParams(tuple(map(float, scale)), 0, axis=0 if len(scale) > 1 else None)
        parameters[f"{op.name}.weight"] = torch.from_numpy(dequantize(weight, grid))
        bias = program.parameters.get(f"{op.name}.bias")
        if bias is not None:
            unit = accumulator_scale(program.tensors[op.inputs[0]].qparams.scale[0], scale)
            parameters[f"{op.name}.bias"] = torch.from_numpy((bias * unit).astype(np.float32))
    tensors = {name: TensorSpec(program.tensors[name].shape) for name in program.inputs}
    for op in program.ops:
        tensor = program.tensors[op.name]
        tensors[op.name] = _float_spec(tensor) if _clamps(op) else TensorSpec(tensor.shape)
    functions = {op.name: _function(program, op) for op in program.ops if isinstance(op, Table)}
    return Network(
        program.inputs, program.outputs, program.ops, tensors, parameters, functions=functions
    )


def _clamps(op: Op) -> bool:
    """Whether an op may have a clamp of its own: the others have the range of what they read."""
    return isinstance(op, Clamp) or not (moves_codes(op) or isinstance(op, Concat | Table))


def _function(program: Program, op: Table) -> Pointwise:
    source, result = program.tensors[op.inputs[0]], program.tensors[op.name]
    table = program.parameters[f"{op.name}.table"]
    for known in KNOWN:
        function = Pointwise(known, (X,))
        made = quantize_function(function, source.qparams, result.qparams, result.shape)
        if np.array_equal(made, table):
            return function
    grid = source.qparams
    lowest = code_range(grid.bits, grid.signed)[0] - grid.zero_point
    entries = torch.from_numpy(dequantize(table, result.qparams))
    look_up = partial(_look_up, entries=entries, scale=grid.scale[0], lowest=lowest)
    return Pointwise(look_up, (X,))


def _look_up(x: torch.Tensor, entries: torch.Tensor, scale: float, lowest: int) -> torch.Tensor:
    """`[N, C, ...]` to the nearest entries `[1 or C, n]`; the first stands at `lowest * scale`."""
    index = (x / scale).round_().sub_(lowest).clamp_(0, entries.shape[1] - 1).to(torch.int64)
    if len(entries) == 1:
        return entries[0][index]
    return entries[torch.arange(len(entries)).reshape(-1, *[1] * (x.ndim - 2)), index]


def _float_spec(tensor: QTensor) -> TensorSpec:
    grid = tensor.qparams
    lowest, highest = code_range(grid.bits, grid.signed)
    low, high = (float(v) for v in dequantize(np.array([grid.qmin, grid.qmax]), grid))
    return TensorSpec(
        tensor.shape,
        # A range that begins at its zero point is a ReLU's, whether it was narrowed for it or not.
        low if grid.qmin > lowest or grid.qmin == grid.zero_point else -math.inf,
        high if grid.qmax < highest else math.inf,
    )


def _shown(name: str, engine: Engine) -> str:
    isa = getattr(engine, "isa", None)
    return f"{name} ({isa})" if isa else name


def _samples(program: Program, batch: int) -> Batch:
    """Random input codes, the same for every batch of this size."""
    rng = np.random.default_rng(batch)
    return unwrapped(random_codes(program.tensors[name], batch, rng) for name in program.inputs)


def _floats(program: Program, codes: Batch) -> Batch:
    arrays = zip(program.inputs, program.check_codes(codes), strict=True)
    return unwrapped(dequantize(array, program.tensors[name].qparams) for name, array in arrays)


def _from_floats(program: Program, engine: str, threads: int) -> Callable[[Batch], Batch]:
    return lambda x: program.run(x, engine=engine, threads=threads)


def _float_runner(program: Program) -> Callable[[Batch], Batch]:
    network = float_twin(program)

    def run(x: Batch) -> Batch:
        arrays = wrapped(x, network.inputs)
        with torch.inference_mode():
            results = network(unwrapped(map(torch.from_numpy, arrays)))
        return unwrapped(tensor.numpy() for tensor in wrapped(results, network.outputs))

    return run


def _took(run: Callable[[Batch], Batch], x: Batch) -> float:
    before = time.perf_counter()
    run(x)
    return time.perf_counter() - before


def _call(run: Callable[[Batch], Batch], x: Batch) -> Callable[[], Batch]:
    return lambda: run(x)


def _check_equal(program: Program, codes: dict[str, Batch]) -> None:
    first = next(iter(codes), "")
    for name, result in codes.items():
        pairs = zip(
            *(wrapped(each, program.outputs) for each in (result, codes[first])), strict=True
        )
        if not all(np.array_equal(one, other) for one, other in pairs):
            raise IntactError(
                f"the engines {first} and {name} give different codes, so their speeds cannot be "
                "compared. `intact certify` shows where they part."
            )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- showing -------------------------------------------------------------------------------------


def bench_table(result: Bench) -> list[tuple[str, ...]]:
    """The measurements as rows of text, the heading first.

    Per contender: seconds to get ready, and per batch size the median time of a call, the
    interquartile range in percent of it and, for more than one sample, samples per second; "" for
    what was not measured. The fastest engine of the largest batch comes first.
    """
    batches = sorted({m.batch for m in result.measured})
    found = {(m.name, m.batch): m for m in result.measured}
    heading = ["engine", "ready in"]
    for batch in batches:
        heading += [f"batch {batch}", "IQR", *(["per second"] if batch > 1 else [])]
    rows = []
    for name in sorted(result.start, key=lambda name: _slowness(found, name, batches)):
        row = [name, seconds(result.start[name])]
        for batch in batches:
            m = found.get((name, batch))
            row += _cells(m) if m else [""] * (2 if batch == 1 else 3)
        rows.append(tuple(row))
    return [tuple(heading), *rows]


def _cells(m: Measured) -> list[str]:
    spread = f"{100 * m.call.spread:.0f} %"
    return [seconds(m.call.median), spread, *([f"{m.throughput:,.0f}"] if m.batch > 1 else [])]


def _slowness(
    found: dict[tuple[str, int], Measured], name: str, batches: Sequence[int]
) -> list[float]:
    times = [found[name, b].call.median if (name, b) in found else math.inf for b in batches]
    return times[::-1]


def seconds(value: float) -> str:
    """A duration with three digits and a unit: `2.46 µs`; whole units from 1,000 on."""
    unit, size = next((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 0.0)) if value >= s)
    scaled = value / (size or 1e-6)
    whole = len(str(int(scaled)))
    return f"{scaled:,.{max(0, 3 - whole)}f} {unit}"
