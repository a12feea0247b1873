"""`intact certify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from intact.cli.files import check_file, make_folder
from intact.cli.images import (
    SOURCE_HELP,
    BuiltInDirOption,
    CropOption,
    ImageOptions,
    MeanOption,
    PresetOption,
    ResizeOption,
    SkipCorruptOption,
    StdOption,
    WorkersOption,
    open_for,
    show_remarks,
)
from intact.cli.options import JsonOption, ProgramArgument, names_of
from intact.cli.pages import redraw
from intact.cli.showing import aligned, count, progress, terminal


def certify(
    program: ProgramArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help=f"Real inputs: {SOURCE_HELP} If left out, random floats take their place.",
        ),
    ] = None,
    data_dir: BuiltInDirOption = None,
    preset: PresetOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    workers: WorkersOption = 0,
    skip_corrupt: SkipCorruptOption = False,
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
    images = ImageOptions.parse(preset, resize, crop, mean, std)
    if data is None and (data_dir is not None or images.given or skip_corrupt):
        raise typer.BadParameter(
            "--data-dir, --skip-corrupt and options about images are about data: give --data too."
        )
    remarks: dict[str, None] = {}  # a set that keeps its order
    named = names_of("--engines", engines)
    path = out or program.with_name("certificate.json")
    with progress("loading") as tell:
        from datetime import datetime, timezone

        from intact.certificate import certificate_table
        from intact.certifying import SAMPLES
        from intact.certifying import certify as compare
        from intact.storage import load, write_atomically

        loaded = load(program)
        check_file(path, program)
        inputs, description = None, ""
        if data is not None:
            import numpy as np

            from intact.data.carried import pixels_alone
            from intact.data.checking import check_pixel_values
            from intact.signature import unwrapped, wrapped

            real = open_for(
                loaded,
                data,
                images,
                data_dir=data_dir,
                workers=workers,
                skip_corrupt=skip_corrupt,
                remark=remarks.setdefault,
            )
            taken = real.take(samples or SAMPLES).batches(SAMPLES)
            parts = zip(*(wrapped(x, loaded.inputs) for x, _ in taken), strict=True)
            inputs, description = unwrapped(map(np.concatenate, parts)), real.name
            if pixels_alone(loaded):
                check_pixel_values(inputs, real.name)
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
    show_remarks(remarks)
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


def _by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> all that it is the reason of, in order."""
    names: dict[str, list[str]] = {}
    for name, reason in missing.items():
        names.setdefault(reason, []).append(name)
    return names
