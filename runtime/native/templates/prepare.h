/* Queries and keys as attention takes them: rotary embedding, rotation of each head, centring of the keys. */
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

/* x, as a row, times a matrix [d, d], in place: of a query's basis, or of a key's. */
INLINE void in_basis(float *x, const float *matrix, int d) {
    float row[1024];
    memcpy(row, x, sizeof(float) * d);
    int c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES) {
        vf sum[4] = {splat(0), splat(0), splat(0), splat(0)};
        for (int i = 0; i < d; i++) {
            const float *m = matrix + (size_t)i * d + c;
            const vf factor = splat(row[i]);
            UNROLL
            for (int j = 0; j < 4; j++) sum[j] += factor * load_f(m + j * LANES);
        }
        for (int j = 0; j < 4; j++) store_f(x + c + j * LANES, sum[j]);
    }
    for (; c < d; c++) {
        float sum = 0;
        for (int i = 0; i < d; i++) sum += row[i] * matrix[(size_t)i * d + c];
        x[c] = sum;
    }
}

static void prepare_heads(const kvq_prepare *p, size_t token, int first, int end) {
    const int d = p->head_dim;
    const float *x = p->qkv + (token * (p->heads + 2 * p->kv_heads) + first) * d;
    const float *cosine = p->cosine + token * (d / 2), *sine = p->sine + token * (d / 2);
    float *out = p->out + (token * kvq_prepared_heads(p) + first) * d;
    for (int h = first; h < end; h++, x += d, out += d) {
        rotary(x, cosine, sine, d / 2, out);
        if (p->rotate & KVQ_ROTATE_KEYS) rotate_heads(out, 1, d);
        if (p->basis) {
            const int kv_head = h < p->heads ? h / (p->heads / p->kv_heads) : p->kv_heads + h - p->heads;
            in_basis(out, p->basis + (size_t)kv_head * d * d, d);
        }
        if (h < p->heads) continue;
        const float *mean = p->mean_key + (size_t)(h - p->heads) * d;
        for (int c = 0; c < d; c++) out[c] -= mean[c];
        if (!(p->rotate & KVQ_ROTATE_VALUES)) continue;
        float *value = out + p->kv_heads * d;
        memcpy(value, x + p->kv_heads * d, sizeof(float) * d);
        rotate_heads(value, 1, d);
    }
}

#endif
