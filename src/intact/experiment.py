"""The experiment: quantize a network on data, measure all stages, leave everything on disk.

A run leaves in its folder

| file | what |
|---|---|
| `float.safetensors` | the float network's parameters |
| `program.safetensors` | the integer program |
| `predictions.npz` | stage -> int64 predicted classes, in the order of the test set |
| `results.json` | the `Report` |
| `report.html` | the same, to look at |
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from intact import __version__
from intact.analysis import analyse
from intact.capturing import capture
from intact.capturing.exporting import required_inputs
from intact.data import Dataset
from intact.data.arrays import npz_bytes
from intact.data.channels import Channels
from intact.data.checking import (
    channels_last_hint,
    check_pixel_values,
    swapped_channels,
    unlike_calibration,
)
from intact.data.folder import Part
from intact.data.hashing import SampleHashes
from intact.data.images import image_samples
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.data.samples import Batch, Samples
from intact.diagnosis import diagnose
from intact.errors import CaptureError, DataError
from intact.network import Network
from intact.pipeline import Quantized, quantize_network
from intact.pixels import take_pixels
from intact.recipe import Recipe
from intact.report import ProgramFacts, Report, render, report_to_json
from intact.signature import Values, listed, unwrapped, wrapped
from intact.staged import Stages, measure
from intact.storage import to_bytes, write_atomically

__all__ = ["Experiment", "dataset_part", "run_experiment", "write_experiment"]

BATCH = 500
WORKSPACE = 2**26
"""Values of all tensors of a network together that a batch may have: 256 MB in float32, or a batch
of 3 for ResNet-50 at 224 x 224. Small networks get batches of `BATCH`."""
ANALYSED = 1000
"""Samples that are compared tensor by tensor, at most: the ranges come from all of them."""

Progress = Callable[[str, int, int], object]
"""Called as `progress(what is going on, samples done, samples in all)`, the latter 0 where nobody
knows; 0 of 1 for one long step."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """What a run found out, and what it made.

    remarks  what is hardly meant: test data that looks unlike the calibration's
    """

    report: Report
    stages: Stages
    quantized: Quantized
    state: Mapping[str, torch.Tensor]
    remarks: tuple[str, ...] = ()


def run_experiment(
    model: nn.Module,
    calibration: Samples,
    test: Samples,
    recipe: Recipe,
    *,
    title: str,
    command: str,
    seed: int,
    data: Mapping[str, Any] | None = None,
    pixels: Preprocessing | None = None,
    progress: Progress | None = None,
) -> Experiment:
    """Capture, calibrate, lower, measure every stage, analyse every layer, diagnose.

    calibration     what ranges are chosen from; its labels are not looked at. Of a model with
                    several inputs, samples of these
    test            what the stages are measured on, with labels or without
    title, command  for the report
    seed            of whatever made the model, for the report
    data            what the report says of the data; None: the names of calibration and test data,
                    how many samples there were, and the SHA-256 of all inputs and of the labels,
                    see `SampleHashes`
    pixels          how the network wants pixels normalised, where the samples are pixels as they
                    are and the program shall take them so
    """
    tell = progress or (lambda *_: None)
    tell("capturing", 0, 1)
    _check_inputs(model, calibration, test)
    network = _captured(model, calibration)
    if pixels is not None:
        network = take_pixels(network, pixels.mean, pixels.std)
    _check_test_data(network, test)
    size = batch_size(network)
    known = calibration.count or 0
    seen = 0

    def calibrated(done: int) -> None:
        nonlocal seen
        seen = done
        tell("calibrating", done, known)
        if done == known:
            tell("lowering", 0, 1)

    calibrating, testing = (
        _Passing(samples.name, pixels=pixels is not None) for samples in (calibration, test)
    )
    quantized = quantize_network(
        network,
        _inputs(calibrating.pass_on(calibration.batches(size))),
        recipe,
        preprocessing=calibration.preprocessing or test.preprocessing,
        info={"title": title},
        progress=calibrated,
    )
    total = test.count or 0
    stages = measure(
        quantized.network,
        quantized.program,
        testing.pass_on(test.batches(size)),
        lambda done: tell("measuring the stages", done, total),
        corrected=quantized.corrected,
    )
    analysed = min(seen, ANALYSED)
    analysis = analyse(
        quantized.network,
        quantized.program,
        quantized.sketches,
        recipe,
        _first(calibration.batches(size), analysed, network.inputs),
        lambda done: tell("comparing every layer", done, analysed),
    )
    program, file = quantized.program, to_bytes(quantized.program)
    report = Report(
        title=title,
        command=command,
        stages=stages.results,
        inputs=analysis.inputs,
        layers=analysis.layers,
        diagnosis=diagnose(analysis, stages, seen),
        program=ProgramFacts(
            sha256=program.sha256,
            bytes=len(file),
            float_bytes=sum(p.numel() * 4 for p in network.parameters.values()),
            parameter_bytes=program.parameter_bytes,
            ops=len(program.ops),
            macs=sum(map(program.macs, program.ops)),
            accumulator_bits=max(layer.accumulator_bits for layer in analysis.layers),
            outputs=program.outputs,
        ),
        recipe=recipe.to_dict(),
        recipe_toml=recipe.to_toml(),
        data=data
        or {
            "name": test.name,
            "classes": list(test.classes or ()),
            "test": stages.results[0].total,
            "calibration": seen,
            "calibrated on": calibration.name,
            "sha256": {
                "calibration": calibrating.hashes.inputs,
                "test": testing.hashes.inputs,
                **({} if (labels := testing.hashes.labels) is None else {"labels": labels}),
            },
        },
        seed=seed,
        versions=versions(),
    )
    return Experiment(
        report, stages, quantized, model.state_dict(), _unlike(calibrating, testing, test.inputs)
    )


def dataset_part(dataset: Dataset, part: Part, count: int | None = None) -> Samples:
    """The first so many images of a part of a data set, or all of them, normalised to [-1, 1].

    All, too, where there are fewer. None at all is a `DataError`.
    """
    if count is not None and count < 1:
        raise DataError(f"{count} images are none to work with: take 1 or more.")
    images, labels = {
        "train": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }[part]
    return image_samples(
        dataset.name,
        lambda at: list(images[at]),
        len(images[:count]),
        labels[:count],
        dataset.classes,
        PRESETS["signed"],
        images.shape[1:],
    )


def batch_size(network: Network) -> int:
    """Samples that all stages get at once: as many as memory has room for, `BATCH` at most."""
    values = sum(math.prod(tensor.shape) for tensor in network.tensors.values())
    return max(1, min(BATCH, WORKSPACE // values))


def write_experiment(experiment: Experiment, folder: Path) -> None:
    """Write the five files to a folder that exists, each atomically; the report comes last."""
    state = {name: tensor.contiguous() for name, tensor in experiment.state.items()}
    files = {
        "float.safetensors": safetensors_bytes(state),
        "program.safetensors": to_bytes(experiment.quantized.program),
        "predictions.npz": npz_bytes(experiment.stages.predictions),
        "results.json": report_to_json(experiment.report).encode(),
        "report.html": render(experiment.report).encode(),
    }
    for name, data in files.items():
        write_atomically(folder / name, data)


def versions() -> dict[str, str]:
    """What the run depends on."""
    packages = ("torch", "numpy", "scipy", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "intact": __version__,
        **{name: version(name) for name in packages},
    }


def _check_inputs(model: nn.Module, *sources: Samples) -> None:
    """`DataError` unless samples are of as many inputs as the network takes."""
    needed = tuple(required_inputs(model))
    for samples in sources:
        if samples.inputs == (needed if len(needed) > 1 else None):
            continue
        if len(needed) > 1:
            have = "one" if samples.inputs is None else listed(samples.inputs)
            raise DataError(
                f"the network takes {len(needed)} inputs, {listed(needed)}, but samples of "
                f"{samples.name} are of {have}. Open them with intact.data.several.open_several."
            )
        raise DataError(
            f"the network takes one input, but samples of {samples.name} are of "
            f"{listed(samples.inputs or ())}. Open them with intact.data.sources.open_samples."
        )


def _captured(model: nn.Module, samples: Samples) -> Network:
    """The network, captured for the shape of the samples; the error says if that is to blame."""
    try:
        return capture(model, unwrapped(torch.zeros(1, *shape) for shape in samples.shapes))
    except CaptureError as error:
        suspects = [(shape, channels_last_hint(shape)) for shape in samples.shapes]
        for shape, hint in suspects:
            if hint:
                raise DataError(
                    f"the network does not take samples of shape {list(shape)}, as {samples.name} "
                    f"holds them.{hint} What it says of them:\n{error}"
                ) from error
        raise


def _check_test_data(network: Network, test: Samples) -> None:
    for name, given in zip(network.inputs, test.shapes, strict=True):
        taken = network.tensors[name].shape
        if given != taken:
            of = f" of {name!r}" if test.inputs else ""
            raise DataError(
                f"the network was captured for samples{of} of shape {list(taken)}, as calibration "
                f"has them, but those of {test.name} have shape {list(given)}."
            )
    outputs = math.prod(network.tensors[network.outputs[0]].shape)
    if test.classes is not None and len(test.classes) > outputs:
        raise DataError(
            f"the network tells {outputs} classes apart, but {test.name} has "
            f"{len(test.classes)}. Leave classes out, or take a network with more outputs."
        )


@dataclass(frozen=True, eq=False)
class _Passing:
    """What is noted of batches on their way: their hashes, and how their channels look.

    name    of the samples
    pixels  whether inputs that are no pixels are a `DataError`
    looks   of each batch, the channels of every input
    """

    name: str
    pixels: bool
    looks: list[tuple[Channels, ...]] = field(default_factory=list)
    hashes: SampleHashes = field(default_factory=SampleHashes)

    def pass_on(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for x, labels in batches:
            if self.pixels:
                check_pixel_values(x, self.name)
            parts = x if isinstance(x, tuple) else (x,)
            self.looks.append(tuple(map(Channels.of, parts)))
            self.hashes.update(x, labels)
            yield x, labels


def _unlike(
    calibrating: _Passing, testing: _Passing, inputs: tuple[str, ...] | None
) -> tuple[str, ...]:
    """In which inputs the test data looks unlike the calibration's, and how."""
    remarks = []
    pairs = zip(
        *(zip(*passed.looks, strict=True) for passed in (calibrating, testing)), strict=True
    )
    for i, looks in enumerate(pairs):
        seen, given = (reduce(Channels.merge, look) for look in looks)
        name = testing.name if inputs is None else f"{inputs[i]!r} of {testing.name}"
        remarks += [check(seen, given, name) for check in (unlike_calibration, swapped_channels)]
    return tuple(remark for remark in remarks if remark is not None)


def _inputs(batches: Iterable[Batch]) -> Iterator[Values]:
    """The inputs of batches as tensors."""
    for x, _ in batches:
        yield unwrapped(map(torch.from_numpy, x if isinstance(x, tuple) else (x,)))


def _first(batches: Iterable[Batch], count: int, inputs: Sequence[str]) -> Iterator[Values]:
    """The inputs of the first so many samples."""
    left = count
    for x in _inputs(batches):
        parts = wrapped(x, inputs)
        yield unwrapped(part[:left] for part in parts)
        left -= len(parts[0])
        if left <= 0:
            return
