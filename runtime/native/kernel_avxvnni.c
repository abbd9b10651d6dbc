/* AVX2 with its own 8-bit dot products: recent x86-64 machines without AVX-512. */
#if defined(__x86_64__)
#include "avx2.h"

#define DOT_KERNEL
#define DOT_OFFSET(bits) ((bits) == 8 ? 128 : (bits) == 4 ? 8 : 10)

/* Step s of a word as four unsigned bytes, offset by DOT_OFFSET; 2-bit levels in thirds. */
INLINE vu dot_codes(int bits, vu word, int s) {
    if (bits == 8) return word ^ 0x80808080u;
    if (bits == 4) return (word >> (4 * s)) & 0x0f0f0f0fu;
    const __m256i levels = _mm256_set1_epi32(20 << 24 | 13 << 16 | 7 << 8 | 0);
    return (vu)_mm256_shuffle_epi8(levels, (__m256i)((word >> (2 * s)) & 0x03030303u));
}
INLINE vi dot(vi sum, vu codes, int32_t query) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(query));
}
#include "body.h"

static int has_avxvnni(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avxvnni");
}
KERNEL(kvq_kernel_avxvnni, "avxvnni", has_avxvnni, 1);
#endif
