"""`intact report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from intact.cli.files import read_text
from intact.cli.options import JsonOption
from intact.cli.pages import draw, show_report


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that `intact quantize` or `lenet` left.")
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
        read_text(folder / "results.json", "Name a folder that `intact quantize` or `lenet` left.")
    )
    page = draw(loaded, folder)
    if as_json:
        typer.echo(report_to_json(loaded), nl=False)
    else:
        show_report(loaded, folder)
    if open_page:
        webbrowser.open(page.resolve().as_uri())
