"""A sketch is exact where it says so, and within one bucket elsewhere."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from intact.errors import CalibrationError
from intact.sketch import CHUNK, PENDING_MAX, Observer, Sketch, spread_positions

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
batches = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4)),
    elements=finite | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-126)]),
)
SUBNORMAL, LARGEST = 2.0**-149, float(np.finfo(np.float32).max)
BUCKET = 2.0**-7  # the width of a bucket, relative to the values in it


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def exactly(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation by fractions, each rounded at the end alone."""
    parts = [Fraction(float(v)) for v in values.ravel()]
    mean = sum(parts) / len(parts)
    return float(mean), math.sqrt(sum((p - mean) ** 2 for p in parts) / len(parts))


@given(batches)
@example(floats(LARGEST, LARGEST, -LARGEST)[:, None])
@example(floats(SUBNORMAL, 0, -SUBNORMAL, 3 * SUBNORMAL)[:, None])
@example(floats(1e30, 1, -1e30)[:, None])  # a float64 sum would be 0
def test_extremes_mean_and_std_are_those_of_exact_arithmetic(values):
    sketch = Sketch.of(values)
    assert (sketch.count, sketch.min, sketch.max) == (values.size, values.min(), values.max())
    assert sketch.absmax == np.abs(values).max()
    assert (sketch.mean, sketch.std) == exactly(values)
    mean, std = exactly(values)
    assert sketch.three_sigma == (mean - 3 * std, mean + 3 * std)


@given(batches, st.randoms(use_true_random=False))
def test_any_split_merged_in_any_order_gives_an_equal_sketch(values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    cuts = sorted({0, len(order), *(random.randrange(len(order) + 1) for _ in range(3))})
    parts = [Sketch.of(values[order[a:b]]) for a, b in itertools.pairwise(cuts)]
    left = functools.reduce(Sketch.merge, parts)
    right = functools.reduce(lambda a, b: b.merge(a), reversed(parts))
    assert left == right == Sketch.of(values)
    assert left.mean == Sketch.of(values).mean


@pytest.mark.parametrize("index", [0, 5, 23])
def test_one_value_moved_by_one_ulp_is_another_sketch(index):
    values = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32)
    other = values.copy()
    other.flat[index] = np.nextafter(other.flat[index], np.float32(9))
    assert Sketch.of(values) == Sketch.of(values.copy())
    assert Sketch.of(values) != Sketch.of(other)
    assert Sketch.of(values) != "a sketch"


def test_values_swapped_between_channels_are_another_sketch():
    assert Sketch.of(floats(1, 2)[None]) != Sketch.of(floats(2, 1)[None])


