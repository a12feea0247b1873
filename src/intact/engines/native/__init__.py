"""The native engine: a program as C, compiled on this machine, run from a cache.

`plan` decides what is computed in what order, `emit` writes it as C, `build` compiles it, `cache`
keeps the result, `runtime` loads it and runs batches on threads.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache as cached
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from intact.engines import (
    MAX_THREADS,
    Arrays,
    CodesHook,
    Engine,
    check_threads,
    in_slices,
    load_engine,
)
from intact.engines.native import build
from intact.engines.native.build import NO_COMPILER, CompileError, Compiler, find_compiler
from intact.engines.native.cache import Cache, key_of, open_cache, temporary_cache
from intact.engines.native.cpu import ISAS
from intact.engines.native.emit import emitters, generate
from intact.engines.native.plan import TooLargeError
from intact.engines.native.runtime import (
    Loaded,
    Runtime,
    load_runtime,
    pack,
    source_text,
    unpack,
)
from intact.errors import EngineUnavailableError, EngineWarning, ProgramError
from intact.program import Program, QTensor
from intact.signature import Values, unwrapped, wrapped

__all__ = ["NativeEngine", "isas"]

Array = npt.NDArray[Any]
T = TypeVar("T")

SEAL_MACS = 2**26
"""About the multiply-accumulates of the reference engine's part of a first check: 0.1 s."""
SEAL_SAMPLES = 16
TRACE_BYTES = 2**26
"""Memory of the traced tensors of a slice of the batch, about."""
PROBE_SECONDS = 20


