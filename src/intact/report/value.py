"""The `Report`: everything that a run found out, as one value. JSON and the page both read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intact.analysis import LayerAnalysis, TensorAnalysis
from intact.diagnosis import Finding
from intact.staged import Result, StageResult

__all__ = ["ProgramFacts", "Report"]


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """The program that the report is about: hash of its file, sizes in bytes, work per sample.

    outputs  their names, in the program's order: stages predict with the first
    """

    sha256: str
    bytes: int
    float_bytes: int
    parameter_bytes: int
    ops: int
    macs: int
    accumulator_bits: int
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a run of the staged experiment found out. `results.json` is this value.

    title      what was quantized, on what: "LeNet (bias on the last layer) on CIFAR-10"
    command    the command line that reproduces the run
    stages     in order; the first is "float"
    inputs     the program's input tensors by their names, in the program's order
    layers     in the order of execution
    recipe     the recipe as nested plain values, and `recipe_toml` as its TOML text
    data       name, classes, sizes and SHA-256 of the images used; number of calibration images
    seed       of everything random in the run
    versions   package -> version, and "python", "platform"
    """

    title: str
    command: str
    stages: tuple[Result, ...]
    inputs: Mapping[str, TensorAnalysis]
    layers: tuple[LayerAnalysis, ...]
    diagnosis: tuple[Finding, ...]
    program: ProgramFacts
    recipe: Mapping[str, Any]
    recipe_toml: str
    data: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]

    @property
    def labelled(self) -> bool:
        """Whether the stages were measured on labelled data, so that there are accuracies."""
        return all(isinstance(stage, StageResult) for stage in self.stages)
