/* What NEON does better than plain vectors. */
#ifndef KVQ_NEON_H
#define KVQ_NEON_H

#include <arm_neon.h>

#define LANES 4
#include "../templates/codebook.h"
#include "../templates/types.h"

INLINE vf neon_half_to_float(vu x) {
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)x)));
}
#define half_to_float neon_half_to_float

/* The level is looked up into the highest byte of its lane; a byte beyond the table gives 0. */
INLINE vf neon_lookup(const codebook *book, int n, vu x) {
    const uint32x4_t at = ((uint32x4_t)x & (uint32_t)(n - 1)) << 24 | 0x00ffffffu;
    const int32x4_t level = (int32x4_t)vqtbl1q_s8(vld1q_s8(book->whole), (uint8x16_t)at);
    return (vf)vcvtq_f32_s32(level >> 24);
}
#define lookup neon_lookup

#endif
