"""The command line in the process of the tests, and what its experiments leave and measure."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from intact import cli

FILES = [
    "float.safetensors", "predictions.npz", "program.safetensors", "report.html", "results.json",
]  # fmt: skip
STAGES = ["float", "weights", "activations", "bias-unscaled", "integer"]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def intact_(*arguments: object) -> Ran:
    """The command line in this process; 80 columns, no terminal."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    argv = ["intact", *map(str, arguments)]
    with (
        patch.object(sys, "argv", argv),
        patch.dict(os.environ, COLUMNS="80"),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    return Ran(code, out.getvalue(), err.getvalue())
