"""From an image to a network's input: size, crop, order of channels, mean and deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from intact.data import Images, to_input
from intact.errors import DataError
from intact.ops import Shape

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PRESETS", "Interpolation", "Order", "Preprocessing"]

Interpolation = Literal["bilinear", "bicubic"]
Order = Literal["rgb", "bgr"]

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a network's number of input channels."""
DEEP = ("I", "F")
"""What Pillow's modes of more than 8 bits start with: I, I;16, I;16B, F."""
MAX_SIDE = 2**16
"""Pixels that an image may be resized to: what a file asks for must not take all memory."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the input of a network, which must be as in the network's training.

    resize         shorter side in pixels, the longer one in proportion; None: straight to the crop,
                   whatever that does to the proportions
    crop           side or (height, width) of the piece that is cut from the centre; None: the size
                   of the network's input
    mean, std      numbers, one for all channels or one per channel in the order of the network's
                   channels: `(p / 255 - mean) / std` of a pixel p, see `data.to_input`
    interpolation  how Pillow resizes; it smooths whatever it makes smaller
    order          of the network's channels; "bgr" for networks of Caffe, or trained on what OpenCV
                   reads
    normalise      False gives pixels as they are, 0 to 255 in float32: for a network that
                   normalises them itself, see `pixels.take_pixels`

    The result has the bits of torchvision's `Resize(resize, interpolation)`, `CenterCrop(crop)`,
    `ToTensor()` and `Normalize(mean, std)` on an image of Pillow's. Like torchvision's
    `ImageFolder` it converts to RGB first (dropping transparency) and leaves the orientation that a
    camera noted in the file alone. What cannot be raises `DataError`.
    """

    resize: int | None = None
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"
    order: Order = "rgb"
    normalise: bool = True

    def __post_init__(self) -> None:
        for values in (self.mean, self.std):
            if len(values) not in (1, 3):
                raise DataError(
                    f"{len(values)} numbers were given to normalise 3 channels: give 1 or 3."
                )
            with np.errstate(over="ignore"):  # what overflows is found next
                rounded = np.array(values, np.float32)
            if not np.isfinite(rounded).all():
                raise DataError("the numbers to normalise with must be finite, in float32 too.")
        if min(self.std) <= 0 or np.float32(min(self.std)) == 0:
            raise DataError("the standard deviations of the channels must be positive.")
        sides = (self.crop,) if isinstance(self.crop, int) else self.crop or ()
        for side in (*sides, *(() if self.resize is None else (self.resize,))):
            if not 1 <= side <= MAX_SIDE:
                # Without the number: one from a file may have more digits than Python prints.
                raise DataError(f"images must be 1 to {MAX_SIDE:,} pixels wide and high.")
        if self.resize is not None and sides and max(sides) > self.resize:
            raise DataError(
                f"images whose shorter side is {self.resize} pixels cannot be cropped to "
                f"{max(sides)}: resize to more, or crop to less."
            )
        for name, value, known in (
            ("interpolation", self.interpolation, get_args(Interpolation)),
            ("order", self.order, get_args(Order)),
        ):
            if value not in known:
                raise DataError(f"there is no {name} {value!r}. There are: {', '.join(known)}.")

    def shape(self, network: Shape | None = None) -> Shape:
        """The shape `[C, H, W]` of the inputs that it makes.

        network  shape of a sample of the network; None where it is not known, for RGB and `crop`

        `DataError` unless the network takes that shape.
        """
        if network is not None and (len(network) != 3 or network[0] not in MODES):
            raise DataError(
                f"the network takes samples of shape {list(network)}, which are no images of 1 or "
                "3 channels. Give an array of float32 "
                f"[N, {', '.join(map(str, network))}] in a .npy file."
            )
        channels = 3 if network is None else network[0]
        if max(len(self.mean), len(self.std)) > channels:
            raise DataError(
                f"{max(len(self.mean), len(self.std))} numbers were given to normalise the one "
                "channel of a network that takes gray images: give 1."
            )
        if channels == 1 and self.order == "bgr":
            raise DataError("gray images have no order of channels: leave 'bgr' out.")
        if self.crop is not None:
            height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        elif network is not None:
            _, height, width = network
        else:
            raise DataError(
                "the size of the network's input is not known here: give `crop`, the size to crop "
                "to; on the command line --crop, or --input-shape."
            )
        if self.resize is not None and max(height, width) > self.resize:
            raise DataError(
                f"images whose shorter side is {self.resize} pixels cannot be cropped to the "
                f"{height} x {width} of the network: resize to more (--resize)."
            )
        if network is not None and network != (channels, height, width):
            raise DataError(
                f"images are cropped to {height} x {width}, but the network takes {network[1]} x "
                f"{network[2]}: crop to that, on the command line with --crop "
                f"{','.join(map(str, dict.fromkeys(network[1:])))}"
                + ("." if self.resize is None else ", and resize as in its training (--resize).")
            )
        return channels, height, width

    def settled(self, network: Shape) -> Preprocessing:
        """The same for a network that takes samples of this shape, with everything spelled out.

        `crop` is (height, width), `mean` and `std` have a number per channel, and are 0 and 1 where
        `normalise` is False. Two that are settled and equal give the same inputs of every image.
        """
        channels, height, width = self.shape(network)
        mean, std = (self.mean, self.std) if self.normalise else ((0.0,), (1.0,))
        return replace(
            self,
            crop=(height, width),
            mean=_each(mean, channels),
            std=_each(std, channels),
        )

    def words(self) -> str:
        """What is done to images, in words, of what `settled` returned."""
        height, width = self.shape()[1:]
        steps = f"resized to {height}×{width} ({self.interpolation})"
        if self.resize is not None:
            steps = (
                f"shorter side resized to {self.resize} ({self.interpolation}), {height}×{width} "
                "from the centre"
            )
        channels = "gray" if len(self.mean) == 1 else self.order.upper()
        if not self.normalise:
            return f"{steps}, {channels}, pixels as they are"
        return f"{steps}, {channels}, mean {_shown(self.mean)}, std {_shown(self.std)}"

    def pixels(self, image: Image | Images, shape: Shape) -> Images:
        """An image as uint8 `[C, H, W]`, before it is normalised.

        image  of any size: Pillow's, or an array uint8 `[1, h, w]`, gray, or `[3, h, w]`, RGB
        shape  as `self.shape` returns it

        `DataError` for an image of more than 8 bits per channel, whose brightest would all become
        255; and whatever Pillow raises for one that is damaged.
        """
        from PIL.Image import Resampling, fromarray

        channels, height, width = shape
        if isinstance(image, np.ndarray):
            image = fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        if image.mode.startswith(DEEP):
            raise DataError(
                f"its pixels have more than 8 bits (mode {image.mode}). Scale them to 0 to 255 "
                "yourself, as only you know their range"
            )
        image = image.convert(MODES[channels])
        how = Resampling[self.interpolation.upper()]
        if self.resize is None:
            image = image.resize((width, height), how)
        else:
            image = image.resize(_resized(image.size, self.resize), how)
            # As Python rounds in torchvision's center_crop, half to even.
            left, top = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        rows = np.asarray(image).reshape(height, width, channels)
        planes: Images = rows.transpose(2, 0, 1)
        return planes[::-1] if self.order == "bgr" else planes

    def floats(self, pixels: Images) -> npt.NDArray[np.float32]:
        """What `pixels` returned, one or a batch of it, as input of the network."""
        if not self.normalise:
            return pixels.astype(np.float32)
        return to_input(pixels, self.mean, self.std)


def _each(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A number for each channel."""
    return tuple(map(float, values * channels if len(values) == 1 else values))


def _shown(values: tuple[float, ...]) -> str:
    """`0.5`, or `0.485, 0.456, 0.406` where they differ."""
    return ", ".join(f"{value:.6g}" for value in (values if len(set(values)) > 1 else values[:1]))


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height with the shorter of the two as asked, the other one rounded down."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


PRESETS: Mapping[str, Preprocessing] = MappingProxyType(
    {
        "imagenet": Preprocessing(
            resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
        "caffe": Preprocessing(
            resize=256,
            crop=224,
            mean=(103.939 / 255, 116.779 / 255, 123.68 / 255),
            std=(1 / 255,),
            order="bgr",
        ),
        "signed": Preprocessing(mean=(0.5,), std=(0.5,)),
        "unit": Preprocessing(mean=(0.0,), std=(1.0,)),
    }
)
"""What most networks were trained with.

imagenet  torchvision's and most others: 256, 224, mean and deviation of the photos of ImageNet
caffe     VGG and ResNet as converted from Caffe: BGR from 0 to 255 less the mean of ImageNet
signed    [-1, 1], straight to the network's size; the networks of `intact.zoo`
unit      [0, 1], straight to the network's size
"""
