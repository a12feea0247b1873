"""Intervals and tests of paired classifications: against definitions and published values."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from intact.significance import (
    decibels,
    guessing_p,
    mcnemar_p,
    paired_interval,
    wilson_interval,
)

Z = float(norm.ppf(0.975))
COUNTS = st.integers(0, 400)
FOURS = st.tuples(COUNTS, COUNTS, COUNTS, COUNTS).filter(sum)


# -- guessing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_guessing_is_as_often_right_with_the_tail_of_the_binomial(classes):
    n, p = 12, Fraction(1, classes)
    for correct in range(n + 1):
        tail = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(correct, n + 1))
        assert guessing_p(correct, n, classes) == pytest.approx(float(tail), rel=1e-12)


# -- Wilson ----------------------------------------------------------------------------------------


def score_interval(correct: int, total: int) -> tuple[float, float]:
    """Every `p` that the score test does not reject, by bisection from correct / total."""

    def rejected(p: float) -> bool:
        return abs(correct / total - p) > Z * math.sqrt(p * (1 - p) / total)

    def end(outside: float) -> float:
        inside = correct / total
        if not rejected(outside):
            return outside
        for _ in range(100):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return end(0.0), end(1.0)


@pytest.mark.parametrize(
    ("correct", "total"),
    [(0, 1), (1, 1), (1, 2), (0, 10), (10, 10), (7, 10), (81, 263), (485, 500), (5337, 10_000)],
)
def test_the_interval_is_what_the_score_test_does_not_reject(correct, total):
    assert wilson_interval(correct, total) == pytest.approx(
        score_interval(correct, total), abs=1e-9
    )


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998) 857-872, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_has_the_published_limits(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


# -- McNemar ---------------------------------------------------------------------------------------


def exact_p(a: int, b: int) -> Fraction:
    """Both tails of a fair coin; it is symmetric, so twice the smaller one."""
    n = a + b
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1))
    return min(Fraction(2 * tail, 2**n), Fraction(1))


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_p_value_is_the_sum_of_binomial_probabilities(to_wrong, to_right):
    assert mcnemar_p(to_wrong, to_right) == pytest.approx(
        float(exact_p(to_wrong, to_right)), rel=1e-9
    )


@pytest.mark.parametrize(
    ("to_wrong", "to_right", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (1, 1, 1.0), (0, 6, 0.03125), (5, 0, 0.0625), (127, 131, 0.85)],
)
def test_p_values_that_one_can_check_by_hand(to_wrong, to_right, p):
    assert mcnemar_p(to_wrong, to_right) == pytest.approx(p, abs=0.005 if p == 0.85 else 1e-12)
    assert mcnemar_p(to_right, to_wrong) == mcnemar_p(to_wrong, to_right)


def test_a_large_one_sided_change_is_never_noise():
    assert mcnemar_p(960, 624) == pytest.approx(float(exact_p(960, 624)), rel=1e-6)
    assert mcnemar_p(960, 624) < 1e-16


# -- the paired difference -------------------------------------------------------------------------


def test_the_paired_interval_has_the_published_limits():
    """The example of Newcombe's method 10, whose difference is the first minus the second."""
    assert paired_interval(36, 12, 2, 0) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


@given(FOURS)
def test_the_paired_interval_contains_the_difference_and_stays_within_one(counts):
    _, to_wrong, to_right, _ = counts
    low, high = paired_interval(*counts)
    assert -1 - 1e-12 <= low <= (to_right - to_wrong) / sum(counts) <= high <= 1 + 1e-12


@given(FOURS)
def test_swapping_the_classifiers_negates_the_interval(counts):
    both, to_wrong, to_right, neither = counts
    low, high = paired_interval(both, to_wrong, to_right, neither)
    swapped = paired_interval(both, to_right, to_wrong, neither)
    assert swapped == pytest.approx((-high, -low), abs=1e-12)


@given(FOURS)
def test_swapping_right_and_wrong_negates_the_interval(counts):
    both, to_wrong, to_right, neither = counts
    low, high = paired_interval(both, to_wrong, to_right, neither)
    assert paired_interval(neither, to_right, to_wrong, both) == pytest.approx(
        (-high, -low), abs=1e-12
    )


def test_no_flips_still_leave_some_doubt():
    low, high = paired_interval(90, 0, 0, 10)
    assert low < 0 < high
    assert -low == pytest.approx(high)
    wide = high - low
    low, high = paired_interval(9000, 0, 0, 1000)
    assert high - low < wide / 5


def test_extremes():
    assert paired_interval(0, 10, 0, 0)[0] == pytest.approx(-1)
    assert paired_interval(0, 0, 10, 0)[1] == pytest.approx(1)
    for counts in [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        low, high = paired_interval(*counts)
        assert -1 <= low <= counts[2] - counts[1] <= high <= 1


@pytest.mark.parametrize("cells", [(0.45, 0.05, 0.05, 0.45), (0.9, 0.03, 0.01, 0.06)])
def test_intervals_cover_the_truth_about_95_times_in_100(cells):
    """1,000 samples of 200 images: a standard error of 0.7 points. Method 10 is conservative."""
    samples = np.random.default_rng(0).multinomial(200, cells, size=1000)
    true = cells[2] - cells[1]
    bounds = np.array([paired_interval(*map(int, sample)) for sample in samples])
    covered = np.mean((bounds[:, 0] <= true) & (true <= bounds[:, 1]))
    assert 0.93 <= covered <= 0.995
    accuracy = cells[0] + cells[1]
    bounds = np.array([wilson_interval(int(s[0] + s[1]), 200) for s in samples])
    covered = np.mean((bounds[:, 0] <= accuracy) & (accuracy <= bounds[:, 1]))
    assert 0.93 <= covered <= 0.975


# -- decibels --------------------------------------------------------------------------------------


def test_decibels():
    assert decibels(100.0, 1.0) == 20.0
    assert decibels(1.0, 10.0) == -10.0
    assert decibels(1.0, 0.0) is None
    assert decibels(0.0, 1.0) is None
