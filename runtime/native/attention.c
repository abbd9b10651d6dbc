/* Attention of one layer: what is exported, and how it is cut into work items. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

static const kvq_kernel *const KERNELS[] = {
    &kvq_kernel_plain,
#if defined(__x86_64__) || defined(_M_X64)
    &kvq_kernel_avx2, &kvq_kernel_avxvnni, &kvq_kernel_avx512,
#if KVQ_AMX
    &kvq_kernel_amx,
#endif
#elif defined(__aarch64__)
    &kvq_kernel_neon, &kvq_kernel_dotprod,
#endif
};
enum { KERNEL_COUNT = sizeof KERNELS / sizeof *KERNELS };

int32_t kvq_abi(void) { return KVQ_ABI; }
int32_t kvq_kernels(void) { return KERNEL_COUNT; }
const char *kvq_kernel_name(int32_t i) { return i >= 0 && i < KERNEL_COUNT ? KERNELS[i]->name : ""; }
int32_t kvq_kernel_available(int32_t i) { return i >= 0 && i < KERNEL_COUNT && KERNELS[i]->available(); }
int32_t kvq_kernel_products(int32_t i) { return kvq_kernel_available(i) && KERNELS[i]->own_products; }

const kvq_kernel *kvq_choose_kernel(int32_t i) {
    if (i >= 0) return kvq_kernel_available(i) ? KERNELS[i] : NULL;
    for (i = KERNEL_COUNT - 1; i > 0; i--)
        if (KERNELS[i]->available()) break;
    return KERNELS[i];
}

#define ITEMS_PER_THREAD 6 /* so that a thread that falls behind is not waited for long */
#define LEAST_CHUNK 256    /* slots; smaller ones would spend their time on merging */
#define ROW_BLOCK 96       /* query rows that share one expansion of the keys and values, about */

void kvq_serially(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    (void)context;
    for (size_t i = 0; i < count; i++) work(data, i);
}

static void prefill_work(void *data, size_t i) {
    kvq_task *task = data;
    if (task->kernel->prefill(task, i)) __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
}

/* What a page takes of a step's time: halves about half as much again as any others. */
static long cost_of(const kvq_page *page) { return (long)slots_of(page) * (page->key_precision == KVQ_HALF ? 3 : 2); }

/* The last chunk gets the largest share of the cost and the first one the smallest, half as large: where threads meet
 * that take items from both ends of the queue, no large one is left. In shares of a whole, what the first `n` of
 * `chunks` have. */
static double share_of_first(int n, int chunks) {
    const double sizes = (double)n * (chunks + 1) + 0.5 * n * (n - 1); /* chunks + 1, chunks + 2, ... */
    return sizes / (0.5 * chunks * (3.0 * chunks + 1));
}

int kvq_plan_chunks(const kvq_pass *pass, int32_t *chunk, int *room) {
    long slots = 0, cost = 0, before = 0;
    for (int p = 0; p < pass->pages; p++)
        if (slots_of(pass->page + p) > 0) slots += slots_of(pass->page + p), cost += cost_of(pass->page + p);
    const long threads = pass->threads < 1 ? 1 : pass->threads;
    long wanted = (threads * ITEMS_PER_THREAD + pass->kv_heads - 1) / pass->kv_heads; /* chunks of a KV head */
    const long least = slots * 4 / 3 / CHUNK_SLOTS + 1; /* the largest then has room for its share */
    if (wanted > slots / LEAST_CHUNK) wanted = slots / LEAST_CHUNK;
    if (wanted < least) wanted = least;
    if (threads == 1) wanted = 1;
    int chunks = 0, filled = 0;
    double end = cost * share_of_first(1, (int)wanted); /* of the chunk that is being filled */
    *room = 0;
    chunk[0] = 0;
    for (int p = 0; p < pass->pages; p++) {
        const int more = slots_of(pass->page + p);
        if (more <= 0) continue;
        const long own = cost_of(pass->page + p); /* a page belongs where its middle is */
        if (filled && (before + 0.5 * own >= end || filled + more > CHUNK_SLOTS)) {
            chunk[++chunks] = p;
            filled = 0;
            end = cost * share_of_first(chunks + 1, (int)wanted);
        }
        filled += more;
        before += own;
        if (filled > *room) *room = filled;
    }
    if (filled) chunk[++chunks] = pass->pages;
    return chunks;
}

