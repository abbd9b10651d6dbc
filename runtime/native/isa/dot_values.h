/* Weighted values by integer dot products on AVX-512 VNNI. The weights of a run of pages become whole numbers of two or
 * three bytes, four tokens' bytes of one channel are brought together, and a dot product takes four tokens at once. */
#ifndef KVQ_DOT_VALUES_H
#define KVQ_DOT_VALUES_H

#include <float.h>
#include <immintrin.h>
#include <math.h>

#include "../kernel.h"
#include "../templates/vector.h"

#define DOT_VALUES

/* The unit of the whole numbers, in root mean squares of the weights of a run: rounding then adds a noise of 1.6e-5 of
 * the result, whatever the weights are like. A weight of more than two bytes is 3.6 times the root mean square, which at
 * most one in 13 can be: the third bytes are taken only of the groups of four tokens that have any. A run has at most
 * CHUNK_SLOTS tokens, so three are always enough. */
#define WEIGHT_UNIT 5.5e-5f
#define WEIGHT_PARTS 3
#define COMMON_PARTS 2
#define MOST_PASSES 8 /* of 32 channels: head_dim at most 256 */

/* Vectors of so many words can be taken apart below: whole registers of them, or of half and quarter length. */
INLINE int dot_values_fit(int precision, int words) {
    if (split_of(precision)) return words == 6 || words == 12; /* a head_dim of 64 or 128 */
    const int bits = bits_of(precision), shaped = (words == 4 && bits < 8) || words == 8 || words % 16 == 0;
    return parts_of(precision) && shaped && words * (8 / bits) <= 8 * MOST_PASSES;
}

/* Four tokens' bytes together: dword 4 w + b of the result holds byte b of word 4 c + w of four tokens, the first one's
 * lowest. Called with words = 4 or 8. */
INLINE __m512i four_tokens(int words, const uint32_t *values, int c) {
    __m512i z = _mm512_loadu_si512(values);
    if (words == 8) {
        __m512i later = _mm512_loadu_si512(values + 16);
        z = c ? _mm512_shuffle_i32x4(z, later, 0xdd) : _mm512_shuffle_i32x4(z, later, 0x88);
    }
    const __m512i by_word = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i by_byte = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(by_word, z), by_byte);
}

/* The same where codes are split, called with words = 6 or 12: low bytes of word 4 c + w, and the high bits that go with
 * them. */
INLINE void four_tokens_split(int words, const uint32_t *values, int c, __m512i *low, __m512i *high) {
    const __m512i by_byte = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i second = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0, 0, 4, 4, 4, 4); /* its bits are higher */
    __m512i a, b, of_low, of_high; /* places in a and b, 16 words each: of word w of each token; of its high bits */
    if (words == 6) {
        a = _mm512_loadu_si512(values), b = _mm512_maskz_loadu_epi32(0x00ff, values + 16);
        of_low = _mm512_setr_epi32(0, 6, 12, 18, 1, 7, 13, 19, 2, 8, 14, 20, 3, 9, 15, 21);
        of_high = _mm512_setr_epi32(4, 10, 16, 22, 4, 10, 16, 22, 5, 11, 17, 23, 5, 11, 17, 23);
        *high = _mm512_permutex2var_epi32(a, of_high, b);
    } else {
        a = _mm512_loadu_si512(values + 4 * c), b = _mm512_loadu_si512(values + 24 + 4 * c);
        of_low = _mm512_setr_epi32(0, 12, 16, 28, 1, 13, 17, 29, 2, 14, 18, 30, 3, 15, 19, 31);
        of_high = _mm512_setr_epi32(0, 12, 16, 28, 0, 12, 16, 28, 1, 13, 17, 29, 1, 13, 17, 29);
        const __m512i after = _mm512_maskz_loadu_epi32(0x3fff, values + 32 + 2 * c);
        *high = _mm512_permutex2var_epi32(_mm512_loadu_si512(values + 8 + 2 * c), of_high, after);
    }
    *low = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(a, of_low, b), by_byte);
    *high = _mm512_srlv_epi32(_mm512_shuffle_epi8(*high, by_byte), second);
}

