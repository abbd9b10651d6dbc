/* The ends of a decode step's attention: queries and keys as the projection yields them become what scores are taken
 * with, and the partial results of a head become its output. */
#ifndef KVQ_QUERY_H
#define KVQ_QUERY_H

#include <math.h>

#include "../kernel.h"
#include "vector.h"

/* The rows of integer words are short: four at a time. */
typedef int32_t v4 __attribute__((vector_size(16)));

#ifdef PAIR_KERNEL
/* A query's parts become one number of 16 bits; in the place of each part are words of two such: of channels whose codes are
 * bytes 0 and 2 of a word, and of those of bytes 1 and 3. */
enum { NUMBERS = 2, PAIRED = 1 };
#else
enum { NUMBERS = 4, PAIRED = 0 };
#endif
enum { NUMBER_BITS = 32 / NUMBERS, NUMBER_MASK = (1 << NUMBER_BITS) - 1 }; /* of a word */

/* Words for one precision from a part of a query, see integer_words, or from all of it for those codes whose first is byte
 * number `first`. */
INLINE void integer_rows(int precision, int d, int first, const int32_t *part, int32_t *to) {
    const int steps = 8 / low_bits_of(precision), n = low_words_of(precision, words_per_vector(precision, d));
    for (int s = 0; s < steps; s++, to += n)
        for (int j = 0; j < n; j += 4) {
            v4 word = {0};
            for (int i = 0; i < NUMBERS; i++) {
                v4 x;
                memcpy(&x, part + ((first + i * (4 / NUMBERS)) * steps + s) * n + j, sizeof x);
                word |= (x & NUMBER_MASK) << (NUMBER_BITS * i);
            }
            if (j + 4 <= n) memcpy(to + j, &word, sizeof word);
            else memcpy(to + j, &word, sizeof(int32_t) * (n - j));
        }
}

/* A query q [padded] as integers, in the words for every precision that occurs, see kvq_key_widths. */
INLINE void integer_query(const float *q, int padded, int d, unsigned widths, kvq_integer_query *integer,
                          int32_t *words) {
    const float largest = 127 * QUERY_UNIT, magic = 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    int32_t parts[QUERY_PARTS][MOST_CHANNELS + 32];
    vf top = splat(0);
    for (int c = 0; c < padded; c += LANES) top = max_f(top, (vf)((vu)load_f(q + c) & 0x7fffffff));
    const float peak = max_lanes(top);
    const float scale = peak > 0 ? peak / largest : 1, inverse = peak > 0 ? largest / peak : 1;
    vi sums[QUERY_PARTS] = {{0}};
    for (int c = 0; c < padded; c += LANES) {
        vf rest = load_f(q + c) * inverse;
        float unit = QUERY_UNIT;
        for (int part = 0; part < QUERY_PARTS; part++, unit /= QUERY_BASE) {
            vf whole = rest / unit + magic - magic;
            whole = select_f(whole < 127, select_f(whole > -127, whole, splat(-127)), splat(127)); /* a NaN too */
            rest -= whole * unit;
            vi x = __builtin_convertvector(whole, vi);
            sums[part] += x;
            memcpy(parts[part] + c, &x, sizeof x);
        }
    }
    *integer = (kvq_integer_query){.scale = scale};
    for (int part = 0; part < QUERY_PARTS; part++) {
        integer->sums[part] = sum_whole(sums[part]);
        memset(parts[part] + padded, 0, sizeof(int32_t) * 16);
    }
    for (int c = 0; PAIRED && c < padded; c++) parts[0][c] = parts[0][c] * QUERY_BASE + parts[1][c];
    if (PAIRED) integer->sums[0] = integer->sums[0] * QUERY_BASE + integer->sums[1];
    for (int part = 0; part < QUERY_PARTS; part++) {
#define ROWS(name, id, bits, scale, products, with)                      \
    KVQ_IF_WHOLE(products, if (widths >> NUMBER_##name & 1)              \
        integer_rows(id, d, PAIRED ? part : 0, parts[PAIRED ? 0 : part], \
                     words + integer_words_start(id, d) + part * integer_words(id, d));)
        KVQ_WIDTHS(ROWS, )
#undef ROWS
    }
}

/* A query scaled by 1 / sqrt(head_dim), padded with zeros; where the kernel wants it, as integers too. */
static void prepare_query(const kvq_task *task, unsigned widths, int head, float *query, kvq_integer_query *integer,
                          int32_t *words) {
    const int d = task->pass->head_dim, padded = task->padded_dim;
    const float *from = task->rows->query + (size_t)head * d;
    for (int c = 0; c < d; c++) query[c] = from[c] * task->softmax_scale;
    memset(query + d, 0, sizeof(float) * (padded - d));
    if (task->kernel->integer_dot) integer_query(query, padded, d, widths, integer, words);
}

/* Merge what the chunks of a query head found, and the new token itself, into its output. */
static void merge_head(const kvq_task *task, int head) {
    const kvq_pass *pass = task->pass;
    const kvq_rows *rows = task->rows;
    const int d = pass->head_dim, kv_head = head / task->group, whole = d / LANES * LANES;
    const float *q = task->query + (size_t)head * task->padded_dim;
    const float *key = rows->key + (size_t)kv_head * d, *value = rows->value + (size_t)kv_head * d;
    vf products = splat(0);
    for (int c = 0; c < whole; c += LANES) products += load_f(q + c) * load_f(key + c);
    float own = sum_lanes(products);
    for (int c = whole; c < d; c++) own += q[c] * key[c];

    const size_t step = partial_bytes(task);
    const char *first = partials_of(task, kv_head, 0) + head % task->group * step;
    float maximum = own;
    for (int c = 0; c < task->chunks; c++)
        maximum = fmaxf(maximum, ((const kvq_partial *)(first + c * task->group * step))->maximum);
    float *out = rows->out + (size_t)head * d, weight = expf(own - maximum);
    float total = weight, squares = weight * weight;
    for (int c = 0; c < d; c++) out[c] = weight * value[c];
    for (int i = 0; i < task->chunks; i++) {
        const kvq_partial *part = (const kvq_partial *)(first + i * task->group * step);
        const float *sums = (const float *)(part + 1);
        weight = expf(part->maximum - maximum);
        total += weight * part->total;
        squares += weight * weight * part->squares;
        for (int c = 0; c < d; c++) out[c] += weight * sums[c];
    }
    const float inverse = 1 / total;
    for (int c = 0; c < d; c++) out[c] *= inverse;
    if (rows->row_squares) rows->row_squares[head] = squares / (total * total);
}

#endif
