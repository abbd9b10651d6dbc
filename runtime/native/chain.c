/* Products, norms, activations and attention that follow one another, of one layer or of all. */
#include <stdlib.h>

#include "drivers.h"

enum { MOST_ROTATED = 1024 };

int kvq_rotates(int64_t block, size_t columns) {
    return !block || (block > 0 && block <= MOST_ROTATED && !(block & (block - 1)) && columns % (size_t)block == 0);
}

void kvq_norm_rows(void *data, size_t row) {
    const kvq_normed_rows *s = data;
    const size_t at = row * s->columns;
    kvq_add_norm(-1, s->x + at, s->y + at, s->gain, s->columns, s->epsilon, s->sum + at, s->normed + at);
    if (s->block) kvq_rotate_heads(-1, s->normed + at, s->columns / s->block, (int32_t)s->block);
}

void kvq_swiglu_rows(void *data, size_t row) {
    const kvq_activated_rows *s = data;
    float *out = s->out + row * s->columns;
    kvq_swiglu(-1, s->x + row * 2 * s->columns, s->columns, out);
    if (s->block) kvq_rotate_heads(-1, out, s->columns / s->block, (int32_t)s->block);
}

/* The columns that a step makes of so many; 0: it does not fit. `next` is the step behind it, or null. */
static size_t columns_after(const kvq_step *s, const kvq_step *next, size_t columns) {
    switch (s->kind) {
    case KVQ_STEP_PRODUCT:
        return s->matrix && (size_t)s->matrix->k == columns ? (size_t)s->matrix->n : 0;
    case KVQ_STEP_ADD_NORM:
        return kvq_rotates(s->block, columns) ? columns : 0;
    case KVQ_STEP_SWIGLU:
        return columns % 2 || !kvq_rotates(s->block, columns / 2) ? 0 : columns / 2;
    case KVQ_STEP_ATTENTION: /* how many it yields depends on the pass: those that are wanted, which it will see */
        if (s->layer < 0 || (s->inputs != 3 && s->inputs != 6)) return 0;
        return next && next->kind == KVQ_STEP_PRODUCT && next->matrix ? (size_t)next->matrix->k : 0;
    default: return 0;
    }
}

int kvq_check_chain(const kvq_chain *chain, kvq_chain_shape *shape) {
    if (!chain || !chain->step || chain->steps < 1 || chain->step->kind != KVQ_STEP_PRODUCT || !chain->step->matrix)
        return KVQ_NO_DATA;
    *shape = (kvq_chain_shape){.in = chain->step->matrix->k};
    size_t columns = shape->in;
    for (int i = 0; i < chain->steps; i++) {
        const kvq_step *s = chain->step + i;
        const int refused = s->kind == KVQ_STEP_PRODUCT ? kvq_check_matrix(chain->kernel, s->matrix) : 0;
        if (refused) return refused;
        columns = columns_after(s, i + 1 < chain->steps ? s + 1 : NULL, columns);
        if (!columns) return KVQ_MISFIT_SHAPE;
        if (s->kind == KVQ_STEP_ATTENTION) shape->inputs += s->inputs;
        if (s->kind == KVQ_STEP_ADD_NORM) {
            if (shape->residual && columns != shape->residual) return KVQ_MISFIT_SHAPE;
            shape->residual = columns, shape->inputs++;
        }
        if (columns > shape->widest) shape->widest = columns;
    }
    shape->out = columns;
    return shape->residual ? 0 : KVQ_MISFIT_SHAPE;
}

/* What a chain has at hand. */
typedef struct {
    const kvq_chain *chain;
    const kvq_chain_rows *rows;
    const float *x, *residual;
    size_t columns; /* of x */
    const kvq_input *input; /* of the steps to come */
} chain_state;

/* One step, to [rows, columns]. */
static int run_step(chain_state *c, const kvq_step *s, size_t columns, float *to, kvq_parallel parallel, void *context) {
    const kvq_chain_rows *rows = c->rows;
    if (s->kind == KVQ_STEP_PRODUCT) return kvq_product(c->chain->kernel, s->matrix, c->x, rows->rows, to, parallel, context);
    if (s->kind == KVQ_STEP_ATTENTION) {
        const kvq_projected projected = {
            {c->x, rows->rows * c->columns}, c->input, s->inputs, s->layer, s->rotate, to, rows->rows, columns};
        c->input += s->inputs;
        return kvq_attend_projected(rows->pass, &projected, parallel, context);
    }
    if (s->kind == KVQ_STEP_SWIGLU) {
        parallel(context, kvq_swiglu_rows, rows->rows, &(kvq_activated_rows){c->x, to, columns, s->block});
        return 0;
    }
    if (c->input->count != columns) return KVQ_MISFIT_INPUT;
    kvq_normed_rows normed = {c->residual, c->x, c->input++->data, rows->sum, to, columns, s->block, s->epsilon};
    parallel(context, kvq_norm_rows, rows->rows, &normed);
    c->residual = rows->sum;
    return 0;
}

int kvq_run_chain(const kvq_chain *chain, const kvq_chain_shape *shape, const kvq_chain_rows *rows, kvq_parallel parallel,
                  void *context) {
    const size_t floats = rows->rows * shape->widest;
    if (!rows->rows) return 0;
    float *memory = malloc(sizeof *memory * 2 * floats);
    if (!memory) return KVQ_NO_MEMORY;
    chain_state c = {chain, rows, rows->x, rows->residual, shape->in, rows->input};
    int failed = 0;
    for (int i = 0; i < chain->steps && !failed; i++) {
        const kvq_step *s = chain->step + i;
        const int last = i + 1 == chain->steps;
        const size_t columns = columns_after(s, last ? NULL : s + 1, c.columns);
        float *to = last ? rows->out : memory + i % 2 * floats;
        failed = run_step(&c, s, columns, to, parallel, context);
        c.x = to, c.columns = columns;
    }
    free(memory);
    return failed;
}