/* The same for 16 words from column j on, words k and k + 1 of each four: dword 4 l + b of out[i] holds byte b of word
 * j + 4 l + 2 half + i. */
INLINE void four_tokens_wide(int words, const uint32_t *values, int j, int half, __m512i out[2]) {
    __m512i t[4];
    for (int i = 0; i < 4; i++) t[i] = _mm512_loadu_si512(values + i * words + j);
    __m512i even = half ? _mm512_unpackhi_epi8(t[0], t[1]) : _mm512_unpacklo_epi8(t[0], t[1]);
    __m512i odd = half ? _mm512_unpackhi_epi8(t[2], t[3]) : _mm512_unpacklo_epi8(t[2], t[3]);
    out[0] = _mm512_unpacklo_epi16(even, odd);
    out[1] = _mm512_unpackhi_epi16(even, odd);
}

/* Code s of every byte as a signed byte, its level or parts of that: signed_codes_<name> for every precision that integer
 * dot products take. */
INLINE __m512i signed_codes_INT8(__m512i bytes, __m512i high, int s) { return (void)high, (void)s, bytes; }
INLINE __m512i signed_codes_INT4(__m512i bytes, __m512i high, int s) {
    (void)high;
    __m512i nibble = _mm512_and_si512(s ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
    return _mm512_sub_epi8(nibble, _mm512_set1_epi8(8));
}
INLINE __m512i signed_codes_CODEBOOK4(__m512i bytes, __m512i high, int s) {
    (void)high;
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)CODEBOOK4_BOOK.whole));
    __m512i code = _mm512_and_si512(s ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
    return _mm512_shuffle_epi8(levels, code);
}
INLINE __m512i signed_codes_CODEBOOK3(__m512i bytes, __m512i high, int s) {
    const __m512i levels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)CODEBOOK3_BOOK.whole));
    __m512i low = _mm512_srli_epi16(bytes, 2 * s), top = s < 2 ? _mm512_slli_epi16(high, 2 - s) : _mm512_srli_epi16(high, s - 2);
    __m512i code = (__m512i)choose_bits(0x03030303u, (vu)low, (vu)top);
    return _mm512_shuffle_epi8(levels, _mm512_and_si512(code, _mm512_set1_epi8(7)));
}
INLINE __m512i signed_codes_CODEBOOK(__m512i bytes, __m512i high, int s) {
    (void)high;
    const __m512i levels = _mm512_set1_epi32(10 << 24 | 3 << 16 | 0xfd << 8 | 0xf6);
    __m512i code = _mm512_and_si512(s ? _mm512_srli_epi16(bytes, 2 * s) : bytes, _mm512_set1_epi8(3));
    return _mm512_shuffle_epi8(levels, code);
}
INLINE __m512i signed_codes(int precision, __m512i bytes, __m512i high, int s) {
    switch (precision) {
#define CODES(name, id, bits, scale, products, with) KVQ_IF_WHOLE(products, case id: return signed_codes_##name(bytes, high, s);)
        KVQ_WIDTHS(CODES, )
#undef CODES
    default: return _mm512_setzero_si512();
    }
}

/* Where the 16 channels of a register of codes are: a pass of dot_page works on two registers. Pass p of one precision
 * and width: which words, and which code of their bytes. */
typedef struct {
    int word, step; /* register i, dword 4 l + b: code step + i next_step of byte b of word + stride l + i next */
    int stride, next, next_step;
} dot_pass;

