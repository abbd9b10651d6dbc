/* Rows times the transpose of a packed matrix of weights of 4 to 8 bits, by integer dot products: the rows are bytes too.
 *
 * The sum over a block is a whole number. The product adds such sums, each times both its scales, block after block,
 * however many rows there are, so that no row depends on its neighbours. What a block's zero point or the kernel's offset
 * makes of every code is taken off the sum: that many times the sum of the row's own codes. */
#ifndef KVQ_MATRIX_H
#define KVQ_MATRIX_H

#include "codes.h"

/* Whether they are faster than those of onnxruntime, which has better forms for processors that lack such instructions. */
#if defined(DOT_KERNEL) || LANES == 8
enum { own_products = 1 };
#else
enum { own_products = 0 };
#endif

#if !defined(DOT_KERNEL) && !defined(dot_words)
/* sum + the dot product of the four signed bytes of each lane */
INLINE vi dot_words_plain(vi sum, vu codes, vu query) {
    UNROLL
    for (int i = 0; i < 4; i++) sum += ((vi)(codes << (24 - 8 * i)) >> 24) * ((vi)(query << (24 - 8 * i)) >> 24);
    return sum;
}
#define dot_words dot_words_plain
#endif
#ifndef dot_small /* the same where the bytes of codes are smaller than 64 and not negative */
#define dot_small dot_words
#endif

enum { EXPANDED_ROWS = 2 * PART_ROWS }; /* fewer read codes as they are */
enum { MIDDLE = 8 };                    /* the zero point of 4 bits where a block has none of its own */

/* A register whose content is rounded: the compiler cannot make one operation of what comes before and after. */
#if defined(__x86_64__)
#define ROUNDED(x) __asm__("" : "+x"(x))
#elif defined(__aarch64__)
#define ROUNDED(x) __asm__("" : "+w"(x))
#else
#define ROUNDED(x) (void)(x)
#endif

/* One row of activations to bytes: scale = largest magnitude / 127, as MatMulNBits takes it at accuracy level 4. Where a
 * value is not finite the scale is not either, and so is what comes of it. */
static void quantize_row(const kvq_matrix *m, const float *x, size_t row, const kvq_byte_rows *to) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    const int block = m->block;
    for (int b = 0; b < m->blocks; b++) {
        float padded[KVQ_MOST_BLOCK];
        int8_t *out = to->codes + (b * to->rows + row) * block;
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
        UNROLL
        for (int step = 1; step < LANES; step *= 2) {
            const vi other = (vi)swap_lanes((vf)top, step), larger = other > top;
            top = (other & larger) | (top & ~larger);
        }
        const float largest = ((vf)top)[0];
        const float inverse = largest > 1e-36f ? 127 / largest : 0; /* below, it would be infinite */
        const float magic = 12582912.0f;                            /* 1.5 * 2^23: adding it rounds to a whole number */
        vi sum = {0};
        vf total = splat(0);
        for (int i = 0; i < block; i += LANES) {
            if (to->totals) total += load_f(in + i);
            vf scaled = load_f(in + i) * inverse;
            ROUNDED(scaled); /* before the sum: together they would round once, and to another code */
            const vi code = (vi)(scaled + magic) - (vi)splat(magic);
            const bytes narrow = __builtin_convertvector(code, bytes);
            sum += code;
            memcpy(out + i, &narrow, sizeof narrow);
        }
        to->scales[b * to->rows + row] = largest / 127;
        UNROLL
        for (int step = 1; step < LANES; step *= 2) sum += (vi)swap_lanes((vf)sum, step), total += swap_lanes(total, step);
        to->sums[b * to->rows + row] = m->zeros ? sum[0] : sum[0] * (m->bits == 4 ? MIDDLE : weight_offset);
        if (to->totals) to->totals[b * to->rows + row] = total[0];
    }
}

/* The same of some rows. */
typedef struct {
    const int8_t *codes; /* [rows, block] */
    const float *scales;
    const int32_t *sums;
    const float *totals;
} row_blocks;

INLINE row_blocks rows_of(const kvq_matrix *m, const kvq_byte_rows *of, size_t b, size_t row) {
    const size_t at = b * of->rows + row;
    return (row_blocks){of->codes + at * m->block, of->scales + at, of->sums + at, of->totals ? of->totals + at : NULL};
}

