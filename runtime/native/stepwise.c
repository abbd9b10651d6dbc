/* Several new tokens, each of which sees what it would see if it came alone: the tokens before it have gone their way
 * through the recent window. A KV head's tokens are one work item, since they have to follow each other. */
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

typedef struct {
    const kvq_task *task;
    /* of every new token, what `queries` of a kernel makes */
    float *query;
    kvq_integer_query *integer;
    int32_t *words;
    /* of every KV head: the pages as they are before a token, its plan of chunks, its partial results */
    kvq_page *page, *seen; /* seen: through the layer's window */
    int32_t *chunk;
    float *turned; /* of one token at a time, [heads, blocks of turns] */
    char *partials;
    size_t partials_bytes;
    unsigned widths;
} stepwise;

/* The task of one new token by itself. Pass and rows are copies for it to refer to. */
static kvq_task task_of(const stepwise *s, size_t t, kvq_pass *pass, kvq_rows *rows) {
    kvq_task task = *s->task;
    const size_t heads = pass->heads;
    rows->query += t * rows->query_stride, rows->key += t * rows->key_stride, rows->value += t * rows->value_stride;
    rows->out += t * heads * pass->head_dim;
    if (rows->row_squares) rows->row_squares += t * heads;
    pass->tokens = 1;
    task.pass = pass, task.rows = rows;
    task.query = s->query + t * heads * task.padded_dim;
    task.integer = s->integer + t * heads;
    task.words = s->words + t * heads * integer_words_all(pass->head_dim);
    return task;
}

static void query_work(void *data, size_t t) {
    const stepwise *s = data;
    kvq_pass pass = *s->task->pass;
    kvq_rows rows = *s->task->rows;
    const kvq_task task = task_of(s, t, &pass, &rows);
    for (int h = 0; h < pass.heads; h++)
        task.kernel->query(&task, s->widths, h, (float *)task.query + (size_t)h * task.padded_dim,
                           (kvq_integer_query *)task.integer + h,
                           (int32_t *)task.words + (size_t)h * integer_words_all(pass.head_dim));
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

static void head_work(void *data, size_t kv_head) {
    const stepwise *s = data;
    const kvq_pass *whole = s->task->pass;
    const kvq_move *move = whole->stepwise;
    const int group = s->task->group;
    kvq_page *page = s->page + kv_head * whole->pages;
    memcpy(page, whole->page, sizeof *page * (size_t)whole->pages);
    for (int t = 0; t < whole->tokens; t++) {
        kvq_pass pass = *whole;
        kvq_rows rows = *s->task->rows;
        kvq_task task = task_of(s, (size_t)t, &pass, &rows);
        pass.page = page;
        if (task.window) {
            kvq_page *seen = s->seen + kv_head * whole->pages;
            memcpy(seen, page, sizeof *page * (size_t)whole->pages);
            kvq_cut_pages(seen, whole->pages, whole->position + t, task.window);
            pass.page = seen;
        }
        int32_t *chunk = s->chunk + kv_head * ((size_t)whole->pages + 1);
        task.chunk = chunk;
        task.chunks = kvq_plan_chunks(&pass, chunk, &task.chunk_room);
        task.partials = s->partials + kv_head * s->partials_bytes;
        task.first_kv_head = (int)kv_head;
        if (task.turns) {
            float *turned = s->turned + kv_head * group * task.turns->blocks;
            for (int g = 0; g < group; g++)
                task.kernel->turn(&task, (int)kv_head * group + g, first_turn(&task), end_turn(&task, whole->tokens),
                                  turned + (size_t)g * task.turns->blocks);
            task.turned = turned;
        }
        for (int c = 0; c < task.chunks; c++) {
            const size_t item = item_number(&task, (int)kv_head, c);
            task.kernel->decode(&task, item, c + 1 < task.chunks ? item_number(&task, (int)kv_head, c + 1) : item);
        }
        for (int g = 0; g < group; g++) task.kernel->merge(&task, (int)kv_head * group + g);
        if (t + 1 == whole->tokens) break;
        task.kernel->move_token(move, (size_t)s->task->layer * whole->kv_heads + kv_head, t);
        count_move(page, move->pages, whole->pages, move->step + t);
    }
}

int kvq_attend_stepwise(const kvq_task *task, kvq_parallel parallel, void *context) {
    const kvq_pass *pass = task->pass;
    const size_t rows = (size_t)pass->tokens * pass->heads, pages = (size_t)pass->pages, kv_heads = pass->kv_heads;
    stepwise s = {.task = task, .widths = kvq_key_widths(pass)};
    s.partials_bytes = (pages * task->group * partial_bytes(task) + 63) / 64 * 64;
    char *memory = NULL;
    for (int filled = 0; filled < 2; filled++) {
        size_t used = 0;
        s.query = kvq_part(memory, &used, sizeof *s.query * rows * task->padded_dim);
        s.integer = kvq_part(memory, &used, sizeof *s.integer * rows);
        s.words = kvq_part(memory, &used, sizeof *s.words * rows * integer_words_all(pass->head_dim));
        s.page = kvq_part(memory, &used, sizeof *s.page * kv_heads * pages);
        s.seen = kvq_part(memory, &used, sizeof *s.seen * kv_heads * (task->window ? pages : 0));
        s.chunk = kvq_part(memory, &used, sizeof *s.chunk * kv_heads * (pages + 1));
        s.turned = kvq_part(memory, &used, task->turns ? sizeof *s.turned * task->turns->blocks * pass->heads : 0);
        s.partials = kvq_part(memory, &used, s.partials_bytes * kv_heads);
        if (!filled && !(memory = malloc(used))) return KVQ_NO_MEMORY;
    }
    parallel(context, query_work, (size_t)pass->tokens, &s);
    parallel(context, head_work, kv_heads, &s);
    free(memory);
    return 0;
}
