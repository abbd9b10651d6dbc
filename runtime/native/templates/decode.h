/* One new token: scores, softmax and weighted values of one KV head over one chunk of pages. */
#ifndef KVQ_DECODE_H
#define KVQ_DECODE_H

#include "../kernel.h"
#include "scores.h"
#include "vector.h"
#include "weigh.h"
#ifndef DOT_VALUES
INLINE int dot_values_fit(int precision, int words) { return (void)precision, (void)words, 0; }
#endif

/* What a query head's softmax comes to, lane by lane: sums of weights, of their squares, and of their squares when they
 * have been multiplied by the scales of the values. */
typedef struct {
    vf total, squares, scaled_squares;
} softmax_sums;

/* Scores of a page become softmax weights, before their division by the total, times the scales of the values. */
INLINE void softmax_weights(int heads, const kvq_page *page, size_t vector_row, int slots, const float *maximum,
                            float *scores, softmax_sums *sums) {
    const uint16_t *scales = page->value_scales + vector_row * page->capacity + page->begin;
    const int scaled = has_scale(page->value_precision);
    softmax_sums own[DECODE_HEADS];
    for (int g = 0; g < heads; g++) own[g] = sums[g];
    for (int tile = 0; tile < slots; tile += TILE, scores += heads * TILE)
        for (int t = 0; t < TILE; t += LANES) {
            const vf scale = scaled ? load_halves(scales + tile + t) : splat(1);
            for (int g = 0; g < heads; g++) {
                const vf e = exp_f(load_f(scores + g * TILE + t) - maximum[g]), weight = e * scale;
                own[g].total += e;
                own[g].squares += e * e;
                own[g].scaled_squares += weight * weight;
                store_f(scores + g * TILE + t, weight);
            }
        }
    for (int g = 0; g < heads; g++) sums[g] = own[g];
}

/* As prefetch, for the scales of a page's keys or values. */
static void prefetch_scales(const kvq_page *page, size_t vector_row, int of_keys) {
    if (!has_scale(of_keys ? page->key_precision : page->value_precision)) return;
    const uint16_t *scales = (of_keys ? page->key_scales : page->value_scales) + vector_row * page->capacity;
    prefetch((const char *)(scales + page->begin), sizeof(uint16_t) * slots_of(page));
}

/* Scores of some query heads over a chunk, page by page, TILE of each head side by side; `top` are the largest ones. */
INLINE void chunk_scores(int heads, const kvq_task *task, size_t vector_row, int begin, int end, int head,
                         float *scores, vf *top) {
    int at = 0;
    for (int g = 0; g < heads; g++) top[g] = splat(-FLT_MAX);
    for (int p = begin; p < end; p++) {
        const kvq_page *page = task->pass->page + p;
        const int slots = slots_of(page);
        if (slots <= 0) continue;
        const int last = p + 1 == end;
        const char *next = codes_at(task, task->pass->page + (last ? begin : p + 1), vector_row, !last);
        if (!last) prefetch_scales(page + 1, vector_row, 1);
        prefetch_scales(page, vector_row, 0);
        SCORES_OF[width_number(page->key_precision)][heads - 1](task, page, vector_row, head, slots, scores + at * heads,
                                                                top, next);
        at += slots;
    }
}

/* The same for pages from this one on whose values are weighed at once: where `together` all neighbours of its precision,
 * whatever empty pages of others lie between, else it alone. Of them there are `count`; returns their slots. */
INLINE int weigh_softmax(int heads, const kvq_page *page, size_t vector_row, int most, int together, const float *maximum,
                         float *weights, softmax_sums *softmax, int *count) {
    int slots = 0;
    for (int g = 0; g < heads; g++) softmax[g].scaled_squares = splat(0);
    for (*count = 0; *count < most && (together || *count == 0); ++*count) {
        const int more = slots_of(page + *count);
        if (more <= 0) continue;
        if (page[*count].value_precision != page->value_precision) break;
        softmax_weights(heads, page + *count, vector_row, more, maximum, weights + slots * heads, softmax);
        slots += more;
    }
    return slots;
}

