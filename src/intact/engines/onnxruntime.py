"""The ONNX Runtime engine: the exported file, run by the runtime that most people run it with."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from typing_extensions import assert_never

from intact.engines import Arrays, CodesHook, in_slices
from intact.errors import EngineUnavailableError, ProgramError
from intact.export.onnx import TRACED, Flavour, model, saturates, saturation_probe
from intact.program import Program
from intact.signature import Values

__all__ = [
    "LEVELS",
    "Level",
    "OnnxRuntimeEngine",
    "kernels_saturate",
    "optimization_level",
    "session",
]

Level: TypeAlias = Literal["all", "extended", "basic", "disabled"]
"""How much ONNX Runtime may rewrite the graph."""

LEVELS: tuple[Level, ...] = get_args(Level)

SLICE = 1024
"""Samples at a time, at most."""
SLICE_ELEMENTS = 2**25
"""Elements of the largest tensor of a slice, about: bounds memory."""


class OnnxRuntimeEngine:
    """Runs a program as an ONNX model of integer codes on the CPU."""

    def __init__(
        self,
        program: Program,
        level: Level = "all",
        threads: int | None = None,
        flavour: Flavour | None = None,
    ) -> None:
        """Make the model and the session.

        flavour  None: "qoperator", the fastest one, or "integer" where this CPU's int8 kernels
                 could saturate on the program's weights

        Raises `EngineUnavailableError` where a package is missing, or where such kernels could
        saturate and another flavour than "integer" was asked for.
        """
        _import()
        if level not in LEVELS:
            raise ProgramError(f"there is no level {level!r}; choose one of {', '.join(LEVELS)}.")
        risky = any(saturates(program, op) for op in program.ops) and kernels_saturate()
        flavour = flavour or ("integer" if risky else "qoperator")
        if risky and flavour != "integer":
            raise EngineUnavailableError(
                "the int8 kernels that ONNX Runtime has for this CPU could saturate on the "
                f"program's weights, so its flavour {flavour!r} could be wrong; take 'integer'."
            )
        self.program = program
        self.level = level
        self.flavour = flavour
        self._threads = threads
        self._session = self._load(trace=False)
        self._traced: Any = None
        largest = max(math.prod(tensor.shape) for tensor in program.tensors.values())
        self._slice = max(1, min(SLICE, SLICE_ELEMENTS // largest))

    def _load(self, *, trace: bool) -> Any:
        made = model(self.program, flavour=self.flavour, io="integer", trace=trace)
        return session(made.SerializeToString(), self.level, self._threads)

    def __call__(self, codes: Values, hook: CodesHook | None = None) -> Values:
        """Input codes `[N, *input shape]` to output codes `[N, *output shape]`; see `Engine`.

        hook  called per slice of the batch, with codes from a second model that gives out every
              tensor; ONNX Runtime may fuse less in it. The result is that of the model proper
        """
        return in_slices(self.program, codes, self._slice, lambda part: self._run(part, hook))

    def _run(self, codes: Arrays, hook: CodesHook | None) -> Arrays:
        names = self.program.inputs
        fed = {n: np.ascontiguousarray(array) for n, array in zip(names, codes, strict=True)}
        if hook is not None:
            self._traced = self._traced or self._load(trace=True)
            for name, array in zip(names, codes, strict=True):
                hook(name, array)
            made = [op.name for op in self.program.ops]
            traced = self._traced.run([name + TRACED for name in made], fed)
            for name, values in zip(made, traced, strict=True):
                hook(name, values)
        return tuple(self._session.run(list(self.program.outputs), fed))


def _import() -> Any:
    try:
        import onnx  # noqa: F401  which writes the models
        import onnxruntime
    except ImportError as error:
        raise EngineUnavailableError(
            f"the engine 'onnxruntime' needs the package {error.name}, which is not installed; run "
            "`pip install 'intact[onnx]'`."
        ) from error
    return onnxruntime


def session(data: bytes, level: Level, threads: int | None) -> Any:
    """An inference session of a model, on the CPU."""
    runtime = _import()
    options = runtime.SessionOptions()
    options.graph_optimization_level = optimization_level(runtime, level)
    options.log_severity_level = 3  # errors only: a warning per shape helps nobody
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # old ones lack kernels; its errors have no type in common
        reason = str(error).strip().splitlines()[-1:]
        raise EngineUnavailableError(
            f"ONNX Runtime cannot load the program on this machine: {' '.join(reason)}"
        ) from error


def optimization_level(runtime: Any, level: Level) -> Any:
    """The package's own constant for a level; `runtime` is the package."""
    levels = runtime.GraphOptimizationLevel
    match level:
        case "all":
            return levels.ORT_ENABLE_ALL
        case "extended":
            return levels.ORT_ENABLE_EXTENDED
        case "basic":
            return levels.ORT_ENABLE_BASIC
        case "disabled":
            return levels.ORT_DISABLE_ALL
        case _:
            assert_never(level)


@cache
def kernels_saturate() -> bool:
    """Whether ONNX Runtime's kernels for uint8 times int8 saturate on this CPU: it is asked."""
    _import()
    program, codes, expected = saturation_probe()
    made = model(program, flavour="qoperator", io="integer")
    got = session(made.SerializeToString(), "all", 1).run(None, {program.input: codes})[0]
    return not np.array_equal(got, expected)
