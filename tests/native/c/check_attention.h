/* Attention of every kernel over pages, rings and mixtures of them. */
#ifndef KVQ_CHECK_ATTENTION_H
#define KVQ_CHECK_ATTENTION_H

#include <pthread.h>

#include "harness.h"

/* Largest error of an output, in parts of the largest output; the same for sums of squares. */
#define TOLERANCE 1e-5
/* Where queries are rounded to 16 bits, and weights of values to whole numbers, which adds a noise of 1.6e-5 of an output's
 * root mean square. */
#define ROUNDED_TOLERANCE 1.2e-4
/* At scores of 1e4 single precision knows a score to about 1e-3, and so the weights; 16 bits know it to a few tenths. */
#define LARGE_SCORE_TOLERANCE 5e-3
#define LARGE_ROUNDED_TOLERANCE 0.5

/* Whether a kernel takes scores by integer dot products. */
static int has_whole_queries(const char *kernel) {
    const char *const those[] = {"avx512", "amx", "avxvnni", "avx2", "dotprod"};
    for (size_t i = 0; i < sizeof those / sizeof *those; i++)
        if (!strcmp(kernel, those[i])) return 1;
    return 0;
}

static int shared_calls; /* of the two ways below that share work */

/* Ways to run work items: in the caller, backwards, in three threads at once. */
static void backwards(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    ++*(int *)context;
    while (count-- > 0) work(data, count);
}

typedef struct {
    void (*work)(void *, size_t);
    void *data;
    size_t count, next;
} work_queue;

static void *take_items(void *from) {
    work_queue *queue = from;
    for (size_t i; (i = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED)) < queue->count;)
        queue->work(queue->data, i);
    return NULL;
}

static void in_threads(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    ++*(int *)context;
    work_queue queue = {work, data, count, 0};
    pthread_t thread[3];
    for (int i = 0; i < 3; i++)
        if (pthread_create(thread + i, NULL, take_items, &queue)) exit(2);
    for (int i = 0; i < 3; i++) pthread_join(thread[i], NULL);
}

static const kvq_parallel WAYS[] = {NULL, backwards, in_threads};

/* The new tokens of one layer beside a filled store. */
typedef struct {
    const char *what;
    int group, tokens, threads, way, layer;
    int gap;            /* floats between the rows of two tokens */
    int squares, copy;  /* ask for the sums of squares; for the new keys and values */
    double large_score; /* 0, or queries that reach scores of this size */
} new_tokens;

static float *random_rows(int tokens, int width, ptrdiff_t stride) {
    const size_t floats = (size_t)(tokens - 1) * stride + width;
    float *rows = exactly(sizeof(float) * floats);
    for (size_t i = 0; i < floats; i++) rows[i] = NAN; /* between the rows: nobody's */
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < width; i++) rows[t * stride + i] = (float)uniform(-1.7, 1.7);
    return rows;
}

/* Queries of one channel: the scores are the keys there, times `size`. */
static void one_channel(float *query, int tokens, int heads, int head_dim, ptrdiff_t stride, double size) {
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < heads; h++) {
            float *row = query + t * stride + (size_t)h * head_dim;
            memset(row, 0, sizeof(float) * head_dim);
            row[below(head_dim)] = (float)(size / 1.7 * sqrt(head_dim) * (below(2) ? 1 : -1));
        }
}

/* Largest difference in parts of the largest expected value; infinite where a result is not a number. */
static double difference(const float *found, const double *expected, size_t count) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(found[i])) return HUGE_VAL;
        error = fmax(error, fabs(found[i] - expected[i]));
        largest = fmax(largest, fabs(expected[i]));
    }
    return error / largest;
}

static int copied(const float *copy, const float *rows, ptrdiff_t stride, const store *s, int layer, int tokens) {
    const int d = s->head_dim;
    for (int h = 0; h < s->kv_heads; h++)
        for (int t = 0; t < tokens; t++) {
            const float *to = copy + (((size_t)layer * s->kv_heads + h) * tokens + t) * d;
            if (memcmp(to, rows + t * stride + h * d, sizeof(float) * d)) return 0;
        }
    return 1;
}

