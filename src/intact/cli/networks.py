"""Options that say which network, on which samples; and what is made of their texts."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intact.cli.options import numbers
from intact.errors import DataError

if TYPE_CHECKING:
    from intact.data.preprocessing import Preprocessing

__all__ = [
    "IMAGES",
    "MODEL_HELP",
    "CropOption",
    "InputShapeOption",
    "MeanOption",
    "PresetChoice",
    "PresetOption",
    "ResizeOption",
    "SkipCorruptOption",
    "StdOption",
    "WeightsOption",
    "WorkersOption",
    "preprocessing_of",
    "shape_of",
]


class PresetChoice(str, Enum):
    """Names of `intact.data.preprocessing.PRESETS`."""

    imagenet = "imagenet"
    caffe = "caffe"
    signed = "signed"
    unit = "unit"


MODEL_HELP = (
    "The network: FILE.py:NAME or package.module:NAME, where NAME is a function or class without "
    "arguments, or the network itself; FILE.pt2, an exported program; or a name that `intact zoo` "
    "lists."
)

IMAGES = "Images"
"""The heading of options, in the help, that are about images only."""

WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Weights of the network: .safetensors, or a state dict in .pt or .pth.",
    ),
]
PresetOption = Annotated[
    PresetChoice | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        rich_help_panel=IMAGES,
        help="What becomes of pixels, as in the network's training. imagenet: 256, 224, mean and "
        "deviation of ImageNet. caffe: BGR from 0 to 255. signed: [-1, 1]. unit: [0, 1].",
    ),
]
ResizeOption = Annotated[
    int | None,
    typer.Option(
        "--resize",
        metavar="N",
        min=1,
        rich_help_panel=IMAGES,
        help="Shorter side of images in pixels, before the crop.",
    ),
]
CropOption = Annotated[
    str | None,
    typer.Option(
        "--crop",
        metavar="H[,W]",
        rich_help_panel=IMAGES,
        help="Size of the piece from the centre, in pixels.",
    ),
]
MeanOption = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="M[,M,M]",
        rich_help_panel=IMAGES,
        help="Subtract this from pixels between 0 and 1; one number, or one per channel.",
    ),
]
StdOption = Annotated[
    str | None,
    typer.Option("--std", metavar="S[,S,S]", rich_help_panel=IMAGES, help="Then divide by this."),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        min=0,
        rich_help_panel=IMAGES,
        help="Processes that decode images.",
    ),
]
SkipCorruptOption = Annotated[
    bool,
    typer.Option(
        "--skip-corrupt",
        rich_help_panel=IMAGES,
        help="Leave images out that cannot be read, and say which.",
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


def preprocessing_of(
    preset: PresetChoice | None,
    resize: int | None,
    crop: str | None,
    mean: str | None,
    std: str | None,
) -> Preprocessing | None:
    """The preset, with what else is given in place of its parts; None if nothing is."""
    from intact.data.preprocessing import PRESETS, Preprocessing

    piece = None if crop is None else _crop(crop)
    mean_of = None if mean is None else tuple(numbers("--mean", mean, float))
    std_of = None if std is None else tuple(numbers("--std", std, float))
    if preset is not None:
        chosen = PRESETS[preset.value]
    elif mean_of is not None and std_of is not None:
        chosen = Preprocessing(mean=mean_of, std=std_of)
    elif (resize, piece, mean_of, std_of) == (None, None, None, None):
        return None
    else:
        raise DataError(
            "how pixels become the network's input is said only in part: give --preset, or both "
            "--mean and --std."
        )
    return replace(
        chosen,
        resize=chosen.resize if resize is None else resize,
        crop=chosen.crop if piece is None else piece,
        mean=mean_of or chosen.mean,
        std=std_of or chosen.std,
    )


def _crop(text: str) -> tuple[int, int]:
    """`224` or `224,320` as height and width."""
    sides = numbers("--crop", text, int)
    if len(sides) > 2:
        raise typer.BadParameter(f"--crop takes a side, or height and width, not {text!r}.")
    return sides[0], sides[-1]
