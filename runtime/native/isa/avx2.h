/* What AVX2 and F16C do better than plain vectors. */
#ifndef KVQ_AVX2_H
#define KVQ_AVX2_H

#include <immintrin.h>

#define LANES 8
#include "../templates/codebook.h"
#include "../templates/types.h"

INLINE vf avx2_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#define max_f avx2_max

INLINE vf avx2_half_to_float(vu x) {
    __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x); /* per 128 bits: four halves, twice */
    return (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
}
#define half_to_float avx2_half_to_float

INLINE vf avx2_level2(vu x) {
    const __m256 levels = _mm256_setr_ps(-10.0f / 3, -1, 1, 10.0f / 3, -10.0f / 3, -1, 1, 10.0f / 3);
    return (vf)_mm256_permutevar_ps(levels, (__m256i)x); /* reads the two low bits of a lane */
}
#define level2 avx2_level2

INLINE vu avx2_shuffle(const uint8_t *bytes, vu x) {
    const __m128i table = _mm_loadu_si128((const __m128i *)bytes);
    return (vu)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)x);
}
#define shuffle_bytes avx2_shuffle

INLINE vf avx2_spread(const float *p, int tokens) {
    const int shift = tokens == 2 ? 2 : tokens == 4 ? 1 : 0; /* lane i takes p[i >> shift] */
    const __m256i lane = _mm256_srli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), shift);
    return (vf)_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lane);
}
#define spread avx2_spread

#endif
