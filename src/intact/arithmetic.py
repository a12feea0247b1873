"""The arithmetic of every engine: quantize, dequantize, requantize, grids, accumulator bounds.

NumPy only. `docs/arithmetic.md` is the specification; each function names the section it follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from intact.errors import IntactError, QParamsError

__all__ = [
    "INT32_MAX",
    "MULTIPLIER_LIMIT",
    "Grid",
    "QParams",
    "accumulator_bits",
    "accumulator_bound",
    "accumulator_scale",
    "code_range",
    "dequantize",
    "dyadic_shift",
    "grid_neighbours",
    "is_power_of_two",
    "multiplier_value",
    "quantize",
    "requantize",
    "requantize_dyadic",
    "requantize_float",
]

Grid: TypeAlias = Literal["float", "dyadic", "power_of_two"]
"""The set from which multipliers are taken: any float32, `m / 2**shift`, or `2**k / 2**shift`."""

GRIDS: tuple[str, ...] = get_args(Grid)
INT32_MAX = 2**31 - 1
MULTIPLIER_LIMIT = 2**24
"""Dyadic multipliers are integers in `[1, MULTIPLIER_LIMIT)`: what a float32 significand holds."""

Codes: TypeAlias = npt.NDArray[Any]
Float32: TypeAlias = npt.NDArray[np.float32]
Int64: TypeAlias = npt.NDArray[np.int64]


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """All codes of a `bits`-wide integer: `(-128, 127)` for 8 bits signed, `(0, 255)` unsigned."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@dataclass(frozen=True, slots=True)
class QParams:
    """A quantization grid: real value = `scale * (q - zero_point)`.  arithmetic.md, section 1.

    scale       float32 values > 0, one per tensor or one per index of `axis`
    zero_point  even, within the code type; 0 for every symmetric grid and every weight
    qmin, qmax  the code range in use, inclusive. A fused ReLU or clamp narrows it
    bits        width of the code type, 2 to 8
    signed      whether the code type is signed; codes are stored as int8 or uint8
    axis        the per-channel axis, or None for one scale per tensor
    """

    scale: tuple[float, ...]
    zero_point: int = 0
    qmin: int = -128
    qmax: int = 127
    bits: int = 8
    signed: bool = True
    axis: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise QParamsError(f"bits is {self.bits}, but codes are 2 to 8 bits wide.")
        low, high = code_range(self.bits, self.signed)
        kind = f"{'int' if self.signed else 'uint'}{self.bits}"
        if not low <= self.qmin <= self.qmax <= high:
            raise QParamsError(
                f"the code range [{self.qmin}, {self.qmax}] is not a range within {kind}, which is "
                f"[{low}, {high}]."
            )
        if self.zero_point % 2 or not low <= self.zero_point <= high:
            raise QParamsError(
                f"zero_point is {self.zero_point}, but it must be an even number within {kind}, "
                f"[{low}, {high}] (arithmetic.md, section 1)."
            )
        if not self.scale or (self.axis is None and len(self.scale) != 1):
            raise QParamsError(
                f"{len(self.scale)} scales with axis {self.axis}: a per-tensor grid has one scale, "
                "a per-channel grid has one for each channel of its axis."
            )
        for i, s in enumerate(self.scale):
            if not (math.isfinite(s) and s > 0 and float(_float32(s)) == s):
                raise QParamsError(
                    f"scale[{i}] is {s!r}, but a scale must be a finite, positive float32. "
                    "An all-zero channel is the usual cause; give it scale 1.0."
                )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy type that stores the codes: int8 or uint8."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def type_name(self) -> str:
        """`int8`, `uint8`, `int4`, …"""
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def max_magnitude(self) -> int:
        """The largest `|q - zero_point|` of the code range: what an accumulator bound needs."""
        return max(abs(self.qmin - self.zero_point), abs(self.qmax - self.zero_point))

    def per_channel(self, ndim: int) -> Float32:
        """The scale as float32, shaped to broadcast against a tensor of `ndim` dimensions."""
        scale = np.asarray(self.scale, np.float32)
        if self.axis is None:
            return scale.reshape(())
        return scale.reshape([-1 if i == self.axis % ndim else 1 for i in range(ndim)])


