"""What Python code has of samples, lists, data sets, loaders, generators, as `Samples`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.data import Labels
from intact.data.arrays import array_samples
from intact.data.checking import as_floats, as_labels, check_floats, check_pixels, check_shape
from intact.data.preprocessing import Preprocessing
from intact.data.samples import Listed, Numbered, Positions, Samples, Streamed
from intact.errors import DataError, DataWarning
from intact.ops import Shape

__all__ = ["iterable_samples"]

Array = npt.NDArray[Any]


def iterable_samples(
    source: object, name: str, preprocessing: Preprocessing | None, shape: Shape | None
) -> Samples:
    """Samples from whatever Python code iterates over.

    source         an array or tensor `[N, …]`, alone or in a pair with labels `[N]`; or something
                   that yields samples or batches, each alone or in a pair with its label or labels
    preprocessing  what becomes of pixels, uint8
    shape          of a sample of the network. Where it is None, what is yielded is taken for a
                   batch, unless it comes in a pair with a single label

    A list, and whatever else has a length and takes indices, like a data set of torch's, is
    `Listed`; everything else is `Streamed`. A generator can be read once. `DataError` for what
    cannot be used; `DataWarning` for a loader that shuffles.
    """
    whole = _whole(source)
    if whole is not None:
        return array_samples(name, *whole, preprocessing, shape)
    if isinstance(source, Mapping | str | bytes) or not (
        isinstance(source, Iterable) or hasattr(source, "__getitem__")
    ):
        raise DataError(
            f"samples cannot be read from a {type(source).__name__}: give a folder of images, a "
            ".npy, .npz or .safetensors file, or something to iterate over that yields tensors, or "
            "pairs of tensors and labels."
        )
    _warn_of_shuffling(source, name)
    converter = _Converter(name, preprocessing, shape)
    if _has_indices(source):
        return _listed(source, name, converter)
    return _streamed(source, name, converter)  # type: ignore[arg-type]  # iterable, as was checked


def _whole(source: object) -> tuple[Array, Array | None] | None:
    """The array of all samples, and that of their labels, if that is what was given."""
    if isinstance(source, tuple) and len(source) == 2:
        x, labels = _array(source[0]), _array(source[1])
        if x is not None and labels is not None and x.ndim and labels.ndim == 1:
            return x, labels
    x = _array(source)
    return None if x is None or not x.ndim else (x, None)


def _array(value: object) -> Array | None:
    """A tensor, an array or a number as an array; None for anything else."""
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        tensor: Any = value.detach()
        if tensor.dtype == torch.bfloat16:  # which NumPy does not know
            tensor = tensor.float()
        array: Array = tensor.cpu().numpy()
        return array
    if isinstance(value, int | float | np.ndarray | np.generic):
        return np.asarray(value)
    return None


def _has_indices(source: object) -> bool:
    """Whether it has a length and can be asked for its elements by their positions."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.utils.data.IterableDataset):
        return False  # it has `__getitem__`, but that of its base class
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


@dataclass(frozen=True)
class _InOrder:
    """The elements of something that has a length and takes indices."""

    source: Any

    def __iter__(self) -> Iterator[object]:
        return (self.source[i] for i in range(len(self.source)))


