/* Weighted values by integer dot products on AVX-512 VNNI. The weights of a run of pages become whole numbers of three
 * bytes, four tokens' bytes of one channel are brought together, and a dot product takes four tokens at once. */
#ifndef KVQ_DOT_VALUES_H
#define KVQ_DOT_VALUES_H

#include <immintrin.h>

#include "kernel.h"
#include "vector.h"

/* As exact as float weights: the largest is all but 2^24. A margin keeps roundings from reaching it. */
#define WEIGHT_PARTS 3
#define WEIGHT_LARGEST 16777000.0f
#define MOST_PASSES 8 /* of 32 channels: head_dim at most 256 */

/* Vectors of so many words can be taken apart below: whole registers of them, or of half and quarter length. */
INLINE int dot_values_fit(int bits, int words) {
    const int shaped = (words == 4 && bits < 8) || words == 8 || words % 16 == 0;
    return bits <= 8 && shaped && words * (8 / bits) <= 8 * MOST_PASSES;
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

/* Code s of every byte, as a signed byte; 2-bit levels in thirds. */
INLINE __m512i signed_codes(int bits, __m512i bytes, int s) {
    if (bits == 8) return bytes;
    if (bits == 4) {
        __m512i nibble = _mm512_and_si512(s ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
        return _mm512_sub_epi8(nibble, _mm512_set1_epi8(8));
    }
    const __m512i levels = _mm512_set1_epi32(10 << 24 | 3 << 16 | 0xfd << 8 | 0xf6);
    __m512i code = _mm512_and_si512(s ? _mm512_srli_epi16(bytes, 2 * s) : bytes, _mm512_set1_epi8(3));
    return _mm512_shuffle_epi8(levels, code);
}

/* Where the 16 channels of a register of codes are: a pass of dot_page works on two registers. Pass p of one precision
 * and width: which words, and which code of their bytes. */
typedef struct {
    int word, step; /* register i, dword 4 l + b: code step + i next_step of byte b of word + stride l + i next */
    int stride, next, next_step;
} dot_pass;

INLINE dot_pass pass_of(int bits, int words, int p) {
    const int steps = 8 / bits;
    if (words == 4 || (words == 8 && steps > 1)) { /* two codes of the same bytes */
        const int pairs = steps / 2;
        return (dot_pass){4 * (p / pairs), 2 * (p % pairs), 1, 0, 1};
    }
    if (words == 8) return (dot_pass){0, 0, 1, 4, 0};
    const int column = 16 * (p / (2 * steps)), half = p / steps % 2;
    return (dot_pass){column + 2 * half, p % steps, 4, 1, 0};
}

/* Sums of pass p over a page: acc[head][part][register] += weights x codes. */
INLINE void dot_page(int bits, int heads, int words, int p, const uint32_t *values, int slots, const float *weights,
                     int room, __m512i *acc, const char *next) {
    const dot_pass at = pass_of(bits, words, p);
    __m512i sum[DECODE_HEADS][WEIGHT_PARTS][2];
    for (int g = 0; g < heads; g++)
        for (int part = 0; part < WEIGHT_PARTS; part++)
            for (int i = 0; i < 2; i++) sum[g][part][i] = acc[(g * WEIGHT_PARTS + part) * 2 + i];
    for (int t = 0; t < slots; t += 4, values += 4 * words) {
        if (p == 0 && next)
            for (int line = 0; line < words / 4; line++)
                __builtin_prefetch(next + (size_t)(t * words) * 4 + line * 64, 0, 2);
        __m512i code[2];
        if (words == 4 || (words == 8 && bits < 8)) {
            __m512i bytes = four_tokens(words, values, at.word / 4);
            code[0] = signed_codes(bits, bytes, at.step), code[1] = signed_codes(bits, bytes, at.step + 1);
        } else if (words == 8) {
            code[0] = four_tokens(words, values, 0), code[1] = four_tokens(words, values, 1);
        } else {
            four_tokens_wide(words, values, at.word / 16 * 16, at.word % 4 / 2, code);
            for (int i = 0; i < 2; i++) code[i] = signed_codes(bits, code[i], at.step);
        }
        for (int g = 0; g < heads; g++)
            for (int part = 0; part < WEIGHT_PARTS; part++) {
                int32_t four;
                memcpy(&four, weights + g * room + t + part, sizeof four);
                const __m512i weight = _mm512_set1_epi32(four);
                for (int i = 0; i < 2; i++) /* around the intrinsic GCC 12 keeps the sums in memory */
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[g][part][i]) : "v"(weight), "v"(code[i]));
            }
    }
    for (int g = 0; g < heads; g++)
        for (int part = 0; part < WEIGHT_PARTS; part++)
            for (int i = 0; i < 2; i++) acc[(g * WEIGHT_PARTS + part) * 2 + i] = sum[g][part][i];
}

