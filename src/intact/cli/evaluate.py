"""`intact evaluate`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import typer

from intact.cli.options import (
    Data,
    DataDirOption,
    DataOption,
    EngineChoice,
    EngineOption,
    JsonOption,
    ProgramArgument,
)
from intact.cli.showing import progress, terminal
from intact.errors import DataError

if TYPE_CHECKING:
    from intact.data import Dataset
    from intact.program import Program


BATCH = 500


def evaluate(
    program: ProgramArgument,
    data: DataOption = Data.digits,
    data_dir: DataDirOption = None,
    engine: EngineOption = EngineChoice.auto,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy of a program on the test set of a data set.

    Of several outputs, the first one holds the scores of the classes.
    """
    with progress("loading") as tell:
        from intact.data import load_dataset, to_input
        from intact.engines import load_engine
        from intact.signature import wrapped
        from intact.significance import percent, wilson_interval
        from intact.storage import load

        loaded = load(program)
        dataset = load_dataset(data.value, data_dir)
        _check_classes(loaded, dataset)
        run = load_engine(engine.value, loaded)
        total, correct = len(dataset.test_images), 0
        for start in range(0, total, BATCH):
            part = slice(start, start + BATCH)
            pixels, labels = dataset.test_images[part], dataset.test_labels[part]
            given = pixels if loaded.takes_pixels else loaded.quantize_input(to_input(pixels))
            first = wrapped(run(given), loaded.outputs)[0]
            codes = first.reshape(len(pixels), -1)
            correct += int((codes.argmax(axis=1) == labels).sum())
            tell("evaluating", start + len(labels), total)
    low, high = wilson_interval(correct, total)
    facts = {
        "program": loaded.sha256,
        "data": {"name": dataset.name, "sha256": dataset.sha256},
        "engine": engine.value,
        "correct": correct,
        "total": total,
        "accuracy": correct / total,
        "interval": [low, high],
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        terminal().print(
            f"{percent(correct / total, total)} ({correct:,} of {total:,}), "
            f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        )


def _check_classes(program: Program, dataset: Dataset) -> None:
    outputs = math.prod(program.tensors[program.outputs[0]].shape)
    if len(dataset.classes) > outputs:
        raise DataError(
            f"the program tells {outputs} classes apart, but {dataset.name} has "
            f"{len(dataset.classes)}. Evaluate it on the data that its network was trained for."
        )
