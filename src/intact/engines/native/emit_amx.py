"""AMX: convolutions and linear layers on tiles, `tdpbusd`.

A tile is 16 rows of 64 bytes. One instruction multiplies 16 rows of 64 unsigned bytes (16 outputs'
operands) with 64 x 16 signed weights and adds to 16 x 16 accumulators, in 16 cycles; loading a
tile takes 8 cycles if each row is one cache line, and 20 to 50 if rows straddle lines. So what
decides is how often operands are loaded, and how they lie:

* Neighbouring pixels of an image are rows of a tile as they are: what follows a pixel in memory is
  the window of the kernel that starts there. Weights behind the window's end are 0.
* `span` neighbouring outputs may share one row, which then holds the window of them all; each has
  a copy of the weights, shifted. Rows are then further apart and straddle fewer lines.
* With few channels even a row of the kernel fills little of 64 bytes. Then windows are copied to a
  buffer in which those of one column of the image follow each other ("turned"), so that a tile's
  row runs over several rows of the kernel.
* Or all of an output's operands are copied to a place of their own ("patches"), without gaps.
* Where the image is narrow, a tile runs on into the next row ("flat"), over the border between
  them, and what it computes there is dropped.

`_cheapest` counts cycles for all of these and takes the best. While one group of tiles multiplies,
the previous one's accumulators are requantized, which is what the two buffers of sums are for.

All tiles have the same shape, so that a program configures them once. Layers for which tiles do
not pay are those of `emit_avx512`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from intact.engines.native.emit import Tables, indent, loop
from intact.engines.native.emit_avx512 import (
    LANES,
    Array,
    Avx512Vnni,
    _blocks,
    _ChannelLanes,
    _grouped,
    fused_table,
)
from intact.engines.native.plan import Layout, MatMul, Place, align
from intact.ops import Pair

__all__ = ["Amx"]

ROWS = 16
BYTES = 64
TILES = 8
TILE = ROWS * BYTES
L1_WEIGHTS = 24 * 1024
"""Bytes of weights that stay in the first-level cache between two uses."""
MOST_SUMS = 24 * 1024
"""Bytes of both buffers of accumulators, which must stay there too."""
MOST_COPIED = 24 * 1024
"""Bytes of copied operands, likewise."""
MOST_TILES = 12
"""Tiles of outputs of a unit: more would only take longer to choose from."""
MOST_TWICE = 2**20
"""Bytes of a linear layer's weights that are also stored for vectors. Reading more of them than
this takes as long either way."""

PRELUDE = """\

/* Tiles of 16 rows of 64 bytes: palette 1, then bytes per row of each, then rows of each. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_configuration = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* gcc does not know that a tile is loaded from memory: what was stored before must be there. */
#define STORED __asm__ volatile("" ::: "memory")

static inline void copy16(uint8_t *to, const uint8_t *p)
{
    _mm_storeu_si128((__m128i *)to, _mm_loadu_si128((const __m128i *)p));
}

static inline void copy32(uint8_t *to, const uint8_t *p)
{
    _mm256_storeu_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)p));
}

static inline void copy64(uint8_t *to, const uint8_t *p)
{
    _mm512_storeu_si512(to, LOAD(p));
}

/* Windows of 16, 32 or 64 bytes, one from each of some rows, one behind the other. */
static inline void windows16(const uint8_t *p, size_t row, uint8_t *to, int rows)
{
    int y = 0;
    for (; y + 4 <= rows; y += 4, p += 4 * row, to += 64) {
        V v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + row)), 1);
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 2 * row)), 2);
        v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(p + 3 * row)), 3);
        _mm512_storeu_si512(to, v);
    }
    for (; y < rows; y++, p += row, to += 16)
        copy16(to, p);
}

static inline void windows32(const uint8_t *p, size_t row, uint8_t *to, int rows)
{
    for (int y = 0; y < rows; y++, p += row, to += 32)
        copy32(to, p);
}

static inline void windows64(const uint8_t *p, size_t row, uint8_t *to, int rows)
{
    for (int y = 0; y < rows; y++, p += row, to += 64)
        copy64(to, p);
}

