"""Time and peak memory of quantizing a network, ours and other tools'.

    python benchmarks/quantizers.py --images 256 --repeats 3 --python ~/peers/bin/python

Each measurement is a process of its own, and the tools take turns. Measured is what a user waits
for once the float network is in memory (ONNX Runtime: in a file), to the quantized one. Weights and
images are random: nothing here depends on them. Memory counts all of a process, also its imports.

* `intact`: `intact.quantize` by the default recipe
* ONNX Runtime: `quantize_static`, QDQ, int8 weights per channel, MinMax, after its own
  preprocessing; and the same with every setting at its default
* NNCF on torch, ONNX and OpenVINO models, `nncf.quantize` at its defaults but for the number of
  images

A tool that the interpreter of `--python` cannot import is reported as missing. Linux only.
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

NETWORKS = ("resnet50", "resnet20")


def make(network: str) -> tuple[Any, tuple[int, ...]]:
    """A random network, and the shape of its input."""
    if network == "resnet50":
        from resnet50 import INPUT_SHAPE, random_resnet50

        return random_resnet50(), INPUT_SHAPE
    import torch

    from intact.zoo import ResNet20

    torch.manual_seed(0)
    return ResNet20().eval(), (3, 32, 32)


def images(shape: tuple[int, ...], count: int, batch: int) -> Iterator[Floats]:
    """Random images, made when they are asked for: float32 `[batch, *shape]` each."""
    rng = np.random.default_rng(0)
    for start in range(0, count, batch):
        yield rng.standard_normal((min(batch, count - start), *shape), np.float32)


# -- the tools, each in a child --------------------------------------------------------------------


def ours(model: Any, shape: tuple[int, ...], _: Path, count: int, batch: int) -> None:
    """`intact.quantize`."""
    import intact

    children.report(lambda: intact.quantize(model, images(shape, count, batch)))


def onnxruntime_static(
    shape: tuple[int, ...], folder: Path, count: int, batch: int, **settings: Any
) -> None:
    """`quantize_static` with some settings."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = images(shape, count, batch)

        def get_next(self) -> dict[str, Floats] | None:
            x = next(self.batches, None)
            return None if x is None else {"x": x}

    def work() -> None:
        quant_pre_process(folder / "float.onnx", folder / "ready.onnx")
        quantize_static(folder / "ready.onnx", folder / "int8.onnx", Reader(), **settings)

    children.report(work)


def ort_per_channel(_: Any, shape: tuple[int, ...], folder: Path, count: int, batch: int) -> None:
    """ONNX Runtime as one sets it for accuracy."""
    from onnxruntime.quantization import QuantFormat, QuantType

    onnxruntime_static(
        shape,
        folder,
        count,
        batch,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def ort_default(_: Any, shape: tuple[int, ...], folder: Path, count: int, batch: int) -> None:
    """ONNX Runtime as it comes."""
    onnxruntime_static(shape, folder, count, batch)


def _nncf(model: Any, shape: tuple[int, ...], count: int, wrap: Callable[[Floats], Any]) -> None:
    """`nncf.quantize`: images one by one, as its statistics want them."""
    import nncf

    class Images:
        def __iter__(self) -> Iterator[Floats]:
            return images(shape, count, 1)

    data = nncf.Dataset(Images(), wrap)
    children.report(lambda: nncf.quantize(model, data, subset_size=count))


def nncf_torch(model: Any, shape: tuple[int, ...], _: Path, count: int, __: int) -> None:
    """NNCF on a torch module."""
    import torch

    _nncf(model, shape, count, torch.from_numpy)


def nncf_onnx(_: Any, shape: tuple[int, ...], folder: Path, count: int, __: int) -> None:
    """NNCF on an ONNX model."""
    import onnx

    _nncf(onnx.load(folder / "float.onnx"), shape, count, lambda x: {"x": x})


def nncf_openvino(_: Any, shape: tuple[int, ...], folder: Path, count: int, __: int) -> None:
    """NNCF on an OpenVINO model."""
    import openvino as ov

    _nncf(ov.Core().read_model(folder / "float.onnx"), shape, count, lambda x: x)


Tool = Callable[[Any, tuple[int, ...], Path, int, int], None]
TOOLS: Mapping[str, Tool] = {
    "intact": ours,
    "ONNX Runtime, per channel": ort_per_channel,
    "ONNX Runtime, defaults": ort_default,
    "NNCF, torch": nncf_torch,
    "NNCF, ONNX": nncf_onnx,
    "NNCF, OpenVINO": nncf_openvino,
}
NEEDS_TORCH = ("intact", "NNCF, torch")


# -- measuring -------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    """One measurement, or with `--export` the float network as ONNX."""
    if args.export:
        import torch

        model, shape = make(args.network)
        torch.onnx.export(
            model,
            (torch.zeros(1, *shape),),
            args.folder / "float.onnx",
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "N"}},
        )
        return
    shape = (3, 224, 224) if args.network == "resnet50" else (3, 32, 32)
    model = make(args.network)[0] if args.child in NEEDS_TORCH else None
    TOOLS[args.child](model, shape, args.folder, args.images, args.batch)


def main() -> None:
    """Measure in turns, print Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="of ours and ONNX Runtime's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--export", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child or args.export:
        child(args)
        return
    outcomes: dict[str, list[children.Outcome]] = {tool: [] for tool in args.tools}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = ["--network", args.network, "--folder", folder]
        common += ["--images", str(args.images), "--batch", str(args.batch)]
        children.call(Path(__file__), [*common, "--export"])
        for _ in range(args.repeats):
            for tool in args.tools:
                if tool in missing:
                    continue
                python = sys.executable if tool == "intact" else args.python
                try:
                    arguments = [*common, "--child", tool]
                    outcomes[tool].append(children.run(Path(__file__), arguments, python))
                except RuntimeError as error:
                    missing[tool] = " ".join(str(error).split())
    base = outcomes.get("intact") or next(o for o in outcomes.values() if o)
    print(f"{args.network}, {args.images} images, {args.repeats} runs each; medians\n")
    print(
        "| tool | seconds | ratio | processor seconds | peak | ratio |\n|---|---|---|---|---|---|"
    )
    for tool, measured in outcomes.items():
        if tool in missing:
            print(f"| {tool} | missing: {missing[tool]} | | | | |")
            continue
        seconds, cpu, peak = (_median(measured, f) for f in ("seconds", "cpu", "peak"))
        cells = [
            tool,
            f"{seconds:.1f}",
            f"{seconds / _median(base, 'seconds'):.2f}",
            f"{cpu:.1f}",
            f"{peak / 2**30:.2f} GiB",
            f"{peak / _median(base, 'peak'):.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _median(outcomes: list[children.Outcome], field: str) -> float:
    return float(np.median([getattr(outcome, field) for outcome in outcomes]))


if __name__ == "__main__":
    main()
