/* AVX2, FMA and F16C: most x86-64 machines since 2013. */
#if defined(__x86_64__)
#include "bytes_avx2.h"

/* Signed bytes: the first side's magnitudes times the second's with the first one's signs. Sums of two products fit 16 bits,
 * since the second side has no -128. */
INLINE vi avx2_dot_words(vi sum, vu codes, vu query) {
    const __m256i magnitude = _mm256_abs_epi8((__m256i)codes), turned = _mm256_sign_epi8((__m256i)query, (__m256i)codes);
    return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, turned), _mm256_set1_epi16(1));
}
#define dot_words avx2_dot_words

/* Of bytes that are not negative; sums of two products fit 16 bits up to 128. */
INLINE vi avx2_dot_small(vi sum, vu codes, vu query) {
    return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)codes, (__m256i)query), _mm256_set1_epi16(1));
}
#define dot_small avx2_dot_small

/* Two of the four bytes of each lane, widened; sums of the products of pairs. */
#define PAIR_KERNEL
INLINE vu pair_codes(vu codes, int part) {
    return part ? (vu)_mm256_srli_epi16((__m256i)codes, 8) : codes & 0x00ff00ffu;
}
INLINE vi pair(vi sum, vu codes, int32_t query) {
    vi products; /* around the intrinsics GCC 12 keeps the sums in memory */
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(codes), "x"(query - (vu){0}));
    return sum;
}
#include "../templates/body.h"

KERNEL(kvq_kernel_avx2, "avx2", kvq_has_avx2, 1);
#endif
