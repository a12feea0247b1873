"""`intact bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from intact.cli.options import JsonOption, ProgramArgument, names_of, numbers
from intact.cli.showing import aligned, count, progress, terminal


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
    batches = numbers("--batch", batch, int)
    named = names_of("--engines", engines)
    with progress("loading") as tell:
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
        console = terminal()
        console.print(program, style="bold")
        console.print(
            f"{result.macs:,} MACs per sample; {count(result.threads, 'thread')}; "
            f"{'codes to codes' if codes else 'float32 to float32'}; "
            f"{count(rounds, 'round')}\n{result.machine['processor']}, "
            f"{count(int(result.machine['cores']), 'core')}\n"
        )
        if result.measured:
            console.print(aligned(bench_table(result), left=1))
        for name, reason in result.missing.items():
            console.print(f"not measured: {name}: {reason}", soft_wrap=False)
    if all(m.name == FLOAT for m in result.measured):
        raise typer.Exit(1)
