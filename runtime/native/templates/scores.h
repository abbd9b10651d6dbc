/* Scores of query heads over the keys of a page. Codes are expanded in registers, once for up to DECODE_HEADS heads.
 * Scores lie as they are worked on: TILE of each head, head after head, then those of the next tile. */
#ifndef KVQ_SCORES_H
#define KVQ_SCORES_H

#include <float.h>

#include "../kernel.h"
#include "tiles.h"
#include "turns.h"
#include "vector.h"

INLINE const uint32_t *key_tile(const kvq_page *page, size_t vector_row, int words, int tile) {
    return page->keys + (vector_row * (page->capacity / TILE) + page->begin / TILE + tile) * words * TILE;
}

/* Scores of one tile of keys, before the keys' scales, by float arithmetic: acc[head][vector of tokens]. */
INLINE void tile_scores(int precision, int heads, const uint32_t *tile, int words, const float *query, int stride,
                        vf acc[][SCORE_VECTORS]) {
    for (int g = 0; g < heads; g++)
        for (int v = 0; v < TILE_VECTORS; v++) acc[g][v] = splat(0);
    const int low = low_words_of(precision, words);
    for (int j = 0; j < low; j++) {
        vw word[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) word[v] = load_words(precision, tile + v * LANES, TILE, low, j);
        UNROLL
        for (int i = 0; i < codes_of(precision); i++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                vf x = level(precision, word[v], i);
                for (int g = 0; g < heads; g++) acc[g][v] += x * query[g * stride + i * low + j];
            }
    }
}

#if defined(DOT_KERNEL) || defined(PAIR_KERNEL)
/* An instruction set with integer products of codes defines
 *   dot_codes_<name>(word, s)  step s of each word as four bytes, dot_offset_<name> more than their levels (or parts of
 *                              levels), for every precision that such products take
 * and DOT_KERNEL, where they are of bytes,
 *   dot(sum, codes, query)     sum + the products of the four bytes of each lane with those of query
 * or PAIR_KERNEL, where they are of numbers of 16 bits, see integer_rows in query.h,
 *   pair_codes(codes, part)    bytes 0 and 2 of each lane, or 1 and 3, widened
 *   pair(sum, codes, query)    sum + the products of the two numbers of each lane with those of query */
#define INTEGER_SCORES
INLINE vu dot_codes(int precision, vw word, int s) {
    switch (precision) {
#define DOT_CODES(name, id, bits, scale, products, with) KVQ_IF_WHOLE(products, case id: return dot_codes_##name(word, s);)
        KVQ_WIDTHS(DOT_CODES, )
#undef DOT_CODES
    default: return (vu){0};
    }
}
INLINE int32_t dot_offset(int precision) {
    switch (precision) {
#define DOT_OFFSET(name, id, bits, scale, products, with) KVQ_IF_WHOLE(products, case id: return dot_offset_##name;)
        KVQ_WIDTHS(DOT_OFFSET, )
#undef DOT_OFFSET
    default: return 0;
    }
}

/* sum + what a part of a query comes to with a tile's codes. */
INLINE vi dot_part(vi sum, vu codes, int part, int32_t query) {
#ifdef PAIR_KERNEL
    return pair(sum, pair_codes(codes, part), query);
#else
    return (void)part, dot(sum, codes, query);
#endif
}

/* Scores before the keys' scales, from what the parts of a query come to with a tile's codes, `offset` more than levels. */
INLINE vf whole_score(int precision, int32_t offset, const kvq_integer_query *integer, const vi *sum) {
    vf total = splat(0);
    for (int part = 0; part < QUERY_SUMS; part++)
        total = total * QUERY_BASE + to_float(sum[part] - offset * integer->sums[part]);
    return total * (integer->scale * (1.0f / parts_of(precision)));
}

