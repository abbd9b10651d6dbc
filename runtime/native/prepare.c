/* Queries and keys as attention takes them: rotary embedding, rotation of each head, centring of the keys. */
#include <math.h>

#include "kvq.h"

/* Rotary embedding of one head, the halves of head_dim paired (Su et al., arXiv 2104.09864). */
static void rotary(const float *x, const float *cosine, const float *sine, int half, float *out) {
    for (int c = 0; c < half; c++) {
        out[c] = x[c] * cosine[c] - x[half + c] * sine[c];
        out[half + c] = x[half + c] * cosine[c] + x[c] * sine[c];
    }
}

/* Orthonormal Hadamard transform in place; n is a power of two. */
static void hadamard(float *x, int n) {
    for (int step = 1; step < n; step *= 2)
        for (int block = 0; block < n; block += 2 * step)
            for (int c = block; c < block + step; c++) {
                float a = x[c], b = x[c + step];
                x[c] = a + b;
                x[c + step] = a - b;
            }
    const float scale = 1 / sqrtf((float)n);
    for (int c = 0; c < n; c++) x[c] *= scale;
}

void kvq_prepare_token(const kvq_prepare *p, size_t token) {
    const int d = p->head_dim;
    const float *x = p->qkv + token * (size_t)(p->heads + 2 * p->kv_heads) * d;
    const float *cosine = p->cosine + token * (d / 2), *sine = p->sine + token * (d / 2);
    float *out = p->out + token * (size_t)(p->heads + p->kv_heads) * d;
    for (int h = 0; h < p->heads + p->kv_heads; h++, x += d, out += d) {
        rotary(x, cosine, sine, d / 2, out);
        if (p->rotate) hadamard(out, d);
        if (h < p->heads) continue;
        const float *mean = p->mean_key + (size_t)(h - p->heads) * d;
        for (int c = 0; c < d; c++) out[c] -= mean[c];
    }
}
