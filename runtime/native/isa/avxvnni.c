/* AVX2 with its own 8-bit dot products: recent x86-64 machines without AVX-512. */
#if defined(__x86_64__)
#define DOT_KERNEL
#include "bytes_avx2.h"

INLINE vi dot_words(vi sum, vu codes, vu query) {
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)query);
}
INLINE vi dot(vi sum, vu codes, int32_t query) { return dot_words(sum, codes, (vu)_mm256_set1_epi32(query)); }
#include "../templates/body.h"

KERNEL(kvq_kernel_avxvnni, "avxvnni", kvq_has_avxvnni, 1);
#endif
