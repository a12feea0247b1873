"""`Sketch`: what one tensor looked like over any amount of data, in bounded memory, exactly.

A float32 is filed under its upper 16 bits, the bfloat16 that truncation makes of it: 65,536 fixed
buckets, none wider than 1/128 of its values. All that is kept are integers (per bucket a count, and
the sums of the lower 16 bits and of their squares) and extremes, so merging two sketches is exact,
associative and commutative: no result depends on the order or the sharding of the data.

Of a tensor that is large in every sample, an `Observer` may count the values at fixed positions
only; its extremes are those of all values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from intact.errors import CalibrationError

__all__ = ["Density", "Observer", "Sketch", "spread_positions"]

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]

BUCKETS = 2**16
LOW_MAX = 2**16 - 1
SIGN, INFINITE = 0x8000, 0x7F80
"""Of a bucket's number: the sign bit, and the lowest magnitude that is no finite number."""

MAGNITUDE = np.arange(BUCKETS) & (SIGN - 1)
EXPONENT = MAGNITUDE >> 7
SHIFT = np.maximum(EXPONENT, 1) - 1
"""The lowest bit of a bucket's values is worth `2**(SHIFT - 149)`."""
SIGNIFICAND = ((MAGNITUDE & 0x7F) | np.where(EXPONENT > 0, 0x80, 0)) << 16
"""A value is `±(SIGNIFICAND + low) * 2**(SHIFT - 149)`, `low` being its lower 16 bits."""
NEGATIVE = np.arange(BUCKETS) >= SIGN
ASCENDING = np.concatenate([np.arange(SIGN + INFINITE)[: SIGN - 1 : -1], np.arange(INFINITE)])
"""The finite buckets in the order of their values."""

CHUNK = 2**14
"""Values that are filed together: what stays in a core's cache."""
COUNT_SHIFT = 40
PENDING_MAX = 2**23
"""A sum of counts, shifted, and lower halves is split before it holds more values than that: the
lower halves stay below `2**23 * LOW_MAX < 2**40`, and all of it below 2**63."""


class Density(NamedTuple):
    """A distribution as uniform pieces: `mass[i]` values spread over `[start[i], end[i]]`.

    Ascending, disjoint but for common ends, float64 all. A piece with `start == end` is a point:
    values that occur again and again, as 0 does behind a ReLU, stay where they are.
    """

    start: Float64
    end: Float64
    mass: Float64


