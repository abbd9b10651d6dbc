/* What the drivers, the C files beside this one, do for each other. */
#ifndef KVQ_DRIVERS_H
#define KVQ_DRIVERS_H

#include "kernel.h"

/* The instruction set of that number, -1: the best one; null where this machine cannot run it. */
const kvq_kernel *kvq_choose_kernel(int32_t i);

/* A kvq_parallel: everything in the calling thread. */
void kvq_serially(void *context, void (*work)(void *, size_t), size_t count, void *data);

/* Whether what an exported function is given fits: 0 or an error, see checks.c. Of a pass that is its page table and what
 * it does stepwise, too. */
int kvq_check_pass(const kvq_pass *pass);
int kvq_check_rows(const kvq_pass *pass, int32_t layer, const kvq_rows *rows);
int kvq_check_encode(int32_t kernel, int32_t precision, const float *x, size_t vectors, int32_t head_dim,
                     const uint32_t *words, const uint16_t *scales);
int kvq_check_move(const kvq_move *move, int steps);
int kvq_check_moved_values(const kvq_move *move);
int kvq_check_matrix(int32_t kernel, const kvq_matrix *matrix);
int kvq_check_pack(int32_t kernel, const kvq_matrix *from, const kvq_matrix *to);

/* As kvq_attend, for a chain of passes that kvq_check_pass has found right, with queries and keys that `prepare` makes first, where
 * rows points; it may be null. Its head_dim is even. */
int kvq_prepare_and_attend(const kvq_pass *pass, int32_t layer, const kvq_rows *rows, const kvq_prepare *prepare,
                           kvq_parallel parallel, void *context);

/* What an operator is given: how many floats, and where. */
typedef struct {
    const float *data;
    size_t count;
} kvq_input;
/* Errors of what operators are given, beside those of kvq.h, which are below zero. */
enum { KVQ_MISFIT_INPUT = 1, KVQ_NO_PASS };
/* What attention of a layer takes besides a session's pass, as its operator does. */
typedef struct {
    kvq_input qkv;
    const kvq_input *input; /* cosine, sine, mean_key, and perhaps scale, axes and stretch of a kvq_key_basis */
    int32_t inputs, layer, rotate;
    float *out;             /* [rows, columns], which have to be [tokens, heads * head_dim] */
    size_t rows, columns;
} kvq_projected;
/* Whether there is a pass, and it has that layer. */
int kvq_has_layer(const kvq_pass *pass, int64_t layer);
/* As kvq_attend, from what a projection yields; pass may be null. Returns 0 or an error, of kvq.h or of those above. */
int kvq_attend_projected(const kvq_pass *pass, const kvq_projected *rows, kvq_parallel parallel, void *context);

/* The row of a pass with one token, and how it is prepared; prepare may be null. */
typedef struct {
    kvq_task task;
    const kvq_prepare *prepare;
} kvq_single;
/* The rows of some passes with one token each, of any sessions: threads go through their work items as through one queue.
 * Returns 0 or NO_MEMORY. */
int kvq_decode(const kvq_single *single, size_t count, kvq_parallel parallel, void *context);
/* The rows of a pass with `stepwise`; as kvq_attend. */
int kvq_attend_stepwise(const kvq_task *task, kvq_parallel parallel, void *context);

/* Whether layers share the tiles of a page, see kvq_page. */
static inline int kvq_shares_tiles(const kvq_page *page) { return page->capacity > 0 && page->capacity < TILE; }
/* The row in which the vectors of `layer` are where those of layer `as` would be, were the arrays of whole tiles and of
 * one precision: its addresses and widths are the layer's own. */
kvq_page kvq_page_layer(const kvq_page *page, int layer, int as, int kv_heads, int head_dim);
/* A pass whose pages are those of one layer as kernels take them: of whole tiles and one precision. */
typedef struct {
    kvq_pass pass;
    kvq_move stepwise;
    kvq_page *page; /* to be freed; null where the pages are the pass's own */
} kvq_layer_pass;
/* Fills `own` for a layer. Returns 0 or NO_MEMORY. */
int kvq_pass_of_layer(const kvq_pass *pass, int layer, kvq_layer_pass *own);
/* Leave in pages of one layer what the token at position `next` sees through a window; `next` tokens are in them. */
void kvq_cut_pages(kvq_page *page, int pages, int next, int window);
/* The tokens of a move go their way in the layers [first, end). Returns 0 or NO_MEMORY. */
int kvq_move_layers(const kvq_move *move, int first, int end);

