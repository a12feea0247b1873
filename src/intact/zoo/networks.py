"""The networks of the zoo beside LeNet, by name, and their trained weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from os import PathLike
from types import MappingProxyType

from torch import nn

from intact.errors import IntactError
from intact.zoo.mobilenet import MobileNetV2, MobileNetV3
from intact.zoo.reading import read_weights
from intact.zoo.resnet import ResNet8, ResNet20

__all__ = ["NETWORKS", "ZooNetwork", "load_network", "read_network"]


@dataclass(frozen=True, slots=True)
class ZooNetwork:
    """A network that can be trained and loaded by name: 3x32x32 images to 10 classes.

    title  what people call it
    make   a fresh one, initialised from torch's global generator
    about  what it is in half a line
    """

    title: str
    make: Callable[[], nn.Module]
    about: str


NETWORKS: Mapping[str, ZooNetwork] = MappingProxyType(
    {
        "resnet8": ZooNetwork("ResNet-8", ResNet8, "residual; of MLPerf Tiny"),
        "resnet20": ZooNetwork("ResNet-20", ResNet20, "residual; of the ResNet paper"),
        "mobilenetv2": ZooNetwork("MobileNetV2", MobileNetV2, "depthwise, ReLU6"),
        "mobilenetv3": ZooNetwork(
            "MobileNetV3", MobileNetV3, "depthwise, squeeze-and-excitation, hard-swish"
        ),
    }
)


def load_network(name: str) -> nn.Module:
    """The network trained on CIFAR-10 that comes with the package; in eval mode.

    The header of `zoo/weights/<name>-cifar10.safetensors` says how it was trained.
    """
    _check(name)
    shipped = files("intact.zoo") / "weights" / f"{name}-cifar10.safetensors"
    if not shipped.is_file():
        raise IntactError(
            f"no trained {NETWORKS[name].title} is shipped. Train one: intact train {name}."
        )
    with as_file(shipped) as path:
        return read_network(name, path)


def read_network(name: str, path: str | PathLike[str]) -> nn.Module:
    """A network of the zoo with the weights of a safetensors file; in eval mode.

    The file must hold exactly the tensors of the network; otherwise `StorageError` lists
    everything that is wrong with it.
    """
    _check(name)
    return read_weights(NETWORKS[name].make(), path, f"a {NETWORKS[name].title}")


def _check(name: str) -> None:
    if name not in NETWORKS:
        raise IntactError(f"there is no network {name!r}. There are: {', '.join(NETWORKS)}.")
