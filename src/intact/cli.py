"""The command line: parses, calls, shows. Exit status 0 is success, 1 an error, 2 wrong usage."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import sys
import tempfile
import warnings
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeAlias, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from intact import __version__
from intact.errors import DataError, EngineWarning, IntactError

if TYPE_CHECKING:
    from intact.data import Dataset
    from intact.program import Program
    from intact.report import Report
    from intact.training import Progress as TrainingProgress
    from intact.training import Trained

__all__ = ["main"]

FORMS = {
    "fused": "fused operators",
    "float": "float operators on integers",
    "qlinear": "QLinearConv or QLinearMatMul",
    "integer": "ConvInteger or MatMulInteger",
}
"""How an exported layer is written, in words; `intact.export.onnx.Form` says why each is exact."""

ZOO = {
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
    "mobilenetv2": "MobileNetV2",
    "mobilenetv3": "MobileNetV3",
}
"""Names and titles of `intact.zoo.NETWORKS`, which loads torch."""

Number = TypeVar("Number", int, float)
Tell: TypeAlias = Callable[[str, int, int], None]
"""Called as `tell(what is going on, steps done, steps in all)`."""

app = typer.Typer(
    name="intact",
    help="Integer-only quantization: what every step costs, and the program that ships.",
    epilog="Start with `intact lenet`, and open the lenet/report.html that it leaves.",
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
    native = "native"
    reference = "reference"
    torch = "torch"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class FormatChoice(str, Enum):
    onnx = "onnx"


class FlavourChoice(str, Enum):
    qdq = "qdq"
    qoperator = "qoperator"
    integer = "integer"


class IoChoice(str, Enum):
    float = "float"
    integer = "integer"


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
        metavar="PROGRAM", help="A program.safetensors, from `intact lenet` or `Program.save`."
    ),
]


def main() -> None:
    """Run the command line; an `IntactError` becomes one message and exit status 1.

    Wrong usage (status 2), Ctrl-C (130) and a closed pipe are typer's business.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path or a name that the terminal's encoding lacks is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    try:
        app(prog_name="intact")
    except IntactError as error:
        _console(stderr=True).print(f"error: {error}", style="red")
        sys.exit(1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """An engine's warning is for the user; where in the source it was raised is of no use then."""
    if issubclass(category, EngineWarning) and file is None:
        _console(stderr=True).print(f"warning: {message}", style="yellow")
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        (file or sys.stderr).write(text)


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
            help="How to quantize. lab: the textbook scheme. default: what loses least. FILE: "
            "your own choices, in TOML (docs/recipes.md).",
        ),
    ] = "default",
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
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="OUT", help="Folder for what the run leaves; made if need be."
        ),
    ] = Path("lenet"),
    as_json: JsonOption = False,
) -> None:
    """Quantize LeNet step by step, and report what every step costs.

    Prints the table of stages, and leaves in the folder OUT: float.safetensors,
    program.safetensors, predictions.npz, results.json, report.html.
    """
    if train and weights:
        raise typer.BadParameter("--train makes weights and --weights takes them: give one.")
    with _progress("loading") as tell:
        from intact.data import load_dataset
        from intact.experiment import run_experiment, write_experiment
        from intact.recipe import load_recipe
        from intact.report import report_to_json
        from intact.zoo.lenet import load_lenet, read_lenet

        chosen = load_recipe(recipe)
        _check_folder(out)
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
            schedule = (
                "two-epoch" if data is Data.cifar10 and bias is not BiasChoice.all else "best"
            )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "lenet.safetensors"
                _train(dataset, bias.value, schedule, seed, path, command, tell)
                model = read_lenet(path, bias.value)
        elif weights:
            model = read_lenet(weights, bias.value)
        else:
            model = load_lenet(data.value, bias.value)
        titles = {"none": "without biases", "last": "bias on the last layer", "all": "all biases"}
        names = {"digits": "digits", "cifar10": "CIFAR-10", "folder": f"images of {data_dir}"}
        experiment = run_experiment(
            model,
            dataset,
            chosen,
            calibration=min(calibration, len(dataset.train_images)),
            title=f"LeNet ({titles[bias.value]}) on {names[data.value]}",
            command=command,
            seed=seed,
            progress=tell,
        )
        tell("drawing the report", 0, 1)
        _make_folder(out)
        write_experiment(experiment, out)
    if as_json:
        typer.echo(report_to_json(experiment.report), nl=False)
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

    def train(dataset: Dataset, tell: Tell) -> Trained:
        return _train(dataset, bias.value, schedule.value, seed, out, command, tell, resume=resume)

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
                help="Passes over the training images; if left out, as many as take CIFAR-10 "
                "about an hour.",
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
        text = _command(
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
            from intact.training import network_schedule, train_network

            schedule = network_schedule(network, dataset.name, epochs)
            return train_network(
                network,
                dataset,
                schedule,
                seed,
                out,
                command=text,
                resume=resume,
                threads=threads,
                progress=_epochs(schedule.epochs, tell),
            )

        _train_to(out, f"{network}.safetensors", data, data_dir, train, as_json)

    command.__doc__ = (
        f"Train {title} from a seed, for `intact zoo` and `intact quantize`.\n\n"
        "Every finished epoch is kept: interrupted with Ctrl-C, it goes on with --resume."
    )
    train_app.command(network)(command)


for _network, _title in ZOO.items():
    _add_train_command(_network, _title)


@app.command()
def inspect(program: ProgramArgument, as_json: JsonOption = False) -> None:
    """Show what a program consists of: ops, shapes, scales, multipliers, accumulator widths."""
    from intact.storage import load

    loaded = load(program)
    facts = _facts(loaded)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = _console()
    console.print(program, style="bold")
    console.print(
        f"SHA-256 {facts['sha256']}\n"
        f"{facts['bytes']:,} bytes, {facts['parameter_bytes']:,} of them parameters\n"
        f"{facts['macs']:,} MACs per sample, in accumulators of at most "
        f"{facts['accumulator_bits']} bits\n"
    )
    heading = ("name", "op", "result", "codes", "scale", "zero", "multiplier", "acc", "MACs")
    rows = [
        (
            tensor["name"],
            tensor.get("op", "Input"),
            "×".join(map(str, tensor["shape"])),
            _codes(tensor),
            f"{tensor['scale']:.4g}",
            str(tensor["zero_point"]),
            _span(tensor.get("multiplier", []), tensor.get("shift")),
            str(tensor.get("accumulator_bits") or ""),
            f"{tensor['macs']:,}" if tensor.get("macs") else "",
        )
        for tensor in (facts["input"], *facts["ops"])
    ]
    console.print(_aligned([heading, *rows]))


@app.command("export")
def export_command(
    program: ProgramArgument,
    to: Annotated[FormatChoice, typer.Option("--to", help="The format.")] = FormatChoice.onnx,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="File to write; else beside PROGRAM, ending .onnx."
        ),
    ] = None,
    flavour: Annotated[
        FlavourChoice,
        typer.Option(
            "--flavour",
            help="qdq: what most engines make int8 kernels of. qoperator: QLinearConv, fastest in "
            "ONNX Runtime. integer: ConvInteger, exact on x86 CPUs without VNNI too.",
        ),
    ] = FlavourChoice.qdq,
    io_choice: Annotated[
        IoChoice,
        typer.Option(
            "--io", help="float: real values in and out. integer: codes, exact by construction."
        ),
    ] = IoChoice.float,
    as_json: JsonOption = False,
) -> None:
    """Write a program as an ONNX file that computes the same integers (docs/onnx.md)."""
    from collections import Counter

    from intact.export.onnx import export, forms, saturating
    from intact.storage import load

    loaded = load(program)
    path = out or program.with_suffix(f".{to.value}")
    _check_file(path, program)
    _make_folder(path.parent)
    export(loaded, path, flavour=flavour.value, io=io_choice.value)
    chosen = forms(loaded, flavour.value)
    risky = saturating(loaded, flavour.value)
    facts = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "program": loaded.sha256,
        "flavour": flavour.value,
        "io": io_choice.value,
        "forms": chosen,
        "saturate_without_vnni": risky,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    counts = [f"{n} as {FORMS[form]}" for form, n in Counter(chosen.values()).items()]
    console = _console()
    console.print(f"{path}  {facts['bytes']:,} bytes; layers: {', '.join(counts) or 'none'}")
    if risky:
        console.print(
            f"{_count(len(risky), 'layer')} could saturate the int8 kernels of x86 CPUs without "
            "VNNI; --flavour integer is exact there too"
        )


