/* AVX-512 with VNNI. */
#if defined(__x86_64__)
#include <immintrin.h>

#define LANES 16
#include "../templates/codebook.h"
#include "../templates/types.h"

INLINE vu avx512_shuffle(const uint8_t *bytes, vu x) {
    const __m128i table = _mm_loadu_si128((const __m128i *)bytes);
    return (vu)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)x);
}
#define shuffle_bytes avx512_shuffle

/* As one instruction. */
INLINE vu avx512_choose(uint32_t mask, vu a, vu b) {
    return (vu)_mm512_ternarylogic_epi32(_mm512_set1_epi32((int)mask), (__m512i)a, (__m512i)b, 0xca);
}
#define choose_bits avx512_choose

INLINE vf avx512_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#define max_f avx512_max

INLINE vf avx512_half_to_float(vu x) {
    return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x));
}
#define half_to_float avx512_half_to_float

/* A permutation reads the four low bits of a lane: a table look-up without a mask. */
INLINE vf avx512_level4(vu x) {
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps((__m512i)x, levels);
}
#define level4 avx512_level4

INLINE vf avx512_level2(vu x) {
    const __m512 levels = _mm512_broadcast_f32x4(_mm_setr_ps(-10.0f / 3, -1, 1, 10.0f / 3));
    return (vf)_mm512_permutevar_ps(levels, (__m512i)x);
}
#define level2 avx512_level2

INLINE vf avx512_lookup(const codebook *book, int n, vu x) {
    return (void)n, (vf)_mm512_permutexvar_ps((__m512i)x, _mm512_loadu_ps(book->level));
}
#define lookup avx512_lookup

INLINE vf avx512_spread(const float *p, int tokens) {
    const int shift = tokens == 2 ? 3 : tokens == 4 ? 2 : tokens == 8 ? 1 : 0; /* lane i takes p[i >> shift] */
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(lane, shift), _mm512_loadu_ps(p));
}
#define spread avx512_spread

/* e^x for x <= 0, exactly 0 below -87: 2^n times 2^r by a polynomial of least relative error; relative error 3e-7. */
INLINE vf avx512_exp(vf x) {
    const __m512 log2e = _mm512_set1_ps(1.44269502f);
    const vf n = (vf)_mm512_roundscale_ps((__m512)x * log2e, 8);
    const vf beyond = x * 1.92596299e-8f; /* what log2 e has beyond single precision */
    const vf r = (vf)_mm512_fmsub_ps((__m512)x, log2e, (__m512)n) + beyond;
    vf p = r * 1.327647245e-3f + 9.675541893e-3f;
    p = p * r + 5.550713092e-2f;
    p = p * r + 2.402212024e-1f;
    p = p * r + 6.931469440e-1f;
    p = p * r + 1.0f;
    const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87), _CMP_GT_OQ);
    return (vf)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)n);
}
#define exp_f avx512_exp

#include "../templates/vector.h"
#define DOT_KERNEL
#include "dot_codes.h"
INLINE vu dot_codes_CODEBOOK(vw word, int s) {
    return (vu)_mm512_shuffle_epi8(_mm512_set1_epi32(CODEBOOK_THIRDS), (__m512i)CODEBOOK_CODES(word, s));
}
INLINE vi dot_words(vi sum, vu codes, vu query) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(query));
    return sum;
}
INLINE vi dot(vi sum, vu codes, int32_t query) { return dot_words(sum, codes, (vu)_mm512_set1_epi32(query)); }
#include "half_avx512.h"
#include "dot_values.h"
#include "../templates/body.h"

KERNEL(kvq_kernel_avx512, "avx512", kvq_has_avx512, 1);
#include "amx.h"
#endif
