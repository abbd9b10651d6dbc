/* AVX-512 with VNNI. */
#if defined(__x86_64__)
#include <immintrin.h>

#define LANES 16
#include "types.h"

#define DOT_KERNEL
#define DOT_OFFSET(bits) ((bits) == 8 ? 128 : (bits) == 4 ? 8 : 10)

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

INLINE vf avx512_spread(const float *p, int tokens) {
    const int shift = tokens == 2 ? 3 : tokens == 4 ? 2 : tokens == 8 ? 1 : 0; /* lane i takes p[i >> shift] */
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(lane, shift), _mm512_loadu_ps(p));
}
#define spread avx512_spread

INLINE vu dot_codes(int bits, vu word, int s) {
    if (bits == 8) return word ^ 0x80808080u;
    if (bits == 4) return (word >> (4 * s)) & 0x0f0f0f0fu;
    const __m512i levels = _mm512_set1_epi32(20 << 24 | 13 << 16 | 7 << 8 | 0);
    return (vu)_mm512_shuffle_epi8(levels, (__m512i)((word >> (2 * s)) & 0x03030303u));
}
INLINE vi dot(vi sum, vu codes, int32_t query) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(query));
}
#include "body.h"

static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
KERNEL(kvq_kernel_avx512, "avx512", has_avx512, 1);
#endif
