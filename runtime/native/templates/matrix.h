/* Rows times the transpose of a matrix of 8- or 4-bit weights, by integer dot products: the rows are bytes too.
 *
 * The sum over a block is a whole number. The product adds such sums, each times both its scales, block after block,
 * however many rows there are, so that no row depends on its neighbours. */
#ifndef KVQ_MATRIX_H
#define KVQ_MATRIX_H

#include "vector.h"

/* Sums of a tile stay in registers: TILE_ROWS rows, MATRIX_COLUMNS columns in the lanes. */
#if LANES == 16
#define MATRIX_COLUMNS 32
#define TILE_ROWS 12
#else
#define MATRIX_COLUMNS 16
#if defined(__aarch64__) || defined(DOT_KERNEL)
#define TILE_ROWS 6
#else
#define TILE_ROWS 4
#endif
#endif
#define MATRIX_VECTORS (MATRIX_COLUMNS / LANES)
#define MOST_SPAN (MOST_BLOCK / 4 > LANES ? MOST_BLOCK / 4 : LANES) /* words of a column that are expanded together */
#define MOST_SPAN_GROUPS (2 * MOST_SPAN)                            /* of 4 bits a word becomes two */

#ifdef DOT_KERNEL
enum { weight_offset = dot_offset_INT8 };
#else
enum { weight_offset = 0 };
#ifndef dot_words
/* sum + the dot product of the four signed bytes of each lane */
INLINE vi dot_words_plain(vi sum, vu codes, vu query) {
    UNROLL
    for (int i = 0; i < 4; i++) sum += ((vi)(codes << (24 - 8 * i)) >> 24) * ((vi)(query << (24 - 8 * i)) >> 24);
    return sum;
}
#define dot_words dot_words_plain
#endif
#endif

/* One row of activations to bytes: scale = largest magnitude / 127, as MatMulNBits takes it at accuracy level 4. Where a
 * value is not finite the scale is not either, and so is what comes of it. */
static void quantize_row(const kvq_matrix *m, const float *x, size_t row, const kvq_byte_rows *to) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    const int block = m->block;
    for (int b = 0; b < m->blocks; b++) {
        float padded[MOST_BLOCK];
        int8_t codes[MOST_BLOCK], *out = to->codes + (row * m->blocks + b) * block;
        const float *in = x + (size_t)b * block;
        if ((b + 1) * block > m->k) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, in, sizeof(float) * (m->k - b * block));
            in = padded;
        }
        vi top = {0}; /* bits of magnitudes, in whose order not a number comes last */
        for (int i = 0; i < block; i += LANES) {
            const vi magnitude = (vi)load_f(in + i) & 0x7fffffff, larger = magnitude > top;
            top = (magnitude & larger) | (top & ~larger);
        }
        int32_t bits = 0;
        for (int i = 0; i < LANES; i++) bits = top[i] > bits ? top[i] : bits;
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        const float inverse = largest > 1e-36f ? 127 / largest : 0; /* below, it would be infinite */
        const float magic = 12582912.0f;                            /* 1.5 * 2^23: adding it rounds to a whole number */
        vi sum = {0};
        for (int i = 0; i < block; i += LANES) {
            const vf scaled = load_f(in + i) * inverse;
            const vi code = (vi)(scaled + magic) - (vi)splat(magic);
            const bytes narrow = __builtin_convertvector(code, bytes);
            sum += code;
            memcpy((m->bits == 8 ? out : codes) + i, &narrow, sizeof narrow);
        }
        if (m->bits == 4)
            for (int i = 0; i < block / 2; i++) out[i] = codes[2 * i], out[block / 2 + i] = codes[2 * i + 1];
        to->scales[b * to->rows + row] = largest / 127;
        to->sums[b * to->rows + row] = sum_whole(sum);
    }
}

/* A square of LANES rows of words transposed. */
INLINE void transpose_words(vu *x) {
    UNROLL
    for (int step = LANES / 2; step; step /= 2) {
        UNROLL
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            const vu a = x[i], b = x[i + step];
            x[i] = lanes_of_two(a, b, step, 0);
            x[i + step] = lanes_of_two(a, b, step, 1);
        }
    }
}

/* Words [0, count) of LANES rows that are `stride` bytes apart, transposed; those behind them are 0. */
INLINE void load_square(const uint8_t *from, size_t stride, int count, vu *x) {
    if (count >= LANES) {
        UNROLL
        for (int i = 0; i < LANES; i++) memcpy(x + i, from + i * stride, sizeof *x);
    } else {
        for (int i = 0; i < LANES; i++) x[i] = (vu){0}, memcpy(x + i, from + i * stride, sizeof(uint32_t) * count);
    }
    transpose_words(x);
}

