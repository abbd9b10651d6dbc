/* Every 64-bit ARM. */
#if defined(__aarch64__)
#include "neon.h"
#include "../templates/body.h"

static int always(void) { return 1; }
KERNEL(kvq_kernel_neon, "neon", always, 0);
#endif