@app.command()
def evaluate(
    program: ProgramArgument,
    data: DataOption = Data.digits,
    data_dir: DataDirOption = None,
    engine: EngineOption = EngineChoice.auto,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy of a program on the test set of a data set."""
    with _progress("loading") as tell:
        from intact.data import batches, load_dataset
        from intact.engines import load_engine
        from intact.significance import percent, wilson_interval
        from intact.storage import load

        loaded = load(program)
        dataset = load_dataset(data.value, data_dir)
        _check_classes(loaded, dataset)
        run = load_engine(engine.value, loaded)
        total, correct, done = len(dataset.test_images), 0, 0
        for x, labels in batches(dataset.test_images, dataset.test_labels, 500):
            codes = run(loaded.quantize_input(x)).reshape(len(x), -1)
            correct += int((codes.argmax(axis=1) == labels).sum())
            done += len(labels)
            tell("evaluating", done, total)
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
        _console().print(
            f"{percent(correct / total, total)} ({correct:,} of {total:,}), "
            f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
        )


@app.command()
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
            "-o", "--out", metavar="FILE", help="Write all outputs to FILE: .csv, .json or .npy."
        ),
    ] = None,
    engine: EngineOption = EngineChoice.auto,
    threads: ThreadsOption = None,
    mean: Annotated[
        str,
        typer.Option(
            "--mean",
            metavar="M[,M,M]",
            help="Subtract this from pixels between 0 and 1, as in the training of the network; "
            "one number, or one per channel.",
        ),
    ] = "0.5",
    std: Annotated[
        str, typer.Option("--std", metavar="S[,S,S]", help="Then divide by this.")
    ] = "0.5",
    as_json: JsonOption = False,
) -> None:
    """Run a program on images or arrays of your own, and show its predictions.

    Prints per input the class with the largest output, and that output.
    """
    normalise = (_numbers("--mean", mean, float), _numbers("--std", std, float))
    with _progress("loading") as tell:
        from intact.engines import load_engine
        from intact.inference import check_suffix, infer, read_inputs
        from intact.storage import load

        if out is not None:
            check_suffix(out)
            _check_file(out, program)
        loaded = load(program)
        inputs = read_inputs(loaded, source, *normalise)
        total = len(inputs.names)
        tell("running", 0, total)
        predictions = infer(
            loaded,
            load_engine(engine.value, loaded, threads=threads),
            inputs,
            lambda done: tell("running", done, total),
        )
        if out is not None:
            _make_folder(out.parent)
            predictions.write(out)
    if as_json:
        typer.echo(json.dumps(predictions.to_list()))
        return
    rows = [
        (name, str(label), f"{score:.4g}")
        for name, label, score in zip(
            predictions.names, predictions.classes, predictions.scores, strict=True
        )
    ]
    console = _console()
    console.print(_aligned([("input", "class", "output"), *rows]))
    if out is not None:
        console.print(f"\n{out}  all outputs of {total:,} inputs")


@app.command()
def certify(
    program: ProgramArgument,
    data: Annotated[
        Data | None,
        typer.Option(
            "--data",
            help="Real inputs: the test images of a data set. If left out, the digits where they "
            "fit, else random floats in their place.",
        ),
    ] = None,
    data_dir: DataDirOption = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            metavar="INPUTS",
            help="Real inputs of your own instead: a folder of images, an image, or a .npy or .npz "
            "file with one array of samples.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", metavar="N", min=1, help="Of each kind of input; 1,000 if left out."
        ),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            "--engines",
            metavar="NAME[,NAME]",
            help="Compare these engines, such as native,onnxruntime; all, if left out.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Seed of the random codes.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="The JSON; else certificate.json beside PROGRAM."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that every engine here gives the program's codes, in every layer.

    Compares with the NumPy reference: on real inputs, on random codes and on adversarial ones.

    Exits with 1 if one value differs. docs/certificate.md says how to read the result.
    """
    if data is not None and source is not None:
        raise typer.BadParameter("--data and --inputs both name the real inputs: give one of them.")
    if data is None and data_dir is not None:
        raise typer.BadParameter("--data-dir says where the data is: give --data too.")
    named = _names("--engines", engines)
    path = out or program.with_name("certificate.json")
    with _progress("loading") as tell:
        from datetime import datetime, timezone

        from intact.certificate import certificate_table
        from intact.certifying import certify as compare
        from intact.storage import load, write_atomically

        loaded = load(program)
        _check_file(path, program)
        inputs, description = _real_inputs(loaded, data, data_dir, source, samples)
        certificate = compare(
            loaded,
            inputs,
            samples=samples,
            engines=named,
            description=description,
            seed=seed,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            progress=tell,
        )
        _make_folder(path.parent)
        write_atomically(path, certificate.to_json().encode())
        page = _redraw(path.parent) if path.name == "certificate.json" else None
    if as_json:
        typer.echo(certificate.to_json(), nl=False)
    else:
        console = _console()
        console.print(_aligned(certificate_table(certificate), left=1))
        for reason, names in _by_reason(certificate.missing).items():
            console.print(f"not here: {', '.join(names)}: {reason}", soft_wrap=False)
        for note in certificate.notes:
            console.print(f"note: {note}", soft_wrap=False)
        for result in certificate.floats:
            if result.tolerated and result.samples_different:
                console.print(
                    f"note: {result.engine} rounds floats next to a tie otherwise: "
                    f"{_count(result.samples_different, 'sample')} of {result.samples:,}",
                    soft_wrap=False,
                )
        console.print(f"\n{certificate.sentence()}", style="bold", soft_wrap=False)
        for reason in certificate.reasons():
            console.print(reason, soft_wrap=False)
        console.print(f"{path}" + (f"\n{page}  with the certificate" if page else ""))
    if not certificate.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    program: ProgramArgument,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N[,N]", help="Samples per call.")
    ] = "1,64",
    threads: Annotated[
        int,
        typer.Option("--threads", metavar="N", min=1, help="Threads of engines that can use many."),
    ] = 1,
    engines: Annotated[
        str | None,
        typer.Option(
            "--engines", metavar="NAME[,NAME]", help="Measure these engines; all, if left out."
        ),
    ] = None,
    codes: Annotated[
        bool,
        typer.Option(
            "--codes", help="From input codes to output codes, instead of float32 to float32."
        ),
    ] = False,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="Rounds of the measurement.")
    ] = 25,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a program is on each engine here, beside its float network.

    Contenders take turns in short segments; medians over all rounds, and their interquartile range.

    Exits with 1 if no engine could be measured.
    """
    batches = _numbers("--batch", batch, int)
    named = _names("--engines", engines)
    with _progress("loading") as tell:
        from intact.bench import FLOAT, bench_table
        from intact.bench import bench as measure
        from intact.storage import load

        result = measure(
            load(program),
            engines=named,
            batches=batches,
            threads=threads,
            codes=codes,
            rounds=rounds,
            progress=tell,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        console = _console()
        console.print(program, style="bold")
        console.print(
            f"{result.macs:,} MACs per sample; {_count(result.threads, 'thread')}; "
            f"{'codes to codes' if codes else 'float32 to float32'}; "
            f"{_count(rounds, 'round')}\n{result.machine['processor']}, "
            f"{_count(int(result.machine['cores']), 'core')}\n"
        )
        if result.measured:
            console.print(_aligned(bench_table(result), left=1))
        for name, reason in result.missing.items():
            console.print(f"not measured: {name}: {reason}", soft_wrap=False)
    if all(m.name == FLOAT for m in result.measured):
        raise typer.Exit(1)


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
    """Draw OUT/report.html again from OUT/results.json, and show the table of stages.

    The page shows OUT/certificate.json too, if there is one of the same program.
    """
    from intact.report import report_from_json, report_to_json

    loaded = report_from_json(
        _read_text(folder / "results.json", "Name a folder that `intact lenet` left.")
    )
    page = _draw(loaded, folder)
    if as_json:
        typer.echo(report_to_json(loaded), nl=False)
    else:
        _show_report(loaded, folder)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


# -- showing -------------------------------------------------------------------------------------


def _read_text(path: Path, advice: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntactError(f"{path} cannot be read: {_reason(error)}. {advice}") from error


def _draw(report: Report, folder: Path) -> Path:
    """Write the page of a report, with the certificate beside it if that is of its program."""
    from intact.certificate import Certificate
    from intact.report import render
    from intact.storage import write_atomically

    certificate, path = None, folder / "certificate.json"
    if path.exists():
        found = Certificate.from_json(_read_text(path, "Run `intact certify` again."))
        certificate = found if found.program == report.program.sha256 else None
    page = folder / "report.html"
    write_atomically(page, render(report, certificate).encode())
    return page


def _redraw(folder: Path) -> Path | None:
    """The page of the report in a folder, drawn again; None where there is no report."""
    from intact.report import report_from_json

    source = folder / "results.json"
    if not source.exists():
        return None
    return _draw(report_from_json(_read_text(source, "Run `intact lenet` again.")), folder)


def _real_inputs(
    program: Program,
    data: Data | None,
    data_dir: Path | None,
    source: Path | None,
    samples: int | None,
) -> tuple[Any, str]:
    """Inputs of a program, and what they are in words; None where nothing was named.

    samples  how many `certify` will take at most; None: as many as it does by default
    """
    if source is not None:
        import numpy as np

        from intact.certifying import SAMPLES
        from intact.inference import read_inputs

        given = read_inputs(program, source, most=samples or SAMPLES)
        if not given.names:
            raise DataError(f"{source} holds no samples.")
        return np.concatenate(list(given.slices())), f"{source.name}, given"
    if data is None:
        return None, ""
    from intact.data import load_dataset, to_input

    dataset = load_dataset(data.value, data_dir)
    return to_input(dataset.test_images), f"{dataset.name}, test images"


def _show_report(report: Report, folder: Path) -> None:
    from intact.report import sentence
    from intact.staged import stage_table

    console = _console()
    console.print(f"{report.title}, recipe {report.recipe.get('name', '')}", style="bold")
    console.print(f"\n{stage_table(report.stages)}\n")
    last = report.stages[-1]
    console.print(f"{last.name}: {sentence(last, report.stages[0])}.", soft_wrap=False)
    for finding in report.diagnosis:
        if finding.severity != "note":
            console.print(f"{finding.severity}: {finding.message}", soft_wrap=False)
    console.print(
        f"\n{folder / 'program.safetensors'}  {report.program.bytes:,} bytes, float "
        f"{report.program.float_bytes:,}\n{folder / 'report.html'}  the details, to look at"
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


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> all that it is the reason of, in order."""
    names: dict[str, list[str]] = {}
    for name, reason in missing.items():
        names.setdefault(reason, []).append(name)
    return names


