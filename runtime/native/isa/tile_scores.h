/* Scores of some rows over the keys of a chunk, by tiles. */
#ifndef KVQ_TILE_SCORES_H
#define KVQ_TILE_SCORES_H

#include "some_rows.h"

/* The queries' bytes for keys of a precision, a part of all rows after the other. */
static void gather_queries(some_rows *s, int precision) {
    const int d = s->task->pass->head_dim, n = integer_words(precision, d), all = integer_words_all(d);
    const size_t start = integer_words_start(precision, d), rows = (size_t)s->blocks * TILE_SIDE;
    if (s->gathered == precision) return;
    s->gathered = precision;
    if (4 * n < s->depth) memset(s->query, 0, QUERY_PARTS * rows * s->depth); /* what is behind the words counts nothing */
    for (int part = 0; part < QUERY_PARTS; part++)
        for (int t = 0; t < s->tokens; t++)
            for (int g = 0; g < s->heads; g++)
                memcpy(s->query + (part * rows + t * s->heads + g) * s->depth,
                       s->task[t].words + (size_t)(s->head + g) * all + start + part * n, sizeof(int32_t) * n);
}

/* A tile of keys as signed bytes, in the order of integer words. */
INLINE void key_bytes(int precision, const uint32_t *tile, int words, uint32_t *to) {
    const int low = low_words_of(precision, words), steps = 8 / low_bits_of(precision);
    const __m512i offset = _mm512_set1_epi8((char)dot_offset(precision));
    for (int j = 0; j < low; j++) {
        const vw word = load_words(precision, tile, TILE, low, j);
        UNROLL
        for (int i = 0; i < steps; i++)
            _mm512_store_si512(to + (i * low + j) * LANES, _mm512_sub_epi8((__m512i)dot_codes(precision, word, i), offset));
    }
}

/* product = the queries' parts times a tile of keys. */
USES_TILES INLINE void dot_keys(const some_rows *s) {
    const int blocks = s->blocks;
    const size_t depth = s->depth;
    for (int part = 0; part < QUERY_PARTS; part++) {
        const uint8_t *rows = s->query + part * blocks * TILE_SIDE * depth;
        int32_t *sums = s->product + part * blocks * SUMS;
#define BEGIN(n, row) _tile_zero(n);
#define DOT(n, row)                                                  \
    _tile_loadd(row, rows + n * TILE_SIDE * depth + k, depth);       \
    _tile_dpbssd(n, row, 7);
#define END(n, row) _tile_stored(n, sums + n * SUMS, TILE_BYTES);
        FOR_BLOCKS(blocks, BEGIN)
        for (size_t k = 0; k < depth; k += TILE_BYTES) {
            _tile_loadd(7, s->key + k / 4 * LANES, TILE_BYTES);
            FOR_BLOCKS(blocks, DOT)
        }
        FOR_BLOCKS(blocks, END)
#undef BEGIN
#undef DOT
#undef END
    }
}

/* Scores of all rows over page p, which they share. */
USES_TILES INLINE void scores_together(int precision, some_rows *s, int p, int most) {
    const kvq_task *task = s->task;
    const kvq_page *first = page_of(s, 0, p);
    const int words = words_per_vector(precision, task->pass->head_dim), part = s->blocks * SUMS;
    gather_queries(s, precision);
    for (int slot = 0; slot < most; slot += TILE) {
        key_bytes(precision, key_tile(first, s->vector_row, words, slot / TILE), words, s->key);
        dot_keys(s);
        for (int t = 0; t < s->tokens; t++) {
            if (slot >= s->slots[t]) continue;
            const kvq_page *page = page_of(s, t, p);
            const int32_t *dots = s->product + t * s->heads * LANES;
            vf acc[DECODE_HEADS][SCORE_VECTORS];
            for (int g = 0; g < s->heads; g++, dots += LANES) {
                const uint32_t *from = (const uint32_t *)dots;
                const vi sum[QUERY_PARTS] = {(vi)load_u(from), (vi)load_u(from + part)};
                acc[g][0] = whole_score(precision, 0, task[t].integer + s->head + g, sum);
            }
            const page_keys of = keys_of(precision, task + t, page, s->vector_row, s->head);
            end_tile(precision, s->heads, &of, slot, acc, 0, scores_of(s, t) + (s->at[t] + slot) * s->heads,
                     s->top + t * s->heads);
        }
    }
}

USES_TILES static void chunk_scores_of_rows(some_rows *s, int begin, int end) {
    for (int p = begin; p < end; p++) {
        const int precision = page_of(s, 0, p)->key_precision, most = look_at(s, p);
        if (most <= 0) continue;
        if (parts_of(precision) && s->shared) {
            FOR_WIDTH(precision, scores_together(PRECISION, s, p, most))
        } else {
            for (int t = 0; t < s->tokens; t++) {
                const kvq_page *page = page_of(s, t, p);
                const char *near = codes_at(s->task + t, page, s->vector_row, 1);
                SCORES_OF[width_number(precision)][s->heads - 1](s->task + t, page, s->vector_row, s->head, s->slots[t],
                                                                 scores_of(s, t) + s->at[t] * s->heads,
                                                                 s->top + t * s->heads, near);
            }
        }
        for (int t = 0; t < s->tokens; t++) s->at[t] += s->slots[t];
    }
}

#endif
