/* Attention of one new token: threads take work items, make what a KV head's first item needs, and merge what its last one
 * leaves. Nothing but the plan is left to one thread alone. */
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

/* Below this many multiply-adds a second thread costs more than it brings. */
#define SERIAL_WORK (1 << 17)

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
    head_state *head;
    size_t items, taken, from_end[2];
} decode_step;

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

int kvq_decode(const kvq_task *whole, const kvq_prepare *prepare, kvq_parallel parallel, void *context) {
    const kvq_pass *pass = whole->pass;
    int32_t few[256], *chunk = pass->pages < 256 ? few : malloc(sizeof(int32_t) * ((size_t)pass->pages + 1));
    if (!chunk) return KVQ_NO_MEMORY;
    decode_step s = {.task = *whole, .prepare = prepare, .widths = kvq_key_widths(pass)};
    kvq_task *task = &s.task;
    task->chunk = chunk;
    task->chunks = kvq_plan_chunks(pass, chunk, &task->chunk_room);
    s.items = (size_t)task->chunks * pass->kv_heads;
    char *memory = NULL;
    for (int filled = 0; filled < 2; filled++) {
        size_t used = 0;
        s.query = kvq_part(memory, &used, sizeof *s.query * task->padded_dim * pass->heads);
        s.integer = kvq_part(memory, &used, sizeof *s.integer * pass->heads);
        s.words = kvq_part(memory, &used, sizeof *s.words * integer_words_all(pass->head_dim) * pass->heads);
        s.head = kvq_part(memory, &used, sizeof *s.head * pass->kv_heads);
        task->partials = kvq_part(memory, &used, s.items * task->group * partial_bytes(task));
        if (!filled && !(memory = malloc(used))) break;
    }
    if (memory) {
        task->query = s.query, task->words = s.words, task->integer = s.integer;
        for (int h = 0; h < pass->kv_heads; h++) s.head[h] = (head_state){.left = task->chunks};
        const long work = (long)s.items * task->chunk_room * task->group * pass->head_dim;
        const size_t threads = work < SERIAL_WORK || pass->threads < 1 ? 1 : pass->threads;
        if (threads == 1 || s.items < 2) decode_work(&s, 0);
        else parallel(context, decode_work, s.items < threads ? s.items : threads, &s);
        for (int h = 0; s.items == 0 && h < pass->kv_heads; h++) prepare_head(&s, h), merge_head(&s, h);
    }
    free(memory);
    if (chunk != few) free(chunk);
    return memory ? 0 : KVQ_NO_MEMORY;
}
