"""Trained weights from a file into a network of the zoo: exactly those that it has, or an error."""

from __future__ import annotations

from os import PathLike
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from intact.errors import StorageError

__all__ = ["read_weights"]

Model = TypeVar("Model", bound=nn.Module)


def read_weights(model: Model, path: str | PathLike[str], what: str) -> Model:
    """Give `model` the weights of a safetensors file, in place; returns it in eval mode.

    what  the network in words, for messages: "a LeNet with bias 'last'"

    The file must hold exactly the tensors of `model.state_dict()`, of the same shapes and types and
    finite; otherwise `StorageError` lists everything that is wrong with it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read as a safetensors file: {error}") from error
    defects = _defects(tensors, model.state_dict())
    if defects:
        raise StorageError(f"{path} does not hold the weights of {what}: {'; '.join(defects)}.")
    model.load_state_dict(tensors)
    return model.eval()


def _defects(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Every way in which the tensors are not those that the network wants."""
    defects = [f"{name} is missing" for name in wanted if name not in given]
    for name, tensor in given.items():
        if name not in wanted:
            defects.append(f"{name} is not part of the network")
        elif tensor.shape != wanted[name].shape:
            shape, right = list(tensor.shape), list(wanted[name].shape)
            defects.append(f"{name} has shape {shape}, not {right}")
        elif tensor.dtype != wanted[name].dtype:
            defects.append(f"{name} is {_dtype(tensor)}, not {_dtype(wanted[name])}")
        elif not torch.isfinite(tensor).all():
            defects.append(f"{name} holds NaN or infinity")
    return defects


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