class NativeEngine:
    """Runs a program as machine code, compiled for this CPU, with the bits of the reference.

    isa      an instruction set of `isas()`, or "auto": the best one here
    threads  most threads that share a batch; None: one for each CPU that this process may use
    fuse     False: every tensor of the program is made, so that a hook sees them all, but of views:
             reshapes, permutations, slices and upsampled tensors

    A build is compared with the reference engine before its first use and refused if one bit
    differs. Raises `EngineUnavailableError` where there is no compiler, or the CPU, the operating
    system or the compiler lacks the instruction set.
    """

    def __init__(
        self, program: Program, isa: str = "auto", threads: int | None = None, fuse: bool = True
    ) -> None:
        if isa != "auto" and isa not in ISAS:
            raise ProgramError(
                f"there is no instruction set {isa!r}; choose auto or one of {', '.join(ISAS)}."
            )
        self.program = program
        self.threads = _threads(threads)
        tools = _Tools()
        if isa != "auto":
            self._load(tools, isa, fuse)
            return
        for name in ISAS:
            if tools.problem(name) is None:
                try:
                    self._load(tools, name, fuse)
                except EngineUnavailableError as error:
                    if name == "portable" or isinstance(error, TooLargeError):
                        raise
                    warnings.warn(f"not compiled for {name}: {error}", EngineWarning, stacklevel=2)
                else:
                    return

    def __call__(self, codes: Values, hook: CodesHook | None = None) -> Values:
        """Input codes `[N, *input shape]` to output codes `[N, *output shape]`; see `Engine`.

        hook  called per slice of the batch for the inputs, the outputs, and the tensors between
              that the engine stores: all of them with `fuse=False`
        """
        if hook is None:
            # C checks a batch in less time than Python would pass it on; floats are no codes.
            if isinstance(codes, np.ndarray) and codes.dtype == self._dtype:
                quick = self.try_codes(codes)
                if quick is not None:
                    return quick
            return in_slices(self.program, codes, sys.maxsize, self._codes)
        traced = sum(math.prod(self.program.tensors[name].shape) for name in self.traced)
        step = max(1, TRACE_BYTES // max(1, traced))
        return in_slices(self.program, codes, step, lambda part: self._trace(part, hook))

    def run(self, x: npt.ArrayLike) -> Values:
        """Float32 `[N, *input shape]`, or input codes, to float32 `[N, *output shape]`.

        What `Program.run` computes, in one call of C where there are one input and one output.
        """
        result = self.try_run(x)
        if result is None:
            result = self.program.dequantize_output(self(self.program.input_codes(x)))
        return result

    def _try_unpacked(self, x: object) -> Values | None:
        """The quick way to the codes of several outputs, of one input."""
        packed = self._loaded.codes(x)
        return None if packed is None else unpack(packed, self._outputs)

    def _codes(self, codes: Arrays) -> Arrays:
        return unpack(_taken(self._loaded.codes(pack(codes))), self._outputs)

    def _trace(self, codes: Arrays, hook: CodesHook) -> Arrays:
        packed, traced = _taken(self._loaded.trace(pack(codes)))
        outputs = unpack(packed, self._outputs)
        for name, array in zip(self.program.inputs, codes, strict=True):
            hook(name, array)
        specs = [self.program.tensors[name] for name in self.traced]
        ends = np.cumsum([math.prod(spec.shape) for spec in specs])
        parts = np.split(traced, ends[:-1], axis=1)
        for name, spec, part in zip(self.traced, specs, parts, strict=True):
            if name not in self.program.inputs:
                values = np.ascontiguousarray(part).view(spec.qparams.dtype)
                hook(name, values.reshape(len(traced), *spec.shape))
        for name, array in zip(self.program.outputs, outputs, strict=True):
            if name not in self.traced:
                hook(name, array)
        return outputs

    def _load(self, tools: _Tools, isa: str, fuse: bool) -> None:
        """Take the checked build from the cache, or make it."""
        if problem := tools.problem(isa):
            raise EngineUnavailableError(f"the instruction set {isa!r} cannot be used: {problem}.")
        cache, compiler = tools.cache, tools.compiler
        record = key_of(
            "program",
            self.program.sha256,
            isa,
            fuse,
            _generator(),
            tools.runtime.cpu(),
            sys.platform,
        )
        known = cache.fact(record)
        if known and compiler and known["compiler"] != compiler.identity:
            known = None
        path = cache.find(known["library"]) if known else None
        if known and path:
            self._open(tools, path, isa, tuple(known["traced"]))
            return
        if compiler is None:
            raise EngineUnavailableError(NO_COMPILER)
        generated = generate(self.program, isa, fuse=fuse)
        flags = compiler.flags(isa)
        try:
            path = build.library(cache, compiler, generated.source, flags)
        except CompileError as error:
            raise EngineUnavailableError(str(error)) from error
        self._open(tools, path, isa, generated.traced)
        _seal(self, generated.block)
        cache.remember(
            record,
            {
                "library": build.library_key(compiler, generated.source, flags),
                "compiler": compiler.identity,
                "traced": generated.traced,
            },
        )

    def _open(self, tools: _Tools, path: Path, isa: str, traced: tuple[str, ...]) -> None:
        try:
            self._loaded: Loaded = tools.runtime.load(path, self.program, self.threads)
        except OSError as error:
            raise EngineUnavailableError(
                f"the compiled program cannot be loaded: {error}"
            ) from error
        self.isa = isa
        self.traced = traced
        self.artefact_bytes = path.stat().st_size
        self.arena_bytes = self._loaded.arena_bytes
        self._dtype = self.program.tensors[self.program.inputs[0]].qparams.dtype
        self._outputs = [self.program.tensors[name] for name in self.program.outputs]
        self.try_codes: Callable[[object], Values | None] = self._loaded.codes
        self.try_run: Callable[[object], Values | None] = self._loaded.run
        if len(self.program.outputs) > 1:
            self.try_codes, self.try_run = self._try_unpacked, _never
        if len(self.program.inputs) > 1:
            self.try_codes = self.try_run = _never


def _never(x: object) -> None:
    """The quick way for a batch that must be packed or dequantized here."""
    del x


class _Tools:
    """What engines are made with: a cache, a compiler if there is one, and the runtime."""

    def __init__(self) -> None:
        if sys.platform == "win32":
            raise EngineUnavailableError(
                "the native engine runs on Linux and macOS, also under WSL; not on Windows itself."
            )
        self.cache: Cache = open_cache()
        self.compiler: Compiler | None = find_compiler(self.cache)
        try:
            self.runtime: Runtime = self._runtime()
        except (OSError, ImportError) as error:  # a file system that lets nothing run, for one
            warnings.warn(
                f"compiled code in {self.cache.folder} cannot be loaded: {error}. Each process "
                "compiles what it runs.",
                EngineWarning,
                stacklevel=2,
            )
            self.cache = temporary_cache()
            try:
                self.runtime = self._runtime()
            except (OSError, ImportError) as failure:
                raise EngineUnavailableError(
                    f"compiled code cannot be loaded on this machine: {failure}"
                ) from failure

    def _runtime(self) -> Runtime:
        try:
            return load_runtime(self.cache, self.compiler)
        except CompileError as error:
            raise EngineUnavailableError(str(error)) from error

    def problem(self, isa: str) -> str | None:
        """Why an instruction set cannot be used here, or None."""
        if isa not in emitters():
            return "there are no kernels for it"
        if missing := ISAS[isa].missing(frozenset(self.runtime.features().split())):
            return missing
        if self.compiler and not build.understands(self.cache, self.compiler, isa):
            return f"{self.compiler.name} does not know it"
        return self._amx_problem() if isa == "amx" else None

    def _amx_problem(self) -> str | None:
        """AMX is switched on by the operating system for each process that asks.

        Some virtual machines offer it and then stop the process that uses it. So a process made
        for that tries it first, once per machine.
        """
        if self.runtime.request_amx():
            return "the operating system does not allow it"
        key = key_of("amx", self.runtime.cpu(), platform.release(), source_text())
        fact = self.cache.fact(key)
        if fact is None:
            if self.compiler is None:
                return "it was not tried while there was a compiler"
            fact = {"works": _amx_works(self.cache, self.compiler)}
            self.cache.remember(key, fact)
        return None if fact["works"] else "it does not compute what it should"


def _amx_works(cache: Cache, compiler: Compiler) -> bool:
    """Whether a process that multiplies with AMX ends well, with the right products."""
    with cache.work_folder() as work:
        probe = work / "probe"
        flags = [*compiler.flags("amx"), "-DINTACT_PROBE_AMX"]
        try:
            build.compile_c(cache, compiler, source_text(), flags, probe)
            done = subprocess.run([str(probe)], check=False, timeout=PROBE_SECONDS)  # noqa: S603
        except (OSError, subprocess.TimeoutExpired, CompileError):
            return False
        return done.returncode == 0


def isas() -> dict[str, str | None]:
    """All instruction sets, best first: None where one can be used here, else the reason."""
    try:
        tools = _Tools()
    except EngineUnavailableError as error:
        return dict.fromkeys(ISAS, str(error))
    if tools.compiler is None:
        return dict.fromkeys(ISAS, NO_COMPILER)
    return {isa: tools.problem(isa) for isa in ISAS}


def _seal(engine: NativeEngine, block: int) -> None:
    """Raise `EngineUnavailableError` unless a new build gives the bits of the reference engine.

    Compared are random codes and codes at the ends of the range, alone, together, and as a batch of
    more than one block.
    """
    program = engine.program
    work = sum(map(program.macs, program.ops))
    n = max(1, min(SEAL_SAMPLES, SEAL_MACS // max(1, work)))
    rng = np.random.default_rng(0)
    codes = [_trial_codes(program.tensors[name], n, rng) for name in program.inputs]

    def run(engine: Engine, samples: npt.NDArray[np.int64]) -> Array:
        result = engine(unwrapped(array[samples] for array in codes))
        return pack(wrapped(result, program.outputs))

    expected = run(load_engine("reference", program), np.arange(n))
    several = np.arange(block + 1) % n
    alone = np.concatenate([run(engine, one) for one in np.arange(n)[:, None]])
    wrong = np.count_nonzero(alone != expected)
    wrong += np.count_nonzero(run(engine, several) != expected[several])
    if wrong:
        raise EngineUnavailableError(
            f"the build for {engine.isa} is not exact: {wrong:,} of "
            f"{expected.size + several.size * expected[0].size:,} codes differ from the reference "
            "engine's. It is not used; please report it, with the program."
        )


def _trial_codes(spec: QTensor, n: int, rng: np.random.Generator) -> Array:
    """Samples of an input: random codes, and in every other one the ends of the range alone."""
    low, high = spec.qparams.qmin, spec.qparams.qmax
    codes = rng.integers(low, high + 1, (n, *spec.shape))
    codes[1::2] = rng.choice([low, high], codes[1::2].shape)
    return np.asarray(codes.astype(spec.qparams.dtype))


def _taken(result: T | None) -> T:
    """A result of the runtime for codes that were checked, which it takes."""
    if result is None:
        raise RuntimeError("the runtime refused codes that were checked.")
    return result


@cached
def _generator() -> str:
    """A key of the code that generates C: what an older version made is made anew."""
    here = Path(__file__).parent
    above = (here.parent.parent / f"{name}.py" for name in ("arithmetic", "ops", "program"))
    return key_of(*(path.read_bytes() for path in (*sorted(here.glob("*.py")), *above)))


def _threads(threads: int | None) -> int:
    if threads is None:
        if hasattr(os, "sched_getaffinity"):
            return min(MAX_THREADS, len(os.sched_getaffinity(0)))
        return min(MAX_THREADS, os.cpu_count() or 1)
    check_threads(threads)
    return threads
