/* One new token: scores, softmax and weighted values of one KV head over one chunk of pages.
 * Codes are expanded in registers, once for up to DECODE_HEADS query heads. */
#ifndef KVQ_DECODE_H
#define KVQ_DECODE_H
#include <float.h>

#include "kernel.h"
#include "vector.h"

#define TILE_VECTORS (TILE / LANES)

INLINE const uint32_t *key_tile(const kvq_page *page, size_t vector_row, int words, int tile) {
    return page->keys + (vector_row * (page->capacity / TILE) + page->begin / TILE + tile) * words * TILE;
}

/* Scores of one tile of keys, before the keys' scales, by float arithmetic: acc[head][vector of tokens]. */
INLINE void tile_scores(int bits, int heads, const uint32_t *tile, int words, const float *query, int stride,
                        vf acc[][TILE_VECTORS]) {
    for (int g = 0; g < heads; g++)
        for (int v = 0; v < TILE_VECTORS; v++) acc[g][v] = splat(0);
    for (int j = 0; j < words; j++) {
        vu word[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) word[v] = load_u(tile + j * TILE + v * LANES);
        UNROLL
        for (int i = 0; i < codes_of(bits); i++)
            for (int v = 0; v < TILE_VECTORS; v++) {
                vf x = level(bits, word[v], i);
                for (int g = 0; g < heads; g++) acc[g][v] += x * query[g * stride + i * words + j];
            }
    }
}

#ifdef DOT_KERNEL
/* The same by integer dot products: the query in parts, the codes as bytes offset by DOT_OFFSET. */
INLINE void tile_scores_integer(int bits, int heads, const uint32_t *tile, int words,
                                const kvq_integer_query *integer, const int32_t *query, int stride,
                                vf acc[][TILE_VECTORS]) {
    const int steps = 8 / bits;
    vi sum[DECODE_HEADS][TILE_VECTORS][QUERY_PARTS];
    for (int g = 0; g < heads; g++)
        for (int v = 0; v < TILE_VECTORS; v++)
            for (int part = 0; part < QUERY_PARTS; part++) sum[g][v][part] = (vi){0};
    for (int j = 0; j < words; j++)
        for (int v = 0; v < TILE_VECTORS; v++) {
            vu word = load_u(tile + j * TILE + v * LANES);
            UNROLL
            for (int s = 0; s < steps; s++) {
                vu codes = dot_codes(bits, word, s);
                for (int g = 0; g < heads; g++)
                    for (int part = 0; part < QUERY_PARTS; part++) {
                        int32_t q = query[g * stride + (part * steps + s) * words + j];
                        sum[g][v][part] = dot(sum[g][v][part], codes, q);
                    }
            }
        }
    for (int g = 0; g < heads; g++) {
        float scale = bits == 2 ? integer[g].scale * (1.0f / 3) : integer[g].scale;
        for (int v = 0; v < TILE_VECTORS; v++) {
            vf total = splat(0);
            for (int part = 0; part < QUERY_PARTS; part++)
                total = total * QUERY_BASE + to_float(sum[g][v][part] - DOT_OFFSET(bits) * integer[g].sums[part]);
            acc[g][v] = total * scale;
        }
    }
}
#endif

/* Ask for memory that will be read soon. A page's part of one layer and KV head is a few kilobytes, too short for the
 * processor to foresee the next one. Into the second-level cache: what the first one holds is in use. */
