"""`intact zoo`."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import typer

from intact.cli.options import JsonOption
from intact.cli.showing import aligned, terminal

MEASURED = "measured.json"
"""Beside the networks, written by benchmarks/zoo.py; reading it here needs no torch."""


def zoo(as_json: JsonOption = False) -> None:
    """List the networks that come with intact, and what quantizing them costs.

    Accuracies are those that the commands below the table give, on all test images.
    """
    text = (files("intact") / "zoo" / MEASURED).read_text(encoding="utf-8")
    if as_json:
        typer.echo(text, nl=False)
        return
    networks: list[dict[str, Any]] = json.loads(text)
    heading = ("network", "data", "parameters", "MACs", "float", "integer", "p")
    console = terminal()
    console.print(aligned([heading, *map(_row, networks)]))
    console.print("\nThe commands that give the accuracies; others have to be trained first:")
    commands = {
        row["name"]: row["command"] if row["measured"] else f"intact train {row['name']}"
        for row in networks
    }
    console.print(aligned(list(commands.items())))


def _row(network: dict[str, Any]) -> tuple[str, ...]:
    found = network["measured"]
    return (
        network["name"],
        network["data"],
        f"{network['parameters']:,}",
        f"{network['macs']:,}",
        *(("", "", "") if found is None else _accuracies(found)),
    )


def _accuracies(found: dict[str, Any]) -> tuple[str, str, str]:
    from intact.significance import percent

    total = found["images"]
    return (
        percent(found["float_correct"] / total, total),
        percent(found["integer_correct"] / total, total),
        f"{found['p_value']:.2g}",
    )
