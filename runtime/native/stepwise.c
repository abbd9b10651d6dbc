/* Several new tokens, each of which sees what it would see if it came alone: the tokens before it have gone their way
 * through the recent window. A block of them at a time: first all that they move is moved, and each gets its own copy of
 * the window and of the counts of pages; then those whose pages are cut alike read them together. */
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

/* Neighbours of a block whose work is cut alike: they read pages together. */
typedef struct {
    int first, tokens;
    size_t items_before; /* of the groups before it */
} row_group;

typedef struct {
    const kvq_task *task; /* of the whole pass */
    int first, tokens;    /* of the block */
    kvq_task of[MOST_TOGETHER]; /* each token by itself, with the pass and the rows that it refers to */
    kvq_pass pass[MOST_TOGETHER];
    kvq_rows rows[MOST_TOGETHER];
    row_group group[MOST_TOGETHER];
    int groups;
    size_t items, taken;
    unsigned widths;
    kvq_page *page;    /* [pages]: as they are before the next token */
    kvq_page *seen;    /* [tokens, pages]: as each token finds them */
    int32_t *chunk;    /* [tokens, pages + 1] */
    float *query;      /* of every token, what `queries` of a kernel makes */
    kvq_integer_query *integer;
    int32_t *words;
    float *turned;     /* [tokens, heads, blocks of turns] */
    uint32_t *window[2];       /* values and keys as each token finds them, [tokens, kv_heads, capacity, words] */
    uint16_t *window_scale[2]; /* [tokens, kv_heads, capacity] */
    char *partials;    /* of tokens, chunks and heads; behind them what threads need */
    char *scratch;
    size_t scratch_bytes; /* of a thread */
} row_block;

static const kvq_page *window_of(const row_block *b) {
    return b->task->pass->stepwise->window;
}

/* Words of the window's keys or values of a KV head. */
static size_t window_words(const row_block *b) {
    const kvq_page *window = window_of(b);
    return (size_t)window->capacity * words_per_vector(window->key_precision, b->task->pass->head_dim);
}

/* Count a token that has moved: into the window, whose rows are [of_window, pages), and out of it where a page has a place
 * for another one. */
static void count_move(kvq_page *page, int of_window, int pages, const kvq_move_step *step) {
    if (step->page >= 0) page[step->page].count++;
    for (int p = of_window; p < pages; p++) {
        if (page[p].count == page[p].period) continue;
        if (++page[p].count == page[p].period) page[p].first = 0;
    }
}

/* The pages as token t of the block finds them. */
static void see_pages(row_block *b, int t) {
    const kvq_pass *pass = b->task->pass;
    const kvq_move *move = pass->stepwise;
    kvq_page *seen = b->seen + (size_t)t * pass->pages;
    memcpy(seen, b->page, sizeof *seen * (size_t)pass->pages);
    const ptrdiff_t words = (ptrdiff_t)window_words(b), slots = window_of(b)->capacity;
    const ptrdiff_t row = (ptrdiff_t)(t - b->task->layer) * pass->kv_heads; /* of layer `layer` those are the copies */
    for (int p = move->pages; p < pass->pages; p++) {
        seen[p].values = b->window[0] + row * words, seen[p].keys = b->window[1] + row * words;
        seen[p].value_scales = b->window_scale[0] + row * slots, seen[p].key_scales = b->window_scale[1] + row * slots;
    }
    if (b->task->window) kvq_cut_pages(seen, pass->pages, pass->position + b->first + t, b->task->window);
}

/* The task of token t of the block by itself. */
static void task_of(row_block *b, int t) {
    const kvq_pass *whole = b->task->pass;
    kvq_task *task = b->of + t;
    kvq_pass *pass = b->pass + t;
    kvq_rows *rows = b->rows + t;
    const size_t heads = whole->heads, at = b->first + t;
    *task = *b->task, *pass = *whole, *rows = *task->rows;
    rows->query += at * rows->query_stride, rows->key += at * rows->key_stride, rows->value += at * rows->value_stride;
    rows->out += at * heads * pass->head_dim;
    if (rows->row_squares) rows->row_squares += at * heads;
    see_pages(b, t);
    pass->tokens = 1, pass->position += (int32_t)at, pass->page = b->seen + (size_t)t * whole->pages;
    task->pass = pass, task->rows = rows;
    task->query = b->query + t * heads * task->padded_dim;
    task->integer = b->integer + t * heads;
    task->words = b->words + t * heads * integer_words_all(pass->head_dim);
    if (task->turns) task->turned = b->turned + t * heads * task->turns->blocks;
    int32_t *chunk = b->chunk + t * ((size_t)whole->pages + 1);
    task->chunk = chunk;
    task->chunks = kvq_plan_chunks(pass, chunk, &task->chunk_room);
}

