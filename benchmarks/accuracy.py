"""What 8 bits cost: our programs against those of other tools, on the same weights and data.

    INTACT_DATA_DIR=... python benchmarks/accuracy.py resnet20=resnet20.safetensors lenet

Each network is `NAME=WEIGHTS`, from `intact train NAME`, or NAME alone where weights are shipped.
All tools see the same calibration images, in the same order, and their logits are compared with
those of the float network in torch: accuracy, flips with their exact McNemar p-value, and SQNR.

* `intact` by the recipes named in `--recipes`, run by its torch engine
* ONNX Runtime `quantize_static`: QDQ, uint8 activations, int8 weights per channel, MinMax
* NNCF `quantize` with its defaults on an OpenVINO model, run by OpenVINO. It leaves logits float
* PyTorch `prepare_pt2e`, `convert_pt2e` of torchao with the quantizer for x86, run in eager mode

A peer runs in a process of its own, by the interpreter that `--python` names, and is reported as
missing where that cannot import it. It prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import children
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

SLICE = 250
"""Images that are run together."""

RECIPES = {
    "default": "",
    "nothing improved": "improve.correct_bias = false",
    "biases corrected": "improve.correct_bias = true",
    "equalized": "improve.equalize = true\nimprove.correct_bias = false",
    "equalized, biases corrected": "improve.equalize = true\nimprove.correct_bias = true",
    "activations minmax": 'activations.range = "minmax"',
    "activations percentile:99.99": 'activations.range = "percentile:99.99"',
    "weights minmax": 'weights.range = "minmax"',
    "weights 4 bits": "weights.bits = 4\nimprove.correct_bias = false",
    "weights 4 bits, biases corrected": "weights.bits = 4\nimprove.correct_bias = true",
}


# -- peers, each in a child that reads its folder and writes logits.npy ----------------------------


def onnxruntime_logits(folder: Path, calibration: Floats, images: Floats) -> Floats:
    """ONNX Runtime's quantizer and engine."""
    import onnx
    import onnxruntime as ort
    import peers

    model = peers.quantize_static(onnx.load(folder / "float.onnx"), calibration, signed=False)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return _in_slices(lambda x: session.run(None, {"x": x})[0], images)


def nncf_logits(folder: Path, calibration: Floats, images: Floats) -> Floats:
    """NNCF for OpenVINO, in float32 where it does not quantize."""
    import nncf
    import openvino as ov

    core = ov.Core()
    samples = [calibration[i : i + 1] for i in range(len(calibration))]
    quantized = nncf.quantize(
        core.read_model(folder / "float.onnx"), nncf.Dataset(samples), subset_size=len(samples)
    )
    run = core.compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return _in_slices(lambda x: np.array(run([x])[0]), images)


def pt2e_logits(folder: Path, calibration: Floats, images: Floats) -> Floats:
    """PyTorch's own flow, with the quantizer for x86."""
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.load(folder / "float.pt2").module(), quantizer)
    with torch.inference_mode():
        _in_slices(lambda x: prepared(torch.from_numpy(x)).numpy(), calibration)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        return _in_slices(lambda x: converted(torch.from_numpy(x)).numpy(), images)


PEERS: Mapping[str, Callable[[Path, Floats, Floats], Floats]] = {
    "ONNX Runtime": onnxruntime_logits,
    "NNCF": nncf_logits,
    "PyTorch PT2E": pt2e_logits,
}


def _in_slices(run: Callable[[Floats], Floats], x: Floats) -> Floats:
    return np.concatenate([run(x[i : i + SLICE]) for i in range(0, len(x), SLICE)])


def peer(name: str, folder: Path, python: str) -> Floats:
    """The logits of a peer, from a child; `RuntimeError` with its last words if there are none."""
    try:
        children.call(Path(__file__), ["--peer", name, "--folder", str(folder)], python)
    except RuntimeError as error:
        raise RuntimeError(str(error).splitlines()[-1]) from error
    return np.load(folder / "logits.npy")


# -- ours ------------------------------------------------------------------------------------------


def load(text: str) -> tuple[str, Any]:
    """`NAME=WEIGHTS` or `NAME` to the name and the module."""
    from intact.zoo import load_lenet, read_network
    from intact.zoo.networks import load_network

    name, _, weights = text.partition("=")
    if name == "lenet":
        return name, load_lenet("cifar10", "all")
    return name, read_network(name, weights) if weights else load_network(name)


