"""How a range is chosen: min-max, k sigma, percentile, MSE, entropy; from a `Sketch`, or by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from intact.arithmetic import code_range
from intact.errors import RecipeError
from intact.sketch import Density, Sketch

__all__ = [
    "MSE",
    "Entropy",
    "MinMax",
    "Percentile",
    "RangeMethod",
    "Sigma",
    "affine_grid",
    "choose_range",
    "parse_range",
    "row_limits",
    "squared_error",
]

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MinMax:
    """All values: nothing is clipped."""

    def __str__(self) -> str:
        return "minmax"


@dataclass(frozen=True, slots=True)
class Sigma:
    """Mean ± k standard deviations."""

    k: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.k) and self.k > 0):
            raise RecipeError(f"sigma:{self.k} is no range; k must be finite and positive.")

    def __str__(self) -> str:
        return f"sigma:{_text(self.k)}"


@dataclass(frozen=True, slots=True)
class Percentile:
    """The middle `p` % of the values, the rest being clipped in equal parts at both ends."""

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 100:
            raise RecipeError(f"percentile:{self.p} is no range; it must lie within (0, 100].")

    def __str__(self) -> str:
        return f"percentile:{_text(self.p)}"


@dataclass(frozen=True, slots=True)
class MSE:
    """The range with the least squared error of clipping and rounding together.

    On a symmetric grid the highest code stands for the range's end; an affine one is `affine_grid`.
    """

    def __str__(self) -> str:
        return "mse"


@dataclass(frozen=True, slots=True)
class Entropy:
    """The range whose quantized histogram diverges least from the original one."""

    def __str__(self) -> str:
        return "entropy"


RangeMethod: TypeAlias = MinMax | Sigma | Percentile | MSE | Entropy

_PLAIN: dict[str, RangeMethod] = {str(m): m for m in (MinMax(), MSE(), Entropy())}
_WITH_NUMBER: dict[str, Callable[[float], RangeMethod]] = {"sigma": Sigma, "percentile": Percentile}


def _text(number: float) -> str:
    return str(float(number)).removesuffix(".0")


def parse_range(text: str) -> RangeMethod:
    """The method that `str(method)` wrote, or a `RecipeError` that lists all methods."""
    name, colon, number = text.strip().partition(":")
    if not colon and name in _PLAIN:
        return _PLAIN[name]
    try:
        return _WITH_NUMBER[name](float(number))
    except (KeyError, ValueError):
        raise RecipeError(
            f"there is no range method {text!r}. There are minmax, sigma:K (as in sigma:3), "
            "percentile:P (as in percentile:99.99), mse and entropy."
        ) from None


def choose_range(
    sketch: Sketch, method: RangeMethod, *, bits: int, symmetric: bool
) -> tuple[float, float]:
    """The range of real values that codes of `bits` bits should cover.

    symmetric  True: `(-t, t)` with `t <= absmax`. False: `(low, high)` within `[min, max]`,
               extended to 0 where need be. Either way `low <= 0 <= high`
    returns    `(0.0, 0.0)` if all values are 0, and only then. A method that finds nothing but 0
               worth keeping (a percentile of a tensor that is mostly 0) gives way to min-max

    For a grid without codes to waste on the other side of one-sided data ask for
    `symmetric=False`, which starts or ends at 0 then.
    """
    if sketch.absmax == 0:
        return 0.0, 0.0
    low, high = _choose(sketch, method, bits, symmetric)
    if symmetric:
        limit = min(max(-low, high), sketch.absmax) or sketch.absmax
        return -limit, limit
    low, high = min(0.0, max(low, sketch.min)), max(0.0, min(high, sketch.max))
    return (low, high) if low < high else _extended(sketch)


def _extended(sketch: Sketch) -> tuple[float, float]:
    """`[min, max]`, extended to 0."""
    return min(0.0, sketch.min), max(0.0, sketch.max)


def _choose(sketch: Sketch, method: RangeMethod, bits: int, symmetric: bool) -> tuple[float, float]:
    """A method's own answer for a tensor that is not all 0; it may reach beyond the data."""
    match method:
        case MinMax():
            return _extended(sketch)
        case Sigma():
            reach = method.k * sketch.std
            return sketch.mean - reach, sketch.mean + reach
        case Percentile():
            if symmetric:
                limit = _magnitude_quantile(sketch, method.p / 100)
                return -limit, limit
            tail = (1 - method.p / 100) / 2
            return sketch.quantile(tail), sketch.quantile(1 - tail)
        case MSE():
            if symmetric:
                limit = _least(lambda t: _symmetric_error(sketch.density, t, bits), sketch.absmax)
                return -limit, limit
            return _least_squares(sketch, bits)
        case Entropy():
            return _least_divergence(sketch, bits, symmetric)
        case _:
            assert_never(method)


