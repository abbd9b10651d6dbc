/* AVX2, FMA and F16C: most x86-64 machines since 2013. */
#if defined(__x86_64__)
#include "avx2.h"

/* Signed bytes: the first side's magnitudes times the second's with the first one's signs. Sums of two products fit 16 bits,
 * since the second side has no -128. */
INLINE vi avx2_dot_words(vi sum, vu codes, vu query) {
    const __m256i magnitude = _mm256_abs_epi8((__m256i)codes), turned = _mm256_sign_epi8((__m256i)query, (__m256i)codes);
    return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, turned), _mm256_set1_epi16(1));
}
#define dot_words avx2_dot_words
#include "../templates/body.h"

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
KERNEL(kvq_kernel_avx2, "avx2", has_avx2, 0);
#endif
