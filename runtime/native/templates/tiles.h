/* How much of a page the scores are taken of at a time. */
#ifndef KVQ_TILES_H
#define KVQ_TILES_H

#include "types.h"

#define TILE_VECTORS (TILE / LANES)

/* How many tiles share a load of an integer query: as many as there are registers for their sums. */
#if defined(DOT_KERNEL) && LANES == 16
#define DOT_TILES 2
#else
#define DOT_TILES 1
#endif
#define SCORE_VECTORS (DOT_TILES * TILE_VECTORS)

#endif
