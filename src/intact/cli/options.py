"""Arguments and options that several commands share, and how their texts are read."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

Number = TypeVar("Number", int, float)


class Data(str, Enum):
    """Data sets, as `intact.data.load_dataset` takes them."""

    digits = "digits"
    cifar10 = "cifar10"
    folder = "folder"


class BiasChoice(str, Enum):
    """The layers of LeNet that have a bias, as `intact.zoo.Bias`."""

    none = "none"
    last = "last"
    all = "all"


class EngineChoice(str, Enum):
    """Engines, as `intact.engines.load_engine` takes them."""

    auto = "auto"
    native = "native"
    reference = "reference"
    torch = "torch"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


DataOption = Annotated[
    Data,
    typer.Option(
        "--data",
        help="digits: scikit-learn's, embedded. cifar10: CIFAR-10. folder: images of your own.",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="folder: holds one folder of images per class, or train and test with such folders. "
        "cifar10: holds its binary version; else INTACT_DATA_DIR, the cache, or a download.",
    ),
]
BiasOption = Annotated[
    BiasChoice, typer.Option("--bias", help="The layers of LeNet that have a bias.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="Seed of a training's random numbers.")
]
TrainedOption = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="FILE", help="Safetensors file for the weights."),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on where an interrupted training stopped (FILE.checkpoint)."),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="lab|default|FILE",
        help="How to quantize. lab: the textbook scheme. default: what loses least. FILE: "
        "your own choices, in TOML (docs/recipes.md).",
    ),
]
OutFolderOption = Annotated[
    Path,
    typer.Option(
        "-o", "--out", metavar="OUT", help="Folder for what the run leaves; made if need be."
    ),
]
EngineOption = Annotated[
    EngineChoice,
    typer.Option("--engine", help="All give the same bits; auto takes the fastest one here."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Threads of an engine that can use many."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Write JSON to standard output instead of text.")
]
ProgramArgument = Annotated[
    Path,
    typer.Argument(
        metavar="PROGRAM", help="A program.safetensors, from `intact quantize` or `Program.save`."
    ),
]


def numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """`0.5` or `0.485,0.456,0.406` as numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers with commas between them, not {text!r}."
        ) from None


def names_of(option: str, text: str | None) -> list[str] | None:
    """`native, onnxruntime` as names; None where the option was left out."""
    if text is None:
        return None
    names = [name for part in text.split(",") if (name := part.strip())]
    if not names:
        raise typer.BadParameter(f"{option} takes names with commas between them, not {text!r}.")
    return names


def command_line(*words: str, **options: object) -> str:
    """The command line that was given, in full, defaults spelled out."""
    parts = ["intact", *words]
    for name, value in options.items():
        flag = "-o" if name == "out" else f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            parts += [flag, str(value)]
    # A path that is no text would make no page: show its bytes.
    return shlex.join(parts).encode(errors="backslashreplace").decode()
