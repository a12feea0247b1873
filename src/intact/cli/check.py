"""`intact check`."""

from __future__ import annotations

import json
import math
import shlex
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intact.cli.networks import MODEL_HELP, WeightsOption, shape_of
from intact.cli.options import JsonOption
from intact.cli.showing import aligned, count, progress, terminal
from intact.errors import ModelError, ModelWarning

if TYPE_CHECKING:
    from pathlib import Path

    from intact.capturing import Refusal
    from intact.network import Network
    from intact.ops import Shape

DIGITS = (3, 32, 32)
"""The shape of the one data set that needs no files."""


def check(
    model: Annotated[str, typer.Argument(metavar="NETWORK", help=MODEL_HELP)],
    weights: WeightsOption = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            "--input-shape",
            metavar="C,H,W",
            help="Shape of one sample, where the network does not say; for several inputs given "
            "once for each.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a network can become an integer program, without quantizing anything.

    Lists every layer with its work, or everything that cannot be converted, with the source line
    and what to do; then exits with 1.
    """
    shapes = [shape for text in input_shape or () if (shape := shape_of(text)) is not None]
    with progress("capturing"):
        import torch

        from intact.capturing import survey
        from intact.loading import input_shapes as known_shapes
        from intact.loading import load_model

        with warnings.catch_warnings():
            if weights is None:  # what can be converted depends on the code alone
                warnings.simplefilter("ignore", ModelWarning)
            loaded = load_model(model, weights, trained=False)
        taken = shapes or known_shapes(loaded)
        if not taken:
            raise ModelError(
                f"{model} does not say what it takes. Give the shape of one sample, such as "
                "--input-shape 3,224,224."
            )
        found = survey(loaded, tuple(torch.zeros(1, *shape) for shape in taken))
    if found.network is None:
        _show_refusals(model, found.refusals, as_json)
        raise typer.Exit(1)
    facts = {"model": model, "ok": True, **_facts(found.network)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = terminal()
    console.print(model, style="bold")
    console.print(f"{_shapes(facts['inputs'])} in, {_shapes(facts['outputs'])} out\n")
    layers = facts["layers"]
    heading = ("layer", "op", "result", "MACs", "parameters")
    rows = [
        (
            layer["name"],
            layer["op"] + (f", {layer['clamp']}" if layer["clamp"] else ""),
            _shape(layer["shape"]),
            f"{layer['macs']:,}" if layer["macs"] else "",
            f"{layer['parameters']:,}" if layer["parameters"] else "",
        )
        for layer in layers
    ]
    console.print(aligned([heading, *rows]))
    console.print(
        f"\n{count(len(layers), 'layer')}, all of them in integers: {facts['macs']:,} MACs per "
        f"sample, {count(facts['parameters'], 'parameter')}",
        soft_wrap=False,
    )
    shapes_taken = {name: found.network.tensors[name].shape for name in found.network.inputs}
    console.print(f"next: {_next(model, weights, input_shape or (), shapes_taken)}")


def _next(
    model: str, weights: Path | None, given: Sequence[str], taken: Mapping[str, Shape]
) -> str:
    """The command that quantizes what was checked, with the digits where they fit.

    given  what `--input-shape` said
    taken  the network's inputs, and the shapes of their samples
    """
    words = ["intact", "quantize", "--model", model]
    words += [] if weights is None else ["--weights", str(weights)]
    if len(taken) > 1:
        return shlex.join([*words, "--data", "SOURCE"]) + (
            "\nSOURCE is a .npz or .safetensors file, or a folder of .npy files, with an array for "
            f"each input:\n{', '.join(taken)}"
        )
    digits = [*taken.values()] == [DIGITS]
    words += [word for shape in given for word in ("--input-shape", shape)]
    words += ["--data", "digits" if digits else "SOURCE"]
    where = "" if digits else "\nSOURCE is a folder of images, or a .npy or .npz file"
    return shlex.join(words) + where


def _show_refusals(model: str, refusals: Sequence[Refusal], as_json: bool) -> None:
    if as_json:
        facts = {"model": model, "ok": False, "refusals": [asdict(refusal) for refusal in refusals]}
        typer.echo(json.dumps(facts, indent=2))
        return
    console = terminal()
    console.print(model, style="bold")
    what = "operation has" if len(refusals) == 1 else "operations have"
    console.print(f"{len(refusals)} {what} no place in an integer program:")
    for i, refusal in enumerate(refusals, 1):
        console.print(f"\n{i}. {refusal.function} in {refusal.layer}")
        if refusal.source:
            console.print(f"   {refusal.source}")
        lines = textwrap.wrap(refusal.reason, console.width - 3)
        console.print(textwrap.indent("\n".join(lines), "   "))


def _facts(network: Network) -> dict[str, Any]:
    """What `check` shows of a network, as plain values."""
    from intact.ops import macs

    layers = []
    for op in network.ops:
        shapes = [network.tensors[name].shape for name in op.inputs]
        result = network.tensors[op.name]
        own = {
            name: tensor
            for name, tensor in network.parameters.items()
            if name.rpartition(".")[0] == op.name
        }
        weight = own.get(f"{op.name}.weight")
        layers.append(
            {
                "name": op.name,
                "op": type(op).__name__,
                "clamp": clamp_words(result.low, result.high),
                "inputs": list(op.inputs),
                "shape": list(result.shape),
                "macs": macs(
                    op, shapes, result.shape, None if weight is None else tuple(weight.shape)
                ),
                "parameters": sum(tensor.numel() for tensor in own.values()),
                "source": network.sources.get(op.name, ""),
            }
        )
    return {
        "inputs": {name: list(network.tensors[name].shape) for name in network.inputs},
        "outputs": {name: list(network.tensors[name].shape) for name in network.outputs},
        "macs": sum(layer["macs"] for layer in layers),
        "parameters": sum(layer["parameters"] for layer in layers),
        "layers": layers,
    }


def clamp_words(low: float, high: float) -> str:
    """What is fused into a layer, in words: "ReLU", "ReLU6", "-1 to 1"; "" for nothing."""
    if (low, high) == (-math.inf, math.inf):
        return ""
    if low == 0 and high in (6, math.inf):
        return "ReLU6" if high == 6 else "ReLU"
    if high == math.inf:
        return f"at least {low:g}"
    if low == -math.inf:
        return f"at most {high:g}"
    return f"{low:g} to {high:g}"


def _shapes(tensors: dict[str, list[int]]) -> str:
    """The shape of the only tensor, or all names with their shapes."""
    if len(tensors) == 1:
        return _shape(*tensors.values())
    return ", ".join(f"{name} {_shape(shape)}" for name, shape in tensors.items())


def _shape(shape: list[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"
