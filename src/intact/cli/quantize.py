"""`intact quantize`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from intact.cli.files import check_folder, make_folder
from intact.cli.images import (
    IMAGES,
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
    check_used,
    refuse_images,
    show_remarks,
)
from intact.cli.networks import MODEL_HELP, InputShapeOption, WeightsOption, shape_of
from intact.cli.options import JsonOption, OutFolderOption, RecipeOption, command_line
from intact.cli.pages import show_report
from intact.cli.showing import progress, terminal
from intact.errors import DataError

if TYPE_CHECKING:
    from intact.data.samples import Samples


def quantize(
    model: Annotated[str, typer.Option("--model", metavar="NETWORK", help=MODEL_HELP)],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help=f"What every stage is measured on: {SOURCE_HELP}",
        ),
    ],
    weights: WeightsOption = None,
    data_dir: BuiltInDirOption = None,
    samples: SamplesOption = None,
    calibration: Annotated[
        int,
        typer.Option(
            "--calibration",
            metavar="N",
            min=1,
            help="Choose ranges from N samples, evenly over the training part of SOURCE, or over "
            "all of it if it has no such part; or from all if there are fewer.",
        ),
    ] = 1000,
    calibration_data: Annotated[
        str | None,
        typer.Option(
            "--calibration-data", metavar="SOURCE", help="Take those samples from here instead."
        ),
    ] = None,
    preset: PresetOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    input_shape: InputShapeOption = None,
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
    pixels: Annotated[
        bool,
        typer.Option(
            "--pixels",
            rich_help_panel=IMAGES,
            help="Let the program take pixels as they are, uint8: the normalisation becomes a part "
            "of it.",
        ),
    ] = False,
    recipe: RecipeOption = "default",
    out: OutFolderOption = Path("quantized"),
    as_json: JsonOption = False,
) -> None:
    """Quantize a network of your own step by step, and report what every step costs.

    Prints the table of stages, and leaves in the folder OUT: float.safetensors,
    program.safetensors, predictions.npz, results.json, report.html.

    Without labels, stages are compared with the float network alone. Of a network with several
    inputs, SOURCE holds an array for each. docs/quantize.md says more.
    """
    shape = shape_of(input_shape)
    images = ImageOptions.parse(preset, resize, crop, mean, std)
    command = command_line(
        "quantize",
        model=model,
        weights=weights,
        data=data,
        data_dir=data_dir,
        samples=samples,
        calibration=calibration,
        calibration_data=calibration_data,
        preset=images.preset,
        resize=resize,
        crop=crop,
        mean=mean,
        std=std,
        input_shape=input_shape,
        workers=workers or None,
        skip_corrupt=skip_corrupt,
        pixels=pixels,
        recipe=recipe,
        out=out,
    )
    skipped: dict[str, None] = {}  # a set that keeps its order
    with progress("loading") as tell:
        from intact import loading
        from intact.capturing.exporting import required_inputs
        from intact.data.checking import other_classes
        from intact.data.preprocessing import PRESETS
        from intact.data.several import open_several
        from intact.data.sources import BUILT_IN, open_samples
        from intact.experiment import run_experiment, write_experiment
        from intact.recipe import load_recipe
        from intact.report import report_to_json

        chosen = load_recipe(recipe)
        check_folder(out)
        network = loading.load_model(model, weights)
        inputs = required_inputs(network)
        if len(inputs) > 1:
            refuse_images(
                inputs,
                images,
                data_dir=data_dir,
                input_shape=input_shape,
                workers=workers,
                skip_corrupt=skip_corrupt,
                pixels=pixels,
            )
        preprocessing = images.applied(None)
        normalising = None
        if pixels:
            normalising = preprocessing or (PRESETS["signed"] if data in BUILT_IN else None)
            if normalising is None:
                raise DataError(
                    "how the network wants pixels normalised is not known: give --preset, or "
                    "--mean and --std, beside --pixels."
                )
            preprocessing = replace(normalising, normalise=False)
        wanted = shape or loading.input_shape(network)

        def opened(source: str, part: Literal["train", "test"], folder: Path | None) -> Samples:
            if len(inputs) > 1:
                shapes = loading.input_shapes(network) or [None] * len(inputs)
                return open_several(source, dict(zip(inputs, shapes, strict=True)), part=part)
            return open_samples(
                source,
                preprocessing=preprocessing,
                shape=wanted,
                workers=workers,
                skip_corrupt=skip_corrupt,
                part=part,
                data_dir=folder,
                on_skip=lambda message: skipped.setdefault(f"left out: {message}"),
            )

        test = opened(data, "test", data_dir)
        source = calibration_data or data
        training = opened(source, "train", data_dir if source in BUILT_IN else None)
        if not pixels:  # there the options are for the network, whatever the samples are
            check_used(images, test, training)
        experiment = run_experiment(
            network,
            training.take(calibration),
            test.take(samples),
            chosen,
            title=f"{loading.title(model)} on {test.name}",
            command=command,
            seed=0,
            pixels=normalising,
            progress=tell,
        )
        tell("drawing the report", 0, 1)
        make_folder(out)
        write_experiment(experiment, out)
    show_remarks(skipped)
    if as_json:
        typer.echo(report_to_json(experiment.report), nl=False)
        return
    show_report(experiment.report, out)
    program = experiment.quantized.program
    outputs = math.prod(program.tensors[program.outputs[0]].shape)
    remarks = list(experiment.remarks)
    if test.classes is not None and (other := other_classes(test.classes, outputs, test.name)):
        remarks.append(other)
    for remark in remarks:
        terminal().print(f"warning: {remark}", soft_wrap=False)
    if training.name == test.name:
        terminal().print(
            "note: ranges were chosen from samples that the stages were measured on as well; "
            "--calibration-data takes others",
            soft_wrap=False,
        )