INLINE dot_pass pass_of(int precision, int all_words, int p) {
    const int steps = 8 / low_bits_of(precision), words = low_words_of(precision, all_words);
    if (words == 4 || (words == 8 && steps > 1)) { /* two codes of the same bytes */
        const int pairs = steps / 2;
        return (dot_pass){4 * (p / pairs), 2 * (p % pairs), 1, 0, 1};
    }
    if (words == 8) return (dot_pass){0, 0, 1, 4, 0};
    const int column = 16 * (p / (2 * steps)), half = p / steps % 2;
    return (dot_pass){column + 2 * half, p % steps, 4, 1, 0};
}

/* The codes of pass p of four tokens. */
INLINE void codes_of_four(int precision, int words, int p, const uint32_t *values, __m512i code[2]) {
    const dot_pass at = pass_of(precision, words, p);
    const __m512i none = _mm512_setzero_si512();
    if (split_of(precision)) {
        __m512i low, high;
        four_tokens_split(words, values, at.word / 4, &low, &high);
        for (int i = 0; i < 2; i++) code[i] = signed_codes(precision, low, high, at.step + i);
    } else if (words == 4 || (words == 8 && bits_of(precision) < 8)) {
        __m512i bytes = four_tokens(words, values, at.word / 4);
        for (int i = 0; i < 2; i++) code[i] = signed_codes(precision, bytes, none, at.step + i);
    } else if (words == 8) {
        code[0] = four_tokens(words, values, 0), code[1] = four_tokens(words, values, 1);
    } else {
        four_tokens_wide(words, values, at.word / 16 * 16, at.word % 4 / 2, code);
        for (int i = 0; i < 2; i++) code[i] = signed_codes(precision, code[i], none, at.step);
    }
}

/* sum[head][i] += weights x code[i] for one part of four tokens' weights. */
INLINE void dot_four(int heads, const float *weights, const __m512i code[2], __m512i sum[][2]) {
    for (int g = 0; g < heads; g++) {
        int32_t four;
        memcpy(&four, weights + g * TILE, sizeof four);
        const __m512i weight = _mm512_set1_epi32(four);
        for (int i = 0; i < 2; i++) /* around the intrinsic GCC 12 keeps the sums in memory */
            __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[g][i]) : "v"(weight), "v"(code[i]));
    }
}

/* Sums of pass p over a page: acc[part][head][register] += weights x codes, the rare parts for the groups of `rare`. */
INLINE void dot_page(int precision, int heads, int words, int p, const uint32_t *values, int slots, const float *weights,
                     const int32_t *rare, int rare_count, __m512i acc[][DECODE_HEADS][2], const char *next) {
    __m512i sum[COMMON_PARTS][DECODE_HEADS][2], code[2];
    for (int part = 0; part < COMMON_PARTS; part++)
        for (int g = 0; g < heads; g++) sum[part][g][0] = acc[part][g][0], sum[part][g][1] = acc[part][g][1];
    const float *weight = weights;
    for (int tile = 0; tile < slots; tile += TILE, weight += heads * TILE)
        for (int t = 0; t < TILE; t += 4) {
            const uint32_t *four = values + (size_t)(tile + t) * words;
            if (p == 0 && next)
                for (int line = 0; line < (words + 3) / 4; line++)
                    __builtin_prefetch(next + (size_t)((tile + t) * words) * 4 + line * 64, 0, 2);
            codes_of_four(precision, words, p, four, code);
            for (int part = 0; part < COMMON_PARTS; part++) dot_four(heads, weight + t + part, code, sum[part]);
        }
    for (int part = 0; part < COMMON_PARTS; part++)
        for (int g = 0; g < heads; g++) acc[part][g][0] = sum[part][g][0], acc[part][g][1] = sum[part][g][1];
    if (!rare_count) return;
    for (int g = 0; g < heads; g++) sum[0][g][0] = acc[COMMON_PARTS][g][0], sum[0][g][1] = acc[COMMON_PARTS][g][1];
    for (int i = 0; i < rare_count; i++) {
        codes_of_four(precision, words, p, values + (size_t)rare[i] * words, code);
        dot_four(heads, weights + rare[i] / TILE * heads * TILE + rare[i] % TILE + COMMON_PARTS, code, sum[0]);
    }
    for (int g = 0; g < heads; g++) acc[COMMON_PARTS][g][0] = sum[0][g][0], acc[COMMON_PARTS][g][1] = sum[0][g][1];
}

