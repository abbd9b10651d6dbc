/* Several tokens of a stepwise pass against passes of one token each, with the token's move after each. */
#ifndef KVQ_CHECK_STEPWISE_H
#define KVQ_CHECK_STEPWISE_H

#include "check_attention.h"

enum { MOST_STEPS = 24, STEP_PAGES = 5 };

/* New tokens of a whole model and what they do. */
typedef struct {
    int heads, tokens, threads, way;
    float *query, *key, *value; /* [layers, tokens, heads or kv_heads, head_dim] */
    kvq_move_step step[MOST_STEPS];
} stepwise_case;

static void fill_stepwise(store *s, const stepwise_case *n, int period, int count, int first) {
    static const int bits[STEP_PAGES][2] = {{16, 16}, {8, 5}, {3, 2}, {2, 3}, {5, 4}};
    for (int p = 0; p < STEP_PAGES; p++) { /* empty ones too; room for all that leave */
        const int used = p % 2 ? 0 : below(100);
        add_page(s, bits[p][0], bits[p][1], whole_tiles(used + n->tokens + below(40)), used);
    }
    add_ring(s, period, count, first);
}

/* Keys or values [layers, kv_heads, tokens, head_dim] of the tokens [from, from + tokens). */
static float *by_head(const store *s, const float *x, int all, int from, int tokens) {
    const int d = s->head_dim;
    float *out = exactly(sizeof(float) * s->layers * s->kv_heads * tokens * d), *to = out;
    for (int l = 0; l < s->layers; l++)
        for (int h = 0; h < s->kv_heads; h++)
            for (int t = 0; t < tokens; t++, to += d)
                memcpy(to, x + (((size_t)l * all + from + t) * s->kv_heads + h) * d, sizeof(float) * d);
    return out;
}

static kvq_rows rows_of(const store *s, const stepwise_case *n, int layer, int from, float *out, float *squares) {
    const int d = s->head_dim, wide = n->heads * d, narrow = s->kv_heads * d;
    const size_t at = (size_t)layer * n->tokens + from;
    return (kvq_rows){n->query + at * wide, n->key + at * narrow, n->value + at * narrow, out + at * wide,
                      wide, narrow, narrow, squares + at * n->heads};
}

static void one_by_one(store *s, const stepwise_case *n, int kernel, float *out, float *squares) {
    for (int t = 0; t < n->tokens; t++) {
        for (int l = 0; l < s->layers; l++) {
            const kvq_pass pass = {.layers = s->layers, .heads = n->heads, .kv_heads = s->kv_heads,
                                   .head_dim = s->head_dim, .tokens = 1, .pages = s->pages, .kernel = kernel,
                                   .threads = n->threads, .page = s->page};
            const kvq_rows rows = rows_of(s, n, l, t, out, squares);
            if (kvq_attend(&pass, l, &rows, NULL, NULL)) fail("%s: one token failed", kvq_kernel_name(kernel));
        }
        if (t + 1 == n->tokens) return;
        float *keys = by_head(s, n->key, n->tokens, t, 1), *values = by_head(s, n->value, n->tokens, t, 1);
        kvq_page *ring = s->page + STEP_PAGES;
        const kvq_move move = {s->layers, s->kv_heads, s->head_dim, kernel, 1, STEP_PAGES, keys, values, NULL, ring, s->page,
                               n->step + t, NULL, 0, 0, 0};
        if (kvq_move_tokens(&move)) fail("%s: a move failed", kvq_kernel_name(kernel));
        if (n->step[t].page >= 0) s->page[n->step[t].page].count++;
        if (ring->count < ring->period && ++ring->count == ring->period) ring->first = 0;
        free(keys), free(values);
    }
}

