/* The rows of several new tokens that read a chunk of pages together, see tile_rows.h. A row is a query head of a token: head g
 * of token t is row t * heads + g. */
#ifndef KVQ_SOME_ROWS_H
#define KVQ_SOME_ROWS_H

#include "../templates/decode.h"

enum {
    ROW_BLOCKS = MOST_TOGETHER * DECODE_HEADS / TILE_SIDE, /* of TILE_SIDE rows, at most */
    SEGMENT = 128,                                         /* slots whose values are bytes at a time */
    SEGMENT_TILES = SEGMENT / TILE_BYTES,
    SUMS = TILE_SIDE * LANES, /* of a tile */
    FEWEST_TOGETHER = 4,      /* tokens; fewer are faster one by one */
};

/* What the rows of some tokens come to over a chunk. */
typedef struct {
    const kvq_task *task; /* [tokens] */
    int tokens, heads, head, rows, blocks; /* head: the first one; blocks: of TILE_SIDE rows */
    int channels;         /* in whole vectors */
    size_t vector_row;
    int room;             /* slots of a token's scores */
    float *scores;        /* [tokens, room / TILE, heads, TILE]; then weights */
    int at[MOST_TOGETHER];    /* slots of each token that are done */
    int slots[MOST_TOGETHER]; /* of the page that is worked on */
    int shared;               /* whether that one's codes are the same for all */
    vf *top;              /* [rows] */
    softmax_sums *softmax;
    float *maximum, *unit, *inverse;
    int depth, gathered;  /* bytes of a row of queries, in whole tiles; the precision that they are for */
    uint8_t *query;       /* [QUERY_PARTS, blocks * TILE_SIDE, depth] */
    uint32_t *key;        /* [depth / 4, TILE]: a tile of keys */
    int32_t *product;     /* [QUERY_PARTS, blocks, SUMS] */
    uint8_t *weight;      /* [WEIGHT_PARTS, blocks * TILE_SIDE, SEGMENT] */
    uint32_t *value;      /* [SEGMENT_TILES, channels / LANES, TILE_BYTES / 4, LANES] */
    int32_t *sum;         /* [WEIGHT_PARTS, blocks, channels / LANES, SUMS] */
    int begun[WEIGHT_PARTS]; /* whether there are sums of that part */
    uint32_t place[MOST_PASSES * 2 * LANES]; /* of each channel, among the registers of codes_of_four */
} some_rows;

INLINE const kvq_page *page_of(const some_rows *s, int t, int p) { return s->task[t].pass->page + p; }
INLINE float *scores_of(const some_rows *s, int t) { return s->scores + (size_t)t * s->room * s->heads; }
INLINE char *partial_of(const some_rows *s, int t, int chunk) {
    const kvq_task *task = s->task + t;
    return partials_of(task, s->head / task->group, chunk) + s->head % task->group * partial_bytes(task);
}

/* Look at a page: how many slots each token has of it, and whether they find the same codes there. Returns the most. */
static int look_at(some_rows *s, int p) {
    const kvq_page *first = page_of(s, 0, p);
    int most = 0;
    s->shared = 1;
    for (int t = 0; t < s->tokens; t++) {
        const kvq_page *page = page_of(s, t, p);
        s->slots[t] = slots_of(page);
        if (s->slots[t] > most) most = s->slots[t];
        if (page->keys != first->keys || page->begin != first->begin) s->shared = 0;
    }
    return most;
}
/* Tiles 0 to 3 are sums, one for each block of rows; 4 to 6 rows, 7 codes. */
#define FOR_BLOCKS(blocks, DO)  \
    DO(0, 4)                    \
    if (blocks > 1) { DO(1, 5) } \
    if (blocks > 2) { DO(2, 6) } \
    if (blocks > 3) { DO(3, 4) }
_Static_assert(ROW_BLOCKS == 4, "tiles of rows");

#endif