/* Weights of a page become whole numbers of 1 / inverse[head]; word `part` of four tokens' weights then holds their bytes number
 * `part`. Returns how many groups of four have bytes number COMMON_PARTS, and where: rare [slots / 4 + 12]. */
INLINE int whole_weights(int heads, int slots, const float *inverse, float *weights, int32_t *rare) {
    const __m512i by_byte = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    int rare_count = 0;
    for (int t = 0; t < slots; t += TILE, weights += heads * TILE) {
        __m512i all = _mm512_setzero_si512();
        for (int g = 0; g < heads; g++) {
            const __m512i whole = _mm512_cvtps_epi32((__m512)(load_f(weights + g * TILE) * inverse[g]));
            const __m512i bytes = _mm512_shuffle_epi8(whole, by_byte);
            all = _mm512_or_si512(all, bytes);
            _mm512_storeu_si512(weights + g * TILE, bytes);
        }
        const __mmask16 found = _mm512_mask_test_epi32_mask(0x1111 << COMMON_PARTS, all, all);
        const __m512i slot = _mm512_add_epi32(first, _mm512_set1_epi32(t));
        _mm512_storeu_si512(rare + rare_count, _mm512_maskz_compress_epi32(found, slot));
        rare_count += __builtin_popcount(found);
    }
    return rare_count;
}

INLINE float weight_unit(float squares, int slots) { return WEIGHT_UNIT * sqrtf(squares / slots); }

/* Weighted values, from what the parts of whole weights come to with their codes. */
INLINE vf whole_values(int precision, const vi *part, float unit) {
    const vf high = to_float(part[2]) * 256 + to_float(part[1]);
    return (high * 256 + to_float(part[0])) * (unit * (1.0f / parts_of(precision)));
}

/* The same, in the sums of a head, for register i of pass number `pass`, in the sums of a head. */
INLINE void add_dots(int precision, int words, int pass, int i, const vi *part, float unit, float *sums) {
    const int steps = 8 / low_bits_of(precision), low = low_words_of(precision, words);
    const dot_pass at = pass_of(precision, words, pass);
    float lanes[LANES];
    store_f(lanes, whole_values(precision, part, unit));
    float *to = sums + (at.step + i * at.next_step) * low + at.word + i * at.next;
    for (int b = 0; b < 4; b++)
        for (int l = 0; l < 4; l++) to[b * steps * low + l * at.stride] += lanes[4 * l + b];
}

/* sums[head][channel] += weights[head][token] * level[token][channel] over `count` neighbouring pages of one precision,
 * all_slots in all; weights are overwritten, squares [heads] are the sums of theirs. `next` is what is read after them. */
