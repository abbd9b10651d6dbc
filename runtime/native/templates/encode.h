/* Vectors to codes and scales, byte for byte as runtime/precision/codecs does it: every rounding here is theirs. */
#ifndef KVQ_ENCODE_H
#define KVQ_ENCODE_H

#include <float.h>
#include <math.h>

#include "books.h"
#include "decode.h"

/* The least half that is no less than x >= 0; -1 when there is none. */
static int half_above(float x) {
    if (!(x <= LARGEST_HALF)) return -1;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x < 0x1p-14f) return (int)ceilf(x * 0x1p24f); /* subnormal halves count steps of 2^-24 */
    return (int)((bits + 0x1fff - 0x38000000u) >> 13);
}

INLINE float float_of_half(int half) { return half_scalar((uint16_t)half); }

INLINE vi larger(vi a, vi b) {
    const vi first = a > b;
    return (a & first) | (b & ~first);
}

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

/* The largest magnitude, or NaN where there is one: as integers, where NaN is larger than all. */
INLINE float peak_of(const float *x, int padded) {
    vi top = {0};
    for (int c = 0; c < padded; c += LANES) top = larger(top, (vi)((vu)load_f(x + c) & 0x7fffffff));
    UNROLL
    for (int step = 1; step < LANES; step *= 2) top = larger(top, (vi)swap_lanes((vf)top, step));
    return ((vf)top)[0];
}

/* Codes of all channels into words: word j has those of the channels j, words + j, 2 * words + j, ... */
INLINE void pack_low(int precision, const uint32_t *code, int head_dim, uint32_t *words) {
    const int count = low_words_of(precision, words_per_vector(precision, head_dim));
    const int codes = codes_of(precision), width = low_bits_of(precision);
    if (count % LANES == 0) {
        for (int j = 0; j < count; j += LANES) {
            vu word = load_u(code + j);
            for (int i = 1; i < codes; i++) word |= load_u(code + i * count + j) << (i * width);
            memcpy(words + j, &word, sizeof word);
        }
    } else if (LANES % count == 0 && head_dim % LANES == 0) {
        const vu shift = (vu)(lane_numbers() / count) * width; /* a vector has codes of several places */
        vu word = {0};
        for (int c = 0; c < head_dim; c += LANES) word |= load_u(code + c) << shift << (c / count * width);
        for (int step = count; step < LANES; step *= 2) word |= (vu)swap_lanes((vf)word, step);
        memcpy(words, &word, sizeof *words * count);
    } else {
        for (int j = 0; j < count; j++) words[j] = code[j];
        for (int i = 1; i < codes; i++)
            for (int j = 0; j < count; j++) words[j] |= code[i * count + j] << (i * width);
    }
}

INLINE void pack(int precision, uint32_t *code, int head_dim, uint32_t *words) {
    if (!split_of(precision)) {
        pack_low(precision, code, head_dim, words);
        return;
    }
    const int all = words_per_vector(precision, head_dim), low = low_words_of(precision, all), codes = codes_of(precision);
    for (int j = low; j < all; j++) words[j] = 0;
    for (int j = 0; j < low; j++) {
        uint32_t high = 0;
        UNROLL
        for (int i = 0; i < codes; i++) high |= code[i * low + j] >> 2 << high_bit_of(i);
        words[low + j / 2] |= high << (j % 2 * 4);
    }
    for (int c = 0; c < codes * low; c++) code[c] &= 3;
    pack_low(precision, code, head_dim, words);
}

/* Codes of a vector for each precision, encode_<name>: from x [padded], zeros beyond head_dim, and its largest magnitude,
 * finite, to code [padded] and, where it has one, its scale. Returns 0, or REFUSED_VALUE where numpy's codec refuses. */
INLINE int encode_HALF(const float *x, const uint16_t *feedback, int padded, int head_dim, float peak, uint32_t *code,
                       uint16_t *scale_out) {
    (void)feedback, (void)head_dim, (void)scale_out;
    if (peak > LARGEST_HALF) return KVQ_REFUSED_VALUE;
    for (int c = 0; c < padded; c += LANES) {
        vu h = float_to_half(load_f(x + c));
        memcpy(code + c, &h, sizeof h);
    }
    return 0;
}

