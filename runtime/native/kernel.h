/* What one instruction set offers, and the work that the drivers give it. */
#ifndef KVQ_KERNEL_H
#define KVQ_KERNEL_H

#include "kvq.h"

/* What happens to a key between rotary embedding and rotation, and the inverse to a query: each channel times its scale,
 * then x + sum over axes of (stretch - 1) (x . axis) axis; the axes of a head are orthonormal. */
typedef struct {
    const float *scale;   /* [kv_heads, head_dim]; null: nothing happens */
    const float *axes;    /* [kv_heads, rank, head_dim] */
    const float *stretch; /* [kv_heads, rank] */
    int32_t rank;         /* at most head_dim */
} kvq_key_basis;

/* What a projection yields and what attention takes, see the hook `prepare` of a kernel. */
typedef struct {
    const float *qkv;           /* [tokens, heads + 2 * kv_heads, head_dim] */
    const float *cosine, *sine; /* [tokens, head_dim / 2] */
    const float *mean_key;      /* [kv_heads, head_dim], subtracted from the keys */
    kvq_key_basis basis;
    float *out;                 /* [tokens, heads + kv_heads, head_dim]: queries, keys; then values if they are rotated */
    int32_t heads, kv_heads, head_dim;
    int32_t rotate; /* KVQ_ROTATE_...: which heads the Hadamard matrix rotates; head_dim is a power of two then */
    int32_t kernel; /* as in kvq_pass */
} kvq_prepare;

/* Queries with keys; values, and what attention makes of them back; the latter not, as its projection has it so. */
enum { KVQ_ROTATE_KEYS = 1, KVQ_ROTATE_VALUES = 2, KVQ_STAY_ROTATED = 4 };

/* Heads of a token in kvq_prepare's out. */
static inline int32_t kvq_prepared_heads(const kvq_prepare *p) {
    return p->heads + p->kv_heads * (p->rotate & KVQ_ROTATE_VALUES ? 2 : 1);
}

/* Partial softmax of one query head over some tokens: weighted values and what is needed to merge them. */
typedef struct {
    float maximum, total, squares;
    float pad;
} kvq_partial; /* followed by the weighted values, float [padded_dim] */

/* A query head as integers, for dot products with packed keys: query = scale * (part 0 * 254 + part 1), each part in
 * [-127, 127]. What that rounds is a two-hundredth of what keys of 8 bits do, in the same scores. */
#define QUERY_PARTS 2
#define QUERY_BASE 254
#define QUERY_UNIT QUERY_BASE /* of part 0 */
typedef struct {
    float scale;
    int32_t sums[QUERY_PARTS]; /* over all channels: unsigned codes are offset */
} kvq_integer_query;

/* Rows that a matrix is multiplied with, in bytes: a value is about its code times the scale of its block. */
typedef struct {
    int8_t *codes;  /* [blocks, rows, block] */
    float *scales;  /* [blocks, rows] */
    int32_t *sums;  /* [blocks, rows]: of the codes; times what each code of the weights counts too much if that is one number */
    float *totals;  /* [blocks, rows]: of the values; null where no offsets want them */
    size_t rows;
} kvq_byte_rows;

typedef struct kvq_task kvq_task;