unsigned kvq_key_widths(const kvq_pass *pass) {
    unsigned widths = 0;
    for (int p = 0; p < pass->pages; p++) widths |= 1u << width_number(pass->page[p].key_precision);
    return widths;
}

void kvq_keep_token(const kvq_task *task, int kv_head, int token) {
    const kvq_pass *pass = task->pass;
    const kvq_rows *rows = task->rows;
    const size_t d = pass->head_dim, row = (size_t)task->layer * pass->kv_heads + kv_head;
    const size_t to = (row * pass->tokens + token) * d;
    if (!pass->keys || !pass->values) return;
    memcpy(pass->keys + to, rows->key + token * rows->key_stride + kv_head * d, sizeof(float) * d);
    memcpy(pass->values + to, rows->value + token * rows->value_stride + kv_head * d, sizeof(float) * d);
}

int32_t kvq_attend(const kvq_pass *pass, int32_t layer, const kvq_rows *rows, kvq_parallel parallel, void *context) {
    int refused = kvq_check_pass(pass);
    if (!refused) refused = kvq_check_rows(pass, layer, rows);
    return refused ? refused : kvq_prepare_and_attend(pass, layer, rows, NULL, parallel, context);
}

/* What happens with each of several new tokens first. */
typedef struct {
    const kvq_task *task;
    const kvq_prepare *prepare; /* or null */
} new_tokens;

static void prepare_work(void *data, size_t token) {
    const new_tokens *n = data;
    const kvq_pass *pass = n->task->pass;
    if (n->prepare) n->task->kernel->prepare(n->prepare, token, 0, pass->heads + pass->kv_heads);
    for (int h = 0; h < pass->kv_heads; h++) kvq_keep_token(n->task, h, (int)token);
}

/* Whether keys of a page are stored less what turns, of a layer's own pass. */
static int any_turned(const kvq_pass *pass) {
    for (int p = 0; p < pass->pages; p++)
        if (kvq_turned(pass->page[p].key_precision)) return 1;
    return 0;
}

static kvq_task task_of(const kvq_pass *pass, int32_t layer, const kvq_rows *rows) {
    return (kvq_task){
        .pass = pass,
        .rows = rows,
        .kernel = kvq_choose_kernel(pass->kernel),
        .layer = layer,
        .group = pass->heads / pass->kv_heads,
        .window = pass->windows ? pass->windows[layer] : 0,
        .turns = pass->turns && pass->turns->which[layer] >= 0 && any_turned(pass) ? pass->turns : NULL,
        .padded_dim = (pass->head_dim + 15) / 16 * 16,
        .softmax_scale = 1 / sqrtf((float)pass->head_dim),
    };
}

/* Several new tokens of one session. */
static int attend_many(kvq_task *task, const kvq_prepare *prepare, kvq_parallel parallel, void *context) {
    const kvq_pass *pass = task->pass;
    parallel(context, prepare_work, (size_t)pass->tokens, &(new_tokens){task, prepare});
    if (pass->stepwise) return kvq_attend_stepwise(task, parallel, context);
    task->row_block = task->group < ROW_BLOCK ? ROW_BLOCK / task->group : 1;
    task->row_blocks = (pass->tokens + task->row_block - 1) / task->row_block;
    parallel(context, prefill_work, (size_t)task->row_blocks * pass->kv_heads, task);
    return task->failed ? KVQ_NO_MEMORY : 0;
}

/* What one session has of the rows of a chain. */
typedef struct {
    kvq_layer_pass own;
    kvq_rows rows;
    kvq_prepare prepare;
} session_part;

/* The part of a pass whose rows begin behind `before` others. Returns 0 or NO_MEMORY. */
static int part_of(session_part *part, const kvq_pass *pass, int32_t layer, const kvq_rows *rows,
                   const kvq_prepare *prepare, ptrdiff_t before) {
    const ptrdiff_t d = pass->head_dim, heads = before * pass->heads;
    part->rows = *rows;
    part->rows.query += before * rows->query_stride;
    part->rows.key += before * rows->key_stride;
    part->rows.value += before * rows->value_stride;
    part->rows.out += heads * d;
    if (rows->row_squares) part->rows.row_squares += heads;
    else if (layer == pass->layers - 1) part->rows.row_squares = pass->row_squares;
    if (prepare) {
        part->prepare = *prepare;
        part->prepare.qkv += before * (pass->heads + 2 * pass->kv_heads) * d;
        part->prepare.cosine += before * (d / 2);
        part->prepare.sine += before * (d / 2);
        part->prepare.out += before * kvq_prepared_heads(prepare) * d;
    }
    return kvq_pass_of_layer(pass, layer, &part->own);
}

