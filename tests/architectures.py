"""Networks with the structures of torchvision's families, a few blocks of each, for tests.

Written from the papers and torchvision's documentation; names of layers are as users know them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ARCHITECTURES", "SEVERAL"]


def conv(
    cin: int, cout: int, kernel=3, stride=1, groups=1, act=nn.ReLU, **options
) -> nn.Sequential:
    """Convolution, batch norm, activation; the padding keeps the size."""
    options.setdefault("padding", kernel // 2 if isinstance(kernel, int) else 0)
    layers = [
        nn.Conv2d(cin, cout, kernel, stride, groups=groups, bias=False, **options),
        nn.BatchNorm2d(cout),
    ]
    return nn.Sequential(*layers, *([act()] if act else []))


class Head(nn.Module):
    def __init__(self, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(self.drop(torch.flatten(self.pool(x), 1)))


class Bottleneck(nn.Module):
    """ResNet, ResNeXt (groups), Wide ResNet (width)."""

    def __init__(self, cin, cout, stride=1, groups=1, width=None, excite=False) -> None:
        super().__init__()
        width = width or cout // 4
        self.conv1 = conv(cin, width, 1)
        self.conv2 = conv(width, width, 3, stride, groups)
        self.se = Excitation(width, width // 4) if excite else nn.Identity()
        self.conv3 = conv(width, cout, 1, act=None)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = conv(cin, cout, 1, stride, act=None)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.conv3(self.se(self.conv2(self.conv1(x))))
        out += identity
        return self.relu(out)


class Excitation(nn.Module):
    def __init__(self, channels, squeezed, act=nn.ReLU, gate=nn.Sigmoid) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = act(), gate()

    def forward(self, x):
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(scale) * x


def resnet() -> nn.Module:
    stem = [conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, Bottleneck(16, 32), Bottleneck(32, 64, 2), Head(64))


def resnext() -> nn.Module:
    body = [Bottleneck(16, 32, groups=4, width=16), Bottleneck(32, 64, 2, 4, 32)]
    return nn.Sequential(conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1), *body, Head(64))


def regnet() -> nn.Module:
    body = [Bottleneck(16, 24, 2, 3, 24, True), Bottleneck(24, 24, 1, 3, 24, True)]
    return nn.Sequential(conv(3, 16, 3, 2), *body, Head(24))


def alexnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 11, 4, 2),
        nn.ReLU(inplace=True),
        nn.LocalResponseNorm(5),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(16, 24, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((6, 6)),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(24 * 36, 32),
        nn.ReLU(inplace=True),
        nn.Linear(32, 10),
    )


def vgg() -> nn.Module:
    layers = [conv(3, 16), nn.MaxPool2d(2, 2), conv(16, 24), conv(24, 24), nn.MaxPool2d(2, 2)]
    head = [nn.AdaptiveAvgPool2d((7, 7)), nn.Flatten(), nn.Linear(24 * 49, 10)]
    return nn.Sequential(*layers, *head)


class DenseLayer(nn.Module):
    def __init__(self, cin, growth) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(cin), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(cin, 4 * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, inputs):
        x = self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.ModuleList(DenseLayer(16 + 8 * i, 8) for i in range(3))
        self.norm, self.conv = nn.BatchNorm2d(40), nn.Conv2d(40, 20, 1, bias=False)
        self.pool, self.head = nn.AvgPool2d(2, 2), Head(20)

    def forward(self, x):
        features = [self.conv0(x)]
        for layer in self.layers:
            features.append(layer(features))
        x = self.conv(F.relu(self.norm(torch.cat(features, 1))))
        return self.head(self.pool(x))


class Fire(nn.Module):
    def __init__(self, cin, squeeze, expand) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(cin, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet() -> nn.Module:
    body = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True)]
    head = [nn.Conv2d(16, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]
    return nn.Sequential(*body, Fire(16, 4, 8), *head)


class Shuffle(nn.Module):
    """ShuffleNet v2, with a stride and without one."""

    def __init__(self, cin, cout, stride) -> None:
        super().__init__()
        half, first = cout // 2, cin if stride > 1 else cin // 2
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                conv(cin, cin, 3, stride, cin, act=None), conv(cin, half, 1)
            )
        self.branch2 = nn.Sequential(
            conv(first, half, 1), conv(half, half, 3, stride, half, act=None), conv(half, half, 1)
        )

    def forward(self, x):
        if self.stride == 1:
            left, right = x.chunk(2, dim=1)
            out = torch.cat((left, self.branch2(right)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        n, c, h, w = out.size()
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def shufflenet() -> nn.Module:
    body = [Shuffle(12, 16, 2), Shuffle(16, 16, 1), Shuffle(16, 16, 1)]
    return nn.Sequential(conv(3, 12, 3, 2), nn.MaxPool2d(3, 2, 1), *body, Head(16))


class Inception(nn.Module):
    """GoogLeNet's four branches, and Inception v3's factorised ones."""

    def __init__(self, cin, factorised) -> None:
        super().__init__()
        self.branch1 = conv(cin, 8, 1)
        self.branch2 = nn.Sequential(conv(cin, 8, 1), conv(8, 12))
        if factorised:
            self.branch2 = nn.Sequential(
                conv(cin, 8, 1),
                conv(8, 8, (1, 7), padding=(0, 3)),
                conv(8, 12, (7, 1), padding=(3, 0)),
            )
        self.branch3 = nn.Sequential(conv(cin, 4, 1), conv(4, 8, 5))
        self.branch4 = conv(cin, 8, 1)
        self.factorised = factorised

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, 1, 1, ceil_mode=True)
        if self.factorised:
            pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(pooled)]
        return torch.cat(branches, 1)


class GoogLeNet(nn.Module):
    def __init__(self, factorised=False) -> None:
        super().__init__()
        self.conv1, self.pool = conv(3, 16, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception = nn.Sequential(Inception(16, factorised), Inception(36, factorised))
        self.head = Head(36)

    def forward(self, x):
        # As with transform_input: the normalisation of weights from elsewhere.
        red = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        x = torch.cat((red, green, blue), 1)
        return self.head(self.inception(self.pool(self.conv1(x))))


class Inverted(nn.Module):
    """MobileNet v2 and v3, MNASNet, EfficientNet."""

    def __init__(self, cin, cout, stride, expand, kernel=3, act=nn.ReLU6, gate=None) -> None:
        super().__init__()
        hidden = cin * expand
        layers = [conv(cin, hidden, 1, act=act), conv(hidden, hidden, kernel, stride, hidden, act)]
        if gate:
            inner = nn.SiLU if act is nn.SiLU else nn.ReLU
            layers.append(Excitation(hidden, max(4, cin // 4), inner, gate))
        self.conv = nn.Sequential(*layers, conv(hidden, cout, 1, act=None))
        self.use_res_connect = stride == 1 and cin == cout

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def mobilenet(act, gate, kernel) -> nn.Module:
    body = [
        Inverted(12, 16, 2, 4, kernel, act, gate),
        Inverted(16, 16, 1, 4, kernel, act, gate),
        conv(16, 32, 1, act=act),
    ]
    return nn.Sequential(conv(3, 12, 3, 2, act=act), *body, Head(32))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels, norm=nn.LayerNorm) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.act = norm(channels, eps=1e-6), nn.GELU()
        self.pwconv1, self.pwconv2 = (
            nn.Linear(channels, 4 * channels),
            nn.Linear(4 * channels, channels),
        )
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 4, 4), LayerNorm2d(16, eps=1e-6), ConvNeXtBlock(16)]
    down = [LayerNorm2d(16, eps=1e-6), nn.Conv2d(16, 32, 2, 2), ConvNeXtBlock(32, nn.RMSNorm)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 10)]
    return nn.Sequential(*stem, *down, *head)


class PoolFormerBlock(nn.Module):
    def __init__(self, channels) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1)
        )
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.scale * (self.pool(y) - y)
        return x + self.scale * self.mlp(self.norm2(x))


def poolformer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 7, 8, 3), PoolFormerBlock(16), Head(16))


def group_norm_resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 16, 7, 4, 3, bias=False), nn.GroupNorm(4, 16), nn.ReLU()]
    body = [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16), nn.SiLU()]
    return nn.Sequential(*stem, *body, nn.InstanceNorm2d(16), Head(16))


# -- several inputs and outputs ------------------------------------------------------------------


class Pyramid(nn.Module):
    """As in FPN: maps of three sizes, each smoothed, from a backbone and a top-down path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, widths = conv(3, 8), (8, 12, 16)
        self.down1, self.down2 = conv(8, 12, 3, 2), conv(12, 16, 3, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in widths)

    def forward(self, x):
        c1 = self.stem(x)
        c2 = self.down1(c1)
        c3 = self.down2(c2)
        p3 = self.lateral[2](c3)
        p2 = self.lateral[1](c2) + F.interpolate(p3, scale_factor=2, mode="nearest")
        p1 = self.lateral[0](c1) + F.interpolate(p2, scale_factor=2, mode="nearest")
        return {
            f"p{i}": smooth(p)
            for i, (smooth, p) in enumerate(zip(self.smooth, (p1, p2, p3), strict=True))
        }


