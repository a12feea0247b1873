"""`intact export`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from intact.cli.files import check_file, make_folder
from intact.cli.options import JsonOption, ProgramArgument
from intact.cli.showing import count, terminal


class FormatChoice(str, Enum):
    """Formats that a program can be written in."""

    onnx = "onnx"


class FlavourChoice(str, Enum):
    """Flavours, as `intact.export.onnx.export` takes them."""

    qdq = "qdq"
    qoperator = "qoperator"
    integer = "integer"


class IoChoice(str, Enum):
    """What goes in and comes out, as `intact.export.onnx.export` takes it."""

    float = "float"
    integer = "integer"


FORMS = {
    "fused": "fused operators",
    "float": "float operators on integers",
    "qlinear": "QLinearConv or QLinearMatMul",
    "integer": "ConvInteger or MatMulInteger",
}
"""How an exported layer is written, in words; `intact.export.onnx.Form` says why each is exact."""


def export(
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

    from intact.export.onnx import export as write_onnx
    from intact.export.onnx import forms, saturating
    from intact.storage import load

    loaded = load(program)
    path = out or program.with_suffix(f".{to.value}")
    check_file(path, program)
    make_folder(path.parent)
    write_onnx(loaded, path, flavour=flavour.value, io=io_choice.value)
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
    console = terminal()
    console.print(f"{path}  {facts['bytes']:,} bytes; layers: {', '.join(counts) or 'none'}")
    if risky:
        console.print(
            f"{count(len(risky), 'layer')} could saturate the int8 kernels of x86 CPUs without "
            "VNNI; --flavour integer is exact there too"
        )
