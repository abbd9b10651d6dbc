/* Attention of one new token, or of one of each of several sessions: threads take work items, make what a KV head's first item needs, and merge what its last one
 * leaves. Nothing but the plan is left to one thread alone. */
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

/* Below this many multiply-adds a second thread costs more than it brings. */
#define SERIAL_WORK (1 << 17)

#define FEW_PAGES 256

#define FIRST_BYTES 4096 /* of a thread's first item, on their way while its head is prepared */

/* How far a KV head is: whether a thread has begun to prepare it, has done so, and how many items are left. */
typedef struct {
    int begun, ready, left;
} head_state;

/* Each thread takes another item when it is done with one: a pool that cuts them into a part for each would have the
 * threads wait for the slowest. Every other thread comes from the other end, where precisions are others: tokens of 16
 * bits are bound by memory, those of few bits by arithmetic. */
typedef struct {
    kvq_task task;
    const kvq_prepare *prepare;
    unsigned widths;
    float *query;
    kvq_integer_query *integer;
    int32_t *words;
    float *turned;
    head_state *head;
    size_t items, taken, from_end[2];
    char *memory;   /* of what is above */
    int32_t *chunk; /* few, or memory of its own where there are more pages */
    int32_t few[FEW_PAGES];
} decode_step;

typedef struct {
    decode_step *step;
    size_t count;
} decode_steps;

static void relax(void) {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void prepare_head(const decode_step *s, int kv_head) {
    const kvq_task *task = &s->task;
    const kvq_pass *pass = task->pass;
    const int first = kv_head * task->group, end = first + task->group, key = pass->heads + kv_head;
    if (s->prepare) {
        task->kernel->prepare(s->prepare, 0, first, end);
        task->kernel->prepare(s->prepare, 0, key, key + 1);
    }
    kvq_keep_token(task, kv_head, 0);
    for (int h = first; h < end; h++)
        task->kernel->query(task, s->widths, h, s->query + (size_t)h * task->padded_dim, s->integer + h,
                            s->words + (size_t)h * integer_words_all(pass->head_dim));
    if (task->turns)
        task->kernel->turn(task, kv_head, first_turn(task), end_turn(task, 1),
                           s->turned + (size_t)first * task->turns->blocks);
}

/* Returns when a KV head is prepared; by this thread, if no other one has begun. */
static void await_head(const decode_step *s, int kv_head) {
    head_state *head = s->head + kv_head;
    if (__atomic_load_n(&head->ready, __ATOMIC_ACQUIRE)) return;
    if (!__atomic_exchange_n(&head->begun, 1, __ATOMIC_RELAXED)) {
        prepare_head(s, kv_head);
        __atomic_store_n(&head->ready, 1, __ATOMIC_RELEASE);
    }
    while (!__atomic_load_n(&head->ready, __ATOMIC_ACQUIRE)) relax();
}

static void merge_head(const decode_step *s, int kv_head) {
    for (int g = 0; g < s->task.group; g++) s->task.kernel->merge(&s->task, kv_head * s->task.group + g);
}

static void decode_work(void *data, size_t thread) {
    decode_step *s = data;
    const kvq_task *task = &s->task;
    const int end = thread % 2;
    while (__atomic_fetch_add(&s->taken, 1, __ATOMIC_RELAXED) < s->items) {
        const size_t n = __atomic_fetch_add(&s->from_end[end], 1, __ATOMIC_RELAXED);
        const size_t item = end ? s->items - 1 - n : n, after = end ? item - 1 : item + 1;
        const int kv_head = item_head(task, item);
        if (n == 0) prefetch(start_of(task, item), FIRST_BYTES);
        await_head(s, kv_head);
        task->kernel->decode(task, item, after < s->items ? after : item);
        if (__atomic_sub_fetch(&s->head[kv_head].left, 1, __ATOMIC_ACQ_REL) == 0) merge_head(s, kv_head);
    }
}

/* A thread that finds no item left of one session goes on to the next: nobody waits but at the end of all. */
static void decode_all(void *data, size_t thread) {
    const decode_steps *all = data;
    for (size_t i = 0; i < all->count; i++) decode_work(all->step + i, thread);
}

/* Plan a step and make its memory, which end_step frees, also where there was not enough. */
static int begin_step(decode_step *s, const kvq_single *single) {
    const kvq_pass *pass = single->task.pass;
    s->task = single->task, s->prepare = single->prepare, s->widths = kvq_key_widths(pass);
    s->items = s->taken = s->from_end[0] = s->from_end[1] = 0;
    s->memory = NULL;
    s->chunk = pass->pages < FEW_PAGES ? s->few : malloc(sizeof(int32_t) * ((size_t)pass->pages + 1));
    if (!s->chunk) return KVQ_NO_MEMORY;
    kvq_task *task = &s->task;
    task->chunk = s->chunk;
    task->chunks = kvq_plan_chunks(pass, s->chunk, &task->chunk_room);
    s->items = (size_t)task->chunks * pass->kv_heads;
    for (int filled = 0; filled < 2; filled++) {
        size_t used = 0;
        s->query = kvq_part(s->memory, &used, sizeof *s->query * task->padded_dim * pass->heads);
        s->integer = kvq_part(s->memory, &used, sizeof *s->integer * pass->heads);
        s->words = kvq_part(s->memory, &used, sizeof *s->words * integer_words_all(pass->head_dim) * pass->heads);
        s->turned = kvq_part(s->memory, &used, task->turns ? sizeof *s->turned * task->turns->blocks * pass->heads : 0);
        s->head = kvq_part(s->memory, &used, sizeof *s->head * pass->kv_heads);
        task->partials = kvq_part(s->memory, &used, s->items * task->group * partial_bytes(task));
        if (!filled && !(s->memory = malloc(used))) return KVQ_NO_MEMORY;
    }
    task->query = s->query, task->words = s->words, task->integer = s->integer, task->turned = s->turned;
    for (int h = 0; h < pass->kv_heads; h++) s->head[h] = (head_state){.left = task->chunks};
    return 0;
}

static void end_step(decode_step *s) {
    free(s->memory);
    if (s->chunk != s->few) free(s->chunk);
}

/* Multiply-adds of a step. */
static size_t work_of(const decode_step *s) {
    return s->items * (size_t)s->task.chunk_room * s->task.group * s->task.pass->head_dim;
}

int kvq_decode(const kvq_single *single, size_t count, kvq_parallel parallel, void *context) {
    decode_step alone;
    decode_steps all = {.step = count > 1 ? malloc(sizeof(decode_step) * count) : &alone};
    int failed = all.step ? 0 : KVQ_NO_MEMORY;
    size_t work = 0, items = 0;
    while (!failed && all.count < count) {
        decode_step *s = all.step + all.count;
        failed = begin_step(s, single + all.count++);
        work += failed ? 0 : work_of(s), items += s->items;
    }
    if (!failed && count) {
        const int32_t most = single->task.pass->threads;
        const size_t threads = work < SERIAL_WORK || most < 1 ? 1 : most;
        if (threads == 1 || items < 2) decode_all(&all, 0);
        else parallel(context, decode_all, items < threads ? items : threads, &all);
        for (size_t i = 0; i < count; i++) /* of stores without tokens */
            for (int h = 0; all.step[i].items == 0 && h < single[i].task.pass->kv_heads; h++)
                prepare_head(all.step + i, h), merge_head(all.step + i, h);
    }
    for (size_t i = 0; i < all.count; i++) end_step(all.step + i);
    if (all.step != &alone) free(all.step);
    return failed;
}
