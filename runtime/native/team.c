/* Threads that stay together over many pieces of work. Lending them anew for each one costs microseconds, which is more than
 * the small pieces of a step take. */
#include "drivers.h"

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

enum { SHARES = 2 }; /* of what is left that a thread takes at a time: neighbours, since memory is read faster in order */

/* Some items of the work at hand, or nothing. Who has taken some may read what the work is: it stays until all are done. */
static int take(kvq_team *t) {
    uint64_t ticket = __atomic_load_n(&t->ticket, __ATOMIC_ACQUIRE);
    uint32_t left;
    while ((left = (uint32_t)ticket)) {
        const uint32_t share = left / (SHARES * t->threads), taken = share ? share : 1;
        if (!__atomic_compare_exchange_n(&t->ticket, &ticket, ticket - taken, 1, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
        const size_t first = t->count - left;
        for (size_t i = first; i < first + taken; i++) t->work(t->of, i);
        __atomic_fetch_add(&t->done, taken, __ATOMIC_RELEASE);
        return 1;
    }
    return 0;
}

void kvq_team_parallel(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    kvq_team *t = context;
    if (count < 2 || count > UINT32_MAX) {
        kvq_serially(NULL, work, count, data);
        return;
    }
    t->work = work, t->of = data, t->count = (uint32_t)count;
    __atomic_store_n(&t->done, 0, __ATOMIC_RELAXED);
    const uint64_t turn = (__atomic_load_n(&t->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    __atomic_store_n(&t->ticket, turn << 32 | count, __ATOMIC_RELEASE);
    while (take(t)) {}
    while (__atomic_load_n(&t->done, __ATOMIC_ACQUIRE) < count) PAUSE();
}

void kvq_join_team(void *team, size_t thread) {
    kvq_team *t = team;
    (void)thread;
    if (!__atomic_exchange_n(&t->led, 1, __ATOMIC_ACQ_REL)) {
        t->lead(t, t->data);
        __atomic_store_n(&t->over, 1, __ATOMIC_RELEASE);
        return;
    }
    while (!__atomic_load_n(&t->over, __ATOMIC_ACQUIRE))
        if (!take(t)) PAUSE();
}