class TwoHeads(nn.Module):
    """Classes and boxes from one backbone, whose features are given out as well."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8, 3, 2), Bottleneck(8, 16, 2))
        self.classes, self.boxes = Head(16), Head(16, 4)

    def forward(self, x):
        x = self.features(x)
        return self.classes(x), torch.sigmoid(self.boxes(x)), x


class Siamese(nn.Module):
    """One tower, called for two images, and how alike they are: their products and difference."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(conv(3, 8, 3, 2), conv(8, 12, 3, 2), nn.AdaptiveAvgPool2d(1))
        self.embed, self.compare = nn.Linear(12, 8), nn.Linear(16, 2)

    def forward(self, left, right):
        a, b = (self.embed(self.tower(image).flatten(1)) for image in (left, right))
        return self.compare(torch.cat([a * b, a - b], 1))


class ImageAndFacts(nn.Module):
    """An image, and a vector of facts about it that gates its channels and joins its features."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(conv(3, 8, 3, 2), conv(8, 16, 3, 2))
        self.gate, self.facts = nn.Linear(6, 16), nn.Linear(6, 8)
        self.fc = nn.Linear(24, 10)

    def forward(self, image, facts):
        x = self.image(image) * torch.sigmoid(self.gate(facts))[:, :, None, None]
        return self.fc(torch.cat([x.mean((2, 3)), F.relu(self.facts(facts))], 1))


class Recurrent(nn.Module):
    """One step of a recurrent network: a frame and a state to scores and the next state."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.mix, self.fc = conv(3, 8, 3, 2), nn.Conv2d(16, 8, 3, padding=1), Head(8)

    def forward(self, frame, state):
        state = torch.tanh(self.mix(torch.cat([self.look(frame), state], 1)))
        return self.fc(state), state