/* 16 pixels of three planes to 48 bytes. */
static inline void interleave3(const uint8_t *p, size_t plane, int flip, uint8_t *to)
{
    const V r = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    const V g = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p + plane)));
    const V b = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p + 2 * plane)));
    const V rg = _mm512_or_si512(r, _mm512_slli_epi32(g, 8));
    const V rgb = _mm512_or_si512(rg, _mm512_slli_epi32(b, 16));
    const __m128i three = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const V close = _mm512_shuffle_epi8(_mm512_xor_si512(rgb, _mm512_set1_epi32(flip)),
                                        _mm512_broadcast_i32x4(three));
    const V order = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 3, 7, 11, 15);
    _mm512_mask_storeu_epi32(to, 0xfff, _mm512_permutexvar_epi32(order, close));
}
"""


class Amx(Avx512Vnni):
    """Tiles where they pay, and the vectors of AVX-512 for all else."""

    layout = Layout(lanes=LANES)
    prelude = Avx512Vnni.prelude + PRELUDE

    def __init__(self, tables: Tables) -> None:
        super().__init__(tables)
        self.amx = False  # until a layer uses them

    def thread_start(self) -> str:
        """Configure the tiles."""
        return "_tile_loadconfig(&tile_configuration);" if self.amx else ""

    def thread_end(self) -> str:
        """Hand them back: a thread that holds none is switched to and from faster."""
        return "_tile_release();" if self.amx else ""

    def load(self, place: Place) -> str | None:
        """Three planes of pixels to three bytes per pixel, 16 at a time."""
        # A place of one row may be a tensor of another rank, which has no planes.
        if place.channels != 3 or place.width < 16 or place.height == 1:
            return super().load(place)
        x0 = (
            "x0"
            if place.width % 16 == 0
            else f"(x0 < {place.width - 16} ? x0 : {place.width - 16})"
        )
        flip = "0x808080" if place.signed else "0"
        body = (
            f"const int at = {x0};\n"
            f"interleave3(input + y * {place.width} + at, {place.height * place.width}, {flip},\n"
            f"    x + y * {place.row} + at * 3);"
        )
        inner = f"for (int x0 = 0; x0 < {place.width}; x0 += 16) {{\n{indent(body)}\n}}"
        return loop("y", place.height, inner)

    def matmul(self, step: MatMul, name: str) -> str | None:
        """A convolution or linear layer."""
        tiling = _cheapest(step) if step.groups == 1 else None
        if tiling is None or not self.pays(step, tiling.cost):
            return super().matmul(step, name)
        self.amx = True
        tiles = _Tiles(self, step, name, tiling).body()
        if not step.rows:
            return tiles
        if step.weight.size > MOST_TWICE:
            return tiles
        # Tiles take as long for one sample as for sixteen.
        few = min(ROWS, max(2, math.ceil(tiling.cost / _vector_cost(step))))
        alone = super().matmul(step, f"{name}_few")
        return f"if (n < {few}) {{\n{indent(alone or '')}\n}} else {{\n{indent(tiles)}\n}}"

    def pays(self, step: MatMul, cost: float) -> bool:
        """Whether tiles that take `cost` cycles take fewer than vectors do."""
        return cost < _vector_cost(step) * (ROWS if step.rows else math.prod(step.out))


def _vector_cost(step: MatMul) -> float:
    """Cycles per output of all channels, or per sample of a block, on vectors."""
    out_channels, kh, kw, channels = map(int, step.weight.shape)
    vectors = -(-out_channels // LANES)
    # Two dot products per cycle at best, and 1.5 in practice; then requantization.
    return kh * -(-kw * channels // 4) * vectors / 1.5 + 3 * vectors


# -- how operands lie ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Grid:
    """A layer as a grid of outputs, each of which is a dot product over a few runs of bytes.

    rows, columns  of outputs, before pooling
    row, column    bytes from an output's operands to those of the next row's, the next column's
    pool     rows and columns of a pooling window
    taps     how many runs there are along two axes, and the bytes from one to the next
    weight   int8 [O, runs, bytes of a run]
    first    the first output's operands, as an offset in the arena: alignment follows from it
    room     bytes from there that may be read
    window   0, or bytes of a window: the grid is turned, its rows are columns of the image
    patch    0, or bytes of the copied operands of an output
    """

    rows: int
    columns: int
    row: int
    column: int
    pool: Pair
    taps: tuple[Pair, Pair]
    weight: Array = field(repr=False)
    first: int
    room: int
    window: int = 0
    patch: int = 0

    @property
    def copied(self) -> bool:
        """Whether operands are not read where the source has them."""
        return bool(self.window or self.patch)

    @property
    def farthest(self) -> int:
        """Bytes from an output's first run to its last."""
        return sum((count - 1) * step for count, step in self.taps)


def _direct(step: MatMul) -> _Grid:
    """The image as it lies in memory."""
    source = step.source
    out_channels, kh, kw, channels = step.weight.shape
    start = source.offset + step.first
    room = source.start + source.size - start
    if step.rows:
        weight = step.weight.reshape(out_channels, 1, -1)
        taps = ((1, 0), (1, 0))
        return _Grid(1, ROWS, 0, source.sample, (1, 1), taps, weight, start, room)
    if source.sample:  # the first sample of a block ends where the second one begins
        room = source.start + source.sample - start
    whole = source.pixel == channels and step.dilation[1] == 1
    runs = 1 if whole else kw
    weight = step.weight.reshape(out_channels, kh * runs, -1)
    pool_rows, pool_columns = step.pool
    return _Grid(
        step.out[0] // pool_rows * pool_rows,
        step.out[1] // pool_columns * pool_columns,
        step.stride[0] * source.row,
        step.stride[1] * source.pixel,
        step.pool,
        ((kh, step.dilation[0] * source.row), (runs, step.dilation[1] * source.pixel)),
        weight,
        start,
        room,
    )


