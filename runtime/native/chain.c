/* Products, norms and activations that stand in a row between the attention of one layer and that of the next. */
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

int kvq_check_chain(const kvq_chain *chain, kvq_chain_shape *shape) {
    if (!chain || !chain->step || chain->steps < 1 || chain->step->kind != KVQ_STEP_PRODUCT || !chain->step->matrix)
        return KVQ_NO_DATA;
    *shape = (kvq_chain_shape){.in = chain->step->matrix->k, .gains = 0};
    size_t columns = shape->in;
    for (const kvq_step *s = chain->step; s < chain->step + chain->steps; s++) {
        if (s->kind == KVQ_STEP_PRODUCT) {
            const int refused = kvq_check_matrix(chain->kernel, s->matrix);
            if (refused) return refused;
            if ((size_t)s->matrix->k != columns) return KVQ_MISFIT_SHAPE;
            columns = s->matrix->n;
        } else if (s->kind == KVQ_STEP_ADD_NORM) {
            if (shape->gains++ && columns != shape->residual) return KVQ_MISFIT_SHAPE;
            shape->residual = columns;
        } else if (s->kind == KVQ_STEP_SWIGLU) {
            if (columns % 2) return KVQ_MISFIT_SHAPE;
            columns /= 2;
        } else return KVQ_MISFIT_SHAPE;
        if (s->kind != KVQ_STEP_PRODUCT && !kvq_rotates(s->block, columns)) return KVQ_MISFIT_SHAPE;
        if (columns > shape->widest) shape->widest = columns;
    }
    shape->out = columns;
    return shape->gains && shape->gains <= KVQ_MOST_GAINS ? 0 : KVQ_MISFIT_SHAPE;
}

int kvq_run_chain(const kvq_chain *chain, const kvq_chain_shape *shape, const kvq_chain_rows *rows, kvq_parallel parallel,
                  void *context) {
    const size_t floats = rows->rows * shape->widest;
    if (!rows->rows) return 0;
    float *memory = malloc(sizeof *memory * 2 * floats);
    if (!memory) return KVQ_NO_MEMORY;
    const float *x = rows->x, *residual = rows->residual;
    size_t columns = shape->in;
    int failed = 0, gain = 0;
    for (int i = 0; i < chain->steps && !failed; i++) {
        const kvq_step *s = chain->step + i;
        float *to = i + 1 == chain->steps ? rows->out : memory + i % 2 * floats;
        if (s->kind == KVQ_STEP_PRODUCT) {
            failed = kvq_product(chain->kernel, s->matrix, x, rows->rows, to, parallel, context);
            columns = s->matrix->n;
        } else if (s->kind == KVQ_STEP_ADD_NORM) {
            kvq_normed_rows normed = {residual, x, rows->gain[gain++], rows->sum, to, columns, s->block, s->epsilon};
            parallel(context, kvq_norm_rows, rows->rows, &normed);
            residual = rows->sum;
        } else {
            columns /= 2;
            parallel(context, kvq_swiglu_rows, rows->rows, &(kvq_activated_rows){x, to, columns, s->block});
        }
        x = to;
    }
    free(memory);
    return failed;
}
