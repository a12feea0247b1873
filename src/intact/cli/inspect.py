"""`intact inspect`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from intact.cli.options import JsonOption, ProgramArgument
from intact.cli.showing import aligned, terminal

if TYPE_CHECKING:
    from intact.program import Program


def inspect(program: ProgramArgument, as_json: JsonOption = False) -> None:
    """Show what a program consists of: ops, shapes, scales, multipliers, accumulator widths."""
    from intact.storage import load

    loaded = load(program)
    facts = _facts(loaded)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = terminal()
    console.print(program, style="bold")
    console.print(
        f"SHA-256 {facts['sha256']}\n"
        f"{facts['bytes']:,} bytes, {facts['parameter_bytes']:,} of them parameters\n"
        f"{facts['macs']:,} MACs per sample, in accumulators of at most "
        f"{facts['accumulator_bits']} bits"
    )
    if facts["images"]:
        console.print(f"images: {facts['images']}", soft_wrap=False)
    console.print()
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
        for tensor in (*facts["inputs"], *facts["ops"])
    ]
    console.print(aligned([heading, *rows]))
    if len(facts["outputs"]) > 1:
        console.print(f"\noutputs, in this order: {', '.join(facts['outputs'])}")


def _facts(program: Program) -> dict[str, Any]:
    """What `inspect` shows, as plain values."""
    from intact.arithmetic import dyadic_shift
    from intact.data.carried import carried_by
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

    carried = carried_by(program)
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
        "images": None if carried is None else carried.words(),
        "inputs": list(map(tensor, program.inputs)),
        "outputs": list(program.outputs),
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


def _codes(tensor: dict[str, Any]) -> str:
    """`uint8`, or with the range where it is not all of the type's: `uint8 0…94`."""
    low, high = tensor["qmin"], tensor["qmax"]
    full = high - low + 1 == 2 ** int(tensor["type"].lstrip("uint"))
    return str(tensor["type"]) if full else f"{tensor['type']} {low}…{high}"
