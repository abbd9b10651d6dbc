/* Several new tokens: flash attention of a block of query rows over all pages and the new tokens. Blocks of keys
 * and values are expanded to floats, then two dense products do the work. */
#ifndef KVQ_PREFILL_H
#define KVQ_PREFILL_H

#include <stdlib.h>

#include "decode.h"

#if LANES == 16 || defined(__aarch64__)
#define PRODUCT_ROWS 6
#else
#define PRODUCT_ROWS 3 /* 16 registers */
#endif
#define PRODUCT_VECTORS 4

/* rows x (vectors * LANES) of c = a b (or c += a b): a [rows, depth], b [depth, ...], c [rows, ...]. */
INLINE void product_block(int rows, int vectors, int add, int depth, const float *a, int a_stride, const float *b,
                          int b_stride, float *c, int c_stride) {
    vf acc[PRODUCT_ROWS][PRODUCT_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) acc[r][v] = add ? load_f(c + r * c_stride + v * LANES) : splat(0);
    for (int k = 0; k < depth; k++) {
        vf x[PRODUCT_VECTORS];
        for (int v = 0; v < vectors; v++) x[v] = load_f(b + (size_t)k * b_stride + v * LANES);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) acc[r][v] += x[v] * a[(size_t)r * a_stride + k];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store_f(c + r * c_stride + v * LANES, acc[r][v]);
}

/* c [rows, columns] = or += a [rows, depth] b [depth, columns]; columns a multiple of 16. */
static void product(int add, int rows, int columns, int depth, const float *a, int a_stride, const float *b,
                    int b_stride, float *c, int c_stride) {
    const int wide = PRODUCT_VECTORS * LANES;
    int r = 0;
    for (; r + PRODUCT_ROWS <= rows; r += PRODUCT_ROWS) {
        int n = 0;
        for (; n + wide <= columns; n += wide)
            product_block(PRODUCT_ROWS, PRODUCT_VECTORS, add, depth, a + (size_t)r * a_stride, a_stride, b + n, b_stride,
                          c + (size_t)r * c_stride + n, c_stride);
        for (; n < columns; n += LANES)
            product_block(PRODUCT_ROWS, 1, add, depth, a + (size_t)r * a_stride, a_stride, b + n, b_stride,
                          c + (size_t)r * c_stride + n, c_stride);
    }
    for (; r < rows; r++) {
        int n = 0;
        for (; n + wide <= columns; n += wide)
            product_block(1, PRODUCT_VECTORS, add, depth, a + (size_t)r * a_stride, a_stride, b + n, b_stride,
                          c + (size_t)r * c_stride + n, c_stride);
        for (; n < columns; n += LANES)
            product_block(1, 1, add, depth, a + (size_t)r * a_stride, a_stride, b + n, b_stride,
                          c + (size_t)r * c_stride + n, c_stride);
    }
}

/* A tile of keys as floats, channel by channel: keys[channel * KEY_BLOCK + token]. */
INLINE void expand_tile(int bits, int head_dim, const uint32_t *tile, int words, const uint16_t *scales, float *keys) {
    for (int v = 0; v < TILE_VECTORS; v++) {
        vf scale = splat(1);
        if (bits != 16) scale = load_halves(scales + v * LANES);
        for (int j = 0; j < words; j++) {
            vu word = load_u(tile + j * TILE + v * LANES);
            UNROLL
            for (int i = 0; i < codes_of(bits); i++)
                if (i * words + j < head_dim)
                    store_f(keys + (i * words + j) * KEY_BLOCK + v * LANES, level(bits, word, i) * scale);
        }
    }
}

/* One value vector as floats, [channels]; may write up to LANES floats more. */
INLINE void expand_value(int bits, const uint32_t *code, int words, float scale, float *value) {
    if (words % LANES == 0) {
        for (int j = 0; j < words; j += LANES) {
            vu word = load_u(code + j);
            UNROLL
            for (int i = 0; i < codes_of(bits); i++) store_f(value + i * words + j, level(bits, word, i) * scale);
        }
        return;
    }
    if (words < LANES) {
        vu word = {0};
        memcpy(&word, code, sizeof(uint32_t) * words);
        UNROLL /* ascending: what a store writes too far, the next one or the next token's overwrites */
        for (int i = 0; i < codes_of(bits); i++) store_f(value + i * words, level(bits, word, i) * scale);
        return;
    }
    for (int i = 0; i < codes_of(bits); i++)
        for (int j = 0; j < words; j++) value[i * words + j] = level(bits, code[j] - (vu){0}, i)[0] * scale;
}

