"""AVX-512 with VNNI: convolutions and linear layers on `vpdpbusd`, tables on shuffles.

`vpdpbusd` adds four products of unsigned and signed bytes to each int32 lane, without saturation.
Lanes are output channels: four bytes of the input are broadcast and meet 16 x 4 weights. The
accumulators of a tile of pixels by channels stay in registers. Where the first layer has few
channels, lanes are pixels instead. With VBMI a table of 256 codes is two shuffles (`vpermi2b`).

On the machines this was written for, a tile's speed is that of its slower half: one dot product or
one load per cycle. `_tile` picks the shape of the tile by counting both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.engines.native.emit import Emitter, Tables, indent, loop
from intact.engines.native.plan import (
    MOST_UNROLLED,
    Layout,
    Lookup,
    MatMul,
    Place,
    Requantization,
)

__all__ = ["Avx512Vnni"]

Array = npt.NDArray[Any]

LANES = 16
BYTES = 64
"""Of a vector."""
REGISTERS = 32
MOST_HELD = 4
"""Vectors of pixels of a row's phase that are held in registers, at most."""
L1_WEIGHTS = 20 * 1024
"""Bytes of weights that may stay in the first-level cache beside the tile's input."""

PRELUDE = """\
#include <immintrin.h>

typedef __m512i V;

/* DOT: acc += the dot product of four unsigned bytes of x with four signed bytes of w, per lane.
   bytes4: four bytes in every lane. gcc moves accumulators about and loads operands so early that
   they no longer fit the registers; given the instructions, in this order, it does neither. */
typedef struct __attribute__((packed, may_alias)) {
    int32_t bytes;
} dword;
#if defined(__GNUC__) && !defined(__clang__)
#define DOT(acc, x, w) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w))
static inline V bytes4(const void *p)
{
    V v;
    __asm__ volatile("vpbroadcastd %1, %0" : "=v"(v) : "m"(*(const dword *)p));
    return v;
}
#else
#define DOT(acc, x, w) ((acc) = _mm512_dpbusd_epi32((acc), (x), (w)))
static inline V bytes4(const void *p)
{
    return _mm512_set1_epi32(((const dword *)p)->bytes);
}
#endif
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define FLOATS(p) _mm512_loadu_ps(p)

/* Four vectors of accumulators to 4 x 16 stored codes, in order. Every step saturates, so nothing
   wraps: to int16, then, with the zero point added, to unsigned bytes. */
static inline V rounded(V acc, __m512 m)
{
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(acc), m));
}

/* The same where acc * m may exceed int32 and would convert to its lowest value. */
static inline V rounded_wide(V acc, __m512 m)
{
    const __m512 p = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), m);
    return _mm512_cvtps_epi32(_mm512_min_ps(p, _mm512_set1_ps(65536.0f)));
}

static inline V packed(V a, V b, V c, V d, int zero)
{
    const V z = _mm512_set1_epi16((short)zero);
    const V low = _mm512_adds_epi16(_mm512_packs_epi32(a, b), z);
    const V high = _mm512_adds_epi16(_mm512_packs_epi32(c, d), z);
    const V order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

/* The same for accumulators of interleaved channels: there packing restores the order. */
static inline V packed_interleaved(V a, V b, V c, V d, int zero)
{
    const V z = _mm512_set1_epi16((short)zero);
    const V low = _mm512_adds_epi16(_mm512_packs_epi32(a, b), z);
    return _mm512_packus_epi16(low, _mm512_adds_epi16(_mm512_packs_epi32(c, d), z));
}

/* 64 channels of four rows to four vectors with the four bytes of one channel in each lane. */
#define INTERLEAVE(i0, i1, i2, i3, r0, r1, r2, r3)                                     \
    const V l01 = _mm512_unpacklo_epi8(r0, r1), h01 = _mm512_unpackhi_epi8(r0, r1);    \
    const V l23 = _mm512_unpacklo_epi8(r2, r3), h23 = _mm512_unpackhi_epi8(r2, r3);    \
    const V i0 = _mm512_unpacklo_epi16(l01, l23), i1 = _mm512_unpackhi_epi16(l01, l23); \
    const V i2 = _mm512_unpacklo_epi16(h01, h23), i3 = _mm512_unpackhi_epi16(h01, h23)

static inline V clamped(V codes, int low, int high)
{
    if (low > 0)
        codes = _mm512_max_epu8(codes, _mm512_set1_epi8((char)low));
    if (high < 255)
        codes = _mm512_min_epu8(codes, _mm512_set1_epi8((char)high));
    return codes;
}

/* What a table of 256 bytes has for each of 64 codes. */
static inline V looked_up(V codes, const uint8_t *table)
{
#ifdef __AVX512VBMI__
    const V low = _mm512_permutex2var_epi8(LOAD(table), codes, LOAD(table + 64));
    const V high = _mm512_permutex2var_epi8(LOAD(table + 128), codes, LOAD(table + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
#else
    V found = _mm512_setzero_si512();
    for (int i = 0; i < 256; i += 16) {
        /* Below 16 where the code is in this part of the table. What is above gets its highest bit
           set, for which the shuffle gives 0. */
        const V at = _mm512_xor_si512(codes, _mm512_set1_epi8((char)i));
        const V index = _mm512_adds_epu8(at, _mm512_set1_epi8(0x70));
        const __m128i part = _mm_loadu_si128((const __m128i *)(const void *)(table + i));
        const V entries = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(part), index);
        found = _mm512_or_si512(found, entries);
    }
    return found;
#endif
}

/* Rounded accumulators to stored codes that stay int32. */
static inline V code32(V rounded, int zero, int low, int high)
{
    /* Clamped before the zero point is added, so that nothing wraps. */
    rounded = _mm512_max_epi32(rounded, _mm512_set1_epi32(low - zero));
    rounded = _mm512_min_epi32(rounded, _mm512_set1_epi32(high - zero));
    return _mm512_add_epi32(rounded, _mm512_set1_epi32(zero));
}

/* 64 stored codes to another grid. What is clamped is a float, as m may be any. */
static inline V rescaled(V codes, int from, float m, int zero, int low, int high)
{
    const __m512 scale = _mm512_set1_ps(m), most = _mm512_set1_ps(65536.0f);
    V part[4];
    for (int i = 0; i < 4; i++) {
        const __m128i bytes = i == 0   ? _mm512_castsi512_si128(codes)
                              : i == 1 ? _mm512_extracti32x4_epi32(codes, 1)
                              : i == 2 ? _mm512_extracti32x4_epi32(codes, 2)
                                       : _mm512_extracti32x4_epi32(codes, 3);
        const V centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(from));
        const __m512 p = _mm512_mul_ps(_mm512_cvtepi32_ps(centred), scale);
        part[i] = _mm512_cvtps_epi32(_mm512_min_ps(p, most));
    }
    return clamped(packed(part[0], part[1], part[2], part[3], zero), low, high);
}

/* a + b - zero, saturated to bytes. */
static inline V added(V a, V b, int zero)
{
    const V none = _mm512_setzero_si512();
    const V z = _mm512_set1_epi16((short)zero);
    const V low = _mm512_add_epi16(_mm512_unpacklo_epi8(a, none), _mm512_unpacklo_epi8(b, none));
    const V high = _mm512_add_epi16(_mm512_unpackhi_epi8(a, none), _mm512_unpackhi_epi8(b, none));
    return _mm512_packus_epi16(_mm512_sub_epi16(low, z), _mm512_sub_epi16(high, z));
}
"""