static void check_kernel(const store *s, const new_tokens *n, const kvq_rows *rows, const double *expected,
                         const double *expected_squares, int kernel) {
    const int d = s->head_dim, heads = n->group * s->kv_heads;
    const size_t outputs = (size_t)n->tokens * heads * d, copies = (size_t)s->layers * s->kv_heads * n->tokens * d;
    kvq_rows in = *rows;
    in.out = exactly(sizeof(float) * outputs);
    in.row_squares = n->squares ? exactly(sizeof(float) * n->tokens * heads) : NULL;
    for (size_t i = 0; i < outputs; i++) in.out[i] = NAN;
    for (int i = 0; n->squares && i < n->tokens * heads; i++) in.row_squares[i] = NAN;
    const kvq_pass pass = {
        .layers = s->layers, .heads = heads, .kv_heads = s->kv_heads, .head_dim = d, .tokens = n->tokens,
        .pages = s->pages, .kernel = kernel, .threads = n->threads, .page = s->page,
        .keys = n->copy ? exactly(sizeof(float) * copies) : NULL,
        .values = n->copy ? exactly(sizeof(float) * copies) : NULL,
        .turns = s->turns, .position = s->turns ? s->turns->blocks * 16 - n->tokens : 0,
    };
    const int status = kvq_attend(&pass, n->layer, &in, WAYS[n->way], &shared_calls);
    const char *name = kvq_kernel_name(kernel);
    const double allowed = n->tokens == 1 && has_whole_queries(name)
                               ? (n->large_score ? LARGE_ROUNDED_TOLERANCE : ROUNDED_TOLERANCE)
                               : (n->large_score ? LARGE_SCORE_TOLERANCE : TOLERANCE);
    const double error = difference(in.out, expected, outputs);
    const double squares_error =
        n->squares ? difference(in.row_squares, expected_squares, (size_t)n->tokens * heads) : 0;
    const int copies_right = !n->copy || (copied(pass.keys, in.key, in.key_stride, s, n->layer, n->tokens) &&
                                          copied(pass.values, in.value, in.value_stride, s, n->layer, n->tokens));
    if (status || !copies_right || !(squares_error <= allowed) ||
        !(error <= allowed))
        fail("%s: %s: status %d, error %.2g, of squares %.2g%s; head_dim %d, %d x %d heads, %d cached in %d pages"
             " (first k%dv%d), %d new, layer %d of %d, %d threads, way %d",
             kvq_kernel_name(kernel), n->what, status, error, squares_error, copies_right ? "" : ", wrong copies", d,
             s->kv_heads, n->group, read_tokens(s, 0, 0, NULL, NULL), s->pages, s->pages ? s->page[0].key_precision : 0,
             s->pages ? s->page[0].value_precision : 0, n->tokens, n->layer, s->layers, n->threads, n->way);
    done[kernel].attention++;
    if (!n->large_score) done[kernel].error = fmax(done[kernel].error, error);
    free(in.out), free(in.row_squares), free(pass.keys), free(pass.values);
}

static void check_attention(const store *s, new_tokens n) {
    const int d = s->head_dim, heads = n.group * s->kv_heads;
    const size_t outputs = (size_t)n.tokens * heads * d;
    kvq_rows rows = {.query_stride = heads * d + n.gap, .key_stride = s->kv_heads * d + n.gap * 2,
                     .value_stride = s->kv_heads * d + n.gap};
    float *query = random_rows(n.tokens, heads * d, rows.query_stride);
    float *key = random_rows(n.tokens, s->kv_heads * d, rows.key_stride);
    float *value = random_rows(n.tokens, s->kv_heads * d, rows.value_stride);
    if (n.large_score) one_channel(query, n.tokens, heads, d, rows.query_stride, n.large_score);
    rows.query = query, rows.key = key, rows.value = value;
    double *expected = exactly(sizeof(double) * outputs), *squares = exactly(sizeof(double) * n.tokens * heads);
    reference_attend(s, heads, n.tokens, n.layer, &rows, expected, squares);
    for (int kernel = 0; kernel < kvq_kernels(); kernel++)
        if (is_checked(kernel)) check_kernel(s, &n, &rows, expected, squares, kernel);
    free(query), free(key), free(value), free(expected), free(squares);
}

static const int HEAD_DIMS[] = {8, 16, 24, 40, 64, 80, 96, 128, 256};
static const int GROUPS[] = {1, 2, 3, 4, 5, 8};
static const int COUNTS[] = {0, 1, 7, 15, 16, 17, 63, 64, 65, 127, 128};
static const int NEW[] = {1, 2, 5, 40, 130};

/* Every pair of precisions with every count of a page, one new token and two. */
static void check_counts(int step) {
    for (int i = 0; i < LENGTH(COUNTS) * WIDTH_COUNT * WIDTH_COUNT; i += step) {
        const int count = COUNTS[i % LENGTH(COUNTS)], pair = i / LENGTH(COUNTS);
        store s = {.layers = 1 + i % 3, .kv_heads = 1 + i % 2, .head_dim = HEAD_DIMS[i % 5]};
        int capacity = i % 3 || !count ? 128 : whole_tiles(count);
        add_page(&s, WIDTHS[pair % WIDTH_COUNT], WIDTHS[pair / WIDTH_COUNT], capacity, count);
        for (int tokens = 1; tokens <= 2; tokens++)
            check_attention(&s, (new_tokens){.what = "one page", .group = 1 + i % 4, .tokens = tokens, .threads = 1,
                                             .layer = i % s.layers, .squares = i % 2, .copy = i % 5 == 0});
        release(&s);
    }
}

