"""Options that say which network, and what is made of their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intact.cli.options import numbers

__all__ = ["MODEL_HELP", "InputShapeOption", "WeightsOption", "shape_of"]

MODEL_HELP = (
    "The network: FILE.py:NAME or package.module:NAME, where NAME is a function or class without "
    "arguments, or the network itself; FILE.pt2, an exported program; or a name that `intact zoo` "
    "lists."
)

WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights of the network: .safetensors, or a state dict in .pt or .pth.",
    ),
]
InputShapeOption = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="C,H,W",
        help="Shape of one sample of the network, such as 3,224,224, where nothing else tells it.",
    ),
]


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """`3,224,224` as a shape."""
    if text is None:
        return None
    shape = tuple(numbers("--input-shape", text, int))
    if min(shape) < 1:
        raise typer.BadParameter(f"--input-shape takes sizes of 1 or more, not {text!r}.")
    return shape
