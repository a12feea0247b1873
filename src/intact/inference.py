"""Running a program on a user's own inputs: images or arrays in, predictions out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.data import spread
from intact.data.arrays import SUFFIXES as ARRAY_SUFFIXES
from intact.data.arrays import Rows, npz_bytes, read_arrays
from intact.data.checking import first_where, shape_hint
from intact.data.folder import find_images, read_images
from intact.data.preprocessing import Preprocessing
from intact.engines import Engine
from intact.errors import DataError
from intact.program import Program
from intact.signature import wrapped
from intact.storage import write_atomically

__all__ = ["SUFFIXES", "Inputs", "Predictions", "infer", "read_inputs"]

SLICE = 256
"""Samples that are decoded and run at a time: memory does not grow with the number of images."""
SUFFIXES = (".csv", ".json", ".npy", ".npz")
"""Of files that predictions can be written to."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a program shall be run on.

    names   one per sample: paths of images below their folder, or positions in an array
    slices  called for an iterator over batches, float32 or codes `[n, *input shape]`, in order
    normalised  whether they are pixels to which a mean and a standard deviation were applied
    """

    names: tuple[str, ...]
    slices: Callable[[], Iterator[Array]]
    normalised: bool = False


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a program says about inputs.

    names    as in `Inputs`
    outputs  name -> float32 `[N, *output shape]`, the dequantized codes, in the program's order
    """

    names: tuple[str, ...]
    outputs: Mapping[str, npt.NDArray[np.float32]]

    @property
    def output(self) -> npt.NDArray[np.float32]:
        """The first output, `[N, *output shape]`: where there are classes, their scores."""
        return next(iter(self.outputs.values()))

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """The index of each sample's largest output, the first one of several; int64 `[N]`."""
        classes: npt.NDArray[np.int64] = self._flat.argmax(axis=1)
        return classes

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """The largest output of each sample, float32 `[N]`."""
        scores: npt.NDArray[np.float32] = self._flat.max(axis=1)
        return scores

    @property
    def _flat(self) -> npt.NDArray[np.float32]:
        return self.output.reshape(len(self.output), int(np.prod(self.output.shape[1:])))

    def to_list(self) -> list[dict[str, Any]]:
        """Per sample its name, class, and output as nested lists; of several all by their names."""
        listed = []
        for i, (name, label) in enumerate(zip(self.names, self.classes, strict=True)):
            values = {output: array[i].tolist() for output, array in self.outputs.items()}
            shown = {"outputs": values} if len(values) > 1 else {"output": self.output[i].tolist()}
            listed.append({"input": name, "class": int(label), **shown})
        return listed

    def write(self, path: Path) -> None:
        """Write all outputs to a file, atomically; its suffix, one of `SUFFIXES`, says how.

        .csv   a line per sample: name, class, and every output in row-major order
        .json  `to_list`
        .npy   the array `output` alone
        .npz   all outputs under their names

        Several outputs go to .json or .npz only: `DataError` for another.
        """
        check_suffix(path)
        if len(self.outputs) > 1 and path.suffix not in (".json", ".npz"):
            raise DataError(
                f"the program has {len(self.outputs)} outputs, and {path.suffix} holds one: write "
                ".npz or .json."
            )
        if path.suffix == ".csv":
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            flat = self._flat
            writer.writerow(["input", "class", *(f"output{i}" for i in range(flat.shape[1]))])
            for name, label, row in zip(self.names, self.classes, flat, strict=True):
                writer.writerow([name, int(label), *map(str, row)])
            data = text.getvalue().encode()
        elif path.suffix == ".json":
            data = (json.dumps(self.to_list()) + "\n").encode()
        elif path.suffix == ".npz":
            data = npz_bytes(self.outputs)
        else:
            buffer = io.BytesIO()
            np.save(buffer, self.output, allow_pickle=False)
            data = buffer.getvalue()
        write_atomically(path, data)


