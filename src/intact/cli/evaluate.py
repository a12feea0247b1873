"""`intact evaluate`."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

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
from intact.cli.showing import progress, terminal


def evaluate(
    program: ProgramArgument,
    data: Annotated[
        str,
        typer.Option("--data", metavar="SOURCE", help=f"Labelled samples: {SOURCE_HELP}"),
    ],
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
    """Measure the accuracy of a program on labelled samples.

    Images are prepared as the program says, which carries what `intact quantize` did; options about
    images override that. Of data with a test part, that is what counts. Of several outputs, the
    first one holds the scores of the classes.
    """
    images = ImageOptions.parse(preset, resize, crop, mean, std)
    remarks: dict[str, None] = {}  # a set that keeps its order
    with progress("loading") as tell:
        from intact.data.checking import other_classes
        from intact.engines import load_engine
        from intact.inference import evaluate as measure
        from intact.significance import SIGNIFICANCE, guessing_p, percent
        from intact.storage import load

        loaded = load(program)
        chosen = open_for(
            loaded,
            data,
            images,
            data_dir=data_dir,
            workers=workers,
            skip_corrupt=skip_corrupt,
            remark=remarks.setdefault,
        ).take(samples)
        found = measure(
            loaded,
            load_engine(engine.value, loaded, threads=threads),
            chosen,
            lambda done: tell("evaluating", done, chosen.count or 0),
        )
    outputs = math.prod(loaded.tensors[loaded.outputs[0]].shape)
    if chosen.classes and (other := other_classes(chosen.classes, outputs, chosen.name)):
        remarks[f"warning: {other}"] = None
    if outputs > 1 and (p := guessing_p(found.correct, found.total, outputs)) >= SIGNIFICANCE:
        remarks[
            f"warning: guessing among {outputs} classes is right as often, p = {p:.2g}. The order "
            "of the labels, how images are prepared, or the weights are wrong."
        ] = None
    show_remarks(remarks)
    low, high = found.interval
    facts = {
        "program": loaded.sha256,
        "data": {
            "name": chosen.name,
            "sha256": {"test": found.inputs, "labels": found.labels},
        },
        "engine": engine.value,
        "correct": found.correct,
        "total": found.total,
        "accuracy": found.accuracy,
        "interval": [low, high],
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        terminal().print(
            f"{percent(found.accuracy, found.total)} ({found.correct:,} of {found.total:,}), "
            f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        )
