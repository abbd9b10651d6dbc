/* Vectors to codes and scales, byte for byte as runtime/precision/codecs does it: every rounding here is theirs. */
#ifndef KVQ_ENCODE_H
#define KVQ_ENCODE_H

#include <float.h>
#include <math.h>

#include "decode.h"

#define ROUND_MAGIC 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to a whole number, ties to even */

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

/* Of magnitudes of at most 2^16; sums over 1,024 channels fit. */
INLINE int64_t sum_of_squares(const int32_t *magnitude, int padded) {
    vi high = {0}, mixed = {0}, low = {0}; /* of halves, since a square takes 33 bits */
    for (int c = 0; c < padded; c += LANES) {
        const vi m = (vi)load_u((const uint32_t *)magnitude + c), h = m >> 8, l = m & 255;
        high += h * h, mixed += h * l, low += l * l;
    }
    return ((int64_t)sum_whole(high) << 16) + ((int64_t)sum_whole(mixed) << 9) + sum_whole(low);
}

/* The positive half of a codebook's levels: `count` whole numbers, `parts` of which make 1, and the scale that a fit begins
 * with, in root mean squares. */
typedef struct {
    int count, parts, level[8];
    double first;
} book_levels;
static const book_levels BOOK2 = {2, 3, {3, 10}, 0.4528};
static const book_levels BOOK3 = {4, 1, {3, 9, 16, 26}, 0.08302};
static const book_levels BOOK4 = {8, 1, {4, 13, 22, 31, 41, 53, 68, 90}, 0.03030};

/* Four fifths of the way from the least-squares scale of some codes to the unbiased one, but not too large. */
INLINE double stored_scale(const book_levels *book, double scale, int64_t products, int64_t total) {
    const double most_gain = 1.5, unbiased = products > 0 ? (double)(book->parts * total) / (double)products : 0;
    const double stored = (scale + 4 * unbiased) / 5, largest = most_gain * scale;
    return stored < largest ? stored : largest;
}

/* x with 13 significant bits, towards 0. */
INLINE float short_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0xfffff800;
    memcpy(&x, &bits, 4);
    return x;
}

/* x or, where `negative` has all bits, -x. */
INLINE float with_sign(float x, int negative) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits ^= (uint32_t)negative & 0x80000000u;
    memcpy(&x, &bits, 4);
    return x;
}

/* Codes of whole numbers, channel by channel: what rounding one does wrong is taken from those behind it, as much as
 * feedback [head_dim, head_dim] says. Returns the scale to store. rest: the numbers as floats [padded], changed. Signs are
 * bits here, not branches, which nobody could foretell. */
INLINE double fed_back(const book_levels *book, const uint16_t *feedback, const int32_t *whole, int head_dim, int64_t total,
                       float scale, float *rest, uint32_t *code) {
    const int count = book->count;
    int64_t products = 0, squares = 0;
    float border[8], value[8];
    const float unit = short_float(scale / (float)book->parts); /* products of these are exact, fused or not */
    for (int k = 0; k < count; k++) value[k] = unit * (float)book->level[k];
    for (int k = 0; k + 1 < count; k++) border[k] = unit * ((float)(book->level[k] + book->level[k + 1]) / 2);
    float now = rest[0];
    for (int i = 0; i < head_dim; i++) {
        const uint16_t *row = feedback + (size_t)i * head_dim;
        const int last = i + 1 == head_dim;
        /* Of the next channel: read before it is written, so that it need not be waited for. */
        const float next = last ? 0 : rest[i + 1], share = last ? 0 : half_scalar(row[i + 1]), size = fabsf(now);
        const int negative = -(now < 0); /* all bits or none */
        int rank = 0;
        UNROLL
        for (int k = 0; k + 1 < count; k++) rank += size > border[k];
        const float error = short_float(now - with_sign(value[rank], negative));
        now = next - error * share;
        int c = (i + 1) / LANES * LANES; /* channels that are done may change: nobody looks at them again */
        for (; c + LANES <= head_dim; c += LANES)
            store_f(rest + c, load_f(rest + c) - error * load_halves(row + c));
        for (c = c > i ? c : i + 1; c < head_dim; c++) rest[c] -= error * half_scalar(row[c]);
        const int level = (book->level[rank] ^ negative) - negative;
        products += (int64_t)whole[i] * level;
        squares += level * level;
        code[i] = (uint32_t)(count + (rank ^ negative));
    }
    return stored_scale(book, (double)(book->parts * (products > 0 ? products : 0)) / (double)squares, products, total);
}

