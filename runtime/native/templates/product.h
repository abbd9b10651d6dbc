/* Dense products of a few rows, with the sums in registers. */
#ifndef KVQ_PRODUCT_H
#define KVQ_PRODUCT_H

#include "vector.h"

#if LANES == 16 || defined(__aarch64__)
#define PRODUCT_ROWS 6
#else
#define PRODUCT_ROWS 3 /* 16 registers */
#endif
#define PRODUCT_VECTORS 4

/* c = keep * c + a b for PRODUCT_ROWS rows and `vectors` vectors of columns; without keep c = a b. */
INLINE void product_block(int vectors, const vf *keep, int depth, const float *a, int a_stride, const float *b,
                          int b_stride, float *c, int c_stride) {
    vf sum[PRODUCT_ROWS][PRODUCT_VECTORS];
    for (int r = 0; r < PRODUCT_ROWS; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = keep ? keep[r] * load_f(c + r * c_stride + v * LANES) : splat(0);
    for (int k = 0; k < depth; k++) {
        vf x[PRODUCT_VECTORS];
        for (int v = 0; v < vectors; v++) x[v] = load_f(b + (size_t)k * b_stride + v * LANES);
        for (int r = 0; r < PRODUCT_ROWS; r++)
            for (int v = 0; v < vectors; v++) sum[r][v] += x[v] * a[(size_t)r * a_stride + k];
    }
    for (int r = 0; r < PRODUCT_ROWS; r++)
        for (int v = 0; v < vectors; v++) store_f(c + r * c_stride + v * LANES, sum[r][v]);
}

/* a [PRODUCT_ROWS, depth], b [depth, columns], c [PRODUCT_ROWS, columns]; columns a multiple of LANES. */
INLINE void product(const vf *keep, int columns, int depth, const float *a, int a_stride, const float *b, int b_stride,
                    float *c, int c_stride) {
    int n = 0;
    for (; n + PRODUCT_VECTORS * LANES <= columns; n += PRODUCT_VECTORS * LANES)
        product_block(PRODUCT_VECTORS, keep, depth, a, a_stride, b + n, b_stride, c + n, c_stride);
    for (; n < columns; n += LANES) product_block(1, keep, depth, a, a_stride, b + n, b_stride, c + n, c_stride);
}

#endif