/* Every head_dim and group with every precision of keys and of values. */
static void check_shapes(int step) {
    const int total = LENGTH(HEAD_DIMS) * LENGTH(GROUPS) * WIDTH_COUNT * WIDTH_COUNT;
    for (int i = 0; i < total; i += step) {
        const int shape = i / (WIDTH_COUNT * WIDTH_COUNT), pair = i % (WIDTH_COUNT * WIDTH_COUNT);
        store s = {.layers = 1, .kv_heads = 1 + i % 2, .head_dim = HEAD_DIMS[shape % LENGTH(HEAD_DIMS)]};
        add_page(&s, WIDTHS[pair % WIDTH_COUNT], WIDTHS[pair / WIDTH_COUNT], 48, 1 + below(48));
        new_tokens n = {.what = "shapes", .group = GROUPS[shape / LENGTH(HEAD_DIMS)], .tokens = 1, .threads = 1,
                        .squares = 1};
        check_attention(&s, n);
        n.tokens = 3, n.gap = 5;
        check_attention(&s, n);
        release(&s);
    }
}

/* Rings of every kind: not full, full, going round, periods that are no whole tiles, more slots than a row has. */
static void check_rings(int quick) {
    static const int periods[] = {1, 5, 16, 37, 64, 130, 1000, 1024, 1025, 1500, 2100};
    for (int i = 0; i < LENGTH(periods); i++)
        for (int kind = 0; kind < 5; kind++) {
            const int period = periods[i], full = kind == 0;
            const int count = full ? period : kind == 1 ? 1 : below(period + 1);
            const int first = full || kind == 2 ? 0 : kind == 3 ? period - 1 : below(period);
            if (quick && period > 200 && (i + kind) % 4) continue;
            store s = {.layers = 2, .kv_heads = 1, .head_dim = HEAD_DIMS[(i + kind) % 5]};
            if (kind % 2) add_page(&s, PICK(WIDTHS), PICK(WIDTHS), 64, below(65));
            add_ring(&s, period, count, first);
            for (int tokens = 1; tokens <= 3; tokens += 2)
                check_attention(&s, (new_tokens){.what = "ring", .group = 1 + kind, .tokens = tokens,
                                                 .threads = 1 + kind % 4, .way = kind % 3, .layer = i % 2,
                                                 .squares = 1});
            release(&s);
        }
}

/* Mixed stores of up to `most` tokens with everything else drawn at random. */
static void check_mixtures(int cases, int most) {
    for (int i = 0; i < cases; i++) {
        store s = {.layers = 1 + below(3), .kv_heads = 1 + below(3), .head_dim = PICK(HEAD_DIMS)};
        new_tokens n = {.what = "mixture", .group = PICK(GROUPS), .tokens = i % 3 ? 1 : PICK(NEW),
                        .threads = 1 + below(4), .way = below(LENGTH(WAYS)), .gap = below(3) * 7, .squares = below(2),
                        .copy = below(2)};
        int room = below(most + 1);
        if (n.tokens > 5) s.layers = 1, s.kv_heads = 1 + i % 2, room /= 4;
        for (int stored = 0; stored < room && s.pages < MOST_ROWS - 4;) {
            const int capacity = TILE * (1 + below(8)), count = below(4) ? capacity : PICK(COUNTS);
            add_page(&s, PICK(WIDTHS), PICK(WIDTHS), capacity, count < capacity ? count : capacity);
            stored += capacity;
        }
        if (below(3)) {
            const int period = 1 + below(70);
            add_ring(&s, period, below(2) ? period : below(period + 1), below(period));
        }
        n.layer = below(s.layers);
        check_attention(&s, n);
        release(&s);
    }
}

/* Long stores of one kind of page, shared among threads; more pages than the planner keeps on its stack. */
static void check_long(int quick) {
    static const int totals[] = {1023, 1024, 1025, 2049, 4100};
    for (int i = 0; i < (quick ? 3 : LENGTH(totals)); i++)
        for (int threads = 1; threads <= 4; threads += quick ? 3 : 1) {
            store s = {.layers = 1, .kv_heads = 1 + i % 2, .head_dim = i % 2 ? 64 : 16};
            const int capacity = i == 4 ? 16 : 128;
            for (int left = totals[i]; left > 0; left -= capacity)
                add_page(&s, WIDTHS[(left + i) % 5], WIDTHS[(left / 16 + i) % 5], capacity,
                         left < capacity ? left : capacity);
            new_tokens n = {.what = "long", .group = 3, .tokens = 1, .threads = threads, .way = 1 + threads % 2,
                            .squares = 1};
            check_attention(&s, n);
            n.tokens = 2;
            check_attention(&s, n);
            release(&s);
        }
}