/* What codes of a block count too much, by the sum of a row's: nothing where bytes are the weights themselves. */
INLINE vi surplus(form form, vi zeros, int32_t sum) {
    if (form.zeros) return form.bits < 8 ? zeros * sum : (vi){0} + sum * weight_offset; /* `expand_codes` has taken them off */
    return form.bits < 8 || weight_offset ? sum - (vi){0} : (vi){0};
}

/* sum + a block's dot product times both its scales. */
INLINE vf add_block(vf sum, vi dot, vf weight, float scale) { return sum + to_float(dot) * (weight * scale); }

/* A block of so many rows at once, from `row` on, and of a part's first vectors of columns: sum [rows][vectors] grows. Rows,
 * vectors and form are constants where it is used. */
INLINE void product_block_of(int rows, int vectors, form form, const part_block *t, const row_blocks *x, size_t row, int block,
                             vf sum[][PART_VECTORS]) {
    enum { CHAINS = 2 }; /* of dot products that wait for each other, where there are few */
    const int chains = rows * vectors < 8 ? CHAINS : 1;
    const int small = form.bits < 8, words = small ? block / 8 : block / 4, together = words_of_high(form.bits);
    const int at_once = small ? 2 * together : chains;
    const int in_place = high_in_place && chains > 1 && form.bits == 4; /* high halves count 16 times, in a chain of their own */
    vi dots[PART_ROWS * PART_VECTORS > 8 ? PART_ROWS : 8][PART_VECTORS];
    UNROLL
    for (int v = 0; v < vectors; v++) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            dots[r][v] = (vi){0};
            if (chains > 1) dots[rows + r][v] = (vi){0};
        }
    }
    for (int g = 0; g < words; g += small ? together : chains) {
        vu word[PART_VECTORS], more[PART_VECTORS];
        UNROLL
        for (int v = 0; v < vectors; v++) more[v] = high_bits(form.bits, t->words[PANEL_OF(v)] + LANE_OF(v), block, g);
        UNROLL
        for (int i = 0; i < at_once; i++) { /* of fewer than 8 bits first the low ones of a word */
            const int c = i % CHAINS;
            vu codes[PART_VECTORS];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                const uint32_t *from = (small ? t->words : t->bytes)[PANEL_OF(v)] + LANE_OF(v);
                if (!small || !c) word[v] = load_u(from + (size_t)(small ? g + i / 2 : g + i) * KVQ_PANEL);
                if (!small) codes[v] = word[v];
                else if (in_place && c) codes[v] = word[v] & 0xf0f0f0f0u;
                else codes[v] = bytes_of(form.bits, word[v], c, more[v], i);
            }
            const int8_t *four_of = x->codes + row * block + 4 * (small ? g + i / 2 + c * (block / 8) : g + i);
            UNROLL
            for (int r = 0; r < rows; r++) {
                uint32_t four;
                memcpy(&four, four_of + r * block, sizeof four);
                UNROLL
                for (int v = 0; v < vectors; v++) {
                    vi *dot = dots[(chains > 1 ? c * rows : 0) + r] + v;
                    *dot = small ? dot_small(*dot, codes[v], four - (vu){0}) : dot_words(*dot, codes[v], four - (vu){0});
                }
            }
        }
    }
    UNROLL
    for (int v = 0; v < vectors; v++) {
        const vf weight = numbers_of(form, t->scales[PANEL_OF(v)], LANE_OF(v));
        const vf offset = form.offsets ? numbers_of(form, t->offsets[PANEL_OF(v)], LANE_OF(v)) : splat(0);
        const vi zeros = zeros_of(t, form, v);
        UNROLL
        for (int r = 0; r < rows; r++) {
            vi dot = dots[r][v] - surplus(form, zeros, x->sums[row + r]);
            if (chains > 1) dot += in_place ? dots[rows + r][v] >> 4 : dots[rows + r][v];
            sum[r][v] = add_block(sum[r][v], dot, weight, x->scales[row + r]);
            if (form.offsets) sum[r][v] += offset * x->totals[row + r];
        }
    }
}

