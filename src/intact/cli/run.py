"""`intact run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from intact.cli.files import check_file, make_folder
from intact.cli.options import (
    EngineChoice,
    EngineOption,
    JsonOption,
    ProgramArgument,
    ThreadsOption,
    numbers,
)
from intact.cli.showing import aligned, progress, terminal


def run(
    program: ProgramArgument,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUTS",
            help="A folder of images, an image, or a .npy or .npz file with one array of samples.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="Write all outputs to FILE: .csv, .json, .npy or .npz.",
        ),
    ] = None,
    engine: EngineOption = EngineChoice.auto,
    threads: ThreadsOption = None,
    mean: Annotated[
        str | None,
        typer.Option(
            "--mean",
            metavar="M[,M,M]",
            help="Subtract this from pixels between 0 and 1, as in the training of the network; "
            "one number, or one per channel; 0.5 if left out.",
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option("--std", metavar="S[,S,S]", help="Then divide by this; 0.5 if left out."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a program on images or arrays of your own, and show its predictions.

    Prints per input the class with the largest output, and that output; of several outputs, from
    the first. Several go to .json or .npz files.
    """
    normalise = (numbers("--mean", mean or "0.5", float), numbers("--std", std or "0.5", float))
    with progress("loading") as tell:
        from intact.engines import load_engine
        from intact.inference import check_suffix, infer, read_inputs
        from intact.storage import load

        if out is not None:
            check_suffix(out)
            check_file(out, program)
        loaded = load(program)
        inputs = read_inputs(loaded, source, *normalise)
        assumed = mean is None and std is None and inputs.normalised
        total = len(inputs.names)
        tell("running", 0, total)
        predictions = infer(
            loaded,
            load_engine(engine.value, loaded, threads=threads),
            inputs,
            lambda done: tell("running", done, total),
        )
        if out is not None:
            make_folder(out.parent)
            predictions.write(out)
    if assumed:
        terminal(stderr=True).print(
            "warning: pixels were normalised with mean 0.5 and std 0.5, as for the networks of the "
            "zoo; if this one was trained with others, give --mean and --std",
            style="yellow",
        )
    if as_json:
        typer.echo(json.dumps(predictions.to_list()))
        return
    rows = [
        (name, str(label), f"{score:.4g}")
        for name, label, score in zip(
            predictions.names, predictions.classes, predictions.scores, strict=True
        )
    ]
    console = terminal()
    console.print(aligned([("input", "class", "output"), *rows]))
    if out is not None:
        console.print(f"\n{out}  all outputs of {total:,} inputs")
