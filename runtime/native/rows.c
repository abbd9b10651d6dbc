/* Nodes that see their rows one by one and no session: norms, activations and products. */
#include <stdlib.h>

#include "nodes.h"

/* The blocks that a node rotates of rows of so many columns: a power of two that divides them; 0: none. */
static size_t rotated_blocks(run *r, const node *self, int64_t columns) {
    if (!r->status && !kvq_rotates(self->block, (size_t)columns))
        fail(r, "kvq: block is neither 0 nor a power of two up to 1024 that divides the columns");
    return r->status ? 0 : (size_t)self->block;
}

/* kvq::SwiGLU: [tokens, 2 n] -> [tokens, n], silu of the first half times the second, every block of so many columns
 * times the Hadamard matrix;  attribute block, 0 if left out */
OrtStatus *kvq_node_swiglu(void *state, OrtKernelContext *context) {
    const node *self = state;
    run r = {self->api, context, NULL};
    const int64_t both = columns_of(&r, 0);
    size_t count;
    kvq_activated_rows rows = {.x = input(&r, 0, &count), .columns = (size_t)both / 2};
    if (!r.status && both % 2) fail(&r, "kvq::SwiGLU: an odd number of columns");
    rows.block = rotated_blocks(&r, self, both / 2);
    const int64_t all_rows = both ? (int64_t)count / both : 0;
    rows.out = output(&r, 0, all_rows, both / 2);
    if (!r.status) run_on_pool(&r, kvq_swiglu_rows, (size_t)all_rows, &rows);
    return r.status;
}

/* kvq::AddNorm: x, y [tokens, n], gain [n] -> x + y and its RMS norm times gain, [tokens, n] each, of the norm every
 * block of so many columns times the Hadamard matrix;  attributes epsilon, and block, 0 if left out */
OrtStatus *kvq_node_add_norm(void *state, OrtKernelContext *context) {
    const node *self = state;
    run r = {self->api, context, NULL};
    size_t count, columns;
    kvq_normed_rows rows = {.gain = input(&r, 2, &columns), .x = input(&r, 0, &count), .epsilon = self->epsilon};
    rows.y = floats(&r, 1, (int64_t)count);
    if (!r.status && (columns ? count % columns : count)) fail(&r, "kvq::AddNorm: not as many gains as columns");
    const int64_t all_rows = columns ? (int64_t)(count / columns) : 0;
    rows.columns = columns;
    rows.block = rotated_blocks(&r, self, (int64_t)columns);
    rows.sum = output(&r, 0, all_rows, (int64_t)columns);
    rows.normed = output(&r, 1, all_rows, (int64_t)columns);
    if (!r.status) run_on_pool(&r, kvq_norm_rows, (size_t)all_rows, &rows);
    return r.status;
}

/* kvq::Product: x [rows, k] -> [rows, n], x times the transpose of a packed matrix;  attributes matrix, the address of a
 * kvq_matrix, and kernel, the number of that which it was packed for. No file has them: the runtime puts such nodes into a
 * graph that it has read, see runtime/bundle/renaming.py, and keeps the matrix for as long as the graph. */
OrtStatus *kvq_node_product(void *state, OrtKernelContext *context) {
    const node *self = state;
    const kvq_matrix *m = (const kvq_matrix *)(uintptr_t)self->matrix;
    run r = {self->api, context, NULL};
    size_t count;
    const float *x = input(&r, 0, &count);
    if (!r.status && count % m->k) fail(&r, MISFIT);
    const size_t rows = count / m->k;
    float *out = output(&r, 0, (int64_t)rows, m->n);
    if (r.status) return r.status;
    const int error = kvq_product((int32_t)self->kernel, m, x, rows, out, run_on_pool, &r);
    if (error) refuse(&r, error);
    return r.status;
}