def _float32(values: npt.ArrayLike) -> Float32:
    """The nearest float32, which is an infinity where the value is too large; no warning."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32)


def quantize(values: npt.ArrayLike, qparams: QParams, name: str = "tensor") -> Codes:
    """Real values to codes: `clamp(rint(r / scale) + zero_point, qmin, qmax)`.

    values   float32, any shape (anything else is converted to float32 first)
    returns  int8 or uint8 (`qparams.dtype`), the same shape

    The division is one float32 division and `rint` rounds half to even; the zero point is added
    after `rint`. Infinite values saturate. A NaN raises `IntactError` that names `name`.
    arithmetic.md, section 1.
    """
    real = _float32(values)
    if np.isnan(real).any():
        where = tuple(int(i) for i in np.argwhere(np.isnan(real))[0])
        raise IntactError(
            f"{name} holds a NaN at index {where}; a NaN has no code. Look for a division by zero "
            "or an overflow in whatever produced it."
        )
    low, high = qparams.qmin - qparams.zero_point, qparams.qmax - qparams.zero_point
    with np.errstate(over="ignore"):  # a huge value over a small scale is inf, which saturates
        rounded = np.rint(real / qparams.per_channel(real.ndim))
    # Clamped before the zero point is added, where every number is small enough to be exact.
    centred = np.clip(rounded, low, high).astype(np.int16)
    return np.asarray(centred + qparams.zero_point, qparams.dtype)


def dequantize(codes: npt.ArrayLike, qparams: QParams) -> Float32:
    """Codes to real values: `scale * (q - zero_point)`, one float32 multiplication.

    codes    integers, any shape
    returns  float32, the same shape
    arithmetic.md, section 1.
    """
    centred = np.asarray(codes, np.int32) - qparams.zero_point
    return np.asarray(centred.astype(np.float32) * qparams.per_channel(centred.ndim), np.float32)


def dyadic_shift(bits: int) -> int:
    """The constant shift of the dyadic grid for `bits`-wide codes: 16 for 8 bits, 20 for 4.

    `24 - log2(W)` with `W = 2**bits`, the power of two above the largest `|q - zero_point|` that
    any zero point allows. arithmetic.md, section 3.
    """
    return 24 - bits


def requantize_dyadic(
    acc: npt.ArrayLike, multiplier: npt.ArrayLike, shift: int, zero_point: int, qmin: int, qmax: int
) -> Int64:
    """`clamp(rshift_round_half_even(acc * m, shift) + zero_point, qmin, qmax)`, in int64.

    acc         int32 values, any shape
    multiplier  integers in `[1, 2**24)`, broadcast against `acc`
    returns     int64 codes
    arithmetic.md, section 3.
    """
    product = np.asarray(acc, np.int64) * np.asarray(multiplier, np.int64)  # below 2**55: exact
    # Ties to even, because rint does so in float kernels. Half up would move 1 code in 16 at a
    # multiplier of 2**13 and hardly one at an odd multiplier: random tests would not notice.
    half = (1 << (shift - 1)) - 1
    rounded = (product + half + ((product >> shift) & 1)) >> shift
    return np.asarray(np.clip(rounded + zero_point, qmin, qmax), np.int64)


def requantize_float(
    acc: npt.ArrayLike, multiplier: npt.ArrayLike, zero_point: int, qmin: int, qmax: int
) -> Int64:
    """`clamp(rint(float32(acc) * M) + zero_point, qmin, qmax)`, literally in IEEE float32.

    acc         int32 values, any shape
    multiplier  float32 > 0, broadcast against `acc`
    returns     int64 codes

    On the dyadic grid this equals `requantize_dyadic`, bit for bit: arithmetic.md, section 3.
    """
    with np.errstate(over="ignore"):  # inf saturates, as it must
        scaled = np.asarray(acc).astype(np.float32) * np.asarray(multiplier, np.float32)
    rounded = np.clip(np.rint(scaled), qmin - zero_point, qmax - zero_point)
    return rounded.astype(np.int64) + zero_point


def requantize(acc: npt.ArrayLike, multiplier: npt.NDArray[Any], qparams: QParams) -> Codes:
    """Accumulators to codes of `qparams`, by the rule that the multiplier's dtype selects.

    acc         int32 values, any shape
    multiplier  int32 (dyadic: `M = m / 2**dyadic_shift(bits)`) or float32 (`M` itself), broadcast
                against `acc`
    returns     int8 or uint8, the shape of `acc`
    arithmetic.md, section 3.
    """
    low, high, zero = qparams.qmin, qparams.qmax, qparams.zero_point
    if multiplier.dtype == np.float32:
        return requantize_float(acc, multiplier, zero, low, high).astype(qparams.dtype)
    if multiplier.dtype.kind not in "iu":  # float64 would be truncated to 0 without a word
        raise IntactError(f"a multiplier is int32 or float32, not {multiplier.dtype.name}.")
    shift = dyadic_shift(qparams.bits)
    return requantize_dyadic(acc, multiplier, shift, zero, low, high).astype(qparams.dtype)


def multiplier_value(multiplier: npt.NDArray[Any], bits: int) -> Float32:
    """The float32 `M` of a stored multiplier; exact, as `m` has 24 bits at most."""
    if multiplier.dtype == np.float32:
        return multiplier
    return np.ldexp(multiplier.astype(np.float32), -dyadic_shift(bits)).astype(np.float32)


def grid_neighbours(
    real: npt.ArrayLike, grid: Grid, bits: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The multipliers of `grid` next below and next above each real multiplier.

    real     float64 > 0, any shape
    bits     width of the result's codes; sets the shift
    returns  (below, above), int32 on the dyadic and power-of-two grids, float32 on the float grid,
             where both are the nearest float32. Both are kept within the grid's range.
    arithmetic.md, section 3.
    """
    wanted = np.asarray(real, np.float64)
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise IntactError(f"a multiplier must be finite and positive, not {wanted!r}.")
    if grid == "float":
        nearest = _float32(wanted)
        if not (np.isfinite(nearest).all() and (nearest > 0).all()):
            raise IntactError(f"a multiplier does not fit float32: {wanted!r}.")
        return nearest, nearest
    # The minimum is far above every grid's range, and keeps ldexp from overflowing to inf.
    scaled = np.ldexp(np.minimum(wanted, MULTIPLIER_LIMIT), dyadic_shift(bits))
    if grid == "power_of_two":
        exponent = np.frexp(scaled)[1] - 1
        below, above = np.ldexp(1.0, exponent), np.ldexp(1.0, exponent + 1)
        highest = MULTIPLIER_LIMIT // 2
    else:
        below, above = np.floor(scaled), np.floor(scaled) + 1
        highest = MULTIPLIER_LIMIT - 1
    return (
        np.clip(below, 1, highest).astype(np.int32),
        np.clip(above, 1, highest).astype(np.int32),
    )


