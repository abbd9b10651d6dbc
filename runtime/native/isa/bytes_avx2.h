/* Codes as bytes in AVX2 registers. */
#ifndef KVQ_BYTES_AVX2_H
#define KVQ_BYTES_AVX2_H

#include "avx2.h"
#include "../templates/vector.h"
#include "dot_codes.h"

INLINE vu dot_codes_CODEBOOK(vw word, int s) {
    return (vu)_mm256_shuffle_epi8(_mm256_set1_epi32(CODEBOOK_THIRDS), (__m256i)CODEBOOK_CODES(word, s));
}

#endif
