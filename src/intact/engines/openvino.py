"""The OpenVINO engine: the exported file, run by OpenVINO's CPU plugin."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from intact.engines import Arrays, CodesHook, in_slices
from intact.errors import EngineUnavailableError
from intact.export.onnx import Flavour, model, saturates, saturation_probe
from intact.program import Program
from intact.signature import Values

__all__ = ["OpenVINOEngine", "infer_request", "kernels_saturate"]

SLICE = 1024
"""Samples at a time, at most."""
SLICE_ELEMENTS = 2**25
"""Elements of the largest tensor of a slice, about: bounds memory."""


class OpenVINOEngine:
    """Runs a program as an ONNX model of integer codes on the CPU."""

    def __init__(
        self, program: Program, threads: int | None = None, flavour: Flavour | None = None
    ) -> None:
        """Make the model and compile it.

        flavour  None: "qdq", or "integer" where this CPU's int8 kernels could saturate on the
                 program's weights

        Raises `EngineUnavailableError` where a package is missing, for "qoperator", which OpenVINO
        does not read, and where kernels could saturate and "qdq" was asked for.
        """
        _import()
        risky = any(saturates(program, op) for op in program.ops) and kernels_saturate()
        flavour = flavour or ("integer" if risky else "qdq")
        if flavour == "qoperator":
            raise EngineUnavailableError(
                "OpenVINO reads no QLinearConv with a scale per channel; take the flavour 'qdq' or "
                "'integer'."
            )
        if risky and flavour != "integer":
            raise EngineUnavailableError(
                "the int8 kernels that OpenVINO has for this CPU could saturate on the program's "
                f"weights, so its flavour {flavour!r} could be wrong; take 'integer'."
            )
        self.program = program
        self.flavour = flavour
        self._threads = threads
        self._request = self._load(trace=False)
        self._traced: Any = None
        largest = max(math.prod(tensor.shape) for tensor in program.tensors.values())
        self._slice = max(1, min(SLICE, SLICE_ELEMENTS // largest))

    def _load(self, *, trace: bool) -> Any:
        made = model(self.program, flavour=self.flavour, io="integer", trace=trace)
        return infer_request(made.SerializeToString(), self._threads)

    def __call__(self, codes: Values, hook: CodesHook | None = None) -> Values:
        """Input codes `[N, *input shape]` to output codes `[N, *output shape]`; see `Engine`.

        hook  called per slice of the batch, with codes from a second model that gives out every
              tensor; OpenVINO may fuse less in it. The result is that of the model proper
        """
        return in_slices(self.program, codes, self._slice, lambda part: self._run(part, hook))

    def _run(self, codes: Arrays, hook: CodesHook | None) -> Arrays:
        fed = [np.ascontiguousarray(array) for array in codes]
        # Inputs and outputs are found by their place: an output may lose its name to one it equals.
        outputs = range(len(self.program.outputs))
        if hook is not None:
            self._traced = self._traced or self._load(trace=True)
            for name, array in zip(self.program.inputs, codes, strict=True):
                hook(name, array)
            self._traced.infer(fed)
            for i, op in enumerate(self.program.ops, len(outputs)):
                hook(op.name, self._traced.get_output_tensor(i).data.copy())
        self._request.infer(fed)
        return tuple(self._request.get_output_tensor(i).data.copy() for i in outputs)


def _import() -> Any:
    try:
        import onnx  # noqa: F401  which writes the models
        import openvino
    except ImportError as error:
        raise EngineUnavailableError(
            f"the engine 'openvino' needs the package {error.name}, which is not installed; run "
            "`pip install 'intact[onnx,openvino]'`."
        ) from error
    return openvino


def infer_request(data: bytes, threads: int | None) -> Any:
    """An inference request of a model; float32 is float32 in it.

    By default OpenVINO computes in bfloat16 what is not int8, where a CPU has instructions for it.
    """
    core = _import().Core()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        with _signal_stack_kept():
            return core.compile_model(core.read_model(data), "CPU", settings).create_infer_request()
    except RuntimeError as error:  # on ARM64 it has no kernel for some ConvInteger
        reason = str(error).strip().splitlines()[-1:]
        raise EngineUnavailableError(
            f"OpenVINO cannot compile the program for this machine: {' '.join(reason)}"
        ) from error


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


_DISABLED = 2
"""`SS_DISABLE`: signals are handled on the thread's own stack."""


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Let signals of this thread be handled on the stack where they were before.

    OpenVINO gives the thread that loads it an alternate stack for signals, and when it is unloaded,
    brings back what it found. Of two that are loaded, the second has found the stack of the first;
    where the first is unloaded before it, that stack is gone, and the next signal whose handler
    runs on alternate stacks, as those of Python do, ends in a segmentation fault: Ctrl-C during
    `intact certify`. OpenVINO itself handles no signals, and needs no such stack.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    swap = ctypes.CDLL(None).sigaltstack
    before = _SignalStack()
    swap(None, ctypes.byref(before))
    try:
        yield
    finally:
        if swap(ctypes.byref(before), None):  # too small, since AMX has made more registers
            swap(ctypes.byref(_SignalStack(None, _DISABLED, 0)), None)


@cache
def kernels_saturate() -> bool:
    """Whether OpenVINO's kernels for uint8 times int8 saturate on this CPU: it is asked."""
    _import()
    program, codes, expected = saturation_probe()
    request = infer_request(model(program, io="integer").SerializeToString(), 1)
    request.infer([codes])
    return not np.array_equal(request.get_output_tensor(0).data, expected)
