/* Vectors to codes and scales, byte for byte as the codecs in runtime/codecs do it: every rounding here is theirs. */
#ifndef KVQ_ENCODE_H
#define KVQ_ENCODE_H

#include <math.h>

#include "decode.h"

#define ROUND_MAGIC 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to a whole number, ties to even */

/* The least half that is no less than x >= 0; -1 when there is none. */
static int half_above(float x) {
    if (!(x <= 65504.0f)) return -1;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x < 0x1p-14f) return (int)ceilf(x * 0x1p24f); /* subnormal halves count steps of 2^-24 */
    return (int)((bits + 0x1fff - 0x38000000u) >> 13);
}

INLINE float float_of_half(int half) { return half_scalar((uint16_t)half); }

/* Nearest half of each lane, ties to even; |x| <= 65504. */
INLINE vu float_to_half(vf x) {
    vu sign = ((vu)x >> 16) & 0x8000;
    vu bits = (vu)x & 0x7fffffff;
    vf small = (vf)bits * 0x1p24f + ROUND_MAGIC - ROUND_MAGIC; /* whole steps of a subnormal half */
    vu subnormal = (vu)__builtin_convertvector(small, vi);
    vu normal = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000u) >> 13;
    vu is_small = (vu)(bits < 0x38800000u);
    return sign | (is_small & subnormal) | (~is_small & normal);
}

/* round(x / scale), ties to even, clamped to [-top - 1, top]. */
INLINE vi quantized(vf x, float scale, float top) {
    vf q = scale > 0 ? x / scale : splat(0);
    q = q + ROUND_MAGIC - ROUND_MAGIC; /* before the clamp, as numpy does: |q| < 2^22 by the choice of scale */
    q = select_f(q > top, splat(top), q);
    q = select_f(q < -top - 1, splat(-top - 1), q);
    return __builtin_convertvector(q, vi);
}

/* The four-level codebook: codes of the least-squares fit, and the stored scale, in float64 from whole numbers. */
INLINE float codebook_fit(const float *x, int padded, int head_dim, float peak, uint32_t *code) {
    const double inner = 0.4528, border = (double)(float)((1 + 10.0 / 3) / 2), one = 65536, most_gain = 1.5;
    int32_t magnitude[1024], most_inner = 0;
    int64_t total = 0, products = 0;
    for (int c = 0; c < padded; c += LANES) {
        vf unit = peak > 0 ? load_f(x + c) / peak : splat(0);
        vf whole = unit * 65536.0f + ROUND_MAGIC - ROUND_MAGIC;
        vi m = __builtin_convertvector((vf)((vu)whole & 0x7fffffff), vi);
        memcpy(magnitude + c, &m, sizeof m);
    }
    for (int c = 0; c < head_dim; c++) total += (int64_t)magnitude[c] * magnitude[c];
    double scale = inner * sqrt((double)total / head_dim);
    for (int round = 0; round < 3; round++) {
        const double limit = scale * border;
        int64_t levels = 0;
        most_inner = limit >= one ? (int32_t)one : (int32_t)limit; /* magnitude > limit, in whole numbers */
        products = 0;
        for (int c = 0; c < head_dim; c++) {
            int outer = magnitude[c] > most_inner;
            products += (int64_t)magnitude[c] * (outer ? 10 : 3);
            levels += outer ? 100 : 9;
        }
        scale = 3 * (double)products / (double)levels;
    }
    for (int c = 0; c < padded; c++) {
        uint32_t outer = magnitude[c] > most_inner;
        code[c] = x[c] >= 0 ? 2 + outer : 1 - outer;
    }
    const double unbiased = products > 0 ? 3 * (double)total / (double)products : 0;
    const double stored = (scale + 4 * unbiased) / 5, most = most_gain * scale;
    return (float)((stored < most ? stored : most) * (double)(peak / 65536.0f));
}

/* Encode one vector. Returns 0, or -1 for a value that numpy's codec refuses (it then says why). */
INLINE int encode_vector(int bits, const float *x, int padded, int head_dim, uint32_t *words, uint16_t *scale_out) {
    const int count = words_per_vector(bits, head_dim), codes = codes_of(bits);
    uint32_t code[1024 + 16];
    vf top = splat(0), bad = splat(0);
    for (int c = 0; c < padded; c += LANES) {
        vf v = load_f(x + c);
        top = max_f(top, (vf)((vu)v & 0x7fffffff));
        bad += v - v; /* not zero for NaN and infinity */
    }
    const float peak = max_lanes(top);
    if (sum_lanes(bad) != 0 || sum_lanes(bad) != sum_lanes(bad)) return -1;
    if ((bits == 16 || bits == WINDOW_BITS) && peak > 65504.0f) return -1;
    if (bits == 16) {
        for (int c = 0; c < padded; c += LANES) {
            vu h = float_to_half(load_f(x + c));
            memcpy(code + c, &h, sizeof h);
        }
    } else {
        const float largest = bits == WINDOW_BITS ? 32767 : bits == 8 ? 127 : 7;
        const int half = half_above(bits == 2 ? codebook_fit(x, padded, head_dim, peak, code) : peak / largest);
        if (half < 0) return -1;
        *scale_out = (uint16_t)half;
        const float scale = float_of_half(half);
        if (bits != 2) {
            const int offset = bits == 4 ? 8 : 0;
            const uint32_t mask = bits == 4 ? 15 : bits == 8 ? 255 : 65535;
            for (int c = 0; c < padded; c += LANES) {
                vu q = (vu)(quantized(load_f(x + c), scale, largest) + offset) & mask;
                memcpy(code + c, &q, sizeof q);
            }
        }
    }
    for (int c = head_dim; c < padded; c++) code[c] = 0; /* codes beyond the last channel */
    for (int j = 0; j < count; j++) words[j] = 0;
    for (int i = 0; i < codes; i++)
        for (int j = 0; j < count; j++) words[j] |= code[i * count + j] << (i * (32 / codes));
    return 0;
}

static int encode_vectors(int bits, const float *x, size_t vectors, int head_dim, uint32_t *words, uint16_t *scales) {
    const int padded = (head_dim + 15) / 16 * 16, count = words_per_vector(bits, head_dim);
    float vector[1024];
    memset(vector + head_dim, 0, sizeof(float) * (padded - head_dim));
    for (size_t i = 0; i < vectors; i++) {
        int status;
        memcpy(vector, x + i * head_dim, sizeof(float) * head_dim);
        FOR_BITS(bits, status = encode_vector(BITS, vector, padded, head_dim, words + i * count, scales + i))
        if (status) return status;
    }
    return 0;
}

#endif
