"""The networks of the benchmarks, and their images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import intact
from intact.data import load_dataset, to_input
from intact.errors import DataError
from intact.network import Network
from intact.program import Program
from intact.zoo import ResNet20, load_lenet, read_network

Floats = npt.NDArray[np.float32]

CALIBRATION = 512
"""Images that ranges are chosen from, ours and the peers'."""


@dataclass(frozen=True)
class Subject:
    """One network with everything that is measured on it.

    trained      whether its predictions mean anything
    calibration  float32 [N, 3, 32, 32]
    images       float32 [N, 3, 32, 32], others than those of the calibration
    """

    name: str
    model: nn.Module
    network: Network
    program: Program
    trained: bool
    calibration: Floats
    images: Floats


def images() -> tuple[Floats, Floats]:
    """Images for calibration and for measuring: CIFAR-10 where it is, else the digits."""
    try:
        data = load_dataset("cifar10")
    except DataError:
        data = load_dataset("digits")
    return to_input(data.train_images[:CALIBRATION]), to_input(data.test_images)


def subject(name: str, weights: Path | None = None) -> Subject:
    """The network "lenet" or "resnet20", quantized by the default recipe.

    weights  of ResNet-20, from `intact train resnet20`; without them they are random, and only its
             speed means anything
    """
    calibration, test = images()
    batch = torch.from_numpy(calibration)
    if name == "lenet":
        model: nn.Module = load_lenet("cifar10", "last")
    elif weights is not None:
        model = read_network("resnet20", weights)
    else:
        model = _random_resnet20(batch)
    trained = name == "lenet" or weights is not None
    return Subject(
        name,
        model,
        intact.capture(model, batch[:1]),
        intact.quantize(model, [batch]),
        trained,
        calibration,
        test,
    )


def _random_resnet20(batch: torch.Tensor) -> ResNet20:
    """Random weights; batch norm has the statistics of a batch, so that ranges are sane."""
    torch.manual_seed(0)
    model = ResNet20()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches, here one
    model.train()
    with torch.no_grad():
        model(batch)
    return model.eval()
