/* Several new tokens over one chunk of pages, by tiles: codes become bytes once for all of them. What a token gets is to the
 * bit what decode_item gives it alone: sums of whole numbers do not depend on their order, and everything else is done by the
 * same code or in the same order. */
#ifndef KVQ_TILE_ROWS_H
#define KVQ_TILE_ROWS_H

#include "some_rows.h"
#include "tile_scores.h"
#include "tile_values.h"

USES_TILES static void rows_over_chunk(some_rows *s, int chunk) {
    const int begin = s->task->chunk[chunk], end = s->task->chunk[chunk + 1];
    memset(s->at, 0, sizeof s->at);
    for (int r = 0; r < s->rows; r++) s->top[r] = splat(-FLT_MAX), s->softmax[r] = (softmax_sums){splat(0), splat(0), splat(0)};
    chunk_scores_of_rows(s, begin, end);
    for (int r = 0; r < s->rows; r++) s->maximum[r] = max_lanes(s->top[r]);
    memset(s->at, 0, sizeof s->at);
    for (int t = 0; t < s->tokens; t++) memset(partial_of(s, t, chunk), 0, s->heads * partial_bytes(s->task));
    chunk_values_of_rows(s, chunk, begin, end);
    for (int r = 0; r < s->rows; r++) {
        char *partial = partial_of(s, r / s->heads, chunk) + r % s->heads * partial_bytes(s->task);
        end_partial(s->maximum[r], s->softmax + r, (kvq_partial *)partial);
    }
}

/* Cut the arrays out of memory that starts on a cache line; returns their size. */
static size_t make_rows(some_rows *s, char *memory) {
    const int d = s->task->pass->head_dim;
    size_t used = 0;
    s->rows = s->tokens * s->heads, s->blocks = (s->rows + TILE_SIDE - 1) / TILE_SIDE;
    const size_t rows = (size_t)s->blocks * TILE_SIDE;
    s->channels = (d + LANES - 1) / LANES * LANES, s->gathered = -1, s->depth = 0;
#define DEPTH(name, id, bits, scale, products, with) \
    KVQ_IF_WHOLE(products, if (4 * integer_words(id, d) > s->depth) s->depth = 4 * integer_words(id, d);)
    KVQ_WIDTHS(DEPTH, )
#undef DEPTH
    s->depth = (s->depth + TILE_BYTES - 1) / TILE_BYTES * TILE_BYTES;
    s->query = kvq_part(memory, &used, QUERY_PARTS * rows * s->depth);
    s->key = kvq_part(memory, &used, (size_t)s->depth * TILE);
    s->weight = kvq_part(memory, &used, WEIGHT_PARTS * rows * SEGMENT);
    s->product = kvq_part(memory, &used, sizeof *s->product * QUERY_PARTS * rows * LANES);
    s->value = kvq_part(memory, &used, (size_t)s->channels * SEGMENT);
    s->sum = kvq_part(memory, &used, sizeof *s->sum * WEIGHT_PARTS * s->channels * rows);
    s->top = kvq_part(memory, &used, sizeof *s->top * rows);
    s->softmax = kvq_part(memory, &used, sizeof *s->softmax * rows);
    s->maximum = kvq_part(memory, &used, sizeof *s->maximum * rows);
    s->unit = kvq_part(memory, &used, sizeof *s->unit * rows);
    s->inverse = kvq_part(memory, &used, sizeof *s->inverse * rows);
    s->scores = kvq_part(memory, &used, sizeof *s->scores * ((size_t)s->rows * s->room + LANES));
    return used;
}

static size_t rows_bytes(const kvq_task *task, int tokens, int room) {
    some_rows s = {.task = task, .tokens = tokens, .room = room};
    s.heads = task->group < DECODE_HEADS ? task->group : DECODE_HEADS;
    return tokens < FEWEST_TOGETHER ? 0 : make_rows(&s, NULL);
}

/* See decode_rows of kvq_kernel. */
USES_TILES static void rows_by_tiles(const kvq_task *task, int tokens, size_t item, char *memory) {
    const int kv_head = item_head(task, item), chunk = item_chunk(task, item);
    some_rows s = {.task = task, .tokens = tokens, .vector_row = (size_t)task->layer * task->pass->kv_heads + kv_head};
    if (tokens < FEWEST_TOGETHER) {
        decode_each(task, tokens, item, memory);
        return;
    }
    for (int t = 0; t < tokens; t++) s.room = task[t].chunk_room > s.room ? task[t].chunk_room : s.room;
    open_tiles();
    for (int g = 0; g < task->group; g += DECODE_HEADS) {
        s.heads = task->group - g < DECODE_HEADS ? task->group - g : DECODE_HEADS;
        s.head = kv_head * task->group + g;
        make_rows(&s, memory);
        rows_over_chunk(&s, chunk);
    }
    _tile_release(); /* a thread that holds tiles is dear to switch */
}

#endif
