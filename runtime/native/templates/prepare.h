/* Queries and keys as attention takes them: rotary embedding, basis and rotation of each head, centring of the keys. */
#ifndef KVQ_PREPARE_H
#define KVQ_PREPARE_H

#include <math.h>
#include <string.h>

#include "vector.h"

/* Rotary embedding of one head, the halves of head_dim paired (Su et al., arXiv 2104.09864). Each product is rounded by
 * itself, as onnxruntime's operator does it in the segments: a fused sum would move a code here and there. */
INLINE void rotary(const float *x, const float *cosine, const float *sine, int half, float *restrict out) {
    float crossed[1024];
    const int whole = half / LANES * LANES;
    for (int c = 0; c < whole; c += LANES) {
        const vf first = load_f(x + c), second = load_f(x + half + c), cos = load_f(cosine + c), sin = load_f(sine + c);
        store_f(out + c, first * cos), store_f(crossed + c, second * sin);
        store_f(out + half + c, second * cos), store_f(crossed + half + c, first * sin);
    }
    for (int c = whole; c < half; c++) {
        out[c] = x[c] * cosine[c], crossed[c] = x[half + c] * sine[c];
        out[half + c] = x[half + c] * cosine[c], crossed[half + c] = x[c] * sine[c];
    }
    __asm__ volatile("" : : "r"(crossed), "r"(out) : "memory"); /* keeps products and sums apart */
    for (int c = 0; c < half; c++) out[c] -= crossed[c], out[half + c] += crossed[half + c];
}

/* One stage within a register: the sum of lanes i and i ^ step where i has the bit, their difference where not. */
INLINE vf butterfly(vf x, int step) {
    const vf sign = select_f((lane_numbers() & step) != 0, splat(-1), splat(1));
    return x * sign + swap_lanes(x, step);
}

/* Orthonormal Hadamard transform in place; n is a power of two. */
INLINE void hadamard(float *x, int n) {
    const float scale = 1 / sqrtf((float)n);
    int step = 1;
    if (n % LANES == 0) {
        for (int c = 0; c < n; c += LANES) {
            vf v = load_f(x + c);
            UNROLL
            for (int s = 1; s < LANES; s *= 2) v = butterfly(v, s);
            store_f(x + c, v);
        }
        step = LANES;
    }
    for (; step < n; step *= 2)
        for (int block = 0; block < n; block += 2 * step)
            for (int c = block; c < block + step; c++) {
                float a = x[c], b = x[c + step];
                x[c] = a + b;
                x[c + step] = a - b;
            }
    for (int c = 0; c < n; c++) x[c] *= scale;
}

static void rotate_heads(float *x, size_t heads, int d) {
    for (size_t h = 0; h < heads; h++, x += d) d == 64 ? hadamard(x, 64) : hadamard(x, d);
}

/* The sum of all lanes, in every lane. */
INLINE vf sum_everywhere(vf x) {
    UNROLL
    for (int step = 1; step < LANES; step *= 2) x += swap_lanes(x, step);
    return x;
}

/* A key, or a query of the same KV head, in the basis, in place. */
INLINE void in_basis(float *x, const kvq_key_basis *basis, int kv_head, int is_key, int d) {
    const int rank = basis->rank, whole = d / LANES * LANES;
    const float *scale = basis->scale + (size_t)kv_head * d, *axes = basis->axes + (size_t)kv_head * rank * d;
    const float *stretch = basis->stretch + (size_t)kv_head * rank;
    float more[1024];
    for (int c = 0; c < whole; c += LANES)
        store_f(x + c, is_key ? load_f(x + c) * load_f(scale + c) : load_f(x + c) / load_f(scale + c));
    for (int c = whole; c < d; c++) x[c] = is_key ? x[c] * scale[c] : x[c] / scale[c];
    for (int j = 0; j < rank; j++) {
        const float *axis = axes + (size_t)j * d;
        vf sum = splat(0);
        for (int c = 0; c < whole; c += LANES) sum += load_f(x + c) * load_f(axis + c);
        float along = sum_everywhere(sum)[0];
        for (int c = whole; c < d; c++) along += x[c] * axis[c];
        more[j] = along * ((is_key ? stretch[j] : 1 / stretch[j]) - 1);
    }
    for (int c = 0; c < whole; c += LANES) {
        vf y = load_f(x + c);
        for (int j = 0; j < rank; j++) y += splat(more[j]) * load_f(axes + (size_t)j * d + c);
        store_f(x + c, y);
    }
    for (int c = whole; c < d; c++)
        for (int j = 0; j < rank; j++) x[c] += more[j] * axes[(size_t)j * d + c];
}

static void prepare_heads(const kvq_prepare *p, size_t token, int first, int end) {
    const int d = p->head_dim;
    const float *x = p->qkv + (token * (p->heads + 2 * p->kv_heads) + first) * d;
    const float *cosine = p->cosine + token * (d / 2), *sine = p->sine + token * (d / 2);
    float *out = p->out + (token * kvq_prepared_heads(p) + first) * d;
    for (int h = first; h < end; h++, x += d, out += d) {
        rotary(x, cosine, sine, d / 2, out);
        const int is_key = h >= p->heads, kv_head = is_key ? h - p->heads : h / (p->heads / p->kv_heads);
        if (p->basis.scale) in_basis(out, &p->basis, kv_head, is_key, d);
        if (p->rotate & KVQ_ROTATE_KEYS) rotate_heads(out, 1, d);
        if (!is_key) continue;
        const float *mean = p->mean_key + (size_t)kv_head * d;
        for (int c = 0; c < d; c++) out[c] -= mean[c];
        if (!(p->rotate & KVQ_ROTATE_VALUES)) continue;
        float *value = out + p->kv_heads * d;
        memcpy(value, x + p->kv_heads * d, sizeof(float) * d);
        rotate_heads(value, 1, d);
    }
}

#endif