/* The values of a chunk, weighted: scores become weights on the way. `after` is what is read when they are done. */
INLINE void chunk_values(int heads, const kvq_task *task, size_t vector_row, int begin, int end, float *weights,
                         const float *maximum, softmax_sums *softmax, float *sums, const char *after) {
    const int stride = (int)(partial_bytes(task) / sizeof(float));
    for (int p = begin, count; p < end; p += count) {
        const kvq_page *page = task->pass->page + p;
        const int words = words_per_vector(page->value_precision, task->pass->head_dim);
        const int together = dot_values_fit(page->value_precision, words);
        const int slots = weigh_softmax(heads, page, vector_row, end - p, together, maximum, weights, softmax, &count);
        if (slots <= 0) continue;
        const char *next = p + count < end ? codes_at(task, page + count, vector_row, 0) : after;
#ifdef DOT_VALUES
        if (together) {
            float squares[DECODE_HEADS];
            for (int g = 0; g < heads; g++) squares[g] = sum_lanes(softmax[g].scaled_squares);
            weigh_run(heads, words, page, count, vector_row, slots, weights, squares, sums, stride, next);
            weights += slots * heads;
            continue;
        }
#endif
        const uint32_t *values = (const uint32_t *)codes_at(task, page, vector_row, 0);
        WEIGH_OF[width_number(page->value_precision)][heads - 1](values, words, slots, weights, sums, stride, next);
        weights += slots * heads;
    }
}

INLINE void end_partial(float maximum, const softmax_sums *softmax, kvq_partial *result) {
    result->maximum = maximum;
    result->total = sum_lanes(softmax->total);
    result->squares = sum_lanes(softmax->squares);
}

INLINE void decode_heads(int heads, const kvq_task *task, int kv_head, int chunk, int head, char *partial,
                         const char *after) {
    const size_t vector_row = (size_t)task->layer * task->pass->kv_heads + kv_head;
    const int begin = task->chunk[chunk], end = task->chunk[chunk + 1];
    float scores[DECODE_HEADS * CHUNK_SLOTS + LANES], maximum[DECODE_HEADS];
    vf top[DECODE_HEADS];
    softmax_sums softmax[DECODE_HEADS];
    chunk_scores(heads, task, vector_row, begin, end, head, scores, top);
    for (int g = 0; g < heads; g++) {
        maximum[g] = max_lanes(top[g]);
        softmax[g] = (softmax_sums){splat(0), splat(0), splat(0)};
    }
    memset(partial, 0, heads * partial_bytes(task));
    chunk_values(heads, task, vector_row, begin, end, scores, maximum, softmax,
                 (float *)(partial + sizeof(kvq_partial)), after);
    for (int g = 0; g < heads; g++)
        end_partial(maximum[g], softmax + g, (kvq_partial *)(partial + g * partial_bytes(task)));
}

static void decode_item(const kvq_task *task, size_t item, size_t next) {
    const int kv_head = item_head(task, item), chunk = item_chunk(task, item);
    const char *after = start_of(task, next);
    char *partial = partials_of(task, kv_head, chunk);
    for (int g = 0; g < task->group; g += DECODE_HEADS, partial += DECODE_HEADS * partial_bytes(task)) {
        const int head = kv_head * task->group + g;
        switch (task->group - g) {
        case 1: decode_heads(1, task, kv_head, chunk, head, partial, after); break;
        case 2: decode_heads(2, task, kv_head, chunk, head, partial, after); break;
        case 3: decode_heads(3, task, kv_head, chunk, head, partial, after); break;
        default: decode_heads(4, task, kv_head, chunk, head, partial, after);
        }
    }
}

/* Token by token: the pages are near from the second one on. */
static void decode_each(const kvq_task *task, int tokens, size_t item, char *memory) {
    (void)memory;
    for (int t = 0; t < tokens; t++) decode_item(task + t, item, item);
}
static size_t needs_none(const kvq_task *task, int tokens, int room) { return (void)task, (void)tokens, (void)room, 0; }

#endif
