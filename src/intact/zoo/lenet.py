"""LeNet for 3x32x32 images: the network of the experiment, and its trained weights."""

from __future__ import annotations

from importlib.resources import as_file, files
from os import PathLike
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from intact.errors import IntactError
from intact.zoo.reading import read_weights

__all__ = ["BIASES", "Bias", "LeNet", "load_lenet", "read_lenet"]

Bias = Literal["none", "last", "all"]
BIASES: tuple[Bias, ...] = ("none", "last", "all")
INPUT_SHAPE = (3, 32, 32)
CLASSES = 10


class LeNet(nn.Module):
    """Two convolutions and three fully connected layers: 3x32x32 images to 10 classes.

    conv 6@5x5, ReLU, max pool 2; conv 16@5x5, ReLU, max pool 2; linear 400->120, ReLU;
    120->84, ReLU; 84->10.

    bias  which layers have one: "none", "last" (the last layer only) or "all"

    Weights are initialised as torch does by default, from its global generator.
    """

    def __init__(self, bias: Bias = "all") -> None:
        super().__init__()
        if bias not in BIASES:
            raise IntactError(f"bias is {bias!r}, but must be one of {', '.join(BIASES)}.")
        inner, last = bias == "all", bias != "none"
        self.conv1 = nn.Conv2d(3, 6, 5, bias=inner)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5, bias=inner)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120, bias=inner)
        self.fc2 = nn.Linear(120, 84, bias=inner)
        self.fc3 = nn.Linear(84, CLASSES, bias=last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, 3, 32, 32]` to logits float32 `[N, 10]`."""
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits: torch.Tensor = self.fc3(x)
        return logits


def load_lenet(data: str, bias: Bias) -> LeNet:
    """The trained network that comes with the package, for "digits" or "cifar10"; in eval mode.

    The header of `zoo/weights/lenet-<data>-<bias>.safetensors` says how it was trained.
    """
    shipped = files("intact.zoo") / "weights" / f"lenet-{data}-{bias}.safetensors"
    if not shipped.is_file():
        raise IntactError(
            f"no trained LeNet is shipped for data {data!r} with bias {bias!r}. Train one: "
            f"intact train lenet --data {data} --bias {bias}."
        )
    with as_file(shipped) as path:
        return read_lenet(path, bias)


def read_lenet(path: str | PathLike[str], bias: Bias) -> LeNet:
    """A LeNet with the weights of a safetensors file; in eval mode.

    The file must hold exactly the tensors of `LeNet(bias).state_dict()`; otherwise `StorageError`
    lists everything that is wrong with it.
    """
    return read_weights(LeNet(bias), path, f"a LeNet with bias {bias!r}")
