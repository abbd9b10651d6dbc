/* Keys and values of 16 bits on AVX-512: halves are converted where they lie, the two of a word beside each other,
 * instead of being taken apart into registers of low and high ones first. */
#ifndef KVQ_HALF_AVX512_H
#define KVQ_HALF_AVX512_H

#include <immintrin.h>

#include "../kernel.h"
#include "../templates/tiles.h"
#include "../templates/vector.h"

#define HALF_REGISTERS

INLINE vf load_16_halves(const uint32_t *words) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)words)); }

/* The two channels of each word of a query side by side, for half_tile_scores: pairs [heads, 2 * padded words].
 * The last load may reach beyond the query, where the task's memory goes on. */
INLINE void pair_channels(int heads, const float *query, int stride, int words, float *pairs) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int g = 0; g < heads; g++)
        for (int j = 0; j < words; j += LANES, pairs += 2 * LANES) {
            const float *q = query + g * stride + j;
            const __m512 first = (__m512)load_f(q), last = (__m512)load_f(q + words);
            store_f(pairs, (vf)_mm512_permutex2var_ps(first, low, last));
            store_f(pairs + LANES, (vf)_mm512_permutex2var_ps(first, high, last));
        }
}

/* As tile_scores, from paired channels: a register holds both channels of a word for eight tokens. */
INLINE void half_tile_scores(int heads, const uint32_t *tile, int words, const float *pairs, vf acc[][SCORE_VECTORS]) {
    const int stride = (words + LANES - 1) / LANES * LANES * 2;
    vf sum[DECODE_HEADS][2];
    for (int g = 0; g < heads; g++) sum[g][0] = sum[g][1] = splat(0);
    for (int j = 0; j < words; j++) {
        const vf first = load_16_halves(tile + j * TILE), last = load_16_halves(tile + j * TILE + 8);
        for (int g = 0; g < heads; g++) {
            double pair;
            memcpy(&pair, pairs + g * stride + 2 * j, sizeof pair);
            const vf both = (vf)_mm512_set1_pd(pair);
            sum[g][0] += first * both;
            sum[g][1] += last * both;
        }
    }
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int g = 0; g < heads; g++)
        acc[g][0] = (vf)_mm512_permutex2var_ps((__m512)sum[g][0], even, (__m512)sum[g][1]) +
                    (vf)_mm512_permutex2var_ps((__m512)sum[g][0], odd, (__m512)sum[g][1]);
}

/* As weigh, for `vectors` registers of eight words from column j on. */
INLINE void half_columns(int heads, int vectors, const uint32_t *values, int words, int j, int slots,
                         const float *weights, float *sums, int stride, const char *next) {
    vf acc[DECODE_HEADS][4];
    for (int g = 0; g < heads; g++)
        for (int v = 0; v < vectors; v++) acc[g][v] = splat(0);
    for (int tile = 0; tile < slots; tile += TILE, weights += heads * TILE)
        for (int t = 0; t < TILE; t++) {
            if (j == 0)
                for (int line = 0; line < words; line += 16)
                    __builtin_prefetch(next + ((size_t)(tile + t) * words + line) * 4, 0, 2);
            vf x[4];
            for (int v = 0; v < vectors; v++) x[v] = load_16_halves(values + (size_t)(tile + t) * words + j + v * 8);
            for (int g = 0; g < heads; g++)
                for (int v = 0; v < vectors; v++) acc[g][v] += x[v] * weights[g * TILE + t];
        }
    for (int g = 0; g < heads; g++)
        for (int v = 0; v < vectors; v++) {
            float lanes[LANES], *to = sums + g * stride + j + v * 8;
            store_f(lanes, acc[g][v]);
            for (int k = 0; k < 8; k++) to[k] += lanes[2 * k], to[words + k] += lanes[2 * k + 1];
        }
}

INLINE void half_weigh(int heads, const uint32_t *values, int words, int slots, const float *weights, float *sums,
                       int stride, const char *next) {
    int j = 0;
    for (; j + 32 <= words; j += 32) half_columns(heads, 4, values, words, j, slots, weights, sums, stride, next);
    for (; j < words; j += 8) half_columns(heads, 1, values, words, j, slots, weights, sums, stride, next);
}

#endif