/* The same by integer dot products for a few tiles: the query in parts, the codes as bytes. */
INLINE void tile_scores_integer(int precision, int heads, int tiles, const uint32_t *tile, int words,
                                const kvq_integer_query *integer, const int32_t *query, int stride,
                                vf acc[][SCORE_VECTORS]) {
    const int steps = 8 / low_bits_of(precision), vectors = tiles * TILE_VECTORS, low = low_words_of(precision, words);
    vi sum[DECODE_HEADS][QUERY_SUMS][SCORE_VECTORS];
    for (int g = 0; g < heads; g++)
        for (int part = 0; part < QUERY_SUMS; part++)
            for (int v = 0; v < vectors; v++) sum[g][part][v] = (vi){0};
    for (int j = 0; j < low; j++) {
        vw word[SCORE_VECTORS];
        vu codes[SCORE_VECTORS];
        for (int v = 0; v < vectors; v++) {
            const uint32_t *first = tile + v / TILE_VECTORS * words * TILE + v % TILE_VECTORS * LANES;
            word[v] = load_words(precision, first, TILE, low, j);
        }
        UNROLL
        for (int s = 0; s < steps; s++) {
            for (int v = 0; v < vectors; v++) codes[v] = dot_codes(precision, word[v], s);
            for (int g = 0; g < heads; g++)
                for (int part = 0; part < QUERY_PARTS; part++) {
                    const int32_t q = query[g * stride + (part * steps + s) * low + j];
                    vi *own = sum[g][part % QUERY_SUMS];
                    for (int v = 0; v < vectors; v++) own[v] = dot_part(own[v], codes[v], part, q);
                }
        }
    }
    for (int g = 0; g < heads; g++)
        for (int v = 0; v < vectors; v++) {
            vi parts[QUERY_SUMS];
            for (int part = 0; part < QUERY_SUMS; part++) parts[part] = sum[g][part][v];
            acc[g][v] = whole_score(precision, dot_offset(precision), integer + g, parts);
        }
}
#endif

/* Whether all slots of a tile of a page, which begins at a slot of its arrays, hold tokens. */
INLINE int is_full(const kvq_page *page, int slot) {
    return slot + TILE <= (page->count == page->period || !page->first ? page->count : 0);
}

/* -FLT_MAX in those of LANES slots of a window that hold no token: where its tokens begin somewhere else than at slot 0. */
NOINLINE vf hide_empty_of_ring(const kvq_page *page, int slot, vf score) {
    for (int i = 0; i < LANES; i++)
        if (!holds_token(page, slot + i)) score[i] = -FLT_MAX;
    return score;
}

/* The same of any page. */
INLINE vf hide_empty(const kvq_page *page, int slot, vf score) {
    if (page->first) return hide_empty_of_ring(page, slot, score);
    return select_f(lane_numbers() + slot < page->count, score, splat(-FLT_MAX));
}

/* The keys of a page, and what some query heads from `head` on bring to them. */
typedef struct {
    const kvq_task *task;
    const kvq_page *page;
    int head, words;
    const uint32_t *keys;   /* the first tile */
    const uint16_t *scales; /* of the first slot */
    const float *query;
    const int32_t *parts;   /* of the first head, see integer_words */
    int stride;             /* to the next one's */
} page_keys;

INLINE page_keys keys_of(int precision, const kvq_task *task, const kvq_page *page, size_t vector_row, int head) {
    const int d = task->pass->head_dim, words = words_per_vector(precision, d), stride = integer_words_all(d);
    return (page_keys){
        .task = task,
        .page = page,
        .head = head,
        .words = words,
        .keys = key_tile(page, vector_row, words, 0),
        .scales = page->key_scales + vector_row * page->capacity + page->begin,
        .query = task->query + (size_t)head * task->padded_dim,
        .parts = parts_of(precision) ? task->words + (size_t)head * stride + integer_words_start(precision, d) : NULL,
        .stride = stride,
    };
}

/* The scores of a tile from slot t of a page on, from acc, which are without the keys' scales and have the tile's first vector at
 * `at`, to [heads, TILE]; `top` are the largest ones so far, lane by lane. */
