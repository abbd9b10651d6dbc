/* 64-bit ARM with 8-bit dot products: Cortex-A55 and A75 and later, Apple silicon. */
#if defined(__aarch64__)
#include "neon.h"

#define DOT_KERNEL
enum { dot_offset_INT8 = 0, dot_offset_INT4 = 0, dot_offset_CODEBOOK = 0 }; /* both sides are signed */

INLINE vu dot_codes_INT8(vu word, int s) { return (void)s, word; }
INLINE vu dot_codes_INT4(vu word, int s) {
    uint8x16_t codes = (uint8x16_t)((word >> (4 * s)) & 0x0f0f0f0fu);
    return (vu)vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(8));
}
INLINE vu dot_codes_CODEBOOK(vu word, int s) {
    const int8x16_t levels = {-10, -3, 3, 10};
    return (vu)vqtbl1q_s8(levels, (uint8x16_t)((word >> (2 * s)) & 0x03030303u));
}
INLINE vi dot(vi sum, vu codes, int32_t query) {
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, vreinterpretq_s8_s32(vdupq_n_s32(query)));
}
#include "../templates/body.h"

#if defined(__APPLE__)
static int has_dotprod(void) { return 1; }
#elif defined(__linux__)
#include <sys/auxv.h>
#define HWCAP_DOT_PRODUCT (1 << 20) /* HWCAP_ASIMDDP of asm/hwcap.h */
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_DOT_PRODUCT) != 0; }
#else
static int has_dotprod(void) { return 0; }
#endif
KERNEL(kvq_kernel_dotprod, "dotprod", has_dotprod, 1);
#endif