/* The same for sums in memory, out [rows, PART_COLUMNS]. */
INLINE void product_part(int rows, form form, const part_block *t, const row_blocks *x, size_t row, int block, float *out) {
    vf sum[PART_ROWS][PART_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < PART_VECTORS; v++) sum[r][v] = load_f(out + r * PART_COLUMNS + v * LANES);
    }
    product_block_of(rows, PART_VECTORS, form, t, x, row, block, sum);
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < PART_VECTORS; v++) store_f(out + r * PART_COLUMNS + v * LANES, sum[r][v]);
    }
}

/* The same for any number of rows from `row` on. */
INLINE void product_rows_of(form form, const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b, size_t row,
                            size_t rows, float *out) {
    const row_blocks x = rows_of(m, of, b, row);
    size_t r = 0;
#define TILES(n) for (; r + n <= rows; r += n) product_part(n, form, t, &x, r, m->block, out + r * PART_COLUMNS)
    TILES(PART_ROWS);
    TILES(4);
    TILES(1);
#undef TILES
}

/* A function with the form of its matrix as a constant: call(form, ...) for whichever it is. */
#define FOR_FORM(m, call, ...)                                                       \
    do {                                                                             \
        if ((m)->bits == 8) call((form){8, 0, 0, 0}, __VA_ARGS__);                   \
        else if ((m)->bits == 6 && (m)->halves) call((form){6, 1, 0, 1}, __VA_ARGS__); \
        else if ((m)->bits == 6) call((form){6, 1, 0, 0}, __VA_ARGS__);              \
        else if ((m)->bits == 5 && (m)->halves) call((form){5, 1, 0, 1}, __VA_ARGS__); \
        else if ((m)->bits == 5) call((form){5, 1, 0, 0}, __VA_ARGS__);              \
        else if ((m)->zeros) call((form){4, 1, 0, 0}, __VA_ARGS__);                  \
        else if ((m)->halves) call((form){4, 0, 1, 1}, __VA_ARGS__);                 \
        else if ((m)->offsets) call((form){4, 0, 1, 0}, __VA_ARGS__);                \
        else call((form){4, 0, 0, 0}, __VA_ARGS__);                                  \
    } while (0)

static void product_rows(const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b, size_t row, size_t rows,
                         float *out) {
    FOR_FORM(m, product_rows_of, m, t, of, b, row, rows, out);
}

/* The same where codes of fewer bits with zero points were expanded: one time for all rows. */
static void product_expanded(const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b, size_t row,
                             size_t rows, float *out) {
    if (m->halves) product_rows_of((form){8, 1, 0, 1}, m, t, of, b, row, rows, out);
    else product_rows_of((form){8, 1, 0, 0}, m, t, of, b, row, rows, out);
}

/* Bytes of a block's scales, or offsets, in a panel. */
INLINE size_t panel_numbers(const kvq_matrix *m) { return KVQ_PANEL * (m->halves ? sizeof(uint16_t) : sizeof(float)); }

/* Block b of a part's panels, from `panel` on; of a part that has too many, one of them twice. */
INLINE part_block part_of(const kvq_matrix *m, size_t panel, int b) {
    const size_t panels = ((size_t)m->n + KVQ_PANEL - 1) / KVQ_PANEL, block_bytes = KVQ_PANEL * m->block * m->bits / 8;
    part_block t;
    for (size_t p = 0; p < PART_PANELS; p++) {
        const size_t own = panel + p < panels ? panel + p : panel, at = own * m->blocks + b;
        t.words[p] = t.bytes[p] = (const uint32_t *)(m->codes + at * block_bytes);
        t.scales[p] = (const char *)m->scales + at * panel_numbers(m);
        t.zeros[p] = m->zeros ? m->zeros + at * KVQ_PANEL : NULL;
        t.offsets[p] = m->offsets ? (const char *)m->offsets + at * panel_numbers(m) : NULL;
    }
    return t;
}

/* Ask for the same block of the next part, which the same thread mostly takes: two panels of a few kilobytes each are too short
 * for some processors to foresee. */
INLINE void expect_part(const kvq_matrix *m, const part_block *t) {
    const size_t block_bytes = KVQ_PANEL * m->block * m->bits / 8, ahead = PART_PANELS * (size_t)m->blocks;
    for (size_t p = 0; p < PART_PANELS; p++) {
        prefetch((const char *)t->words[p] + ahead * block_bytes, (int)block_bytes);
        prefetch(t->scales[p] + ahead * panel_numbers(m), (int)panel_numbers(m));
        if (m->offsets) prefetch(t->offsets[p] + ahead * panel_numbers(m), (int)panel_numbers(m));
    }
}

