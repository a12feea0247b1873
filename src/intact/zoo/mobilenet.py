"""MobileNets for 3x32x32 images: depthwise convolutions, and what they do to quantization."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["MobileNetV2", "MobileNetV3"]

CLASSES = 10
STAGES_V2 = ((1, 16, 1, 1), (3, 32, 1, 2), (4, 32, 2, 1), (4, 64, 4, 2), (6, 80, 2, 1))
"""Expansion, channels, blocks, stride of the first block."""
BLOCKS_V3 = (
    (48, 24, 3, 2, False, False),
    (72, 24, 3, 1, False, False),
    (96, 40, 5, 2, True, True),
    (120, 40, 5, 1, True, True),
    (120, 40, 5, 1, True, True),
    (160, 48, 3, 1, True, True),
)
"""Hidden channels, channels, kernel, stride, squeeze-and-excitation, hard-swish (else ReLU)."""


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; plus the input, if it fits.

    `[N, in_channels, H, W]` to `[N, channels, H / stride, W / stride]`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.layers = nn.Sequential()
        if expansion != 1:
            self.layers.extend(_convolution(in_channels, hidden, 1, activation=nn.ReLU6))
        self.layers.extend(_convolution(hidden, hidden, 3, stride, hidden, activation=nn.ReLU6))
        self.layers.extend(_convolution(hidden, channels, 1))
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's layers, and the input added where it has the same shape."""
        y: torch.Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """Inverted residuals with ReLU6: 3x32x32 images to 10 classes, 0.3 M parameters.

    Sandler et al.: MobileNetV2: Inverted Residuals and Linear Bottlenecks (2018), with fewer
    blocks and strides, for small images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_convolution(3, 24, 3, activation=nn.ReLU6))
        channels = 24
        for expansion, width, blocks, stride in STAGES_V2:
            for i in range(blocks):
                first = stride if i == 0 else 1
                self.features.append(InvertedResidual(channels, width, first, expansion))
                channels = width
        self.features.extend(_convolution(channels, 320, 1, activation=nn.ReLU6))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(320, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, 3, 32, 32]` to logits float32 `[N, 10]`."""
        logits: torch.Tensor = self.fc(torch.flatten(self.pool(self.features(x)), 1))
        return logits


class SqueezeExcitation(nn.Module):
    """Each channel times a factor between 0 and 1 that depends on the means of all channels.

    Hu et al.: Squeeze-and-Excitation Networks (2018), with the hard sigmoid of MobileNetV3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, channels // 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.relu = nn.ReLU()
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same shape."""
        factors: torch.Tensor = self.gate(self.excite(self.relu(self.squeeze(self.pool(x)))))
        return x * factors


class BlockV3(nn.Module):
    """An inverted residual with squeeze-and-excitation and hard-swish, where wanted."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        channels: int,
        kernel: int,
        stride: int,
        *,
        excitation: bool,
        hard_swish: bool,
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if hard_swish else nn.ReLU
        self.layers = nn.Sequential(*_convolution(in_channels, hidden, 1, activation=activation))
        self.layers.extend(_convolution(hidden, hidden, kernel, stride, hidden))
        if excitation:
            self.layers.append(SqueezeExcitation(hidden))
        self.layers.append(activation())
        self.layers.extend(_convolution(hidden, channels, 1))
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's layers, and the input added where it has the same shape."""
        y: torch.Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """Squeeze-and-excitation and hard-swish: 3x32x32 images to 10 classes, 0.1 M parameters.

    Howard et al.: Searching for MobileNetV3 (2019), with fewer blocks and strides, for small
    images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_convolution(3, 16, 3, activation=nn.Hardswish))
        channels = 16
        for hidden, width, kernel, stride, excitation, hard_swish in BLOCKS_V3:
            self.features.append(
                BlockV3(
                    channels,
                    hidden,
                    width,
                    kernel,
                    stride,
                    excitation=excitation,
                    hard_swish=hard_swish,
                )
            )
            channels = width
        self.features.extend(_convolution(channels, 192, 1, activation=nn.Hardswish))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(192, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 `[N, 3, 32, 32]` to logits float32 `[N, 10]`."""
        logits: torch.Tensor = self.fc(torch.flatten(self.pool(self.features(x)), 1))
        return logits


def _convolution(
    in_channels: int,
    channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> list[nn.Module]:
    """A convolution that keeps the size but for its stride, batch norm, and an activation."""
    padding = kernel // 2
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    ]
    return [*layers, activation()] if activation else layers
