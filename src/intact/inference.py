"""Running a program on a user's own inputs: images or arrays in, predictions out."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.arithmetic import dequantize
from intact.data import spread, to_input
from intact.data.folder import find_images, read_images
from intact.engines import Engine
from intact.errors import DataError
from intact.program import Program
from intact.storage import write_atomically

__all__ = ["SUFFIXES", "Inputs", "Predictions", "infer", "read_inputs"]

SLICE = 256
"""Samples that are decoded and run at a time: memory does not grow with the number of images."""
SUFFIXES = (".csv", ".json", ".npy")
"""Of files that predictions can be written to."""
DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What reading a .npz file raises that is damaged or packed in an unknown way."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a program shall be run on.

    names   one per sample: paths of images below their folder, or positions in an array
    slices  called for an iterator over batches, float32 or codes `[n, *input shape]`, in order
    """

    names: tuple[str, ...]
    slices: Callable[[], Iterator[Array]]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a program says about inputs.

    names   as in `Inputs`
    output  float32 `[N, *output shape]`, the dequantized output codes
    """

    names: tuple[str, ...]
    output: npt.NDArray[np.float32]

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
        """Per sample its name, class, and output as nested lists."""
        return [
            {"input": name, "class": int(label), "output": output.tolist()}
            for name, label, output in zip(self.names, self.classes, self.output, strict=True)
        ]

    def write(self, path: Path) -> None:
        """Write all outputs to a file, atomically; its suffix, one of `SUFFIXES`, says how.

        .csv   a line per sample: name, class, and every output in row-major order
        .json  `to_list`
        .npy   the array `output` alone
        """
        check_suffix(path)
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
    """The samples of a folder of images, of one image, or of a .npy or .npz file.

    mean, std  how pixels are normalised, as the network was trained; see `data.to_input`. Arrays
               are taken as they are
    most       take at most so many of the samples, spread over all; None: all of them

    Images are resized to the program's input, which must then be `[3, H, W]`. An array is
    `[N, *input shape]`: floats without NaN, or codes of the input's own type. What does not fit
    raises `DataError` or `ProgramError`.
    """
    if source.suffix.lower() in {".npy", ".npz"}:
        array = _read_array(source)
        _check_array(program, array, source)
        chosen = spread(len(array), most)
        slices = [chosen[i : i + SLICE] for i in range(0, len(chosen), SLICE)]
        return Inputs(tuple(map(str, chosen)), lambda: (array[part] for part in slices))
    shape = program.tensors[program.input].shape
    if len(shape) != 3 or shape[0] != 3:
        raise DataError(
            f"the program takes samples of shape {list(shape)}, which are no RGB images. Give an "
            f"array of float32 [N, {', '.join(map(str, shape))}] in a .npy file."
        )
    for values in (mean, std):
        if len(values) not in (1, 3):
            raise DataError(
                f"{len(values)} numbers were given to normalise 3 channels: give 1 or 3."
            )
        if not all(map(math.isfinite, values)):
            raise DataError("the numbers to normalise with must be finite.")
    if min(std) <= 0:
        raise DataError("the standard deviations of the channels must be positive.")
    if not source.exists():
        raise DataError(
            f"{source} does not exist. Name a folder of images, an image, or a .npy or .npz file."
        )
    root, files = (source, find_images(source)) if source.is_dir() else (source.parent, [source])
    files = [files[i] for i in spread(len(files), most)]
    names = tuple(path.relative_to(root).as_posix() for path in files)
    return Inputs(
        names,
        lambda: (
            to_input(read_images(files[i : i + SLICE], *shape[1:]), mean, std)
            for i in range(0, len(files), SLICE)
        ),
    )


def _read_array(path: Path) -> Array:
    """The one array of a .npy or .npz file; never a pickle."""
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                array = content
            elif len(content.files) == 1:
                array = content[content.files[0]]
            else:
                names = f" ({', '.join(content.files[:5])})" if content.files else ""
                raise DataError(
                    f"{path} holds {len(content.files)} arrays{names}: give a file with one."
                )
    except OSError as error:
        reason = (error.strerror or str(error)).lower().rstrip(".")
        raise DataError(f"{path} cannot be read as an array: {reason}. Check the path.") from error
    except (ValueError, EOFError, MemoryError, *DAMAGED) as error:
        # NumPy takes whatever it does not know for a pickle, and recommends to load that.
        reason = "it holds no numbers" if "allow_pickle" in str(error) else str(error).rstrip(".")
        raise DataError(
            f"{path} cannot be read as an array: {reason}. Write it with numpy.save."
        ) from error
    if not array.ndim:
        raise DataError(f"{path} holds a single number, not a batch of samples.")
    return array


def _check_array(program: Program, array: Array, path: Path) -> None:
    """Refuse what the program would refuse, before a thousand samples have been run."""
    spec = program.tensors[program.input]
    floats, own = array.dtype.kind == "f", array.dtype == spec.qparams.dtype
    if array.shape[1:] != spec.shape or not (floats or own):
        wanted = f"[N, {', '.join(map(str, spec.shape))}]"
        raise DataError(
            f"{path} holds {array.dtype.name} {list(array.shape)}, but the program takes float32 "
            f"{wanted}, normalised as in the training of its network, or codes, "
            f"{spec.qparams.dtype.name} {wanted}."
        )
    if own:
        program.check_codes(array)
        return
    for start in range(0, len(array), SLICE):
        nan = np.isnan(array[start : start + SLICE])
        if nan.any():
            sample, *index = (int(i) for i in np.argwhere(nan)[0])
            raise DataError(
                f"{path} holds a NaN in sample {start + sample}, at {index}; a NaN has no code. "
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
    spec = program.tensors[program.output]
    output = np.empty((len(inputs.names), *spec.shape), np.float32)
    done = 0
    for batch in inputs.slices():
        codes = program.quantize_input(batch) if batch.dtype.kind == "f" else batch
        output[done : done + len(batch)] = dequantize(engine(codes), spec.qparams)
        done += len(batch)
        tell(done)
    return Predictions(inputs.names, output)
