/* Plain C with the compiler's own vectors: runs everywhere, and is what the other kernels are compared with. */
#define LANES 4
#include "../templates/body.h"

static int always(void) { return 1; }
KERNEL(kvq_kernel_plain, "plain", always, 0);
