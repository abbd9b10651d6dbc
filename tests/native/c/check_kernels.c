/* Checks every kernel that this machine can run against attention and codecs in plain double precision.
 *
 *   check_kernels          everything, in seconds
 *   check_kernels quick    less of everything: for sanitizers and emulators
 *   check_kernels odd      queries that are tiny, infinite or NaN; head_dims that no model has
 *   check_kernels ... neon of one kernel alone
 *
 * Prints a line per kernel; exit status 1 when one is wrong, with what was wrong.
 * Linked with all C files of the library. Every array has exactly its size, so that the address sanitizer sees any
 * access beyond a page; the random numbers are the same in every run. */
#include "check_attention.h"
#include "check_codecs.h"
#include "check_products.h"
#include "check_refusals.h"
#include "check_stepwise.h"
#include "check_turns.h"

/* What the names say, and which kernels run. */
static void check_interface(void) {
    float x[8] = {0}, out[8];
    uint32_t words[8];
    uint16_t scale;
    const kvq_rows rows = {.query = x, .key = x, .value = x, .out = out};
    kvq_pass pass = {.layers = 1, .heads = 1, .kv_heads = 1, .head_dim = 8, .tokens = 1, .threads = 1};
    if (kvq_abi() != KVQ_ABI) fail("kvq_abi is not that of kvq.h");
    if (!kvq_kernel_available(0) || strcmp(kvq_kernel_name(0), "plain")) fail("the first kernel is not plain C");
    if (kvq_kernels() > MOST_KERNELS) fail("more kernels than this program has room for");
    for (int kernel = -2; kernel <= kvq_kernels(); kernel++) {
        const int available = kernel >= 0 && kernel < kvq_kernels() && kvq_kernel_available(kernel);
        const int usable = available || kernel < 0; /* below 0: the best one */
        const int expected = usable ? 0 : KVQ_NO_KERNEL;
        pass.kernel = kernel;
        if (kvq_attend(&pass, 0, &rows, NULL, NULL) != expected) fail("attending with kernel %d", kernel);
        if (kvq_encode(kernel, KVQ_INT8, x, 1, 8, NULL, 1, words, &scale) != expected) fail("encoding with kernel %d", kernel);
        if (kvq_within(kernel, x, 8, 1e30f) != (usable ? 1 : KVQ_NO_KERNEL)) fail("looking with kernel %d", kernel);
        if (available != kvq_kernel_available(kernel)) fail("kernel %d says it is available", kernel);
        if (!*kvq_kernel_name(kernel) != (kernel < 0 || kernel >= kvq_kernels())) fail("name of kernel %d", kernel);
    }
}

static void check_everything(int quick) {
    check_interface();
    check_knowledge();
    check_refused_passes();
    check_refused_moves();
    check_refused_encoding();
    check_refused_matrices();
    check_counts(quick ? 3 : 1);
    check_shapes(quick ? 7 : 1);
    check_rings(quick);
    check_mixtures(quick ? 40 : 300, quick ? 400 : 1100);
    check_turns(quick ? 12 : 120);
    check_long(quick);
    check_prefill(quick);
    check_stepwise(quick ? 4 : 20);
    check_large_scores();
    check_encoding(quick ? 1 : 4);
    check_moves(quick ? 2 : 10);
    check_movable();
    check_swiglu();
    check_add_norm();
    check_products(quick);
    for (int kernel = 0; kernel < kvq_kernels(); kernel++)
        if (is_checked(kernel)) check_prepare(kernel);
    if (!shared_calls) fail("no work was ever handed to other threads");
}

int main(int count, char **arguments) {
    const int quick = count > 1 && !strcmp(arguments[1], "quick");
    only = count > 2 ? arguments[2] : NULL;
    seed = 20240607;
    if (count > 1 && !strcmp(arguments[1], "odd")) check_odd_queries(), check_odd_dims();
    else check_everything(quick);
    for (int kernel = 0; kernel < kvq_kernels(); kernel++)
        if (is_checked(kernel))
            printf("%s: %d attentions, largest error %.1e; %d vectors encoded\n", kvq_kernel_name(kernel),
                   done[kernel].attention, done[kernel].error, done[kernel].encoded);
        else printf("%s: not %s\n", kvq_kernel_name(kernel),
                    kvq_kernel_available(kernel) ? "asked for" : "available on this machine");
    return failures > 0;
}
