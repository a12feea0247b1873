"""`Samples`: what a network is calibrated and tested on, read in batches, again and again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from intact.data import Labels, spread
from intact.data.preprocessing import Preprocessing
from intact.errors import DataError
from intact.ops import Shape
from intact.signature import Values, wrapped

__all__ = ["Batch", "Listed", "Numbered", "Positions", "Samples", "Streamed"]

Batch = tuple[Values, Labels | None]
"""Samples float32 `[n, *shape]`, finite, with n >= 1, and their labels int64 `[n]`, if any. Of
several inputs a tuple of such arrays in place of the samples."""
Positions = npt.NDArray[np.int64]
Numbered = tuple[Positions, Values, Labels | None]
"""A `Batch`, with the positions of its samples in the source before it, int64 `[n]`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples(ABC):
    """A source of samples that is read in batches, again and again, without being held in memory.

    name           what to call it in messages and reports: "images of photos", "test.npz"
    shape          of one sample; of several inputs a tuple of the shapes of each
    count          samples that there are, at most, as files that cannot be read may be left out;
                   None where only reading tells
    labelled       whether batches come with labels
    classes        names of the classes, which labels are indices into, where the source has them
    preprocessing  how pixels became these samples; None for floats, which are taken as they are
    names          of all samples of the source, by position: the paths of images below their
                   folder; None where samples have none but their numbers
    inputs         names of the inputs that every sample has a value for, where there are several;
                   batches then hold tuples in this order. None for one input

    `open_samples` makes one of whatever a user has, `open_several` for networks with several
    inputs.
    """

    name: str
    shape: Shape | tuple[Shape, ...]
    count: int | None
    labelled: bool
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    names: Sequence[str] | None = None
    inputs: tuple[str, ...] | None = None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of one sample of every input, also where there is one."""
        return wrapped(self.shape, self.inputs or ("input",))

    @abstractmethod
    def _read(self, size: int) -> Iterator[Numbered]: ...

    @abstractmethod
    def _at_most(self, count: int) -> Samples: ...

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in batches of `size`, in the same order whenever it is called.

        The last batch holds what is left. A batch of images is smaller, too, by those that could
        not be read, where these are skipped. `DataError` for a sample that cannot be used; it says
        which one.
        """
        if size < 1:
            raise DataError(f"a batch cannot hold {size} samples: give 1 or more.")
        return ((x, labels) for _, x, labels in self._read(size))

    def named_batches(self, size: int) -> Iterator[tuple[tuple[str, ...], Values]]:
        """As `batches`, without labels, but with what each sample is called; size >= 1.

        That is its name in `names`, or its position in the source, from 0.
        """
        for positions, x, _ in self._read(size):
            numbers = positions.tolist()
            yield tuple(str(i) if self.names is None else self.names[i] for i in numbers), x

    def take(self, count: int | None) -> Samples:
        """At most so many of the samples; None: all.

        They are spread evenly over all, see `data.spread`, where it is known how many there are,
        and are the first ones elsewhere.
        """
        if count is None:
            return self
        if count < 1:
            raise DataError(f"{count} samples are none to work with: take 1 or more.")
        return self._at_most(count)


@dataclass(frozen=True, eq=False, kw_only=True)
class Listed(Samples):
    """Samples of which each can be read alone.

    reader     called with the positions of samples and the size of batches
    positions  of these samples, ascending
    """

    count: int = field(init=False)
    reader: Callable[[Positions, int], Iterator[Numbered]]
    positions: Positions

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", len(self.positions))
        if not self.count:
            raise DataError(f"{self.name}: there are no samples.")

    def _read(self, size: int) -> Iterator[Numbered]:
        return self.reader(self.positions, size)

    def _at_most(self, count: int) -> Samples:
        return replace(self, positions=self.positions[spread(len(self.positions), count)])


@dataclass(frozen=True, eq=False, kw_only=True)
class Streamed(Samples):
    """Samples that come one after the other, nobody knows how many.

    reader  called with the size of batches
    most    so many of them at most; None: all
    """

    count: None = field(init=False, default=None)
    reader: Callable[[int], Iterator[Numbered]]
    most: int | None = None

    def _read(self, size: int) -> Iterator[Numbered]:
        left = self.most
        for positions, x, labels in self.reader(size):
            if left is None or left > len(x):
                yield positions, x, labels
                left = None if left is None else left - len(x)
            else:
                yield positions[:left], x[:left], None if labels is None else labels[:left]
                return

    def _at_most(self, count: int) -> Samples:
        return replace(self, most=count if self.most is None else min(count, self.most))
