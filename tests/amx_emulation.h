/* AMX tiles in plain C, for CPUs that have none: include it first (`-include`) and the intrinsics
   of immintrin.h that the generated kernels use are these functions.

   Written after the pseudo-code of the instructions in the Intel 64 and IA-32 Architectures
   Software Developer's Manual, volume 2, for palette 1: eight tiles of at most 16 rows of 64 bytes.
   Where the manual raises #GP or #UD, the process aborts and says why. */
#ifndef INTACT_AMX_EMULATED
#define INTACT_AMX_EMULATED

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TILES 8
#define TILE_ROWS 16
#define TILE_BYTES 64

typedef struct {
    int configured;
    int rows[TILES];
    int colsb[TILES];
    uint8_t data[TILES][TILE_ROWS][TILE_BYTES];
} emulated_tiles;

static __thread emulated_tiles tiles;

static void emulated_fault(const char *instruction, const char *why)
{
    fprintf(stderr, "emulated AMX: %s: %s\n", instruction, why);
    abort();
}

static void emulated_use(const char *instruction, int tile)
{
    if (!tiles.configured)
        emulated_fault(instruction, "tiles are not configured");
    if (tile < 0 || tile >= TILES)
        emulated_fault(instruction, "there is no such tile");
    if (!tiles.rows[tile] || !tiles.colsb[tile])
        emulated_fault(instruction, "the tile has no rows or columns");
}

static __attribute__((noinline, unused)) void emulated_release(void)
{
    memset(&tiles, 0, sizeof tiles);
}

/* 64 bytes: palette, start row, 14 reserved; 16 x uint16 colsb; 16 x uint8 rows. */
static __attribute__((noinline, unused)) void emulated_loadconfig(const void *config)
{
    uint8_t c[64];
    memcpy(c, config, sizeof c);
    if (c[0] > 1)
        emulated_fault("ldtilecfg", "there is no such palette");
    if (c[0] == 0) {
        emulated_release();
        return;
    }
    if (c[1])
        emulated_fault("ldtilecfg", "a start row that this emulation does not know");
    for (int i = 2; i < 16; i++)
        if (c[i])
            emulated_fault("ldtilecfg", "a reserved byte is not 0");
    emulated_release();
    for (int t = 0; t < 16; t++) {
        const int colsb = c[16 + 2 * t] | c[17 + 2 * t] << 8;
        const int rows = c[48 + t];
        if (t >= TILES && (colsb || rows))
            emulated_fault("ldtilecfg", "the palette has eight tiles");
        if (rows > TILE_ROWS)
            emulated_fault("ldtilecfg", "more than 16 rows");
        if (colsb > TILE_BYTES)
            emulated_fault("ldtilecfg", "rows of more than 64 bytes");
        if (!rows != !colsb)
            emulated_fault("ldtilecfg", "rows without columns, or columns without rows");
        if (t < TILES) {
            tiles.rows[t] = rows;
            tiles.colsb[t] = colsb;
        }
    }
    tiles.configured = 1;
}

static __attribute__((noinline, unused)) void emulated_loadd(int t, const void *base, long stride)
{
    emulated_use("tileloadd", t);
    memset(tiles.data[t], 0, sizeof tiles.data[t]);
    for (int row = 0; row < tiles.rows[t]; row++)
        memcpy(tiles.data[t][row], (const uint8_t *)base + row * stride, (size_t)tiles.colsb[t]);
}

static __attribute__((noinline, unused)) void emulated_stored(int t, void *base, long stride)
{
    emulated_use("tilestored", t);
    for (int row = 0; row < tiles.rows[t]; row++)
        memcpy((uint8_t *)base + row * stride, tiles.data[t][row], (size_t)tiles.colsb[t]);
}

static __attribute__((noinline, unused)) void emulated_zero(int t)
{
    emulated_use("tilezero", t);
    memset(tiles.data[t], 0, sizeof tiles.data[t]);
}

static inline int32_t emulated_byte(uint8_t byte, int is_signed)
{
    return is_signed ? (int8_t)byte : byte;
}

/* c += a * b: rows of a are M x K bytes, of b K/4 x N groups of four bytes, of c M x N int32, which
   wrap. Rows of c behind the configured ones become 0, and so do the columns. */
static inline void emulated_dp(const char *name, int c, int a, int b, int signed_a, int signed_b)
{
    emulated_use(name, c);
    emulated_use(name, a);
    emulated_use(name, b);
    if (a == b || a == c || b == c)
        emulated_fault(name, "the tiles are not three");
    if (tiles.colsb[c] % 4 || tiles.colsb[a] % 4 || tiles.colsb[b] % 4)
        emulated_fault(name, "columns that are not whole groups of four bytes");
    if (tiles.rows[c] != tiles.rows[a])
        emulated_fault(name, "M differs: rows of the result and of the first operand");
    if (tiles.colsb[a] / 4 != tiles.rows[b])
        emulated_fault(name, "K differs: columns of the first and rows of the second operand");
    if (tiles.colsb[c] != tiles.colsb[b])
        emulated_fault(name, "N differs: columns of the result and of the second operand");
    for (int m = 0; m < tiles.rows[c]; m++) {
        uint32_t sums[TILE_BYTES / 4] = {0};
        memcpy(sums, tiles.data[c][m], (size_t)tiles.colsb[c]);
        for (int k = 0; k < tiles.colsb[a]; k++) {
            const int32_t x = emulated_byte(tiles.data[a][m][k], signed_a);
            for (int n = 0; n < tiles.colsb[c] / 4; n++)
                sums[n] += (uint32_t)(x * emulated_byte(tiles.data[b][k / 4][4 * n + k % 4], signed_b));
        }
        memset(tiles.data[c][m], 0, TILE_BYTES);
        memcpy(tiles.data[c][m], sums, (size_t)tiles.colsb[c]);
    }
    for (int m = tiles.rows[c]; m < TILE_ROWS; m++)
        memset(tiles.data[c][m], 0, TILE_BYTES);
}

static __attribute__((noinline, unused)) void emulated_dpbusd(int c, int a, int b)
{
    emulated_dp("tdpbusd", c, a, b, 0, 1);
}

static __attribute__((noinline, unused)) void emulated_dpbssd(int c, int a, int b)
{
    emulated_dp("tdpbssd", c, a, b, 1, 1);
}

static __attribute__((noinline, unused)) void emulated_dpbsud(int c, int a, int b)
{
    emulated_dp("tdpbsud", c, a, b, 1, 0);
}

static __attribute__((noinline, unused)) void emulated_dpbuud(int c, int a, int b)
{
    emulated_dp("tdpbuud", c, a, b, 0, 0);
}

#undef TILES
#undef TILE_ROWS
#undef TILE_BYTES
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#define _tile_loadconfig(config) emulated_loadconfig(config)
#define _tile_release() emulated_release()
#define _tile_loadd(tile, base, stride) emulated_loadd(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) emulated_loadd(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_stored(tile, base, stride)
#define _tile_zero(tile) emulated_zero(tile)
#define _tile_dpbssd(c, a, b) emulated_dpbssd(c, a, b)
#define _tile_dpbsud(c, a, b) emulated_dpbsud(c, a, b)
#define _tile_dpbusd(c, a, b) emulated_dpbusd(c, a, b)
#define _tile_dpbuud(c, a, b) emulated_dpbuud(c, a, b)

#endif