def _magnitude_quantile(sketch: Sketch, p: float) -> float:
    """The smallest magnitude that a fraction `p` of the values does not exceed, to 60 bits."""
    if 1 - sketch.fraction_outside(0, 0) >= p:
        return 0.0
    low, high = 0.0, sketch.absmax
    for _ in range(60):
        middle = (low + high) / 2
        if 1 - sketch.fraction_outside(-middle, middle) >= p:
            high = middle
        else:
            low = middle
    return high


# -- the rows of a weight --------------------------------------------------------------------------


def row_limits(rows: Float32, method: RangeMethod, bits: int) -> Float64:
    """For each row the `t` of the symmetric range `(-t, t)` that codes of `bits` bits should cover.

    rows     float32 [R, K], finite, K >= 1
    returns  float64 [R], each at most the row's largest magnitude, and 0 for a row of zeros only

    Weights are at hand as they are, so this asks the values themselves what `choose_range` with
    `symmetric=True` asks a sketch: the answers differ by what a bucket hides. All rows at once: a
    sketch for each channel of a ResNet-50 took four minutes, this takes seconds.
    """
    most: Float64 = np.abs(rows).max(axis=1).astype(np.float64)
    limits: Float64
    match method:
        case MinMax():
            return most
        case Sigma():
            mean, std = rows.mean(axis=1, dtype=np.float64), rows.std(axis=1, dtype=np.float64)
            limits = np.minimum(np.abs(mean) + method.k * std, most)
        case Percentile():
            kept = np.quantile(np.abs(rows), method.p / 100, axis=1, method="inverted_cdf")
            limits = kept.astype(np.float64)
        case MSE():
            limits = _least_squares_by_row(rows, most, bits)
        case Entropy():
            bounds = [
                choose_range(Sketch.of(row), method, bits=bits, symmetric=True) for row in rows
            ]
            limits = np.array([high for _, high in bounds])
        case _:
            assert_never(method)
    return np.asarray(np.where(limits > 0, limits, most))


_BLOCK = 2**15
"""Values that are searched together: what stays in a core's cache."""