/* What the columns of a group have at some blocks. */
typedef struct {
    const uint8_t *codes; /* of the first column */
    const float *scales;
    const uint8_t *zeros;
    size_t stride, scale_stride, zero_stride; /* from one column to the next, in bytes */
} matrix_group;

/* Weights of 4 bits as bytes: the low ones of each byte, then the high ones, less the zero points of their columns. */
INLINE vu bytes_of_low(vu word, vu less) {
    typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
    return (vu)((bytes)(word & 0x0f0f0f0fu) - (bytes)less);
}

/* The zero points of the columns from v * LANES on at block b. */
INLINE vu zeros_of(const kvq_matrix *m, const matrix_group *g, int v, int b) {
    vu zero = 8 - (vu){0};
    if (m->zeros)
        for (int i = 0; i < LANES; i++)
            zero[i] = g->zeros[(v * LANES + i) * g->zero_stride + b / 2] >> (b % 2 * 4) & 15;
    return zero;
}

/* Words [0, count) of the columns, which begin with block b, as signed bytes plus weight_offset:
 * panel [block][group of four places][MATRIX_COLUMNS]. */
INLINE void expand_words(const kvq_matrix *m, const matrix_group *g, int bits, int words, int b, int count,
                         uint32_t *panel) {
    for (int v = 0; v < MATRIX_VECTORS; v++) {
        const uint8_t *from = g->codes + v * LANES * g->stride + (size_t)b * words * 4;
        for (int w = 0; w < count; w += LANES) {
            vu x[LANES], less = {0};
            if (words >= LANES || count - w >= LANES) load_square(from + 4 * w, g->stride, LANES, x);
            else load_square(from + 4 * w, g->stride, count - w, x);
            UNROLL
            for (int i = 0; i < LANES; i++) {
                const int at = w + i;
                if (words < LANES && at >= count) break;
                if (bits == 8) {
                    const vu codes = weight_offset ? x[i] : x[i] ^ 0x80808080u;
                    memcpy(panel + (size_t)at * MATRIX_COLUMNS + v * LANES, &codes, sizeof codes);
                    continue;
                }
                if (i == 0 || at % words == 0) {
                    const vu zero = zeros_of(m, g, v, b + at / words) - (uint32_t)weight_offset;
                    less = (zero & 0xff) * 0x01010101u;
                }
                const vu low = bytes_of_low(x[i], less), high = bytes_of_low(x[i] >> 4, less);
                uint32_t *to = panel + ((size_t)at / words * 2 * words + at % words) * MATRIX_COLUMNS + v * LANES;
                memcpy(to, &low, sizeof low);
                memcpy(to + (size_t)words * MATRIX_COLUMNS, &high, sizeof high);
            }
        }
    }
}

/* Sums of `words` neighbouring lanes of LANES vectors: x[j * words] then has those of the lanes from j * words on, vector
 * number i's in lane i. A power of two. */
INLINE void sum_neighbours(int words, vi *x) {
    UNROLL
    for (int step = 1; step < LANES; step *= 2) {
        UNROLL
        for (int i = 0; i < LANES; i++) {
            if (i & step || i % (step < words ? step : words)) continue;
            const vu a = (vu)x[i], b = (vu)x[i + step];
            const vu first = lanes_of_two(a, b, step, 0), second = lanes_of_two(a, b, step, 1);
            x[i] = step < words ? (vi)(first + second) : (vi)first;
            if (step >= words) x[i + step] = (vi)second;
        }
    }
}

/* Words of a row of bytes that go with LANES words of weights: of 4 bits those of the low ones, then of the high ones. */
INLINE vu row_words(const int8_t *x, int bits, int words, int w, int high) {
    vu four;
    if (bits == 8) memcpy(&four, x + 4 * w, sizeof four);
    else if (words >= LANES) memcpy(&four, x + 4 * (w + high * words), sizeof four);
    else
        for (int j = 0; j < LANES / words; j++)
            memcpy((char *)&four + 4 * j * words, x + 4 * words * (2 * j + high), 4 * words);
    return four;
}

/* A single row, at whole registers of words from block b on: weights are taken as they lie, along the row, since
 * transposing them costs more than so few products. Adds to out [MATRIX_COLUMNS] as product_tile does. */
