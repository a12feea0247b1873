"""The report of a run: one value, written as JSON and as one self-contained HTML page."""

from __future__ import annotations

from intact.report.json import report_from_json, report_to_json
from intact.report.page import render
from intact.report.value import ProgramFacts, Report
from intact.report.words import outputs_note, sentence, verdict

__all__ = [
    "ProgramFacts",
    "Report",
    "outputs_note",
    "render",
    "report_from_json",
    "report_to_json",
    "sentence",
    "verdict",
]