INLINE void end_tile(int precision, int heads, const page_keys *of, int t, const vf acc[][SCORE_VECTORS], int at, float *scores,
                     vf *top) {
    const kvq_task *task = of->task;
    const int first = of->page->begin + t, full = is_full(of->page, first);
    const float *products = NULL;
    int low = 0, high = 0;
    if (page_turns(task, of->page) && tile_blocks(task, of->page, first, &low, &high)) products = products_of(task, of->head);
    for (int v = 0; v < TILE_VECTORS; v++) {
        const int slot = first + v * LANES;
        const vf scale = has_scale(precision) ? load_halves(of->scales + t + v * LANES) : splat(1);
        const vi own = products ? slot_blocks(of->page, slot, low, high) : (vi){0};
        UNROLL
        for (int g = 0; g < heads; g++) {
            vf score = rounded(acc[g][at + v] * scale);
            if (products) {
                const int blocks = task->turns->blocks;
                score += slot_products(products + (size_t)g * blocks, blocks, own, low, high);
            }
            if (!full) score = hide_empty(of->page, slot, score);
            store_f(scores + g * TILE + v * LANES, score);
            top[g] = max_f(top[g], score);
        }
    }
}

/* Scores of a few tiles from slot t of a page on, to those of the page; `top` as in end_tile. */
INLINE void few_scores(int precision, int heads, int tiles, const page_keys *of, int t, float *scores, vf *top) {
    const uint32_t *tile = of->keys + (size_t)t * of->words;
    vf acc[DECODE_HEADS][SCORE_VECTORS];
#ifdef INTEGER_SCORES
    if (parts_of(precision) && of->task->pass->head_dim <= MOST_INTEGER) {
        tile_scores_integer(precision, heads, tiles, tile, of->words, of->task->integer + of->head, of->parts, of->stride, acc);
    } else
#endif
#ifdef HALF_REGISTERS
    if (precision == KVQ_HALF) {
        half_tile_scores(heads, tile, of->words, of->query, acc);
    } else
#endif
        tile_scores(precision, heads, tile, of->words, of->query, of->task->padded_dim, acc);
    UNROLL
    for (int i = 0; i < tiles; i++)
        end_tile(precision, heads, of, t + i * TILE, acc, i * TILE_VECTORS, scores + (t + i * TILE) * heads, top);
}

/* Scores of `heads` query heads over a page. `next` is what is read after it. */
INLINE void page_scores(int precision, int heads, const kvq_task *task, const kvq_page *page, size_t vector_row, int head,
                        int slots, float *scores, vf *top, const char *next) {
    page_keys of = keys_of(precision, task, page, vector_row, head);
    const int most = DOT_TILES > 1 && parts_of(precision) ? DOT_TILES : 1;
#ifdef HALF_REGISTERS
    float pairs[DECODE_HEADS * (MOST_CHANNELS + 2 * LANES)];
    if (precision == KVQ_HALF) pair_channels(heads, of.query, task->padded_dim, of.words, pairs), of.query = pairs;
#endif
    int t = 0;
    for (; t + most * TILE <= slots; t += most * TILE) {
        prefetch(next + (size_t)t * of.words * 4, most * of.words * TILE * 4);
        few_scores(precision, heads, most, &of, t, scores, top);
    }
    if (most == 1 || t == slots) return;
    prefetch(next + (size_t)t * of.words * 4, of.words * TILE * 4);
    few_scores(precision, heads, 1, &of, t, scores, top);
}

/* A function for each precision and number of heads: both are constants in it. */
typedef void (*scores_function)(const kvq_task *task, const kvq_page *page, size_t vector_row, int head, int slots,
                                float *scores, vf *top, const char *next);
#define SCORES(name, id, bits, scale, products, heads)                                                               \
    NOINLINE void scores_##name##_##heads(const kvq_task *task, const kvq_page *page, size_t vector_row, int head,  \
                                          int slots, float *scores, vf *top, const char *next) {                    \
        page_scores(id, heads, task, page, vector_row, head, slots, scores, top, next);                             \
    }
KVQ_WIDTHS(SCORES, 1) KVQ_WIDTHS(SCORES, 2) KVQ_WIDTHS(SCORES, 3) KVQ_WIDTHS(SCORES, 4)
static const scores_function SCORES_OF[][DECODE_HEADS] = TABLE_OF(scores);

#endif
