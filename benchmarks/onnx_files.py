"""The ONNX files of a program in every engine here: differing codes, and how long it takes.

    python benchmarks/onnx_files.py PROGRAM [samples]

Random codes, one thread. A time is the median of 15 runs; on a busy machine it is rough.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import openvino

import intact
from intact.engines.onnxruntime import LEVELS, optimization_level
from intact.export.onnx import FLAVOURS, model

RUNS = 15


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call."""
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def onnxruntime_call(data: bytes, level: Any, codes: Any) -> Callable[[], Any]:
    """A call of a session."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = optimization_level(onnxruntime, level)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: codes})[0]


def openvino_call(data: bytes, precision: str, codes: Any) -> Callable[[], Any]:
    """A call of a compiled model."""
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(data), "CPU", settings)
    return lambda: compiled(codes)[0]


def main() -> None:
    """Measure, and print one line per file and engine."""
    program = intact.load(sys.argv[1])
    samples = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    spec = program.tensors[program.input]
    rng = np.random.default_rng(0)
    codes = rng.integers(spec.qparams.qmin, spec.qparams.qmax + 1, (samples, *spec.shape))
    codes = codes.astype(spec.qparams.dtype)
    expected = program.codes(codes, "reference")
    print(f"{samples} samples, {expected.size:,} output codes")
    print(f"{'flavour':10} {'bytes':>9} {'engine':22} {'differing':>9} {'ms':>8}")
    for flavour in FLAVOURS:
        data = model(program, flavour=flavour, io="integer").SerializeToString()
        calls = {f"ONNX Runtime {x}": (onnxruntime_call, x) for x in LEVELS}
        if flavour != "qoperator":
            calls |= {f"OpenVINO {x}": (openvino_call, x) for x in ("f32", "bf16")}
        for engine, (make, how) in calls.items():
            call = make(data, how, codes)
            differing = int((call() != expected).sum())
            line = f"{flavour:10} {len(data):9,} {engine:22} {differing:9,}"
            print(f"{line} {milliseconds(call):8.2f}", flush=True)


if __name__ == "__main__":
    main()
