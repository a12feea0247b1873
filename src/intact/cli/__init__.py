"""The command line: parses, calls, shows. Exit status 0 is success, 1 an error, 2 wrong usage."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, TextIO

import typer

from intact import __version__
from intact.cli import (
    bench,
    certify,
    check,
    evaluate,
    export,
    inspect,
    lenet,
    quantize,
    report,
    run,
    train,
    zoo,
)
from intact.cli.showing import terminal
from intact.errors import DataWarning, EngineWarning, IntactError, ModelWarning

__all__ = ["main"]

app = typer.Typer(
    name="intact",
    help="Integer-only quantization: what every step costs, and the program that ships.",
    epilog="Start with `intact lenet`, and open the lenet/report.html that it leaves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
        terminal(stderr=True).print(f"error: {error}", style="red")
        sys.exit(1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our warnings are for the user; where in the source they were raised is of no use then."""
    if issubclass(category, EngineWarning | ModelWarning | DataWarning) and file is None:
        terminal(stderr=True).print(f"warning: {message}", style="yellow")
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


app.command("lenet")(lenet.lenet)
app.command("check")(check.check)
app.command("quantize")(quantize.quantize)
app.command("inspect")(inspect.inspect)
app.command("export")(export.export)
app.command("evaluate")(evaluate.evaluate)
app.command("run")(run.run)
app.command("certify")(certify.certify)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("zoo")(zoo.zoo)
app.add_typer(train.app, name="train")