def test_more_values_than_fit_one_chunk_are_counted_exactly():
    values = np.random.default_rng(1).standard_normal((3, CHUNK // 2 + 7)).astype(np.float32)
    whole = Sketch.of(values)
    assert whole == Sketch.of(values[:1]).merge(Sketch.of(values[1:]))
    bits = values.ravel().view(np.uint32)
    assert np.array_equal(whole.counts, np.bincount(bits >> 16, minlength=2**16))
    total = sum(int(v) for v in np.ldexp(values.ravel().astype(np.float64), 60))
    assert whole.mean == total / (values.size << 60)


def test_the_worst_lower_halves_of_a_full_chunk_are_summed_exactly():
    value = np.array([0x3F80FFFF], np.uint32).view(np.float32)  # all ones in the lower half
    sketch = Sketch.of(np.broadcast_to(value, (CHUNK, 1)))
    assert sketch.counts[0x3F80] == CHUNK
    assert sketch.low_sums[0x3F80] == CHUNK * 0xFFFF
    assert sketch.low_squares[0x3F80] == CHUNK * 0xFFFF**2
    assert (sketch.mean, sketch.std) == (float(value[0]), 0.0)


def test_an_observer_of_batches_sees_what_a_sketch_of_all_sees():
    values = np.random.default_rng(6).standard_normal((11, 3, 7)).astype(np.float32)
    observer = Observer("x")
    for start, end in ((0, 1), (1, 6), (6, 11)):
        observer.add(values[start:end])
        assert observer.sketch() == Sketch.of(values[:end])


def test_sums_are_split_before_they_overflow():
    value = np.array([0x3F80FFFF], np.uint32).view(np.float32)
    observer, batch = Observer("x"), np.broadcast_to(value, (PENDING_MAX // 4 + 1, 1))
    for _ in range(5):
        observer.add(batch)
    count = 5 * len(batch)
    assert count > PENDING_MAX
    sketch = observer.sketch()
    assert sketch.counts[0x3F80] == count
    assert sketch.low_sums[0x3F80] == count * 0xFFFF
    assert sketch.low_squares[0x3F80] == count * 0xFFFF**2


@given(st.integers(1, 10**7), st.integers(1, 2**12))
def test_positions_are_distinct_one_to_each_stretch_and_no_more_than_asked_for(size, most):
    positions = spread_positions(size, most)
    if size <= most:
        assert positions is None
        return
    stride = math.ceil(size / most)
    assert len(positions) == size // stride <= most
    assert np.array_equal(positions // stride, np.arange(len(positions)))


def test_positions_prefer_no_column_of_an_image():
    positions = spread_positions(64 * 112 * 112, 2**15)
    columns = np.bincount(positions % 112, minlength=112)
    assert columns.min() > 0.9 * columns.mean()
    assert columns.max() < 1.1 * columns.mean()


def test_an_observer_of_positions_counts_these_and_has_the_extremes_of_all():
    values = np.random.default_rng(7).standard_normal((4, 3, 50)).astype(np.float32)
    positions = spread_positions(150, 40)
    observer = Observer("x", positions)
    observer.add(values)
    sketch, part = observer.sketch(), Sketch.of(values.reshape(4, -1)[:, positions])
    assert np.array_equal(sketch.counts, part.counts)
    assert np.array_equal(sketch.low_squares, part.low_squares)
    assert np.array_equal(sketch.channel_max, values.max(axis=(0, 2)))
    values[2, 1, np.setdiff1d(np.arange(50, 100), positions)[0] - 50] = np.nan
    with pytest.raises(CalibrationError, match="x holds 1 NaN"):  # though nobody counts it
        observer.add(values)


def test_the_sign_of_zero_does_not_matter():
    plus, minus = Sketch.of(floats(0, 0, 1)), Sketch.of(floats(-0.0, 0, 1))
    assert plus == minus
    for sketch in (plus, minus, Sketch.of(floats(-0.0))):
        assert not np.signbit(sketch.channel_min).any()
        assert not np.signbit(sketch.channel_max).any()
        assert sketch.counts[0x8000] == 0


def test_channels_are_axis_0_of_a_sample():
    values = np.random.default_rng(2).standard_normal((5, 3, 4, 2)).astype(np.float32)
    sketch = Sketch.of(values)
    assert np.array_equal(sketch.channel_min, values.min(axis=(0, 2, 3)))
    assert np.array_equal(sketch.channel_max, values.max(axis=(0, 2, 3)))
    assert sketch.channel_min.dtype == np.float32
    assert Sketch.of(values[:, 0, 0, 0]).channel_min.shape == (1,)


def test_memory_layout_does_not_matter():
    values = np.random.default_rng(3).standard_normal((4, 3, 6)).astype(np.float32)
    assert Sketch.of(np.asfortranarray(values)) == Sketch.of(values)
    assert Sketch.of(values[:, :, ::-2]) == Sketch.of(values[:, :, ::-2].copy())
    assert Sketch.of(values[::-1]) == Sketch.of(values)


def test_a_sketch_cannot_be_changed_from_outside():
    counts = Sketch.of(floats(1, 2)).counts
    with pytest.raises(ValueError, match="read-only"):
        counts[0] = 1
    arrays = [np.zeros(2**16, np.int64) for _ in range(3)]
    arrays[0][0x3F80] = 1
    sketch = Sketch(*arrays, floats(1), floats(1))
    arrays[0][0] = 7
    assert sketch.count == 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(sketch)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(bad):
    with pytest.raises(CalibrationError, match=r"tensor 'conv1' holds \d NaN and \d infinite"):
        Sketch.of(floats(1, bad, 2), "tensor 'conv1'")


def test_no_values_are_refused():
    with pytest.raises(CalibrationError, match=r"conv1 holds no values: its shape is \[0, 3\]"):
        Sketch.of(np.zeros((0, 3), np.float32), "conv1")
    with pytest.raises(CalibrationError, match="at least one value"):
        Sketch(*(np.zeros(2**16, np.int64) for _ in range(3)), floats(), floats())


def test_sketches_of_different_tensors_do_not_merge():
    with pytest.raises(CalibrationError, match="of 2 and 1 channels"):
        Sketch.of(floats(1, 2)[None]).merge(Sketch.of(floats(1)))


def test_too_many_values_are_an_error_rather_than_a_wrong_sum():
    sketch = Sketch.of(np.array([[0x3F80FFFF]], np.uint32).view(np.float32))
    for _ in range(31):
        sketch = sketch.merge(sketch)
    assert (sketch.count, sketch.std) == (2**31, 0.0)
    with pytest.raises(CalibrationError, match="too many equal values"):
        sketch.merge(sketch)


def test_it_shows_itself_in_one_line():
    text = repr(Sketch.of(floats(-1, 3)))
    assert text == "<Sketch of 2 values in [-1, 3], mean 1, std 2>"


# -- the distribution ------------------------------------------------------------------------------


@given(batches)
def test_the_density_keeps_count_mean_and_extremes_and_is_ordered(values):
    sketch = Sketch.of(values)
    start, end, mass = sketch.density
    assert mass.sum() == sketch.count
    assert sketch.min <= start[0]
    assert end[-1] <= sketch.max
    assert (start <= end).all()
    assert (end[:-1] <= start[1:]).all()
    with np.errstate(under="ignore"):
        mean = ((start + end) / 2 @ mass) / sketch.count
    assert abs(mean - sketch.mean) <= 1e-12 * sketch.absmax


def reach(bound: float) -> float:
    """At least the width of the bucket that holds `bound`."""
    return BUCKET * abs(bound) + 2.0**-132


@settings(max_examples=200)
@given(batches, finite, finite)
def test_the_fraction_outside_is_right_to_within_the_bounds_buckets(values, a, b):
    low, high = min(a, b), max(a, b)
    sketch, real = Sketch.of(values), values.astype(np.float64)

    def outside(sign: int) -> float:  # 1: of a window that is larger by a bucket on both sides
        bottom, top = low - sign * reach(low), high + sign * reach(high)
        return float(np.mean((real < bottom) | (real > top)))

    assert outside(1) - 1e-12 <= sketch.fraction_outside(low, high) <= outside(-1) + 1e-12
    assert sketch.fraction_outside(sketch.min, sketch.max) == 0
    assert sketch.fraction_outside(2 * LARGEST, 3 * LARGEST) == 1


@settings(max_examples=200)
@given(batches, st.floats(0, 1))
def test_a_quantile_is_within_a_bucket_of_an_order_statistic(values, p):
    sketch = Sketch.of(values)
    got = sketch.quantile(p)
    near = [min(max(p + e, 0), 1) for e in (-1e-12, 0, 1e-12)]  # p * count is rounded
    wanted = np.quantile(values.astype(np.float64), near, method="inverted_cdf")
    assert any(abs(got - w) <= reach(w) for w in wanted)
    assert (sketch.quantile(0), sketch.quantile(1)) == (sketch.min, sketch.max)
    with pytest.raises(ValueError, match="between 0 and 1"):
        sketch.quantile(1.5)


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=30), st.integers(0, 64))
def test_values_that_recur_are_points_and_every_answer_about_them_is_exact(integers, p):
    # 64ths below 2 have 8 significant bits at most: each has a bucket of its own, as pixels do.
    values = (np.array(integers) / 64).astype(np.float32)
    sketch = Sketch.of(values)
    assert sketch.quantile(p / 64) == np.quantile(values, p / 64, method="inverted_cdf")
    assert sketch.fraction_outside(-0.5, 0.25) == np.mean((values < -0.5) | (values > 0.25))
    for bins, low, high in ((16, -1, 1), (5, 0, 1.25), (1, -9, 9)):
        expected = np.histogram(values, bins, (low, high))[0]
        # numpy places values by a multiplication, which may err at an edge that is not dyadic.
        if bins != 5:
            assert np.array_equal(sketch.histogram(bins, low, high), expected)
        assert sketch.histogram(bins, low, high).sum() == expected.sum()


def test_a_relu_keeps_its_zeros_at_zero():
    values = np.maximum(np.random.default_rng(4).standard_normal(10_000), 0).astype(np.float32)
    sketch = Sketch.of(values)
    assert sketch.fraction_outside(0, 0) == np.mean(values > 0)
    assert sketch.quantile(0.4) == 0
    assert sketch.histogram(2, -1, 1)[0] == 0


def test_a_histogram_of_many_values_follows_the_true_one():
    values = np.random.default_rng(5).standard_normal(200_000).astype(np.float32)
    got = Sketch.of(values).histogram(50, -3, 3)
    expected = np.histogram(values, 50, (-3, 3))[0]
    # Bins are 10 buckets wide or more, but for those at |x| > 2 with 8. Half a bucket may stray.
    assert np.abs(got - expected).max() < 0.02 * expected.max()
    assert abs(got.sum() - expected.sum()) < 0.001 * len(values)
