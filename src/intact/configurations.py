"""Every way in which this machine can run a program: engines, with each of their settings.

An engine that is exact in one setting may not be in another: an optimizer fuses what another level
leaves alone, and each instruction set has kernels of its own. So each setting counts as one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from intact.engines import Arrays, CodesHook, Engine, in_slices
from intact.errors import EngineUnavailableError, IntactError
from intact.export.onnx import FLAVOURS, TRACED, Flavour, model
from intact.program import Program
from intact.signature import Values

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "Configuration",
    "FloatConfiguration",
    "Floats",
    "compiler",
    "configurations",
    "evaluator",
    "float_configurations",
    "select",
]

SATURATES = "the int8 kernels that it has for this CPU saturate"

EVALUATOR_WORK = 2**25
"""Multiply-accumulates that the reference evaluator of `onnx` does in seconds."""

Codes: TypeAlias = npt.NDArray[Any]
Float32: TypeAlias = npt.NDArray[np.float32]
Floats: TypeAlias = tuple[Float32, ...]
FloatEngine: TypeAlias = Callable[[Floats], tuple[Floats, dict[str, Codes]]]
"""From float32 `[N, *input shape]` of every input to all outputs, both in the program's order, and
to every op's codes by its name."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """An engine in one of its settings.

    name  the engine first: "native avx2 unfused"
    make  makes it for a program
    work  multiply-accumulates that it may be given at a time; None: as many as there are
    """

    name: str
    make: Callable[[Program], Engine]
    work: int | None = None


@dataclass(frozen=True, slots=True)
class FloatConfiguration:
    """An engine that takes float32 and quantizes its input itself.

    rounds_otherwise  whether it is known to round inputs within an ulp of a tie in another way
                      (arithmetic.md, section 1)
    """

    name: str
    make: Callable[[Program], FloatEngine]
    rounds_otherwise: bool = False


Missing: TypeAlias = dict[str, str]
"""Name of what cannot run here -> why."""


def configurations() -> tuple[tuple[Configuration, ...], Missing]:
    """All that can run here beside the reference engine, and what cannot."""
    found: list[Configuration] = []
    missing: Missing = {}
    for part in (_torch, _native, _onnxruntime, _openvino, _evaluator):
        for item in part():
            if isinstance(item, Configuration):
                found.append(item)
            else:
                missing.update([item])
    return tuple(found), missing


def float_configurations() -> tuple[FloatConfiguration, ...]:
    """Those that take floats; what is missing here is what `configurations` names."""
    found: list[FloatConfiguration] = []
    if _reason_against_onnxruntime() is None:
        from intact.engines import onnxruntime

        for flavour in _exact_flavours(onnxruntime.kernels_saturate()):
            for level in onnxruntime.LEVELS:
                name = f"onnxruntime {flavour} {level}"
                found.append(FloatConfiguration(name, _float_onnxruntime(level, flavour)))
    if _reason_against_openvino() is None:
        from intact.engines import openvino

        for flavour in _exact_flavours(openvino.kernels_saturate()):
            if flavour != "qoperator":
                make = partial(_FloatOpenVINO, flavour=flavour)
                name = f"openvino {flavour}"
                found.append(FloatConfiguration(name, make, rounds_otherwise=True))
    return tuple(found)


def _exact_flavours(saturating: bool) -> tuple[Flavour, ...]:
    return ("integer",) if saturating else FLAVOURS


def compiler() -> str | None:
    """The C compiler of the native engine, in its own words, or None."""
    from intact.engines.native.build import find_compiler
    from intact.engines.native.cache import open_cache

    found = find_compiler(open_cache())
    if found is None:
        return None
    return re.split(r"\s+Copyright", found.identity)[0]  # gcc goes on about its warranty


def select(names: Sequence[str] | None, all_: Sequence[str]) -> tuple[str, ...]:
    """Those of `all_` that `names` name, in full or by their first words; all for None.

    Raises `IntactError` for a name that is none.
    """
    if names is None:
        return tuple(all_)
    for name in names:
        if not any(_named(name, given) for given in all_):
            kinds = ", ".join(dict.fromkeys(given.split()[0] for given in all_))
            raise IntactError(f"there is no engine {name!r} here; choose of {kinds}.")
    return tuple(given for given in all_ if any(_named(name, given) for name in names))


def _named(name: str, given: str) -> bool:
    return given == name or given.startswith(f"{name} ")


# -- engines -------------------------------------------------------------------------------------

Found: TypeAlias = Iterator[Configuration | tuple[str, str]]


def _torch() -> Found:
    try:
        import torch

        from intact.engines.torch import TorchEngine
    except ImportError:
        yield "torch", "PyTorch is not installed"
        return
    yield Configuration("torch", TorchEngine)
    if torch.cuda.is_available():
        yield Configuration("torch cuda", lambda program: TorchEngine(program, "cuda"))
    else:
        yield "torch cuda", "PyTorch finds no CUDA device"


def _native() -> Found:
    from intact.engines.native import isas

    for isa, reason in isas().items():
        if reason is not None:
            yield f"native {isa}", reason.rstrip(".")
            continue
        for fuse in (True, False):
            name = f"native {isa}" + ("" if fuse else " unfused")
            yield Configuration(name, _native_engine(isa, fuse))


def _native_engine(isa: str, fuse: bool) -> Callable[[Program], Engine]:
    from intact.engines.native import NativeEngine

    return lambda program: NativeEngine(program, isa, fuse=fuse)


def _onnxruntime() -> Found:
    if reason := _reason_against_onnxruntime():
        yield "onnxruntime", reason
        return
    from intact.engines.onnxruntime import LEVELS, Level, OnnxRuntimeEngine, kernels_saturate

    def made(level: Level, flavour: Flavour) -> Callable[[Program], Engine]:
        return lambda program: OnnxRuntimeEngine(program, level, flavour=flavour)

    for flavour in FLAVOURS:
        if flavour != "integer" and kernels_saturate():
            yield f"onnxruntime {flavour}", SATURATES
            continue
        for level in LEVELS:
            yield Configuration(f"onnxruntime {flavour} {level}", made(level, flavour))


def _openvino() -> Found:
    if reason := _reason_against_openvino():
        yield "openvino", reason
        return
    from intact.engines.openvino import OpenVINOEngine, kernels_saturate

    def made(flavour: Flavour) -> Callable[[Program], Engine]:
        return lambda program: OpenVINOEngine(program, flavour=flavour)

    for flavour in FLAVOURS:
        if flavour == "qoperator":  # which OpenVINO does not read
            continue
        if flavour != "integer" and kernels_saturate():
            yield f"openvino {flavour}", SATURATES
            continue
        yield Configuration(f"openvino {flavour}", made(flavour))


def _evaluator() -> Found:
    try:
        import onnx.reference  # noqa: F401
    except ImportError:
        yield "onnx-evaluator", "the package onnx is not installed"
        return
    for flavour in FLAVOURS:
        name = f"onnx-evaluator {flavour}"
        yield Configuration(name, _evaluator_engine(flavour), EVALUATOR_WORK)


def _evaluator_engine(flavour: Flavour) -> Callable[[Program], Engine]:
    return lambda program: _Evaluator(program, flavour)


def _reason_against_onnxruntime() -> str | None:
    from intact.engines.onnxruntime import kernels_saturate

    return _reason(kernels_saturate)


def _reason_against_openvino() -> str | None:
    from intact.engines.openvino import kernels_saturate

    return _reason(kernels_saturate)


def _reason(ask: Callable[[], object]) -> str | None:
    """Why an engine cannot be asked anything, or None."""
    try:
        ask()
    except EngineUnavailableError as error:
        return str(error).rstrip(".")
    return None


def evaluator(made: ModelProto) -> Any:
    """A model in the reference evaluator of the package `onnx`.

    It has two ways to pool, and takes one where all strides and dilations are 1 that pads with NaN,
    which no integer type has, and on the wrong sides (onnx 1.23). So it takes the other one always.
    Its GatherElements fails on more than 64 elements along the axis: NumPy has that operator.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun
    from onnx.reference.ops import op_max_pool

    standard: Any = op_max_pool.MaxPool  # it has no types

    class MaxPool(standard):  # type: ignore[misc]
        def _run(self, x: Codes, **attributes: Any) -> Any:
            return self._max_pool(x, **attributes)

    class GatherElements(OpRun):
        def _run(self, data: Codes, indices: Codes, axis: int = 0) -> Any:
            return (np.take_along_axis(data, indices, axis),)

    return ReferenceEvaluator(made, new_ops=[MaxPool, GatherElements])


