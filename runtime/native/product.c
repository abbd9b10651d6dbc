/* Rows times a matrix of weights: cut into groups of columns and blocks of rows. */
#include <stdlib.h>

#include "drivers.h"

#define FEW_ROWS 8 /* are quantized by the calling thread */
#define ROWS_AT_A_TIME 16

typedef struct {
    const kvq_kernel *kernel;
    const kvq_matrix *matrix;
    const float *x;
    float *out;
    kvq_byte_rows rows;
    size_t groups;
} product_task;

static void quantize_work(void *data, size_t i) {
    const product_task *t = data;
    const size_t end = (i + 1) * ROWS_AT_A_TIME;
    for (size_t row = i * ROWS_AT_A_TIME; row < (end < t->rows.rows ? end : t->rows.rows); row++)
        t->kernel->quantize(t->matrix, t->x + row * t->matrix->k, row, &t->rows);
}

static void product_work(void *data, size_t i) {
    const product_task *t = data;
    const size_t first = i / t->groups * PRODUCT_MOST_ROWS, left = t->rows.rows - first;
    t->kernel->product(t->matrix, &t->rows, i % t->groups, first, left < PRODUCT_MOST_ROWS ? left : PRODUCT_MOST_ROWS,
                       t->out);
}

int kvq_product(int32_t kernel, const kvq_matrix *matrix, const float *x, size_t rows, float *out, kvq_parallel parallel,
                void *context) {
    product_task t = {.kernel = kvq_choose_kernel(kernel), .matrix = matrix, .x = x, .out = out, .rows.rows = rows};
    if (!t.kernel) return KVQ_NO_KERNEL;
    if ((size_t)matrix->n < t.kernel->product_columns) return KVQ_MISFIT_SHAPE;
    if (!rows) return 0;
    char *memory = NULL;
    const size_t blocks = matrix->blocks;
    for (int filled = 0; filled < 2; filled++) {
        size_t used = 0;
        t.rows.codes = kvq_part(memory, &used, rows * blocks * matrix->block);
        t.rows.scales = kvq_part(memory, &used, sizeof(float) * rows * blocks);
        t.rows.sums = kvq_part(memory, &used, sizeof(int32_t) * rows * blocks);
        if (!filled && !(memory = malloc(used))) return KVQ_NO_MEMORY;
    }
    const size_t parts = (rows + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    if (rows > FEW_ROWS) parallel(context, quantize_work, parts, &t);
    else quantize_work(&t, 0);
    t.groups = (matrix->n + t.kernel->product_columns - 1) / t.kernel->product_columns;
    parallel(context, product_work, t.groups * ((rows + PRODUCT_MOST_ROWS - 1) / PRODUCT_MOST_ROWS), &t);
    free(memory);
    return 0;
}