/* Whether two tokens' work is cut alike: the same pages in the same chunks, none of them empty for one alone. */
static int alike(const kvq_task *a, const kvq_task *b) {
    if (a->chunks != b->chunks || memcmp(a->chunk, b->chunk, sizeof *a->chunk * ((size_t)a->chunks + 1))) return 0;
    for (int p = 0; p < a->pass->pages; p++)
        if ((slots_of(a->pass->page + p) > 0) != (slots_of(b->pass->page + p) > 0)) return 0;
    return 1;
}

static size_t threads_of(const row_block *b) { return b->task->pass->threads < 1 ? 1 : (size_t)b->task->pass->threads; }

/* Tokens by themselves, who goes with whom, and where their partial results are. Returns 0 or NO_MEMORY. */
static int plan_block(row_block *b) {
    const kvq_pass *pass = b->task->pass;
    size_t bytes = 0, used = 0;
    int room = 0;
    b->groups = 0, b->items = b->taken = 0;
    for (int t = 0; t < b->tokens; t++) {
        task_of(b, t);
        const kvq_task *task = b->of + t;
        bytes += (size_t)task->chunks * pass->heads * partial_bytes(task);
        if (task->chunk_room > room) room = task->chunk_room;
        if (t && alike(task - 1, task)) {
            b->group[b->groups - 1].tokens++;
        } else {
            b->group[b->groups++] = (row_group){t, 1, b->items};
            b->items += (size_t)task->chunks * pass->kv_heads;
        }
        if (b->first + t + 1 < pass->tokens)
            count_move(b->page, pass->stepwise->pages, pass->pages, pass->stepwise->step + b->first + t);
    }
    b->scratch_bytes = b->task->kernel->rows_bytes(b->task, b->tokens, room);
    if (!(b->partials = malloc(bytes + threads_of(b) * b->scratch_bytes + 64))) return KVQ_NO_MEMORY;
    b->scratch = b->partials + bytes;
    b->scratch += (64 - (uintptr_t)b->scratch % 64) % 64;
    for (int t = 0; t < b->tokens; t++) {
        b->of[t].partials = b->partials + used;
        used += (size_t)b->of[t].chunks * pass->heads * partial_bytes(b->of + t);
    }
    return 0;
}

static void make_queries(const row_block *b, int t) {
    const kvq_task *task = b->of + t;
    for (int h = 0; h < task->pass->heads; h++)
        task->kernel->query(task, b->widths, h, (float *)task->query + (size_t)h * task->padded_dim,
                            (kvq_integer_query *)task->integer + h,
                            (int32_t *)task->words + (size_t)h * integer_words_all(task->pass->head_dim));
    for (int h = 0; task->turns && h < task->pass->kv_heads; h++)
        task->kernel->turn(task, h, first_turn(task), end_turn(task, 1),
                           (float *)task->turned + (size_t)h * task->group * task->turns->blocks);
}

/* All keys or values of a KV head go their way, and the window is kept as each token finds it. */
static void move_head(const row_block *b, int of_keys, int kv_head) {
    const kvq_pass *pass = b->task->pass;
    const kvq_move *move = pass->stepwise;
    const kvq_page *window = move->window;
    const size_t words = window_words(b), slots = window->capacity;
    const size_t row = (size_t)b->task->layer * pass->kv_heads + kv_head;
    const uint32_t *codes = (of_keys ? window->keys : window->values) + row * words;
    const uint16_t *scales = (of_keys ? window->key_scales : window->value_scales) + row * slots;
    const int left = pass->tokens - 1 - b->first, moving = b->tokens < left ? b->tokens : left; /* not the pass's last token */
    b->task->kernel->leave_rows(move, of_keys, row, b->first, moving);
    for (int t = 0; t < b->tokens; t++) {
        const size_t to = (size_t)t * pass->kv_heads + kv_head;
        memcpy(b->window[of_keys] + to * words, codes, sizeof *codes * words);
        memcpy(b->window_scale[of_keys] + to * slots, scales, sizeof *scales * slots);
        if (t < moving) b->task->kernel->enter_row(move, of_keys, row, b->first + t);
    }
}

