"""`intact certify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intact.cli.files import check_file, make_folder
from intact.cli.options import Data, DataDirOption, JsonOption, ProgramArgument, names_of
from intact.cli.pages import redraw
from intact.cli.showing import aligned, count, progress, terminal
from intact.errors import DataError

if TYPE_CHECKING:
    from intact.program import Program


def certify(
    program: ProgramArgument,
    data: Annotated[
        Data | None,
        typer.Option(
            "--data",
            help="Real inputs: the test images of a data set. If left out, the digits where they "
            "fit, else random floats in their place.",
        ),
    ] = None,
    data_dir: DataDirOption = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            metavar="INPUTS",
            help="Real inputs of your own instead: a folder of images, an image, or a .npy or .npz "
            "file with one array of samples.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", metavar="N", min=1, help="Of each kind of input; 1,000 if left out."
        ),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            "--engines",
            metavar="NAME[,NAME]",
            help="Compare these engines, such as native,onnxruntime; all, if left out.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Seed of the random codes.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="The JSON; else certificate.json beside PROGRAM."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that every engine here gives the program's codes, in every layer.

    Compares with the NumPy reference: on real inputs, on random codes and on adversarial ones.

    Exits with 1 if one value differs. docs/certificate.md says how to read the result.
    """
    if data is not None and source is not None:
        raise typer.BadParameter("--data and --inputs both name the real inputs: give one of them.")
    if data is None and data_dir is not None:
        raise typer.BadParameter("--data-dir says where the data is: give --data too.")
    named = names_of("--engines", engines)
    path = out or program.with_name("certificate.json")
    with progress("loading") as tell:
        from datetime import datetime, timezone

        from intact.certificate import certificate_table
        from intact.certifying import certify as compare
        from intact.storage import load, write_atomically

        loaded = load(program)
        check_file(path, program)
        inputs, description = _real_inputs(loaded, data, data_dir, source, samples)
        certificate = compare(
            loaded,
            inputs,
            samples=samples,
            engines=named,
            description=description,
            seed=seed,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            progress=tell,
        )
        make_folder(path.parent)
        write_atomically(path, certificate.to_json().encode())
        page = redraw(path.parent) if path.name == "certificate.json" else None
    if as_json:
        typer.echo(certificate.to_json(), nl=False)
    else:
        console = terminal()
        console.print(aligned(certificate_table(certificate), left=1))
        for reason, names in _by_reason(certificate.missing).items():
            console.print(f"not here: {', '.join(names)}: {reason}", soft_wrap=False)
        for note in certificate.notes:
            console.print(f"note: {note}", soft_wrap=False)
        for result in certificate.floats:
            if result.tolerated and result.samples_different:
                console.print(
                    f"note: {result.engine} rounds floats next to a tie otherwise: "
                    f"{count(result.samples_different, 'sample')} of {result.samples:,}",
                    soft_wrap=False,
                )
        console.print(f"\n{certificate.sentence()}", style="bold", soft_wrap=False)
        for reason in certificate.reasons():
            console.print(reason, soft_wrap=False)
        console.print(f"{path}" + (f"\n{page}  with the certificate" if page else ""))
    if not certificate.ok:
        raise typer.Exit(1)


def _real_inputs(
    program: Program,
    data: Data | None,
    data_dir: Path | None,
    source: Path | None,
    samples: int | None,
) -> tuple[Any, str]:
    """Inputs of a program, and what they are in words; None where nothing was named.

    samples  how many `certify` will take at most; None: as many as it does by default
    """
    if source is not None:
        import numpy as np

        from intact.certifying import SAMPLES
        from intact.inference import read_inputs

        given = read_inputs(program, source, most=samples or SAMPLES)
        if not given.names:
            raise DataError(f"{source} holds no samples.")
        return np.concatenate(list(given.slices())), f"{source.name}, given"
    if data is None:
        return None, ""
    from intact.data import load_dataset, to_input

    dataset = load_dataset(data.value, data_dir)
    images = dataset.test_images
    inputs = images if program.takes_pixels else to_input(images)
    return inputs, f"{dataset.name}, test images"


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> all that it is the reason of, in order."""
    names: dict[str, list[str]] = {}
    for name, reason in missing.items():
        names.setdefault(reason, []).append(name)
    return names
