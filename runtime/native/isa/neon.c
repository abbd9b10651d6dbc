/* Every 64-bit ARM. */
#if defined(__aarch64__)
#include "neon.h"

/* Sums of two products fit 16 bits, since the second side has no -128; of four they do not. */
INLINE vi neon_dot_words(vi sum, vu codes, vu query) {
    const int8x16_t a = (int8x16_t)codes, b = (int8x16_t)query;
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
    return sum + (vi)vpaddq_s32(low, high);
}
#define dot_words neon_dot_words
#include "../templates/body.h"

static int always(void) { return 1; }
KERNEL(kvq_kernel_neon, "neon", always, 0);
#endif