def _span(multiplier: list[float], shift: int | None) -> str:
    """`1234 / 2^16`, `900…1234 / 2^16`, or a float."""
    if not multiplier:
        return ""
    low, high = min(multiplier), max(multiplier)
    if shift is None:
        return f"{low:.6g}" if low == high else f"{low:.4g}…{high:.4g}"
    return f"{low}" + (f"…{high}" if high != low else "") + f" / 2^{shift}"


def _count(number: int, what: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _codes(tensor: dict[str, Any]) -> str:
    """`uint8`, or with the range where it is not all of the type's: `uint8 0…94`."""
    low, high = tensor["qmin"], tensor["qmax"]
    full = high - low + 1 == 2 ** int(tensor["type"].lstrip("uint"))
    return str(tensor["type"]) if full else f"{tensor['type']} {low}…{high}"


def _aligned(rows: list[tuple[str, ...]], left: int = 2) -> str:
    """Columns of text, as wide as they need: a value that is cut off would be of no use.

    left  how many columns, from the first on, hold words; those behind hold numbers
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _console(*, stderr: bool = False) -> Console:
    """Shows text as it is: paths and names may look like markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(what: str) -> Iterator[Tell]:
    """A progress bar on standard error, on a terminal only; it is gone in the end."""
    console = _console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None, count="")

        def tell(what: str, done: int, total: int) -> None:
            count = f"{done:,}/{total:,}" if total > 1 else ""
            bar.update(task, description=what, completed=done, total=total, count=count)

        yield tell


