"""How the report writes numbers: digits that mean something, separators, units."""

from __future__ import annotations

import re
from collections.abc import Sequence

from intact.significance import decimals

__all__ = [
    "count",
    "decibel",
    "extent",
    "minus_and_spaces",
    "points",
    "real",
    "share",
    "short_count",
    "size",
    "superscript",
]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NEGATIVE = re.compile(r"(?<![\w.])-(?=[\d.])")
_P_VALUE = re.compile(r"\bp ([=<]) (?=\d)")
_UNIT = re.compile(r"(?<=\d) (?=(?:%|dB|kB|MB|GB|bits?|points?|million|billion)(?!\w))")


def count(n: float) -> str:
    """A whole number with thousands separators; a fractional count keeps one decimal."""
    return f"{n:,.0f}" if n == int(n) else f"{n:,.1f}"


def short_count(n: float) -> str:
    """A count in three significant digits: "651,720" stays, 123456789 is "123 million"."""
    for limit, unit in ((1e9, "billion"), (1e6, "million")):
        if n >= limit:
            return f"{real(n / limit)} {unit}"
    return count(n)


def size(n: float) -> str:
    """Bytes in decimal units, three significant digits at most: "62.0 kB" is "62 kB"."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            digits = 1 if n < 10 * limit else 0
            return f"{n / limit:.{digits}f} {unit}"
    return f"{n:.0f} bytes"


def real(x: float, digits: int = 3) -> str:
    """A real number with `digits` significant digits; very small and large ones as a power."""
    if x == 0:
        return "0"
    mantissa, _, exponent_text = f"{x:.{digits - 1}e}".partition("e")
    exponent = int(exponent_text)
    if -4 <= exponent <= 5:  # 0.0001 to 999,999 read best in full
        return f"{x:,.{max(0, digits - 1 - exponent)}f}"
    return f"{mantissa} × 10{superscript(exponent)}"


def superscript(n: int) -> str:
    """An integer in superscript digits: the exponent of a power."""
    return str(n).translate(_SUPERSCRIPT)


def points(fraction: float, total: int) -> str:
    """A difference of accuracies in percentage points, with its sign: "-0.07", "+0.10", "0.00"."""
    text = f"{100 * fraction:+.{decimals(total)}f}"
    return text[1:] if float(text) == 0 else text


def share(fraction: float) -> str:
    """A share of many values in percent; what is not zero never looks like zero, nor 1 like all."""
    value = 100 * fraction
    if value == 0:
        return "0 %"
    if value < 0.01:
        return "< 0.01 %"
    if value >= 100:
        return "100 %"
    if value > 99.95:
        return "> 99.9 %"
    return f"{value:.2f} %" if value < 1 else f"{value:.1f} %"


def decibel(sqnr: float | None) -> str:
    """A signal-to-noise ratio; None is one without noise."""
    return "exact" if sqnr is None else f"{sqnr:.1f} dB"


def extent(values: Sequence[float], digits: int = 3) -> str:
    """One value, or the smallest and largest of several."""
    low, high = real(min(values), digits), real(max(values), digits)
    return low if low == high else f"{low} to {high}"


def minus_and_spaces(text: str) -> str:
    """Plain text as typeset on the page: a real minus sign, no line break before a unit or in p."""
    text = _P_VALUE.sub("p\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)
    return _UNIT.sub("\N{NO-BREAK SPACE}", _NEGATIVE.sub("\N{MINUS SIGN}", text))