def check_suffix(path: Path) -> None:
    """Raise `DataError` unless predictions can be written to such a file."""
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"predictions cannot be written to {path.name}: its name must end in "
            f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}."
        )


def read_inputs(
    program: Program,
    source: Path,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    most: int | None = None,
) -> Inputs:
    """The samples of a folder of images, of one image, or of a file of arrays.

    mean, std  how pixels are normalised, as the network was trained; see `data.to_input`. Arrays
               are taken as they are, and so are the pixels of images for a program that takes them
    most       take at most so many of the samples, spread over all; None: all of them

    Images are resized to the program's input, which must then be `[3, H, W]`, or `[1, H, W]` for
    gray ones. An array, see `data.arrays.read_arrays`, is `[N, *input shape]`: floats without NaN,
    or codes of the input's own type. What does not fit raises `DataError` or `ProgramError`.
    """
    if source.suffix.lower() in ARRAY_SUFFIXES:
        array, _ = read_arrays(source)
        _check_array(program, array, source)
        chosen = spread(array.shape[0], most)
        parts = [chosen[i : i + SLICE] for i in range(0, len(chosen), SLICE)]
        return Inputs(tuple(map(str, chosen)), lambda: (array[part] for part in parts))
    preprocessing = Preprocessing(mean=tuple(mean), std=tuple(std))
    shape = preprocessing.shape(program.tensors[program.input].shape)
    if not source.exists():
        raise DataError(
            f"{source} does not exist. Name a folder of images, an image, or a .npy, .npz or "
            ".safetensors file."
        )
    root, files = (source, find_images(source)) if source.is_dir() else (source.parent, [source])
    files = [files[i] for i in spread(len(files), most)]
    names = tuple(path.relative_to(root).as_posix() for path in files)

    def slices() -> Iterator[Array]:
        for i in range(0, len(files), SLICE):
            pixels = read_images(files[i : i + SLICE], preprocessing, shape)
            yield pixels if program.takes_pixels else preprocessing.floats(pixels)

    return Inputs(names, slices, normalised=not program.takes_pixels)


def _check_array(program: Program, array: Rows, path: Path) -> None:
    """Refuse what the program would refuse, before a thousand samples have been run."""
    spec = program.tensors[program.input]
    floats, own = array.dtype.kind == "f", array.dtype == spec.qparams.dtype
    if array.shape[1:] != spec.shape or not (floats or own):
        wanted = f"[N, {', '.join(map(str, spec.shape))}]"
        raise DataError(
            f"{path} holds {array.dtype.name} {list(array.shape)}, but the program takes float32 "
            f"{wanted}, normalised as in the training of its network, or codes, "
            f"{spec.qparams.dtype.name} {wanted}.{shape_hint(array.shape[1:], spec.shape)}"
        )
    for start in range(0, array.shape[0], SLICE):
        part = array[np.arange(start, min(start + SLICE, array.shape[0]))]
        if own:
            program.check_codes(part)
        elif (found := first_where(np.isnan(part))) is not None:
            sample, place = found
            raise DataError(
                f"{path} holds a NaN in sample {start + sample}, at {place}; a NaN has no code. "
                "Look for a division by zero or an overflow in whatever produced it."
            )


def infer(
    program: Program,
    engine: Engine,
    inputs: Inputs,
    progress: Callable[[int], object] | None = None,
) -> Predictions:
    """Run an engine of the program over all inputs.

    progress  called after each slice with the number of samples done
    """
    tell = progress or (lambda _: None)
    n = len(inputs.names)
    shapes = {name: program.tensors[name].shape for name in program.outputs}
    outputs = {name: np.empty((n, *shape), np.float32) for name, shape in shapes.items()}
    done = 0
    for batch in inputs.slices():
        codes = program.quantize_input(batch) if batch.dtype.kind == "f" else batch
        real = wrapped(program.dequantize_output(engine(codes)), program.outputs)
        for name, part in zip(program.outputs, real, strict=True):
            outputs[name][done : done + len(batch)] = part
        done += len(batch)
        tell(done)
    return Predictions(inputs.names, outputs)
