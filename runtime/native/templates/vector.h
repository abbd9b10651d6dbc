/* Arithmetic on vectors of LANES floats. A kernel's file defines, before it includes this:
 *   LANES                 floats of a vector: 4, 8 or 16
 * and, where the instruction set does it better than the plain forms below:
 *   half_to_float(x)      vu -> vf: the low halves of the lanes
 *   level4(x), level2(x)  vu -> vf: the levels of the codes in the low bits of the lanes; other bits may be set
 *   lookup(book, n, x)    vu -> vf: the levels of a codebook of n = 8 or 16 by the low 3 or 4 bits; others may be set
 *   shuffle_bytes(bytes, x)  those of 16 bytes by the bytes of x, each below 16: what takes the place of lookup, if it is not there
 *   exp_f(x)              e^x for x <= 0
 *   max_f(a, b)           a > b ? a : b
 *   spread(p, tokens)     p[0] in the first LANES / tokens lanes, p[1] in the next, ...; may read p[0..LANES)
 * and for integer dot products what scores.h asks for under DOT_KERNEL; docs/native.md has all hooks together. */
#ifndef KVQ_VECTOR_H
#define KVQ_VECTOR_H

#include <math.h>

#include "../kvq.h"
#include "../widths.h"
#include "codebook.h"
#include "types.h"