@dataclass(frozen=True, slots=True)
class _Tile:
    """How many pixels (columns of the convolution) and vectors of channels are computed at once."""

    pixels: int
    vectors: int
    slides: bool


class Avx512Vnni(Emitter):
    """Kernels on 512-bit vectors with `vpdpbusd`."""

    layout = Layout(pad_rgb=True, pixel_lanes=True, lanes=LANES)
    prelude = PRELUDE

    def load(self, place: Place) -> str | None:
        """Three planes of pixels to four bytes per pixel, or to windows of a kernel."""
        if place.windows:
            return self._load_windows(place)
        if (place.channels, place.pixel) != (3, 4) or place.width % LANES or place.phases > 2:
            return None
        left = place.border[2]
        columns = [place.column(left + i) - place.column(left) for i in range(place.phases)]
        to = [f"x + y * {place.row} + x0 * {4 // place.phases} + {at}" for at in columns]
        return loop("y", place.height, rgb_pixels(place, to))

    def _load_windows(self, place: Place) -> str:
        """Pixels by phase, then windows shifted together from those.

        In registers where a row's pixels fit. Else in two loops: a load of what was just stored in
        two halves would wait for both.
        """
        plane = place.phase // place.windows
        vectors = -(-(place.row if place.row_phases else plane) // (LANES * 4))
        to = f"y * {place.row}"
        if place.row_phases:
            to = f"y / {place.row_phases} * {place.row}"
            to += f" + y % {place.row_phases} * {place.row_phase}"
        held, rest = divmod(place.width, LANES * place.phases)
        in_registers = place.phases <= 2 and not rest and held <= MOST_HELD
        pixels = _HeldPixels(place, held) if in_registers else _StoredPixels(place, vectors)
        lines = []
        names: list[int | str] = [*range(vectors)] if in_registers else ["v"]
        for v, phase, d in itertools.product(names, range(place.phases), range(place.windows)):
            parts = []
            # The pixels whose three bytes reach into the four bytes of this dword.
            for k in range(4 * d // 3, min((4 * d + 3) // 3 + 1, 4 * place.windows // 3)):
                move, row = divmod(phase + k, place.phases)
                part = pixels.vector(row, v, move)
                shift = 8 * (3 * k - 4 * d)
                if shift:
                    direction = "slli" if shift > 0 else "srli"
                    part = f"_mm512_{direction}_epi32({part}, {abs(shift)})"
                parts.append(part)
            joined = functools.reduce(lambda a, b: f"_mm512_or_si512({a},\n    {b})", parts)
            at = f"line + {phase * place.phase + d * plane} + {v} * 64"
            lines.append(f"_mm512_storeu_si512({at},\n    {joined});")
        return pixels.body(f"uint8_t *const line = x + {to};", "\n".join(lines))

    def matmul(self, step: MatMul, name: str) -> str | None:
        """A convolution or linear layer."""
        if step.depthwise:
            _, kh, kw, _ = step.weight.shape
            if -(-kh // 4) * kw > MOST_UNROLLED:
                return None
            return _Depthwise(self, step, name).body()
        if step.pixel_lanes:
            return _PixelLanes(self, step, name).body()
        return _ChannelLanes(self, step, name).body()

    def lookup(self, step: Lookup, name: str) -> str | None:
        """A table look-up, 64 codes at a time, where rows are whole and have one table."""
        source, target = step.source, step.target
        if len(step.table) > 1 or (source.pixel, target.pixel) != (source.channels,) * 2:
            return None
        table = self.tables.add(f"{name}_table", step.table)
        rows, length = target.height, target.width * target.channels
        if source.dense and target.dense:
            rows, length = 1, rows * length
        lines = [
            f"const uint8_t *const from = x + y * {source.row};",
            f"uint8_t *const out = to + y * {target.row};",
        ]
        whole, rest = length - length % BYTES, length % BYTES
        if whole:
            lines.append(
                f"for (int i = 0; i < {whole}; i += {BYTES}) {{\n"
                f"    _mm512_storeu_si512(out + i, looked_up(LOAD(from + i), {table}));\n}}"
            )
        if rest:
            mask = f"{(1 << rest) - 1:#x}u"
            codes = f"_mm512_maskz_loadu_epi8({mask}, from + {whole})"
            stored = f"looked_up({codes}, {table})"
            lines.append(f"_mm512_mask_storeu_epi8(out + {whole}, {mask}, {stored});")
        return loop("y", rows, "\n".join(lines))


class _HeldPixels:
    """The pixels of a row in registers, a dword each, by phase."""

    def __init__(self, place: Place, held: int) -> None:
        self.place = place
        self.held = held
        self.moved: dict[str, str] = {}

    def vector(self, phase: int, v: int | str, move: int) -> str:
        """16 pixels of a phase from number `16 * v + move` on, 0 behind the row's end."""
        vector = int(v) + move // LANES
        move %= LANES
        here, behind = (
            f"p{phase}_{i}" if i < self.held else "_mm512_setzero_si512()"
            for i in (vector, vector + 1)
        )
        if not move or vector >= self.held:
            return here
        name = f"{here}_{move}"
        self.moved[name] = f"_mm512_alignr_epi32({behind}, {here}, {move})"
        return name

    def body(self, line: str, stores: str) -> str:
        """The loop over rows."""
        place = self.place
        plane = place.height * place.width
        flip = "0x808080" if place.signed else ""
        lines = [f"const uint8_t *const p = input + y * {place.width};"]
        for j in range(self.held):
            at = j * LANES * place.phases
            colours = (f"p + {c * plane + at}" for c in range(3))
            lines += two_phases(j, *colours) if place.phases == 2 else one_phase(j, *colours)
            if flip:
                lines += [
                    f"p{f}_{j} = _mm512_xor_si512(p{f}_{j}, _mm512_set1_epi32({flip}));"
                    for f in range(place.phases)
                ]
        lines += [f"const V {name} = {value};" for name, value in self.moved.items()]
        return loop("y", place.height, "\n".join([*lines, line, stores]))


class _StoredPixels:
    """The pixels of all rows in memory, a dword each, by phase."""

    def __init__(self, place: Place, vectors: int) -> None:
        self.place = place
        self.vectors = vectors
        self.reach = 0

    def vector(self, phase: int, v: int | str, move: int) -> str:
        """16 pixels of a phase from number `16 * v + move` on."""
        self.reach = max(self.reach, move)
        return f"LOAD(pixels[y][{phase}] + {v} * {LANES} + {move})"

    def body(self, line: str, stores: str) -> str:
        """The loop that stores pixels, and the one that makes windows of them."""
        place = self.place
        if place.width % LANES == 0 and place.phases <= 2:
            rows = [f"pixels[y][{phase}] + x0 / {place.phases}" for phase in range(place.phases)]
            text = rgb_pixels(place, rows)
        else:
            flip = " ^ 128" if place.signed else ""
            plane = place.height * place.width
            at = f"input[y * {place.width} + x0 + c * {plane}]"
            pixel = f"pixels[y][x0 % {place.phases}][x0 / {place.phases}]"
            byte = loop("c", 3, f"{pixel} |= (uint32_t)({at}{flip}) << 8 * c;")
            text = loop("x0", place.width, f"{pixel} = 0;\n{byte}")
        # What lies behind the last column ends in lanes that are never stored.
        columns = -(-place.width // (place.phases * LANES)) * LANES
        room = columns + -(-self.reach // LANES) * LANES
        first = loop("y", place.height, text)
        second = loop("y", place.height, f"{line}\n{loop('v', self.vectors, stores)}")
        return f"uint32_t pixels[{place.height}][{place.phases}][{room}];\n{first}\n{second}"


def one_phase(j: int, *colours: str) -> list[str]:
    """Statements that declare `p0_j`: 16 pixels of three planes."""
    load = "_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)({})))"
    r, g, b = (load.format(colour) for colour in colours)
    return [
        f"V p0_{j} = _mm512_or_si512({r}, _mm512_slli_epi32({g}, 8));",
        f"p0_{j} = _mm512_or_si512(p0_{j}, _mm512_slli_epi32({b}, 16));",
    ]


def two_phases(j: int, *colours: str) -> list[str]:
    """Statements that declare `p0_j` and `p1_j`: 16 even and 16 odd pixels of three planes."""
    load = "_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)({})))"
    lines = [f"const V {c}{j} = {load.format(at)};" for c, at in zip("rgb", colours, strict=True)]

    def byte(colour: str, mask: str, shift: int) -> str:
        kept = f"_mm512_and_si512({colour}{j}, _mm512_set1_epi32({mask}))"
        return f"_mm512_slli_epi32({kept}, {shift})" if shift else kept

    return [
        *lines,
        f"V p0_{j} = _mm512_or_si512({byte('r', '0xff', 0)}, {byte('g', '0xff', 8)});",
        f"p0_{j} = _mm512_or_si512(p0_{j}, {byte('b', '0xff', 16)});",
        f"V p1_{j} = _mm512_or_si512(_mm512_srli_epi32(r{j}, 8), {byte('g', '0xff00', 0)});",
        f"p1_{j} = _mm512_or_si512(p1_{j}, {byte('b', '0xff00', 8)});",
    ]


class _ChannelLanes:
    """Lanes are output channels, four bytes of a pixel's window are broadcast."""

    def __init__(self, emitter: Avx512Vnni, step: MatMul, name: str) -> None:
        self.emitter = emitter
        self.step = step
        self.name = name
        self.table = fused_table(emitter.tables, step, name)
        self.group_out = len(step.weight) // step.groups
        self.all_vectors = -(-self.group_out // LANES)
        self.tile = self._tile()

    # -- the shape of the tile ---------------------------------------------------------------------

    def _can_slide(self) -> bool:
        """Whether one broadcast can serve all columns of the kernel: pixels of whole dwords."""
        step = self.step
        kw, channels = step.weight.shape[2:]
        regular = step.stride[1] == 1 and step.dilation[1] == 1 and kw > 1
        dwords = channels % 4 == 0 or (step.source.pixel == 4 and step.groups == 1)
        return regular and dwords and not step.rows

    def _runs(self) -> tuple[int, int, int]:
        """Rows of taps, taps per row that are addressed one by one, dwords of each."""
        _, kh, kw, channels = self.step.weight.shape
        if self.step.source.pixel == 4 and channels == 3:
            channels = 4
        whole = self.step.groups == 1 and self.step.source.pixel == channels
        if whole and self.step.dilation[1] == 1 and not self._slides():
            return kh, 1, -(-kw * channels // 4)
        return kh, kw, -(-channels // 4)

    def _slides(self) -> bool:
        return getattr(self, "tile", _Tile(1, 1, slides=False)).slides

    def _tile(self) -> _Tile:
        """The tile of least cost, in cycles of whichever is the slower: dot products or loads."""
        step = self.step
        pool_rows, pool_columns = step.pool
        width = step.out[1] // pool_columns * pool_columns
        kw = step.weight.shape[2]
        best: tuple[float, _Tile] | None = None
        for slides in {False, self._can_slide()}:
            self.tile = _Tile(1, 1, slides)
            rows, taps, dwords = self._runs()
            for vectors in range(1, min(self.all_vectors, 8) + 1):
                most = (REGISTERS - 2 - vectors * (kw if slides else 1)) // (vectors * pool_rows)
                if step.rows:
                    most = min(most, 16)
                for pixels in range(pool_columns, most + 1, pool_columns):
                    columns = 16 if step.rows else width
                    cost = 0.0
                    chunks = -(-self.all_vectors // vectors)
                    spare = chunks * vectors - self.all_vectors
                    weights = rows * taps * dwords * vectors * 64
                    far = 1.0 if weights <= L1_WEIGHTS or step.out[0] * columns < 4 else 2.0
                    for count in _blocks(columns, pixels):
                        dots = rows * taps * dwords * vectors * count * pool_rows
                        if slides:
                            reads = (count + kw - 1) * pool_rows + kw * vectors * far
                            loads = rows * dwords * reads
                        else:
                            loads = rows * taps * dwords * (count * pool_rows + vectors * far)
                        latency = rows * taps * dwords * 4.5
                        cost += max(dots, loads, latency) + 4 + 3 * vectors * count
                    cost *= chunks - spare / vectors / 2
                    if best is None or cost < best[0]:
                        best = (cost, _Tile(pixels, vectors, slides))
        del self.tile
        return best[1] if best else _Tile(pool_columns, 1, slides=False)

    # -- tables ------------------------------------------------------------------------------------

    def _chunks(self) -> list[int]:
        """Vectors of each pass over the image."""
        full, rest = divmod(self.all_vectors, self.tile.vectors)
        return [self.tile.vectors] * full + [rest] * bool(rest)

    def _packed(self) -> Array:
        """int8, per group and pass `[row][dword or run][tap][vector][16][4]`."""
        step = self.step
        _, kh, kw, channels = step.weight.shape
        rows, taps, dwords = self._runs()
        runs = np.zeros((step.groups, self.all_vectors * LANES, rows, taps, dwords * 4), np.int8)
        grouped = step.weight.reshape(step.groups, self.group_out, kh, kw, channels)
        if taps == kw:
            runs[:, : self.group_out, :, :, :channels] = grouped
        else:
            pixel = step.source.pixel if channels == 3 and step.source.pixel == 4 else channels
            spread = np.zeros((step.groups, self.group_out, kh, kw, pixel), np.int8)
            spread[..., :channels] = grouped
            flat = spread.reshape(step.groups, self.group_out, kh, 1, kw * pixel)
            runs[:, : self.group_out, :, :, : kw * pixel] = flat
        # Per group: vector, lane, row, tap, dword, byte of it.
        split = runs.reshape(step.groups, self.all_vectors, LANES, rows, taps, dwords, 4)
        parts = []
        for group in split:
            first = 0
            for vectors in self._chunks():
                part = group[first : first + vectors]
                order = (2, 4, 3, 0, 1, 5) if self.tile.slides else (2, 3, 4, 0, 1, 5)
                parts.append(np.transpose(part, order).reshape(-1))
                first += vectors
        return np.concatenate(parts)

    def _per_channel(self, values: Array) -> Array:
        """Values of every output channel, with room for whole vectors in each group."""
        padded = np.zeros((self.step.groups, self.all_vectors * LANES), values.dtype)
        padded[:, : self.group_out] = values.reshape(self.step.groups, -1)
        return padded.reshape(-1)

    # -- text --------------------------------------------------------------------------------------

    def body(self) -> str:
        """The function's statements."""
        step, tables, name = self.step, self.emitter.tables, self.name
        w = tables.add(f"{name}_weight", self._packed())
        b = tables.add(f"{name}_bias", self._per_channel(step.bias))
        m = tables.add(f"{name}_multiplier", self._per_channel(step.requantization.multiplier))
        chunks = self._chunks()
        rows, taps, dwords = self._runs()
        bytes_per_vector = rows * taps * dwords * 64
        per_group = self.all_vectors
        texts = []
        for vectors, members in itertools.groupby(range(len(chunks)), lambda i: chunks[i]):
            indices = list(members)
            # The last pass may end in a vector that is not full, and then stores less.
            ragged = bool(self.group_out % LANES) and indices[-1] == len(chunks) - 1
            parts = [indices[:-1], indices[-1:]] if ragged else [indices]
            for part in filter(None, parts):
                first = part[0] * self.tile.vectors
                valid = min(self.group_out - first * LANES, vectors * LANES)
                pass_text = self._pass(vectors, valid if ragged and part[-1] == indices[-1] else 0)
                start = f"v0 = {first} + c * {vectors}" if len(part) > 1 else f"v0 = {first}"
                head = (
                    f"const int {start}, at = g * {per_group} + v0;\n"
                    f"const int8_t *const weights = {w} + (size_t)at * {bytes_per_vector};\n"
                    f"const int32_t *const bias = {b} + at * 16;\n"
                    f"const float *const multiplier = {m} + at * 16;\n"
                    f"const int channel = g * {self.group_out} + v0 * 16;\n"
                )
                texts.append(loop("c", len(part), head + pass_text))
        return loop("g", step.groups, "\n".join(texts))

    def _pass(self, vectors: int, valid: int) -> str:
        """All pixels, for some vectors of channels; `valid` channels of them where not all are."""
        step, tile = self.step, self.tile
        channels = step.weight.shape[3]
        if step.rows:
            return self._rows_pass(vectors, valid)
        pool_rows, pool_columns = step.pool
        source, target = step.source, step.target
        move_y = step.stride[0] * pool_rows * source.row
        width = step.out[1] // pool_columns * pool_columns
        group = f" + g * {channels}" if step.groups > 1 else ""
        lines = [
            f"const uint8_t *const row = x + {step.first}{group} + y * {move_y};",
            f"uint8_t *const out = to + channel + y * {target.row};",
        ]
        if step.addend is not None:
            lines.append(f"const uint8_t *const with = addend + channel + y * {step.addend.row};")
        done = 0
        for count, blocks in _grouped(_blocks(width, tile.pixels)):
            start = f"{done} + b * {count}" if done else f"b * {count}"
            pixel = step.stride[1] * source.pixel
            inner = [
                f"const int x0 = {start};",
                f"const uint8_t *p = row + x0 * {pixel};",
            ]
            offsets = [
                r * step.stride[0] * source.row + i * pixel
                for r in range(pool_rows)
                for i in range(count)
            ]
            inner.append(self._accumulate(vectors, offsets, count))
            inner.append(self._finish(vectors, count, valid))
            lines.append(loop("b", blocks, "\n".join(inner)))
            done += count * blocks
        return loop("y", step.out[0] // pool_rows, "\n".join(lines))

    def _rows_pass(self, vectors: int, valid: int) -> str:
        """Samples of a block take the place of pixels."""
        step = self.step
        parts = ["uint32_t i = 0;"]
        for count in sorted({self.tile.pixels, 1}, reverse=True):
            offsets = [i * step.source.sample for i in range(count)]
            body = "\n".join(
                (
                    f"const uint8_t *p = x + {step.first} + (size_t)i * {step.source.sample};",
                    f"uint8_t *const out = to + channel + (size_t)i * {step.target.sample};",
                    "const int x0 = 0;",
                    self._accumulate(vectors, offsets, count),
                    self._finish(vectors, count, valid),
                )
            )
            parts.append(f"for (; i + {count} <= n; i += {count}) {{\n{indent(body)}\n}}")
        return "\n".join(parts)

    def _accumulate(self, vectors: int, offsets: Sequence[int], count: int) -> str:
        """Declare and fill the accumulators `a<pixel>_<vector>`."""
        step = self.step
        rows, taps, dwords = self._runs()
        kw = step.weight.shape[2]
        pixel = step.source.pixel
        names = ", ".join(f"a{p}_{v} = b{v}" for p in range(len(offsets)) for v in range(vectors))
        biases = ", ".join(f"b{v} = LOAD(bias + {v * LANES})" for v in range(vectors))
        lines = [f"const V {biases};", f"V {names};", "const int8_t *w = weights;"]
        if self.tile.slides:
            tile_rows = len(offsets) // count
            body = [
                "const V "
                + ", ".join(
                    f"w{k}_{v} = LOAD(w + {(k * vectors + v) * 64})"
                    for k in range(kw)
                    for v in range(vectors)
                )
                + ";"
            ]
            for r in range(tile_rows):
                for i in range(count + kw - 1):
                    dots = [
                        f"DOT(a{r * count + i - k}_{v}, v, w{k}_{v});"
                        for k in range(kw)
                        if 0 <= i - k < count
                        for v in range(vectors)
                    ]
                    move = offsets[r * count] + i * pixel
                    body.append(f"{{ const V v = bytes4(p + {move} + k); {' '.join(dots)} }}")
            step_w = kw * vectors * 64
            text = f"for (int k = 0; k < {dwords * 4}; k += 4, w += {step_w}) {{\n"
            text += indent("\n".join(body)) + "\n}"
            text += f"\np += {step.dilation[0] * step.source.row};"
            return "\n".join((*lines, loop("ky", rows, text)))
        body = ["const V " + ", ".join(f"w{v} = LOAD(w + {v * 64})" for v in range(vectors)) + ";"]
        for i, move in enumerate(offsets):
            row = " ".join(f"DOT(a{i}_{v}, v, w{v});" for v in range(vectors))
            body.append(f"{{ const V v = bytes4(q + {move}); {row} }}")
        inner = f"const uint8_t *q = p + kx * {step.dilation[1] * pixel};\n"
        inner += f"for (int k = 0; k < {dwords}; k++, q += 4, w += {vectors * 64}) {{\n"
        inner += indent("\n".join(body)) + "\n}"
        outer = loop("kx", taps, inner) + f"\np += {step.dilation[0] * step.source.row};"
        return "\n".join((*lines, loop("ky", rows, outer)))

    def _finish(self, vectors: int, count: int, valid: int) -> str:
        """Pool, requantize, add, clamp, store."""
        step, rule = self.step, self.step.requantization
        pool_rows, pool_columns = step.pool
        lines = []
        multipliers = ", ".join(f"m{v} = FLOATS(multiplier + {v * LANES})" for v in range(vectors))
        lines.append(f"const __m512 {multipliers};")
        outputs = []
        for i in range(count // pool_columns):
            for v in range(vectors):
                members = [
                    f"a{r * count + i * pool_columns + j}_{v}"
                    for r in range(pool_rows)
                    for j in range(pool_columns)
                ]
                highest = members[0]
                for other in members[1:]:
                    highest = f"_mm512_max_epi32({highest}, {other})"
                outputs.append((i, v, f"{rounding(rule)}({highest}, m{v})"))
        column = f"x0 / {pool_columns}" if pool_columns > 1 else "x0"
        pixel = step.target.sample if step.rows else step.target.pixel
        left = 0 if step.rows else pixel
        lines.append(f"uint8_t *const o = out + {column} * {left};")
        if step.addend is not None:
            lines.append(f"const uint8_t *const e = with + {column} * {step.addend.pixel};")
        for start in range(0, len(outputs), 4):
            four = outputs[start : start + 4]
            values = [value for *_, value in four] + ["_mm512_setzero_si512()"] * (4 - len(four))
            lines.append("{")
            inner = [f"V codes = packed({', '.join(values)}, {rule.zero});"]
            if (rule.low, rule.high) != (0, 255):
                inner.append(f"codes = clamped(codes, {rule.low}, {rule.high});")
            sizes = [(i * pixel + v * LANES, self._size(v, valid)) for i, v, _ in four]
            pieces = list(_pieces(sizes))
            if step.addend is not None:
                with_ = [
                    (i * step.addend.pixel + v * LANES, self._size(v, valid)) for i, v, _ in four
                ]
                inner.append(gather_pieces("other", "e", list(_pieces(with_))))
                if step.addend_rule is not None:
                    inner.append(f"other = {rescaled('other', step.addend, step.addend_rule)};")
                inner.append(f"codes = added(codes, other, {step.sum_zero});")
                if step.sum_range != (0, 255):
                    low, high = step.sum_range
                    inner.append(f"codes = clamped(codes, {low}, {high});")
            inner += look_up("codes", self.table)
            for offset, mask in pieces:
                if mask == 2**64 - 1:
                    inner.append(f"_mm512_storeu_si512(o + {offset}, codes);")
                else:
                    inner.append(f"_mm512_mask_storeu_epi8(o + {offset}, {mask:#x}u, codes);")
            lines.append(indent("\n".join(inner)))
            lines.append("}")
        return "\n".join(lines)

    def _size(self, v: int, valid: int) -> int:
        """Channels of a vector that exist."""
        return min(LANES, valid - v * LANES) if valid else LANES


class _PixelLanes:
    """Lanes are neighbouring (pooled) pixels; a weight's four bytes are broadcast.

    A vector's pixels are of one row, or run on from row to row.
    """

    def __init__(self, emitter: Avx512Vnni, step: MatMul, name: str) -> None:
        self.emitter = emitter
        self.step = step
        self.name = name
        self.table = fused_table(emitter.tables, step, name)

    def body(self) -> str:
        """The function's statements."""
        step = self.step
        out_channels, kh, kw, channels = step.weight.shape
        source, target, rule = step.source, step.target, step.requantization
        pool_rows, pool_columns = step.pool
        dwords = source.windows or kw
        packed = np.zeros((kh, out_channels, dwords * 4), np.int8)
        rows = np.transpose(step.weight, (1, 0, 2, 3))
        if source.windows:
            packed[..., : kw * channels] = rows.reshape(kh, out_channels, -1)
        else:
            packed.reshape(kh, out_channels, kw, 4)[..., :channels] = rows
        # Per row: dword of the window, output channel, byte.
        packed = np.swapaxes(packed.reshape(kh, out_channels, dwords, 4), 1, 2)
        w = self.emitter.tables.add(f"{self.name}_weight", packed)
        height, width = step.out[0] // pool_rows, step.out[1] // pool_columns
        positions = [(r, j) for r in range(pool_rows) for j in range(pool_columns)]
        accumulators = ", ".join(
            f"a{p}_{o} = _mm512_set1_epi32({c_int(int(step.bias[o]))})"
            for o in range(out_channels)
            for p in range(len(positions))
        )
        taps = []
        # `first` is the byte of the first tap's column; columns are counted from the row's start.
        start = source.border[2] - step.ops[0].padding[2]  # type: ignore[union-attr]
        base = source.column(start)
        for k in range(dwords):
            moves = []
            for r, j in positions:
                column = start + j * step.stride[1] + (0 if source.windows else k)
                plane = k * source.phase // source.windows if source.windows else 0
                moves.append(f"q{r} + {source.column(column) - base + plane}")
            loads = ", ".join(f"x{p} = LOAD({at})" for p, at in enumerate(moves))
            dots = "\n".join(
                f"{{ const V v = bytes4(w + {(k * out_channels + o) * 4}); "
                + " ".join(f"DOT(a{p}_{o}, x{p}, v);" for p in range(len(positions)))
                + " }"
                for o in range(out_channels)
            )
            taps.append(f"{{\n{indent(f'const V {loads};')}\n{indent(dots)}\n}}")
        lines = "\n".join(
            f"const uint8_t *const q{r} = p + {self._line(r * step.stride[0])};"
            for r in range(pool_rows)
        )
        body = [
            f"V {accumulators};",
            loop(
                "ky",
                kh,
                f"const int8_t *const w = {w} + ky * {dwords * out_channels * 4};\n{lines}\n"
                + "\n".join(taps),
            ),
        ]
        quads = -(-out_channels // 4)
        body.append(f"uint32_t codes[{quads}][16];")
        for d in range(quads):
            parts = []
            for o in range(d * 4, min(d * 4 + 4, out_channels)):
                highest = f"a0_{o}"
                for p in range(1, len(positions)):
                    highest = f"_mm512_max_epi32({highest}, a{p}_{o})"
                factor = f"_mm512_set1_ps({float(rule.multiplier[o]).hex()}f)"
                value = f"code32({rounding(rule)}({highest}, {factor}), "
                value += f"{rule.zero}, {rule.low}, {rule.high})"
                move = 8 * (o - d * 4)
                parts.append(f"_mm512_slli_epi32({value}, {move})" if move else value)
            joined = parts[0]
            for part in parts[1:]:
                joined = f"_mm512_or_si512({joined},\n        {part})"
            joined = f"looked_up({joined}, {self.table})" if self.table else joined
            body.append(f"_mm512_storeu_si512(codes[{d}], {joined});")
        copies = "\n".join(
            f"memcpy(out + {d * 4}, &codes[{d}][i], {min(4, out_channels - d * 4)});"
            for d in range(quads)
        )
        # A vector's outputs are those of one row, or run on from row to row.
        length = height * width if source.row_phases else width
        count = "16" if length % 16 == 0 else f"({length} - x0 < 16 ? {length} - x0 : 16)"
        body.append(
            f"for (int i = 0; i < {count}; i++, out += {target.pixel}) {{\n{indent(copies)}\n}}"
        )
        if source.row_phases:
            where = ("", "")
        else:
            where = (f" + y * {step.stride[0] * pool_rows * source.row}", f" + y * {target.row}")
        body = [
            f"const uint8_t *const p = x + {step.first}{where[0]} + x0 * 4;",
            f"uint8_t *out = to{where[1]} + x0 * {target.pixel};",
            *body,
        ]
        inner = f"for (int x0 = 0; x0 < {length}; x0 += 16) {{\n" + indent("\n".join(body)) + "\n}"
        return inner if source.row_phases else loop("y", height, inner)

    def _line(self, down: int) -> str:
        """Bytes from the first row of a window to row `down + ky * dilation`, as a C expression."""
        source, dilation = self.step.source, self.step.dilation[0]
        if not source.row_phases:
            return f"{down * source.row} + ky * {dilation * source.row}"
        kh = self.step.weight.shape[1]
        lines = np.array([source.line(down + ky * dilation) for ky in range(kh)], np.int32)
        return f"{self.emitter.tables.add(f'{self.name}_lines{down}', lines)}[ky]"


class _Depthwise:
    """Lanes are channels, and the four bytes of a lane are four rows of its own kernel."""

    def __init__(self, emitter: Avx512Vnni, step: MatMul, name: str) -> None:
        self.emitter = emitter
        self.step = step
        self.name = name
        self.table = fused_table(emitter.tables, step, name)

    def body(self) -> str:
        """The function's statements."""
        step, tables, name = self.step, self.emitter.tables, self.name
        channels, kh, kw, _ = step.weight.shape
        source, target, rule = step.source, step.target, step.requantization
        chunks = -(-channels // 64)
        groups = -(-kh // 4)
        weight = np.zeros((chunks * 64, groups * 4, kw), np.int8)
        weight[:channels, :kh] = step.weight[..., 0]
        # [chunk][group of rows][column][vector][128-bit lane][channel of it][row]
        split = weight.reshape(chunks, 4, 4, 4, groups, 4, kw)
        w = tables.add(f"{name}_weight", np.transpose(split, (0, 4, 6, 2, 1, 3, 5)))
        b = tables.add(f"{name}_bias", self._interleaved(step.bias, chunks))
        m = tables.add(f"{name}_multiplier", self._interleaved(rule.multiplier, chunks))
        size = groups * kw * 256
        accumulators = 4  # pixels at once: 16 of the 32 registers
        lines = []
        done = 0
        for count, blocks in _grouped(_blocks(step.out[1], accumulators)):
            start = f"{done} + b * {count}" if done else f"b * {count}"
            inner = [
                f"const int x0 = {start};",
                f"const uint8_t *const p = row + x0 * {step.stride[1] * source.pixel};",
                "V " + ", ".join(f"a{i}_{v} = b{v}" for i in range(count) for v in range(4)) + ";",
                *self._taps(count, groups),
                f"uint8_t *const o = out + x0 * {target.pixel};",
            ]
            for i in range(count):
                values = ", ".join(f"{rounding(rule)}(a{i}_{v}, m{v})" for v in range(4))
                inner.append(f"V codes{i} = packed_interleaved({values}, {rule.zero});")
                if (rule.low, rule.high) != (0, 255):
                    inner.append(f"codes{i} = clamped(codes{i}, {rule.low}, {rule.high});")
                inner += look_up(f"codes{i}", self.table)
                inner.append(f"_mm512_mask_storeu_epi8(o + {i * target.pixel}, mask, codes{i});")
            lines.append(loop("b", blocks, "\n".join(inner)))
            done += count * blocks
        rest = channels % 64
        mask = (
            f"c == {chunks - 1} ? {(1 << rest) - 1:#x}u : ~(__mmask64)0"
            if rest
            else "~(__mmask64)0"
        )
        if rest and chunks == 1:
            mask = f"{(1 << rest) - 1:#x}u"
        head = (
            f"const int8_t *const w = {w} + (size_t)c * {size};\n"
            f"const __mmask64 mask = {mask};\n"
            + "".join(
                f"const V b{v} = LOAD({b} + c * 64 + {v * 16});\n"
                f"const __m512 m{v} = FLOATS({m} + c * 64 + {v * 16});\n"
                for v in range(4)
            )
        )
        row = (
            f"const uint8_t *const row = x + {step.first} + c * 64 + "
            f"y * {step.stride[0] * source.row};\n"
            f"uint8_t *const out = to + c * 64 + y * {target.row};\n"
        )
        return loop("c", chunks, head + loop("y", step.out[0], row + "\n".join(lines)))

    def _interleaved(self, values: Array, chunks: int) -> Array:
        padded = np.zeros(chunks * 64, values.dtype)
        padded[: len(values)] = values
        return np.transpose(padded.reshape(chunks, 4, 4, 4), (0, 2, 1, 3)).reshape(-1)

    def _taps(self, count: int, groups: int) -> Iterator[str]:
        step = self.step
        _, kh, kw, _ = step.weight.shape
        (_, sx), (dy, dx) = step.stride, step.dilation
        for g in range(groups):
            rows = [min(g * 4 + i, kh - 1) for i in range(4)]  # of weight 0 behind the last one
            uses: dict[int, list[tuple[int, int]]] = {}
            for i, k in itertools.product(range(count), range(kw)):
                uses.setdefault(i * sx + k * dx, []).append((i, k))
            for column, pairs in sorted(uses.items()):
                loads = ", ".join(
                    f"LOAD(p + {r * dy * step.source.row + column * step.source.pixel})"
                    for r in rows
                )
                dots = "\n".join(
                    " ".join(
                        f"DOT(a{i}_{v}, i{v}, LOAD(w + {((g * kw + k) * 4 + v) * 64}));"
                        for v in range(4)
                    )
                    for i, k in pairs
                )
                yield f"{{\n    INTERLEAVE(i0, i1, i2, i3, {loads});\n{indent(dots)}\n}}"


def rgb_pixels(place: Place, to: Sequence[str]) -> str:
    """Statements that store row `y` of three planes as dwords, 16 columns from `x0` at a time.

    to  where, for one phase, or for even and odd columns
    """
    plane = place.height * place.width
    colour = "_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)({})))"
    lines = [
        f"const uint8_t *const p = input + y * {place.width} + x0;",
        f"const V r = {colour.format('p')};",
        f"const V g = _mm512_slli_epi32({colour.format(f'p + {plane}')}, 8);",
        f"const V b = _mm512_slli_epi32({colour.format(f'p + {2 * plane}')}, 16);",
        "V rgb = _mm512_or_si512(_mm512_or_si512(r, g), b);",
    ]
    if place.signed:
        lines.append("rgb = _mm512_xor_si512(rgb, _mm512_set1_epi32(0x808080));")
    if len(to) == 1:
        lines.append(f"_mm512_storeu_si512({to[0]}, rgb);")
    else:
        order = ", ".join(map(str, (*range(0, LANES, 2), *range(1, LANES, 2))))
        lines += [
            f"rgb = _mm512_permutexvar_epi32(_mm512_setr_epi32({order}), rgb);",
            f"_mm256_storeu_si256((__m256i *)({to[0]}), _mm512_castsi512_si256(rgb));",
            f"_mm256_storeu_si256((__m256i *)({to[1]}), _mm512_extracti64x4_epi64(rgb, 1));",
        ]
    body = "\n".join(lines)
    return f"for (int x0 = 0; x0 < {place.width}; x0 += {LANES}) {{\n{indent(body)}\n}}"


def c_int(value: int) -> str:
    """An int32 as a C literal."""
    return str(value) if value > -(2**31) else "(-2147483647 - 1)"


def rounding(rule: Requantization) -> str:
    """The prelude's function that this range needs."""
    return "rounded_wide" if rule.wide else "rounded"


def rescaled(codes: str, place: Place, rule: Requantization) -> str:
    """The call that moves a vector of stored codes to another grid."""
    m = f"{float(rule.multiplier[0]).hex()}f"
    return f"rescaled({codes}, {place.zero}, {m}, {rule.zero}, {rule.low}, {rule.high})"


def fused_table(tables: Tables, step: MatMul, name: str) -> str:
    """The name of the table that is fused into a layer, or nothing."""
    return "" if step.table is None else tables.add(f"{name}_table", step.table)


def look_up(codes: str, table: str) -> Iterator[str]:
    """The statement that looks a vector of stored codes up, if there is a table."""
    if table:
        yield f"{codes} = looked_up({codes}, {table});"


def _blocks(width: int, size: int) -> list[int]:
    """`width` pixels in blocks of `size`, and the rest."""
    full, rest = divmod(width, size)
    return [size] * full + [rest] * bool(rest)


def _grouped(blocks: list[int]) -> Iterator[tuple[int, int]]:
    """(size, how many) of runs of equal blocks."""
    for size, members in itertools.groupby(blocks):
        yield size, len(list(members))


def _pieces(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Masked stores of a vector of four parts of 16 bytes: (byte offset of the vector, mask).

    Parts that are neighbours in memory go in one store; a masked store may start before its bytes.
    """
    start = 0
    while start < len(sizes):
        end = start
        mask = ((1 << sizes[start][1]) - 1) << (16 * start)
        while (
            end + 1 < len(sizes)
            and sizes[end][1] == LANES
            and sizes[end + 1][0] == sizes[end][0] + LANES
        ):
            end += 1
            mask |= ((1 << sizes[end][1]) - 1) << (16 * end)
        yield sizes[start][0] - 16 * start, mask
        start = end + 1


def gather_pieces(name: str, pointer: str, pieces: Sequence[tuple[int, int]]) -> str:
    """A vector of the bytes that the pieces name."""
    first, *rest = [
        f"LOAD({pointer} + {offset})"
        if mask == 2**64 - 1
        else f"_mm512_maskz_loadu_epi8({mask:#x}u, {pointer} + {offset})"
        for offset, mask in pieces
    ]
    lines = [f"V {name} = {first};"]
    lines += [f"{name} = _mm512_or_si512({name}, {other});" for other in rest]
    return "\n".join(lines)