/* Uniform codes from -largest - 1 to largest, counted from -offset; the scale is the least half that clips nothing. */
INLINE int encode_uniform(const float *x, int padded, float peak, float largest, int offset, uint32_t *code,
                          uint16_t *scale_out) {
    const int half = half_above(peak / largest);
    if (half < 0) return KVQ_REFUSED_VALUE;
    *scale_out = (uint16_t)half;
    const float scale = float_of_half(half);
    const uint32_t mask = 2 * (uint32_t)largest + 1;
    for (int c = 0; c < padded; c += LANES) {
        vu q = (vu)(quantized(load_f(x + c), scale, largest) + offset) & mask;
        memcpy(code + c, &q, sizeof q);
    }
    return 0;
}

INLINE int encode_WINDOW(const float *x, const uint16_t *feedback, int padded, int head_dim, float peak, uint32_t *code,
                         uint16_t *scale_out) {
    (void)feedback, (void)head_dim;
    if (peak > LARGEST_HALF) return KVQ_REFUSED_VALUE; /* a token must be able to leave the window at any precision */
    return encode_uniform(x, padded, peak, 32767, 0, code, scale_out);
}

INLINE int encode_INT8(const float *x, const uint16_t *feedback, int padded, int head_dim, float peak, uint32_t *code,
                       uint16_t *scale_out) {
    (void)feedback, (void)head_dim;
    return encode_uniform(x, padded, peak, 127, 0, code, scale_out);
}

INLINE int encode_INT4(const float *x, const uint16_t *feedback, int padded, int head_dim, float peak, uint32_t *code,
                       uint16_t *scale_out) {
    (void)feedback, (void)head_dim;
    return encode_uniform(x, padded, peak, 7, 8, code, scale_out);
}

INLINE int encode_book(const book_levels *book, const float *x, const uint16_t *feedback, int padded, int head_dim, float peak,
                       uint32_t *code, uint16_t *scale_out) {
    const int half = half_above(codebook_fit(book, x, feedback, padded, head_dim, peak, code));
    if (half < 0) return KVQ_REFUSED_VALUE;
    *scale_out = (uint16_t)half;
    return 0;
}

INLINE int encode_CODEBOOK(const float *x, const uint16_t *feedback, int padded, int head_dim, float peak, uint32_t *code,
                           uint16_t *scale_out) {
    return encode_book(&BOOK2, x, feedback, padded, head_dim, peak, code, scale_out);
}

INLINE int encode_CODEBOOK3(const float *x, const uint16_t *feedback, int padded, int head_dim, float peak, uint32_t *code,
                            uint16_t *scale_out) {
    return encode_book(&BOOK3, x, feedback, padded, head_dim, peak, code, scale_out);
}

INLINE int encode_CODEBOOK4(const float *x, const uint16_t *feedback, int padded, int head_dim, float peak, uint32_t *code,
                            uint16_t *scale_out) {
    return encode_book(&BOOK4, x, feedback, padded, head_dim, peak, code, scale_out);
}

/* One vector to its words and scale; precision is a constant. feedback: its matrix, or null. */
INLINE int encode_vector(int precision, const float *x, const uint16_t *feedback, int padded, int head_dim, uint32_t *words,
                         uint16_t *scale_out) {
    uint32_t code[MOST_CHANNELS + 16];
    const float peak = peak_of(x, padded);
    if (!(peak <= FLT_MAX)) return KVQ_REFUSED_VALUE;
    int status = KVQ_UNKNOWN_PRECISION;
    switch (precision) {
#define ENCODE(name, id, bits, scale, products, with) \
    case id: status = encode_##name(x, feedback, padded, head_dim, peak, code, scale_out); break;
        KVQ_WIDTHS(ENCODE, )
#undef ENCODE
    }
    if (status) return status;
    for (int c = head_dim; c < padded; c++) code[c] = 0; /* codes beyond the last channel */
    pack(precision, code, head_dim, words);
    return 0;
}

/* As encode_vector, of a precision that is not a constant. */
INLINE int encode_any(int precision, const float *x, const uint16_t *feedback, int head_dim, uint32_t *words, uint16_t *scale) {
    const int padded = (head_dim + 15) / 16 * 16;
    int status = KVQ_UNKNOWN_PRECISION;
    FOR_WIDTH(precision, status = head_dim == 64 ? encode_vector(PRECISION, x, feedback, 64, 64, words, scale)
                                                 : encode_vector(PRECISION, x, feedback, padded, head_dim, words, scale))
    return status;
}

#endif
