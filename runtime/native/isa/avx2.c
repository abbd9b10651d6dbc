/* AVX2, FMA and F16C: most x86-64 machines since 2013. */
#if defined(__x86_64__)
#include "avx2.h"
#include "../templates/body.h"

static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
KERNEL(kvq_kernel_avx2, "avx2", has_avx2, 0);
#endif