/* A codebook: codes of the least-squares fit, and the stored scale, in float64 from whole numbers. */
INLINE float codebook_fit(const book_levels *book, const float *x, const uint16_t *feedback, int padded, int head_dim,
                          float peak, uint32_t *code) {
    const double one = 65536;
    const int count = book->count;
    int32_t magnitude[MOST_CHANNELS], most[8]; /* most[k]: largest magnitude that is no more than level k */
    int64_t products = 0;
    for (int c = 0; c < padded; c += LANES) {
        vf unit = peak > 0 ? load_f(x + c) / peak : splat(0);
        vf whole = unit * 65536.0f + ROUND_MAGIC - ROUND_MAGIC;
        vi m = __builtin_convertvector((vf)((vu)whole & 0x7fffffff), vi);
        memcpy(magnitude + c, &m, sizeof m);
    }
    const int64_t total = sum_of_squares(magnitude, padded);
    double scale = book->first * sqrt((double)total / head_dim);
    for (int round = 0; round < 3; round++) {
        vi product = {0}, square = {0};
        for (int k = 0; k + 1 < count; k++) { /* magnitude > limit, in whole numbers */
            const float border = (float)((book->level[k] + book->level[k + 1]) / (2.0 * book->parts));
            const double limit = scale * (double)border;
            most[k] = limit >= one ? (int32_t)one : (int32_t)limit;
        }
        for (int c = 0; c < padded; c += LANES) {
            const vi m = (vi)load_u((const uint32_t *)magnitude + c);
            vi level = book->level[0] - (vi){0};
            UNROLL
            for (int k = 0; k + 1 < count; k++) level += (m > most[k]) & (book->level[k + 1] - book->level[k]);
            product += m * level;
            square += level * level;
        }
        products = sum_wide(product);
        const int64_t beyond = (int64_t)(padded - head_dim) * book->level[0] * book->level[0]; /* of no channel */
        scale = (double)(book->parts * products) / (double)(sum_whole(square) - beyond);
    }
    for (int c = 0; c < padded; c += LANES) {
        const vi m = (vi)load_u((const uint32_t *)magnitude + c), positive = load_f(x + c) >= 0;
        vi rank = {0};
        UNROLL
        for (int k = 0; k + 1 < count; k++) rank += (m > most[k]) & 1;
        const vi level = count - 1 - rank + (positive & (2 * rank + 1));
        memcpy(code + c, &level, sizeof level);
    }
    scale = stored_scale(book, scale, products, total);
    if (feedback) {
        float rest[MOST_CHANNELS];
        for (int c = 0; c < padded; c += LANES) {
            const vi negative = load_f(x + c) < 0, whole = ((vi)load_u((const uint32_t *)magnitude + c) ^ negative) - negative;
            memcpy(magnitude + c, &whole, sizeof whole);
            store_f(rest + c, __builtin_convertvector(whole, vf));
        }
        scale = fed_back(book, feedback, magnitude, head_dim, total, (float)scale, rest, code);
    }
    return (float)(scale * (double)(peak / 65536.0f));
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

/* feedback, each: see kvq_encode. */
static int encode_vectors(int precision, const float *x, size_t vectors, int head_dim, const uint16_t *feedback, size_t each,
                          uint32_t *words, uint16_t *scales) {
    const int padded = (head_dim + 15) / 16 * 16, count = words_per_vector(precision, head_dim);
    float vector[MOST_CHANNELS];
    memset(vector + head_dim, 0, sizeof(float) * (padded - head_dim));
    for (size_t i = 0; i < vectors; i++) {
        int status = KVQ_UNKNOWN_PRECISION;
        memcpy(vector, x + i * head_dim, sizeof(float) * head_dim);
        uint32_t *to = words + i * count;
        const uint16_t *fed = feedback ? feedback + i / each * head_dim * head_dim : NULL;
        FOR_WIDTH(precision, status = head_dim == 64
                                          ? encode_vector(PRECISION, vector, fed, 64, 64, to, scales + i)
                                          : encode_vector(PRECISION, vector, fed, padded, head_dim, to, scales + i))
        if (status) return status;
    }
    return 0;
}

#endif
