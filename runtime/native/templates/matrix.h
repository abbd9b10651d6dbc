/* Rows times the transpose of a packed matrix of 8- or 4-bit weights, by integer dot products: the rows are bytes too.
 *
 * The sum over a block is a whole number. The product adds such sums, each times both its scales, block after block,
 * however many rows there are, so that no row depends on its neighbours. */
#ifndef KVQ_MATRIX_H
#define KVQ_MATRIX_H

#include "vector.h"

/* Sums of a part stay in registers: PART_ROWS rows, PART_PANELS panels of columns in the lanes. */
#if LANES == 16
#define PART_PANELS 2
#define PART_ROWS 12
#else
#define PART_PANELS 1
#if defined(__aarch64__) || defined(DOT_KERNEL)
#define PART_ROWS 6
#else
#define PART_ROWS 4
#endif
#endif
#define PART_COLUMNS (PART_PANELS * KVQ_PANEL)
#define PART_VECTORS (PART_COLUMNS / LANES)
#define PANEL_VECTORS (KVQ_PANEL / LANES)

/* Whether they are faster than those of onnxruntime, which has better forms for processors that lack such instructions. */
#if defined(DOT_KERNEL) || LANES == 8
enum { own_products = 1 };
#else
enum { own_products = 0 };
#endif

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
        for (int i = 0; i < block; i += LANES) {
            vf scaled = load_f(in + i) * inverse;
            ROUNDED(scaled); /* before the sum: together they would round once, and to another code */
            const vi code = (vi)(scaled + magic) - (vi)splat(magic);
            const bytes narrow = __builtin_convertvector(code, bytes);
            sum += code;
            memcpy(out + i, &narrow, sizeof narrow);
        }
        to->scales[b * to->rows + row] = largest / 127;
        UNROLL
        for (int step = 1; step < LANES; step *= 2) sum += (vi)swap_lanes((vf)sum, step);
        to->sums[b * to->rows + row] = sum[0];
    }
}

/* A panel's block of 4-bit weights. */
typedef struct {
    const uint32_t *words;
    const uint8_t *zeros;
} nibbles;

/* Its zero points, of the columns in vector v. */
INLINE vi zeros_of(const nibbles *from, int v) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    bytes zeros;
    memcpy(&zeros, from->zeros + v * LANES, sizeof zeros);
    return __builtin_convertvector(zeros, vi);
}

/* As a block of 8 bits: to [block / 4, KVQ_PANEL]. */
static void expand_nibbles(const nibbles *from, int block, uint32_t *to) {
    typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
    for (int v = 0; v < PANEL_VECTORS; v++) {
        const bytes less = (bytes)((vu)((zeros_of(from, v) - weight_offset) & 0xff) * 0x01010101u);
        for (int w = 0; w < block / 8; w++) {
            const vu word = load_u(from->words + (size_t)w * KVQ_PANEL + v * LANES);
            const bytes low = (bytes)(word & 0x0f0f0f0fu) - less, high = (bytes)(word >> 4 & 0x0f0f0f0fu) - less;
            memcpy(to + (size_t)w * KVQ_PANEL + v * LANES, &low, sizeof low);
            memcpy(to + (size_t)(w + block / 8) * KVQ_PANEL + v * LANES, &high, sizeof high);
        }
    }
}

/* A block of a part's panels: its weights and their scales. */
typedef struct {
    const uint32_t *words[PART_PANELS];
    const float *scales[PART_PANELS];
} part_block;

