"""The experiment: quantize a network on a data set, measure all stages, leave everything on disk.

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

import io
import math
import platform
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from intact import __version__
from intact.analysis import analyse
from intact.capturing import capture
from intact.data import Dataset, batches, to_input
from intact.diagnosis import diagnose
from intact.errors import DataError
from intact.pipeline import Quantized, quantize_network
from intact.recipe import Recipe
from intact.report import ProgramFacts, Report, render, report_to_json
from intact.staged import Stages, measure
from intact.storage import to_bytes, write_atomically

__all__ = ["Experiment", "run_experiment", "write_experiment"]

BATCH = 500
ANALYSED = 1000
"""Images that are compared tensor by tensor, at most: the ranges come from all of them."""

Progress = Callable[[str, int, int], object]
"""Called as `progress(what is going on, images done, images in all)`; 0 of 1 for one long step."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """What a run found out, and what it made."""

    report: Report
    stages: Stages
    quantized: Quantized
    state: Mapping[str, torch.Tensor]


def run_experiment(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    calibration: int,
    title: str,
    command: str,
    seed: int,
    progress: Progress | None = None,
) -> Experiment:
    """Capture, calibrate, lower, measure every stage, analyse every layer, diagnose.

    calibration     number of training images, in file order, that ranges are chosen from
    title, command  for the report
    seed            of whatever made the model, for the report
    """
    if not 1 <= calibration <= len(dataset.train_images):
        raise DataError(
            f"{calibration} calibration images were asked for; {dataset.name} has from 1 to "
            f"{len(dataset.train_images)} training images."
        )
    tell = progress or (lambda *_: None)
    images = dataset.train_images[:calibration]
    tell("capturing", 0, 1)
    network = capture(model, torch.from_numpy(to_input(images[:1])))
    outputs = math.prod(network.tensors[network.output].shape)
    if len(dataset.classes) > outputs:
        raise DataError(
            f"the network tells {outputs} classes apart, but {dataset.name} has "
            f"{len(dataset.classes)}. Leave classes out, or take a network with more outputs."
        )

    def calibrated(done: int) -> None:
        tell("calibrating", done, calibration)
        if done == calibration:
            tell("lowering", 0, 1)

    quantized = quantize_network(
        network, _inputs(images), recipe, info={"title": title}, progress=calibrated
    )
    total = len(dataset.test_images)
    stages = measure(
        quantized.network,
        quantized.program,
        batches(dataset.test_images, dataset.test_labels, BATCH),
        lambda done: tell("measuring the stages", done, total),
    )
    analysed = min(calibration, ANALYSED)
    analysis = analyse(
        quantized.network,
        quantized.program,
        quantized.sketches,
        recipe,
        _inputs(images[:analysed]),
        lambda done: tell("comparing every layer", done, analysed),
    )
    program, file = quantized.program, to_bytes(quantized.program)
    report = Report(
        title=title,
        command=command,
        stages=stages.results,
        input=analysis.input,
        layers=analysis.layers,
        diagnosis=diagnose(analysis, stages, calibration),
        program=ProgramFacts(
            sha256=program.sha256,
            bytes=len(file),
            float_bytes=sum(p.numel() * 4 for p in network.parameters.values()),
            parameter_bytes=program.parameter_bytes,
            ops=len(program.ops),
            macs=sum(map(program.macs, program.ops)),
            accumulator_bits=max(layer.accumulator_bits for layer in analysis.layers),
        ),
        recipe=recipe.to_dict(),
        recipe_toml=recipe.to_toml(),
        data={
            "name": dataset.name,
            "classes": list(dataset.classes),
            "train": len(dataset.train_images),
            "test": total,
            "calibration": calibration,
            "sha256": dataset.sha256,
        },
        seed=seed,
        versions=versions(),
    )
    return Experiment(report, stages, quantized, model.state_dict())


def write_experiment(experiment: Experiment, folder: Path) -> None:
    """Write the five files to a folder that exists, each atomically; the report comes last."""
    state = {name: tensor.contiguous() for name, tensor in experiment.state.items()}
    files = {
        "float.safetensors": safetensors_bytes(state),
        "program.safetensors": to_bytes(experiment.quantized.program),
        "predictions.npz": _npz(experiment.stages.predictions),
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


def _inputs(images: npt.NDArray[np.uint8]) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), BATCH):
        yield torch.from_numpy(to_input(images[start : start + BATCH]))


def _npz(arrays: Mapping[str, npt.NDArray[np.int64]]) -> bytes:
    """As `numpy.savez`, but the same bytes for the same arrays: members carry no time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return buffer.getvalue()
