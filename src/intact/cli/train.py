"""`intact train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intact.cli.files import make_folder
from intact.cli.options import (
    BiasChoice,
    BiasOption,
    Data,
    DataDirOption,
    DataOption,
    JsonOption,
    ResumeOption,
    SeedOption,
    TrainedOption,
    command_line,
)
from intact.cli.showing import Tell, progress, terminal
from intact.errors import IntactError

if TYPE_CHECKING:
    from intact.data import Dataset
    from intact.training import Progress as TrainingProgress
    from intact.training import Trained


ZOO = {
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
    "mobilenetv2": "MobileNetV2",
    "mobilenetv3": "MobileNetV3",
}
"""Names and titles of `intact.zoo.NETWORKS`, which loads torch."""


class ScheduleChoice(str, Enum):
    """Schedules of LeNet's training, as `intact.training.schedule_for` takes them."""

    two_epoch = "two-epoch"
    best = "best"


app = typer.Typer(help="Train a network of the zoo.", no_args_is_help=True)


@app.command("lenet")
def train_lenet_command(
    data: DataOption = Data.digits,
    data_dir: DataDirOption = None,
    bias: BiasOption = BiasChoice.last,
    schedule: Annotated[
        ScheduleChoice,
        typer.Option(
            "--schedule",
            help="two-epoch: plain SGD in batches of 4. best: as good as LeNet gets; seconds for "
            "digits, most of an hour for CIFAR-10.",
        ),
    ] = ScheduleChoice.best,
    seed: SeedOption = 0,
    out: TrainedOption = Path("lenet.safetensors"),
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train LeNet from a seed, for `intact lenet --weights FILE`.

    Every finished epoch is kept: interrupted with Ctrl-C, it goes on with --resume.
    """
    command = command_line(
        "train",
        "lenet",
        data=data.value,
        data_dir=data_dir,
        bias=bias.value,
        schedule=schedule.value,
        seed=seed,
        out=out,
    )

    def train(dataset: Dataset, tell: Tell) -> Trained:
        return train_lenet_to(
            dataset, bias.value, schedule.value, seed, out, command, tell, resume=resume
        )

    _train_to(out, "lenet.safetensors", data, data_dir, train, as_json)


def _add_train_command(network: str, title: str) -> None:
    """`intact train NETWORK` for a network of `intact.zoo.NETWORKS`."""

    def command(
        data: DataOption = Data.cifar10,
        data_dir: DataDirOption = None,
        epochs: Annotated[
            int | None,
            typer.Option(
                "--epochs",
                metavar="N",
                min=1,
                help="Passes over the training images, by the first schedule alone; if left out, "
                "all schedules, which take CIFAR-10 about an hour on two cores.",
            ),
        ] = None,
        seed: SeedOption = 0,
        threads: Annotated[
            int,
            typer.Option(
                "--threads",
                metavar="N",
                min=1,
                help="Threads that share the work; another number gives other weights.",
            ),
        ] = 1,
        out: TrainedOption = Path(f"{network}.safetensors"),
        resume: ResumeOption = False,
        as_json: JsonOption = False,
    ) -> None:
        text = command_line(
            "train",
            network,
            data=data.value,
            data_dir=data_dir,
            epochs=epochs,
            seed=seed,
            threads=threads,
            out=out,
        )

        def train(dataset: Dataset, tell: Tell) -> Trained:
            from intact.training import network_schedules, train_network

            schedules = network_schedules(network, dataset.name, epochs)
            return train_network(
                network,
                dataset,
                schedules,
                seed,
                out,
                command=text,
                resume=resume,
                threads=threads,
                progress=_epochs(sum(schedule.epochs for schedule in schedules), tell),
            )

        _train_to(out, f"{network}.safetensors", data, data_dir, train, as_json)

    command.__doc__ = (
        f"Train {title} from a seed, for `intact zoo` and `intact quantize`.\n\n"
        "Every finished epoch is kept: interrupted with Ctrl-C, it goes on with --resume."
    )
    app.command(network)(command)


for _network, _title in ZOO.items():
    _add_train_command(_network, _title)


def train_lenet_to(
    dataset: Dataset,
    bias: Any,
    schedule: str,
    seed: int,
    out: Path,
    command: str,
    tell: Tell,
    *,
    resume: bool = False,
) -> Trained:
    """Train a LeNet, weights to `out`; as `intact.training.train_lenet`, telling of epochs."""
    from intact.training import schedule_for, train_lenet

    show = _epochs(schedule_for(schedule, dataset.name).epochs, tell)
    return train_lenet(
        dataset, bias, schedule, seed, out, command=command, resume=resume, progress=show
    )


def _epochs(epochs: int, tell: Tell) -> TrainingProgress:
    """The progress of a training of so many epochs, as told to `tell`."""

    def show(epoch: int, step: int, total: int, loss: float, accuracy: float) -> None:
        done = (epoch - 1) * total + step
        text = f"epoch {epoch} of {epochs}: loss {loss:.3f}, accuracy {accuracy:.1%}"
        tell(text, done, epochs * total)

    return show


def _train_to(
    out: Path,
    usual: str,
    data: Data,
    data_dir: Path | None,
    train: Callable[[Dataset, Tell], Trained],
    as_json: bool,
) -> None:
    """Load the data, train, and say what became of it; `usual` is the usual name of the file."""
    try:
        with progress("loading") as tell:
            from intact.data import load_dataset

            if out.is_dir():
                raise IntactError(f"{out} is a folder. Name a file in it: -o {out / usual}.")
            dataset = load_dataset(data.value, data_dir)
            make_folder(out.parent)
            trained = train(dataset, tell)
    except KeyboardInterrupt:
        terminal(stderr=True).print("\ninterrupted; --resume goes on after the last full epoch")
        raise
    facts = {"path": str(out), "correct": trained.correct, "total": trained.total}
    if as_json:
        typer.echo(json.dumps({**facts, "accuracy": trained.accuracy}))
    else:
        terminal().print(f"{out}: {trained.accuracy:.2%} on {trained.total:,} test images")
