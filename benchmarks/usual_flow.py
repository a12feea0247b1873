"""What the usual flow loses between simulation and deployment, against what ours loses.

The same float networks, quantized with free scales by ONNX Runtime's `quantize_static` (QDQ, uint8
activations, int8 weights per channel) and by NNCF for OpenVINO, each run twice by its own engine:

* simulated: the quantizers of the file executed one by one, in float, as a quantization tool
  measures accuracy (ONNX Runtime with all optimizations off, OpenVINO without its low-precision
  transformations)
* deployed: fused into int8 kernels, as the engine does by default

and the program of `intact`: simulated by the torch engine, deployed by the engines that this
machine has. The codes of every quantized activation are compared, and the logits. For ONNX Runtime
and OpenVINO the model is cut behind the activation, for an additional output would keep the engine
from fusing. A logit of NNCF's is float in both runs, and counts as different when it is off by more
than 1e-4 of the logits' standard deviation, far above float rounding.

    INTACT_DATA_DIR=... python benchmarks/usual_flow.py --resnet20 resnet20.safetensors

`pip install nncf` for its part. It prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import peers
from networks import Floats, Subject, subject
from onnx import TensorProto, helper

from intact.engines import load_engine
from intact.errors import EngineUnavailableError

SLICE = 250
FLOAT_NOISE = 1e-4

Array = npt.NDArray[Any]
Run = Callable[[Floats], Array]


@dataclass
class Loss:
    """One network in one flow: what differs between simulated and deployed.

    codes, logits, predictions are counts of what was compared, and each has a count of differences.
    """

    network: str
    flow: str
    deployed: str
    codes: int = 0
    codes_differ: int = 0
    worst: str = ""
    worst_fraction: float = 0.0
    logits: int = 0
    logits_differ: int = 0
    predictions: int = 0
    predictions_changed: int = 0

    def add_codes(self, tensor: str, simulated: Array, deployed: Array) -> None:
        """Count the codes of one tensor."""
        different = int((simulated != deployed).sum())
        self.codes += simulated.size
        self.codes_differ += different
        if different / simulated.size > self.worst_fraction:
            self.worst, self.worst_fraction = tensor, different / simulated.size

    def add_logits(self, simulated: Floats, deployed: Floats, tolerance: float = 0.0) -> None:
        """Count logits, and predictions."""
        self.logits += simulated.size
        self.logits_differ += int((np.abs(simulated - deployed) > tolerance).sum())
        self.predictions += len(simulated)
        self.predictions_changed += int((simulated.argmax(1) != deployed.argmax(1)).sum())


def in_slices(run: Run, x: Floats) -> Array:
    """A batch in slices, so that memory stays small."""
    return np.concatenate([run(x[i : i + SLICE]) for i in range(0, len(x), SLICE)])


# -- ONNX Runtime --------------------------------------------------------------------------------


def onnxruntime_loss(this: Subject, images: int) -> Loss:
    """ONNX Runtime's own quantizer and engine."""
    model = peers.quantize_static(peers.float_onnx(this.network), this.calibration, signed=False)
    loss = Loss(this.name, "ONNX Runtime quantize_static", "ONNX Runtime")
    x = this.images
    simulated, deployed = (in_slices(_session(model, o), x) for o in (False, True))
    loss.add_logits(simulated, deployed)
    for name, cut in _cuts(model):
        pair = [in_slices(_session(cut, o), x[:images]) for o in (False, True)]
        loss.add_codes(name, *pair)
    return loss


