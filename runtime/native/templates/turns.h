/* Keys of few bits are stored less a mean that turns with the position, see kvq_turns: what scores and expanded keys get
 * back. A query head's product with the mean is one number for each block of positions, made before its pages are read. */
#ifndef KVQ_TURNS_H
#define KVQ_TURNS_H

#include "../kernel.h"
#include "tiles.h"
#include "vector.h"

/* Blocks that are worked on together: in whole registers, and KVQ_TURN_BLOCKS are so many times them. */
#define BLOCK_VECTORS 4

/* The products of a query with the vectors of a KV head: factor [rows]. */
INLINE void turn_factors(const kvq_turns *turns, const float *across, const float *query, int d, float *factor) {
    const int rows = turns->rows;
    for (int r = 0; r < rows; r += 16) {
        vf sum[16 / LANES];
        for (int v = 0; v < 16 / LANES; v++) sum[v] = splat(0);
        for (int c = 0; c < d; c++)
            for (int v = 0; v < 16 / LANES; v++) sum[v] += load_f(across + (size_t)c * rows + r + v * LANES) * query[c];
        for (int v = 0; v < 16 / LANES; v++) store_f(factor + r + v * LANES, sum[v]);
    }
}

/* turned_products of `heads` query heads of a KV head, which share what they read of the waves. */
INLINE void turn_heads(int heads, const kvq_task *task, int head, int first, int end, float *products) {
    const kvq_turns *turns = task->turns;
    const int d = task->pass->head_dim, rows = turns->rows, blocks = turns->blocks, step = BLOCK_VECTORS * LANES;
    const size_t vector_row = (size_t)task->layer * task->pass->kv_heads + head / task->group;
    const float *across = turns->across + vector_row * d * rows;
    const float *waves = turns->waves + (size_t)turns->which[task->layer] * rows * blocks;
    float factor[DECODE_HEADS][KVQ_TURN_MOST_ROWS];
    for (int g = 0; g < heads; g++)
        turn_factors(turns, across, task->query + (size_t)(head + g) * task->padded_dim, d, factor[g]);
    for (int b = 0; b < blocks; b += step) {
        vf sum[DECODE_HEADS][BLOCK_VECTORS];
        for (int g = 0; g < heads; g++)
            for (int v = 0; v < BLOCK_VECTORS; v++) sum[g][v] = splat(0);
        for (int r = 0; b < end && b + step > first && r < rows; r++)
            for (int v = 0; v < BLOCK_VECTORS; v++) {
                const vf wave = load_f(waves + (size_t)r * blocks + b + v * LANES);
                for (int g = 0; g < heads; g++) sum[g][v] += wave * factor[g][r];
            }
        for (int g = 0; g < heads; g++)
            for (int v = 0; v < BLOCK_VECTORS; v++) store_f(products + (size_t)g * blocks + b + v * LANES, sum[g][v]);
    }
}

/* The products of a KV head's query heads, prepared and scaled, with the means of the blocks [first, end), rounded outwards;
 * 0 for all others: products [group, blocks]. What a block gets does not depend on how many there are. */
static void turned_products(const kvq_task *task, int kv_head, int first, int end, float *products) {
    const size_t blocks = task->turns->blocks;
    for (int g = 0; g < task->group; g += DECODE_HEADS) {
        const int head = kv_head * task->group + g;
        switch (task->group - g) {
        case 1: turn_heads(1, task, head, first, end, products + g * blocks); break;
        case 2: turn_heads(2, task, head, first, end, products + g * blocks); break;
        case 3: turn_heads(3, task, head, first, end, products + g * blocks); break;
        default: turn_heads(DECODE_HEADS, task, head, first, end, products + g * blocks);
        }
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

/* The block of a slot's token; one of those that there are, whatever its position is. */
INLINE int block_of(const kvq_turns *turns, const kvq_page *page, int slot) {
    const uint32_t own = (uint32_t)page->positions[slot] / KVQ_TURN_BLOCK, last = (uint32_t)turns->blocks - 1;
    return (int)(own > last ? last : own);
}

/* The first and the last block of the tokens in a tile of a page from slot `first` of its arrays on. Returns their number. */
INLINE int tile_blocks(const kvq_task *task, const kvq_page *page, int first, int *low, int *high) {
    const int behind = page->first + page->count, begin = first > page->first ? first : page->first;
    const int end = first + TILE < behind ? first + TILE : behind;
    if (begin >= end) return 0;
    *low = block_of(task->turns, page, begin), *high = block_of(task->turns, page, end - 1);
    return end - begin;
}

/* The blocks of LANES slots of a tile; those without a token have any from low to high. */
INLINE vi slot_blocks(const kvq_page *page, int slot, int low, int high) {
    const int left = page->first + page->count - slot; /* there need not be room for a whole tile of positions */
    vu position = {0};
    if (left >= LANES) memcpy(&position, page->positions + slot, sizeof position);
    else if (left > 0) memcpy(&position, page->positions + slot, sizeof *page->positions * left);
    vi block = (vi)(position / KVQ_TURN_BLOCK);
    block = select_i(block < low, (vi){0} + low, block);
    return select_i(block > high, (vi){0} + high, block);
}

#define NEAR_BLOCKS (4 * LANES) /* of a tile, that are found register by register */

/* Of blocks that are farther apart; a function of its own, so that lanes are taken apart only where it is called. */
NOINLINE vf far_products(const float *products, vi own) {
    vf found;
    for (int i = 0; i < LANES; i++) found[i] = products[own[i]];
    return found;
}

/* What those slots get of a query head's products with the means of all blocks. */
INLINE vf slot_products(const float *products, int blocks, vi own, int low, int high) {
    if (high - low >= NEAR_BLOCKS) return far_products(products, own);
    vf found = splat(0);
    for (int b = low; b <= high; b += LANES) {
        const int from = b + LANES <= blocks ? b : blocks - LANES;
        const vf near = take_lanes(load_f(products + from), own - from);
        found = b == low ? near : select_f(own >= b, near, found);
    }
    return found;
}

/* The products with a query head and those behind it. */
INLINE const float *products_of(const kvq_task *task, int head) {
    return task->turned + (size_t)(head - task->first_kv_head * task->group) * task->turns->blocks;
}

/* A tile of expanded keys [head_dim, KEY_BLOCK] gets the means of their blocks. */
INLINE void add_means(const kvq_task *task, const kvq_page *page, size_t vector_row, int first, float *keys) {
    const int d = task->pass->head_dim;
    float mean[MOST_CHANNELS];
    int low, high, before = -1;
    const int tokens = tile_blocks(task, page, first, &low, &high), begin = page->first > first ? page->first - first : 0;
    for (int s = begin; s < begin + tokens; s++) { /* only those: the blocks of other slots may be any */
        const int block = slot_blocks(page, first + s / LANES * LANES, low, high)[s % LANES];
        if (block == before) continue;
        turned_mean(task, vector_row, before = block, mean);
        for (int v = 0; v < TILE; v += LANES) {
            const vi own = slot_blocks(page, first + v, low, high) == block;
            for (int c = 0; c < d; c++) {
                float *at = keys + c * KEY_BLOCK + v;
                store_f(at, load_f(at) + select_f(own, splat(mean[c]), splat(0)));
            }
        }
    }
}

#endif