@dataclass(frozen=True, eq=False, repr=False)
class Sketch:
    """What a tensor looked like. Make one with `Sketch.of`, join two with `merge`.

    counts       int64 [65536]: values per bucket; bucket `k` holds the float32 values whose upper
                 16 bits are `k`
    low_sums     int64 [65536]: sum of their lower 16 bits
    low_squares  int64 [65536]: sum of the squares of their lower 16 bits. The first to overflow, no
                 sooner than at 2**31 values in one bucket, which is an error
    channel_min  float32 [C]: smallest value of each channel, axis 0 of a sample
    channel_max  float32 [C]: largest value of each channel

    -0.0 counts as 0. Arrays are copies and read-only. Two sketches are equal when all fields are.
    """

    counts: Int64
    low_sums: Int64
    low_squares: Int64
    channel_min: Float32
    channel_max: Float32

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            extremes = field.name.startswith("channel")
            array = np.array(given, np.float32) if extremes else _sparse_copy(given)
            array.flags.writeable = False
            object.__setattr__(self, field.name, array)
        if self.counts.sum() == 0:
            raise CalibrationError("a sketch needs at least one value.")
        _check_squares(self.low_squares)

    @classmethod
    def of(cls, values: npt.ArrayLike, name: str = "the tensor") -> Sketch:
        """Sketch a batch.

        values  float32 [N, C, ...] in any memory layout (anything else is converted to float32
                first); [N] is one channel
        name    of the tensor, for the error message

        NaN and infinite values, and no values at all, are a `CalibrationError`.
        """
        observer = Observer(name)
        observer.add(values)
        return observer.sketch()

    @property
    def overall(self) -> Sketch:
        """The same values as those of one channel: what tensors of any shapes have in common."""
        return Sketch(
            self.counts,
            self.low_sums,
            self.low_squares,
            self.channel_min.min(keepdims=True),
            self.channel_max.max(keepdims=True),
        )

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of both sketches' data together: exact, associative, commutative."""
        if self.channel_min.shape != other.channel_min.shape:
            raise CalibrationError(
                f"sketches of {len(self.channel_min)} and {len(other.channel_min)} channels are "
                "not of the same tensor."
            )
        return Sketch(
            self.counts + other.counts,
            self.low_sums + other.low_sums,
            self.low_squares + other.low_squares,
            np.minimum(self.channel_min, other.channel_min),
            np.maximum(self.channel_max, other.channel_max),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sketch):
            return NotImplemented
        names = [field.name for field in fields(self)]
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in names)

    __hash__ = None  # type: ignore[assignment]  # content decides, and content is large

    def __repr__(self) -> str:
        return (
            f"<Sketch of {self.count:,} values in [{self.min:g}, {self.max:g}], "
            f"mean {self.mean:g}, std {self.std:g}>"
        )

    # -- exact statistics ------------------------------------------------------------------------

    @cached_property
    def count(self) -> int:
        """How many values there were."""
        return int(self.counts.sum())

    @cached_property
    def min(self) -> float:
        """The smallest value."""
        return float(self.channel_min.min())

    @cached_property
    def max(self) -> float:
        """The largest value."""
        return float(self.channel_max.max())

    @property
    def absmax(self) -> float:
        """The largest magnitude."""
        return max(-self.min, self.max)

    @property
    def mean(self) -> float:
        """The mean: the exact quotient, rounded once."""
        return self._moments[0] / (self.count << 149)

    @property
    def std(self) -> float:
        """The standard deviation of the population: root of the exact variance, rounded twice."""
        first, second = self._moments
        return math.sqrt((self.count * second - first**2) / (self.count**2 << 298))

    @property
    def three_sigma(self) -> tuple[float, float]:
        """`(mean - 3 std, mean + 3 std)`."""
        return self.mean - 3 * self.std, self.mean + 3 * self.std

    @cached_property
    def _moments(self) -> tuple[int, int]:
        """The exact sum of the values in units of 2**-149, and of their squares, of 2**-298."""
        first = second = 0
        (used,) = self.counts.nonzero()
        columns = (self.counts, self.low_sums, self.low_squares, SIGNIFICAND, SHIFT, NEGATIVE)
        for n, s, q, m, shift, negative in zip(*(c[used].tolist() for c in columns), strict=True):
            total = (n * m + s) << shift  # the sum of (m + low); Python's integers never overflow
            first += -total if negative else total
            second += (n * m * m + 2 * m * s + q) << (2 * shift)
        return first, second

    # -- the distribution, to within a bucket -----------------------------------------------------

    @cached_property
    def density(self) -> Density:
        """The distribution, one piece for each bucket in use.

        A piece has its bucket's exact mean, and the exact standard deviation too, unless it would
        reach beyond the bucket or `[min, max]`; then it is narrower. So a bucket whose values are
        all equal is a point, and every answer is right to within one bucket, 1/128 of the value.
        """
        used = ASCENDING[self.counts[ASCENDING] > 0]
        mass = self.counts[used].astype(np.float64)
        low = self.low_sums[used] / mass
        # A uniform distribution of standard deviation d is 2 * sqrt(3) * d wide.
        spread = np.sqrt(3 * np.maximum(self.low_squares[used] / mass - low**2, 0))
        spread = np.minimum(spread, np.minimum(low, LOW_MAX - low))
        unit = np.ldexp(1.0, SHIFT[used] - 149)
        mean = (SIGNIFICAND[used] + low) * np.where(NEGATIVE[used], -unit, unit)
        mean = np.clip(mean, self.min, self.max)
        half = np.minimum(spread * unit, np.minimum(mean - self.min, self.max - mean))
        return Density(mean - half, mean + half, mass)

    @cached_property
    def _cumulative(self) -> Float64:
        """`_cumulative[i]`: how many values lie in the first `i` pieces; exact below 2**53."""
        return np.concatenate([[0.0], np.cumsum(self.density.mass)])

    def _up_to(self, x: npt.ArrayLike, inclusive: bool) -> Float64:
        """How many values are less than `x`, or at most `x`: float64 of the shape of `x`."""
        start, end, mass = self.density
        bound = np.asarray(x, np.float64)
        whole = np.searchsorted(end, bound, "right" if inclusive else "left")
        i = np.minimum(whole, len(end) - 1)  # the piece that `x` may divide, or stand before
        width = np.where(end[i] > start[i], end[i] - start[i], 1.0)
        part = np.clip((bound - start[i]) / width, 0, 1) * mass[i]
        return np.asarray(self._cumulative[whole] + np.where(whole < len(end), part, 0))

    def fraction_outside(self, low: float, high: float) -> float:
        """The fraction of values below `low` or above `high`, for `low <= high`.

        Exactly 0 for `(min, max)`; else to within the values of the buckets that hold the bounds.
        """
        outside = self._up_to(low, inclusive=False) + self.count - self._up_to(high, inclusive=True)
        return float(outside) / self.count

    def quantile(self, p: float) -> float:
        """The smallest value that a fraction `p` of all does not exceed; exact at 0 and 1."""
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}, but a fraction lies between 0 and 1.")
        if p in (0, 1):
            return self.max if p else self.min
        start, end, mass = self.density
        wanted = p * self.count
        i = int(np.searchsorted(self._cumulative[1:], wanted))
        part = (wanted - self._cumulative[i]) / mass[i]
        return float(start[i] + part * (end[i] - start[i]))

    def histogram(self, bins: int, low: float, high: float) -> Float64:
        """How many values lie in each of `bins` equal bins of `[low, high]`: float64 [bins].

        As in `numpy.histogram`: bins include their lower edge, the last one both, and values
        outside of `[low, high]` are not counted.
        """
        edges = np.linspace(low, high, bins + 1)
        below = self._up_to(edges, inclusive=False)
        below[-1] = self._up_to(high, inclusive=True)
        return np.diff(below)