/* Tokens of a pass and of those behind it. */
static inline int64_t kvq_tokens_of(const kvq_pass *pass) {
    int64_t tokens = 0;
    for (; pass; pass = pass->next) tokens += pass->tokens;
    return tokens;
}

/* Cut the pages into chunks of neighbours; fills chunk [pages + 1] and room, and returns their number. */
int kvq_plan_chunks(const kvq_pass *pass, int32_t *chunk, int *room);
/* The precisions that the keys of a pass are stored at: bit n of the result for width_number n. */
unsigned kvq_key_widths(const kvq_pass *pass);
/* Copy a new token's key and value of one head to where the pass wants them. */
void kvq_keep_token(const kvq_task *task, int kv_head, int token);

/* Every head of x [heads, head_dim] rotated in place, by kernel (-1: the best); head_dim is a power of two. */
void kvq_rotate_heads(int32_t kernel, float *x, size_t heads, int32_t head_dim);
/* out [n] = silu(x[0 .. n)) * x[n .. 2n), by kernel (-1: the best). */
void kvq_swiglu(int32_t kernel, const float *x, size_t n, float *out);
/* sum [n] = x + y and normed [n] = its RMS norm times gain [n], by kernel (-1: the best). */
void kvq_add_norm(int32_t kernel, const float *x, const float *y, const float *gain, size_t n, float epsilon, float *sum,
                  float *normed);
/* out [rows, n] = x [rows, k] times the transpose of a matrix packed for that kernel (-1: the best), as MatMulNBits of
 * onnxruntime at accuracy level 4; parallel may be null. Returns 0 or an error: NO_KERNEL, NO_MEMORY. */
int kvq_product(int32_t kernel, const kvq_matrix *matrix, const float *x, size_t rows, float *out, kvq_parallel parallel,
                void *context);

/* Rows of a residual stream to which others are added, and the norm of the sum. */
typedef struct {
    const float *x, *y, *gain;
    float *sum, *normed; /* sum may be x */
    size_t columns, block;
    float epsilon;
} kvq_normed_rows;
void kvq_norm_rows(void *rows, size_t row);

/* Rows [2 columns] of which the first half gates the second. */
typedef struct {
    const float *x;
    float *out;
    size_t columns, block;
} kvq_activated_rows;
void kvq_swiglu_rows(void *rows, size_t row);

/* Whether every block of so many columns can be rotated; 0: none is. */
int kvq_rotates(int64_t block, size_t columns);

/* Columns that a chain takes, has at most, and yields; of the residual stream; and how many inputs its steps take besides. */
typedef struct {
    size_t in, widest, out, residual, inputs;
} kvq_chain_shape;
/* Whether a chain fits together: its shape and 0, or an error. */
int kvq_check_chain(const kvq_chain *chain, kvq_chain_shape *shape);

typedef struct {
    size_t rows;
    const float *x, *residual; /* [rows, in], [rows, residual] */
    const kvq_input *input;    /* of the steps, one after the other: gains of a norm, what attention takes */
    const kvq_pass *pass;      /* for attention, or null */
    float *sum, *out;          /* the residual stream afterwards; [rows, out] */
} kvq_chain_rows;
/* All steps of a checked chain. Returns 0 or an error, of kvq.h or of operators. */
int kvq_run_chain(const kvq_chain *chain, const kvq_chain_shape *shape, const kvq_chain_rows *rows, kvq_parallel parallel,
                  void *context);

/* Threads that help each other until the one that came first, which leads, is done. All zero but lead, data and threads, it is
 * given to a pool as work of as many items as there are threads; how many of them come, and when, does not matter. */
typedef struct kvq_team {
    void (*lead)(struct kvq_team *team, void *data);
    void *data;
    void (*work)(void *of, size_t i); /* at hand */
    void *of;
    uint64_t ticket; /* which work it is, << 32, and how many items nobody has taken */
    uint32_t count, done;
    uint32_t threads;
    int led, over;
} kvq_team;
void kvq_join_team(void *team, size_t thread);
/* A kvq_parallel of the leader's, its context a team. */
void kvq_team_parallel(void *team, void (*work)(void *, size_t), size_t count, void *data);

#endif