class Twice(nn.Module):
    """A block that is called twice in a row, with one set of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = conv(3, 8, 3, 2), conv(8, 8), Head(8)

    def forward(self, x):
        first = self.block(self.stem(x))
        return self.head(self.block(first)), first


IMAGE = (3, 32, 32)
SEVERAL = {
    "Pyramid": (Pyramid, (IMAGE,)),
    "TwoHeads": (TwoHeads, (IMAGE,)),
    "Siamese": (Siamese, (IMAGE, IMAGE)),
    "ImageAndFacts": (ImageAndFacts, (IMAGE, (6,))),
    "Recurrent": (Recurrent, (IMAGE, (8, 16, 16))),
    "Twice": (Twice, (IMAGE,)),
}
"""Networks with several inputs or outputs, and the shapes of their inputs."""

ARCHITECTURES = {
    "AlexNet": alexnet,
    "VGG": vgg,
    "ResNet": resnet,
    "ResNeXt": resnext,
    "RegNet": regnet,
    "DenseNet": DenseNet,
    "SqueezeNet": squeezenet,
    "ShuffleNet": shufflenet,
    "GoogLeNet": GoogLeNet,
    "Inception": lambda: GoogLeNet(factorised=True),
    "MobileNetV2": lambda: mobilenet(nn.ReLU6, None, 3),
    "MobileNetV3": lambda: mobilenet(nn.Hardswish, nn.Hardsigmoid, 5),
    "MNASNet": lambda: mobilenet(nn.ReLU, None, 5),
    "EfficientNet": lambda: mobilenet(nn.SiLU, nn.Sigmoid, 3),
    "ConvNeXt": convnext,
    "PoolFormer": poolformer,
    "GN-ResNet": group_norm_resnet,
}
