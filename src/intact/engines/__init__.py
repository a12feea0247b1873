"""Engines run programs. All give the same bits; they differ in speed and in what they need.

An engine is made once for a program and then called with batches of input codes. Engines do not
import each other.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from intact.errors import EngineUnavailableError, EngineWarning, ProgramError
from intact.signature import Values, unwrapped

if TYPE_CHECKING:
    from intact.program import Program

__all__ = [
    "ENGINES",
    "MAX_THREADS",
    "Arrays",
    "CodesHook",
    "Engine",
    "check_threads",
    "in_slices",
    "load_engine",
]

ENGINES = ("auto", "native", "reference", "torch", "onnxruntime", "openvino")

MAX_THREADS = 1024

Arrays: TypeAlias = tuple[npt.NDArray[Any], ...]
"""A batch `[N, ...]` of each input, or of each output."""

CodesHook: TypeAlias = Callable[[str, npt.NDArray[Any]], None]
"""Called as `hook(tensor name, codes [N, ...])` for every input and every op's result."""


class Engine(Protocol):
    """A program, ready to run."""

    def __call__(self, codes: Values, hook: CodesHook | None = None) -> Values:
        """Input codes `[N, *input shape]` to output codes `[N, *output shape]`.

        Of several inputs a tuple in their order, or a mapping from their names; of several outputs
        a tuple in their order.
        """
        ...


def load_engine(name: str, program: Program, threads: int | None = None) -> Engine:
    """Make an engine for a program.

    name     one of `ENGINES`. "auto" is the fastest exact engine here: native code where there is a
             C compiler or a build in the cache; else torch where this process has loaded it
             already, else the reference, with one `EngineWarning` per process that says why
    threads  most threads that share a batch; None: as many as the engine finds. The reference runs
             on one thread and torch on as many as the process has set, whatever is given here

    Raises `EngineUnavailableError` where this machine lacks what the engine needs.
    """
    if name not in ENGINES:
        raise ProgramError(f"there is no engine {name!r}; choose one of {', '.join(ENGINES)}.")
    check_threads(threads)
    if name == "auto":
        return _fastest(program, threads)
    if name == "native":
        from intact.engines.native import NativeEngine

        return NativeEngine(program, threads=threads)
    if name == "reference":
        from intact.engines.reference import ReferenceEngine

        return ReferenceEngine(program)
    if name == "onnxruntime":
        from intact.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(program, threads=threads)
    if name == "openvino":
        from intact.engines.openvino import OpenVINOEngine

        return OpenVINOEngine(program, threads=threads)
    try:
        from intact.engines.torch import TorchEngine
    except ImportError as error:
        raise EngineUnavailableError(
            "the engine 'torch' needs PyTorch, which is not installed; run `pip install torch`, "
            "or use engine='reference', which gives the same bits."
        ) from error
    return TorchEngine(program)


def check_threads(threads: int | None) -> None:
    """Raise `ProgramError` for a number of threads that no engine can have."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ProgramError(f"threads is {threads!r}, but must be 1 to {MAX_THREADS}, or None.")


_told: set[str] = set()
"""Why "auto" does without native code: each reason is told once per process."""


def _fastest(program: Program, threads: int | None) -> Engine:
    try:
        return load_engine("native", program, threads)
    except EngineUnavailableError as error:
        # Loading torch costs more than running most programs.
        name = "torch" if sys.modules.get("torch") else "reference"
        reason = str(error)
    if reason not in _told:
        _told.add(reason)
        message = f"running on the engine {name!r}, which is slower than native code: {reason}"
        warnings.warn(message, EngineWarning, stacklevel=4)
    return load_engine(name, program, threads)


def in_slices(
    program: Program,
    codes: Values,
    size: int,
    run: Callable[[Arrays], Arrays],
) -> Values:
    """Check a batch and run it slice by slice.

    size     most samples of a slice
    run      from the codes of all inputs to those of all outputs, in their order
    returns  what an engine returns
    """
    arrays = program.check_codes(codes)
    n = len(arrays[0])
    if not n:
        specs = [program.tensors[name] for name in program.outputs]
        return unwrapped(np.empty((0, *spec.shape), spec.qparams.dtype) for spec in specs)
    parts = [run(tuple(array[i : i + size] for array in arrays)) for i in range(0, n, size)]
    return unwrapped(map(np.concatenate, zip(*parts, strict=True)))