static void all_at_once(store *s, const stepwise_case *n, int kernel, float *out, float *squares) {
    const size_t floats = (size_t)s->layers * s->kv_heads * n->tokens * s->head_dim;
    float *keys = exactly(sizeof(float) * floats), *values = exactly(sizeof(float) * floats);
    for (int l = 0; l < s->layers; l++) {
        const kvq_move move = {s->layers, s->kv_heads, s->head_dim, kernel, n->tokens, STEP_PAGES, keys, values,
                               NULL, s->page + STEP_PAGES, s->page, n->step, NULL, 0, 0, 0};
        const kvq_pass pass = {.layers = s->layers, .heads = n->heads, .kv_heads = s->kv_heads,
                               .head_dim = s->head_dim, .tokens = n->tokens, .pages = s->pages, .kernel = kernel,
                               .threads = n->threads, .page = s->page, .keys = keys, .values = values,
                               .stepwise = &move};
        const kvq_rows rows = rows_of(s, n, l, 0, out, squares);
        if (kvq_attend(&pass, l, &rows, WAYS[n->way], &shared_calls))
            fail("%s: a stepwise pass failed", kvq_kernel_name(kernel));
    }
    free(keys), free(values);
}

static void check_stepwise(int rounds) {
    static const int periods[] = {1, 4, 16, 20, 37};
    for (int i = 0; i < rounds * LENGTH(periods); i++) {
        const int period = periods[i % LENGTH(periods)], full = i % 3 != 0;
        const int most = period + 1 < MOST_STEPS ? period + 1 : MOST_STEPS;
        store empty = {.layers = 1 + i % 2, .kv_heads = 1 + below(3), .head_dim = PICK(HEAD_DIMS)};
        stepwise_case n = {.heads = empty.kv_heads * PICK(GROUPS), .tokens = 2 + below(most - 1),
                           .threads = 1 + below(3), .way = i % 3};
        const int count = full ? period : below(period), first = full ? 0 : below(period), d = empty.head_dim;
        const int rows = empty.layers * n.tokens, narrow = empty.kv_heads * d;
        n.query = random_rows(rows, n.heads * d, n.heads * d);
        n.key = random_rows(rows, narrow, narrow), n.value = random_rows(rows, narrow, narrow);
        const size_t outputs = (size_t)rows * n.heads * d;
        for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
            if (!is_checked(kernel)) continue;
            const uint64_t before = seed;
            store single = empty, whole = empty;
            fill_stepwise(&single, &n, period, count, first);
            seed = before;
            fill_stepwise(&whole, &n, period, count, first);
            int used[STEP_PAGES];
            for (int p = 0; p < STEP_PAGES; p++) used[p] = single.page[p].count;
            for (int t = 0; t + 1 < n.tokens; t++) {
                const int page = count + t < period ? -1 : below(STEP_PAGES);
                n.step[t] = (kvq_move_step){(first + count + t) % period, page, page < 0 ? 0 : used[page]++};
            }
            float *out[2], *squares[2];
            for (int j = 0; j < 2; j++) {
                out[j] = exactly(sizeof(float) * outputs), squares[j] = exactly(sizeof(float) * rows * n.heads);
                (j ? all_at_once : one_by_one)(j ? &whole : &single, &n, kernel, out[j], squares[j]);
            }
            int same = !memcmp(out[0], out[1], sizeof(float) * outputs) &&
                       !memcmp(squares[0], squares[1], sizeof(float) * rows * n.heads);
            for (int a = 0; a < whole.arrays; a++) same &= !memcmp(whole.array[a], single.array[a], whole.nbytes[a]);
            if (!same)
                fail("%s: %d tokens of a stepwise pass are not what single ones are; window of %d, %d in it, head_dim"
                     " %d, %d x %d heads, %d threads", kvq_kernel_name(kernel), n.tokens, period, count, d,
                     empty.kv_heads, n.heads / empty.kv_heads, n.threads);
            for (int j = 0; j < 2; j++) free(out[j]), free(squares[j]);
            release(&single), release(&whole);
        }
        free(n.query), free(n.key), free(n.value);
    }
}

#endif