def _least_squares_by_row(rows: Float32, most: Float64, bits: int) -> Float64:
    """The limit of least squared error of each row, of `most * 2**(-i / 128)` down to 12 octaves.

    The finest steps of `_least`, all of them: so no error is larger than that of its choice.
    """
    limits = most.copy()
    count = max(1, _BLOCK // rows.shape[1])
    for first in range(0, len(rows), count):
        block = slice(first, first + count)
        scale = np.where(most[block] > 0, most[block], 1.0)
        unit = (rows[block] / scale[:, None]).astype(np.float32)
        limits[block] *= _best_ratios(unit, bits)
    return np.asarray(limits)


def _best_ratios(rows: Float32, bits: int) -> Float64:
    """The limit of least squared error of each row whose largest magnitude is 1; float64 [R].

    What is clipped costs the more, the lower the limit. So a row is done with when the error of
    clipping alone exceeds the best error so far: no lower limit can be better. At 8 bits that is
    within a fifth of an octave for normal weights; outliers take longer, and get it.
    """
    lowest, highest = (np.float32(end) for end in code_range(bits, signed=True))
    ratios, least = np.ones(len(rows)), np.full(len(rows), np.inf)
    left = np.arange(len(rows))
    for i in range(_PER_OCTAVE * _OCTAVES * _FINE):
        ratio = 2 ** (-i / _FINE / _PER_OCTAVE)
        real = rows * np.float32(float(highest) / ratio)
        clipped = np.clip(real, lowest, highest)
        clipping = _square_sums(real - clipped) * ratio**2
        error = _square_sums(real - np.rint(clipped)) * ratio**2
        better = error < least[left]
        ratios[left[better]] = ratio
        least[left[better]] = error[better]
        open_ = clipping < least[left]
        if not open_.all():
            left, rows = left[open_], rows[open_]
            if not len(left):
                break
    return ratios


def _square_sums(rows: Float32) -> Float64:
    return np.asarray(np.einsum("rk,rk->r", rows, rows), np.float64)


# -- least squared error ---------------------------------------------------------------------------


def squared_error(density: Density, step: float, lowest: int, highest: int) -> float:
    """Sum over all values of `(x - step * clamp(rint(x / step), lowest, highest))**2`.

    The codes are taken off their zero point: `lowest <= 0 <= highest`. Rounding and clipping, and
    exact for the density, not a sum over sample points: at 8 bits a bucket is about as wide as a
    step, and a point would stand for values that round to different codes.
    """
    start, end, mass = density.start / step, density.end / step, density.mass
    width = end - start
    # The integral of a narrow piece would drown in rounding; there it is its middle that counts.
    wide = width > 2.0**-10
    middle = (start + end) / 2
    error = (middle - np.clip(np.rint(middle), lowest, highest)) ** 2 + width**2 / 12
    a, b = start[wide], end[wide]
    error[wide] = (_integral(b, lowest, highest) - _integral(a, lowest, highest)) / width[wide]
    return float(error @ mass) * step**2


def _integral(u: Float64, lowest: int, highest: int) -> Float64:
    """The integral from 0 to `u` of `(v - clamp(rint(v), lowest, highest))**2`.

    A cell of width 1 around a code contributes 1/12; beyond the last code its cubic just goes on.
    """
    code = np.clip(np.rint(u), lowest, highest)
    rest = u - code
    return np.asarray(code / 12 + rest * rest * rest / 3)  # rest**3 would take ten times as long


def _symmetric_error(density: Density, limit: float, bits: int) -> float:
    """Squared error of the signed grid without zero point whose highest code stands for `limit`."""
    lowest, highest = code_range(bits, signed=True)
    return squared_error(density, limit / highest, lowest, highest)


def affine_grid(low: float, high: float, bits: int) -> tuple[float, int]:
    """The finest step, with its even zero point, whose unsigned codes reach from low to high.

    low, high  `low <= 0 <= high`, `low < high`
    returns    (step, zero_point). With zero point `z` a step of `max(-low / z, high / (2**bits - 1
               - z))` is the finest. The first term falls with `z`, the second rises, so the best
               even `z` is next to where they meet. arithmetic.md, section 1, has why it is even.
    """
    highest = 2**bits - 1
    below = min(2 * math.floor(-low / (high - low) * highest / 2), highest - 1)
    return min(
        (max(-low / z if z else 0.0, high / (highest - z)), z)
        for z in (below, min(below + 2, highest - 1))
        if z or low == 0
    )


def _affine_error(density: Density, low: float, high: float, bits: int) -> float:
    """Squared error of `affine_grid`."""
    step, zero_point = affine_grid(low, high, bits)
    return squared_error(density, step, -zero_point, 2**bits - 1 - zero_point)


_PER_OCTAVE, _OCTAVES, _FINE = 8, 12, 16


def _least(error: Callable[[float], float], limit: float) -> float:
    """The bound in `(0, limit]` (or `[limit, 0)`) with the least error, to 1/2 %; 0 if limit is 0.

    The error has many local minima, so it is searched through: eight bounds to the octave over
    twelve octaves (heavy outliers are thousands of times the rest), then finely about the best.
    """
    if limit == 0:
        return 0.0
    coarse = [limit * 2 ** (-i / _PER_OCTAVE) for i in range(_PER_OCTAVE * _OCTAVES)]
    best = min(coarse, key=error)
    ratios = [2 ** (i / _FINE / _PER_OCTAVE) for i in range(-_FINE + 1, _FINE)]
    fine = [best * ratio for ratio in ratios if abs(best * ratio) <= abs(limit)]
    return min([best, *fine], key=error)


def _least_squares(sketch: Sketch, bits: int) -> tuple[float, float]:
    """The affine range with the least squared error: one bound after the other, until it rests."""
    lowest, highest = _extended(sketch)

    def error(low: float, high: float) -> float:
        return _affine_error(sketch.density, low, high, bits)

    def best_low(high: float) -> float:
        return _least(lambda low: error(low, high), lowest)

    def best_high(low: float) -> float:
        return _least(lambda high: error(low, high), highest)

    # Shrunk as a whole first: with outliers on both sides neither bound would move alone.
    shrunk = _least(lambda ratio: error(lowest * ratio, highest * ratio), 1.0)
    low, high = lowest * shrunk, highest * shrunk
    least = math.inf
    while error(low, high) < least * 0.999:
        least = error(low, high)
        high = best_high(low)
        low = best_low(high)
    return low, high


# -- least divergence ------------------------------------------------------------------------------

_BINS = 2048


def _least_divergence(sketch: Sketch, bits: int, symmetric: bool) -> tuple[float, float]:
    """The range of least Kullback-Leibler divergence between values and quantized values.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017: a histogram of magnitudes, 2048 bins, is
    cut at every possible place; what lies beyond is added to the last bin, and the divergence is
    measured from the same bins merged into as many groups as there are codes for magnitudes. An
    affine range ends at the same magnitude on both sides, or at min or max where that is nearer.
    Exact zeros are left out, as every grid has a code for them: the peak at 0 behind a ReLU would
    otherwise decide alone.
    """
    limit = sketch.absmax
    start, end, mass = sketch.density
    counts = sketch.histogram(2 * _BINS, -limit, limit)
    counts[_BINS] -= mass[(start == 0) & (end == 0)].sum()
    one_sided = sketch.min >= 0 or sketch.max <= 0
    groups = 2**bits if one_sided and not symmetric else 2 ** (bits - 1)
    limit *= _cut(counts[:_BINS][::-1] + counts[_BINS:], groups)
    return -limit, limit


def _cut(counts: Float64, groups: int) -> float:
    """The fraction of a histogram at which to cut it, for `groups` codes."""
    kept = range(groups, len(counts) + 1)
    return min(kept, key=lambda n: _divergence(counts, n, groups)) / len(counts)


def _divergence(counts: Float64, kept: int, groups: int) -> float:
    """Divergence of the first `kept` bins, merged into `groups`, from all bins cut there."""
    inside = counts[:kept]
    clipped = inside.copy()
    clipped[-1] += counts[kept:].sum()
    occupied = inside > 0
    group = np.arange(kept) * groups // kept
    total = np.bincount(group, inside)
    share = total / np.maximum(np.bincount(group, occupied), 1)
    merged = np.where(occupied, share[group], 0.0)
    seen = clipped > 0
    if not occupied.any() or (merged[seen] == 0).any():
        return math.inf  # values were clipped into a bin that nothing else reaches
    p, q = clipped[seen] / clipped.sum(), merged[seen] / merged.sum()
    return float(p @ np.log(p / q))
