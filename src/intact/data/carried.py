"""The preprocessing that a program carries, as TOML in its `info`.

With it, whoever runs the program on images prepares them as they were when it was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import tomli

from intact.data.preprocessing import Interpolation, Order, Preprocessing
from intact.errors import IntactError, StorageError
from intact.ops import Shape
from intact.program import Program
from intact.strict_json import read_value

__all__ = ["KEY", "carried_by", "from_toml", "info_of", "pixels_alone", "to_toml"]

KEY = "preprocessing"
"""Its key in `Program.info`."""


@dataclass(frozen=True)
class _Table:
    """The keys of the TOML, explained in docs/program-format.md; None for one that is absent."""

    resize: int | None
    crop: tuple[int, int]
    interpolation: Interpolation
    order: Order
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def to_toml(preprocessing: Preprocessing, shape: Shape) -> str:
    """The preprocessing of a network that takes samples of this shape, as canonical TOML.

    Two that do the same to every image are the same text. Floats have the digits that read back to
    the same bits. `DataError` for one that does not fit the network.
    """
    settled = preprocessing.settled(shape)
    table = {
        "resize": settled.resize,
        "crop": settled.crop,
        "interpolation": settled.interpolation,
        "order": settled.order,
        "mean": settled.mean if settled.normalise else None,
        "std": settled.std if settled.normalise else None,
    }
    # Of numbers, lists and words without special characters, JSON is TOML.
    return "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items() if v is not None)


def from_toml(text: str) -> Preprocessing:
    """What `to_toml` wrote; anything else is a `StorageError` or a `DataError`."""
    try:
        table = tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{KEY} is not TOML: {error}.") from error
    absent = dict.fromkeys(("resize", "mean", "std"))
    read: _Table = read_value({**absent, **table}, _Table, KEY)
    if (read.mean is None) != (read.std is None):
        raise StorageError(f"{KEY} must have both mean and std, or none of them.")
    return Preprocessing(
        resize=read.resize,
        crop=(read.crop[0], read.crop[1]),
        mean=(0.0,) if read.mean is None else read.mean,
        std=(1.0,) if read.std is None else read.std,
        interpolation=read.interpolation,
        order=read.order,
        normalise=read.mean is not None,
    )


def info_of(preprocessing: Preprocessing, shape: Shape) -> Mapping[str, str]:
    """What the `info` of a program says of its preprocessing.

    shape  of a sample of the program
    """
    return {KEY: to_toml(preprocessing, shape)}


def carried_by(program: Program) -> Preprocessing | None:
    """The preprocessing that a program carries, settled; None if it carries none.

    `StorageError` where a file says what cannot be, or what its program cannot take.
    """
    text = program.info.get(KEY)
    if text is None:
        return None
    try:
        found = from_toml(text).settled(program.tensors[program.input].shape)
    except IntactError as error:
        raise StorageError(
            f"what the program says of how images become its input cannot be: {error} Make it "
            "again with `intact quantize`."
        ) from error
    if not found.normalise and not program.takes_pixels:
        raise StorageError(
            "the program says that it takes pixels as they are, but its input has another grid. "
            "Make it again with `intact quantize`."
        )
    return found


def pixels_alone(program: Program) -> bool:
    """Whether a program says that it takes pixels as they are, so that no other floats will do."""
    carried = carried_by(program)
    return carried is not None and not carried.normalise
