/* AVX2 with its own 8-bit dot products: recent x86-64 machines without AVX-512. */
#if defined(__x86_64__)
#include "avx2.h"

INLINE vu avxvnni_shuffle(const uint8_t *bytes, vu x) {
    const __m128i table = _mm_loadu_si128((const __m128i *)bytes);
    return (vu)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)x);
}
#define shuffle_bytes avxvnni_shuffle
#include "../templates/vector.h"
#include "vnni.h"

INLINE vu dot_codes_CODEBOOK(vw word, int s) {
    return (vu)_mm256_shuffle_epi8(_mm256_set1_epi32(CODEBOOK_THIRDS), (__m256i)CODEBOOK_CODES(word, s));
}
INLINE vi dot_words(vi sum, vu codes, vu query) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)query);
}
INLINE vi dot(vi sum, vu codes, int32_t query) { return dot_words(sum, codes, (vu)_mm256_set1_epi32(query)); }
#include "../templates/body.h"

static int has_avxvnni(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avxvnni");
}
KERNEL(kvq_kernel_avxvnni, "avxvnni", has_avxvnni, 1);
#endif