/* Many new tokens that see each other, with and without stored ones before them. */
static void check_prefill(int quick) {
    for (int i = 0; i < LENGTH(NEW); i++)
        for (int cached = 0; cached < 2; cached++) {
            store s = {.layers = 1, .kv_heads = 2, .head_dim = quick ? 24 : 80};
            if (cached) add_page(&s, 4, 8, 128, 70), add_ring(&s, 21, 20, 13);
            check_attention(&s, (new_tokens){.what = "prefill", .group = 4, .tokens = NEW[i], .threads = 2,
                                             .way = i % 3, .gap = i, .squares = 1, .copy = 1});
            release(&s);
        }
}

static void check_large_scores(void) {
    for (int i = 0; i < 4 * WIDTH_COUNT; i++)
        for (int tokens = 1; tokens <= 3; tokens++) {
            store s = {.layers = 1, .kv_heads = 2, .head_dim = HEAD_DIMS[i % 8]};
            add_page(&s, WIDTHS[i % WIDTH_COUNT], WIDTHS[i / 4], 128, i < WIDTH_COUNT ? 1 : 100);
            if (i % 2) add_ring(&s, 37, 20, 30);
            check_attention(&s, (new_tokens){.what = "scores of 1e4", .group = 3, .tokens = tokens, .threads = 1,
                                             .squares = 1, .large_score = 1e4});
            release(&s);
        }
}

/* Queries near and beyond the ends of single precision: those too small to matter count as zero, and what is not finite
 * stays so. The sanitizers watch. */
static void check_odd_queries(void) {
    static const float sizes[] = {0, 1e-45f, 1e-41f, 1e-38f, 1e-35f, 1e-30f, 1e20f, INFINITY, NAN};
    for (int i = 0; i < LENGTH(sizes) * 4; i++) {
        const float size = sizes[i / 4];
        store s = {.layers = 1, .kv_heads = 1, .head_dim = 24};
        add_page(&s, WIDTHS[1 + i % 4], 8, 32, 20);
        float x[3 * 24], zero[24] = {0}, out[24], still[24];
        for (int c = 0; c < 3 * 24; c++) x[c] = (float)uniform(-1, 1) * (c < 24 ? size : 1);
        if (!isfinite(size)) x[below(24)] = size;
        for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
            if (!is_checked(kernel)) continue;
            const kvq_pass pass = {.layers = 1, .heads = 1, .kv_heads = 1, .head_dim = 24, .tokens = 1, .pages = s.pages,
                                   .kernel = kernel, .threads = 1, .page = s.page};
            kvq_rows rows = {.query = x, .key = x + 24, .value = x + 48, .out = out};
            int status = kvq_attend(&pass, 0, &rows, NULL, NULL), finite = 1;
            rows.query = zero, rows.out = still;
            status |= kvq_attend(&pass, 0, &rows, NULL, NULL);
            for (int c = 0; c < 24; c++) finite &= isfinite(out[c]) != 0;
            if (status || finite != (isfinite(size) != 0))
                fail("%s: queries of %g: wrong kind of result", kvq_kernel_name(kernel), size);
            for (int c = 0; c < 24 && size < 1e-9f; c++)
                if (fabsf(out[c] - still[c]) > 1e-6f) {
                    fail("%s: queries of %g are not like zero", kvq_kernel_name(kernel), size);
                    break;
                }
        }
        release(&s);
    }
}

/* Any head_dim up to the largest, whatever its codes leave of their last word. */
static void check_odd_dims(void) {
    static const int dims[] = {1, 2, 3, 7, 9, 17, 33, 100, 250, 257, 1000, 1023, 1024};
    for (int i = 0; i < LENGTH(dims) * WIDTH_COUNT; i++) {
        store s = {.layers = 1, .kv_heads = 1, .head_dim = dims[i / WIDTH_COUNT]};
        add_page(&s, WIDTHS[i % WIDTH_COUNT], WIDTHS[(i + 1) % WIDTH_COUNT], 32, 20);
        add_ring(&s, 5, 3, 4);
        for (int tokens = 1; tokens <= 2; tokens++)
            check_attention(&s, (new_tokens){.what = "odd head_dim", .group = 1 + i % 5, .tokens = tokens, .threads = 1,
                                             .squares = 1});
        release(&s);
    }
}

#endif
