"""Proofs of `intact.arithmetic` against exact fractions: docs/arithmetic.md, line by line."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from intact import arithmetic
from intact.arithmetic import (
    GRIDS,
    INT32_MAX,
    MULTIPLIER_LIMIT,
    Grid,
    QParams,
    accumulator_bits,
    accumulator_bound,
    code_range,
    dequantize,
    dyadic_shift,
    grid_neighbours,
    multiplier_value,
    quantize,
    requantize,
    requantize_dyadic,
    requantize_float,
)
from intact.errors import IntactError, QParamsError

INT32_MIN = -INT32_MAX - 1
ALL_BITS = range(2, 9)
CODE_TYPES = [(bits, signed) for bits in ALL_BITS for signed in (True, False)]

Array = npt.NDArray[np.int64]


# -- the oracle: exact fractions, and IEEE float32 written out in them ---------------------------


def float32_of(exact: Fraction) -> Fraction | float:
    """The float32 nearest to a fraction, ties to even; an infinity beyond the largest."""
    if exact == 0:
        return exact
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)  # -126: subnormals share one spacing
    nearest = round(exact / quantum) * quantum
    if abs(nearest) >= 2**128:
        return float("inf") if nearest > 0 else float("-inf")
    return nearest


def saturate(exact: Fraction | float, zero_point: int, qmin: int, qmax: int) -> int:
    """`clamp(rint(exact) + zero_point)`; `round` of a fraction is exact, ties to even."""
    if isinstance(exact, float):
        return qmax if exact > 0 else qmin
    return min(max(round(exact) + zero_point, qmin), qmax)


def even_zero_points(bits: int, signed: bool) -> range:
    low, high = code_range(bits, signed)
    return range(low, high + 1, 2)  # low is even for every type


def extreme_zero_points(bits: int, signed: bool) -> tuple[int, int, int]:
    return even_zero_points(bits, signed)[0], 0, even_zero_points(bits, signed)[-1]


def single(value: int) -> Array:
    return np.array([value], np.int64)


# -- vectors -------------------------------------------------------------------------------------


def multipliers() -> list[int]:
    """Powers of two with their neighbours, small and odd ones, both ends, and a random sample."""
    powers = [2**k for k in range(24)]
    near = [p + d for p in powers for d in (-1, 0, 1)]
    rng = np.random.default_rng(0)
    sample = np.exp2(rng.uniform(0, 24, 20)).astype(int).tolist()
    return sorted(
        {m for m in (*near, 3, 5, 6, 7, 11, 3 * 2**13, 5 * 2**14, 2**24 - 1, *sample) if m >= 1}
    )


def boundary_accumulators(m: int, shift: int) -> Array:
    """Every int32 accumulator at or next to a boundary of rounding, `(k + 1/2) * 2**shift / m`.

    For every `k` that a result can take before its zero point is added, and a little beyond.
    """
    span = 2 ** (24 - shift) + 1
    floors = [(2 * k + 1) * 2 ** (shift - 1) // m for k in range(-span, span)]
    acc = np.unique([a + d for a in floors for d in (-1, 0, 1)])
    return acc[(acc >= INT32_MIN) & (acc <= INT32_MAX)]


def boundaries(bits: int) -> Iterator[tuple[int, Array]]:
    for m in multipliers():
        yield m, boundary_accumulators(m, dyadic_shift(bits))


# -- names and constants -------------------------------------------------------------------------


def test_constants_are_those_of_the_specification() -> None:
    assert np.iinfo(np.int32).max == INT32_MAX
    assert 2 ** (np.finfo(np.float32).nmant + 1) == MULTIPLIER_LIMIT
    assert GRIDS == ("float", "dyadic", "power_of_two")
    assert [code_range(8, True), code_range(8, False)] == [(-128, 127), (0, 255)]
    assert [code_range(2, True), code_range(2, False)] == [(-2, 1), (0, 3)]
    assert all(hasattr(arithmetic, name) for name in arithmetic.__all__)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_shift_is_24_less_the_logarithm_of_the_widest_distance_from_a_zero_point(
    bits: int,
) -> None:
    widest = max(
        QParams((1.0,), zero, *code_range(bits, signed), bits, signed).max_magnitude
        for signed in (True, False)
        for zero in even_zero_points(bits, signed)
    )
    assert 2 ** (24 - dyadic_shift(bits)) == 2 ** widest.bit_length()


def test_the_shift_is_16_for_8_bits_and_20_for_4() -> None:
    assert (dyadic_shift(8), dyadic_shift(4)) == (16, 20)


# -- QParams -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1, "qmin": 0, "qmax": 0}, "bits is 1, but codes are 2 to 8 bits wide."),
        ({"bits": 9}, "bits is 9, but codes are 2 to 8 bits wide."),
        (
            {"qmin": -129},
            "the code range [-129, 127] is not a range within int8, which is [-128, 127].",
        ),
        (
            {"qmin": 3, "qmax": 2},
            "the code range [3, 2] is not a range within int8, which is [-128, 127].",
        ),
        (
            {"signed": False},
            "the code range [-128, 127] is not a range within uint8, which is [0, 255].",
        ),
        ({"bits": 4}, "the code range [-128, 127] is not a range within int4, which is [-8, 7]."),
        (
            {"zero_point": 3},
            (
                "zero_point is 3, but it must be an even number within int8, [-128, 127] "
                "(arithmetic.md, section 1)."
            ),
        ),
        (
            {"zero_point": 128},
            (
                "zero_point is 128, but it must be an even number within int8, [-128, 127] "
                "(arithmetic.md, section 1)."
            ),
        ),
        (
            {"scale": ()},
            (
                "0 scales with axis None: a per-tensor grid has one scale, a per-channel grid has "
                "one for each channel of its axis."
            ),
        ),
        ({"scale": (), "axis": 0}, "0 scales with axis 0: "),
        ({"scale": (1.0, 2.0)}, "2 scales with axis None: "),
        (
            {"scale": (1.0, 0.0), "axis": 0},
            (
                "scale[1] is 0.0, but a scale must be a finite, positive float32. An all-zero "
                "channel is the usual cause; give it scale 1.0."
            ),
        ),
        ({"scale": (-1.0,)}, "scale[0] is -1.0, but"),
        ({"scale": (float("nan"),)}, "scale[0] is nan, but"),
        ({"scale": (float("inf"),)}, "scale[0] is inf, but"),
        ({"scale": (0.1,)}, "scale[0] is 0.1, but"),  # float64, not a float32
        ({"scale": (1e300,)}, "scale[0] is 1e+300, but"),
        ({"scale": (1e-50,)}, "scale[0] is 1e-50, but"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_with_the_reason(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(QParamsError) as caught:
        QParams(**{"scale": (1.0,), **arguments})  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_grids_are_values() -> None:
    one, other = QParams((0.5,), 2), QParams((0.5,), 2)
    assert one == other
    assert hash(one) == hash(other)
    assert one != QParams((0.5,), 4)
    with pytest.raises(AttributeError):
        one.zero_point = 4  # type: ignore[misc]


@pytest.mark.parametrize(("bits", "signed"), CODE_TYPES)
def test_a_grid_knows_its_type_and_its_largest_magnitude(bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed)
    for zero in even_zero_points(bits, signed):
        grid = QParams((1.0,), zero, low, high, bits, signed)
        assert grid.type_name == f"{'' if signed else 'u'}int{bits}"
        assert grid.dtype == (np.int8 if signed else np.uint8)
        assert grid.max_magnitude == max(abs(q - zero) for q in range(low, high + 1))


def test_a_narrowed_code_range_narrows_the_largest_magnitude() -> None:
    assert QParams((1.0,), -128, qmin=-128, qmax=-8).max_magnitude == 120
    assert QParams((1.0,), 10, qmin=-6, qmax=12).max_magnitude == 16


@pytest.mark.parametrize(
    ("axis", "ndim", "shape"), [(0, 4, (2, 1, 1, 1)), (1, 3, (1, 2, 1)), (-1, 2, (1, 2))]
)
def test_scales_per_channel_broadcast_along_their_axis(
    axis: int, ndim: int, shape: tuple[int, ...]
) -> None:
    scale = QParams((0.5, 0.25), axis=axis).per_channel(ndim)
    assert scale.shape == shape
    assert scale.dtype == np.float32
    assert scale.ravel().tolist() == [0.5, 0.25]


# -- quantize and dequantize ---------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "signed"), CODE_TYPES)
@pytest.mark.parametrize("scale", [0.1, 2 / 255, 1 / 128, 3e38 / 256, 1e-38, 2.0**-149])
def test_every_code_of_every_grid_survives_dequantize_then_quantize(
    bits: int, signed: bool, scale: float
) -> None:
    low, high = code_range(bits, signed)
    for zero in even_zero_points(bits, signed):
        grid = QParams((float(np.float32(scale)),), zero, low, high, bits, signed)
        codes = np.arange(low, high + 1).astype(grid.dtype)
        real = dequantize(codes, grid)
        back = quantize(real, grid)
        assert real.dtype == np.float32
        assert back.dtype == codes.dtype
        assert np.array_equal(back, codes)


@given(
    scale=st.floats(2.0**-149, 2.0**119, width=32),
    bits=st.sampled_from(ALL_BITS),
    signed=st.booleans(),
)
def test_every_code_survives_on_every_scale(scale: float, bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed)
    for zero in extreme_zero_points(bits, signed):
        grid = QParams((scale,), zero, low, high, bits, signed)
        codes = np.arange(low, high + 1).astype(grid.dtype)
        assert np.array_equal(quantize(dequantize(codes, grid), grid), codes)


@pytest.mark.parametrize(("bits", "signed"), CODE_TYPES)
def test_ties_go_to_even_before_the_zero_point_is_added(bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed)
    halves = [Fraction(2 * k + 1, 2) for k in range(2 * low - 3, 2 * high + 3)]
    real = np.array([float(h) / 64 for h in halves], np.float32)  # exact, as 1/64 is a power of two
    for zero in even_zero_points(bits, signed):
        grid = QParams((1 / 64,), zero, low, high, bits, signed)
        expected = [saturate(h, zero, low, high) for h in halves]
        assert quantize(real, grid).tolist() == expected


@settings(max_examples=500)
@given(
    real=st.floats(allow_nan=False, allow_infinity=False, width=32),
    scale=st.floats(2.0**-149, allow_infinity=False, allow_nan=False, width=32),
    zero=st.sampled_from(even_zero_points(8, True)),
)
@example(real=2.0**-149, scale=2.0**-149, zero=2)
@example(real=3 * 2.0**-149, scale=2.0**-148, zero=0)  # 1.5, of subnormals
@example(real=5 * 2.0**-149, scale=2.0**-148, zero=0)  # 2.5
@example(real=3.4e38, scale=1e-38, zero=0)  # the quotient overflows to inf
def test_quantize_rounds_the_float32_quotient(real: float, scale: float, zero: int) -> None:
    real, scale = float(np.float32(real)), float(np.float32(scale))
    quotient = float32_of(Fraction(real) / Fraction(scale))
    got = quantize(np.array([real], np.float32), QParams((scale,), zero))
    assert got.tolist() == [saturate(quotient, zero, -128, 127)]


@given(
    code=st.integers(-140, 140),
    ulps=st.integers(-2, 2),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero=st.sampled_from(even_zero_points(8, False)),
)
def test_quantize_is_right_within_ulps_of_every_tie(
    code: int, ulps: int, scale: float, zero: int
) -> None:
    scale = float(np.float32(scale))
    real = np.float32((code + 0.5) * scale)
    for _ in range(abs(ulps)):
        real = np.nextafter(real, np.float32(np.copysign(np.inf, ulps)))
    quotient = float32_of(Fraction(float(real)) / Fraction(scale))
    grid = QParams((scale,), zero, 0, 255, signed=False)
    assert quantize(real[None], grid).tolist() == [saturate(quotient, zero, 0, 255)]


def test_quantize_divides_and_does_not_multiply_by_the_reciprocal() -> None:
    scale, real = np.float32(2 / 255), np.float32(0.0117647061124444)
    assert np.rint(real * (np.float32(1) / scale)) == 1
    assert quantize(real[None], QParams((float(scale),))).tolist() == [2]


def test_infinite_and_huge_values_saturate() -> None:
    values = [np.inf, -np.inf, 3.4e38, -3.4e38, 1e300, -1e300]
    for grid in (QParams((1.0,)), QParams((1.0,), -128), QParams((2.0**-149,), 126)):
        assert quantize(values, grid).tolist() == [127, -128] * 3
    narrowed = QParams((1.0,), 2, qmin=2, qmax=99)
    assert quantize(values, narrowed).tolist() == [99, 2] * 3


def test_a_nan_is_an_error_that_names_the_tensor_and_the_place() -> None:
    values = np.zeros((2, 3), np.float32)
    values[1, 2] = np.nan
    with pytest.raises(IntactError) as caught:
        quantize(values, QParams((1.0,)), "the weight of 'fc1'")
    assert str(caught.value) == (
        "the weight of 'fc1' holds a NaN at index (1, 2); a NaN has no code. Look for a division "
        "by zero or an overflow in whatever produced it."
    )


def test_each_channel_has_its_own_scale() -> None:
    grid = QParams((1.0, 0.5, 0.25), axis=1)
    real = np.full((2, 3, 4), 3.0, np.float32)
    codes = quantize(real, grid)
    assert codes.shape == real.shape
    assert codes[:, :, 0].tolist() == [[3, 6, 12]] * 2
    assert np.array_equal(dequantize(codes, grid), real)


def test_dequantize_widens_before_it_subtracts() -> None:
    grid = QParams((0.5,), -128)
    assert dequantize(np.array([-128, 127], np.int8), grid).tolist() == [0.0, 127.5]
    grid = QParams((0.5,), 254, 0, 255, signed=False)
    assert dequantize(np.array([0, 255], np.uint8), grid).tolist() == [-127.0, 0.5]


# -- requantize, in integers ---------------------------------------------------------------------

ACCUMULATORS = st.integers(INT32_MIN, INT32_MAX) | st.integers(-(2**17), 2**17)
MULTIPLIERS = st.integers(1, MULTIPLIER_LIMIT - 1) | st.sampled_from(multipliers())


@settings(max_examples=500)
@given(acc=ACCUMULATORS, m=MULTIPLIERS, bits=st.sampled_from(ALL_BITS), signed=st.booleans())
@example(acc=1, m=2**15, bits=8, signed=True)  # one half
@example(acc=3, m=2**15, bits=8, signed=True)
@example(acc=-1, m=2**15, bits=8, signed=True)
@example(acc=-3, m=2**15, bits=8, signed=True)
@example(acc=INT32_MIN, m=2**24 - 1, bits=8, signed=True)
@example(acc=INT32_MAX, m=2**24 - 1, bits=2, signed=False)
def test_requantize_rounds_the_exact_product_and_ties_to_even(
    acc: int, m: int, bits: int, signed: bool
) -> None:
    shift, (low, high) = dyadic_shift(bits), code_range(bits, signed)
    exact = Fraction(acc * m, 2**shift)
    for zero in extreme_zero_points(bits, signed):
        got = requantize_dyadic(single(acc), single(m), shift, zero, low, high)
        assert got.tolist() == [saturate(exact, zero, low, high)]


@given(product=st.integers(-(2**54), 2**54), shift=st.integers(1, 40))
def test_the_shift_rounds_every_product_half_to_even(product: int, shift: int) -> None:
    got = requantize_dyadic(single(product), single(1), shift, 0, -(2**60), 2**60)
    assert got.tolist() == [round(Fraction(product, 2**shift))]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_requantize_is_exact_at_and_next_to_every_boundary(bits: int) -> None:
    shift, (low, high) = dyadic_shift(bits), code_range(bits, True)
    for m, acc in boundaries(bits):
        exact = [round(Fraction(int(a) * m, 2**shift)) for a in acc]
        for zero in extreme_zero_points(bits, True):
            expected = np.clip(np.array(exact) + zero, low, high)
            got = requantize_dyadic(acc.astype(np.int32), single(m), shift, zero, low, high)
            assert np.array_equal(got, expected), (m, zero)


def half_up(product: Array, shift: int) -> Array:
    return (product + (1 << (shift - 1))) >> shift


def half_down(product: Array, shift: int) -> Array:
    return (product + (1 << (shift - 1)) - 1) >> shift


def half_away_from_zero(product: Array, shift: int) -> Array:
    return np.sign(product) * half_up(np.abs(product), shift)


def half_toward_zero(product: Array, shift: int) -> Array:
    return np.sign(product) * half_down(np.abs(product), shift)


def half_to_odd(product: Array, shift: int) -> Array:
    return (product + (1 << (shift - 1)) - ((product >> shift) & 1)) >> shift


def floor(product: Array, shift: int) -> Array:
    return product >> shift


def truncation(product: Array, shift: int) -> Array:
    whole: Array = np.abs(product) >> shift
    return np.sign(product) * whole


def twice_rounded(product: Array, shift: int) -> Array:
    """Half up to one more bit, then half to even: what two shifts in a row do."""
    halves = half_up(product, shift - 1)
    return (halves + ((halves >> 1) & 1)) >> 1


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(
    "wrong",
    [
        half_up,
        half_down,
        half_away_from_zero,
        half_toward_zero,
        half_to_odd,
        floor,
        truncation,
        twice_rounded,
    ],
)
def test_the_boundary_vectors_catch_every_other_rounding(
    bits: int, wrong: Callable[[Array, int], Array]
) -> None:
    shift, (low, high) = dyadic_shift(bits), code_range(bits, True)
    assert any(
        not np.array_equal(
            np.clip(wrong(acc * m, shift), low, high),
            requantize_dyadic(acc, single(m), shift, 0, low, high),
        )
        for m, acc in boundaries(bits)
    )


def test_random_accumulators_would_hardly_notice_half_up_at_an_odd_multiplier() -> None:
    """Why there are boundary vectors: one product in 65,536 is a tie, half of which tell."""
    acc = np.random.default_rng(1).integers(-(2**31), 2**31, 10_000)
    m = 12_345
    codes = requantize_dyadic(acc, single(m), 16, 0, -(2**40), 2**40)
    assert (half_up(acc * m, 16) != codes).sum() <= 3
    acc = np.arange(-(2**12), 2**12)
    codes = requantize_dyadic(acc, single(2**13), 16, 0, -(2**40), 2**40)
    assert (half_up(acc * 2**13, 16) != codes).mean() == 1 / 16


# -- requantize, in float32 ----------------------------------------------------------------------


@settings(max_examples=500)
@given(
    acc=ACCUMULATORS,
    multiplier=st.floats(2.0**-149, allow_infinity=False, allow_nan=False, width=32)
    | st.floats(2.0**-30, 2.0**8, width=32),
    zero=st.sampled_from(even_zero_points(8, True)),
)
@example(acc=2**24 + 1, multiplier=2.0**-17, zero=-128)  # float32(acc) rounds, down to a tie
@example(acc=INT32_MAX, multiplier=3e38, zero=0)  # the product overflows to inf
@example(acc=0, multiplier=3e38, zero=0)
def test_the_float_form_is_ieee_float32_taken_literally(
    acc: int, multiplier: float, zero: int
) -> None:
    multiplier = float(np.float32(multiplier))
    as_float = float32_of(Fraction(acc))
    assert isinstance(as_float, Fraction)
    exact = float32_of(as_float * Fraction(multiplier))
    got = requantize_float(single(acc), np.float32(multiplier), zero, -128, 127)
    assert got.tolist() == [saturate(exact, zero, -128, 127)]


def assert_forms_agree(acc: Array, m: Array, bits: int) -> None:
    shift = dyadic_shift(bits)
    multiplier = multiplier_value(m.astype(np.int32), bits)
    for signed in (True, False):
        low, high = code_range(bits, signed)
        for zero in extreme_zero_points(bits, signed):
            integer = requantize_dyadic(acc, m, shift, zero, low, high)
            floating = requantize_float(acc, multiplier, zero, low, high)
            assert np.array_equal(integer, floating), (bits, zero)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_both_forms_agree_at_and_next_to_every_boundary(bits: int) -> None:
    pairs = [(acc, np.full(len(acc), m)) for m, acc in boundaries(bits)]
    acc, m = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    assert len(acc) > 300 * 2**bits  # of over 80 multipliers, most have boundaries within int32
    assert_forms_agree(acc, m, bits)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_both_forms_agree_over_the_whole_int32_range(bits: int) -> None:
    rng = np.random.default_rng(bits)
    count = 500_000
    anywhere = rng.integers(INT32_MIN, INT32_MAX, count, endpoint=True)
    magnitudes = np.exp2(rng.uniform(0, 31, count)).astype(np.int64)  # as many small as large
    m = np.exp2(rng.uniform(0, 24, count)).astype(np.int64)
    unsaturated = rng.integers(-(2**24), 2**24, count) // m
    for acc in (anywhere, magnitudes, -magnitudes, unsaturated):
        assert_forms_agree(acc, m, bits)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_both_forms_agree_at_the_ends_of_every_range(bits: int) -> None:
    """The ends of int32, and where a product, or the accumulator itself, leaves 24 bits."""
    ends = np.array([*range(-3, 4)])
    for m in multipliers():
        acc = np.concatenate(
            [INT32_MIN + ends[3:], INT32_MAX + ends[:4], ends, *(s * 2**24 + ends for s in (-1, 1))]
            + [s * (2**24 // m) + ends for s in (-1, 1)]
        )
        assert_forms_agree(acc, np.full(len(acc), m), bits)


@pytest.mark.parametrize("m", [2**8, 2**12 - 1, 3 * 2**13, 2**15, 46_341, 2**16, 2**24 - 1])
def test_both_forms_agree_on_every_accumulator_that_does_not_saturate(m: int) -> None:
    limit = 2**24 // m + 2  # beyond it every product is 2**24 or more, and saturates
    acc = np.arange(-limit, limit + 1)
    assert_forms_agree(acc, np.full(len(acc), m), 8)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 3, 2**15, 12_345, 2**24 - 1])
def test_both_forms_agree_on_every_accumulator_there_is(m: int) -> None:
    multiplier = multiplier_value(np.array([m], np.int32), 8)
    for start in range(INT32_MIN, INT32_MAX + 1, 2**20):  # a chunk fits the cache
        acc = np.arange(start, start + 2**20)
        integer = requantize_dyadic(acc, single(m), 16, -128, -128, 127)
        assert np.array_equal(integer, requantize_float(acc, multiplier, -128, -128, 127)), start


@pytest.mark.parametrize(("bits", "signed"), CODE_TYPES)
def test_a_shift_of_one_more_would_part_the_two_forms(bits: int, signed: bool) -> None:
    """The shift is as large as it can be: here the float form sees a tie that is none.

    `2**24 + 2**(24 - bits) + 1` is odd and above 2**24, so float32 drops its last bit; divided by
    two to the shift, what is left is half way between two codes, and the lower one is even.
    """
    zero, _, _ = extreme_zero_points(bits, signed)
    low, high = code_range(bits, signed)
    shift = dyadic_shift(bits) + 1
    acc = single(2**24 + 2 ** (24 - bits) + 1)
    integer = requantize_dyadic(acc, single(1), shift, zero, low, high)
    floating = requantize_float(acc, np.float32(2.0**-shift), zero, low, high)
    assert (integer - floating).tolist() == [1]


def test_odd_zero_points_part_the_order_of_adding_and_rounding_on_every_tie() -> None:
    ties = np.arange(-400, 400) + np.float32(0.5)
    acc = (ties * 2).astype(np.int32)
    for zero in range(-128, 128):
        after = requantize_float(acc, np.float32(0.5), zero, -128, 127)
        before = np.clip(np.rint(ties + np.float32(zero)), -128, 127)
        parted = after != before
        if zero % 2 == 0:
            assert not parted.any()
        else:
            # Every tie, but those where both neighbours lie beyond the same end of the range.
            assert np.array_equal(parted, (ties + zero > -128) & (ties + zero < 127))


# -- the front of requantize ---------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "signed"), CODE_TYPES)
def test_the_dtype_of_the_multiplier_selects_the_form_and_both_give_the_same_codes(
    bits: int, signed: bool
) -> None:
    rng = np.random.default_rng(bits)
    acc = rng.integers(-(2**18), 2**18, (2, 3, 4, 4)).astype(np.int32)
    m = rng.integers(1, 2**14, (3, 1, 1)).astype(np.int32)
    grid = QParams(
        (1.0,), extreme_zero_points(bits, signed)[0], *code_range(bits, signed), bits, signed
    )
    dyadic, floating = requantize(acc, m, grid), requantize(acc, multiplier_value(m, bits), grid)
    assert dyadic.dtype == floating.dtype == grid.dtype
    assert dyadic.shape == acc.shape
    assert np.array_equal(dyadic, floating)
    channel = requantize(acc[:, 1], m[1, 0], grid)
    assert np.array_equal(dyadic[:, 1], channel)


def test_requantize_saturates_at_the_code_range_in_use() -> None:
    relu6 = QParams((1.0,), -128, qmin=-128, qmax=40)
    acc = np.array([-(10**6), 10**6], np.int32)
    assert requantize(acc, np.array([2**16], np.int32), relu6).tolist() == [-128, 40]
    assert requantize(acc, np.array([1], np.float32), relu6).tolist() == [-128, 40]


def test_requantize_refuses_a_multiplier_that_would_be_truncated() -> None:
    with pytest.raises(IntactError, match="a multiplier is int32 or float32, not float64"):
        requantize(np.array([100], np.int32), np.array([0.5]), QParams((1.0,)))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_float32_multiplier_is_exact(bits: int) -> None:
    m = np.array(multipliers(), np.int32)
    value = multiplier_value(m, bits)
    assert value.dtype == np.float32
    exact = [Fraction(int(n), 2 ** dyadic_shift(bits)) for n in m]
    assert [Fraction(float(v)) for v in value] == exact


def test_a_float_multiplier_is_its_own_value() -> None:
    multiplier = np.array([0.1, 3e38], np.float32)
    assert multiplier_value(multiplier, 8) is multiplier


# -- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["dyadic", "power_of_two"])
@given(
    scaled=st.floats(1, 2**23, exclude_max=True) | st.floats(1, 300),
    bits=st.sampled_from(ALL_BITS),
)
def test_neighbours_enclose_the_multiplier_with_nothing_in_between(
    grid: Grid, scaled: float, bits: int
) -> None:
    real = scaled * 2.0 ** -dyadic_shift(bits)  # exact
    below, above = (int(n[0]) for n in grid_neighbours([real], grid, bits))
    assert below <= scaled < above
    if grid == "dyadic":
        assert above == below + 1
    else:
        assert above == 2 * below
        assert below & (below - 1) == 0


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("grid", ["dyadic", "power_of_two"])
def test_neighbours_are_exact_at_and_next_to_every_power_of_two(grid: Grid, bits: int) -> None:
    for k in range(1, 23):
        power = 2.0 ** (k - dyadic_shift(bits))
        real = [np.nextafter(power, 0), power, np.nextafter(power, np.inf)]
        below, above = grid_neighbours(real, grid, bits)
        if grid == "dyadic":
            assert below.tolist() == [2**k - 1, 2**k, 2**k]
            assert above.tolist() == [2**k, 2**k + 1, 2**k + 1]
        else:
            assert below.tolist() == [2 ** (k - 1), 2**k, 2**k]
            assert above.tolist() == [2**k, 2 ** (k + 1), 2 ** (k + 1)]


@pytest.mark.parametrize(
    ("grid", "highest"), [("dyadic", MULTIPLIER_LIMIT - 1), ("power_of_two", MULTIPLIER_LIMIT // 2)]
)
def test_neighbours_stay_within_the_grid(grid: Grid, highest: int) -> None:
    for real in (5e-324, 1e-30, 2.0**-18):
        assert [n.tolist() for n in grid_neighbours([real], grid, 8)] == [[1], [1]]
    for real in (256.0, 1e9, 1e300, 1.7e308):
        assert [n.tolist() for n in grid_neighbours([real], grid, 8)] == [[highest], [highest]]
    below, above = grid_neighbours([0.5, 1.0], grid, 8)
    assert below.dtype == above.dtype == np.int32


def test_on_the_float_grid_both_neighbours_are_the_nearest_float32() -> None:
    real = np.array([0.1, 1 / 3, 3e38, 1e-40])
    below, above = grid_neighbours(real, "float", 8)
    assert below.dtype == above.dtype == np.float32
    exact = [float32_of(Fraction(r)) for r in real]
    assert [Fraction(float(b)) for b in below] == exact
    assert np.array_equal(below, above)


@pytest.mark.parametrize("real", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_multiplier_must_be_finite_and_positive(grid: Grid, real: float) -> None:
    with pytest.raises(IntactError, match="a multiplier must be finite and positive"):
        grid_neighbours([1.0, real], grid, 8)


@pytest.mark.parametrize("real", [1e-50, 1e39])
def test_a_multiplier_beyond_float32_is_refused_on_the_float_grid(real: float) -> None:
    with pytest.raises(IntactError, match="does not fit float32"):
        grid_neighbours([real], "float", 8)


# -- accumulators --------------------------------------------------------------------------------


def partial_sums(weights: list[int], bias: int, codes: range) -> Iterator[int]:
    """Every partial sum, in every order of its terms, of every input; the bias is a term too."""
    for x in itertools.product(codes, repeat=len(weights)):
        terms = [bias, *(a * w for a, w in zip(x, weights, strict=True))]
        for size in range(len(terms) + 1):
            yield from map(sum, itertools.combinations(terms, size))


@given(
    weights=st.lists(st.integers(-128, 127), min_size=1, max_size=3),
    bias=st.integers(-1000, 1000),
    zero=st.sampled_from([-4, -2, 0, 2]),
)
def test_no_partial_sum_of_any_input_in_any_order_passes_the_bound(
    weights: list[int], bias: int, zero: int
) -> None:
    grid = QParams((1.0,), zero, -4, 3, bits=3)
    bound = accumulator_bound(
        np.array([weights], np.int8), grid.max_magnitude, np.array([bias], np.int32)
    )
    sums = list(partial_sums(weights, bias, range(-4 - zero, 3 - zero + 1)))
    assert bound.dtype == np.int64
    assert max(map(abs, sums)) <= bound[0]


@given(
    weights=st.lists(st.integers(-128, 127), min_size=1, max_size=3),
    bias=st.integers(-1000, 1000),
)
def test_on_a_symmetric_range_the_bound_is_reached(weights: list[int], bias: int) -> None:
    bound = accumulator_bound(np.array([weights], np.int8), 3, np.array([bias], np.int32))
    assert max(map(abs, partial_sums(weights, bias, range(-3, 4)))) == bound[0]


def test_the_bound_is_per_channel_and_does_not_wrap() -> None:
    weight = np.full((2, 2, 3, 3), -128, np.int8)
    weight[1] = 1
    bias = np.array([INT32_MIN, INT32_MAX], np.int32)
    assert accumulator_bound(weight, 255, None).tolist() == [18 * 128 * 255, 18 * 255]
    assert accumulator_bound(weight, 255, bias).tolist() == [
        18 * 128 * 255 + 2**31,
        18 * 255 + 2**31 - 1,
    ]


def test_worst_cases_in_float32_are_those_of_the_specification() -> None:
    for max_input, terms in ((128, 1024), (255, 514)):
        fits, over = (
            accumulator_bound(np.full((1, n), -128, np.int8), max_input, None)[0]
            for n in (terms, terms + 1)
        )
        assert fits <= 2**24 < over


@given(bound=st.integers(0, 2**40))
@example(bound=0)
@example(bound=127)
@example(bound=128)
@example(bound=INT32_MAX)
def test_the_accumulator_is_as_wide_as_it_must_be_and_no_wider(bound: int) -> None:
    def holds(bits: int) -> bool:
        low, high = code_range(bits, True)
        return low <= -bound and bound <= high

    bits = accumulator_bits(bound)
    assert holds(bits)
    assert bits == 1 or not holds(bits - 1)


def test_an_int32_accumulator_has_32_bits() -> None:
    assert accumulator_bits(INT32_MAX) == 32
    assert accumulator_bits(INT32_MAX + 1) == 33