/* A block of so many rows at once: sums [rows, PART_COLUMNS] grow. */
INLINE void product_part(int rows, const part_block *t, const int8_t *x, int block, const float *scales,
                         const int32_t *sums, float *out) {
    enum { CHAINS = 2 }; /* of dot products that wait for each other, where there are few */
    const int chains = rows * PART_VECTORS < 8 ? CHAINS : 1;
    vi dots[PART_ROWS * PART_VECTORS > 8 ? PART_ROWS : 8][PART_VECTORS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < PART_VECTORS; v++) {
            dots[r][v] = -weight_offset * sums[r] - (vi){0};
            if (chains > 1) dots[rows + r][v] = (vi){0};
        }
    }
    for (int g = 0; g < block / 4; g += chains) {
        UNROLL
        for (int c = 0; c < chains; c++) {
            vu codes[PART_VECTORS];
            UNROLL
            for (int v = 0; v < PART_VECTORS; v++) {
                const size_t at = (size_t)(g + c) * KVQ_PANEL + v % PANEL_VECTORS * LANES;
                codes[v] = load_u(t->words[v / PANEL_VECTORS] + at);
            }
            UNROLL
            for (int r = 0; r < rows; r++) {
                uint32_t four;
                memcpy(&four, x + r * block + 4 * (g + c), sizeof four);
                UNROLL
                for (int v = 0; v < PART_VECTORS; v++)
                    dots[c * rows + r][v] = dot_words(dots[c * rows + r][v], codes[v], four - (vu){0});
            }
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int v = 0; v < PART_VECTORS; v++) {
            float *at = out + r * PART_COLUMNS + v * LANES;
            const vf weight = load_f(t->scales[v / PANEL_VECTORS] + v % PANEL_VECTORS * LANES);
            const vi dot = chains > 1 ? dots[r][v] + dots[rows + r][v] : dots[r][v];
            store_f(at, load_f(at) + to_float(dot) * (weight * scales[r]));
        }
    }
}

/* The same for any number of rows from `row` on. */
static void product_rows(const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b, size_t row,
                         size_t rows, float *out) {
    const int8_t *x = of->codes + (b * of->rows + row) * m->block;
    const float *scales = of->scales + b * of->rows + row;
    const int32_t *sums = of->sums + b * of->rows + row;
    size_t r = 0;
#define TILES(n)                        \
    for (; r + n <= rows; r += n)       \
    product_part(n, t, x + r * m->block, m->block, scales + r, sums + r, out + r * PART_COLUMNS)
    TILES(PART_ROWS);
    TILES(4);
    TILES(1);
#undef TILES
}

typedef void (*multiply_rows)(const kvq_matrix *m, const part_block *t, const kvq_byte_rows *of, size_t b, size_t row,
                              size_t rows, float *out);

INLINE void multiply_by(multiply_rows multiply_rows, const kvq_matrix *m, const kvq_byte_rows *of, size_t panel,
                        size_t first, size_t rows, float *out) {
    uint32_t expanded[PART_PANELS][KVQ_MOST_BLOCK / 4 * KVQ_PANEL] __attribute__((aligned(64)));
    float sums[PRODUCT_MOST_ROWS * PART_COLUMNS] __attribute__((aligned(64)));
    const size_t panels = ((size_t)m->n + KVQ_PANEL - 1) / KVQ_PANEL, block_bytes = KVQ_PANEL * m->block * m->bits / 8;
    memset(sums, 0, sizeof(float) * rows * PART_COLUMNS);
    for (int b = 0; b < m->blocks; b++) {
        part_block t;
        for (size_t p = 0; p < PART_PANELS; p++) {
            const size_t own = panel + p < panels ? panel + p : panel, at = own * m->blocks + b;
            const uint32_t *words = (const uint32_t *)(m->codes + at * block_bytes);
            t.words[p] = m->bits == 8 ? words : expanded[p];
            t.scales[p] = m->scales + at * KVQ_PANEL;
            if (m->bits == 4) expand_nibbles(&(nibbles){words, m->zeros + at * KVQ_PANEL}, m->block, expanded[p]);
        }
        multiply_rows(m, &t, of, b, first, rows, sums);
    }
    const size_t column = panel * KVQ_PANEL, left = m->n - column;
    for (size_t r = 0; r < rows; r++) {
        float *to = out + (first + r) * m->n + column;
        const float *from = sums + r * PART_COLUMNS;
        if (left < PART_COLUMNS) memcpy(to, from, sizeof(float) * left);
        else memcpy(to, from, sizeof(float) * PART_COLUMNS);
    }
}

static void multiply(const kvq_matrix *m, const kvq_byte_rows *of, size_t panel, size_t first, size_t rows, float *out) {
    multiply_by(product_rows, m, of, panel, first, rows, out);
}

#endif