typedef struct {
    const char *name;
    int (*available)(void);
    int integer_dot; /* wants task->integers */
    void (*decode)(const kvq_task *task, size_t item, size_t next); /* of one new token; `next` will be read after it */
    /* the same of some new tokens, whose tasks lie side by side and are cut alike, to the bit; and how many bytes of memory,
     * on a cache line, that takes where no chunk has more than `room` slots */
    void (*decode_rows)(const kvq_task *task, int tokens, size_t item, char *memory);
    size_t (*rows_bytes)(const kvq_task *task, int tokens, int room);
    void (*query)(const kvq_task *task, unsigned widths, int head, float *query, kvq_integer_query *integer,
                  int32_t *words); /* of one new token; the last three are those of this head */
    /* products [group, blocks of turns] of a KV head's query heads, prepared, with what keys of the blocks [first, end) are
     * stored less */
    void (*turn)(const kvq_task *task, int kv_head, int first, int end, float *products);
    void (*merge)(const kvq_task *task, int head);
    int (*prefill)(const kvq_task *task, size_t i); /* item: one KV head x one block of query rows; 0 or
                                                     * NO_MEMORY */
    /* heads [first, end) of one token, queries before keys: rotary embedding, basis, rotation, centring of the keys; with
     * a key goes its value, where values are rotated */
    void (*prepare)(const kvq_prepare *p, size_t token, int first, int end);
    void (*rotate)(float *x, size_t heads, int head_dim);
    void (*swiglu)(const float *x, size_t n, float *out);
    void (*add_norm)(const float *x, const float *y, const float *gain, size_t n, float epsilon, float *sum,
                     float *normed);
    /* x [k], row number `row`, to bytes */
    void (*quantize)(const kvq_matrix *matrix, const float *x, size_t row, const kvq_byte_rows *to);
    /* columns [KVQ_PANEL * panel, + KVQ_PANEL * product_panels) of rows [first, first + rows), at most
     * PRODUCT_MOST_ROWS, of out [rows, n]. What a row yields does not depend on the others */
    void (*product)(const kvq_matrix *matrix, const kvq_byte_rows *of, size_t panel, size_t first, size_t rows, float *out);
    int product_panels;
    int own_products;  /* see kvq_kernel_products */
    int weight_offset; /* what the bytes of 8-bit weights are more than the weights, see kvq_matrix */
    void (*move)(const kvq_move *move);
    /* keys or values of one layer and KV head, number `row` of all vectors: those whom the tokens [first, first + count), no
     * more than the window has slots, drive out of it go to their pages; token t takes its slot */
    void (*leave_rows)(const kvq_move *move, int of_keys, size_t row, int first, int count);
    void (*enter_row)(const kvq_move *move, int of_keys, size_t row, int t);
    int (*within)(const float *x, size_t count, float limit); /* whether all are from -limit to limit: 1 or 0 */
    int (*encode)(int precision, const float *x, size_t vectors, int head_dim, const uint16_t *feedback, size_t each,
                  uint32_t *words, uint16_t *scales);
} kvq_kernel;

struct kvq_task {
    const kvq_pass *pass;
    const kvq_rows *rows;
    const kvq_kernel *kernel;
    const kvq_turns *turns;       /* of the pass; null where the layer's keys are stored as they are */
    int layer, group, padded_dim; /* group: query heads of a KV head; padded_dim: head_dim in whole 16s */
    int window;                   /* of the layer, see kvq_pass; 0: none */
    float softmax_scale;
    /* decode */
    const float *query;                /* [heads, padded_dim], scaled, zero-padded */
    const kvq_integer_query *integer;  /* [heads] */
    const int32_t *words;              /* [heads, widths, QUERY_PARTS, words], see integer_words */
    const int32_t *chunk;              /* [chunks + 1]: first page of each chunk */
    const float *turned;               /* [heads, blocks of turns], products of the queries with what keys are stored less */
    int chunks, chunk_room;            /* chunk_room: most slots of a chunk */
    char *partials;                    /* [kv_heads, chunks, group] of kvq_partial and weighted values */
    int first_kv_head;                 /* the one whose partials, and products of `turned`, come first */
    /* prefill */
    int row_block, row_blocks; /* row_block: new tokens whose query heads are worked on together */
    int failed;
};

#define LARGEST_HALF 65504.0f
#define LARGEST_MOVED 65024.0f /* 127 * 512: at 8 bits of the window it comes back within half precision */
#define MOST_WORDS (MOST_CHANNELS / 2) /* of a vector */
#define DECODE_HEADS 4   /* query heads that share one pass over the codes */
#define MOST_TOGETHER 16 /* new tokens of a stepwise pass that are worked on together */
#define KEY_BLOCK 64     /* tokens attended to at a time in prefill: their keys fit the first-level cache */

#define PRODUCT_MOST_ROWS 192 /* that share an expansion of weights; sums of so many stay in the first-level cache */

#define NOINLINE static __attribute__((noinline))

/* Slots of a page that can hold tokens, in whole tiles, counted from begin; 0 or less when it is empty. */
static inline int slots_of(const kvq_page *page) {
    int used = (page->count + TILE - 1) / TILE * TILE;
    return (page->first || used > page->end ? page->end : used) - page->begin;
}

/* Whether a slot of the arrays holds a token. */
static inline int holds_token(const kvq_page *page, int slot) {
    return slot < page->period && (slot - page->first + page->period) % page->period < page->count;
}

/* Where the token in a slot of the arrays stands in the text, of a pass that has windows. */
static inline int position_at(const kvq_pass *pass, const kvq_page *page, int slot) {
    const int last = pass->position - 1; /* the newest one's, which lies in slot last % period of the window */
    if (page->positions) return page->positions[slot];
    return last - (last % page->period - slot + page->period) % page->period;
}

/* The order of items: all KV heads of the last chunk, since theirs lie side by side in a page, then all of the one
 * before. */
static inline int item_head(const kvq_task *task, size_t i) { return (int)(i % task->pass->kv_heads); }
static inline int item_chunk(const kvq_task *task, size_t i) {
    return task->chunks - 1 - (int)(i / task->pass->kv_heads);
}
static inline size_t item_number(const kvq_task *task, int kv_head, int chunk) {
    return (size_t)(task->chunks - 1 - chunk) * task->pass->kv_heads + kv_head;
}