INLINE void product_row(const kvq_matrix *m, const matrix_group *g, int bits, int words, int b, const int8_t *x,
                        const float *scales, const int32_t *sums, size_t rows, const float *weight_scales, float *out) {
    const int blocks = words < LANES ? LANES / words : 1, lanes = words < LANES ? words : LANES;
    for (int v = 0; v < MATRIX_VECTORS; v++) {
        const uint8_t *from = g->codes + v * LANES * g->stride + (size_t)b * words * 4;
        vi dots[LANES];
        UNROLL
        for (int i = 0; i < LANES; i++) dots[i] = (vi){0};
        for (int w = 0; w < (words < LANES ? LANES : words); w += LANES) {
            const vu low = row_words(x, bits, words, w, 0), high = bits == 4 ? row_words(x, bits, words, w, 1) : low;
            UNROLL
            for (int i = 0; i < LANES; i++) {
                vu codes;
                memcpy(&codes, from + i * g->stride + 4 * w, sizeof codes);
                __builtin_prefetch(from + (i + MATRIX_COLUMNS) * g->stride + 4 * w, 0, 2); /* of the next group */
                if (bits == 4) {
                    dots[i] = dot_words(dots[i], codes & 0x0f0f0f0fu, low);
                    dots[i] = dot_words(dots[i], codes >> 4 & 0x0f0f0f0fu, high);
                } else dots[i] = dot_words(dots[i], weight_offset ? codes : codes ^ 0x80808080u, low);
            }
        }
        sum_neighbours(lanes, dots);
        UNROLL
        for (int j = 0; j < blocks; j++) {
            const int32_t sum = sums[(b + j) * rows];
            vi less = weight_offset * sum - (vi){0};
            if (bits == 4) less = (vi)zeros_of(m, g, v, b + j) * sum;
            float *to = out + v * LANES;
            const vf weight = load_f(weight_scales + j * MATRIX_COLUMNS + v * LANES);
            store_f(to, load_f(to) + to_float(dots[j * lanes] - less) * (weight * scales[(b + j) * rows]));
        }
    }
}

/* The forms of matrices, X(bits, words of a block). */
#define MATRIX_FORMS(X) X(8, 8) X(8, 16) X(8, 32) X(8, 64) X(4, 4) X(4, 8) X(4, 16) X(4, 32)
#define FORM_FUNCTIONS(bits, words)                                                                                   \
    NOINLINE void expand_##bits##_##words(const kvq_matrix *m, const matrix_group *g, int b, int blocks,              \
                                          uint32_t *panel) {                                                          \
        expand_words(m, g, bits, words, b, blocks * words, panel);                                                    \
    }                                                                                                                 \
    NOINLINE void row_##bits##_##words(const kvq_matrix *m, const matrix_group *g, int b, const int8_t *x,            \
                                       const float *scales, const int32_t *sums, size_t rows,                         \
                                       const float *weight_scales, float *out) {                                      \
        product_row(m, g, bits, words, b, x, scales, sums, rows, weight_scales, out);                                 \
    }
MATRIX_FORMS(FORM_FUNCTIONS)
#undef FORM_FUNCTIONS

static void expand_blocks(const kvq_matrix *m, const matrix_group *g, int b, int blocks, uint32_t *panel) {
    switch (m->bits << 8 | m->block * m->bits / 32) {
#define EXPAND(bits, words) case bits << 8 | words: expand_##bits##_##words(m, g, b, blocks, panel); return;
        MATRIX_FORMS(EXPAND)
#undef EXPAND
    }
}
static void row_blocks(const kvq_matrix *m, const matrix_group *g, int b, const kvq_byte_rows *of, size_t row,
                       const float *weight_scales, float *out) {
    const int8_t *x = of->codes + (row * m->blocks + b) * m->block;
    switch (m->bits << 8 | m->block * m->bits / 32) {
#define ROW(bits, words)                                                                                            \
    case bits << 8 | words:                                                                                         \
        row_##bits##_##words(m, g, b, x, of->scales + row, of->sums + row, of->rows, weight_scales, out); \
        return;
        MATRIX_FORMS(ROW)
#undef ROW
    }
}

