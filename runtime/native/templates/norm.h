/* The residual stream between two products: what a block yields is added, and the sum normalised for the next one. */
#ifndef KVQ_NORM_H
#define KVQ_NORM_H

#include <math.h>

#include "vector.h"

/* sum = x + y, normed = gain * sum / sqrt(mean(sum^2) + epsilon), over n values (Zhang and Sennrich, arXiv 1910.07467).
 * Two sums of squares, so that one addition does not wait for the last one's result. */
static void add_norm_row(const float *x, const float *y, const float *gain, size_t n, float epsilon, float *sum,
                         float *normed) {
    const size_t whole = n / LANES * LANES;
    vf squares[2] = {splat(0), splat(0)};
    for (size_t i = 0; i < whole; i += LANES) {
        vf both = load_f(x + i) + load_f(y + i);
        store_f(sum + i, both);
        squares[i / LANES % 2] += both * both;
    }
    float total = sum_lanes(squares[0] + squares[1]);
    for (size_t i = whole; i < n; i++) {
        sum[i] = x[i] + y[i];
        total += sum[i] * sum[i];
    }
    const float inverse = 1 / sqrtf(total / (float)n + epsilon);
    for (size_t i = 0; i < whole; i += LANES) store_f(normed + i, load_f(sum + i) * inverse * load_f(gain + i));
    for (size_t i = whole; i < n; i++) normed[i] = sum[i] * inverse * gain[i];
}

#endif
