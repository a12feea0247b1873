"""The engines that we compare ourselves with, each made ready to be called as it likes best.

Every maker takes a batch, and returns the ways to run that batch to its logits: name -> call. Which
one is fastest depends on the network and the machine, so it is found out.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from intact.network import Network
from intact.ops import Add, Conv2d, GlobalAvgPool, Linear, MaxPool2d, Op, Reshape

Floats = npt.NDArray[np.float32]
Call = Callable[[], Floats]
Ways = Mapping[str, Call]

OPSET = 17


# -- the float network as ONNX -------------------------------------------------------------------


def float_onnx(network: Network) -> onnx.ModelProto:
    """The float network in standard operators; batch norm is folded, the batch size is free."""
    nodes, initializers = [], []
    for op in network.ops:
        clamp = network.tensors[op.name]
        if (clamp.low, clamp.high) not in {(-np.inf, np.inf), (0.0, np.inf)}:
            raise ValueError(f"{op.name}: only ReLU is translated here")
        relu = clamp.low == 0
        result = f"{op.name}.before_relu" if relu else op.name
        weights = [n for n in (f"{op.name}.weight", f"{op.name}.bias") if n in network.parameters]
        initializers += [
            numpy_helper.from_array(network.parameters[name].detach().numpy(), name)
            for name in weights
        ]
        shape = network.tensors[op.name].shape
        if isinstance(op, Reshape):
            initializers.append(numpy_helper.from_array(np.array([-1, *shape]), f"{op.name}.shape"))
            weights = [f"{op.name}.shape"]
        kind, attributes = _operator(op)
        nodes.append(
            helper.make_node(kind, [*op.inputs, *weights], [result], name=result, **attributes)
        )
        if relu:
            nodes.append(helper.make_node("Relu", [result], [op.name], name=op.name))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *network.tensors[name].shape])
        for name in (network.input, network.output)
    ]
    graph = helper.make_graph(nodes, "float", ends[:1], ends[1:], initializers)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def _operator(op: Op) -> tuple[str, dict[str, object]]:
    if isinstance(op, Conv2d | MaxPool2d):
        top, bottom, left, right = op.padding
        window = {"strides": op.stride, "pads": (top, left, bottom, right)}
        window["dilations"] = op.dilation
        if isinstance(op, Conv2d):
            return "Conv", {**window, "group": op.groups}
        return "MaxPool", {**window, "kernel_shape": op.kernel}
    if isinstance(op, Linear):
        return "Gemm", {"transB": 1}
    if isinstance(op, Reshape):
        return "Reshape", {}
    if isinstance(op, Add):
        return "Add", {}
    if isinstance(op, GlobalAvgPool):
        return "GlobalAveragePool", {}
    raise ValueError(f"{op.name}: {type(op).__name__} is not translated here")


class _Calibration:
    """A `CalibrationDataReader` over one array."""

    def __init__(self, name: str, images: Floats) -> None:
        self.batches = iter({name: images[i : i + 64]} for i in range(0, len(images), 64))

    def get_next(self) -> dict[str, Floats] | None:
        """The next batch, or None."""
        return next(self.batches, None)


def quantize_static(model: onnx.ModelProto, images: Floats, *, signed: bool) -> onnx.ModelProto:
    """ONNX Runtime's own quantizer with free scales: QDQ, int8 weights per channel.

    signed  whether activations are int8; else uint8, which its kernels on x86 like better
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(_Calibration)
    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder) / n for n in ("float.onnx", "pre.onnx", "int8.onnx"))
        onnx.save(model, source)
        quant_pre_process(source, ready)
        quantize_static(
            ready,
            target,
            _Calibration(model.graph.input[0].name, images),  # type: ignore[arg-type]
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


# -- peers ---------------------------------------------------------------------------------------


def fastest(ways: Ways, seconds: float = 0.1) -> str:
    """The name of the way that takes least time for a call."""

    def cost(name: str) -> float:
        times = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            ways[name]()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    return min(ways, key=cost)


def onnxruntime_peer(model: onnx.ModelProto, x: Floats, threads: int) -> Ways:
    """ONNX Runtime, all optimizations, batch size fixed; `run`, or bound in- and outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    free = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    options.add_free_dimension_override_by_name(free, len(x))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name, result = session.get_inputs()[0].name, session.get_outputs()[0].name
    feed, names = {name: x}, [result]
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(x))
    logits = session.run(names, feed)[0]
    output = ort.OrtValue.ortvalue_from_shape_and_type(logits.shape, logits.dtype)
    binding.bind_ortvalue_output(result, output)

    def bound() -> Floats:
        session.run_with_iobinding(binding)
        return output.numpy()

    return {"run": lambda: session.run(names, feed)[0], "bound": bound}


def openvino_peer(model: onnx.ModelProto, x: Floats, threads: int, precision: str = "f32") -> Ways:
    """OpenVINO for latency: batch size fixed or free, threads pinned to cores or not.

    precision  of what is not int8: "f32" or "bf16"

    Either the tensors are given with the call, or they are set before and the call goes by way of
    the asynchronous interface, which builds no dictionary of results.
    """
    import openvino as ov

    core = ov.Core()
    ways: dict[str, Call] = {}
    for shape in ("fixed", "free"):
        read = core.read_model(model.SerializeToString())
        if shape == "fixed":
            read.reshape([len(x), *x.shape[1:]])
        for pinned in (True, False):
            compiled = core.compile_model(
                read,
                "CPU",
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "NUM_STREAMS": 1,
                    "INFERENCE_NUM_THREADS": threads,
                    "INFERENCE_PRECISION_HINT": precision,
                    "ENABLE_CPU_PINNING": pinned,
                },
            )
            about = f"{shape} batch, {'pinned' if pinned else 'not pinned'}"
            for name, call in _openvino_calls(compiled, x).items():
                ways[f"{about}, {name}"] = call
    return ways


def _openvino_calls(compiled: Any, x: Floats) -> Ways:
    import openvino as ov

    given = compiled.create_infer_request()
    logits = np.array(given.infer([x])[0])
    bound = compiled.create_infer_request()
    bound.set_input_tensor(ov.Tensor(x, shared_memory=True))
    bound.set_output_tensor(ov.Tensor(logits, shared_memory=True))

    def asynchronous() -> Floats:
        bound.start_async()
        bound.wait()
        return logits

    return {
        "infer": lambda: given.infer([x], share_inputs=True, share_outputs=True)[0],
        "async": asynchronous,
    }


def torch_peer(model: nn.Module, x: Floats) -> Ways:
    """Torch as it comes, channels first or last; threads are those of the process."""
    return {
        name: _inference(copy.deepcopy(model).to(memory_format=layout), x, layout)
        for name, layout in LAYOUTS.items()
    }


def torch_compiled_peer(model: nn.Module, x: Floats) -> Ways:
    """Torch compiled by Inductor, parameters frozen; needs a C++ compiler."""
    from torch._inductor import config

    ways = {}
    with config.patch(freezing=True):
        for name, layout in LAYOUTS.items():
            ready = copy.deepcopy(model).to(memory_format=layout)
            ways[name] = _inference(torch.compile(ready, dynamic=False), x, layout)
            ways[name]()
    return ways


LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def _inference(
    model: Callable[[torch.Tensor], torch.Tensor], x: Floats, layout: torch.memory_format
) -> Call:
    given = torch.from_numpy(x).contiguous(memory_format=layout)

    def run() -> Floats:
        with torch.inference_mode():
            return model(given).numpy()

    return run