/* Softmax weights of a page times the values' scales become whole numbers of 1 / inverse; word `part` of four tokens'
 * weights then holds their bytes number `part`. */
INLINE void whole_weights(int heads, const uint16_t *scales, int slots, float inverse, float *weights, int room) {
    const __m512i by_byte = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int t = 0; t < slots; t += LANES) {
        const vf factor = load_halves(scales + t) * inverse;
        for (int g = 0; g < heads; g++) {
            __m512i whole = _mm512_cvtps_epi32((__m512)(load_f(weights + g * room + t) * factor));
            _mm512_storeu_si512(weights + g * room + t, _mm512_shuffle_epi8(whole, by_byte));
        }
    }
}

/* sums[head][channel] += weights[head][token] * scale[token] * level[token][channel] over `count` neighbouring pages of
 * one precision; weights are overwritten. `next` is what is read after them. */
INLINE void weigh_dot(int bits, int heads, int words, const kvq_page *page, int count, size_t vector_row,
                      float *weights, int room, float *sums, int stride, const char *next) {
    const int passes = words * (8 / bits) / 8, steps = 8 / bits;
    __m512i acc[MOST_PASSES * DECODE_HEADS * WEIGHT_PARTS * 2];
    vf top = splat(0);
    for (int p = 0; p < count; p++)
        for (int t = 0; t < slots_of(page + p); t += LANES)
            top = max_f(top, load_halves(page[p].value_scales + vector_row * page[p].capacity + page[p].begin + t));
    const float largest = max_lanes(top), inverse = largest > 0 ? WEIGHT_LARGEST / largest : 0;
    for (int i = 0; i < passes * heads * WEIGHT_PARTS * 2; i++) acc[i] = _mm512_setzero_si512();
    for (int p = 0, at = 0; p < count; p++) {
        const int slots = slots_of(page + p);
        if (slots <= 0) continue;
        const size_t first_slot = vector_row * page[p].capacity + page[p].begin;
        const uint32_t *values = page[p].values + first_slot * words;
        const char *after = next;
        if (p + 1 < count && slots_of(page + p + 1) > 0) {
            const size_t its_slot = vector_row * page[p + 1].capacity + page[p + 1].begin;
            after = (const char *)(page[p + 1].values + its_slot * words);
        }
        whole_weights(heads, page[p].value_scales + first_slot, slots, inverse, weights + at, room);
        for (int pass = 0; pass < passes; pass++)
            dot_page(bits, heads, words, pass, values, slots, weights + at, room,
                     acc + pass * heads * WEIGHT_PARTS * 2, after);
        at += slots;
    }
    const float unit = largest / WEIGHT_LARGEST / (bits == 2 ? 3 : 1);
    for (int pass = 0; pass < passes; pass++) {
        const dot_pass at = pass_of(bits, words, pass);
        for (int g = 0; g < heads; g++)
            for (int i = 0; i < 2; i++) {
                const __m512i *part = acc + ((pass * heads + g) * WEIGHT_PARTS) * 2 + i;
                float lanes[LANES];
                const vf high = to_float((vi)part[4]) * 256 + to_float((vi)part[2]);
                store_f(lanes, (high * 256 + to_float((vi)part[0])) * unit);
                float *to = sums + g * stride + (at.step + i * at.next_step) * words + at.word + i * at.next;
                for (int b = 0; b < 4; b++)
                    for (int l = 0; l < 4; l++) to[b * steps * words + l * at.stride] += lanes[4 * l + b];
            }
    }
}

/* The common widths with their number of words as a constant. */
INLINE void weigh_run(int bits, int heads, int words, const kvq_page *page, int count, size_t vector_row,
                      float *weights, int room, float *sums, int stride, const char *next) {
#define RUN(b, w) weigh_dot(b, heads, w, page, count, vector_row, weights, room, sums, stride, next)
    if (bits == 8) words == 16 ? RUN(8, 16) : words == 8 ? RUN(8, 8) : RUN(8, words);
    else if (bits == 4) words == 8 ? RUN(4, 8) : words == 16 ? RUN(4, 16) : words == 4 ? RUN(4, 4) : RUN(4, words);
    else words == 4 ? RUN(2, 4) : words == 8 ? RUN(2, 8) : RUN(2, words);
#undef RUN
}

#endif
