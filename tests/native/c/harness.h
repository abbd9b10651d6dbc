/* What the checks share: counts of what was done, and how a failure is told. */
#ifndef KVQ_HARNESS_H
#define KVQ_HARNESS_H

#include <stdarg.h>

#include "reference.h"

#define LENGTH(list) (int)(sizeof(list) / sizeof *(list))

enum { MOST_KERNELS = 8, MOST_FAILURES = 20 };
static struct {
    int attention, encoded;
    double error;
} done[MOST_KERNELS];
static int failures;
static const char *only; /* the kernel to check; null: all */

static int is_checked(int kernel) {
    return kvq_kernel_available(kernel) && (!only || !strcmp(kvq_kernel_name(kernel), only));
}

__attribute__((format(printf, 1, 2))) static void fail(const char *format, ...) {
    va_list values;
    va_start(values, format);
    fputs("FAILED ", stdout), vprintf(format, values), putchar('\n');
    va_end(values);
    if (++failures < MOST_FAILURES) return;
    puts("too many failures");
    exit(1);
}

#endif
