"""AVX2: convolutions and linear layers on `vpmaddwd`.

`vpmaddwd` adds two products of int16 to each int32 lane. Bytes are widened first, so nothing
saturates, as `vpmaddubsw` does. Lanes are output channels: two bytes of the input are broadcast and
meet 8 x 2 weights. The accumulators of a tile of pixels by channels stay in registers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.engines.native.emit import Emitter, added, bounds, indent, loop
from intact.engines.native.plan import MatMul

__all__ = ["Avx2"]

Array = npt.NDArray[Any]

LANES = 8
BYTES = 32
"""Of a vector: eight pairs of int16 weights."""
MOST_ACCUMULATORS = 11
"""Of 16 registers; the others hold weights and a pair of bytes."""
MOST_VECTORS = 4
LEAST_CHANNELS = 4
"""Of a group: with fewer, the portable kernel wastes less."""

PRELUDE = """\
#include <immintrin.h>

typedef __m256i V;
typedef struct __attribute__((packed, may_alias)) {
    int16_t bytes;
} pair;

/* Two bytes as int16 in every lane. */
static inline V widened(const uint8_t *p)
{
    return _mm256_cvtepu8_epi16(_mm_set1_epi16(((const pair *)(const void *)p)->bytes));
}

#define LOAD(p) _mm256_loadu_si256((const V *)(const void *)(p))
#define DOT(acc, x, w) ((acc) = _mm256_add_epi32((acc), _mm256_madd_epi16((x), (w))))