/* A block of so many rows at once: sums [rows, MATRIX_COLUMNS] grow. */
INLINE void product_tile(int rows, const uint32_t *panel, int groups, const int8_t *x, size_t stride, const float *scales,
                         const int32_t *sums, const float *weight_scales, float *out) {
    vi dots[TILE_ROWS][MATRIX_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < MATRIX_VECTORS; v++) dots[r][v] = -weight_offset * sums[r] - (vi){0};
    }
    for (int g = 0; g < groups; g++) {
        vu codes[MATRIX_VECTORS];
        UNROLL
        for (int v = 0; v < MATRIX_VECTORS; v++) codes[v] = load_u(panel + (size_t)g * MATRIX_COLUMNS + v * LANES);
        UNROLL
        for (int r = 0; r < rows; r++) {
            uint32_t four;
            memcpy(&four, x + r * stride + 4 * g, sizeof four);
            UNROLL
            for (int v = 0; v < MATRIX_VECTORS; v++) dots[r][v] = dot_words(dots[r][v], codes[v], four - (vu){0});
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < MATRIX_VECTORS; v++) {
            float *at = out + r * MATRIX_COLUMNS + v * LANES;
            store_f(at, load_f(at) + to_float(dots[r][v]) * (load_f(weight_scales + v * LANES) * scales[r]));
        }
    }
}

static void product_rows(const kvq_matrix *m, const uint32_t *panel, const kvq_byte_rows *of, size_t b, size_t row,
                         size_t rows, const float *weight_scales, float *out) {
    const size_t stride = (size_t)m->blocks * m->block;
    const int8_t *x = of->codes + row * stride + b * m->block;
    const float *scales = of->scales + b * of->rows + row;
    const int32_t *sums = of->sums + b * of->rows + row;
    const int groups = m->block / 4;
    size_t r = 0;
#define TILES(n)                                                                                              \
    for (; r + n <= rows; r += n)                                                                             \
    product_tile(n, panel, groups, x + r * stride, stride, scales + r, sums + r, weight_scales, out + r * MATRIX_COLUMNS)
    TILES(TILE_ROWS);
    TILES(4);
    TILES(1);
#undef TILES
}

/* The scales of LANES blocks from block b on: to [LANES, MATRIX_COLUMNS]. */
INLINE void load_scales(const kvq_matrix *m, const matrix_group *g, int b, float *to) {
    for (int v = 0; v < MATRIX_VECTORS; v++) {
        vu x[LANES];
        const uint8_t *from = (const uint8_t *)(g->scales + b) + v * LANES * g->scale_stride;
        load_square(from, g->scale_stride, m->blocks - b, x);
        UNROLL
        for (int i = 0; i < LANES; i++) memcpy(to + i * MATRIX_COLUMNS + v * LANES, x + i, sizeof *x);
    }
}

static void multiply(const kvq_matrix *m, const kvq_byte_rows *of, size_t group, size_t first, size_t rows, float *out) {
    uint32_t panel[MOST_SPAN_GROUPS * MATRIX_COLUMNS] __attribute__((aligned(64)));
    float sums[PRODUCT_MOST_ROWS * MATRIX_COLUMNS] __attribute__((aligned(64)));
    float scales[LANES * MATRIX_COLUMNS] __attribute__((aligned(64)));
    /* The last group is whole too: it begins before its own columns, if they are too few. */
    const size_t own = group * MATRIX_COLUMNS, most = m->n - MATRIX_COLUMNS, column = own < most ? own : most;
    const int words = m->block * m->bits / 32, span = words < LANES ? LANES / words : 1;
    const size_t zero_stride = ((size_t)m->blocks + 1) / 2, stride = (size_t)m->blocks * words * 4;
    const matrix_group g = {
        .codes = m->codes + column * stride,
        .scales = m->scales + column * m->blocks,
        .zeros = m->zeros + (m->zeros ? column * zero_stride : 0),
        .stride = stride,
        .scale_stride = sizeof(float) * m->blocks,
        .zero_stride = zero_stride,
    };
    memset(sums, 0, sizeof(float) * rows * MATRIX_COLUMNS);
    for (int b = 0; b < m->blocks; b += span) {
        const int blocks = m->blocks - b < span ? m->blocks - b : span;
        if (b % LANES == 0) load_scales(m, &g, b, scales);
        const float *weight_scales = scales + b % LANES * MATRIX_COLUMNS;
        if (rows == 1 && blocks == span) {
            row_blocks(m, &g, b, of, first, weight_scales, sums);
            continue;
        }
        expand_blocks(m, &g, b, blocks, panel);
        for (int j = 0; j < blocks; j++)
            product_rows(m, panel + (size_t)j * m->block / 4 * MATRIX_COLUMNS, of, b + j, first, rows,
                         weight_scales + j * MATRIX_COLUMNS, sums);
    }
    for (size_t r = 0; r < rows; r++)
        memcpy(out + (first + r) * m->n + own, sums + r * MATRIX_COLUMNS + (own - column),
               sizeof(float) * (MATRIX_COLUMNS - (own - column)));
}

#endif
