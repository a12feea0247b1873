"""Small networks to try things on, with trained weights."""

from __future__ import annotations

from intact.zoo.lenet import BIASES, Bias, LeNet, load_lenet, read_lenet
from intact.zoo.mobilenet import MobileNetV2, MobileNetV3
from intact.zoo.networks import NETWORKS, ZooNetwork, load_network, read_network
from intact.zoo.resnet import ResNet8, ResNet20

__all__ = [
    "BIASES",
    "NETWORKS",
    "Bias",
    "LeNet",
    "MobileNetV2",
    "MobileNetV3",
    "ResNet8",
    "ResNet20",
    "ZooNetwork",
    "load_lenet",
    "load_network",
    "read_lenet",
    "read_network",
]