INLINE void weigh_dot(int precision, int heads, int words, const kvq_page *page, int count, size_t vector_row,
                      int all_slots, float *weights, const float *squares, float *sums, int stride, const char *next) {
    const int passes = low_words_of(precision, words) * (8 / low_bits_of(precision)) / 8;
    __m512i acc[MOST_PASSES][WEIGHT_PARTS][DECODE_HEADS][2];
    int32_t rare[CHUNK_SLOTS / 4 + 12];
    float unit[DECODE_HEADS], inverse[DECODE_HEADS];
    for (int g = 0; g < heads; g++) {
        unit[g] = weight_unit(squares[g], all_slots);
        inverse[g] = unit[g] > FLT_MIN ? 1 / unit[g] : 0;
    }
    memset(acc, 0, passes * sizeof acc[0]);
    for (int p = 0; p < count; p++) {
        const int slots = slots_of(page + p);
        if (slots <= 0) continue;
        const uint32_t *values = page[p].values + (vector_row * page[p].capacity + page[p].begin) * words;
        const char *after = next;
        if (p + 1 < count && slots_of(page + p + 1) > 0) {
            const size_t its_slot = vector_row * page[p + 1].capacity + page[p + 1].begin;
            after = (const char *)(page[p + 1].values + its_slot * words);
        }
        const int rare_count = whole_weights(heads, slots, inverse, weights, rare);
        for (int pass = 0; pass < passes; pass++)
            dot_page(precision, heads, words, pass, values, slots, weights, rare, rare_count, acc[pass], after);
        weights += slots * heads;
    }
    for (int pass = 0; pass < passes; pass++)
        for (int g = 0; g < heads; g++)
            for (int i = 0; i < 2; i++) {
                const vi part[WEIGHT_PARTS] = {(vi)acc[pass][0][g][i], (vi)acc[pass][1][g][i], (vi)acc[pass][2][g][i]};
                add_dots(precision, words, pass, i, part, unit[g], sums + g * stride);
            }
}

/* A function for each precision, width and number of heads; the common widths are constants in theirs: a head_dim of 64,
 * of 32 with 8 and 4 bits, of 128 with 4 and 2. */
typedef void (*run_function)(int words, const kvq_page *page, int count, size_t vector_row, int slots, float *weights,
                             const float *squares, float *sums, int stride, const char *next);
#define RUN(function, precision, width, heads)                                                                        \
    NOINLINE void function##_##heads(int words, const kvq_page *page, int count, size_t vector_row, int slots,        \
                                     float *weights, const float *squares, float *sums, int stride,                   \
                                     const char *next) {                                                              \
        weigh_dot(precision, heads, width, page, count, vector_row, slots, weights, squares, sums, stride, next);     \
    }
#define RUNS(function, precision, width)                                        \
    RUN(function, precision, width, 1) RUN(function, precision, width, 2)       \
    RUN(function, precision, width, 3) RUN(function, precision, width, 4)       \
    static const run_function function##_of[DECODE_HEADS] = ROW_OF(function);
#define COMMON_INT8(X) X(INT8, 16) X(INT8, 8)
#define COMMON_INT4(X) X(INT4, 8) X(INT4, 16) X(INT4, 4)
#define COMMON_CODEBOOK4(X) X(CODEBOOK4, 8) X(CODEBOOK4, 16) X(CODEBOOK4, 4)
#define COMMON_CODEBOOK3(X) X(CODEBOOK3, 6) X(CODEBOOK3, 12)
#define COMMON_CODEBOOK(X) X(CODEBOOK, 4) X(CODEBOOK, 8)
#define COMMON_RUNS(name, width) RUNS(run_##name##_w##width, KVQ_##name, width)
#define ALL_RUNS(name, id, bits, scale, products, with) \
    KVQ_IF_WHOLE(products, COMMON_##name(COMMON_RUNS) RUNS(run_##name, id, words))
KVQ_WIDTHS(ALL_RUNS, )

INLINE void weigh_run(int heads, int words, const kvq_page *page, int count, size_t vector_row, int slots,
                      float *weights, const float *squares, float *sums, int stride, const char *next) {
    const run_function *run;
    switch (page->value_precision) {
#define IF_COMMON(name, width) words == width ? run_##name##_w##width##_of :
#define RUN_OF(name, id, bits, scale, products, with) \
    KVQ_IF_WHOLE(products, case id: run = COMMON_##name(IF_COMMON) run_##name##_of; break;)
        KVQ_WIDTHS(RUN_OF, )
#undef RUN_OF
#undef IF_COMMON
    default: return; /* never: dot_values_fit has refused it */
    }
    run[heads - 1](words, page, count, vector_row, slots, weights, squares, sums, stride, next);
}

#endif
