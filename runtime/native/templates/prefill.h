/* Several new tokens: flash attention of a block of query rows over all pages and the new tokens (Dao et al.,
 * arXiv 2205.14135). Blocks of keys and values are expanded to floats, then two dense products do the work. */
#ifndef KVQ_PREFILL_H
#define KVQ_PREFILL_H

#include <stdlib.h>

#include "expand.h"
#include "product.h"

/* The running softmax of query rows: new tokens from first_token on, the query heads of a token side by side. */
typedef struct {
    float *rows, *sums;            /* [count, depth]: queries; values weighted so far */
    float *scores;                 /* [count, KEY_BLOCK] */
    vf *maximum, *total, *squares; /* [count]: the maximum in every lane; sums lane by lane */
    int count, group, first_token; /* count: in whole PRODUCT_ROWS */
    int window, position;          /* of the layer, 0: none; of first_token in the text */
} query_rows;

/* Scores of a row become softmax weights, with 0 from `seen` on; returns what earlier sums are multiplied by. */
INLINE vf softmax_row(query_rows *q, int r, int seen, int columns) {
    float *row = q->scores + (size_t)r * KEY_BLOCK;
    for (int t = seen; t < columns; t++) row[t] = -FLT_MAX;
    vf top = q->maximum[r], total = splat(0), squares = splat(0);
    for (int t = 0; t < columns; t += LANES) top = max_f(top, load_f(row + t));
    top = max_everywhere(top);
    for (int t = 0; t < columns; t += LANES) {
        const vf e = exp_f(load_f(row + t) - top);
        total += e;
        squares += e * e;
        store_f(row + t, e);
    }
    const vf keep = exp_f(q->maximum[r] - top);
    q->total[r] = q->total[r] * keep + total;
    q->squares[r] = q->squares[r] * keep * keep + squares;
    q->maximum[r] = top;
    return keep;
}

/* Scores of tokens outside of the window become those of none. A row that sees none of a block gives each of them the same
 * weight, which is multiplied by nothing when it comes to a token that it sees, itself at the latest. */
static void hide_old(query_rows *q, int first, int columns, const int32_t *position) {
    for (int r = first; r < first + PRODUCT_ROWS; r++) {
        const int start = q->position + r / q->group - q->window + 1;
        float *row = q->scores + (size_t)r * KEY_BLOCK;
        for (int t = 0; t < columns; t++)
            if (position[t] < start) row[t] = -FLT_MAX;
    }
}

/* Merge a block into the softmax. Its tokens are new ones from `begin` on, of which a row sees those up to its own;
 * with begin < 0 all rows see all that their window has. Without one every row has to see some token of the first block. */
static void merge_block(query_rows *q, int head_dim, int begin, const kvq_block *block) {
    const int before = begin < 0 ? 0 : begin - q->first_token; /* tokens of these rows that come before the block */
    const int first = before > 0 ? before * q->group / PRODUCT_ROWS * PRODUCT_ROWS : 0;
    for (int r = first; r < q->count; r += PRODUCT_ROWS) {
        int seen[PRODUCT_ROWS];
        for (int i = 0; i < PRODUCT_ROWS; i++) {
            const int own = begin < 0 ? block->tokens : (r + i) / q->group + 1 - before;
            seen[i] = own < 0 ? 0 : own < block->tokens ? own : block->tokens;
        }
        const int most = seen[PRODUCT_ROWS - 1]; /* later tokens see more of what is new */
        const int columns = (most + LANES - 1) / LANES * LANES;
        float *scores = q->scores + (size_t)r * KEY_BLOCK;
        vf keep[PRODUCT_ROWS];
        product(NULL, columns, head_dim, q->rows + (size_t)r * block->depth, block->depth, block->keys, KEY_BLOCK,
                scores, KEY_BLOCK);
        if (q->window) hide_old(q, r, most, block->position);
        for (int i = 0; i < PRODUCT_ROWS; i++) keep[i] = softmax_row(q, r + i, seen[i], columns);
        product(keep, block->depth, most, scores, KEY_BLOCK, block->values, block->depth,
                q->sums + (size_t)r * block->depth, block->depth);
    }
}

