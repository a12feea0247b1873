"""What the channels of samples look like: extremes, means and standard deviations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from intact.errors import DataError

__all__ = ["Channels"]


@dataclass(frozen=True)
class Channels:
    """Extremes, means and standard deviations of each channel (axis 0 of a sample), in float64.

    count      samples that were looked at, at least 1
    low, high  smallest and largest value
    mean, std  of all values; the standard deviation is that of the population

    They are for judging data by; what is calibrated is a `Sketch`, whose sums are exact.
    """

    count: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, batch: npt.NDArray[np.floating]) -> Channels:
        """The channels of a batch `[n, C, …]`, n >= 1; `[n]` is one channel."""
        if not batch.size:
            raise DataError("there are no values to look at.")
        channels = batch.reshape(len(batch), batch.shape[1] if batch.ndim > 1 else 1, -1)
        planes = [channels[:, c].astype(np.float64) for c in range(channels.shape[1])]
        return cls(
            len(batch),
            tuple(float(plane.min()) for plane in planes),
            tuple(float(plane.max()) for plane in planes),
            tuple(float(plane.mean()) for plane in planes),
            tuple(float(plane.std()) for plane in planes),
        )

    def merge(self, other: Channels) -> Channels:
        """The channels of the samples of both, which must be equally many (Chan et al. 1979)."""
        if len(self.mean) != len(other.mean):
            raise DataError(
                f"samples of {len(self.mean)} and {len(other.mean)} channels are not alike."
            )
        count = self.count + other.count
        own, share = self.count / count, other.count / count
        delta = np.subtract(other.mean, self.mean)
        variance = own * np.square(self.std) + share * np.square(other.std) + own * share * delta**2
        return Channels(
            count,
            tuple(map(min, self.low, other.low)),
            tuple(map(max, self.high, other.high)),
            tuple((self.mean + share * delta).tolist()),
            tuple(np.sqrt(variance).tolist()),
        )