/* Ask for memory that will be read soon. A page's part of one layer and KV head is a few kilobytes, too short for the
 * processor to foresee the next one. Into the second-level cache: what the first one holds is in use. */
static inline void prefetch(const char *from, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* Where a page keeps a row of keys or values. */
static inline const char *codes_at(const kvq_task *task, const kvq_page *page, size_t vector_row, int of_keys) {
    const size_t first_slot = vector_row * page->capacity + page->begin;
    const uint32_t *codes = of_keys ? page->keys : page->values;
    const int precision = of_keys ? page->key_precision : page->value_precision;
    return (const char *)(codes + first_slot * words_per_vector(precision, task->pass->head_dim));
}

/* The first keys of an item, which are read after those of the one before. */
static inline const char *start_of(const kvq_task *task, size_t item) {
    const size_t vector_row = (size_t)task->layer * task->pass->kv_heads + item_head(task, item);
    return codes_at(task, task->pass->page + task->chunk[item_chunk(task, item)], vector_row, 1);
}

/* Whether the keys of a page are stored less what turns with their position. */
static inline int page_turns(const kvq_task *task, const kvq_page *page) {
    return task->turns && kvq_turned(page->key_precision);
}

/* The blocks of positions that a token of a task sees in its pages, of `tokens` new ones: [first, end). */
static inline int first_turn(const kvq_task *task) {
    const int seen = task->pass->position - task->window + 1;
    return task->window && seen > 0 ? seen / KVQ_TURN_BLOCK : 0;
}
static inline int end_turn(const kvq_task *task, int tokens) {
    return (task->pass->position + tokens - 1) / KVQ_TURN_BLOCK + 1;
}

static inline size_t partial_bytes(const kvq_task *task) {
    return sizeof(kvq_partial) + sizeof(float) * (size_t)task->padded_dim;
}

/* The first partial result of a KV head's query heads over a chunk. */
static inline char *partials_of(const kvq_task *task, int kv_head, int chunk) {
    const size_t chunks_before = (size_t)(kv_head - task->first_kv_head) * task->chunks + chunk;
    return task->partials + chunks_before * task->group * partial_bytes(task);
}

/* Integer words of one query head are kept for every precision that integer dot products take, part after part of each:
 * step s of row j holds the bytes of the channels (b * steps + s) * words + j, b = 0..3, where steps = 8 / bits; words and
 * bits are those of the low ones. */
static inline int integer_words(int precision, int head_dim) {
    return low_words_of(precision, words_per_vector(precision, head_dim)) * (8 / low_bits_of(precision));
}
static inline int integer_words_all(int head_dim) {
    int words = 0;
#define ADD_WORDS(name, id, bits, scale, products, with) KVQ_IF_WHOLE(products, words += integer_words(id, head_dim);)
    KVQ_WIDTHS(ADD_WORDS, )
#undef ADD_WORDS
    return QUERY_PARTS * words;
}
static inline int integer_words_start(int precision, int head_dim) {
    int start = 0;
#define SKIP_WORDS(name, id, bits, scale, products, with) \
    KVQ_IF_WHOLE(products, if (precision == id) return start; start += QUERY_PARTS * integer_words(id, head_dim);)
    KVQ_WIDTHS(SKIP_WORDS, )
#undef SKIP_WORDS
    return start;
}

/* Cut one block of memory into parts that are aligned for anything; with base null only their size is counted. */
static inline void *kvq_part(char *base, size_t *used, size_t bytes) {
    void *at = base ? base + *used : NULL;
    *used += (bytes + 63) / 64 * 64;
    return at;
}

/* Every instruction set that a machine of this kind may have; each is a file of isa/. Whether it has it: available.c. */
extern const kvq_kernel kvq_kernel_plain;
#if defined(__x86_64__) || defined(_M_X64)
extern const kvq_kernel kvq_kernel_avx2, kvq_kernel_avxvnni, kvq_kernel_avx512, kvq_kernel_amx;
int kvq_has_avx2(void), kvq_has_avxvnni(void), kvq_has_avx512(void), kvq_has_amx(void);
/* Where the compiler and the system know tiles: a process has to ask Linux for them. */
#define KVQ_AMX (defined(__linux__) && (__clang_major__ >= 12 || (!defined(__clang__) && __GNUC__ >= 11)))
#elif defined(__aarch64__)
extern const kvq_kernel kvq_kernel_neon, kvq_kernel_dotprod;
int kvq_has_dotprod(void);
#endif

#endif