def _turned(direct: _Grid, step: MatMul, columns: int, span: int) -> _Grid | None:
    """Windows of the columns of the image, in a buffer; of `columns` outputs of each of them.

    `span` outputs will share a row of a tile: the buffer's columns are as far apart as it takes.
    """
    out_channels, kh, kw, channels = step.weight.shape
    source = step.source
    if step.rows or kh == 1 or step.dilation != (1, 1) or source.pixel != channels:
        return None
    run = kw * channels
    if run > BYTES:
        return None
    window = next(size for size in (16, 32, 64) if run <= size)
    # The last window's last bytes lie behind the kernel's last tap.
    sy, sx = step.stride
    last = ((step.out[0] - 1) * sy + kh - 1) * source.row + (step.out[1] - 1) * sx * source.pixel
    if last + window > direct.room:
        return None
    pitch = (columns - 1) * sy + kh
    pitch = -(-pitch // math.lcm(span * sy, BYTES // window)) * math.lcm(span * sy, BYTES // window)
    weight = np.zeros((out_channels, kh, window), np.int8)
    weight[:, :, :run] = step.weight.reshape(out_channels, kh, run)
    return _Grid(
        direct.columns,
        direct.rows,
        pitch * window,
        sy * window,
        (step.pool[1], step.pool[0]),
        ((1, 0), (1, 0)),
        weight.reshape(out_channels, 1, kh * window),
        0,
        0,
        window,
    )


def _patches(direct: _Grid, step: MatMul, columns: int) -> _Grid | None:
    """All operands of each output, in a buffer; of `columns` outputs of each row."""
    _, runs, run = direct.weight.shape
    if step.rows or (runs == 1 and direct.column == run):
        return None
    last = (direct.rows - 1) * direct.row + (direct.columns - 1) * direct.column + direct.farthest
    if last + -(-run // _piece(run)) * _piece(run) > direct.room:
        return None
    weight = direct.weight.reshape(len(direct.weight), 1, runs * run)
    patch = -(-runs * run // 32) * 32
    if patch > BYTES:
        patch = -(-patch // BYTES) * BYTES
    return _Grid(
        direct.rows,
        direct.columns,
        columns * patch,
        patch,
        step.pool,
        ((1, 0), (1, 0)),
        weight,
        0,
        0,
        patch=patch,
    )


def _piece(run: int) -> int:
    """Bytes that are copied at once: the smallest vector that holds a run, or the largest."""
    return next(size for size in (16, 32, 64) if run <= size or size == BYTES)


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is computed at once: some rows and columns of the grid, in tiles.

    span   neighbouring outputs of a row that share a row of a tile
    pitch  positions (rows of tiles) from a row of the grid to the next
    flat   whether tiles run on from a row to the next
    """

    grid: _Grid
    span: int
    rows: int
    columns: int
    pitch: int
    flat: bool

    @property
    def width(self) -> int:
        """Positions of a row that are outputs."""
        return -(-self.columns // self.span)

    @property
    def stride(self) -> int:
        """Bytes from a position to the next."""
        return self.span * self.grid.column

    @property
    def positions(self) -> int:
        """Positions that have sums."""
        if self.flat:
            return max(ROWS, (self.rows - 1) * self.pitch + self.width)
        return self.rows * self.pitch

    def tiles(self) -> list[Pair]:
        """First position and byte offset of each; the last ones may overlap."""
        lengths = (
            [(self.rows - 1) * self.pitch + self.width] if self.flat else [self.width] * self.rows
        )
        found = []
        for row, length in enumerate(lengths):
            for start in range(0, length, ROWS):
                at = max(0, min(start, length - ROWS))
                found.append((row * self.pitch + at, row * self.grid.row + at * self.stride))
        return found

    @property
    def run(self) -> int:
        """Bytes of a run that serves all outputs of a position."""
        return int(self.grid.weight.shape[2]) + (self.span - 1) * self.grid.column

    @property
    def chunks(self) -> int:
        """Tiles that a run takes."""
        return -(-self.run // BYTES)

    @property
    def lanes(self) -> int:
        """Columns of a tile from an output of a span to the next: few channels share a tile."""
        out_channels = len(self.grid.weight)
        return next(size for size in (4, 8, 16) if out_channels <= size or size == LANES)

    def channels(self, vectors: int) -> int:
        """Tiles of columns that some vectors of output channels take."""
        return -(-self.span * self.lanes // LANES) if self.lanes < LANES else self.span * vectors

    @property
    def depth(self) -> int:
        """Tiles that all runs of a position take."""
        return int(self.grid.weight.shape[1]) * self.chunks

    @property
    def reads(self) -> int:
        """Bytes behind the first operand of the unit that are read."""
        last = max(at for _, at in self.tiles()) + (ROWS - 1) * self.stride
        return last + self.grid.farthest + self.chunks * BYTES

    def starts(self) -> tuple[list[int], list[int]]:
        """First rows and first columns of all units; the last ones may overlap."""
        grid = self.grid
        return (
            [min(y, grid.rows - self.rows) for y in range(0, grid.rows, self.rows)],
            [min(x, grid.columns - self.columns) for x in range(0, grid.columns, self.columns)],
        )

    @property
    def fits(self) -> bool:
        """Whether all that is read belongs to the source."""
        grid = self.grid
        if grid.copied:
            return self.rows * grid.row <= MOST_COPIED
        last = (grid.rows - self.rows) * grid.row + (grid.columns - self.columns) * grid.column
        return last + self.reads <= grid.room

    @property
    def load(self) -> float:
        """Cycles to load a tile of operands: more if its rows lie across cache lines."""
        grid = self.grid
        steps = [self.stride, grid.first, *(step for count, step in grid.taps if count > 1)]
        steps += [grid.row] * (self.rows > 1)
        across = 1 - math.gcd(BYTES, *steps) / BYTES
        if self.stride >= BYTES:
            return 8 + 12 * across
        return 8 + 24 * across if across <= 0.5 else 20 + 68 * (across - 0.5)


@dataclass(frozen=True, slots=True)
class _Tiling:
    """How a layer is computed.

    vectors   of output channels per pass
    block     tiles of outputs and tiles of channels whose accumulators are held at once
    resident  whether all weights of a pass stay in tiles
    cost      cycles, about
    """

    unit: _Unit
    vectors: int
    block: Pair
    resident: bool
    cost: float


@cache
def _block(outputs: int, channels: int, load: float, weights: float) -> tuple[float, Pair]:
    """The cheapest block, and the cycles of all blocks for 64 bytes of the operands."""

    def cost(block: Pair) -> float:
        return sum(
            max(16.0 * rows * columns, load * rows + weights * columns) + 1
            for rows in _blocks(outputs, block[0])
            for columns in _blocks(channels, block[1])
        )

    sizes = itertools.product(range(1, min(outputs, 6) + 1), range(1, min(channels, 6) + 1))
    return min((cost((m, n)), (m, n)) for m, n in sizes if m * n + min(m, n) + 1 <= TILES)


def _units(step: MatMul) -> Iterator[_Unit]:
    """All ways to cut a layer into units."""
    direct = _direct(step)
    if step.rows:
        if direct.column and ROWS * direct.column <= step.source.size:
            yield _Unit(direct, 1, 1, ROWS, ROWS, flat=False)
        return
    for span, kind in itertools.product((1, 2, 4), ("direct", "turned", "patches")):
        if kind == "patches" and span > 1:
            continue
        turn = -1 if kind == "turned" else 1
        rows, columns = (direct.rows, direct.columns)[::turn]
        pool = step.pool[::turn]
        whole = math.lcm(pool[1], span)
        widths = {columns} if columns <= 8 * ROWS * span else set()
        widths |= {-(-k * ROWS * span // whole) * whole for k in range(1, 7)}
        for width in sorted(w for w in widths if w <= columns and w % pool[1] == 0):
            grid: _Grid | None = direct
            if kind == "turned":
                grid = _turned(direct, step, width, span)
            elif kind == "patches":
                grid = _patches(direct, step, width)
            if grid is None:
                continue
            positions = -(-width // span)
            for height in range(pool[0], rows + 1, pool[0]):
                if height * -(-positions // ROWS) <= MOST_TILES:
                    pitch = max(positions, ROWS)
                    yield _Unit(grid, span, height, width, pitch, flat=False)
                pitch, rest = divmod(grid.row, span * grid.column)
                if rest or height == 1 or (width < columns and not grid.copied):
                    continue
                if (height - 1) * pitch + positions > MOST_TILES * ROWS:
                    break
                yield _Unit(grid, span, height, width, pitch, flat=True)


def _tilings(step: MatMul) -> Iterator[_Tiling]:
    """All ways to compute a layer, but those in which tiles would read what they must not."""
    all_vectors = -(-len(step.weight) // LANES)
    for unit in _units(step):
        if not unit.fits:
            continue
        tiles, depth = len(unit.tiles()), unit.depth
        units = math.prod(map(len, unit.starts()))
        copied = _copying(step, unit)
        for vectors in range(1, min(all_vectors, 6) + 1):
            channels = unit.channels(vectors)
            if 2 * unit.positions * channels * BYTES > MOST_SUMS:
                break
            passes = -(-all_vectors // vectors)
            near = units > 1 and depth * channels * TILE <= L1_WEIGHTS
            cost, block = _block(tiles, channels, unit.load, 8.0 if near else 20.0)
            resident = False
            room = TILES - 1 - depth * channels
            if room >= channels and units > 1:
                m = min(tiles, room // channels)
                alone = sum(max(16.0 * k * channels, unit.load * k) + 1 for k in _blocks(tiles, m))
                if alone <= cost:
                    cost, block, resident = alone, (m, channels), True
            blocks = -(-tiles // block[0]) * -(-channels // block[1])
            after = _after(step, unit, vectors)
            hidden = 0.7 * min(after, cost * depth) if units * passes > 1 else 0.0
            # Accumulators are loaded with the bias and stored beside the multiplications, mostly.
            each = cost * depth + 12 * tiles * channels + 10 * blocks + 15 + copied + after - hidden
            yield _Tiling(unit, vectors, block, resident, each * units * passes)


def _copying(step: MatMul, unit: _Unit) -> float:
    """Cycles to fill the buffer of a unit, about."""
    if unit.grid.window:
        return unit.rows * unit.grid.row / BYTES * {16: 2.5, 32: 1.5, 64: 1.0}[unit.grid.window]
    if unit.grid.patch:
        _, runs, run = map(int, _direct(step).weight.shape)
        return unit.rows * unit.columns * runs * (-(-run // BYTES) * 1.3 + 0.5)
    return 0.0


def _after(step: MatMul, unit: _Unit, vectors: int) -> float:
    """Cycles from the accumulators of a unit to stored codes, about."""
    rows, columns = (unit.rows, unit.columns)[:: -1 if unit.grid.window else 1]
    # Four vectors become one; where a row of outputs ends, the last one is not full.
    pixels = 4 // math.gcd(4, vectors)
    packs = -(-columns // step.pool[1] // pixels) * -(-pixels * vectors // 4)
    apart = step.rows or step.target.pixel != vectors * LANES
    each = 10 + 3.2 * (math.prod(step.pool) - 1) + 8 * (step.addend is not None) + 3 * apart
    return rows // step.pool[0] * packs * each


def _cheapest(step: MatMul) -> _Tiling | None:
    """The best way to compute a layer, if there is any."""
    return min(_tilings(step), key=lambda tiling: tiling.cost, default=None)


# -- text ------------------------------------------------------------------------------------------


class _Tiles(_ChannelLanes):
    """A layer's statements. Its results leave as those of `_ChannelLanes` do."""

    def __init__(self, emitter: Amx, step: MatMul, name: str, tiling: _Tiling) -> None:
        self.emitter = emitter
        self.step = step
        self.name = name
        self.table = fused_table(emitter.tables, step, name)
        self.group_out = len(step.weight)
        self.all_vectors = -(-self.group_out // LANES)
        self.tiling = tiling
        self.unit = tiling.unit
        self.grid = tiling.unit.grid

    # -- tables ------------------------------------------------------------------------------------

    def _weights(self, vectors: Sequence[int]) -> Array:
        """int8 `[run][chunk][tile of columns][K / 4][16][4]` of a pass."""
        grid, unit = self.grid, self.unit
        _, runs, run = grid.weight.shape
        values = grid.weight[vectors[0] * LANES : (vectors[-1] + 1) * LANES]
        columns = unit.channels(len(vectors)) * LANES
        padded = np.zeros((columns, runs, unit.chunks * BYTES), np.int8)
        for j in range(unit.span):
            first = self._column(j, len(vectors))
            shifted = slice(j * grid.column, j * grid.column + run)
            padded[first : first + len(values), :, shifted] = values
        # Tile, lane, run, chunk, four bytes, byte of them.
        split = padded.reshape(columns // LANES, LANES, runs, unit.chunks, ROWS, 4)
        return np.transpose(split, (2, 3, 0, 4, 1, 5)).reshape(-1)

    def _column(self, output: int, vectors: int) -> int:
        """The first column of an output of a span."""
        return output * (self.unit.lanes if self.unit.lanes < LANES else vectors * LANES)

    def _biases(self) -> Array:
        """int32 [vectors * 16]; of few channels, as often as tiles of columns hold them."""
        if self.unit.lanes == LANES:
            return self._per_channel(self.step.bias)
        once = np.zeros(self.unit.lanes, np.int32)
        once[: self.group_out] = self.step.bias
        return np.tile(once, LANES // self.unit.lanes)

    # -- text --------------------------------------------------------------------------------------

    def body(self) -> str:
        """The function's statements."""
        step, tables, name, unit = self.step, self.emitter.tables, self.name, self.unit
        # A load of few channels in the middle of a row runs on into the next one.
        size = (unit.positions * unit.channels(self.tiling.vectors) + 1) * LANES
        self.bias = tables.add(f"{name}_bias", self._biases())
        multiplier = self._per_channel(step.requantization.multiplier)
        self.multiplier = tables.add(f"{name}_multiplier", multiplier)
        lines = [f"int32_t sums[2][{size}] __attribute__((aligned(64)));"]
        if self.grid.copied:
            # The last piece of the last output may end up to a vector behind its place.
            room = align(max(unit.reads, unit.rows * self.grid.row)) + BYTES
            lines.append(f"uint8_t copied[{room}] __attribute__((aligned(64)));")
        full, rest = divmod(self.all_vectors, self.tiling.vectors)
        passes = [
            range(i * self.tiling.vectors, (i + 1) * self.tiling.vectors) for i in range(full)
        ]
        if rest:
            passes.append(range(full * self.tiling.vectors, self.all_vectors))
        packed = [self._weights(vectors) for vectors in passes]
        self.weights = tables.add(f"{name}_weight", np.concatenate(packed))
        # Passes of one size are one loop; the last one may store less.
        ragged = bool(self.group_out % LANES)

        def kind(i: int) -> tuple[int, bool]:
            return len(passes[i]), ragged and i == len(passes) - 1

        at = 0
        for (vectors, short), members in itertools.groupby(range(len(passes)), kind):
            indices = list(members)
            first = passes[indices[0]][0]
            valid = self.group_out - first * LANES if short else 0
            lines.append(f"{{\n{indent(self._passes(len(indices), first, at, vectors, valid))}\n}}")
            at += sum(len(packed[i]) for i in indices)
        return "\n".join(lines)

    def _passes(self, count: int, first: int, at: int, vectors: int, valid: int) -> str:
        """Some passes of the same number of vectors; the multiplications run one unit ahead."""
        unit = self.unit
        rows, columns = unit.starts()
        units = len(rows) * len(columns)
        items = units if units > 1 else count
        channels = unit.channels(vectors)
        blocks = self._all_blocks(channels)
        where = f"const int v0 = {first}" + (f" + c * {vectors}" if count > 1 else "") + ";"
        weights = f"{self.weights} + {at}"
        if count > 1:
            weights += f" + (size_t)c * {unit.depth * channels * TILE}"
        # Of every item there is the index `i` of what is multiplied, and of what is finished.
        several = items > 1
        index = self._index("i", units, count)
        head = [where, self._base()]
        head.append(f"const int32_t *const bias = {self.bias} + v0 * {LANES};")
        if not self.tiling.resident:
            head.append(f"const int8_t *const weights = {weights};")
        # Later blocks find their operands in the buffer, wherever these came from.
        again = [] if self.grid.copied and units > 1 else [index]
        before = self._index("i - 1" if several else "0", units, count)
        multiplied, finished = [], []
        for k, block in enumerate(blocks):
            first_lines = [*again, *head] if k else [index, *head, self._copy_operands()]
            multiplied.append(_lines(*first_lines, self._multiply(*block, vectors)))
            finish = self._finish_unit(vectors, valid, k, len(blocks))
            finished.append(finish and _lines(before, where, finish))
        stored = [self._store(*block) for block in blocks]
        if several:
            parts = ["int32_t *const to_sums = sums[i & 1];"]
            parts.append("const int32_t *const from_sums = sums[~i & 1];")
            parts.append(f"if (i < {items}) {{\n{indent(multiplied[0])}\n}}")
            for k, finish in enumerate(finished):
                if finish:
                    parts.append(f"if (i > 0) {{\n{indent(finish)}\n}}")
                then = _lines(stored[k], *multiplied[k + 1 : k + 2])
                parts.append(f"if (i < {items}) {{\n{indent(then)}\n}}")
            text = f"for (int i = 0; i <= {items}; i++) {{\n{indent(_lines(*parts))}\n}}"
        else:
            text = "int32_t *const to_sums = sums[0];\nconst int32_t *const from_sums = sums[0];\n"
            both = itertools.chain(*zip(multiplied, stored, strict=True))
            text += "\n".join(f"{{\n{indent(part)}\n}}" for part in (*both, *finished) if part)
        if self.tiling.resident:
            held = f"const int8_t *const held = {weights};"
            for k in range(unit.depth * channels):
                load = f"_tile_loadd({TILES - 1 - k}, held + {k * TILE}, {BYTES});"
                text = _lines(load, text)
            text = _lines(held, text)
        return loop("c", count, text) if count > 1 and units > 1 else text

    def _index(self, i: str, units: int, count: int) -> str:
        """Declare which pass and which unit an item is, as far as there are several."""
        rows, columns = self.unit.starts()
        if units == 1:
            return f"const int c = {i};" if count > 1 else ""
        down = f"({i}) / {len(columns)}" if len(columns) > 1 else i
        right = f"({i}) % {len(columns)}" if len(rows) > 1 else i
        lines = []
        for name, index, starts, size in (
            ("row", down, rows, self.unit.rows),
            ("column", right, columns, self.unit.columns),
        ):
            if len(starts) == 1:
                continue
            value = f"({index}) * {size}"
            if starts[-1] != (len(starts) - 1) * size:
                value = f"{value} < {starts[-1]} ? {value} : {starts[-1]}"
            lines.append(f"const int first_{name} = {value};")
        return "\n".join(lines)

    def _at(self, name: str, factor: int, window: int = 1) -> str:
        """` + first_row / window * factor`, or nothing where there is one only."""
        starts = self.unit.starts()[name == "column"]
        index = f"first_{name} / {window}" if window > 1 else f"first_{name}"
        return f" + {index} * {factor}" if len(starts) > 1 else ""

    def _base(self) -> str:
        """Declare where the operands of a unit begin."""
        if self.grid.copied:
            return "const uint8_t *const base = copied;"
        at = self._at("row", self.grid.row) + self._at("column", self.grid.column)
        return f"const uint8_t *const base = x + {self.step.first}{at};"

    def _copy_operands(self) -> str:
        """Fill the buffer, where the grid has one, with the operands of a unit."""
        if self.grid.window:
            return self._copy_windows()
        return self._copy_patches() if self.grid.patch else ""

    def _copy_windows(self) -> str:
        step, grid, unit, source = self.step, self.grid, self.unit, self.step.source
        sy, sx = step.stride
        at = self._at("row", sx * source.pixel) + self._at("column", sy * source.row)
        rows = (unit.columns - 1) * sy + step.weight.shape[1]
        copy = (
            f"windows{grid.window}(image + j * {sx * source.pixel}, {source.row}, "
            f"copied + j * {grid.row}, {rows});"
        )
        return (
            f"const uint8_t *const image = x + {step.first}{at};\n"
            f"{loop('j', unit.rows, copy)}\nSTORED;"
        )

    def _copy_patches(self) -> str:
        """Pieces may end behind their run; what is copied next overwrites that."""
        step, grid, unit = self.step, self.grid, self.unit
        direct = _direct(step)
        (kh, down), (kw, right) = direct.taps
        run = direct.weight.shape[2]
        piece = _piece(run)
        at = self._at("row", direct.row) + self._at("column", direct.column)
        copies = "\n".join(
            f"copy{piece}(to_patch + {k}, from + {k});" for k in range(0, run, piece)
        )
        text = (
            f"const uint8_t *const from = image + r * {direct.row} + k * {direct.column} + "
            f"ky * {down} + kx * {right};\n"
            f"uint8_t *const to_patch = copied + r * {grid.row} + k * {grid.column} + "
            f"(ky * {kw} + kx) * {run};\n{copies}"
        )
        for index, times in (("kx", kw), ("ky", kh), ("k", unit.columns), ("r", unit.rows)):
            text = loop(index, times, text)
        return f"const uint8_t *const image = x + {step.first}{at};\n{text}\nSTORED;"

    def _all_blocks(self, channels: int) -> list[tuple[list[int], list[int]]]:
        """Indices of tiles of outputs, and of channels, of each block."""
        m, n = self.tiling.block
        outputs = _ranges(len(self.unit.tiles()), m)
        return [(rows, columns) for columns in _ranges(channels, n) for rows in outputs]

    def _multiply(self, outputs: list[int], columns: list[int], vectors: int) -> str:
        """The accumulators of a block, in the tiles 0, 1, ...: outputs by channels."""
        unit, grid = self.unit, self.grid
        channels = unit.channels(vectors)
        lines = []
        for i, n in itertools.product(range(len(outputs)), columns):
            t = i * len(columns) + columns.index(n)
            bias = "bias" if unit.lanes < LANES else f"bias + {n % vectors * LANES}"
            lines.append(f"_tile_loadd({t}, {bias}, 0);")
        offsets = [unit.tiles()[m][1] for m in outputs]
        if self.tiling.resident:
            for k, at in enumerate(self._chunk_offsets()):
                held = {n: TILES - 1 - (k * channels + n) for n in columns}
                lines += self._products(offsets, held, f"base + {at}", k)
            return "\n".join(lines)
        (kh, down), (kw, right) = grid.taps
        move = channels * TILE
        unrolled = unit.chunks if unit.chunks <= 4 else 1
        inner = "\n".join(
            line
            for c in range(unrolled)
            for line in self._streamed(offsets, columns, c * BYTES, c * move)
        )
        inner += f"\nw += {unrolled * move};"
        if unrolled < unit.chunks:
            over = f"for (int k = 0; k < {unit.chunks}; k++, q += {BYTES})"
            inner = f"{over} {{\n{indent(inner)}\n}}"
        shift = "".join(
            f" + {v} * {s}" for v, s, c in (("ky", down, kh), ("kx", right, kw)) if c > 1
        )
        text = f"const uint8_t *q = base{shift};\n{inner}"
        for variable, count in (("kx", kw), ("ky", kh)):
            if count > 1:
                text = loop(variable, count, text)
        lines.append(f"{{\n    const int8_t *w = weights;\n{indent(text)}\n}}")
        return "\n".join(lines)

    def _chunk_offsets(self) -> Iterator[int]:
        """Bytes from an output's first operand to each 64 of them."""
        (kh, down), (kw, right) = self.grid.taps
        for i, j, c in itertools.product(range(kh), range(kw), range(self.unit.chunks)):
            yield i * down + j * right + c * BYTES

    def _products(
        self, offsets: list[int], held: dict[int, int], base: str, turn: int
    ) -> Iterator[str]:
        """Operands stream through the free tiles; weights are held."""
        free = range(len(offsets) * len(held), TILES - self.unit.depth * self.tiling.block[1])
        for i, at in enumerate(offsets):
            a = free[(turn * len(offsets) + i) % len(free)]
            yield f"_tile_loadd({a}, {base} + {at}, {self.unit.stride});"
            for j, t in enumerate(held.values()):
                yield f"_tile_dpbusd({i * len(held) + j}, {a}, {t});"

    def _streamed(
        self, offsets: list[int], columns: list[int], chunk: int, move: int
    ) -> Iterator[str]:
        """The fewer tiles, of operands or weights, are held, the others stream past them."""
        stride = self.unit.stride
        operands = [f"q + {at + chunk}, {stride}" for at in offsets]
        weights = [f"w + {move + n * TILE}, {BYTES}" for n in columns]
        first = len(offsets) * len(columns)
        few, many = (operands, weights) if len(offsets) <= len(columns) else (weights, operands)
        free = range(first + len(few), TILES)
        for j, load in enumerate(few):
            yield f"_tile_loadd({first + j}, {load});"
        for k, load in enumerate(many):
            t = free[k % len(free)]
            yield f"_tile_loadd({t}, {load});"
            for j in range(len(few)):
                if few is operands:
                    yield f"_tile_dpbusd({j * len(columns) + k}, {first + j}, {t});"
                else:
                    yield f"_tile_dpbusd({k * len(columns) + j}, {t}, {first + j});"

    def _store(self, outputs: list[int], columns: list[int]) -> str:
        """Accumulators to the buffer: `[tile of columns][position][16]`."""
        unit = self.unit
        lines = []
        for i, m in enumerate(outputs):
            for j, n in enumerate(columns):
                at = (n * unit.positions + unit.tiles()[m][0]) * LANES
                lines.append(f"_tile_stored({i * len(columns) + j}, to_sums + {at}, {BYTES});")
        return "\n".join(lines)

    # -- from accumulators to the target -----------------------------------------------------------

    def _finish_unit(self, vectors: int, valid: int, part: int, parts: int) -> str:
        """Requantize and store a part of a unit's outputs: some of their rows, or none."""
        step, unit = self.step, self.unit
        target, (pool_rows, pool_columns) = step.target, step.pool
        turned = bool(self.grid.window)
        height, width = (unit.rows, unit.columns)[:: -1 if turned else 1]
        down, right = ("row", "column")[:: -1 if turned else 1]
        lines = [f"const float *const multiplier = {self.multiplier} + v0 * {LANES};"]

        def start(place: Place) -> str:
            if step.rows:
                return ""
            rows = self._at(down, place.row, pool_rows)
            return rows + self._at(right, place.pixel, pool_columns)

        lines.append(f"uint8_t *const out_unit = to + v0 * {LANES}{start(target)};")
        if step.addend is not None:
            start_with = f"addend + v0 * {LANES}{start(step.addend)}"
            lines.append(f"const uint8_t *const with_unit = {start_with};")
        # Rows and columns are taken in steps within which it is known which output of its span
        # each is.
        tall = math.lcm(pool_rows, unit.span) if turned else pool_rows
        wide = pool_columns if turned else math.lcm(pool_columns, unit.span)
        pixels = 4 // math.gcd(4, vectors) * pool_columns
        count = -(-pixels // wide) * wide
        all_rows = _blocks(height, tall)
        first, last = (len(all_rows) * k // parts for k in (part, part + 1))
        if first == last:
            return ""
        done = first * tall
        for rows, repeats in _grouped(all_rows[first:last]):
            y = f"{done} + b * {rows}" if done else f"b * {rows}"
            each = (
                self._finish_row(k, width, count, vectors, valid) for k in range(rows // pool_rows)
            )
            text = _lines(f"const int y0 = {y};", *(f"{{\n{indent(row)}\n}}" for row in each))
            lines.append(loop("b", repeats, text))
            done += rows * repeats
        return "\n".join(lines)

    def _finish_row(self, k: int, width: int, count: int, vectors: int, valid: int) -> str:
        """A row of pooled outputs, the `k`-th from the row `y0` of the unit."""
        step, unit = self.step, self.unit
        target, pool_rows = step.target, step.pool[0]
        turned = bool(self.grid.window)
        lines = []
        if not step.rows:
            row = f"(y0 / {pool_rows} + {k})"
            lines.append(f"uint8_t *const out = out_unit + {row} * {target.row};")
            if step.addend is not None:
                lines.append(f"const uint8_t *const with = with_unit + {row} * {step.addend.row};")
        done = 0
        for size, repeats in _grouped(_blocks(width, count)):
            x = f"{done} + t * {size}" if done else f"t * {size}"
            text = [f"const int x0 = {x};"]
            if step.rows:
                text.append("if (x0 >= (int)n)\n    break;")
                text.append(f"uint8_t *const out = out_unit + x0 * {target.sample};")
            if turned:
                moving = f"x0 * {unit.pitch} + y0 / {unit.span}"
            else:
                moving = f"y0 * {unit.pitch} + x0 / {unit.span}"
            text.append(f"const int32_t *const q = from_sums + ({moving}) * {LANES};")
            loads = []
            for r, i, v in itertools.product(range(pool_rows), range(size), range(vectors)):
                y = k * pool_rows + r
                along, across = (y, i) if turned else (i, y)
                position = across * unit.pitch + along // unit.span
                plane, lane = divmod(self._column(along % unit.span, vectors) + v * LANES, LANES)
                at = (plane * unit.positions + position) * LANES + lane
                loads.append(f"a{r * size + i}_{v} = LOAD(q + {at})")
            text.append(f"const V {', '.join(loads)};")
            text.append(self._finish(vectors, size, valid))
            body = "\n".join(text)
            if step.rows and repeats == 1:  # `break` needs a loop
                lines.append(f"for (int t = 0; t < 1; t++) {{\n{indent(body)}\n}}")
            else:
                lines.append(loop("t", repeats, body))
            done += size * repeats
        return "\n".join(lines)


def _ranges(count: int, size: int) -> list[list[int]]:
    """The numbers below `count`, `size` at a time."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def _lines(*parts: str) -> str:
    """The parts that are not empty, each on lines of its own."""
    return "\n".join(filter(None, parts))
