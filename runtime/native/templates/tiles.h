/* How much of a page the scores are taken of at a time. */
#ifndef KVQ_TILES_H
#define KVQ_TILES_H

#include "../kernel.h"
#include "types.h"

#define TILE_VECTORS (TILE / LANES)

/* How many tiles share a load of an integer query: as many as there are registers for their sums. */
#if defined(DOT_KERNEL) && LANES == 16
#define DOT_TILES 2
#else
#define DOT_TILES 1
#endif
#define SCORE_VECTORS (DOT_TILES * TILE_VECTORS)

/* Sums that a query head has where products are of integers, and the largest head_dim whose sums 32 bits hold. */
#ifdef PAIR_KERNEL
enum { QUERY_SUMS = 1, MOST_INTEGER = 256 };
#else
enum { QUERY_SUMS = QUERY_PARTS, MOST_INTEGER = MOST_CHANNELS };
#endif

#endif