/* Sums [rows, columns] of some panels to their columns. Columns are a constant where it is used. */
INLINE void put_part(const kvq_matrix *m, size_t panel, size_t columns, size_t first, size_t rows, const float *sums,
                     float *out) {
    const size_t column = panel * KVQ_PANEL, n = m->n, left = n - column;
    float *to = out + first * n + column;
    for (size_t r = 0; r < rows; r++, to += n, sums += columns) {
        if (left < columns) memcpy(to, sums, sizeof(float) * left);
        else memcpy(to, sums, sizeof(float) * columns);
    }
}

typedef void (*multiply_rows)(const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b, size_t row,
                              size_t rows, float *out);

INLINE void multiply_by(multiply_rows multiply_rows, int expands, const kvq_matrix *m, const kvq_byte_rows *of, size_t panel,
                        size_t first, size_t rows, float *out) {
    uint32_t expanded[PART_PANELS][KVQ_MOST_BLOCK / 4 * KVQ_PANEL] __attribute__((aligned(64)));
    float sums[PRODUCT_MOST_ROWS * PART_COLUMNS] __attribute__((aligned(64)));
    memset(sums, 0, sizeof(float) * rows * PART_COLUMNS);
    for (int b = 0; b < m->blocks; b++) {
        part_block t = part_of(m, panel, b);
        expect_part(m, &t);
        for (int p = 0; expands && m->bits < 8 && p < PART_PANELS; p++) {
            expand_codes(m->bits, &t, p, m->block, expanded[p]);
            t.bytes[p] = expanded[p];
        }
        multiply_rows(m, &t, of, b, first, rows, sums);
    }
    put_part(m, panel, PART_COLUMNS, first, rows, sums, out);
}

/* One row of some panels, whose sums stay in registers; asks: of `expect_part`. Panels and form are constants where it is
 * used. */
INLINE void multiply_panels(form form, int panels, int asks, const kvq_matrix *m, const kvq_byte_rows *of, size_t panel,
                            size_t row, float *out) {
    const int vectors = panels * PANEL_VECTORS;
    vf sum[1][PART_VECTORS] = {{{0}}};
    for (int b = 0; b < m->blocks; b++) {
        const part_block t = part_of(m, panel, b);
        const row_blocks x = rows_of(m, of, b, row);
        if (asks) expect_part(m, &t);
        product_block_of(1, vectors, form, &t, &x, 0, m->block, sum);
    }
    float sums[PART_COLUMNS];
    for (int v = 0; v < vectors; v++) store_f(sums + v * LANES, sum[0][v]);
    put_part(m, panel, (size_t)panels * KVQ_PANEL, row, 1, sums, out);
}

/* One row. Where a panel is one stream, it is read alone from its begin to its end, which a processor foresees; scales are a
 * second one, zero points and offsets further ones, and then all are asked for. */
INLINE void multiply_one_of(form form, const kvq_matrix *m, const kvq_byte_rows *of, size_t panel, size_t first, float *out) {
    const int alone = !form.zeros && !form.offsets, panels = alone ? 1 : PART_PANELS;
    for (size_t p = panel; p < panel + PART_PANELS && p * KVQ_PANEL < (size_t)m->n; p += panels)
        multiply_panels(form, panels, !alone, m, of, p, first, out);
}

/* Several rows: where codes have to be put together from parts, they are once for many of these. */
static void multiply_several(const kvq_matrix *m, const kvq_byte_rows *of, size_t panel, size_t first, size_t rows, float *out) {
    const int parts = m->zeros && (m->bits != 4 || !high_in_place);
    if (parts && rows >= EXPANDED_ROWS) multiply_by(product_expanded, 1, m, of, panel, first, rows, out);
    else multiply_by(product_rows, 0, m, of, panel, first, rows, out);
}

/* A part's columns of some rows. */
static void multiply(const kvq_matrix *m, const kvq_byte_rows *of, size_t panel, size_t first, size_t rows, float *out) {
    if (rows == 1) FOR_FORM(m, multiply_one_of, m, of, panel, first, out);
    else multiply_several(m, of, panel, first, rows, out);
}

#endif
