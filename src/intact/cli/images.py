"""Options that say which samples, and how their images become inputs, for every command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intact.cli.options import numbers
from intact.cli.showing import terminal
from intact.errors import DataError

if TYPE_CHECKING:
    from intact.data.preprocessing import Preprocessing
    from intact.data.samples import Samples
    from intact.program import Program

__all__ = [
    "IMAGES",
    "SOURCE_HELP",
    "BuiltInDirOption",
    "CropOption",
    "ImageOptions",
    "MeanOption",
    "PresetChoice",
    "PresetOption",
    "ResizeOption",
    "SamplesOption",
    "SkipCorruptOption",
    "StdOption",
    "WorkersOption",
    "check_used",
    "open_for",
    "refuse_images",
    "show_remarks",
]


class PresetChoice(str, Enum):
    """Names of `intact.data.preprocessing.PRESETS`."""

    imagenet = "imagenet"
    caffe = "caffe"
    signed = "signed"
    unit = "unit"


SOURCE_HELP = (
    "a folder of images, with a folder per class or without classes; a .npy, .npz or .safetensors "
    "file; digits or cifar10; for several inputs, a file or a folder of .npy files with an array "
    "for each."
)
"""What a SOURCE can be, after a colon."""

IMAGES = "Images"
"""The heading of options, in the help, that are about images only."""

BuiltInDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Folder of cifar10's binary version."),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples", metavar="N", min=1, help="Take N of them, evenly over all; all if left out."
    ),
]
PresetOption = Annotated[
    PresetChoice | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        rich_help_panel=IMAGES,
        help="What becomes of pixels, as in the network's training. imagenet: 256, 224, mean and "
        "deviation of ImageNet. caffe: BGR from 0 to 255. signed: [-1, 1]. unit: [0, 1].",
    ),
]
ResizeOption = Annotated[
    int | None,
    typer.Option(
        "--resize",
        metavar="N",
        min=1,
        rich_help_panel=IMAGES,
        help="Shorter side of images in pixels, before the crop.",
    ),
]
CropOption = Annotated[
    str | None,
    typer.Option(
        "--crop",
        metavar="H[,W]",
        rich_help_panel=IMAGES,
        help="Size of the piece from the centre, in pixels.",
    ),
]
MeanOption = Annotated[
    str | None,
    typer.Option(
        "--mean",
        metavar="M[,M,M]",
        rich_help_panel=IMAGES,
        help="Subtract this from pixels between 0 and 1; one number, or one per channel.",
    ),
]
StdOption = Annotated[
    str | None,
    typer.Option("--std", metavar="S[,S,S]", rich_help_panel=IMAGES, help="Then divide by this."),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        min=0,
        rich_help_panel=IMAGES,
        help="Processes that decode images.",
    ),
]
SkipCorruptOption = Annotated[
    bool,
    typer.Option(
        "--skip-corrupt",
        rich_help_panel=IMAGES,
        help="Leave images out that cannot be read, and say which.",
    ),
]


@dataclass(frozen=True)
class ImageOptions:
    """What a command line says of how images become inputs; None where it says nothing."""

    preset: str | None
    resize: int | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def parse(
        cls,
        preset: PresetChoice | None,
        resize: int | None,
        crop: str | None,
        mean: str | None,
        std: str | None,
    ) -> ImageOptions:
        """The options of a command as they were given."""
        return cls(
            None if preset is None else preset.value,
            resize,
            None if crop is None else _crop(crop),
            None if mean is None else tuple(numbers("--mean", mean, float)),
            None if std is None else tuple(numbers("--std", std, float)),
        )

    @property
    def given(self) -> str:
        """The options that were given, in words: "--preset and --crop"; "" for none."""
        return _joined(self.names)

    @property
    def names(self) -> list[str]:
        """The options that were given."""
        return [f"--{name}" for name, value in vars(self).items() if value is not None]

    def applied(self, start: Preprocessing | None) -> Preprocessing | None:
        """What is done to images: the preset or else `start`, with what else is given in its place.

        None where neither the options nor `start` say anything. `DataError` where the options say
        a part and nothing says the rest.
        """
        from intact.data.preprocessing import PRESETS, Preprocessing

        if not self.given:
            return start
        if self.preset is not None:
            chosen = PRESETS[self.preset]
        elif start is not None:
            chosen = start
        elif self.mean is not None and self.std is not None:
            chosen = Preprocessing(mean=self.mean, std=self.std)
        else:
            raise DataError(
                "how pixels become the network's input is said only in part: give --preset, or "
                "both --mean and --std."
            )
        return replace(
            chosen,
            resize=chosen.resize if self.resize is None else self.resize,
            crop=chosen.crop if self.crop is None else self.crop,
            mean=self.mean or chosen.mean,
            std=self.std or chosen.std,
        )


def check_used(options: ImageOptions, *sources: Samples) -> None:
    """`DataError` for options about images where no source has any."""
    if options.given and all(source.preprocessing is None for source in sources):
        names = " and ".join(dict.fromkeys(source.name for source in sources))
        holds = "holds" if " and " not in names else "hold"
        raise DataError(
            f"{names} {holds} floats, which are taken as the network takes them: prepare them as "
            f"in its training, and leave {options.given} out. Such options are about images and "
            "arrays of uint8."
        )


def refuse_images(inputs: Sequence[str], options: ImageOptions, **others: object) -> None:
    """`DataError` for options about images where there are several inputs.

    others  options besides, with underscores for hyphens: those with a value were given
    """
    from intact.signature import listed

    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if names := [*options.names, *given]:
        raise DataError(
            f"the network has {len(inputs)} inputs, {listed(inputs)}, whose arrays are taken as "
            f"they are: prepare them as in its training, and leave {_joined(names)} out. Such "
            "options are about images, as the only input."
        )


def open_for(
    program: Program,
    source: str,
    options: ImageOptions,
    *,
    data_dir: Path | None,
    workers: int,
    skip_corrupt: bool,
    remark: Callable[[str], object],
) -> Samples:
    """The samples of a source, prepared as the program says unless the options say otherwise.

    Of a source that has a training and a test part, the test part, as in `intact quantize`. Of a
    program with several inputs, what `open_several` opens, and no options about images.

    remark  called with what the user should know: images that are left out, and options that
            differ from what the program carries
    """
    from intact.data.carried import carried_by
    from intact.data.preprocessing import PRESETS
    from intact.data.several import open_several
    from intact.data.sources import open_samples

    if len(program.inputs) > 1:
        refuse_images(
            program.inputs, options, data_dir=data_dir, workers=workers, skip_corrupt=skip_corrupt
        )
        shapes = {name: program.tensors[name].shape for name in program.inputs}
        return open_several(source, shapes, part="test")
    shape = program.tensors[program.input].shape
    carried = carried_by(program)
    start = carried
    if carried is None and program.takes_pixels and len(shape) == 3:
        start = replace(PRESETS["unit"], normalise=False)
    chosen = options.applied(start)
    if start is not None and chosen is not None and not start.normalise:
        if options.mean is not None or options.std is not None:
            raise DataError(
                "the program takes pixels as they are, with their normalisation inside: leave "
                "--mean and --std out."
            )
        chosen = replace(chosen, normalise=False)
    samples = open_samples(
        source,
        preprocessing=chosen,
        shape=shape,
        workers=workers,
        skip_corrupt=skip_corrupt,
        part="test",
        data_dir=data_dir,
        on_skip=lambda message: remark(f"left out: {message}"),
    )
    check_used(options, samples)
    if carried is not None and chosen is not None and chosen.settled(shape) != carried:
        remark(
            f"note: with {options.given} images are {chosen.settled(shape).words()}; the program "
            f"says: {carried.words()}"
        )
    return samples


def show_remarks(remarks: Iterable[str]) -> None:
    """Print what `open_for` remarked, on standard error, so that JSON stays JSON."""
    for remark in remarks:
        terminal(stderr=True).print(remark, style="yellow")


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _crop(text: str) -> tuple[int, int]:
    """`224` or `224,320` as height and width."""
    sides = numbers("--crop", text, int)
    if len(sides) > 2:
        raise typer.BadParameter(f"--crop takes a side, or height and width, not {text!r}.")
    return sides[0], sides[-1]
