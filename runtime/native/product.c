/* Rows times a matrix of weights: cut into groups of columns and blocks of rows. */
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

#define FEW_ROWS 8 /* are quantized by the calling thread */
#define ROWS_AT_A_TIME 16

typedef struct {
    const kvq_kernel *kernel;
    const kvq_matrix *matrix;
    const float *x;
    float *out;
    kvq_byte_rows rows;
    size_t groups; /* of panels */
} product_task;

static void quantize_work(void *data, size_t i) {
    const product_task *t = data;
    const size_t end = (i + 1) * ROWS_AT_A_TIME;
    for (size_t row = i * ROWS_AT_A_TIME; row < (end < t->rows.rows ? end : t->rows.rows); row++)
        t->kernel->quantize(t->matrix, t->x + row * t->matrix->k, row, &t->rows);
}

static void product_work(void *data, size_t i) {
    const product_task *t = data;
    const size_t first = i / t->groups * PRODUCT_MOST_ROWS, left = t->rows.rows - first;
    t->kernel->product(t->matrix, &t->rows, i % t->groups * t->kernel->product_panels, first, left < PRODUCT_MOST_ROWS ? left : PRODUCT_MOST_ROWS,
                       t->out);
}

/* Four codes of 4 bits, of two bytes, in a byte each. */
static uint32_t spread_nibbles(const uint8_t *two) {
    const uint32_t x = two[0] | (uint32_t)two[1] << 8;
    return (x & 0xf) | (x & 0xf0) << 4 | (x & 0xf00) << 8 | (x & 0xf000) << 12;
}

/* Codes of a byte each, four of them. */
static uint32_t four_of(const uint8_t *codes) {
    uint32_t word;
    memcpy(&word, codes, sizeof word);
    return word;
}

/* Codes of 5 or 6 bits, of a byte each: the four lowest ones as those of 4 bits, then the higher ones, see kvq.h. */
static void pack_between(const kvq_matrix *m, const uint8_t *from, uint32_t *to) {
    const int half = m->block / 8, high = m->bits - 4, each = 8 / high; /* words of codes whose higher bits one word has */
    for (int w = 0; w < half; w++, to += KVQ_PANEL)
        *to = (four_of(from + 4 * w) & 0x0f0f0f0fu) | (four_of(from + 4 * (w + half)) & 0x0f0f0f0fu) << 4;
    for (int w = 0; w < 2 * half / each; w++, to += KVQ_PANEL) {
        *to = 0;
        for (int i = 0; i < each; i++) { /* of low codes and high ones in turn */
            const int of = (w * each + i) / 2 + (i % 2 ? half : 0);
            *to |= (four_of(from + 4 * of) >> 4 & ((1u << high) - 1) * 0x01010101u) << high * i;
        }
    }
}

/* Words of a block of a row to every KVQ_PANEL-th one of a panel. */
static void pack_block(const kvq_matrix *m, uint32_t flip, const uint8_t *from, uint32_t *to) {
    if (m->bits == 5 || m->bits == 6) {
        pack_between(m, from, to);
        return;
    }
    for (int w = 0; w < m->block * m->bits / 32; w++, to += KVQ_PANEL) {
        if (m->bits == 8) *to = four_of(from + 4 * w) ^ flip;
        else *to = spread_nibbles(from + 2 * w) | spread_nibbles(from + m->block / 4 + 2 * w) << 4;
    }
}

/* The zero point of block b of a row. */
static uint8_t zero_of(const kvq_matrix *m, size_t row, size_t b) {
    if (m->bits != 4) return m->zeros[row * m->blocks + b];
    return m->zeros[row * (((size_t)m->blocks + 1) / 2) + b / 2] >> (b % 2 * 4) & 15;
}

/* A scale or an offset to its place in a panel. */
static void pack_number(const kvq_matrix *m, const void *from, size_t source, int there, void *to, size_t at) {
    const size_t size = m->halves ? sizeof(uint16_t) : sizeof(float);
    if (there) memcpy((char *)to + at * size, (const char *)from + source * size, size);
    else memset((char *)to + at * size, 0, size);
}

int32_t kvq_pack(int32_t kernel, const kvq_matrix *from, const kvq_matrix *to) {
    const int refused = kvq_check_pack(kernel, from, to);
    if (refused) return refused;
    const size_t n = from->n, blocks = from->blocks, block_bytes = from->block * from->bits / 8;
    const size_t held = from->bits == 4 ? block_bytes : (size_t)from->block; /* bytes of a block as it is given */
    const uint32_t flip = kvq_choose_kernel(kernel)->weight_offset ? 0 : 0x80808080u; /* 128 less is another first bit */
    for (size_t row = 0; row < (n + KVQ_PANEL - 1) / KVQ_PANEL * KVQ_PANEL; row++) {
        const size_t source = row < n ? row : n - 1;
        for (size_t b = 0; b < blocks; b++) {
            const size_t block = row / KVQ_PANEL * blocks + b, lane = row % KVQ_PANEL;
            pack_block(from, flip, from->codes + (source * blocks + b) * held,
                       (uint32_t *)(to->codes + block * block_bytes * KVQ_PANEL) + lane);
            const size_t at = block * KVQ_PANEL + lane;
            pack_number(from, from->scales, row * blocks + b, row < n, to->scales, at);
            if (from->offsets) pack_number(from, from->offsets, row * blocks + b, row < n, to->offsets, at);
            if (from->zeros) to->zeros[at] = zero_of(from, source, b);
        }
    }
    return 0;
}

int kvq_product(int32_t kernel, const kvq_matrix *matrix, const float *x, size_t rows, float *out, kvq_parallel parallel,
                void *context) {
    product_task t = {.kernel = kvq_choose_kernel(kernel), .matrix = matrix, .x = x, .out = out, .rows.rows = rows};
    if (!t.kernel) return KVQ_NO_KERNEL;
    if (!rows) return 0;
    if (!parallel) parallel = kvq_serially;
    char *memory = NULL;
    const size_t blocks = matrix->blocks;
    for (int filled = 0; filled < 2; filled++) {
        size_t used = 0;
        t.rows.codes = kvq_part(memory, &used, rows * blocks * matrix->block);
        t.rows.scales = kvq_part(memory, &used, sizeof(float) * rows * blocks);
        t.rows.sums = kvq_part(memory, &used, sizeof(int32_t) * rows * blocks);
        if (matrix->offsets) t.rows.totals = kvq_part(memory, &used, sizeof(float) * rows * blocks);
        if (!filled && !(memory = malloc(used))) return KVQ_NO_MEMORY;
    }
    const size_t parts = (rows + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    if (rows > FEW_ROWS) parallel(context, quantize_work, parts, &t);
    else quantize_work(&t, 0);
    const size_t columns = (size_t)KVQ_PANEL * t.kernel->product_panels;
    t.groups = (matrix->n + columns - 1) / columns;
    parallel(context, product_work, t.groups * ((rows + PRODUCT_MOST_ROWS - 1) / PRODUCT_MOST_ROWS), &t);
    free(memory);
    return 0;
}