def _warn_of_shuffling(source: object, name: str) -> None:
    torch = sys.modules.get("torch")
    if (
        torch is not None
        and isinstance(source, torch.utils.data.DataLoader)
        and isinstance(source.sampler, torch.utils.data.RandomSampler)
    ):
        warnings.warn(
            f"{name}: the DataLoader shuffles, so samples come in another order each time, and the "
            "first ones are others. Make it with shuffle=False for results that can be had again.",
            DataWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class _Converter:
    """From what is yielded, an element, to a batch as the network takes it.

    labelled  whether elements have labels; None until the first one was seen
    """

    name: str
    preprocessing: Preprocessing | None
    shape: Shape | None
    labelled: bool | None = None

    def arrays(self, element: object, number: int) -> tuple[Array, Labels | None, bool]:
        """An element as a batch `[n, …]`, its labels, and whether it was a single sample."""
        where = f"element {number} of {self.name}"
        parts = tuple(element) if isinstance(element, tuple | list) else (element,)
        if len(parts) not in (1, 2):
            raise DataError(
                f"{where} is a {type(element).__name__} of {len(parts)}: give samples alone, or "
                "pairs of them and their labels."
            )
        arrays = [_array(part) for part in parts]
        if arrays[0] is None or arrays[-1] is None:
            kinds = " and a ".join(type(part).__name__ for part in parts)
            raise DataError(
                f"{where} is a {kinds}: give tensors, or pairs of tensors and labels. Images "
                "become tensors by torchvision's PILToTensor, for example."
            )
        x, labels = arrays[0], arrays[1] if len(arrays) == 2 else None
        if self.labelled is not None and self.labelled != (labels is not None):
            raise DataError(
                f"{where} has {'no' if self.labelled else 'a'} label, unlike the first."
            )
        if self.is_pixels(x):
            single = x.ndim == 3
        elif self.shape is not None:
            single = x.ndim == len(self.shape)
        else:
            single = labels is not None and not labels.ndim
        if single:
            x, labels = x[None], None if labels is None else labels.reshape(1, *labels.shape[1:])
        if not x.ndim or not len(x):
            raise DataError(f"{where} holds no samples.")
        if self.is_pixels(x):
            check_pixels(x.shape, where)
        else:
            check_floats(x.dtype, where)
            if self.shape is not None:
                check_shape(x.shape[1:], self.shape, where)
        return x, None if labels is None else as_labels(labels, len(x), where), single

    def floats(self, x: Array, numbers: Positions) -> npt.NDArray[np.float32]:
        """What `arrays` returned as input of the network.

        numbers  of the samples, for messages
        """
        if self.preprocessing is not None and self.is_pixels(x):
            made = self.preprocessing.shape(self.shape)
            pixels = [self.preprocessing.pixels(image, made) for image in x]
            return self.preprocessing.floats(np.stack(pixels))
        return as_floats(x, self.name, numbers)

    def is_pixels(self, x: Array) -> bool:
        """Whether an array holds pixels that are to be normalised."""
        return self.preprocessing is not None and x.dtype == np.uint8

    def after(self, x: Array, labels: Labels | None) -> tuple[Shape, _Converter]:
        """The shape of the samples, now that the first ones are known, and what converts the rest.

        x, labels  what `arrays` returned of the first element
        """
        if self.preprocessing is not None and self.is_pixels(x):
            shape = self.preprocessing.shape(self.shape)
        else:
            shape = x.shape[1:]
        return shape, replace(self, shape=shape, labelled=labels is not None)


def _listed(source: Any, name: str, converter: _Converter) -> Samples:
    """The samples of something that has a length and takes indices."""
    if not len(source):
        raise DataError(f"{name}: there are no samples.")
    x, labels, single = converter.arrays(source[0], 0)
    shape, convert = converter.after(x, labels)
    if isinstance(source, list | tuple):
        lengths = [len(convert.arrays(element, i)[0]) for i, element in enumerate(source)]
    elif single:
        lengths = [1] * len(source)
    else:  # a data set of batches, which would all have to be made to learn how long they are
        return _streamed(_InOrder(source), name, converter)
    ends = np.cumsum(lengths)
    starts = ends - lengths

    def pieces(positions: Positions) -> Iterator[Numbered]:
        bounds = np.searchsorted(positions, [starts, ends])
        for i, (low, high) in enumerate(bounds.T.tolist()):
            if low < high:
                x, labels, _ = convert.arrays(source[i], i)
                at = positions[low:high]
                inside = at - starts[i]
                given = None if labels is None else labels[inside]
                yield at, convert.floats(x[inside], at), given

    return Listed(
        name=name,
        shape=shape,
        labelled=labels is not None,
        preprocessing=converter.preprocessing if converter.is_pixels(x) else None,
        reader=lambda positions, size: _rebatch(pieces(positions), size),
        positions=np.arange(ends[-1]),
    )


def _streamed(source: Iterable[object], name: str, converter: _Converter) -> Samples:
    """The samples of something that can only be iterated over."""
    first, start = _begin(source, name)
    x, labels, _ = converter.arrays(first, 0)
    shape, convert = converter.after(x, labels)

    def pieces() -> Iterator[Numbered]:
        done = 0
        for i, element in enumerate(start()):
            x, labels, _ = convert.arrays(element, i)
            at = np.arange(done, done + len(x))
            yield at, convert.floats(x, at), labels
            done += len(x)

    return Streamed(
        name=name,
        shape=shape,
        labelled=labels is not None,
        preprocessing=converter.preprocessing if converter.is_pixels(x) else None,
        reader=lambda size: _rebatch(pieces(), size),
    )


def _begin(source: Iterable[object], name: str) -> tuple[object, Callable[[], Iterator[object]]]:
    """The first element, and what starts over: for an iterator, only once."""
    iterator = iter(source)
    try:
        first = next(iterator)
    except StopIteration:
        raise DataError(f"{name}: there are no samples.") from None
    if iterator is not source:
        return first, lambda: iter(source)
    unread = [chain([first], iterator)]

    def start() -> Iterator[object]:
        if not unread:
            raise DataError(
                f"{name} can be read only once, as it is a {type(source).__name__}, and has been "
                "read. Give a list, or something that starts over whenever it is iterated over, "
                "like a DataLoader."
            )
        return unread.pop()

    return first, start


def _rebatch(pieces: Iterable[Numbered], size: int) -> Iterator[Numbered]:
    """The same samples in batches of `size`; the last one holds what is left."""
    held: list[Numbered] = []
    count = 0
    for positions, x, labels in pieces:
        start = 0
        while start < len(x):
            part = slice(start, start + size - count)
            held.append((positions[part], x[part], None if labels is None else labels[part]))
            count += len(held[-1][0])
            start = part.stop
            if count == size:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[Numbered]) -> Numbered:
    positions = np.concatenate([positions for positions, _, _ in held])
    labels = [labels for _, _, labels in held if labels is not None]
    x = np.concatenate([x for _, x, _ in held])
    return positions, x, np.concatenate(labels) if labels else None
