"""Axes: where a value lies, and which round numbers to write next to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Axis", "Tick", "log_ticks", "round_ticks"]


@dataclass(frozen=True, slots=True)
class Tick:
    """A label at `at`, a fraction of the axis from its low end."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear map of `[low, high]`, which is not empty, onto `[0, 1]`."""

    low: float
    high: float

    @staticmethod
    def around(*values: float, margin: float = 0.0) -> Axis:
        """The axis that holds all values, with a margin (a fraction of its length) on both sides.

        Where all values are as good as equal, it reaches half as far again around them.
        """
        low, high = min(values), max(values)
        size = max(abs(low), abs(high))
        if high - low <= max(1e-12 * size, 1e-300):
            half = size / 2 if size > 1e-290 else 0.5
            low, high = low - half, high + half
        space = margin * (high - low)
        return Axis(low - space, high + space)

    def at(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`, clamped to the two."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def holds(self, value: float) -> bool:
        """Whether a value lies on the axis."""
        return self.low <= value <= self.high


def round_ticks(axis: Axis, most: int, short: bool = False) -> tuple[Tick, ...]:
    """At most `most` + 1 ticks at multiples of 1, 2 or 5 times a power of ten.

    short  for counts: "20k" instead of "20,000"
    """
    rough = (axis.high - axis.low) / most
    power = math.floor(math.log10(rough))
    factor = next(f for f in (1, 2, 5, 10) if f * 10.0**power >= rough * (1 - 1e-9))
    step, digits = factor * 10.0**power, max(0, -(power + (factor == 10)))
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return tuple(
        Tick(axis.at(i * step), _short(i * step) if short else _label(i * step, digits))
        for i in range(first, last + 1)
    )


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def _label(value: float, digits: int) -> str:
    if digits > 5 or abs(value) >= 1e7:  # longer labels would run into each other
        return f"{value:.3g}"
    return f"{value:,.{digits}f}" if value else "0"


def log_ticks(floor: float, top: float) -> tuple[Tick, ...]:
    """Ticks of a logarithmic count axis from `floor` to `top`: powers of ten, at most 4."""
    last = math.floor(math.log10(top)) if top >= 1 else 0
    stride = max(1, math.ceil((last + 1) / 4))
    span = math.log(top / floor)
    return tuple(
        Tick(math.log(10.0**k / floor) / span, _short(10.0**k)) for k in range(0, last + 1, stride)
    )
