"""`intact lenet`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from intact.cli.files import check_folder, make_folder
from intact.cli.options import (
    BiasChoice,
    BiasOption,
    Data,
    DataDirOption,
    DataOption,
    JsonOption,
    OutFolderOption,
    RecipeOption,
    SeedOption,
    command_line,
)
from intact.cli.pages import show_report
from intact.cli.showing import progress
from intact.cli.train import train_lenet_to


def lenet(
    data: DataOption = Data.digits,
    data_dir: DataDirOption = None,
    bias: BiasOption = BiasChoice.last,
    recipe: RecipeOption = "default",
    train: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Train the network first, instead of taking trained weights. `intact train "
            "lenet` does so resumably.",
        ),
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", metavar="FILE", help="Take the weights that `intact train lenet` wrote."
        ),
    ] = None,
    calibration: Annotated[
        int,
        typer.Option(
            "--calibration",
            metavar="N",
            min=1,
            help="Choose ranges from the first N training images, or all if there are fewer.",
        ),
    ] = 1000,
    seed: SeedOption = 0,
    out: OutFolderOption = Path("lenet"),
    as_json: JsonOption = False,
) -> None:
    """Quantize LeNet step by step, and report what every step costs.

    Prints the table of stages, and leaves in the folder OUT: float.safetensors,
    program.safetensors, predictions.npz, results.json, report.html.
    """
    if train and weights:
        raise typer.BadParameter("--train makes weights and --weights takes them: give one.")
    with progress("loading") as tell:
        from intact.data import load_dataset
        from intact.experiment import dataset_part, run_experiment, write_experiment
        from intact.recipe import load_recipe
        from intact.report import report_to_json
        from intact.zoo.lenet import load_lenet, read_lenet

        chosen = load_recipe(recipe)
        check_folder(out)
        dataset = load_dataset(data.value, data_dir)
        command = command_line(
            "lenet",
            data=data.value,
            data_dir=data_dir,
            bias=bias.value,
            recipe=recipe,
            train=train,
            weights=weights,
            calibration=calibration,
            seed=seed,
            out=out,
        )
        if train:
            schedule = (
                "two-epoch" if data is Data.cifar10 and bias is not BiasChoice.all else "best"
            )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "lenet.safetensors"
                train_lenet_to(dataset, bias.value, schedule, seed, path, command, tell)
                model = read_lenet(path, bias.value)
        elif weights:
            model = read_lenet(weights, bias.value)
        else:
            model = load_lenet(data.value, bias.value)
        titles = {"none": "without biases", "last": "bias on the last layer", "all": "all biases"}
        names = {"digits": "digits", "cifar10": "CIFAR-10", "folder": f"images of {data_dir}"}
        given = dataset_part(dataset, "train", calibration)
        experiment = run_experiment(
            model,
            given,
            dataset_part(dataset, "test"),
            chosen,
            title=f"LeNet ({titles[bias.value]}) on {names[data.value]}",
            command=command,
            seed=seed,
            data={
                "name": dataset.name,
                "classes": list(dataset.classes),
                "train": len(dataset.train_images),
                "test": len(dataset.test_images),
                "calibration": given.count,
                "sha256": dataset.sha256,
            },
            progress=tell,
        )
        tell("drawing the report", 0, 1)
        make_folder(out)
        write_experiment(experiment, out)
    if as_json:
        typer.echo(report_to_json(experiment.report), nl=False)
    else:
        show_report(experiment.report, out)
