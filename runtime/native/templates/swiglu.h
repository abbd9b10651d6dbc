/* The gated activation of the feed-forward block. */
#ifndef KVQ_SWIGLU_H
#define KVQ_SWIGLU_H

#include "vector.h"

INLINE vf silu(vf x) {
    vf e = exp_f((vf)((vu)x | 0x80000000u)); /* e^-|x| */
    vf sigmoid = select_f(x < 0, e, splat(1)) / (e + 1.0f);
    return x * sigmoid;
}

static void swiglu_row(const float *x, size_t n, float *out) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) store_f(out + i, silu(load_f(x + i)) * load_f(x + n + i));
    if (i == n) return;
    vf gate = {0}, up = {0};
    memcpy(&gate, x + i, sizeof(float) * (n - i));
    memcpy(&up, x + n + i, sizeof(float) * (n - i));
    gate = silu(gate) * up;
    memcpy(out + i, &gate, sizeof(float) * (n - i));
}

#endif