# -- doing ---------------------------------------------------------------------------------------


def _train(
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
        with _progress("loading") as tell:
            from intact.data import load_dataset

            if out.is_dir():
                raise IntactError(f"{out} is a folder. Name a file in it: -o {out / usual}.")
            dataset = load_dataset(data.value, data_dir)
            _make_folder(out.parent)
            trained = train(dataset, tell)
    except KeyboardInterrupt:
        _console(stderr=True).print("\ninterrupted; --resume goes on after the last full epoch")
        raise
    facts = {"path": str(out), "correct": trained.correct, "total": trained.total}
    if as_json:
        typer.echo(json.dumps({**facts, "accuracy": trained.accuracy}))
    else:
        _console().print(f"{out}: {trained.accuracy:.2%} on {trained.total:,} test images")


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """`0.5` or `0.485,0.456,0.406` as numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers with commas between them, not {text!r}."
        ) from None


def _names(option: str, text: str | None) -> list[str] | None:
    """`native, onnxruntime` as names; None where the option was left out."""
    if text is None:
        return None
    names = [name for part in text.split(",") if (name := part.strip())]
    if not names:
        raise typer.BadParameter(f"{option} takes names with commas between them, not {text!r}.")
    return names


def _check_classes(program: Program, dataset: Dataset) -> None:
    outputs = math.prod(program.tensors[program.output].shape)
    if len(dataset.classes) > outputs:
        raise DataError(
            f"the program tells {outputs} classes apart, but {dataset.name} has "
            f"{len(dataset.classes)}. Evaluate it on the data that its network was trained for."
        )


def _check_folder(folder: Path) -> None:
    """Raise `IntactError` unless files can be written to a folder, which need not exist yet.

    It is made only when there is something to put into it: a run that fails leaves nothing.
    """
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if not existing.is_dir():
        raise IntactError(f"{existing} is a file, not a folder. Choose another folder with -o.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise IntactError(f"the folder {existing} is read-only. Choose another folder with -o.")


def _check_file(path: Path, program: Path) -> None:
    """Raise `IntactError` unless a file can be written there that is not the program itself.

    Its folder need not exist yet.
    """
    if path.is_dir():
        raise IntactError(f"{path} is a folder. Name a file in it with -o.")
    if path.exists() and program.exists() and path.samefile(program):
        raise IntactError(f"{path} is the program. Name another file with -o.")
    _check_folder(path.parent)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IntactError(
            f"the folder {folder} cannot be made: {_reason(error)}. Choose another one with -o."
        ) from error


def _reason(error: Exception) -> str:
    """What the system says about a file, without its number and the name again."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def _command(*words: str, **options: object) -> str:
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