/* `requantize` of eight accumulators, to stored codes that stay int32. */
static inline V requantized(V acc, __m256 m, float low, float high, int32_t zero)
{
    __m256 p = _mm256_mul_ps(_mm256_cvtepi32_ps(acc), m);
    p = _mm256_min_ps(_mm256_max_ps(p, _mm256_set1_ps(low)), _mm256_set1_ps(high));
    return _mm256_add_epi32(_mm256_cvtps_epi32(p), _mm256_set1_epi32(zero));
}
"""


class Avx2(Emitter):
    """Kernels on 256-bit vectors with `vpmaddwd`."""

    prelude = PRELUDE

    def matmul(self, step: MatMul, name: str) -> str | None:
        """A convolution or linear layer."""
        channels = len(step.weight) // step.groups
        if step.depthwise or channels < LEAST_CHANNELS:
            return None
        if math.prod(step.pool) > MOST_ACCUMULATORS:
            return None
        return _Kernel(self, step, name).body()


@dataclass(frozen=True, slots=True)
class _Tile:
    """How many outputs (after pooling) and vectors of channels are computed at once."""

    outputs: int
    vectors: int


class _Kernel:
    """Lanes are output channels, two bytes of a pixel's window are broadcast."""

    def __init__(self, emitter: Avx2, step: MatMul, name: str) -> None:
        self.step = step
        self.group_out = len(step.weight) // step.groups
        self.all_vectors = -(-self.group_out // LANES)
        _, kh, kw, channels = step.weight.shape
        source = step.source
        whole = step.groups == 1 and source.pixel == channels and step.dilation[1] == 1
        # Runs of bytes without gaps: the taps of a row of the kernel, or each tap on its own.
        self.taps = (kh, 1) if whole else (kh, kw)
        self.run = kw * channels if whole else channels
        self.pairs = -(-self.run // 2)
        self.tile = self._tile()
        tables = emitter.tables
        self.weight = tables.add(f"{name}_weight", self._packed())
        self.bias = tables.add(f"{name}_bias", self._per_channel(step.bias))
        multiplier = self._per_channel(step.requantization.multiplier)
        self.multiplier = tables.add(f"{name}_multiplier", multiplier)
        self.table = "" if step.table is None else tables.add(f"{name}_table", step.table)

    def _tile(self) -> _Tile:
        """The tile with most products per operation: two per product, two per pair of bytes."""
        step = self.step
        positions = math.prod(step.pool)
        width = 16 if step.rows else step.out[1] // step.pool[1]
        best = (0.0, _Tile(1, 1))
        for vectors in range(1, min(self.all_vectors, MOST_VECTORS) + 1):
            for outputs in range(1, MOST_ACCUMULATORS // (positions * vectors) + 1):
                pixels = outputs * positions
                operations = 2 * pixels * vectors + 2 * pixels + vectors
                useful = self.all_vectors / (-(-self.all_vectors // vectors) * vectors)
                useful *= width / (-(-width // outputs) * outputs)
                worth = pixels * vectors * useful / operations
                if worth > best[0]:
                    best = (worth, _Tile(outputs, vectors))
        return best[1]

    def _chunks(self) -> list[tuple[int, int]]:
        """First vector and number of vectors of each pass over the image."""
        size = self.tile.vectors
        return [(v, min(size, self.all_vectors - v)) for v in range(0, self.all_vectors, size)]

    def _packed(self) -> Array:
        """int16, per group and pass `[tap][pair][vector][lane][2]`, as bytes."""
        step = self.step
        taps = math.prod(self.taps)
        weight = np.zeros((step.groups, self.all_vectors * LANES, taps, self.pairs * 2), np.int16)
        weight[:, : self.group_out, :, : self.run] = step.weight.reshape(
            step.groups, self.group_out, taps, self.run
        )
        # Group, vector, lane, tap, pair, byte of it.
        split = weight.reshape(step.groups, self.all_vectors, LANES, taps, self.pairs, 2).transpose(
            0, 3, 4, 1, 2, 5
        )
        parts = [
            np.ascontiguousarray(split[g, :, :, v : v + count]).reshape(-1)
            for g, (v, count) in itertools.product(range(step.groups), self._chunks())
        ]
        return np.concatenate(parts).view(np.int8)

    def _per_channel(self, values: Array) -> Array:
        padded = np.zeros((self.step.groups, self.all_vectors * LANES), values.dtype)
        padded[:, : self.group_out] = values.reshape(self.step.groups, -1)
        return padded.reshape(-1)

    def body(self) -> str:
        """The function's statements."""
        step = self.step
        per_vector = math.prod(self.taps) * self.pairs * BYTES
        passes = []

        def kind(chunk: tuple[int, int]) -> tuple[int, int]:
            first, vectors = chunk
            return vectors, min(self.group_out - first * LANES, vectors * LANES)

        # Passes that store alike are one loop: compilers take long over a wide layer's many.
        for (vectors, valid), chunks in itertools.groupby(self._chunks(), kind):
            alike = list(chunks)
            where = f"(size_t)(g * {self.all_vectors} + v0) * {per_vector}"
            head = [
                f"const int v0 = {alike[0][0]} + part * {vectors};",
                f"const int at = g * {self.all_vectors * LANES} + v0 * {LANES};",
                f"const int8_t *const weights = {self.weight} + {where};",
                f"const int channel = g * {self.group_out} + v0 * {LANES};",
                *(f"const V b{v} = LOAD({self.bias} + at + {v * LANES});" for v in range(vectors)),
                *(
                    f"const __m256 m{v} = _mm256_loadu_ps({self.multiplier} + at + {v * LANES});"
                    for v in range(vectors)
                ),
            ]
            inner = self._samples(vectors, valid) if step.rows else self._image(vectors, valid)
            passes.append(loop("part", len(alike), "\n".join([*head, inner])))
        return loop("g", step.groups, "\n".join(passes))

    def _samples(self, vectors: int, valid: int) -> str:
        """A linear layer on the samples of a block."""
        step, size = self.step, self.tile.outputs
        texts = ["uint32_t i = 0;"]
        for outputs in dict.fromkeys((size, 1)):
            lines = [
                f"const uint8_t *const p = x + {step.first} + (size_t)i * {step.source.sample};",
                f"uint8_t *const out = to + channel + (size_t)i * {step.target.sample};",
                self._outputs(outputs, vectors, valid, step.source.sample, step.target.sample),
            ]
            text = indent("\n".join(lines))
            texts.append(f"for (; i + {outputs} <= n; i += {outputs}) {{\n{text}\n}}")
        return "\n".join(texts)

    def _image(self, vectors: int, valid: int) -> str:
        step, source, target = self.step, self.step.source, self.step.target
        height, width = (n // p for n, p in zip(step.out, step.pool, strict=True))
        down = step.stride[0] * step.pool[0] * source.row
        right = step.stride[1] * step.pool[1] * source.pixel
        offset = f" + g * {step.weight.shape[3]}" if step.groups > 1 else ""
        lines = [
            f"const uint8_t *const row = x + {step.first}{offset} + y * {down};",
            f"uint8_t *const to_row = to + channel + y * {target.row};",
        ]
        if step.addend is not None:
            lines.append(
                f"const uint8_t *const with_row = addend + channel + y * {step.addend.row};"
            )
        size, done = self.tile.outputs, 0
        for outputs, times in ((size, width // size), (width % size, 1)):
            if not outputs or not times:
                continue
            block = [
                f"const int x0 = {done} + b * {outputs};",
                f"const uint8_t *const p = row + x0 * {right};",
                f"uint8_t *const out = to_row + x0 * {target.pixel};",
            ]
            if step.addend is not None:
                block.append(f"const uint8_t *const with = with_row + x0 * {step.addend.pixel};")
            block.append(self._outputs(outputs, vectors, valid, right, target.pixel))
            lines.append(loop("b", times, "\n".join(block)))
            done += outputs * times
        return loop("y", height, "\n".join(lines))

    def _outputs(self, outputs: int, vectors: int, valid: int, move: int, pixel: int) -> str:
        """Some outputs, `move` bytes of the source and `pixel` bytes of the target apart."""
        step, source = self.step, self.step.source
        pool_rows, pool_columns = step.pool
        inside = [
            r * step.stride[0] * source.row + c * step.stride[1] * source.pixel
            for r, c in itertools.product(range(pool_rows), range(pool_columns))
        ]
        offsets = [i * move + at for i in range(outputs) for at in inside]
        names = [f"a{p}_{v}" for p in range(len(offsets)) for v in range(vectors)]
        lines = ["V " + ", ".join(f"{name} = b{name.split('_')[1]}" for name in names) + ";"]
        weights = ", ".join(f"w{v} = LOAD(w + {v * BYTES})" for v in range(vectors))
        dots = "\n".join(
            f"{{ const V v = widened(q + {at}); "
            + " ".join(f"DOT(a{p}_{v}, v, w{v});" for v in range(vectors))
            + " }"
            for p, at in enumerate(offsets)
        )
        inner = f"const V {weights};\n{dots}"
        text = (
            f"for (int k = 0; k < {self.pairs}; k++, q += 2, w += {vectors * BYTES}) {{\n"
            f"{indent(inner)}\n}}"
        )
        kh, kw = self.taps
        at = f"p + ky * {step.dilation[0] * source.row}"
        at += f" + kx * {step.dilation[1] * source.pixel}" if kw > 1 else ""
        text = f"const uint8_t *q = {at};\n{text}"
        text = loop("ky", kh, loop("kx", kw, text) if kw > 1 else text)
        lines += ["const int8_t *w = weights;", text]
        rule = step.requantization
        lines.append(f"int32_t codes[{outputs}][{vectors * LANES}];")
        for i, v in itertools.product(range(outputs), range(vectors)):
            first = i * len(inside)
            highest = f"a{first}_{v}"
            for p in range(first + 1, first + len(inside)):
                highest = f"_mm256_max_epi32({highest}, a{p}_{v})"
            value = f"requantized({highest}, m{v}, {bounds(rule)})"
            to = f"(V *)(void *)(codes[{i}] + {v * LANES})"
            lines.append(f"_mm256_storeu_si256({to}, {value});")
        # A loop, as compilers take long over the same statements for each output.
        each = "uint8_t code = (uint8_t)codes[i][c];"
        if step.addend is not None:
            each += "\n" + added(step, "code", f"with[i * {step.addend.pixel} + c]")
        code = f"{self.table}[code]" if self.table else "code"
        each += f"\nout[i * {pixel} + c] = {code};"
        lines.append(loop("i", outputs, loop("c", valid, each)))
        return "\n".join(lines)