typedef struct {
    float *rows, *keys, *values, *scores, *sums; /* see prefill_item */
    float *maximum, *total, *squares;            /* [rows] */
    int count, depth;
} prefill_state;

/* Merge a block of keys and values, both expanded, into the running softmax of all rows. Row r sees the first
 * visible[r] tokens of the block; visible may be null when all see all. */
static void merge_block(prefill_state *s, int head_dim, int tokens, const int *visible) {
    const int columns = (tokens + TILE - 1) / TILE * TILE;
    product(0, s->count, columns, head_dim, s->rows, s->depth, s->keys, KEY_BLOCK, s->scores, KEY_BLOCK);
    for (int r = 0; r < s->count; r++) {
        float *row = s->scores + (size_t)r * KEY_BLOCK;
        int seen = visible ? visible[r] : tokens;
        for (int t = seen; t < columns; t++) row[t] = -FLT_MAX;
        vf top = splat(s->maximum[r]);
        for (int t = 0; t < columns; t += LANES) top = max_f(top, load_f(row + t));
        float maximum = max_lanes(top);
        float keep = exp_f(splat(s->maximum[r] - maximum))[0];
        vf total = splat(0), squares = splat(0);
        for (int t = 0; t < columns; t += LANES) {
            vf e = exp_f(load_f(row + t) - maximum);
            total += e;
            squares += e * e;
            store_f(row + t, e);
        }
        if (!seen) memset(row, 0, sizeof(float) * columns), total = squares = splat(0);
        s->total[r] = s->total[r] * keep + sum_lanes(total);
        s->squares[r] = s->squares[r] * keep * keep + sum_lanes(squares);
        s->maximum[r] = maximum;
        float *sums = s->sums + (size_t)r * s->depth;
        if (keep != 1)
            for (int c = 0; c < s->depth; c += LANES) store_f(sums + c, load_f(sums + c) * keep);
    }
    product(1, s->count, s->depth, tokens, s->scores, KEY_BLOCK, s->values, s->depth, s->sums, s->depth);
}

/* The slots [begin, begin + slots) of a page, counted from its own begin. */
static void expand_page(const kvq_task *task, const kvq_page *page, size_t vector_row, int begin, int slots,
                        prefill_state *s) {
    const int d = task->pass->head_dim;
    const int key_words = words_per_vector(page->key_bits, d), value_words = words_per_vector(page->value_bits, d);
    const size_t first_slot = vector_row * page->capacity + page->begin + begin;
    const uint16_t *key_scales = page->key_scales + first_slot, *value_scales = page->value_scales + first_slot;
    const uint32_t *values = page->values + first_slot * value_words;
    for (int t = 0; t < slots; t += TILE) {
        const uint32_t *tile = key_tile(page, vector_row, key_words, (begin + t) / TILE);
        FOR_BITS(page->key_bits, expand_tile(BITS, d, tile, key_words, key_scales + t, s->keys + t))
    }
    for (int t = 0; t < slots; t++) {
        float scale = page->value_bits == 16 ? 1 : half_scalar(value_scales[t]);
        const uint32_t *code = values + (size_t)t * value_words;
        FOR_BITS(page->value_bits, expand_value(BITS, code, value_words, scale, s->values + (size_t)t * s->depth))
    }
}

/* Move the expanded tokens of slots that hold one to the front; returns how many there are. */
static int keep_tokens(const kvq_page *page, int begin, int slots, prefill_state *s, int head_dim) {
    int kept = 0;
    for (int t = 0; t < slots; t++) {
        if (!holds_token(page, page->begin + begin + t)) continue;
        if (kept != t) {
            for (int c = 0; c < head_dim; c++) s->keys[c * KEY_BLOCK + kept] = s->keys[c * KEY_BLOCK + t];
            memcpy(s->values + (size_t)kept * s->depth, s->values + (size_t)t * s->depth, sizeof(float) * s->depth);
        }
        kept++;
    }
    return kept;
}

