/* Keys and values as floats, a block of tokens at a time, whether they come from pages or are new. */
#ifndef KVQ_EXPAND_H
#define KVQ_EXPAND_H

#include "../kernel.h"
#include "scores.h"
#include "turns.h"
#include "vector.h"

/* The tokens of one KV head that are attended to together. */
typedef struct {
    float *keys;   /* [head_dim, KEY_BLOCK]: channel by channel */
    float *values; /* [KEY_BLOCK, depth], and room for a vector more */
    int depth;     /* head_dim in whole 16s */
    int tokens;
    int32_t position[KEY_BLOCK]; /* of each in the text, where the layer has a window */
} kvq_block;

/* A tile of keys. */
INLINE void expand_tile(int precision, int head_dim, const uint32_t *tile, int words, const uint16_t *scales, float *keys) {
    const int low = low_words_of(precision, words);
    for (int v = 0; v < TILE_VECTORS; v++) {
        vf scale = splat(1);
        if (has_scale(precision)) scale = load_halves(scales + v * LANES);
        for (int j = 0; j < low; j++) {
            const vw word = load_words(precision, tile + v * LANES, TILE, low, j);
            UNROLL
            for (int i = 0; i < codes_of(precision); i++)
                if (i * low + j < head_dim)
                    store_f(keys + (i * low + j) * KEY_BLOCK + v * LANES, level(precision, word, i) * scale);
        }
    }
}

/* One value vector, [channels]; may write up to LANES floats more. */
INLINE void expand_value(int precision, const uint32_t *code, int words, float scale, float *value) {
    const int low = low_words_of(precision, words);
    uint32_t high[MOST_LOW + LANES];
    if (split_of(precision)) high_words(code + low, low, high);
    if (low % LANES == 0) {
        for (int j = 0; j < low; j += LANES) {
            const vw word = words_beside(precision, code, high, j);
            UNROLL
            for (int i = 0; i < codes_of(precision); i++) store_f(value + i * low + j, level(precision, word, i) * scale);
        }
        return;
    }
    if (low < LANES) {
        vw word = {0};
        memcpy(&word.low, code, sizeof(uint32_t) * low);
        if (split_of(precision)) memcpy(&word.high, high, sizeof(uint32_t) * low);
        UNROLL /* ascending: what a store writes too far, the next one or the next token's overwrites */
        for (int i = 0; i < codes_of(precision); i++) store_f(value + i * low, level(precision, word, i) * scale);
        return;
    }
    for (int i = 0; i < codes_of(precision); i++)
        for (int j = 0; j < low; j++)
            value[i * low + j] = level(precision, spread_word(precision, code, low, j), i)[0] * scale;
}

/* Add the slots [begin, begin + slots) of a page, counted from its own begin, as far as they hold tokens. */
static void expand_page(const kvq_task *task, const kvq_page *page, size_t vector_row, int begin, int slots,
                        kvq_block *block) {
    const int d = task->pass->head_dim, depth = block->depth;
    const int key_words = words_per_vector(page->key_precision, d);
    const int value_words = words_per_vector(page->value_precision, d), scaled = has_scale(page->value_precision);
    const size_t first_slot = vector_row * page->capacity + page->begin + begin;
    const uint16_t *key_scales = page->key_scales + first_slot, *value_scales = page->value_scales + first_slot;
    const uint32_t *codes = page->values + first_slot * value_words;
    float *keys = block->keys + block->tokens, *values = block->values + (size_t)block->tokens * depth;
    for (int t = 0; t < slots; t += TILE) {
        const uint32_t *tile = key_tile(page, vector_row, key_words, (begin + t) / TILE);
        FOR_WIDTH(page->key_precision, expand_tile(PRECISION, d, tile, key_words, key_scales + t, keys + t))
        if (page_turns(task, page)) add_means(task, page, vector_row, page->begin + begin + t, keys + t);
    }
    for (int t = 0; t < slots; t++) {
        const float scale = scaled ? half_scalar(value_scales[t]) : 1;
        const uint32_t *code = codes + (size_t)t * value_words;
        FOR_WIDTH(page->value_precision, expand_value(PRECISION, code, value_words, scale, values + (size_t)t * depth))
    }
    int kept = 0; /* tokens move to the front */
    for (int t = 0; t < slots; t++) {
        if (!holds_token(page, page->begin + begin + t)) continue;
        if (kept != t) {
            for (int c = 0; c < d; c++) keys[c * KEY_BLOCK + kept] = keys[c * KEY_BLOCK + t];
            memcpy(values + (size_t)kept * depth, values + (size_t)t * depth, sizeof(float) * depth);
        }
        if (task->window)
            block->position[block->tokens + kept] = position_at(task->pass, page, page->begin + begin + t);
        kept++;
    }
    block->tokens += kept;
}

/* LANES rows from x on, `stride` apart, become columns. */
INLINE void transpose(const float *x, ptrdiff_t stride, float *columns) {
    vf row[LANES];
    for (int i = 0; i < LANES; i++) row[i] = load_f(x + i * stride);
    UNROLL
    for (int step = 1; step < LANES; step *= 2) { /* swaps the two off-diagonal quarters of each square of 2 * step */
        const vi odd = (lane_numbers() & step) != 0;
        UNROLL
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            const vf upper = row[i], lower = row[i + step];
            row[i] = select_f(odd, swap_lanes(lower, step), upper);
            row[i + step] = select_f(odd, lower, swap_lanes(upper, step));
        }
    }
    for (int i = 0; i < LANES; i++) store_f(columns + i * KEY_BLOCK, row[i]);
}

/* The block becomes the new tokens [begin, begin + tokens). */
static void expand_new(const kvq_task *task, int kv_head, int begin, int tokens, kvq_block *block) {
    const int d = task->pass->head_dim, depth = block->depth, whole = d / LANES * LANES;
    const ptrdiff_t stride = task->rows->key_stride;
    const float *key = task->rows->key + begin * stride + (size_t)kv_head * d;
    int t = 0;
    for (; t + LANES <= tokens; t += LANES) {
        for (int c = 0; c < whole; c += LANES)
            transpose(key + t * stride + c, stride, block->keys + c * KEY_BLOCK + t);
        for (int i = t; i < t + LANES; i++)
            for (int c = whole; c < d; c++) block->keys[c * KEY_BLOCK + i] = key[i * stride + c];
    }
    for (; t < tokens; t++)
        for (int c = 0; c < d; c++) block->keys[c * KEY_BLOCK + t] = key[t * stride + c];
    for (t = 0; t < tokens; t++) {
        const float *value = task->rows->value + (begin + t) * task->rows->value_stride + (size_t)kv_head * d;
        memcpy(block->values + (size_t)t * depth, value, sizeof(float) * d);
        memset(block->values + (size_t)t * depth + d, 0, sizeof(float) * (depth - d));
    }
    block->tokens = tokens;
}

#endif