/* Merge all pages, in blocks as full as whole tiles allow. */
static void merge_pages(const kvq_task *task, size_t vector_row, query_rows *q, kvq_block *block) {
    const kvq_pass *pass = task->pass;
    block->tokens = 0;
    for (int p = 0; p < pass->pages; p++) {
        const kvq_page *page = pass->page + p;
        const int used = slots_of(page);
        for (int begin = 0, slots; begin < used; begin += slots) {
            const int room = (KEY_BLOCK - block->tokens) / TILE * TILE;
            slots = used - begin < room ? used - begin : room;
            expand_page(task, page, vector_row, begin, slots, block);
            if (KEY_BLOCK - block->tokens >= TILE) continue;
            merge_block(q, pass->head_dim, -1, block);
            block->tokens = 0;
        }
    }
    if (block->tokens) merge_block(q, pass->head_dim, -1, block);
}

static int prefill_item(const kvq_task *task, size_t item) {
    const kvq_pass *pass = task->pass;
    const kvq_rows *in = task->rows;
    const int d = pass->head_dim, depth = task->padded_dim, group = task->group;
    const int kv_head = (int)(item % pass->kv_heads);
    const int first = (task->row_blocks - 1 - (int)(item / pass->kv_heads)) * task->row_block; /* the longest one first */
    const int tokens = pass->tokens - first < task->row_block ? pass->tokens - first : task->row_block;
    const int rows = tokens * group, count = (rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS * PRODUCT_ROWS;

    char *memory = NULL, *start = NULL;
    query_rows q = {.count = count, .group = group, .first_token = first, .window = task->window,
                    .position = pass->position + first};
    kvq_block block = {.depth = depth};
    for (int filled = 0; filled < 2; filled++) {
        size_t used = 0;
        q.rows = kvq_part(start, &used, sizeof(float) * count * depth);
        q.sums = kvq_part(start, &used, sizeof(float) * count * depth);
        q.scores = kvq_part(start, &used, sizeof(float) * count * KEY_BLOCK);
        q.maximum = kvq_part(start, &used, sizeof(vf) * count);
        q.total = kvq_part(start, &used, sizeof(vf) * count);
        q.squares = kvq_part(start, &used, sizeof(vf) * count);
        block.keys = kvq_part(start, &used, sizeof(float) * d * KEY_BLOCK);
        block.values = kvq_part(start, &used, sizeof(float) * (KEY_BLOCK * depth + LANES));
        if (filled) break;
        if (!(memory = malloc(used + 64))) return KVQ_NO_MEMORY;
        start = memory + (64 - (uintptr_t)memory % 64) % 64; /* parts start on cache lines, as vectors have to */
    }
    memset(q.rows + (size_t)rows * depth, 0, sizeof(float) * (count - rows) * depth);
    memset(q.sums, 0, sizeof(float) * count * depth);
    for (int r = 0; r < count; r++) {
        q.maximum[r] = splat(-FLT_MAX), q.total[r] = q.squares[r] = splat(0);
        if (r >= rows) continue;
        const float *query = in->query + (first + r / group) * in->query_stride + (kv_head * group + r % group) * d;
        for (int c = 0; c < d; c++) q.rows[(size_t)r * depth + c] = query[c] * task->softmax_scale;
    }
    merge_pages(task, (size_t)task->layer * pass->kv_heads + kv_head, &q, &block);
    const int unseen = q.window && first >= q.window ? (first - q.window + 1) / KEY_BLOCK * KEY_BLOCK : 0;
    for (int begin = unseen; begin < first + tokens; begin += KEY_BLOCK) {
        const int left = first + tokens - begin;
        for (int t = 0; q.window && t < KEY_BLOCK; t++) block.position[t] = pass->position + begin + t;
        expand_new(task, kv_head, begin, left < KEY_BLOCK ? left : KEY_BLOCK, &block);
        merge_block(&q, d, begin, &block);
    }
    for (int r = 0; r < rows; r++) {
        const size_t place = (size_t)(first + r / group) * pass->heads + kv_head * group + r % group;
        const float scale = 1 / sum_lanes(q.total[r]);
        for (int c = 0; c < d; c++) in->out[place * d + c] = q.sums[(size_t)r * depth + c] * scale;
        if (in->row_squares) in->row_squares[place] = sum_lanes(q.squares[r]) * scale * scale;
    }
    free(memory);
    return 0;
}

#endif
