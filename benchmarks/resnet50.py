"""ResNet-50 in torchvision's structure, with random weights: the size that tools are judged at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["INPUT_SHAPE", "ResNet50", "image_batches", "random_resnet50"]

INPUT_SHAPE = (3, 224, 224)
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""Channels within a bottleneck, blocks, stride of the first block."""
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions around a shortcut; v1.5 of the block."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to `[N, 4 * channels, H / stride, W / stride]`."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """He et al.: Deep Residual Learning (2015): 25.6 M parameters, 4.1 G products an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential()
        in_channels = 64
        for channels, blocks, stride in STAGES:
            for i in range(blocks):
                self.layers.append(Bottleneck(in_channels, channels, stride if i == 0 else 1))
                in_channels = EXPANSION * channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, 3, 224, 224]` to `[N, 1000]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y: torch.Tensor = self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))
        return y


def random_resnet50(seed: int = 0) -> ResNet50:
    """Random weights in eval mode; batch norm has the statistics of four random images."""
    torch.manual_seed(seed)
    model = ResNet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches, here one
    model.train()
    with torch.no_grad():
        model(next(image_batches(4, 4)))
    return model.eval()


def image_batches(count: int, batch: int, seed: int = 1) -> Iterator[torch.Tensor]:
    """Random images, made when they are asked for: float32 `[batch, 3, 224, 224]` each."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, batch):
        size = min(batch, count - start)
        yield torch.randn((size, *INPUT_SHAPE), generator=generator).clamp_(-3, 3)
