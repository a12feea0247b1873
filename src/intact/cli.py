"""The command line: parses, calls, shows. Exit status 0 is success, 1 an error, 2 wrong usage."""

from __future__ import annotations

import json
import shlex
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from intact import __version__
from intact.errors import IntactError

if TYPE_CHECKING:
    from intact.program import Program
    from intact.report import Report

__all__ = ["main"]

app = typer.Typer(
    name="intact",
    help="Integer-only quantization: what every step costs, and the program that ships.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train a network of the zoo.", no_args_is_help=True)
app.add_typer(train_app, name="train")


class Data(str, Enum):
    digits = "digits"
    cifar10 = "cifar10"
    folder = "folder"


class BiasChoice(str, Enum):
    none = "none"
    last = "last"
    all = "all"


class ScheduleChoice(str, Enum):
    two_epoch = "two-epoch"
    best = "best"


class EngineChoice(str, Enum):
    auto = "auto"
    reference = "reference"
    torch = "torch"


DataOption = Annotated[
    Data,
    typer.Option(
        "--data",
        help="The data set: scikit-learn's digits (embedded), CIFAR-10, or folders of images.",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Where the data is. CIFAR-10: the folder of its binary version; without it, "
        "INTACT_DATA_DIR, the cache, or a download.",
    ),
]
BiasOption = Annotated[
    BiasChoice, typer.Option("--bias", help="Which layers of LeNet have a bias.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Write JSON to standard output instead of text.")
]
ProgramArgument = Annotated[
    Path, typer.Argument(metavar="PROGRAM", help="A program.safetensors file.")
]


def main() -> None:
    """Run the command line; errors of ours become one message and exit status 1."""
    try:
        app()
    except IntactError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, style="red")
        for note in getattr(error, "__notes__", ()):
            Console(stderr=True, soft_wrap=True).print(note, markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # `intact … | head`
        sys.stderr.close()
        sys.exit(141)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"intact {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def lenet(
    data: DataOption = Data.digits,
    data_dir: DataDirOption = None,
    bias: BiasOption = BiasChoice.last,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="lab|default|FILE",
            help="The textbook scheme, the default one, or a TOML file (docs/recipes.md).",
        ),
    ] = "default",
    train: Annotated[
        bool, typer.Option("--train", help="Train the network first, instead of taking ours.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Take trained weights from this file."),
    ] = None,
    calibration: Annotated[
        int,
        typer.Option(
            "--calibration",
            metavar="N",
            min=1,
            help="Choose ranges from the first N training images.",
        ),
    ] = 1000,
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="OUT", help="Folder for what the run leaves.")
    ] = Path("lenet"),
    as_json: JsonOption = False,
) -> None:
    """Quantize LeNet step by step, and report what every step costs.

    Leaves float.safetensors, program.safetensors, predictions.npz, results.json and report.html in
    the folder OUT, and prints the table of stages.
    """
    from intact.data import load_dataset
    from intact.experiment import run_experiment, write_experiment
    from intact.recipe import load_recipe
    from intact.report import report_to_json
    from intact.zoo.lenet import load_lenet, read_lenet

    if train and weights:
        raise IntactError("--train makes weights and --weights takes them: give one of the two.")
    chosen = load_recipe(recipe)
    _make_folder(out)
    dataset = load_dataset(data.value, data_dir)
    command = _command(
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
        path = out / "trained.safetensors"
        schedule = "best" if data is not Data.cifar10 or bias is BiasChoice.all else "two-epoch"
        _train(dataset, bias.value, schedule, seed, path, command, resume=False)
        model = read_lenet(path, bias.value)
        path.unlink()  # float.safetensors will hold the same
    elif weights:
        model = read_lenet(weights, bias.value)
    else:
        model = load_lenet(data.value, bias.value)
    titles = {"none": "without biases", "last": "bias on the last layer", "all": "all biases"}
    names = {"digits": "digits", "cifar10": "CIFAR-10", "folder": f"images of {data_dir}"}
    with _bar() as bar:
        task = bar.add_task("", total=None)
        experiment = run_experiment(
            model,
            dataset,
            chosen,
            calibration=min(calibration, len(dataset.train_images)),
            title=f"LeNet ({titles[bias.value]}) on {names[data.value]}",
            command=command,
            seed=seed,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    write_experiment(experiment, out)
    if as_json:
        typer.echo(report_to_json(experiment.report))
    else:
        _show_report(experiment.report, out)


@train_app.command("lenet")
def train_lenet_command(
    data: DataOption = Data.digits,
    data_dir: DataDirOption = None,
    bias: BiasOption = BiasChoice.last,
    schedule: Annotated[
        ScheduleChoice,
        typer.Option(
            "--schedule",
            help="two-epoch: plain SGD, batches of 4. best: as good as LeNet gets (long).",
        ),
    ] = ScheduleChoice.best,
    seed: SeedOption = 0,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="Safetensors file for the weights.")
    ] = Path("lenet.safetensors"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from FILE.checkpoint if there is one.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train LeNet from a seed; interrupted with Ctrl-C, it goes on with --resume."""
    from intact.data import load_dataset

    dataset = load_dataset(data.value, data_dir)
    command = _command(
        "train",
        "lenet",
        data=data.value,
        data_dir=data_dir,
        bias=bias.value,
        schedule=schedule.value,
        seed=seed,
        out=out,
    )
    _make_folder(out.parent)
    trained = _train(dataset, bias.value, schedule.value, seed, out, command, resume=resume)
    facts = {"path": str(out), "correct": trained.correct, "total": trained.total}
    if as_json:
        typer.echo(json.dumps({**facts, "accuracy": trained.accuracy}))
    else:
        typer.echo(f"{out}: {trained.accuracy:.2%} on {trained.total:,} test images")


@app.command()
def inspect(program: ProgramArgument, as_json: JsonOption = False) -> None:
    """Show what a program consists of: ops, shapes, scales, multipliers, accumulator widths."""
    from intact.storage import load

    loaded = load(program)
    facts = _facts(loaded)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print(f"[bold]{program}[/bold]", highlight=False)
    console.print(
        f"{facts['bytes']:,} bytes, SHA-256 {facts['sha256']}\n"
        f"{facts['macs']:,} MACs per sample, {facts['parameter_bytes']:,} bytes of parameters, "
        f"accumulators of at most {facts['accumulator_bits']} bits",
        highlight=False,
        soft_wrap=True,
    )
    table = _table("op", "", "result", "codes", "scale", "zero", "multiplier", "acc bits", "MACs")
    for tensor in (facts["input"], *facts["ops"]):
        table.add_row(
            tensor["name"],
            tensor.get("op", "Input"),
            "×".join(map(str, tensor["shape"])),
            f"{tensor['type']} {tensor['qmin']}…{tensor['qmax']}",
            f"{tensor['scale']:.6g}",
            str(tensor["zero_point"]),
            _span(tensor.get("multiplier", []), tensor.get("shift")),
            str(tensor.get("accumulator_bits") or ""),
            f"{tensor['macs']:,}" if tensor.get("macs") else "",
        )
    console.print(table)


@app.command()
def evaluate(
    program: ProgramArgument,
    data: DataOption = Data.digits,
    data_dir: DataDirOption = None,
    engine: Annotated[
        EngineChoice, typer.Option("--engine", help="All give the same bits.")
    ] = EngineChoice.torch,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy of a program on the test set of a data set."""
    import numpy as np

    from intact.data import batches, load_dataset
    from intact.significance import wilson_interval
    from intact.storage import load

    loaded = load(program)
    dataset = load_dataset(data.value, data_dir)
    total, correct, done = len(dataset.test_images), 0, 0
    with _bar() as bar:
        task = bar.add_task("evaluating", total=total)
        for x, labels in batches(dataset.test_images, dataset.test_labels, 500):
            codes = loaded.codes(x, engine.value)
            correct += int((codes.reshape(len(x), -1).argmax(axis=1) == labels).sum())
            done += len(np.atleast_1d(labels))
            bar.update(task, completed=done)
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
        typer.echo(
            f"{correct / total:.2%} ({correct:,} of {total:,}), "
            f"95 % interval {low:.2%} to {high:.2%}"
        )


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that `intact lenet` left.")
    ],
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the web browser.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw report.html again from results.json, and show the table of stages."""
    from intact.report import render, report_from_json, report_to_json
    from intact.storage import write_atomically

    source = folder / "results.json"
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntactError(
            f"{source} cannot be read ({error}). Name a folder that `intact lenet -o` left."
        ) from error
    loaded = report_from_json(text)
    page = folder / "report.html"
    write_atomically(page, render(loaded).encode())
    if as_json:
        typer.echo(report_to_json(loaded))
    else:
        _show_report(loaded, folder)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


# -- showing -------------------------------------------------------------------------------------


def _show_report(report: Report, folder: Path) -> None:
    from intact.report import sentence
    from intact.staged import stage_table

    console = Console()
    console.print(f"[bold]{report.title}[/bold], recipe {report.recipe['name']}", highlight=False)
    console.print(f"\n{stage_table(report.stages)}\n", highlight=False, markup=False)
    last = report.stages[-1]
    console.print(f"{last.name}: {sentence(last, report.stages[0])}", highlight=False)
    for finding in report.diagnosis:
        if finding.severity != "note":
            console.print(f"{finding.severity}: {finding.message}", highlight=False, markup=False)
    console.print(
        f"\n{folder / 'program.safetensors'}  {report.program.bytes:,} bytes, float "
        f"{report.program.float_bytes:,}\n{folder / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )


def _facts(program: Program) -> dict[str, Any]:
    """What `inspect` shows, as plain values."""
    from intact.arithmetic import dyadic_shift
    from intact.ops import accumulates
    from intact.storage import to_bytes

    def tensor(name: str) -> dict[str, Any]:
        value = program.tensors[name]
        return {
            "name": name,
            "shape": list(value.shape),
            "type": value.qparams.type_name,
            "qmin": value.qparams.qmin,
            "qmax": value.qparams.qmax,
            "scale": value.qparams.scale[0],
            "zero_point": value.qparams.zero_point,
        }

    ops = []
    for op in program.ops:
        facts = {**tensor(op.name), "op": type(op).__name__, "inputs": list(op.inputs)}
        facts |= {"macs": program.macs(op), "bytes": program.op_bytes(op)}
        if accumulates(op):
            multiplier = program.parameters[f"{op.name}.multiplier"]
            dyadic = multiplier.dtype.kind == "i"
            facts["multiplier"] = multiplier.tolist()
            facts["shift"] = dyadic_shift(program.tensors[op.name].qparams.bits) if dyadic else None
            facts["accumulator_bits"] = program.accumulator_bits(op)
        ops.append(facts)
    return {
        "sha256": program.sha256,
        "bytes": len(to_bytes(program)),
        "parameter_bytes": program.parameter_bytes,
        "macs": sum(map(program.macs, program.ops)),
        "accumulator_bits": max((op.get("accumulator_bits", 0) for op in ops), default=0),
        "info": dict(program.info),
        "input": tensor(program.input),
        "output": program.output,
        "ops": ops,
    }


def _span(multiplier: list[float], shift: int | None) -> str:
    """`1234 / 2^16`, `900…1234 / 2^16`, or a float."""
    if not multiplier:
        return ""
    low, high = min(multiplier), max(multiplier)
    if shift is None:
        return f"{low:.6g}" if low == high else f"{low:.4g}…{high:.4g}"
    return f"{low}" + (f"…{high}" if high != low else "") + f" / 2^{shift}"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on standard error, on a terminal only."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        yield bar


# -- doing ---------------------------------------------------------------------------------------


def _train(
    dataset: Any, bias: Any, schedule: str, seed: int, out: Path, command: str, *, resume: bool
) -> Any:
    from intact.training import train_lenet

    with _bar() as bar:
        task = bar.add_task("training", total=None)

        def show(epoch: int, step: int, total: int, loss: float, accuracy: float) -> None:
            text = f"epoch {epoch}: loss {loss:.3f}, training accuracy {accuracy:.1%}"
            bar.update(task, description=text, completed=step, total=total)

        return train_lenet(
            dataset, bias, schedule, seed, out, command=command, resume=resume, progress=show
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IntactError(f"the folder {folder} cannot be made: {error}.") from error


def _command(*words: str, **options: object) -> str:
    """The command line that was given, in full, defaults spelled out."""
    parts = ["intact", *words]
    for name, value in options.items():
        flag = "-o" if name == "out" else f"--{name.replace('_', '-')}"
        if value is True:
            parts.append(flag)
        elif value is not None and value is not False:
            parts += [flag, str(value)]
    return shlex.join(parts)
