/* What NEON does better than plain vectors. */
#ifndef KVQ_NEON_H
#define KVQ_NEON_H

#include <arm_neon.h>

#define LANES 4
#include "../templates/types.h"

INLINE vf neon_half_to_float(vu x) {
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)x)));
}
#define half_to_float neon_half_to_float

#endif
