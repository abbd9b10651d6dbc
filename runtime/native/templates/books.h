/* Codebooks: the least-squares fit of a vector's levels, and their rounding with feedback, byte for byte as
 * runtime/precision/codecs/codebook.py does it. */
#ifndef KVQ_BOOKS_H
#define KVQ_BOOKS_H

#include <math.h>

#include "vector.h"

#define ROUND_MAGIC 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to a whole number, ties to even */

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

/* The same of codes that have been fed back, from their levels' products with the whole numbers and with themselves. */
INLINE double fed_scale(const book_levels *book, int64_t products, int64_t squares, int64_t total) {
    return stored_scale(book, (double)(book->parts * (products > 0 ? products : 0)) / (double)squares, products, total);
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
    return fed_scale(book, products, squares, total);
}

/* What the least-squares fit of a vector comes to: the scale to store, and the sum of squares; both of the whole numbers that
 * stand for it, 65,536 for its peak. */
typedef struct {
    double scale;
    int64_t total;
} book_fit;

/* The fit of x, in float64 from whole numbers: their magnitudes [padded], and its codes. */
INLINE book_fit fit_of(const book_levels *book, const float *x, int padded, int head_dim, float peak, int32_t *magnitude,
                       uint32_t *code) {
    const double one = 65536;
    const int count = book->count;
    int32_t most[8]; /* most[k]: largest magnitude that is no more than level k */
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
    return (book_fit){stored_scale(book, scale, products, total), total};
}

/* Whole numbers with the signs of x, of magnitudes. */
INLINE void sign_as(const float *x, int padded, int32_t *magnitude) {
    for (int c = 0; c < padded; c += LANES) {
        const vi negative = load_f(x + c) < 0, whole = ((vi)load_u((const uint32_t *)magnitude + c) ^ negative) - negative;
        memcpy(magnitude + c, &whole, sizeof whole);
    }
}

/* A scale of whole numbers as one of the vector's. */
INLINE float scale_of_peak(double scale, float peak) { return (float)(scale * (double)(peak / 65536.0f)); }

/* Codes of a vector, and the scale to store. */
INLINE float codebook_fit(const book_levels *book, const float *x, const uint16_t *feedback, int padded, int head_dim,
                          float peak, uint32_t *code) {
    int32_t whole[MOST_CHANNELS];
    book_fit fit = fit_of(book, x, padded, head_dim, peak, whole, code);
    if (feedback) {
        float rest[MOST_CHANNELS];
        sign_as(x, padded, whole);
        for (int c = 0; c < padded; c += LANES)
            store_f(rest + c, to_float((vi)load_u((const uint32_t *)whole + c)));
        fit.scale = fed_back(book, feedback, whole, head_dim, fit.total, (float)fit.scale, rest, code);
    }
    return scale_of_peak(fit.scale, peak);
}

#endif
