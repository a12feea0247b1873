"""Time and peak memory of quantizing a ResNet-50, ours and other tools'.

    python benchmarks/quantizers.py --images 256 --repeats 3 --python ~/peers/bin/python

Each measurement is a process of its own, and the tools take turns. Measured is what a user waits
for from the torch module to the quantized network: capturing is a part of ours, and writing the
ONNX file a part of those that read one. Weights and images are random: nothing here depends on
them. Memory counts all of a process, also its imports.

* `intact`: `intact.quantize` by the default recipe
* ONNX Runtime: `torch.onnx.export`, then `quantize_static`, QDQ, int8 weights per channel, MinMax,
  after its own preprocessing; and the same with every setting at its default
* NNCF: `nncf.quantize` at its defaults but for the number of images; on the module, or on the
  exported file read by `onnx` or by OpenVINO

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


def exported(model: Any, shape: tuple[int, ...], folder: Path) -> Path:
    """The module as an ONNX file, by torch's exporter."""
    import torch

    path = folder / "float.onnx"
    torch.onnx.export(
        model,
        (torch.zeros(1, *shape),),
        path,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "N"}},
    )
    return path


def onnxruntime_static(
    model: Any, shape: tuple[int, ...], folder: Path, count: int, batch: int, **settings: Any
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
        quant_pre_process(exported(model, shape, folder), folder / "ready.onnx")
        quantize_static(folder / "ready.onnx", folder / "int8.onnx", Reader(), **settings)

    children.report(work)


def ort_per_channel(
    model: Any, shape: tuple[int, ...], folder: Path, count: int, batch: int
) -> None:
    """ONNX Runtime as one sets it for accuracy."""
    from onnxruntime.quantization import QuantFormat, QuantType

    onnxruntime_static(
        model,
        shape,
        folder,
        count,
        batch,
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def ort_default(model: Any, shape: tuple[int, ...], folder: Path, count: int, batch: int) -> None:
    """ONNX Runtime as it comes."""
    onnxruntime_static(model, shape, folder, count, batch)


def _nncf(
    model: Callable[[], Any], shape: tuple[int, ...], count: int, wrap: Callable[[Floats], Any]
) -> None:
    """`nncf.quantize`: images one by one, as its statistics want them."""
    import nncf

    class Images:
        def __iter__(self) -> Iterator[Floats]:
            return images(shape, count, 1)

    data = nncf.Dataset(Images(), wrap)
    children.report(lambda: nncf.quantize(model(), data, subset_size=count))


def nncf_torch(model: Any, shape: tuple[int, ...], _: Path, count: int, __: int) -> None:
    """NNCF on a torch module."""
    import torch

    _nncf(lambda: model, shape, count, torch.from_numpy)


def nncf_onnx(model: Any, shape: tuple[int, ...], folder: Path, count: int, _: int) -> None:
    """NNCF on an ONNX model."""
    import onnx

    _nncf(lambda: onnx.load(exported(model, shape, folder)), shape, count, lambda x: {"x": x})


def nncf_openvino(model: Any, shape: tuple[int, ...], folder: Path, count: int, _: int) -> None:
    """NNCF on an OpenVINO model."""
    import openvino as ov

    core = ov.Core()
    _nncf(lambda: core.read_model(exported(model, shape, folder)), shape, count, lambda x: x)


Tool = Callable[[Any, tuple[int, ...], Path, int, int], None]
TOOLS: Mapping[str, Tool] = {
    "intact": ours,
    "ONNX Runtime, per channel": ort_per_channel,
    "ONNX Runtime, defaults": ort_default,
    "NNCF, torch": nncf_torch,
    "NNCF, ONNX": nncf_onnx,
    "NNCF, OpenVINO": nncf_openvino,
}


# -- measuring -------------------------------------------------------------------------------------


def child(args: argparse.Namespace) -> None:
    """One measurement."""
    from resnet50 import INPUT_SHAPE, random_resnet50

    TOOLS[args.child](random_resnet50(), INPUT_SHAPE, args.folder, args.images, args.batch)


def main() -> None:
    """Measure in turns, print Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="of ours and ONNX Runtime's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--child", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    outcomes: dict[str, list[children.Outcome]] = {tool: [] for tool in args.tools}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = ["--folder", folder, "--images", str(args.images), "--batch", str(args.batch)]
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
    print(f"ResNet-50, {args.images} images, {args.repeats} runs each; medians\n")
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
