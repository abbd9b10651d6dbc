/* AVX-512 with tiles for products: server processors since Sapphire Rapids (2023). All but products is as without. */
#ifndef KVQ_AMX_H
#define KVQ_AMX_H

#if KVQ_AMX
#define USES_TILES __attribute__((target("amx-tile,amx-int8")))
enum { TILE_SIDE = 16, TILE_BYTES = 64 }; /* rows, and bytes of a row: as large as tiles are */

/* Tiles of 16 rows, those of the left side, 4 and 5, of so many bytes, and those of the right, 6 and 7, of as many rows as
 * that needs, in words of four. Layout of LDTILECFG's operand, Intel SDM volume 2A. */
USES_TILES static void open_tiles_of(int bytes) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = TILE_BYTES, config.rows[i] = TILE_SIDE;
    if (bytes < TILE_BYTES)
        for (int i = 0; i < 2; i++) config.row_bytes[4 + i] = (uint16_t)bytes, config.rows[6 + i] = (uint8_t)(bytes / 4);
    __asm__ volatile("" : "+m"(config));
    _tile_loadconfig(&config);
}

USES_TILES static void open_tiles(void) { open_tiles_of(TILE_BYTES); }

/* TILE_SIDE rows of a part, from `row` on, whose dot products are there: out [TILE_SIDE, PART_COLUMNS] grows, as in
 * product_part. */
INLINE void add_tiles(form form, const int32_t dots[2][TILE_SIDE][LANES], const part_block *t, const row_blocks *x, size_t row,
                      float *out) {
    const float *scales = x->scales + row, *totals = form.offsets ? x->totals + row : NULL;
    const int32_t *sums = x->sums + row;
    vf weight[2], offset[2];
    for (int p = 0; p < 2; p++) {
        weight[p] = numbers_of(form, t->scales[p], 0);
        offset[p] = form.offsets ? numbers_of(form, t->offsets[p], 0) : splat(0);
    }
    for (int r = 0; r < TILE_SIDE; r++, out += PART_COLUMNS) {
        const vi less = sums[r] * (form.zeros ? weight_offset : 1) - (vi){0}; /* as expand_codes has them */
        UNROLL
        for (int p = 0; p < 2; p++) {
            const vi dot = (vi)load_u((const uint32_t *)dots[p][r]) - less;
            const vf sum = add_block(load_f(out + p * LANES), dot, weight[p], scales[r]);
            store_f(out + p * LANES, form.offsets ? sum + offset[p] * totals[r] : sum);
        }
    }
}

/* As product_rows. A row of a tile is what a block has of a row, or, of weights, a panel's words of a place: blocks of 64 are a
 * tile, larger ones several, and of 32 half of one; what is left over goes without. */
USES_TILES INLINE void product_tiles_of(form form, const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b,
                                        size_t row, size_t rows, float *out) {
    int32_t dots[4][TILE_SIDE][LANES] __attribute__((aligned(64)));
    const size_t stride = m->block;
    const row_blocks of_rows = rows_of(m, of, b, row);
    const int8_t *x = of_rows.codes;
    size_t r = 0;
    for (; r + TILE_SIDE <= rows; r += 2 * TILE_SIDE) {
        const int both = r + 2 * TILE_SIDE <= rows;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (size_t k = 0; k < stride; k += TILE_BYTES) {
            _tile_loadd(4, x + r * stride + k, stride);
            _tile_loadd(6, t->bytes[0] + k / 4 * KVQ_PANEL, TILE_BYTES);
            _tile_loadd(7, t->bytes[1] + k / 4 * KVQ_PANEL, TILE_BYTES);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (!both) continue;
            _tile_loadd(5, x + (r + TILE_SIDE) * stride + k, stride);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, dots[0], TILE_BYTES);
        _tile_stored(1, dots[1], TILE_BYTES);
        add_tiles(form, dots, t, &of_rows, r, out + r * PART_COLUMNS);
        if (!both) {
            r += TILE_SIDE;
            break;
        }
        _tile_stored(2, dots[2], TILE_BYTES);
        _tile_stored(3, dots[3], TILE_BYTES);
        const size_t next = r + TILE_SIDE;
        add_tiles(form, dots + 2, t, &of_rows, next, out + next * PART_COLUMNS);
    }
    if (r < rows) product_rows(m, t, of, b, row + r, rows - r, out + r * PART_COLUMNS);
}

USES_TILES static void product_tiles(const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b, size_t row,
                                     size_t rows, float *out) {
    FOR_FORM(m, product_tiles_of, m, t, of, b, row, rows, out);
}

INLINE void multiply_part_of(form form, const kvq_matrix *m, const kvq_byte_rows *of, size_t panel, size_t first, float *out) {
    multiply_panels(form, PART_PANELS, 1, m, of, panel, first, out);
}

/* As multiply: such processors read one row's panels faster side by side, where they are told what comes. */
static void multiply_asking(const kvq_matrix *m, const kvq_byte_rows *of, size_t panel, size_t first, size_t rows, float *out) {
    if (rows == 1) FOR_FORM(m, multiply_part_of, m, of, panel, first, out);
    else multiply_several(m, of, panel, first, rows, out);
}

USES_TILES static void multiply_tiles(const kvq_matrix *m, const kvq_byte_rows *of, size_t panel, size_t first, size_t rows,
                                      float *out) {
    if (rows < TILE_SIDE) {
        multiply_asking(m, of, panel, first, rows, out);
        return;
    }
    open_tiles_of(m->block);
    multiply_by(product_tiles, 1, m, of, panel, first, rows, out);
    _tile_release(); /* a thread that holds tiles is dear to switch */
}

#include "tile_rows.h"

KERNEL_WITH(kvq_kernel_amx, "amx", kvq_has_amx, 1, multiply_tiles, rows_by_tiles, rows_bytes);
#endif

#endif
