"""Small networks with trained weights, to try things on."""

from __future__ import annotations

from intact.zoo.lenet import BIASES, Bias, LeNet, load_lenet, read_lenet

__all__ = ["BIASES", "Bias", "LeNet", "load_lenet", "read_lenet"]
