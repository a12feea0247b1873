"""What `intact zoo` lists: parameters, work, and the accuracies that its commands give.

    python benchmarks/zoo.py [NAME ...]

Runs the very commands that `intact zoo` shows, of all networks or of those that are named, and
writes what they find to src/intact/zoo/measured.json; rows that are not named stay as they are.
Networks without shipped weights get no accuracies. CIFAR-10 is looked for as `intact` does
(INTACT_DATA_DIR). Minutes for a LeNet, up to an hour for a MobileNet on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intact.capturing import capture
from intact.ops import macs
from intact.zoo import BIASES, NETWORKS, LeNet

FILE = Path(__file__).parent.parent / "src" / "intact" / "zoo" / "measured.json"


@dataclass(frozen=True)
class Entry:
    """A network of the zoo on a data set, and the command that quantizes it, less its `-o`."""

    name: str
    title: str
    about: str
    data: str
    model: nn.Module
    weights: str
    command: tuple[str, ...]


def entries() -> list[Entry]:
    """Every row of the list, in its order."""
    lenets = [
        Entry(
            f"lenet-{bias}",
            "LeNet",
            {"none": "no biases", "last": "bias on the last layer", "all": "all biases"}[bias],
            data,
            LeNet(bias),
            f"lenet-{data}-{bias}",
            ("lenet", "--data", data, "--bias", bias),
        )
        for data in ("digits", "cifar10")
        for bias in BIASES
    ]
    others = [
        Entry(
            name,
            network.title,
            network.about,
            "cifar10",
            network.make(),
            f"{name}-cifar10",
            ("quantize", "--model", name, "--data", "cifar10"),
        )
        for name, network in NETWORKS.items()
    ]
    return [*lenets, *others]


def described(entry: Entry) -> dict[str, Any]:
    """A row of the file, without accuracies."""
    network = capture(entry.model, torch.zeros(1, 3, 32, 32))
    shapes = {name: tensor.shape for name, tensor in network.tensors.items()}
    weights = {name: tuple(tensor.shape) for name, tensor in network.parameters.items()}
    return {
        "name": entry.name,
        "title": entry.title,
        "about": entry.about,
        "data": entry.data,
        "parameters": sum(p.numel() for p in entry.model.parameters()),
        "macs": sum(
            macs(
                op,
                [shapes[i] for i in op.inputs],
                shapes[op.name],
                weights.get(f"{op.name}.weight"),
            )
            for op in network.ops
        ),
        "command": " ".join(("intact", *entry.command)),
        "measured": None,
    }


def measured(entry: Entry) -> dict[str, Any] | None:
    """What the command finds; None where there are no trained weights."""
    if not (files("intact.zoo") / "weights" / f"{entry.weights}.safetensors").is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "intact", *entry.command, "-o", folder, "--json"]
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    report = json.loads(ran.stdout)
    first, last = report["stages"][0], report["stages"][-1]
    return {
        "images": last["total"],
        "float_correct": first["correct"],
        "integer_correct": last["correct"],
        "p_value": last["p_value"],
        "sqnr_db": round(last["sqnr_db"], 2),
        "float_bytes": report["program"]["float_bytes"],
        "program_bytes": report["program"]["bytes"],
        "program": report["program"]["sha256"],
        "recipe": report["recipe"]["name"],
        "versions": report["versions"],
    }


def main() -> None:
    """Measure what was asked for, and write the file."""
    known = entries()
    names = list(dict.fromkeys(entry.name for entry in known))
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    chosen = parser.parse_args().names or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(names)}")
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []
    rows = {(row["name"], row["data"]): row for row in before}
    for entry in known:
        key = entry.name, entry.data
        old = rows.get(key, {}).get("measured")
        found = measured(entry) if entry.name in chosen else old
        rows[key] = {**described(entry), "measured": found}
        print(f"{entry.name} on {entry.data}: {found and found['integer_correct']}", flush=True)
        write([rows[key] for e in known if (key := (e.name, e.data)) in rows])


def write(rows: list[dict[str, Any]]) -> None:
    """The file, after every row: measuring all takes hours, and may be interrupted."""
    FILE.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
