"""Run data through a `Network` once and keep one `Sketch` per tensor, on one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from intact.errors import CalibrationError
from intact.network import Network, TensorSpec
from intact.signature import in_order, unwrapped
from intact.sketch import BUCKETS, Observer, Sketch, spread_positions

__all__ = ["SAMPLE_MAX", "Batch", "calibrate", "split", "summed_over_processes"]

SAMPLE_MAX = 2**15
"""Values of one tensor that are counted for each image. To count all eleven million of a ResNet-50
would take longer than to compute them, and a hundred images give three million of each tensor so.
"""
PART = 2**24
"""Bytes of the largest tensor of the samples that run together, if one sample is not more: so a
large batch needs no more memory than a small one, and what one layer wrote is still in a cache when
the next one reads it."""

Images: TypeAlias = torch.Tensor | npt.NDArray[Any]
Batch: TypeAlias = Images | tuple[Any, ...] | list[Any] | Mapping[str, Images]
"""`[N, *input shape]` of any floating type; or a pair of it and labels, which are ignored. For
several inputs see `split`."""


def split(batch: Any, inputs: int) -> tuple[Any, Any]:
    """What a batch holds for a network with so many inputs, and its labels: None without.

    For one input a batch is its values, or a tuple or list of these and labels. For several it is

    * a tuple or list of as many arrays, in the order of the inputs, or a mapping from their names;
    * a pair of that and labels;
    * a tuple or list with one array more, the labels, as a DataLoader of a `TensorDataset` yields.

    So a tuple whose first item is itself a tuple, list or mapping is always a pair. Nothing is
    checked here.
    """
    if not isinstance(batch, tuple | list) or not batch:
        return batch, None
    if inputs == 1 or isinstance(batch[0], tuple | list | Mapping):
        return batch[0], batch[1] if len(batch) > 1 else None
    if len(batch) == inputs + 1:
        return tuple(batch[:-1]), batch[-1]
    return tuple(batch), None


def calibrate(
    network: Network, batches: Iterable[Batch], progress: Callable[[int], object] | None = None
) -> dict[str, Sketch]:
    """Sketch the inputs and every op's result (fused clamps applied) over all batches.

    progress  called after each batch with the number of images seen so far
    returns   tensor name -> `Sketch`, in the order of execution

    Memory does not grow with the data. Of a tensor of more than `SAMPLE_MAX` values per image, that
    many are counted, at fixed positions spread over all of it; extremes are those of all values.

    The result is the same, bit for bit, for the same batches in any order. Under
    `torch.distributed`, when a process group is initialized, each process brings its own share of
    the batches (none at all, perhaps) and all return the sketches of all batches, equal to those of
    one process. How images are grouped into batches may matter, as torch's kernels may round
    differently at another batch size.

    `CalibrationError` when there are no batches, and for a batch that is empty, of the wrong shape
    or type, or that drives a tensor to NaN or infinity; it names batch and tensor.
    """
    if not (dist.is_available() and dist.is_initialized()):
        sketches = _sketch_all(network, batches, progress)
        if not sketches:
            raise _no_batches()
        return sketches
    failed = True
    try:
        sketches = _sketch_all(network, batches, progress)
        failed = False
    finally:  # whoever fails must still meet the others, or they would wait for it in vain
        failures = torch.tensor([failed], dtype=torch.int64, device=_device())
        dist.all_reduce(failures)
    if failures.item():
        raise CalibrationError(
            f"calibration failed in {failures.item()} other process(es); see their messages."
        )
    order = (*network.inputs, *(op.name for op in network.ops))
    return {name: _reduce(sketches.get(name), network.tensors[name]) for name in order}


def _sketch_all(
    network: Network, batches: Iterable[Batch], progress: Callable[[int], object] | None
) -> dict[str, Sketch]:
    """The sketches of this process's own batches; empty if it has none."""
    observers: dict[str, Observer] = {}
    largest = max(4 * math.prod(spec.shape) for spec in network.tensors.values())
    together = max(1, PART // largest)
    images = 0

    def look(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in observers:
            positions = spread_positions(math.prod(tensor.shape[1:]), SAMPLE_MAX)
            observers[name] = Observer(f"tensor {name!r}", positions)
        observers[name].add(tensor.cpu().numpy())
        return tensor

    with torch.inference_mode():
        for index, batch in enumerate(batches):
            try:
                x = _checked(batch, network)
                home = _home(network.parameters)
                for start in range(0, len(x[0]), together):
                    part = (tensor[start : start + together].to(home) for tensor in x)
                    network(unwrapped(part), look)
            except CalibrationError as error:
                raise CalibrationError(f"calibration batch {index}: {error}") from error
            images += len(x[0])
            if progress is not None:
                progress(images)
    return {name: observer.sketch() for name, observer in observers.items()}


def _checked(batch: Batch, network: Network) -> tuple[torch.Tensor, ...]:
    """What a batch holds for every input, as float32, or a `CalibrationError`."""
    names = network.inputs
    given, _ = split(batch, len(names))
    if len(names) == 1:
        return (_images(given, network.tensors[names[0]]),)
    checked = []
    for name, part in zip(names, in_order(given, names, "network", CalibrationError), strict=True):
        try:
            checked.append(_images(part, network.tensors[name]))
        except CalibrationError as error:
            raise CalibrationError(f"input {name!r}: {error}") from error
    if len({len(part) for part in checked}) > 1:
        sizes = ", ".join(f"{len(x)} of {name!r}" for name, x in zip(names, checked, strict=True))
        raise CalibrationError(f"every input must have as many samples, but there are {sizes}.")
    return tuple(checked)


def _images(given: object, spec: TensorSpec) -> torch.Tensor:
    """The values of an input as float32, or a `CalibrationError`."""
    if not isinstance(given, torch.Tensor | np.ndarray):
        raise CalibrationError(
            f"a batch is a tensor or an array, or a pair of one and labels, not a "
            f"{type(given).__name__}."
        )
    try:
        x = torch.as_tensor(given)
    except TypeError as error:  # an array of text or of objects
        raise CalibrationError(
            f"the images are an array of {given.dtype}. Give float32."
        ) from error
    if x.layout != torch.strided or x.is_meta:
        raise CalibrationError("the images are sparse or without values. Give a dense tensor.")
    if not x.is_floating_point():
        raise CalibrationError(
            f"the images are {x.dtype}. Give them as float32, normalised as in training."
        )
    if tuple(x.shape[1:]) != spec.shape or x.ndim == 0:
        hint = " Put it in a list: that is one image." if tuple(x.shape) == spec.shape else ""
        raise CalibrationError(
            f"its shape is {list(x.shape)}, but the network takes "
            f"[N, {', '.join(map(str, spec.shape))}].{hint}"
        )
    if len(x) == 0:
        raise CalibrationError("it holds no images.")
    return x.to(torch.float32)


def _home(parameters: Mapping[str, torch.Tensor]) -> torch.device:
    """Where the network computes."""
    return next((p.device for p in parameters.values()), torch.device("cpu"))


def _device() -> torch.device:
    """Where the process group wants its tensors: NCCL moves nothing but GPU memory."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _reduce(sketch: Sketch | None, spec: TensorSpec) -> Sketch:
    """The sketch of all processes' data for one tensor; None for a process that saw no data."""
    if sketch is None:
        channels = spec.shape[0] if spec.shape else 1
        sums = np.zeros((3, BUCKETS), np.int64)
        extremes = np.full((2, channels), -np.inf, np.float32)
    else:
        sums = np.stack([sketch.counts, sketch.low_sums, sketch.low_squares])
        extremes = np.stack([-sketch.channel_min, sketch.channel_max])  # so that MAX does for both
    total = torch.from_numpy(sums).to(_device())
    bounds = torch.from_numpy(extremes).to(_device())
    dist.all_reduce(total, dist.ReduceOp.SUM)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    sums, extremes = total.cpu().numpy(), bounds.cpu().numpy()
    if not sums[0].any():
        raise _no_batches()
    # A minimum of 0.0 is -0.0 by now, of which 0 - x makes 0.0 again.
    return Sketch(sums[0], sums[1], sums[2], 0 - extremes[0], extremes[1])


def summed_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor of one shape; the tensor itself where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.to(_device())
    dist.all_reduce(total)
    return total.to(values.device)


def _no_batches() -> CalibrationError:
    return CalibrationError(
        "there are no calibration batches. Give at least one; a generator can be used only once."
    )
