/* Which instruction sets this machine has. Compiled for every machine of its kind: in the files of isa/ the compiler may use
 * what it is asked about. */
#include "kernel.h"

#if defined(__x86_64__) || defined(_M_X64)
int kvq_has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
int kvq_has_avxvnni(void) { return kvq_has_avx2() && __builtin_cpu_supports("avxvnni"); }
int kvq_has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

#if KVQ_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The system has to be asked before a process may use tiles; it then may in all its threads. Asked once: the instruction
 * that says what a processor has takes a virtual machine 20 microseconds. */
int kvq_has_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    static int known; /* 1: it has not, 2: it has */
    int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (!found) {
        unsigned a, b, c, d;
        const int has = kvq_has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & AMX_TILE && d & AMX_INT8;
        found = has && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? 2 : 1;
        __atomic_store_n(&known, found, __ATOMIC_RELAXED);
    }
    return found == 2;
}
#endif

#elif defined(__aarch64__)
#if defined(__APPLE__)
int kvq_has_dotprod(void) { return 1; }
#elif defined(__linux__)
#include <sys/auxv.h>
#define HWCAP_DOT_PRODUCT (1 << 20) /* HWCAP_ASIMDDP of asm/hwcap.h */
int kvq_has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_DOT_PRODUCT) != 0; }
#else
int kvq_has_dotprod(void) { return 0; }
#endif
#endif
