"""Residual networks for 3x32x32 images: the two that small results are quoted for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ResNet8", "ResNet20"]

CLASSES = 10
BLOCKS = 3
"""Residual blocks of a stage; with two convolutions each, the first one and the last layer: 20."""


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the input.

    `[N, in_channels, H, W]` to `[N, channels, H / stride, W / stride]`. Where the shapes differ,
    the input goes through a 1x1 convolution: with batch norm (option B of the paper), or with a
    bias where `norm` is False.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=not norm))
            if norm:
                self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """3x3 convolutions of 16, 32 and 64 channels: 3x32x32 images to 10 classes.

    He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2015), section 4.2, with
    n = 3. Convolution, three stages of three blocks each, global average pool, linear 64->10.

    Convolutions are initialised as in the paper (normal, variance 2 / fan-out), from torch's global
    generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1)
        self.layer2 = _stage(16, 32, 2)
        self.layer3 = _stage(32, 64, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, CLASSES)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, 3, 32, 32]` to logits float32 `[N, 10]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = Block(in_channels, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(BLOCKS - 1)))


def _initialise(network: nn.Module) -> None:
    """As in the paper: normal, variance 2 / fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet8(nn.Module):
    """One block each of 16, 32 and 64 channels: 3x32x32 images to 10 classes.

    The image classification network of MLPerf Tiny (Banbury et al.: MLPerf Tiny Benchmark, 2021),
    whose shortcuts have no batch norm. Initialised as `ResNet20`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.block1 = Block(16, 16, 1, norm=False)
        self.block2 = Block(16, 32, 2, norm=False)
        self.block3 = Block(32, 64, 2, norm=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, CLASSES)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, 3, 32, 32]` to logits float32 `[N, 10]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        logits: torch.Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits
