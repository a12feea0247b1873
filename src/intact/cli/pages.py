"""Reports: their pages on disk, and what a terminal shows of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from intact.cli.files import read_text
from intact.cli.showing import terminal

if TYPE_CHECKING:
    from intact.report import Report


def draw(report: Report, folder: Path) -> Path:
    """Write the page of a report, with the certificate beside it if that is of its program."""
    from intact.certificate import Certificate
    from intact.report import render
    from intact.storage import write_atomically

    certificate, path = None, folder / "certificate.json"
    if path.exists():
        found = Certificate.from_json(read_text(path, "Run `intact certify` again."))
        certificate = found if found.program == report.program.sha256 else None
    page = folder / "report.html"
    write_atomically(page, render(report, certificate).encode())
    return page


def redraw(folder: Path) -> Path | None:
    """The page of the report in a folder, drawn again; None where there is no report."""
    from intact.report import report_from_json

    source = folder / "results.json"
    if not source.exists():
        return None
    return draw(report_from_json(read_text(source, "Run the experiment again.")), folder)


def show_report(report: Report, folder: Path) -> None:
    """Print a report that is in a folder: its table of stages, problems, and where to look."""
    from intact.report import outputs_note, sentence
    from intact.staged import stage_table

    console = terminal()
    console.print(f"{report.title}, recipe {report.recipe.get('name', '')}", style="bold")
    console.print(f"\n{stage_table(report.stages)}\n")
    last = report.stages[-1]
    console.print(f"{last.name}: {sentence(last, report.stages[0])}.", soft_wrap=False)
    if note := outputs_note(report):
        console.print(note, soft_wrap=False)
    for finding in report.diagnosis:
        if finding.severity != "note":
            console.print(f"{finding.severity}: {finding.message}", soft_wrap=False)
    console.print(
        f"\n{folder / 'program.safetensors'}  {report.program.bytes:,} bytes, float "
        f"{report.program.float_bytes:,}\n{folder / 'report.html'}  the details, to look at"
    )
