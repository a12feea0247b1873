"""`intact run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from intact.cli.files import check_file, make_folder
from intact.cli.images import (
    SOURCE_HELP,
    BuiltInDirOption,
    CropOption,
    ImageOptions,
    MeanOption,
    PresetOption,
    ResizeOption,
    SamplesOption,
    SkipCorruptOption,
    StdOption,
    WorkersOption,
    open_for,
    show_remarks,
)
from intact.cli.options import (
    EngineChoice,
    EngineOption,
    JsonOption,
    ProgramArgument,
    ThreadsOption,
)
from intact.cli.showing import aligned, progress, terminal


def run(
    program: ProgramArgument,
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help=f"Samples: an image; {SOURCE_HELP}"),
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
    data_dir: BuiltInDirOption = None,
    samples: SamplesOption = None,
    preset: PresetOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    engine: EngineOption = EngineChoice.auto,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a program on images or arrays of your own, and show its predictions.

    Prints per input the class with the largest output, and that output; of several outputs, from
    the first. Several go to .json or .npz files. Images are prepared as the program says, which
    carries what `intact quantize` did; options about images override that.
    """
    images = ImageOptions.parse(preset, resize, crop, mean, std)
    remarks: dict[str, None] = {}  # a set that keeps its order
    with progress("loading") as tell:
        from intact.engines import load_engine
        from intact.inference import check_suffix, infer
        from intact.storage import load

        if out is not None:
            check_suffix(out)
            check_file(out, program)
        loaded = load(program)
        chosen = open_for(
            loaded,
            source,
            images,
            data_dir=data_dir,
            workers=workers,
            skip_corrupt=skip_corrupt,
            remark=remarks.setdefault,
        ).take(samples)
        predictions = infer(
            loaded,
            load_engine(engine.value, loaded, threads=threads),
            chosen,
            lambda done: tell("running", done, chosen.count or 0),
        )
        if out is not None:
            make_folder(out.parent)
            predictions.write(out)
    show_remarks(remarks)
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
        console.print(f"\n{out}  all outputs of {len(rows):,} inputs")
