/* 64-bit ARM with 8-bit dot products: Cortex-A55 and A75 and later, Apple silicon. */
#if defined(__aarch64__)
#include "neon.h"

#include "../templates/vector.h"

#define DOT_KERNEL
enum { /* both sides are signed */
    dot_offset_INT8 = 0,
    dot_offset_INT4 = 0,
    dot_offset_CODEBOOK4 = 0,
    dot_offset_CODEBOOK3 = 0,
    dot_offset_CODEBOOK = 0,
};

INLINE vu dot_codes_INT8(vw word, int s) { return (void)s, word.low; }
INLINE vu dot_codes_INT4(vw word, int s) {
    uint8x16_t codes = (uint8x16_t)((word.low >> (4 * s)) & 0x0f0f0f0fu);
    return (vu)vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(8));
}
INLINE vu dot_codes_CODEBOOK4(vw word, int s) {
    return (vu)vqtbl1q_s8(vld1q_s8(CODEBOOK4_BOOK.whole), (uint8x16_t)((word.low >> (4 * s)) & 0x0f0f0f0fu));
}
INLINE vu dot_codes_CODEBOOK3(vw word, int s) {
    const vu code = ((word.low >> (2 * s)) & 0x03030303u) | ((word.high >> s) & 0x01010101u) << 2;
    return (vu)vqtbl1q_s8(vld1q_s8(CODEBOOK3_BOOK.whole), (uint8x16_t)code);
}
INLINE vu dot_codes_CODEBOOK(vw word, int s) {
    const int8x16_t levels = {-10, -3, 3, 10};
    return (vu)vqtbl1q_s8(levels, (uint8x16_t)((word.low >> (2 * s)) & 0x03030303u));
}
INLINE vi dot_words(vi sum, vu codes, vu query) {
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)query);
}
INLINE vi dot(vi sum, vu codes, int32_t query) { return dot_words(sum, codes, (vu)vdupq_n_s32(query)); }
#include "../templates/body.h"

KERNEL(kvq_kernel_dotprod, "dotprod", kvq_has_dotprod, 1);
#endif
