"""Ranges chosen from a sketch are those that the values themselves would give."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from intact.errors import RecipeError
from intact.ranges import (
    MSE,
    Entropy,
    MinMax,
    Percentile,
    RangeMethod,
    Sigma,
    affine_grid,
    choose_range,
    parse_range,
    row_limits,
    squared_error,
)
from intact.sketch import Sketch

METHODS: list[RangeMethod] = [MinMax(), Sigma(3), Percentile(99.9), MSE(), Entropy()]
RNG = np.random.default_rng(0)
N = 200_000
GAUSS = RNG.standard_normal(N).astype(np.float32)
LAPLACE = RNG.laplace(size=N).astype(np.float32)
RELU = np.maximum(GAUSS, 0)
SHIFTED = GAUSS + np.float32(1.5)
OUTLIERS = np.concatenate([GAUSS, RNG.uniform(-100, 300, 20).astype(np.float32)])
DISTRIBUTIONS = {
    "gauss": GAUSS,
    "laplace": LAPLACE,
    "relu": RELU,
    "negative": -RELU,
    "shifted": SHIFTED,
    "outliers": OUTLIERS,
    "uniform": RNG.uniform(-1, 1, N).astype(np.float32),
}
SKETCHES = {name: Sketch.of(values) for name, values in DISTRIBUTIONS.items()}

finite = st.floats(-1e6, 1e6, width=32)
samples = hnp.arrays(np.float32, st.integers(1, 40), elements=finite | st.sampled_from([0.0, 1.0]))


def error_of(values: np.ndarray, step: float, lowest: int, highest: int) -> float:
    """The mean squared error of really quantizing the values."""
    real = values.astype(np.float64)
    return float(np.mean((real - step * np.clip(np.rint(real / step), lowest, highest)) ** 2))


def finest(low: float, high: float, bits: int) -> tuple[float, int]:
    """The finest step that covers the range, by trying all even zero points."""
    top = 2**bits - 1
    steps = [(max(-low / z if z else 0, high / (top - z)), z) for z in range(0, top, 2)]
    return min((step, z) for step, z in steps if step * z >= -low * (1 - 1e-12))


def affine_error_of(values: np.ndarray, low: float, high: float, bits: int) -> float:
    step, zero_point = finest(low, high, bits)
    return error_of(values, step, -zero_point, 2**bits - 1 - zero_point)


def symmetric_error_of(values: np.ndarray, limit: float, bits: int) -> float:
    return error_of(values, limit / (2 ** (bits - 1) - 1), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# -- text ------------------------------------------------------------------------------------------


@given(
    st.sampled_from([MinMax(), MSE(), Entropy()])
    | st.builds(Sigma, st.floats(0, 1e9, exclude_min=True))
    | st.builds(Percentile, st.floats(0, 100, exclude_min=True))
)
@example(Percentile(99.99999))
def test_a_method_survives_its_text(method):
    assert parse_range(str(method)) == method


def test_a_method_reads_as_people_write_it():
    texts = ["minmax", "sigma:3", "percentile:99.99", "mse", "entropy"]
    assert [str(parse_range(text)) for text in texts] == texts
    assert parse_range(" sigma:2.5 ") == Sigma(2.5)


@pytest.mark.parametrize(
    "text", ["", "max", "sigma", "sigma:", "sigma:x", "mse:3", "minmax:", "percentile", ":", "MSE"]
)
def test_an_unknown_method_is_refused_with_the_list_of_methods(text):
    with pytest.raises(RecipeError, match=r"There are minmax, sigma:K .* mse and entropy"):
        parse_range(text)


@pytest.mark.parametrize(
    "text", ["sigma:0", "sigma:-1", "sigma:nan", "sigma:inf", "percentile:0", "percentile:100.1"]
)
def test_a_method_with_an_impossible_number_is_refused(text):
    with pytest.raises(RecipeError, match=f"{text.split(':')[0]}:.* is no range"):
        parse_range(text)


# -- properties of every method --------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=str)
@settings(max_examples=10, deadline=None)
@given(values=samples, bits=st.sampled_from([2, 4, 8]))
@example(values=np.float32([2.0**-149, 0]), bits=8)
@example(values=np.float32([3e38, -3e38]), bits=8)
@example(values=np.float32([-5]), bits=2)
def test_a_range_holds_0_and_is_no_wider_than_the_data(method, symmetric, values, bits):
    sketch = Sketch.of(values)
    low, high = choose_range(sketch, method, bits=bits, symmetric=symmetric)
    assert type(low) is type(high) is float
    assert low <= 0 <= high
    assert (low == high) == (sketch.absmax == 0)
    if symmetric:
        assert -low == high <= sketch.absmax
    else:
        assert min(sketch.min, 0) <= low
        assert high <= max(sketch.max, 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_tensor_of_zeros_has_the_range_0_0(method, symmetric):
    sketch = Sketch.of(np.zeros(5, np.float32))
    assert choose_range(sketch, method, bits=8, symmetric=symmetric) == (0, 0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_one_sided_data_leaves_no_room_on_the_other_side(method):
    assert choose_range(SKETCHES["relu"], method, bits=8, symmetric=False)[0] == 0
    assert choose_range(SKETCHES["negative"], method, bits=8, symmetric=False)[1] == 0


@given(samples, st.floats(0.1, 9), st.floats(0.1, 9), st.booleans())
def test_more_sigma_is_never_narrower(values, a, b, symmetric):
    sketch = Sketch.of(values)
    inner, outer = (
        choose_range(sketch, Sigma(k), bits=8, symmetric=symmetric) for k in sorted((a, b))
    )
    assert outer[0] <= inner[0]
    assert inner[1] <= outer[1]


@given(st.sampled_from(sorted(SKETCHES)), st.floats(60, 100), st.floats(60, 100), st.booleans())
def test_a_higher_percentile_is_never_narrower(name, a, b, symmetric):
    inner, outer = (
        choose_range(SKETCHES[name], Percentile(p), bits=8, symmetric=symmetric)
        for p in sorted((a, b))
    )
    assert outer[0] <= inner[0]
    assert inner[1] <= outer[1]


# -- against the values themselves -----------------------------------------------------------------


@given(samples, st.booleans())
def test_minmax_is_exact(values, symmetric):
    low, high = float(min(values.min(), 0)), float(max(values.max(), 0))
    limit = max(-low, high)
    expected = (-limit, limit) if symmetric else (low, high)
    assert choose_range(Sketch.of(values), MinMax(), bits=8, symmetric=symmetric) == expected


@pytest.mark.parametrize("k", [1, 3])
def test_sigma_is_mean_and_standard_deviation_cut_to_the_data(k):
    for name, values in DISTRIBUTIONS.items():
        mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
        low = min(0, max(mean - k * std, values.min()))
        high = max(0, min(mean + k * std, values.max()))
        got = choose_range(SKETCHES[name], Sigma(k), bits=8, symmetric=False)
        assert got == pytest.approx((low, high), rel=1e-12)
        limit = min(abs(mean) + k * std, np.abs(values).max())
        got = choose_range(SKETCHES[name], Sigma(k), bits=8, symmetric=True)
        assert got == pytest.approx((-limit, limit), rel=1e-12)


@pytest.mark.parametrize("p", [90, 99.9, 100])
def test_a_percentile_keeps_that_many_values_to_within_a_bucket(p):
    for name, values in DISTRIBUTIONS.items():
        got = choose_range(SKETCHES[name], Percentile(p), bits=8, symmetric=False)
        tail = (1 - p / 100) / 2
        expected = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
        assert got == pytest.approx((min(expected[0], 0), max(expected[1], 0)), rel=2.0**-7)
        got = choose_range(SKETCHES[name], Percentile(p), bits=8, symmetric=True)
        limit = np.quantile(np.abs(values), p / 100, method="inverted_cdf")
        assert got == pytest.approx((-limit, limit), rel=2.0**-7)


def test_a_percentile_that_would_leave_only_zeros_gives_way_to_minmax():
    sketch = Sketch.of(np.float32([0] * 99 + [7]))
    assert choose_range(sketch, Percentile(90), bits=8, symmetric=False) == (0, 7)
    assert choose_range(sketch, Percentile(90), bits=8, symmetric=True) == (-7, 7)


@given(st.floats(-1e3, 0), st.floats(0, 1e3), st.integers(2, 8))
def test_the_affine_grid_is_the_finest_with_an_even_zero_point(low, high, bits):
    assume(high - low > 1e-3)
    assert affine_grid(low, high, bits)[0] == pytest.approx(finest(low, high, bits)[0], rel=1e-9)
    step, zero_point = affine_grid(low, high, bits)
    assert zero_point % 2 == 0
    assert 0 <= zero_point <= 2**bits - 2
    assert -step * zero_point <= low * (1 - 1e-12)
    assert step * (2**bits - 1 - zero_point) >= high * (1 - 1e-12)


# -- least squared error ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_error_from_the_sketch_is_that_of_quantizing_the_values(name, bits):
    values, sketch = DISTRIBUTIONS[name], SKETCHES[name]
    for limit in (0.1, 0.5, 0.9, 1.0):
        step = sketch.absmax * limit / 2 ** (bits - 1)
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        got = squared_error(sketch.density, step, lowest, highest) / sketch.count
        assert got == pytest.approx(error_of(values, step, lowest, highest), rel=0.01)


@given(samples, st.floats(0.01, 100), st.integers(-8, 0), st.integers(1, 8))
def test_the_error_of_values_that_recur_is_exact(values, step, lowest, highest):
    recurring = values.astype(np.float32).view(np.uint32) & 0xFFFF0000  # one value per bucket
    values = recurring.view(np.float32)
    got = squared_error(Sketch.of(values).density, step, lowest, highest) / values.size
    # A value half way between two codes may be rounded either way: the error is the same.
    assert got == pytest.approx(error_of(values, step, lowest, highest), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_symmetric_range_has_a_visibly_smaller_error_than_mse(name, bits):
    values, sketch = DISTRIBUTIONS[name][-20_000:], Sketch.of(DISTRIBUTIONS[name][-20_000:])
    _, limit = choose_range(sketch, MSE(), bits=bits, symmetric=True)
    least = min(symmetric_error_of(values, sketch.absmax * i / 100, bits) for i in range(1, 101))
    assert symmetric_error_of(values, limit, bits) <= 1.02 * least


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_affine_range_has_a_visibly_smaller_error_than_mse(name, bits):
    values, sketch = DISTRIBUTIONS[name][-5_000:], Sketch.of(DISTRIBUTIONS[name][-5_000:])
    low, high = choose_range(sketch, MSE(), bits=bits, symmetric=False)
    lows = [sketch.min * i / 20 for i in range(21)] if sketch.min < 0 else [0.0]
    highs = [sketch.max * i / 20 for i in range(21)] if sketch.max > 0 else [0.0]
    least = min(affine_error_of(values, a, b, bits) for a in lows for b in highs if a < b)
    assert affine_error_of(values, low, high, bits) <= 1.02 * least


GAUSS_DENSITY = np.exp(-(np.linspace(-12, 12, 24_001) ** 2) / 2)
LAPLACE_DENSITY = np.exp(-np.abs(np.linspace(-12, 12, 24_001)))


@pytest.mark.parametrize(
    ("name", "density"), [("gauss", GAUSS_DENSITY), ("laplace", LAPLACE_DENSITY)]
)
@pytest.mark.parametrize("bits", [3, 4])
def test_mse_clips_where_the_continuous_distribution_wants_it(name, density, bits):
    x, codes = np.linspace(-12, 12, 24_001), 2**bits - 1

    def error(clip: float) -> float:  # by quadrature over the distribution, without any samples
        step, zero_point = 2 * clip / codes, 2 * round(codes / 4)
        rounded = step * np.clip(np.rint(x / step), -zero_point, codes - zero_point)
        return float((x - rounded) ** 2 @ density)

    best = min(np.linspace(1, 8, 701), key=error)
    low, high = choose_range(SKETCHES[name], MSE(), bits=bits, symmetric=False)
    assert affine_grid(low, high, bits)[0] * codes / 2 == pytest.approx(best, rel=0.03)
    # Banner et al., "Post training 4-bit quantization of convolutional networks for rapid
    # deployment", NeurIPS 2019: 2.55 standard deviations, and 5.03 b, by an analytic approximation.
    if bits == 4:
        assert best == pytest.approx({"gauss": 2.55, "laplace": 5.03}[name], rel=0.03)


def test_mse_keeps_a_uniform_range_and_clips_a_gaussian_one():
    low, high = choose_range(SKETCHES["uniform"], MSE(), bits=8, symmetric=False)
    assert high - low > 1.98
    assert choose_range(SKETCHES["gauss"], MSE(), bits=4, symmetric=True)[1] < 3
    assert choose_range(SKETCHES["gauss"], MSE(), bits=8, symmetric=True)[1] > 3


# -- the rows of a weight --------------------------------------------------------------------------

WIDTH = 300
ROWS = np.stack([values[:WIDTH] for values in DISTRIBUTIONS.values()])
ROWS[-2, 7] = 300  # one outlier, which 12 octaves of limits have to reach behind
NARROW = np.random.default_rng(3).standard_normal((50, 9)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [ROWS, NARROW, NARROW[:, :1], ROWS.reshape(1, -1)])
def test_no_limit_of_a_row_has_a_smaller_error_than_mse(rows, bits):
    for row, limit in zip(rows, row_limits(rows, MSE(), bits), strict=True):
        most = float(np.abs(row).max())
        steps = [most * 2 ** (-i / 128) for i in range(12 * 128)]
        least = min(symmetric_error_of(row, step, bits) for step in steps)
        assert symmetric_error_of(row, limit, bits) <= least * (1 + 1e-4) + 1e-12 * most**2
        _, sketched = choose_range(Sketch.of(row), MSE(), bits=bits, symmetric=True)
        assert symmetric_error_of(row, limit, bits) <= (
            symmetric_error_of(row, sketched, bits) * (1 + 1e-4) + 1e-12 * most**2
        )


def test_the_search_by_row_ends_early_only_where_nothing_better_follows():
    row = np.float32([[1000] + [1] * 999])  # the outlier's own error is the smaller one at 2 bits
    (limit,) = row_limits(row, MSE(), 2)
    assert limit == 1000
    (limit,) = row_limits(np.float32([[4] + [1] * 999]), MSE(), 2)
    assert limit == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_limits_by_row_are_what_sketches_of_the_rows_say(method):
    rows = np.stack([v[-20_000:] for v in DISTRIBUTIONS.values()])
    expected = [choose_range(Sketch.of(r), method, bits=8, symmetric=True)[1] for r in rows]
    got = row_limits(rows, method, 8)
    if isinstance(method, MSE):  # many limits are as good as the best: the error is what counts
        pairs = zip(rows, got, expected, strict=True)
        assert all(
            symmetric_error_of(r, a, 8) <= 1.001 * symmetric_error_of(r, b, 8) for r, a, b in pairs
        )
    else:
        assert got == pytest.approx(expected, rel=2.0**-7)


@pytest.mark.parametrize("method", [*METHODS, Percentile(50)], ids=str)
def test_rows_of_extreme_values_have_limits(method):
    rows = np.float32([[0, 0, 0, 0], [0, 0, 0, 7], [2.0**-149, 0, 0, 0], [3e38, -3e38, 0, 0]])
    limits = row_limits(rows, method, 8)
    assert limits[0] == 0
    assert ((limits[1:] > 0) & (limits[1:] <= np.abs(rows[1:]).max(axis=1))).all()


# -- least divergence ------------------------------------------------------------------------------


def calibrated(magnitudes: np.ndarray, groups: int) -> float:
    """The threshold of Migacz 2017 by its published pseudocode, on the values themselves."""
    bins, edges = np.histogram(magnitudes, 2048, (0, magnitudes.max()))
    best, threshold = math.inf, math.nan
    for i in range(groups, 2049):
        reference = bins[:i].astype(np.float64)
        reference[-1] += bins[i:].sum()
        first = -(-i * np.arange(groups) // groups)  # the first bin of each group, rounded up
        occupied = np.add.reduceat(bins[:i] > 0, first, dtype=np.int64)
        share = np.add.reduceat(bins[:i], first) / np.maximum(occupied, 1)
        candidate = np.where(bins[:i] > 0, np.repeat(share, np.diff(first, append=i)), 0)
        seen = reference > 0
        if not candidate.any() or (candidate[seen] == 0).any():
            continue
        p, q = reference / reference.sum(), candidate / candidate.sum()
        divergence = float(np.sum(p[seen] * np.log(p[seen] / q[seen])))
        if divergence < best:
            best, threshold = divergence, float(edges[i])
    return threshold


@pytest.mark.parametrize(
    ("name", "bits", "symmetric", "groups"),
    [
        ("gauss", 8, True, 128),
        ("laplace", 8, True, 128),
        ("laplace", 4, True, 8),
        ("relu", 8, False, 256),
        ("outliers", 8, True, 128),
    ],
)
def test_entropy_finds_the_threshold_that_the_values_give(name, bits, symmetric, groups):
    _, high = choose_range(SKETCHES[name], Entropy(), bits=bits, symmetric=symmetric)
    magnitudes = np.abs(DISTRIBUTIONS[name])
    expected = calibrated(magnitudes[magnitudes > 0], groups)
    assert high == pytest.approx(expected, rel=2.0**-7)


def test_entropy_cuts_off_rare_outliers():
    values = np.concatenate([LAPLACE, np.float32([60])])
    assert choose_range(Sketch.of(values), Entropy(), bits=8, symmetric=True)[1] < 20
