"""Small networks to try things on, LeNet with trained weights."""

from __future__ import annotations

from intact.zoo.lenet import BIASES, Bias, LeNet, load_lenet, read_lenet
from intact.zoo.resnet import ResNet20, read_resnet20

__all__ = ["BIASES", "Bias", "LeNet", "ResNet20", "load_lenet", "read_lenet", "read_resnet20"]
