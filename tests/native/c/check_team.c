/* Teams under threads that come early, late, or not at all: every piece of work is done once, and its leader sees it done.
 *
 *   check_team ROUNDS THREADS
 *
 * Linked with team.c alone. Exit status 1 when a piece was lost, done twice, or not seen. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "drivers.h"

enum { MOST_THREADS = 16, MOST_ITEMS = 300, PIECES = 40 };

void kvq_serially(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    (void)context;
    for (size_t i = 0; i < count; i++) work(data, i);
}

typedef struct {
    int done[MOST_ITEMS]; /* plain numbers: a race on them is one that the thread sanitizer tells */
    size_t count;
} piece;

static unsigned draw(unsigned *state) { return (*state = *state * 1664525u + 1013904223u) >> 8; }

static void count_item(void *data, size_t i) { ((piece *)data)->done[i]++; }

static int wrong; /* written by leaders, read when all threads are gone */

static void lead(kvq_team *team, void *data) {
    unsigned *state = data;
    for (int n = 0; n < PIECES; n++) {
        piece p = {.count = draw(state) % MOST_ITEMS};
        kvq_team_parallel(team, count_item, p.count, &p);
        for (size_t i = 0; i < MOST_ITEMS; i++)
            if (p.done[i] != (i < p.count)) wrong = 1;
    }
}

typedef struct {
    kvq_team *team;
    unsigned delay;
} member;

static void *join(void *data) {
    const member *m = data;
    for (volatile unsigned i = 0; i < m->delay; i++) {}
    kvq_join_team(m->team, 0);
    return NULL;
}

int main(int count, char **arguments) {
    const int rounds = count > 1 ? atoi(arguments[1]) : 100, threads = count > 2 ? atoi(arguments[2]) : 4;
    unsigned state = 1;
    for (int round = 0; round < rounds && threads <= MOST_THREADS; round++) {
        unsigned of_leader = draw(&state);
        kvq_team team = {.lead = lead, .data = &of_leader, .threads = (uint32_t)threads};
        pthread_t thread[MOST_THREADS];
        member members[MOST_THREADS];
        const int come = 1 + (int)(draw(&state) % (unsigned)threads); /* those that do not are not missed */
        for (int t = 0; t < come; t++) {
            members[t] = (member){&team, draw(&state) % 20000};
            if (pthread_create(thread + t, NULL, join, members + t)) return 2;
        }
        for (int t = 0; t < come; t++) pthread_join(thread[t], NULL);
        if (wrong || !team.over) return puts("a piece was lost, done twice, or not seen"), 1;
    }
    puts("every piece was done once");
    return 0;
}