INLINE void prefetch(const char *from, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* Scores of `heads` query heads over a page, -FLT_MAX in slots that hold no token. `next` is what is read after it. */
INLINE void page_scores(int bits, int heads, const kvq_task *task, const kvq_page *page, size_t vector_row, int head,
                        int slots, float *scores, int room, const char *next) {
    const int words = words_per_vector(bits, task->pass->head_dim);
    const float *query = task->query + (size_t)head * task->padded_dim;
    const uint16_t *scales = page->key_scales + vector_row * page->capacity + page->begin;
#ifdef HALF_REGISTERS
    float pairs[DECODE_HEADS * (1024 + 2 * LANES)];
    if (bits == 16) pair_channels(heads, query, task->padded_dim, words, pairs);
#endif
    for (int t = 0; t < slots; t += TILE) {
        vf acc[DECODE_HEADS][TILE_VECTORS];
        const uint32_t *tile = key_tile(page, vector_row, words, t / TILE);
        prefetch(next + (size_t)t * words * 4, words * TILE * 4);
#ifdef DOT_KERNEL
        if (bits <= 8) {
            const int d = task->pass->head_dim, stride = integer_words_all(d);
            const int32_t *parts = task->words + (size_t)head * stride + integer_words_start(bits, d);
            tile_scores_integer(bits, heads, tile, words, task->integer + head, parts, stride, acc);
        } else
#endif
#ifdef HALF_REGISTERS
        if (bits == 16) {
            half_tile_scores(heads, tile, words, pairs, acc);
        } else
#endif
            tile_scores(bits, heads, tile, words, query, task->padded_dim, acc);
        for (int v = 0; v < TILE_VECTORS; v++) {
            vf scale = splat(1);
            if (bits != 16) scale = load_halves(scales + t + v * LANES);
            for (int g = 0; g < heads; g++) store_f(scores + g * room + t + v * LANES, acc[g][v] * scale);
        }
    }
    for (int t = page->first ? 0 : slots - TILE; t < slots; t++)
        if (!holds_token(page, page->begin + t))
            for (int g = 0; g < heads; g++) scores[g * room + t] = -FLT_MAX;
}

/* Registers for sums: a pass over the tokens takes as many codes of a word as they hold for all heads. */
#if LANES == 16 || defined(__aarch64__)
#define SUM_REGISTERS 24
#else
#define SUM_REGISTERS 12
#endif

/* sums[head][channel] += weights[head][token] * level[token][channel] over `slots` tokens of a page. */
INLINE void weigh(int bits, int heads, const uint32_t *values, int words, int slots, const float *weights, int room,
                  float *sums, int stride, const char *next) {
    const int codes = codes_of(bits), most = heads * 8 <= SUM_REGISTERS ? 8 : heads * 4 <= SUM_REGISTERS ? 4 : 2;
    const int at_once = codes < most ? codes : most;
#ifdef HALF_REGISTERS
    if (bits == 16 && words % 8 == 0) {
        half_weigh(heads, values, words, slots, weights, room, sums, stride, next);
        return;
    }
#endif
    if (words % LANES == 0) {
        for (int j = 0; j < words; j += LANES)
            for (int first = 0; first < codes; first += at_once) {
                vf acc[DECODE_HEADS][8];
                for (int g = 0; g < heads; g++)
                    for (int i = 0; i < at_once; i++)
                        acc[g][i] = load_f(sums + g * stride + (first + i) * words + j);
                for (int t = 0; t < slots; t++) {
                    if (t % TILE == 0 && j + first == 0) prefetch(next + (size_t)t * words * 4, words * TILE * 4);
                    vu word = load_u(values + (size_t)t * words + j) >> (first * (32 / codes));
                    UNROLL
                    for (int i = 0; i < at_once; i++) {
                        vf x = level(bits, word, i);
                        for (int g = 0; g < heads; g++) acc[g][i] += x * weights[g * room + t];
                    }
                }
                for (int g = 0; g < heads; g++)
                    for (int i = 0; i < at_once; i++)
                        store_f(sums + g * stride + (first + i) * words + j, acc[g][i]);
            }
    } else if (LANES % words == 0) {
        const int tokens = LANES / words; /* of one vector */
        for (int first = 0; first < codes; first += at_once) {
            vf acc[DECODE_HEADS][8];
            for (int g = 0; g < heads; g++)
                for (int i = 0; i < at_once; i++) acc[g][i] = splat(0);
            for (int t = 0; t < slots; t += tokens) {
                if (t % TILE == 0 && first == 0) prefetch(next + (size_t)t * words * 4, words * TILE * 4);
                vu word = load_u(values + (size_t)t * words) >> (first * (32 / codes));
                vf weight[DECODE_HEADS];
                for (int g = 0; g < heads; g++) weight[g] = spread(weights + g * room + t, tokens);
                UNROLL
                for (int i = 0; i < at_once; i++) {
                    vf x = level(bits, word, i);
                    for (int g = 0; g < heads; g++) acc[g][i] += x * weight[g];
                }
            }
            for (int g = 0; g < heads; g++)
                for (int i = 0; i < at_once; i++) {
                    float lanes[LANES];
                    store_f(lanes, acc[g][i]);
                    for (int lane = 0; lane < LANES; lane++)
                        sums[g * stride + (first + i) * words + lane % words] += lanes[lane];
                }
        }
    } else { /* a head_dim whose words do not line up with the vectors */
        for (int t = 0; t < slots; t++)
            for (int j = 0; j < words; j++)
                for (int i = 0; i < codes; i++) {
                    float x = level(bits, values[(size_t)t * words + j] - (vu){0}, i)[0];
                    for (int g = 0; g < heads; g++) sums[g * stride + i * words + j] += weights[g * room + t] * x;
                }
    }
}

/* Expand the switch once: `call` sees bits and heads as constants and is compiled for each pair. */
#define FOR_HEADS(call)                    \
    switch (heads) {                       \
    case 1: { enum { HEADS = 1 }; call; } break; \
    case 2: { enum { HEADS = 2 }; call; } break; \
    case 3: { enum { HEADS = 3 }; call; } break; \
    default: { enum { HEADS = 4 }; call; } break; \
    }
#define FOR_BITS(value, call)                          \
    switch (value) {                                   \
    case 16: { enum { BITS = 16 }; call; } break;          \
    case WINDOW_BITS: { enum { BITS = WINDOW_BITS }; call; } break; \
    case 8: { enum { BITS = 8 }; call; } break;            \
    case 4: { enum { BITS = 4 }; call; } break;            \
    default: { enum { BITS = 2 }; call; } break;           \
    }

/* Where a page keeps a row of keys or values. */
static const char *codes_at(const kvq_task *task, const kvq_page *page, size_t vector_row, int of_keys) {
    const size_t first_slot = vector_row * page->capacity + page->begin;
    const uint32_t *codes = of_keys ? page->keys : page->values;
    const int bits = of_keys ? page->key_bits : page->value_bits;
    return (const char *)(codes + first_slot * words_per_vector(bits, task->pass->head_dim));
}

/* What is read after an item: the first keys of the one that its thread will probably be given next. */
static const char *after_item(const kvq_task *task, int kv_head, int chunk) {
    const kvq_pass *pass = task->pass;
    const size_t i = item_number(task, kv_head, chunk), later = i + pass->threads;
    const size_t next = later < (size_t)task->chunks * pass->kv_heads ? later : i;
    const kvq_page *page = pass->page + task->chunk[item_chunk(task, next)];
    return codes_at(task, page, (size_t)task->layer * pass->kv_heads + item_head(task, next), 1);
}

/* As prefetch, for the scales of a page's keys or values. */
static void prefetch_scales(const kvq_page *page, size_t vector_row, int of_keys) {
    if ((of_keys ? page->key_bits : page->value_bits) == 16) return;
    const uint16_t *scales = (of_keys ? page->key_scales : page->value_scales) + vector_row * page->capacity;
    prefetch((const char *)(scales + page->begin), sizeof(uint16_t) * slots_of(page));
}

static void decode_heads(const kvq_task *task, int kv_head, int chunk, int head, int heads, char *partial,
                         const char *after) {
    const kvq_pass *pass = task->pass;
    const int dim = task->padded_dim;
    const int room = task->chunk_room + TILE; /* rows a power of two apart would fall on the same lines of the cache */
    const size_t vector_row = (size_t)task->layer * pass->kv_heads + kv_head;
    const int begin = task->chunk[chunk], end = task->chunk[chunk + 1];
    float scores[DECODE_HEADS * (CHUNK_SLOTS + TILE) + LANES];
    int at = 0;
    for (int p = begin; p < end; p++) {
        const kvq_page *page = pass->page + p;
        int slots = slots_of(page);
        if (slots <= 0) continue;
        const int last = p + 1 == end;
        const char *next = codes_at(task, pass->page + (last ? begin : p + 1), vector_row, !last);
        if (!last) prefetch_scales(page + 1, vector_row, 1);
        prefetch_scales(page, vector_row, 0);
        FOR_HEADS(FOR_BITS(page->key_bits,
                           page_scores(BITS, HEADS, task, page, vector_row, head, slots, scores + at, room, next)))
        at += slots;
    }

    float *sums[DECODE_HEADS];
    for (int g = 0; g < heads; g++) {
        kvq_partial *result = (kvq_partial *)(partial + g * partial_bytes(task));
        sums[g] = (float *)(result + 1);
        memset(sums[g], 0, sizeof(float) * dim);
        float *row = scores + g * room;
        vf top = splat(-FLT_MAX);
        for (int t = 0; t < at; t += LANES) top = max_f(top, load_f(row + t));
        result->maximum = max_lanes(top);
        vf total = splat(0), squares = splat(0);
        for (int t = 0; t < at; t += LANES) {
            vf e = exp_f(load_f(row + t) - result->maximum);
            total += e;
            squares += e * e;
            store_f(row + t, e);
        }
        result->total = sum_lanes(total);
        result->squares = sum_lanes(squares);
    }

    at = 0;
    const int stride = (int)(partial_bytes(task) / sizeof(float));
    for (int p = begin, count; p < end; p += count) {
        const kvq_page *page = pass->page + p;
        int slots = slots_of(page), words = words_per_vector(page->value_bits, pass->head_dim);
        count = 1;
#ifdef DOT_VALUES
        if (dot_values_fit(page->value_bits, words)) { /* all neighbours of this precision at once, whatever empty pages
                                                        * of others lie between */
            for (; p + count < end; count++) {
                if (page[count].value_bits != page->value_bits && slots_of(page + count) > 0) break;
                slots += slots_of(page + count) > 0 ? slots_of(page + count) : 0;
            }
            const char *next = p + count < end ? codes_at(task, page + count, vector_row, 0) : after;
            FOR_HEADS(weigh_run(page->value_bits, HEADS, words, page, count, vector_row, scores + at, room, sums[0],
                                stride, next))
            at += slots;
            continue;
        }
#endif
        if (slots <= 0) continue;
        const char *next = p + 1 < end ? codes_at(task, page + 1, vector_row, 0) : after;
        const size_t first_slot = vector_row * page->capacity + page->begin;
        const uint32_t *values = page->values + first_slot * words;
        const uint16_t *scales = page->value_scales + first_slot;
        if (page->value_bits != 16)
            for (int t = 0; t < slots; t += LANES) {
                vf scale = load_halves(scales + t);
                for (int g = 0; g < heads; g++)
                    store_f(scores + g * room + at + t, load_f(scores + g * room + at + t) * scale);
            }
        FOR_HEADS(FOR_BITS(page->value_bits,
                           weigh(BITS, HEADS, values, words, slots, scores + at, room, sums[0], stride, next)))
        at += slots;
    }
}

static void decode_item(const kvq_task *task, int kv_head, int chunk) {
    const char *after = after_item(task, kv_head, chunk);
    char *partial = partials_of(task, kv_head, chunk);
    for (int g = 0; g < task->group; g += DECODE_HEADS, partial += DECODE_HEADS * partial_bytes(task)) {
        int heads = task->group - g < DECODE_HEADS ? task->group - g : DECODE_HEADS;
        decode_heads(task, kv_head, chunk, kv_head * task->group + g, heads, partial, after);
    }
}

#endif