INLINE vf load_f(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE vu load_u(const uint32_t *p) { vu x; memcpy(&x, p, sizeof x); return x; }
INLINE void store_f(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi select_i(vi mask, vi a, vi b) { return (mask & a) | (~mask & b); }
INLINE vf select_f(vi mask, vf a, vf b) { return (vf)select_i(mask, (vi)a, (vi)b); }
#ifndef max_f
INLINE vf max_plain(vf a, vf b) { return select_f(a > b, a, b); }
#define max_f max_plain
#endif

/* The number of each lane. */
INLINE vi lane_numbers(void) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vi x;
    memcpy(&x, numbers, sizeof x);
    return x;
}

/* Lane i ^ step in lane i; step is a constant. */
INLINE vf swap_lanes(vf x, int step) {
#if defined(__clang__)
    vf y;
    for (int i = 0; i < LANES; i++) y[i] = x[i ^ step];
    return y;
#else
    return __builtin_shuffle(x, lane_numbers() ^ step);
#endif
}

/* Lane lane[i] of x in lane i. */
INLINE vf take_lanes(vf x, vi lane) {
#if defined(__clang__)
    vf y;
    for (int i = 0; i < LANES; i++) y[i] = x[lane[i] & (LANES - 1)];
    return y;
#else
    return __builtin_shuffle(x, lane);
#endif
}

/* x, rounded before anything is added to it: products are not fused with sums across this. */
INLINE vf rounded(vf x) {
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+m"(x));
#endif
    return x;
}

INLINE float sum_lanes(vf x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}
INLINE int32_t sum_whole(vi x) {
    int32_t lanes[LANES], sum = 0;
    memcpy(lanes, &x, sizeof lanes);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}
INLINE int64_t sum_wide(vi x) {
    int32_t lanes[LANES];
    int64_t sum = 0;
    memcpy(lanes, &x, sizeof lanes);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}
/* The largest of all lanes, in every lane. */
INLINE vf max_everywhere(vf x) {
    UNROLL
    for (int step = 1; step < LANES; step *= 2) x = max_f(x, swap_lanes(x, step));
    return x;
}
INLINE float max_lanes(vf x) { return max_everywhere(x)[0]; }

#ifndef half_to_float
/* The exponent of a half moves into a float's place; the product with 2^112 corrects its bias. */
INLINE vf half_to_float_plain(vu x) {
    vf magnitude = (vf)((x & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vu)magnitude | ((x & 0x8000) << 16));
}
#define half_to_float half_to_float_plain
#endif

#ifndef level4
INLINE vf level4_plain(vu x) { return to_float((vi)(x & 15) - 8); }
#define level4 level4_plain
#endif

#ifndef level2
/* -10/3, -1, 1, 10/3: an odd cubic of 2 x - 3. */
INLINE vf level2_plain(vu x) {
    vf c = to_float((vi)((x & 3) << 1) - 3);
    return c * ((c * c) * (1.0f / 72) + 71.0f / 72);
}
#define level2 level2_plain
#endif

#ifndef spread
INLINE vf spread_plain(const float *p, int tokens) {
    vf x = {0};
    for (int i = 0; i < LANES; i++) x[i] = p[i / (LANES / tokens)];
    return x;
}
#define spread spread_plain
#endif

#if !defined(lookup) && !defined(shuffle_bytes)
INLINE vf lookup_plain(const codebook *book, int n, vu x) {
    vf y = {0};
    for (int i = 0; i < LANES; i++) y[i] = book->level[x[i] & (n - 1)];
    return y;
}
#define lookup lookup_plain
#endif

/* Words of codes, lane by lane; where they are split, with the high bits that go with them, as of a first word. */
typedef struct {
    vu low, high;
} vw;

/* The words number j of vectors whose words are `step` apart; `low`: how many are not of high bits. */
INLINE vw load_words(int precision, const uint32_t *first, ptrdiff_t step, int low, int j) {
    vw word = {.low = load_u(first + j * step)};
    if (split_of(precision)) word.high = load_u(first + (low + j / 2) * step) >> (j % 2 * 4);
    return word;
}

/* The same word in all lanes, of one vector. */
INLINE vw spread_word(int precision, const uint32_t *code, int low, int j) {
    vw word = {.low = code[j] - (vu){0}};
    if (split_of(precision)) word.high = (code[low + j / 2] >> (j % 2 * 4)) - (vu){0};
    return word;
}

#define MOST_LOW (MOST_CHANNELS / 16) /* words of low bits, where codes are split */

/* Of a vector whose codes are split, the high bits of each word of low ones: from its words `code`, to [low]. */
INLINE void high_words(const uint32_t *code, int low, uint32_t *high) {
    for (int j = 0; j < low; j++) high[j] = code[j / 2] >> (j % 2 * 4);
}

/* LANES neighbouring words from number j on, with their high bits from high_words. */
INLINE vw words_beside(int precision, const uint32_t *low, const uint32_t *high, int j) {
    vw word = {.low = load_u(low + j)};
    if (split_of(precision)) word.high = load_u(high + j);
    return word;
}

/* From code i on. */
INLINE vw skip_codes(int precision, vw word, int i) {
    word.low >>= i * low_bits_of(precision);
    if (split_of(precision)) word.high >>= high_bit_of(i);
    return word;
}

/* Code i of each word, before its scale: level_<name> for every precision. */
INLINE vf level_HALF(vw word, int i) { return half_to_float(i ? word.low >> 16 : word.low & 0xffff); }
INLINE vf level_WINDOW(vw word, int i) { return to_float(i ? (vi)word.low >> 16 : (vi)(word.low << 16) >> 16); }
INLINE vf level_INT8(vw word, int i) { return to_float((vi)(word.low << (24 - 8 * i)) >> 24); }
INLINE vf level_INT4(vw word, int i) { return level4(word.low >> (4 * i)); }
#ifdef lookup
INLINE vf level_CODEBOOK4(vw word, int i) { return lookup(&CODEBOOK4_BOOK, 16, word.low >> (4 * i)); }
INLINE vf level_CODEBOOK3(vw word, int i) {
    return lookup(&CODEBOOK3_BOOK, 8, ((word.low >> (2 * i)) & 3) | ((word.high >> high_bit_of(i)) & 1) << 2);
}
#else /* codes of all four bytes at once: who takes one of each byte looks up once, see code_number */
INLINE vf level_CODEBOOK4(vw word, int i) {
    const vu levels = shuffle_bytes((const uint8_t *)CODEBOOK4_BOOK.whole, word.low >> (4 * (i % 2)) & 0x0f0f0f0fu);
    return level_INT8((vw){.low = levels}, i / 2);
}
INLINE vf level_CODEBOOK3(vw word, int i) {
    const vu low = word.low >> (2 * (i % 4)) & 0x03030303u, high = (word.high >> (i % 4) & 0x01010101u) << 2;
    return level_INT8((vw){.low = shuffle_bytes((const uint8_t *)CODEBOOK3_BOOK.whole, low | high)}, i / 4);
}
#endif
INLINE vf level_CODEBOOK(vw word, int i) { return level2(word.low >> (2 * i)); }

/* Codes of a word in the order of their steps, those of the four bytes together: the number of the one in place n. */
INLINE int code_number(int precision, int n) {
    const int steps = 8 / low_bits_of(precision);
    return steps > 1 ? n % 4 * steps + n / 4 : n;
}

/* The same by its id. precision and i are constants wherever this is inlined. */
INLINE vf level(int precision, vw word, int i) {
    switch (precision) {
#define LEVEL(name, id, bits, scale, products, with) case id: return level_##name(word, i);
        KVQ_WIDTHS(LEVEL, )
#undef LEVEL
    default: return splat(NAN);
    }
}

#ifndef exp_f
/* e^x for x <= 0, exactly 0 below -87; relative error below 3e-7. */
INLINE vf exp_plain(vf x) {
    vi keep = x > -87.0f;
    x = select_f(keep, x, splat(0));
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vf shifted = x * 1.44269504f + magic;
    vi exponent = (vi)shifted - (vi)splat(magic);
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = splat(1.9875691e-4f);
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)(((vi)p + (exponent << 23)) & keep);
}
#define exp_f exp_plain
#endif

INLINE float half_scalar(uint16_t h) {
    vf x = half_to_float(h - (vu){0});
    return x[0];
}
/* LANES halves as floats. */
INLINE vf load_halves(const uint16_t *p) {
    vh x;
    memcpy(&x, p, sizeof x);
    return half_to_float(__builtin_convertvector(x, vu));
}

#endif
