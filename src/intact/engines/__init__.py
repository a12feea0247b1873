"""Engines run programs. All give the same bits; they differ in speed and in what they need.

An engine is made once for a program and then called with batches of input codes. Engines do not
import each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from intact.errors import ProgramError

if TYPE_CHECKING:
    from intact.program import Program

__all__ = ["ENGINES", "CodesHook", "Engine", "engine_name", "load_engine"]

ENGINES = ("auto", "reference", "torch")

CodesHook: TypeAlias = Callable[[str, npt.NDArray[Any]], None]
"""Called as `hook(tensor name, codes [N, ...])` for the input and every op's result."""


class Engine(Protocol):
    """A program, ready to run."""

    def __call__(self, codes: npt.NDArray[Any], hook: CodesHook | None = None) -> npt.NDArray[Any]:
        """Input codes `[N, *input shape]` to output codes `[N, *output shape]`."""
        ...


def engine_name(name: str) -> str:
    """The engine that a user means.

    "auto" is torch where this process has loaded it already, else the reference: loading torch
    costs more than most programs.
    """
    if name not in ENGINES:
        raise ProgramError(f"there is no engine {name!r}; choose one of {', '.join(ENGINES)}.")
    if name == "auto":
        return "torch" if sys.modules.get("torch") else "reference"
    return name


def load_engine(name: str, program: Program) -> Engine:
    """Make the engine `name` for `program`."""
    if engine_name(name) == "reference":
        from intact.engines.reference import ReferenceEngine

        return ReferenceEngine(program)
    try:
        from intact.engines.torch import TorchEngine
    except ImportError as error:
        raise ProgramError(
            "the engine 'torch' needs PyTorch, which is not installed; run `pip install torch`, "
            "or use engine='reference', which gives the same bits."
        ) from error
    return TorchEngine(program)


def empty_batch(program: Program) -> npt.NDArray[Any]:
    """The result of running no samples."""
    spec = program.tensors[program.output]
    return np.empty((0, *spec.shape), spec.qparams.dtype)