def is_power_of_two(scale: float) -> bool:
    """Whether a positive float is `2**k`: then dividing by it is exact, and so is multiplying by
    its inverse.

    arithmetic.md, section 1.
    """
    return math.frexp(scale)[0] == 0.5


def accumulator_bound(
    weight: npt.NDArray[Any], max_input: int, bias: npt.NDArray[Any] | None
) -> Int64:
    """The largest magnitude that any partial sum of each output channel can reach.

    weight     integers [O, ...]
    max_input  largest `|x - zero_point|` of the input's code range
    bias       integers [O], or None
    returns    int64 [O]: `sum_k |w[o, k]| * max_input + |bias[o]|`
    arithmetic.md, section 2.
    """
    # Positive and negative weights are summed apart: no wider copy of a large layer is made.
    rows = weight.reshape(len(weight), -1)
    total = np.maximum(rows, 0).sum(axis=1, dtype=np.int64)
    total = (total - np.minimum(rows, 0).sum(axis=1, dtype=np.int64)) * max_input
    return np.asarray(total if bias is None else total + np.abs(bias.astype(np.int64)), np.int64)


def accumulator_scale(input_scale: float, weight_scale: Float32) -> npt.NDArray[np.float64]:
    """What one unit of an accumulator, and so of a bias, is worth: `scale_x * scale_w[o]`, float64.

    arithmetic.md, section 2.
    """
    unit: npt.NDArray[np.float64] = weight_scale.astype(np.float64) * input_scale
    return unit


def accumulator_bits(bound: int) -> int:
    """Bits of the two's-complement register that holds every value within `[-bound, bound]`."""
    return int(bound).bit_length() + 1