def export(model: Any, calibration: Floats, images: Floats, folder: Path) -> None:
    """Write what the peers read."""
    import torch

    example = (torch.from_numpy(calibration[:2]),)
    torch.onnx.export(
        model,
        example,
        folder / "float.onnx",
        dynamo=False,
        opset_version=17,
        input_names=["x"],
        output_names=["logits"],
        dynamic_axes={"x": {0: "N"}, "logits": {0: "N"}},
    )
    batch = {0: torch.export.Dim("N", min=1, max=4096)}
    torch.export.save(
        torch.export.export(model, example, dynamic_shapes=(batch,)), folder / "float.pt2"
    )
    np.save(folder / "calibration.npy", calibration)
    np.save(folder / "images.npy", images)


def our_logits(model: Any, calibration: Floats, images: Floats, toml: str) -> Floats:
    """A recipe's program, run by the torch engine."""
    import torch

    import intact
    from intact.arithmetic import dequantize
    from intact.engines.torch import TorchEngine

    batches = torch.from_numpy(calibration).split(64)
    program = intact.quantize(model, batches, intact.Recipe.from_toml(toml))
    engine, grid = TorchEngine(program), program.tensors[program.output].qparams
    return _in_slices(
        lambda x: dequantize(engine(program.quantize_input(x)), grid).reshape(len(x), -1), images
    )


# -- showing ---------------------------------------------------------------------------------------


def row(network: str, tool: str, logits: Floats, reference: Floats, labels: Any) -> str:
    """One line of the table."""
    from intact.significance import decibels, mcnemar_p

    right, float_right = logits.argmax(1) == labels, reference.argmax(1) == labels
    to_wrong, to_right = int((float_right & ~right).sum()), int((~float_right & right).sum())
    real = reference.astype(np.float64)
    sqnr = decibels(float(np.square(real).sum()), float(np.square(logits - real).sum()))
    cells = [
        network,
        tool,
        f"{right.mean():.2%}",
        f"{100 * (right.mean() - float_right.mean()):+.2f}",
        f"{to_wrong} / {to_right}",
        f"{mcnemar_p(to_wrong, to_right):.2g}",
        f"{(logits.argmax(1) == reference.argmax(1)).mean():.2%}",
        "" if sqnr is None else f"{sqnr:.1f} dB",
    ]
    return f"| {' | '.join(cells)} |"


def compare(text: str, args: argparse.Namespace) -> Iterator[str]:
    """The lines of one network."""
    import torch

    from intact.data import load_dataset, to_input

    name, model = load(text)
    data = load_dataset("cifar10")
    calibration = to_input(data.train_images[: args.calibration])
    images, labels = to_input(data.test_images[: args.images]), data.test_labels[: args.images]
    with torch.inference_mode():
        reference = _in_slices(lambda x: model(torch.from_numpy(x)).numpy(), images)
    yield row(name, "float", reference, reference, labels)
    for recipe in args.recipes:
        logits = our_logits(model, calibration, images, RECIPES[recipe])
        yield row(name, f"intact, {recipe}", logits, reference, labels)
    with tempfile.TemporaryDirectory() as folder:
        export(model, calibration, images, Path(folder))
        for tool in args.peers:
            try:
                logits = peer(tool, Path(folder), args.python)
            except RuntimeError as error:
                yield f"| {name} | {tool} | missing: {error} |{' |' * 5}"
            else:
                yield row(name, tool, logits, reference, labels)


def main() -> None:
    """Compare, and print Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", help="NAME or NAME=WEIGHTS")
    parser.add_argument("--images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--calibration", type=int, default=512, help="of the training set")
    parser.add_argument("--recipes", nargs="*", default=["default"], choices=RECIPES)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        arrays = [np.load(args.folder / f"{part}.npy") for part in ("calibration", "images")]
        np.save(args.folder / "logits.npy", PEERS[args.peer](args.folder, *arrays))
        return
    print("| network | tool | accuracy | points | to wrong / right | p | agreement | SQNR |")
    print(f"|{'---|' * 8}")
    for network in args.networks:
        for line in compare(network, args):
            print(line, flush=True)


if __name__ == "__main__":
    main()
