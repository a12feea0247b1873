"""Is a difference noise? Intervals and tests for paired classifications, and decibels."""

from __future__ import annotations

import math

from scipy.stats import binomtest

__all__ = [
    "SIGNIFICANCE",
    "decibels",
    "decimals",
    "guessing_p",
    "mcnemar_p",
    "paired_interval",
    "percent",
    "wilson_interval",
]

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
"""Flips at least as likely as this under pure chance are called noise."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion `correct / total` (Wilson 1927)."""
    interval = binomtest(correct, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def guessing_p(correct: int, total: int, classes: int) -> float:
    """One-sided exact p-value: how often guessing among all classes is right at least as often."""
    return float(binomtest(correct, total, 1 / classes, alternative="greater").pvalue)


def mcnemar_p(to_wrong: int, to_right: int) -> float:
    """Exact two-sided p-value that two paired classifiers are equally good (McNemar 1947).

    to_wrong, to_right  samples that only the first, only the second classifies correctly. Under
                        the hypothesis each flip goes either way with probability 1/2
    """
    flips = to_wrong + to_right
    return 1.0 if flips == 0 else float(binomtest(to_wrong, flips, 0.5).pvalue)


def paired_interval(both: int, to_wrong: int, to_right: int, neither: int) -> tuple[float, float]:
    """95 % interval of the accuracy of the second minus that of the first, on paired samples.

    both, neither       samples that both, that none of the two classifies correctly
    to_wrong, to_right  samples that only the first, only the second classifies correctly

    The square-and-add interval with Wilson limits and a correlation that is corrected for
    continuity: method 10 of Newcombe, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17 (1998).
    """
    n = both + to_wrong + to_right + neither
    first, second = both + to_wrong, both + to_right
    p1, p2 = first / n, second / n
    low1, high1 = wilson_interval(first, n)
    low2, high2 = wilson_interval(second, n)
    margins = first * (n - first) * second * (n - second)
    phi = 0.0
    if margins:
        excess = both * neither - to_wrong * to_right
        corrected = max(excess - n / 2, 0) if excess > 0 else excess
        phi = corrected / math.sqrt(margins)
    d2, u2 = p2 - low2, high2 - p2
    d1, u1 = p1 - low1, high1 - p1
    lower = math.sqrt(max(d2 * d2 - 2 * phi * d2 * u1 + u1 * u1, 0.0))
    upper = math.sqrt(max(u2 * u2 - 2 * phi * u2 * d1 + d1 * d1, 0.0))
    difference = p2 - p1
    return difference - lower, difference + upper


def decibels(signal: float, noise: float) -> float | None:
    """Signal-to-noise ratio `10 log10(signal / noise)` of two energies (sums of squares), in dB.

    None where there is no noise, or no signal.
    """
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def percent(fraction: float, total: int) -> str:
    """An accuracy in percent, to the decimals that `total` images can support."""
    return f"{100 * fraction:.{decimals(total)}f} %"


def decimals(total: int) -> int:
    """Decimals of a percentage of `total` images: one below 1,000, else two."""
    return 1 if total < 1000 else 2
