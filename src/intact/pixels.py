"""Pixels in: the normalisation of images becomes part of the network, and so of the program.

Then the program takes raw uint8 pixels as they come from a camera or a decoder, and there is no
float arithmetic left at its input: every pixel is its own code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from intact.errors import IntactError
from intact.network import Network, TensorSpec
from intact.ops import Conv2d, Op, Shape, Table
from intact.pointwise import Pointwise, X

__all__ = ["take_pixels"]

_aten = torch.ops.aten


def take_pixels(network: Network, mean: Sequence[float], std: Sequence[float]) -> Network:
    """The same network, but fed with pixels from 0 to 255 instead of `(p / 255 - mean) / std`.

    mean, std  one for all channels, or one per channel, as the network was trained

    Where the input is read by convolutions without padding alone, the normalisation is folded into
    their weights and biases, which costs nothing: `w * (p / 255 - mean) / std` is a convolution of
    `p`. Padding stands for a normalised 0, which no pixel is; then a table for each channel,
    `normalise`, comes first. The float function is the same up to rounding.

    Raises `IntactError` where the input is no image `[C, H, W]` or the numbers do not fit it.
    """
    shape = network.tensors[network.input].shape
    _check(shape, mean, std)
    channels = shape[0]
    means, stds = (
        torch.tensor(values, dtype=torch.float64).expand(channels) for values in (mean, std)
    )
    readers = [op for op in network.ops if network.input in op.inputs]
    unpadded = [op for op in readers if isinstance(op, Conv2d) and not any(op.padding)]
    tensors = {
        **network.tensors,
        network.input: replace(network.tensors[network.input], pixels=True),
    }
    if len(unpadded) == len(readers):
        parameters = dict(network.parameters)
        for op in unpadded:
            parameters |= _folded(op, network, 1 / (255 * stds), -means / stds)
        return replace(network, tensors=tensors, parameters=parameters)
    name = _free("normalise", network)
    tensors[name] = TensorSpec(shape)
    rest = tuple(_reading(op, network.input, name) for op in network.ops)
    # As `data.to_input` computes it, each operation rounded to float32.
    unit = Pointwise(_aten.div.Tensor, (X, 255.0), label="normalise")
    centred = Pointwise(_aten.sub.Tensor, (unit, _constant(mean)), label="normalise")
    function = Pointwise(_aten.div.Tensor, (centred, _constant(std)), label="normalise")
    return replace(
        network,
        ops=(Table(name, (network.input,)), *rest),
        tensors=tensors,
        functions={**network.functions, name: function},
    )


def _check(shape: Shape, mean: Sequence[float], std: Sequence[float]) -> None:
    if len(shape) != 3:
        raise IntactError(
            f"the network takes samples of shape {list(shape)}, which are no images [C, H, W]: it "
            "cannot take pixels."
        )
    for what, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, shape[0]) or not all(map(math.isfinite, values)):
            raise IntactError(
                f"the {what} is {list(values)}: give one finite number, or one for each of the "
                f"{shape[0]} channels."
            )
    if min(std) <= 0:
        raise IntactError(f"the std is {list(std)}, but it must be positive.")


def _folded(
    op: Conv2d, network: Network, factor: torch.Tensor, offset: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The parameters of a convolution of `p` that was one of `p * factor + offset`.

    factor, offset  float64 [C], of the input's channels
    """
    weight = network.parameters[f"{op.name}.weight"].double()
    bias = network.parameters.get(f"{op.name}.bias")
    outputs, per_group = weight.shape[:2]
    # Output channel o reads the channels of its group.
    group = torch.arange(outputs) // (outputs // op.groups)
    read = group[:, None] * per_group + torch.arange(per_group)
    added = (weight * offset[read][..., None, None]).sum((1, 2, 3))
    return {
        f"{op.name}.weight": (weight * factor[read][..., None, None]).float(),
        f"{op.name}.bias": (added if bias is None else bias.double() + added).float(),
    }


def _constant(values: Sequence[float]) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor.reshape(()) if len(values) == 1 else tensor.reshape(-1, 1, 1)


def _free(name: str, network: Network) -> str:
    while name in network.tensors:
        name += "_"
    return name


def _reading(op: Op, old: str, new: str) -> Op:
    return replace(op, inputs=tuple(new if tensor == old else tensor for tensor in op.inputs))