class Observer:
    """Looks at one tensor, batch by batch, and yields its `Sketch`: that of all batches merged.

    name       of the tensor, for error messages
    positions  which values of a sample to count: indices into its values in row-major order, as
               `spread_positions` gives them; None counts all. Extremes are those of all values

    Sums are kept in place, so that a small batch costs no more than its values.
    """

    def __init__(self, name: str, positions: npt.NDArray[np.intp] | None = None) -> None:
        self._name = name
        self._positions = positions
        self._counts, self._low_sums, self._low_squares, self._pending = (
            np.zeros(BUCKETS, np.int64) for _ in range(4)
        )
        self._pending_values = 0
        self._low = self._high = np.zeros(0, np.float32)

    def add(self, values: npt.ArrayLike) -> None:
        """Look at a batch; what it may hold, and what is refused, as for `Sketch.of`."""
        with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, and refused below
            batch = np.asarray(values, np.float32)
        if batch.size == 0:
            raise CalibrationError(
                f"{self._name} holds no values: its shape is {list(batch.shape)}."
            )
        channels = batch.reshape(len(batch), batch.shape[1] if batch.ndim > 1 else 1, -1)
        with np.errstate(invalid="ignore"):  # a NaN is refused below
            # Adding 0 turns -0.0 into 0.0; which of the two a minimum yields is a matter of order.
            low = channels.min(axis=(0, 2)) + np.float32(0)
            high = channels.max(axis=(0, 2)) + np.float32(0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise CalibrationError(
                f"{self._name} holds {np.isnan(batch).sum()} NaN and {np.isinf(batch).sum()} "
                f"infinite values of {batch.size}. Such a tensor has no range: look for a division "
                "by zero or an overflow in the network, or at the data."
            )
        first = not len(self._low)
        self._low = low if first else np.minimum(self._low, low)
        self._high = high if first else np.maximum(self._high, high)
        samples = batch.reshape(len(batch), -1)
        if self._positions is not None:
            samples = samples[:, self._positions]
        flat = samples.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            self._file(flat[start : start + CHUNK])

    def sketch(self) -> Sketch:
        """What was seen so far."""
        self._split_pending()
        return Sketch(self._counts, self._low_sums, self._low_squares, self._low, self._high)

    def _file(self, values: Float32) -> None:
        """File float32 values [n], n <= CHUNK, under their buckets.

        One sum holds both counts and lower halves, which saves one of three passes.
        """
        if self._pending_values + len(values) > PENDING_MAX:
            self._split_pending()
        bits = (values + np.float32(0)).view(np.uint32)  # -0.0 + 0 is 0.0
        bucket = (bits >> np.uint32(16)).astype(np.intp)
        low = (bits & np.uint32(LOW_MAX)).astype(np.int64)
        np.add.at(self._low_squares, bucket, low * low)
        low += 1 << COUNT_SHIFT
        np.add.at(self._pending, bucket, low)
        self._pending_values += len(values)

    def _split_pending(self) -> None:
        (used,) = self._pending.nonzero()
        pending = self._pending[used]
        self._counts[used] += pending >> COUNT_SHIFT
        self._low_sums[used] += pending & (2**COUNT_SHIFT - 1)
        self._pending[used] = 0
        self._pending_values = 0
        _check_squares(self._low_squares)


def _sparse_copy(given: npt.ArrayLike) -> Int64:
    """An int64 copy that writes only what is not 0: most buckets of a tensor are empty, and memory
    that nobody has written to takes no room.
    """
    array = np.asarray(given, np.int64)
    copy = np.zeros(array.shape, np.int64)
    used = array.nonzero()
    copy[used] = array[used]
    return copy


def _check_squares(low_squares: Int64) -> None:
    if low_squares.min() < 0:
        raise CalibrationError("too many equal values for one sketch; use less data.")


def spread_positions(size: int, most: int) -> npt.NDArray[np.intp] | None:
    """At most `most` of the positions 0 to `size - 1`, ascending and distinct; None: all of them.

    One of every `k`, at a place within them that the golden ratio moves: equal steps would see
    some columns of an image only. Integers alone, so the same everywhere.
    """
    if size <= most:
        return None
    stride = -(-size // most)
    i = np.arange(size // stride, dtype=np.uint64)
    golden = (i * np.uint64(2654435769)) & np.uint64(2**32 - 1)  # 2**32 / golden ratio
    places = i * np.uint64(stride) + ((golden * np.uint64(stride)) >> np.uint64(32))
    positions: npt.NDArray[np.intp] = places.astype(np.intp)
    return positions