static void begin_work(void *data, size_t i) {
    const row_block *b = data;
    const size_t moves = 2 * (size_t)b->task->pass->kv_heads; /* first: they take the longest */
    if (i < moves) move_head(b, i % 2, (int)(i / 2));
    else make_queries(b, (int)(i - moves));
}

/* Threads take items from one queue. */
static void attend_work(void *data, size_t thread) {
    row_block *b = data;
    for (;;) {
        const size_t i = __atomic_fetch_add(&b->taken, 1, __ATOMIC_RELAXED);
        if (i >= b->items) return;
        int g = b->groups - 1;
        while (b->group[g].items_before > i) g--;
        const kvq_task *task = b->of + b->group[g].first;
        task->kernel->decode_rows(task, b->group[g].tokens, i - b->group[g].items_before,
                                  b->scratch + thread * b->scratch_bytes);
    }
}

static void merge_work(void *data, size_t t) {
    const row_block *b = data;
    const kvq_task *task = b->of + t;
    for (int h = 0; h < task->pass->heads; h++) task->kernel->merge(task, h);
}

static int attend_block(row_block *b, kvq_parallel parallel, void *context) {
    const kvq_pass *pass = b->task->pass;
    const size_t threads = threads_of(b);
    if (plan_block(b)) return KVQ_NO_MEMORY;
    parallel(context, begin_work, (size_t)b->tokens + 2 * (size_t)pass->kv_heads, b);
    if (threads > 1) parallel(context, attend_work, b->items < threads ? b->items : threads, b);
    else attend_work(b, 0);
    parallel(context, merge_work, (size_t)b->tokens, b);
    free(b->partials);
    return 0;
}

int kvq_attend_stepwise(const kvq_task *task, kvq_parallel parallel, void *context) {
    const kvq_pass *pass = task->pass;
    const size_t most = pass->tokens < MOST_TOGETHER ? pass->tokens : MOST_TOGETHER, pages = (size_t)pass->pages;
    const size_t rows = most * pass->heads;
    row_block b = {.task = task, .widths = kvq_key_widths(pass)};
    const size_t slots = most * pass->kv_heads * window_of(&b)->capacity, words = most * pass->kv_heads * window_words(&b);
    char *memory = NULL;
    for (int filled = 0; filled < 2; filled++) {
        size_t used = 0;
        b.query = kvq_part(memory, &used, sizeof *b.query * rows * task->padded_dim);
        b.integer = kvq_part(memory, &used, sizeof *b.integer * rows);
        b.words = kvq_part(memory, &used, sizeof *b.words * rows * integer_words_all(pass->head_dim));
        b.turned = kvq_part(memory, &used, task->turns ? sizeof *b.turned * rows * task->turns->blocks : 0);
        b.page = kvq_part(memory, &used, sizeof *b.page * pages);
        b.seen = kvq_part(memory, &used, sizeof *b.seen * most * pages);
        b.chunk = kvq_part(memory, &used, sizeof *b.chunk * most * (pages + 1));
        for (int of_keys = 0; of_keys < 2; of_keys++) {
            b.window[of_keys] = kvq_part(memory, &used, sizeof *b.window[0] * words);
            b.window_scale[of_keys] = kvq_part(memory, &used, sizeof *b.window_scale[0] * slots);
        }
        if (!filled && !(memory = malloc(used))) return KVQ_NO_MEMORY;
    }
    memcpy(b.page, pass->page, sizeof *b.page * pages);
    int failed = 0;
    for (; b.first < pass->tokens && !failed; b.first += MOST_TOGETHER) {
        b.tokens = pass->tokens - b.first < MOST_TOGETHER ? pass->tokens - b.first : MOST_TOGETHER;
        failed = attend_block(&b, parallel, context);
    }
    free(memory);
    return failed;
}