static int prefill_item(const kvq_task *task, size_t item) {
    const kvq_pass *pass = task->pass;
    const kvq_rows *in = task->rows;
    const int d = pass->head_dim, depth = task->padded_dim;
    const int kv_head = (int)(item / task->row_blocks), first_row = (int)(item % task->row_blocks) * task->row_block;
    const int all_rows = task->group * pass->tokens;
    const int count = all_rows - first_row < task->row_block ? all_rows - first_row : task->row_block;
    const size_t vector_row = (size_t)task->layer * pass->kv_heads + kv_head;

    /* One allocation; every part starts on a cache line, since padded dimensions are multiples of 16 floats. */
    const size_t padded_rows = (size_t)(count + 15) / 16 * 16, slack = 64;
    const size_t floats = padded_rows * (2 * (size_t)depth + KEY_BLOCK + 3) + (size_t)KEY_BLOCK * 2 * depth + 3 * slack;
    float *memory = calloc(floats + 16, sizeof(float)), *at = memory;
    int *visible = malloc(sizeof(int) * padded_rows);
    if (!memory || !visible) {
        free(memory), free(visible);
        return -1;
    }
    at += (64 - (uintptr_t)at % 64) % 64 / sizeof(float);
    prefill_state s = {.count = count, .depth = depth};
    s.rows = at, at += padded_rows * depth;
    s.sums = at, at += padded_rows * depth;
    s.scores = at, at += padded_rows * KEY_BLOCK;
    s.maximum = at, at += padded_rows;
    s.total = at, at += padded_rows;
    s.squares = at, at += padded_rows;
    s.keys = at, at += (size_t)KEY_BLOCK * depth + slack;
    s.values = at;

    for (int r = 0; r < count; r++) {
        int head = kv_head * task->group + (first_row + r) / pass->tokens, token = (first_row + r) % pass->tokens;
        const float *query = in->query + token * in->query_stride + (size_t)head * d;
        for (int c = 0; c < d; c++) s.rows[(size_t)r * depth + c] = query[c] * task->softmax_scale;
        s.maximum[r] = -FLT_MAX;
    }
    for (int p = 0; p < pass->pages; p++) {
        const kvq_page *page = pass->page + p;
        const int used = slots_of(page);
        for (int begin = 0; begin < used; begin += KEY_BLOCK) {
            int slots = used - begin < KEY_BLOCK ? used - begin : KEY_BLOCK;
            expand_page(task, page, vector_row, begin, slots, &s);
            int tokens = keep_tokens(page, begin, slots, &s, d);
            if (tokens > 0) merge_block(&s, d, tokens, NULL);
        }
    }
    for (int begin = 0; begin < pass->tokens; begin += KEY_BLOCK) {
        int tokens = pass->tokens - begin < KEY_BLOCK ? pass->tokens - begin : KEY_BLOCK, any = 0;
        for (int r = 0; r < count; r++) {
            int token = (first_row + r) % pass->tokens, seen = token + 1 - begin;
            visible[r] = seen < 0 ? 0 : seen > tokens ? tokens : seen;
            any |= visible[r];
        }
        if (!any) continue;
        for (int t = 0; t < tokens; t++) {
            const float *key = in->key + (begin + t) * in->key_stride + (size_t)kv_head * d;
            const float *value = in->value + (begin + t) * in->value_stride + (size_t)kv_head * d;
            for (int c = 0; c < d; c++) s.keys[c * KEY_BLOCK + t] = key[c];
            memcpy(s.values + (size_t)t * depth, value, sizeof(float) * d);
            memset(s.values + (size_t)t * depth + d, 0, sizeof(float) * (depth - d));
        }
        merge_block(&s, d, tokens, visible);
    }
    for (int r = 0; r < count; r++) {
        int head = kv_head * task->group + (first_row + r) / pass->tokens, token = (first_row + r) % pass->tokens;
        float *out = in->out + ((size_t)token * pass->heads + head) * d, scale = 1 / s.total[r];
        for (int c = 0; c < d; c++) out[c] = s.sums[(size_t)r * depth + c] * scale;
        if (in->row_squares) in->row_squares[(size_t)token * pass->heads + head] = s.squares[r] * scale * scale;
    }
    free(memory), free(visible);
    return 0;
}

#endif
