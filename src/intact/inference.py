"""Running a program on a user's own samples: what it predicts, and how often that is right."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.data.arrays import npz_bytes
from intact.data.carried import pixels_alone
from intact.data.checking import check_labels, check_pixel_values
from intact.data.hashing import SampleHashes
from intact.data.samples import Samples
from intact.engines import Engine
from intact.errors import DataError
from intact.program import Program
from intact.signature import Values, wrapped
from intact.significance import wilson_interval
from intact.storage import write_atomically

__all__ = ["BATCH", "SUFFIXES", "Evaluation", "Predictions", "evaluate", "infer"]

BATCH = 256
"""Samples that are decoded and run at a time: memory does not grow with the number of images."""
SUFFIXES = (".csv", ".json", ".npy", ".npz")
"""Of files that predictions can be written to."""

Progress = Callable[[int], object]
"""Called after each batch with the number of samples done."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a program says about inputs.

    names    one per sample: paths of images below their folder, or positions in an array
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


def infer(
    program: Program, engine: Engine, samples: Samples, progress: Progress | None = None
) -> Predictions:
    """Run an engine of the program over all samples.

    Samples that cannot be read are left out where the source says so; names tell which are there.
    """
    tell = progress or (lambda _: None)
    run = _runner(program, engine, samples)
    names: list[str] = []
    outputs: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in program.outputs}
    for called, x in samples.named_batches(BATCH):
        names += called
        real = wrapped(program.dequantize_output(run(x)), program.outputs)
        for name, part in zip(program.outputs, real, strict=True):
            outputs[name].append(part)
        tell(len(names))
    return Predictions(tuple(names), {k: np.concatenate(parts) for k, parts in outputs.items()})


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How often a program is right.

    inputs, labels  SHA-256 of the samples, as in the `results.json` of a run on the same ones; see
                    `SampleHashes`
    """

    correct: int
    total: int
    inputs: str
    labels: str | None

    @property
    def accuracy(self) -> float:
        """Between 0 and 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson_interval(self.correct, self.total)


def evaluate(
    program: Program, engine: Engine, samples: Samples, progress: Progress | None = None
) -> Evaluation:
    """The accuracy of a program: how often its largest output, the first of several, is the label.

    That is what the last stage of an experiment measures; of a program with several outputs, the
    first one counts. `DataError` for samples without labels, and for labels that the program has no
    output for.
    """
    tell = progress or (lambda _: None)
    if not samples.labelled:
        raise DataError(
            f"{samples.name} has no labels, so nothing says what is right. Give images in a folder "
            "per class, or a .npz or .safetensors file whose array 'y' holds the labels; `intact "
            "run` gives predictions without labels."
        )
    outputs = math.prod(program.tensors[program.outputs[0]].shape)
    if samples.classes is not None and len(samples.classes) > outputs:
        raise DataError(
            f"the program tells {outputs} classes apart, but {samples.name} has "
            f"{len(samples.classes)}. Evaluate it on the data that its network was trained for."
        )
    run = _runner(program, engine, samples)
    hashes = SampleHashes()
    correct = total = 0
    for x, labels in samples.batches(BATCH):
        if labels is None:
            raise DataError(f"{samples.name} said that it has labels, but a batch has none.")
        check_labels(labels, outputs, samples.name)
        hashes.update(x, labels)
        first = wrapped(run(x), program.outputs)[0]
        predicted = first.reshape(len(labels), outputs).argmax(axis=1)
        correct += int((predicted == labels).sum())
        total += len(labels)
        tell(total)
    return Evaluation(correct, total, hashes.inputs, hashes.labels)


def _runner(
    program: Program, engine: Engine, samples: Samples
) -> Callable[[npt.NDArray[np.float32]], Values]:
    """From a batch of the samples to the program's output codes."""
    pixels = pixels_alone(program)

    def run(x: Values) -> Values:
        if pixels:
            check_pixel_values(x, samples.name)
        return engine(program.quantize_input(x))

    return run