def _session(model: onnx.ModelProto, optimized: bool) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _cuts(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The model up to each of its QuantizeLinear, whose codes become the output."""
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            cut = onnx.ModelProto()
            cut.CopyFrom(model)
            del cut.graph.output[:]
            codes = helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None)
            cut.graph.output.append(codes)
            yield node.input[0], cut


# -- OpenVINO with NNCF --------------------------------------------------------------------------


def openvino_loss(this: Subject, images: int) -> Loss:
    """NNCF's quantizer and OpenVINO."""
    import nncf
    import openvino as ov

    core = ov.Core()
    model = core.read_model(peers.float_onnx(this.network).SerializeToString())
    samples = [this.calibration[i : i + 1] for i in range(len(this.calibration))]
    quantized = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples))
    loss = Loss(this.name, "NNCF", "OpenVINO")

    def compiled(model: Any, mode: str) -> Run:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": mode}
        run = core.compile_model(model, "CPU", settings)
        return lambda x: np.array(run([x])[0])

    simulated, deployed = (in_slices(compiled(quantized, m), this.images) for m in ("NO", "YES"))
    loss.add_logits(simulated, deployed, FLOAT_NOISE * float(simulated.std()))
    for op in quantized.get_ordered_ops():
        if op.get_type_name() != "FakeQuantize":
            continue
        low, high = (float(op.input_value(i).get_node().get_data().item()) for i in (3, 4))
        step = (high - low) / (op.get_attributes()["levels"] - 1)
        cut = ov.Model([op.output(0)], quantized.get_parameters())
        pair = [
            np.rint((in_slices(compiled(cut, mode), this.images[:images]) - low) / step)
            for mode in ("NO", "YES")
        ]
        loss.add_codes(op.get_friendly_name(), *pair)
    return loss


# -- ours ----------------------------------------------------------------------------------------


def our_losses(this: Subject, images: int) -> Iterator[Loss]:
    """Our program: the torch engine against every engine that deploys it."""
    program = this.program
    inputs = program.quantize_input(this.images)
    simulation = load_engine("torch", program)
    simulated = simulation(inputs)
    for name in ("native", "onnxruntime", "openvino"):
        try:
            engine = load_engine(name, program)
        except EngineUnavailableError as error:
            print(f"left out: {name}: {error}")
            continue
        loss = Loss(this.name, "intact", name)
        deployed = in_slices(engine, inputs)
        loss.add_logits(simulated.reshape(len(inputs), -1), deployed.reshape(len(inputs), -1))
        for start in range(0, images, SLICE):
            batch = inputs[start : start + SLICE]
            expected = _tensors(simulation, batch)
            for tensor, codes in _tensors(engine, batch).items():
                loss.add_codes(tensor, expected[tensor], codes)
        yield loss


def _tensors(engine: Any, codes: Array) -> dict[str, Array]:
    parts: dict[str, list[Array]] = {}
    engine(codes, hook=lambda name, part: parts.setdefault(name, []).append(part.copy()))
    return {name: np.concatenate(part) for name, part in parts.items()}


# -- showing -------------------------------------------------------------------------------------


def markdown(losses: list[Loss]) -> str:
    """One line per network, flow and engine."""
    heads = ["network", "flow", "deployed by", "codes that differ", "worst layer"]
    heads += ["logits that differ", "predictions changed"]
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for loss in losses:
        worst = f"{loss.worst} {loss.worst_fraction:.2%}" if loss.worst else ""
        cells = [
            loss.network,
            loss.flow,
            loss.deployed,
            f"{_share(loss.codes_differ, loss.codes)} of {loss.codes:,}",
            worst,
            f"{_share(loss.logits_differ, loss.logits)} of {loss.logits:,}",
            f"{loss.predictions_changed:,} of {loss.predictions:,}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if part else "0"


def main() -> None:
    """Measure, print Markdown, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resnet20", type=Path, help="weights, from `intact train resnet20`")
    parser.add_argument("--images", type=int, default=1000, help="whose codes are compared")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    losses: list[Loss] = []
    for name, weights in (("lenet", None), ("resnet20", args.resnet20)):
        this = subject(name, weights)
        if not this.trained:
            print(f"{name} has random weights: its predictions mean nothing.")
        losses.append(onnxruntime_loss(this, args.images))
        try:
            losses.append(openvino_loss(this, args.images))
        except ImportError as error:
            print(f"left out: NNCF with OpenVINO: {error}")
        losses += our_losses(this, args.images)
    print(markdown(losses))
    if args.json:
        text = json.dumps([asdict(loss) for loss in losses], indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
