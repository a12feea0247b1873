"""Instruction sets: what each needs of the CPU and how a compiler is asked for it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

__all__ = ["ISAS", "Isa"]

_AVX512 = ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512dq")


@dataclass(frozen=True, slots=True)
class Isa:
    """An instruction set that kernels are generated for.

    features  of CPU and operating system that it needs, spelled as compilers spell them
    probe     a C statement that a compiler takes if it knows the instructions
    """

    features: tuple[str, ...]
    probe: str

    def missing(self, features: Set[str]) -> str | None:
        """Why it cannot run where there are only these features, or None."""
        if absent := [f for f in self.features if f not in features]:
            return f"this CPU or its operating system lacks {', '.join(absent)}"
        return None


ISAS: dict[str, Isa] = {
    "amx": Isa(
        (*_AVX512, "avx512vnni", "avx512vbmi", "amx-tile", "amx-int8"),
        "_tile_zero(0); _tile_dpbssd(0, 1, 2);",
    ),
    "avx512vbmi": Isa(
        (*_AVX512, "avx512vnni", "avx512vbmi"),
        "volatile __m512i v = _mm512_setzero_si512(); v = _mm512_permutex2var_epi8(v, v, v);",
    ),
    "avx512vnni": Isa(
        (*_AVX512, "avx512vnni"),
        "volatile __m512i v = _mm512_setzero_si512(); v = _mm512_dpbusd_epi32(v, v, v);",
    ),
    "avx512": Isa(
        _AVX512, "volatile __m512i v = _mm512_setzero_si512(); v = _mm512_maddubs_epi16(v, v);"
    ),
    "avx2": Isa(
        ("avx2",), "volatile __m256i v = _mm256_setzero_si256(); v = _mm256_madd_epi16(v, v);"
    ),
    "portable": Isa((), ""),
}
"""Best first. What is compiled for one of them runs on every CPU that has its features, so a cache
may be shared by machines; flags such as `-march=native` would break that."""