static int attend_parts(const kvq_pass *first, int32_t layer, const kvq_rows *rows, const kvq_prepare *prepare,
                        session_part *part, kvq_single *single, kvq_parallel parallel, void *context) {
    size_t parts = 0, singles = 0;
    ptrdiff_t before = 0;
    int failed = 0;
    for (const kvq_pass *pass = first; pass && !failed; before += pass->tokens, pass = pass->next) {
        session_part *p = part + parts++;
        failed = part_of(p, pass, layer, rows, prepare, before);
        if (failed) break;
        const kvq_prepare *own = prepare ? &p->prepare : NULL;
        kvq_task task = task_of(&p->own.pass, layer, &p->rows);
        if (pass->tokens == 1) single[singles++] = (kvq_single){task, own};
        else failed = attend_many(&task, own, parallel, context);
    }
    if (!failed) failed = kvq_decode(single, singles, parallel, context);
    while (parts) free(part[--parts].own.page);
    return failed;
}

int kvq_prepare_and_attend(const kvq_pass *pass, int32_t layer, const kvq_rows *rows, const kvq_prepare *prepare,
                           kvq_parallel parallel, void *context) {
    size_t sessions = 0;
    for (const kvq_pass *p = pass; p; p = p->next) sessions++;
    if (!kvq_choose_kernel(pass->kernel)) return KVQ_NO_KERNEL;
    if (prepare && pass->head_dim % 2) return KVQ_MISFIT_SHAPE;
    if (!parallel) parallel = kvq_serially;
    session_part one;
    kvq_single only;
    if (sessions == 1) return attend_parts(pass, layer, rows, prepare, &one, &only, parallel, context);
    session_part *part = malloc((sizeof *part + sizeof(kvq_single)) * sessions);
    if (!part) return KVQ_NO_MEMORY;
    const int failed =
        attend_parts(pass, layer, rows, prepare, part, (kvq_single *)(part + sessions), parallel, context);
    free(part);
    return failed;
}

int32_t kvq_encode(int32_t kernel, int32_t precision, const float *x, size_t vectors, int32_t head_dim,
                   const uint16_t *feedback, size_t each, uint32_t *words,
                   uint16_t *scales) {
    int refused = kvq_check_encode(kernel, precision, x, vectors, head_dim, words, scales);
    if (!refused && feedback && !each) refused = KVQ_MISFIT_SHAPE;
    return refused ? refused : kvq_choose_kernel(kernel)->encode(precision, x, vectors, head_dim, feedback, each, words, scales);
}

void kvq_rotate_heads(int32_t kernel, float *x, size_t heads, int32_t head_dim) {
    const kvq_kernel *chosen = kvq_choose_kernel(kernel);
    if (chosen) chosen->rotate(x, heads, head_dim);
}

void kvq_swiglu(int32_t kernel, const float *x, size_t n, float *out) {
    const kvq_kernel *chosen = kvq_choose_kernel(kernel);
    if (chosen) chosen->swiglu(x, n, out);
}

void kvq_add_norm(int32_t kernel, const float *x, const float *y, const float *gain, size_t n, float epsilon, float *sum,
                  float *normed) {
    const kvq_kernel *chosen = kvq_choose_kernel(kernel);
    if (chosen) chosen->add_norm(x, y, gain, n, epsilon, sum, normed);
}

int32_t kvq_move_tokens(const kvq_move *move) {
    const int refused = kvq_check_move(move, move ? move->tokens : 0);
    return refused || move->tokens < 1 ? refused : kvq_move_layers(move, 0, move->layers);
}

int32_t kvq_movable(const kvq_move *move) {
    const int refused = kvq_check_moved_values(move);
    if (refused) return refused;
    const kvq_kernel *chosen = kvq_choose_kernel(move->kernel);
    const size_t count = (size_t)move->layers * move->kv_heads * move->tokens * move->head_dim;
    return chosen->within(move->keys, count, LARGEST_MOVED - move->reach) && chosen->within(move->values, count, LARGEST_MOVED);
}

int32_t kvq_within(int32_t kernel, const float *x, size_t count, float limit) {
    const kvq_kernel *chosen = kvq_choose_kernel(kernel);
    if (!chosen) return KVQ_NO_KERNEL;
    return !x && count ? KVQ_NO_DATA : chosen->within(x, count, limit);
}
