/* Keys of few bits are stored less a mean that turns with the position, see kvq_turns: what scores and expanded keys get
 * back. A query head's product with the mean is one number for each block of positions, made before its pages are read. */
#ifndef KVQ_TURNS_H
#define KVQ_TURNS_H

#include "../kernel.h"
#include "tiles.h"
#include "vector.h"

/* Blocks that are worked on together: in whole registers, and KVQ_TURN_BLOCKS are so many times them. */
#define BLOCK_VECTORS 4

/* The products of a query head, prepared and scaled, with the means of the blocks [first, end), rounded outwards; 0 for all
 * others. What a block gets does not depend on how many there are. */
static void turned_products(const kvq_task *task, int head, int first, int end, float *products) {
    const kvq_turns *turns = task->turns;
    const int d = task->pass->head_dim, rows = turns->rows, blocks = turns->blocks, step = BLOCK_VECTORS * LANES;
    const size_t vector_row = (size_t)task->layer * task->pass->kv_heads + head / task->group;
    const float *across = turns->across + vector_row * d * rows, *query = task->query + (size_t)head * task->padded_dim;
    const float *waves = turns->waves + (size_t)turns->which[task->layer] * rows * blocks;
    float factor[KVQ_TURN_MOST_ROWS];
    for (int r = 0; r < rows; r += 16) {
        vf sum[16 / LANES];
        for (int v = 0; v < 16 / LANES; v++) sum[v] = splat(0);
        for (int c = 0; c < d; c++)
            for (int v = 0; v < 16 / LANES; v++) sum[v] += load_f(across + (size_t)c * rows + r + v * LANES) * query[c];
        for (int v = 0; v < 16 / LANES; v++) store_f(factor + r + v * LANES, sum[v]);
    }
    for (int b = 0; b < blocks; b += step) {
        vf sum[BLOCK_VECTORS];
        for (int v = 0; v < BLOCK_VECTORS; v++) sum[v] = splat(0);
        for (int r = 0; b < end && b + step > first && r < rows; r++)
            for (int v = 0; v < BLOCK_VECTORS; v++) sum[v] += load_f(waves + (size_t)r * blocks + b + v * LANES) * factor[r];
        for (int v = 0; v < BLOCK_VECTORS; v++) store_f(products + b + v * LANES, sum[v]);
    }
}

/* The mean of one block for a KV head, [padded_dim]. */
static void turned_mean(const kvq_task *task, size_t vector_row, int block, float *mean) {
    const kvq_turns *turns = task->turns;
    const int d = task->pass->head_dim, whole = d / LANES * LANES, rows = turns->rows;
    const float *vectors = turns->vectors + vector_row * rows * d;
    const float *waves = turns->waves + (size_t)turns->which[task->layer] * rows * turns->blocks + block;
    memset(mean, 0, sizeof(float) * task->padded_dim);
    for (int r = 0; r < rows; r++, vectors += d) {
        const float factor = waves[(size_t)r * turns->blocks];
        for (int c = 0; c < whole; c += LANES) store_f(mean + c, load_f(mean + c) + load_f(vectors + c) * factor);
        for (int c = whole; c < d; c++) mean[c] += vectors[c] * factor;
    }
}

/* The blocks of the tokens in a tile of a page from slot `first` of its arrays on; a slot without a token has that of one
 * with. Returns the number of tokens, whose blocks are ascending from `low` to `high`. */
INLINE int tile_blocks(const kvq_task *task, const kvq_page *page, int first, int32_t *block, int *low, int *high) {
    const int behind = page->first + page->count, begin = first > page->first ? first : page->first;
    const int end = first + TILE < behind ? first + TILE : behind, last = task->turns->blocks - 1;
    if (begin >= end) return 0;
    for (int s = 0; s < TILE; s++) {
        const int slot = first + s < begin ? begin : first + s < end ? first + s : end - 1;
        const uint32_t own = (uint32_t)page->positions[slot] / KVQ_TURN_BLOCK;
        block[s] = own > (uint32_t)last ? last : (int32_t)own;
    }
    *low = block[0], *high = block[TILE - 1];
    return end - begin;
}

INLINE vi load_i(const int32_t *p) { vi x; memcpy(&x, p, sizeof x); return x; }

#define FEW_BLOCKS 4 /* of a tile, that are gone through one by one */

/* Scores [heads, TILE] get the products [heads, blocks of turns] with the means of their blocks, see tile_blocks. */
INLINE void add_products(int heads, const kvq_turns *turns, const float *products, const int32_t *block, int low, int high,
                         float *scores) {
    const size_t blocks = turns->blocks;
    if (high - low >= FEW_BLOCKS) {
        for (int g = 0; g < heads; g++)
            for (int s = 0; s < TILE; s++) scores[g * TILE + s] += products[g * blocks + block[s]];
        return;
    }
    for (int v = 0; v < TILE; v += LANES) {
        const vi own = load_i(block + v);
        for (int g = 0; g < heads; g++) {
            vf more = splat(products[g * blocks + low]);
            for (int b = low + 1; b <= high; b++) more = select_f(own >= b, splat(products[g * blocks + b]), more);
            store_f(scores + g * TILE + v, load_f(scores + g * TILE + v) + more);
        }
    }
}

/* The products with a query head and those behind it. */
INLINE const float *products_of(const kvq_task *task, int head) {
    return task->turned + (size_t)(head - task->first_kv_head * task->group) * task->turns->blocks;
}

/* Scores [heads, TILE] of a tile of a page get the products with the means of their blocks. */
INLINE void add_turned(int heads, const kvq_task *task, const kvq_page *page, int head, int first, float *scores) {
    int32_t block[TILE];
    int low, high;
    if (!tile_blocks(task, page, first, block, &low, &high)) return;
    add_products(heads, task->turns, products_of(task, head), block, low, high, scores);
}

/* A tile of expanded keys [head_dim, KEY_BLOCK] gets the means of their blocks. */
INLINE void add_means(const kvq_task *task, const kvq_page *page, size_t vector_row, int first, float *keys) {
    const int d = task->pass->head_dim;
    int32_t block[TILE];
    float mean[MOST_CHANNELS];
    int low, high;
    if (!tile_blocks(task, page, first, block, &low, &high)) return;
    for (int s = 0; s < TILE; s++) {
        if (s && block[s] == block[s - 1]) continue;
        turned_mean(task, vector_row, block[s], mean);
        for (int v = 0; v < TILE; v += LANES) {
            const vi own = load_i(block + v) == block[s];
            for (int c = 0; c < d; c++) {
                float *at = keys + c * KEY_BLOCK + v;
                store_f(at, load_f(at) + select_f(own, splat(mean[c]), splat(0)));
            }
        }
    }
}

#endif