class _Evaluator:
    """The reference evaluator of the package `onnx`: the standard, in Python, and slow."""

    def __init__(self, program: Program, flavour: Flavour) -> None:
        self.program = program
        self._model: Any
        self._traced: Any
        self._model, self._traced = (
            evaluator(model(program, flavour=flavour, io="integer", trace=trace))
            for trace in (False, True)
        )

    def __call__(self, codes: Values, hook: CodesHook | None = None) -> Values:
        return in_slices(self.program, codes, sys.maxsize, lambda part: self._run(part, hook))

    def _run(self, codes: Arrays, hook: CodesHook | None) -> Arrays:
        fed = dict(zip(self.program.inputs, codes, strict=True))
        if hook is not None:
            names = [op.name for op in self.program.ops]
            for name, array in fed.items():
                hook(name, array)
            traced = self._traced.run([name + TRACED for name in names], fed)
            for name, values in zip(names, traced, strict=True):
                hook(name, np.asarray(values))
        return tuple(map(np.asarray, self._model.run(list(self.program.outputs), fed)))


# -- engines that take floats --------------------------------------------------------------------


def _float_onnxruntime(level: Any, flavour: Flavour) -> Callable[[Program], FloatEngine]:
    from intact.engines.onnxruntime import session

    def make(program: Program) -> FloatEngine:
        plain, traced = (
            session(
                model(program, flavour=flavour, io="float", trace=trace).SerializeToString(),
                level,
                None,
            )
            for trace in (False, True)
        )
        names = [op.name for op in program.ops]

        def run(x: Floats) -> tuple[Floats, dict[str, Codes]]:
            fed = dict(zip(program.inputs, x, strict=True))
            codes = traced.run([name + TRACED for name in names], fed)
            outputs = plain.run(list(program.outputs), fed)
            return tuple(outputs), dict(zip(names, codes, strict=True))

        return run

    return make


class _FloatOpenVINO:
    def __init__(self, program: Program, flavour: Flavour) -> None:
        from intact.engines.openvino import infer_request

        self.program = program
        self._plain, self._traced = (
            infer_request(
                model(program, flavour=flavour, io="float", trace=trace).SerializeToString(), None
            )
            for trace in (False, True)
        )

    def __call__(self, x: Floats) -> tuple[Floats, dict[str, Codes]]:
        self._plain.infer(list(x))
        self._traced.infer(list(x))
        outputs = range(len(self.program.outputs))
        codes = {
            op.name: self._traced.get_output_tensor(i).data.copy()
            for i, op in enumerate(self.program.ops, len(outputs))
        }
        return tuple(self._plain.get_output_tensor(i).data.copy() for i in outputs), codes
