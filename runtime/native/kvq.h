/* Attention over the packed KV store: what the library exports. The ctypes declarations in library.py have the same,
 * field by field. Arrays are laid out as runtime/kv/pages.py describes. */
#ifndef KVQ_H
#define KVQ_H

#include <stddef.h>
#include <stdint.h>

#include "widths.h"

#define KVQ_ABI 22 /* raise when a struct, a function or an error below changes */

#if defined(_WIN32)
#define KVQ_EXPORT __declspec(dllexport)
#else
#define KVQ_EXPORT __attribute__((visibility("default")))
#endif

#define TILE 16            /* tokens of a key tile; room for tokens comes in whole tiles, or in a half or a quarter of one */
#define CHUNK_SLOTS 1024   /* most slots of a row of the page table, and of a work item */
#define MOST_CHANNELS 1024 /* largest head_dim */

/* What the functions below refuse, X(name, number, cause and remedy). Nothing has been read or written then, but where
 * memory ran out or a value was refused. */
#define KVQ_ERRORS(X)                                                                                                 \
    X(NO_MEMORY, -1, "no memory for attention: shorten the context or the prefill chunk")                            \
    X(NO_KERNEL, -2, "this machine cannot run that instruction set; unset KVQ_NATIVE_ISA, or use KVQ_BACKEND=numpy")  \
    X(UNKNOWN_PRECISION, -3, "a precision that the native library has no kernels for; use KVQ_BACKEND=numpy")        \
    X(MISFIT_SHAPE, -4, "layers, heads, kv_heads, head_dim or tokens do not fit; use KVQ_BACKEND=numpy")             \
    X(MISFIT_PAGE, -5, "a row of the page table whose slots do not fit; use KVQ_BACKEND=numpy, and report this")     \
    X(MISFIT_MOVE, -6, "a token's way leads to a slot that is not there; use KVQ_BACKEND=numpy, and report this")    \
    X(NO_DATA, -7, "an address is missing where there is something to read; use KVQ_BACKEND=numpy, and report this") \
    X(REFUSED_VALUE, -8, "NaN, infinity or a value beyond half precision; check the checkpoint, or export it with fp32")
#define KVQ_ERROR_OF(name, number, text) KVQ_##name = number,
enum { KVQ_OK, KVQ_ERRORS(KVQ_ERROR_OF) };

/* Where a page has the keys and values of one layer, for layers that have precisions of their own. */
typedef struct {
    const uint32_t *keys; /* [kv_heads, ...] as below, from the layer's first slot on; null of a layer it does not hold */
    const uint16_t *key_scales;
    const uint32_t *values;
    const uint16_t *value_scales;
    int32_t key_precision, value_precision; /* ids of widths.h */
} kvq_layer_arrays;

/* The slots [begin, end) of arrays that hold tokens of one precision, all layers and KV heads: a page of the store,
 * or a part of its recent window. Slot s of the arrays holds a token where s < period and
 * (s - first) mod period < count; a page has first = 0 and period = capacity, the window is a ring.
 *
 * Where capacity is a half or a quarter of TILE, n = TILE / capacity layers share a tile: the arrays are those of
 * layers / n layers, rounded up, and of capacity TILE, and layer l lies in those of layer l / n from slot
 * l % n * capacity on. Whole tiles are read from there, so another TILE - capacity slots have to be behind the last one
 * (of keys as many words). */
typedef struct {
    const uint32_t *keys;         /* [layers, kv_heads, capacity / TILE, words, TILE] */
    const uint16_t *key_scales;   /* halves [layers, kv_heads, capacity], not read where the precision has none */
    const uint32_t *values;       /* [layers, kv_heads, capacity, words] */
    const uint16_t *value_scales; /* as key_scales */
    int32_t key_precision, value_precision; /* ids of widths.h */
    int32_t capacity, begin, end; /* multiples of TILE, see above; end - begin at most CHUNK_SLOTS */
    int32_t first, count, period; /* first < period <= capacity, count <= period */
    int32_t narrow; /* 1: the arrays have rows of the layers without a window alone, in order; 0: of all layers */
    int32_t unused;
    const int32_t *positions; /* [count] of a page: where its tokens stand in the text, ascending; null of the window,
                               * whose slots follow from the position. Read where a pass has windows or turns */
    const kvq_layer_arrays *layers; /* [layers] of a page whose layers have precisions of their own, which stand in for
                                     * its arrays and precisions; null: all have those above. A part of a tile has the
                                     * whole tile's room, as where layers share one */
} kvq_page;

/* A mean that turns with the position, which keys of few bits (kvq_turned of widths.h) are stored less, as
 * runtime/precision/key_turns.py has it: of the tokens at KVQ_TURN_BLOCK positions, block b, the sum over rows r of
 * waves[r, b] * vectors[r]. Readers add it; the window, and pages of more bits, hold keys as they are. */
typedef struct {
    const float *vectors;  /* [layers, kv_heads, rows, head_dim] */
    const float *across;   /* the same as [layers, kv_heads, head_dim, rows] */
    const float *waves;    /* [sets, rows, blocks] */
    const int32_t *which;  /* [layers]: of which set; -1: the layer's keys are stored as they are */
    int32_t sets, rows, blocks; /* rows: whole 16s, at most KVQ_TURN_MOST_ROWS; blocks: whole KVQ_TURN_BLOCKS */
} kvq_turns;
#define KVQ_TURN_BLOCK 16
#define KVQ_TURN_BLOCKS 64
#define KVQ_TURN_MOST_ROWS MOST_CHANNELS

/* What happens with one new token: the token in its slot of the recent window moves to a page, and it takes the slot. */
typedef struct {
    int32_t window_slot;
    int32_t page, page_slot; /* number of the page's row; -1 where the slot of the window is free */
} kvq_move_step;

/* The way of new tokens through the store, one after the other. Byte for byte what encoding and writing in numpy gives. */
typedef struct {
    int32_t layers, kv_heads, head_dim;
    int32_t kernel;
    int32_t tokens;
    int32_t pages;              /* rows of page; of a pass those behind them are the window's */
    const float *keys, *values; /* of the new tokens, [layers, kv_heads, tokens, head_dim] */
    const uint16_t *feedback;      /* halves, of keys, [layers, kv_heads, head_dim, head_dim], see kvq_encode; or null */
    const kvq_page *window;     /* of WINDOW or INT8: a row that begins at slot 0; its slots are counted from there, also beyond its end */
    const kvq_page *page;       /* rows of the pages that tokens go to */
    const kvq_move_step *step;  /* [tokens]; of a pass [tokens - 1], since its last token stays where it is */
    const float *turned;        /* [layers, kv_heads, turn_blocks, head_dim]: what keys of few bits are stored less, of the
                                 * blocks of positions from first_block on; null: nothing. The positions of pages are read then */
    int32_t first_block, turn_blocks;
    float reach;                /* largest magnitude in it; 0 of none */
} kvq_move;

/* The part of a forward pass that is one session's; several go through the graph together as a chain, the rows of each
 * behind those of the one before. A row comes out as it does in a pass of its own. */
typedef struct kvq_pass {
    int32_t layers, heads, kv_heads, head_dim; /* the same in all of a chain, kernel too */
    int32_t tokens;  /* new ones, not in the pages */
    int32_t pages;   /* rows of page */
    int32_t kernel;  /* index of an instruction set, see kvq_kernel_name; -1: the best this machine has */
    int32_t threads; /* how many will share the work, for planning */
    const kvq_page *page;
    float *keys, *values; /* [layers, kv_heads, tokens, head_dim]: the new ones are copied here; may be null */
    float *row_squares;   /* [tokens, heads]: sums of squares of the last layer's rows, or null */
    const kvq_move *stepwise; /* null, or how each token but the last goes on its way before the next one attends: every
                               * row then sees just what a pass of its own would see. Its rows are those of `page`, its
                               * keys and values those above; pages are written behind their count */
    const struct kvq_pass *next; /* the session whose rows come behind these, or null; at most KVQ_MOST_SESSIONS in all */
    const int32_t *windows; /* [layers], or null: of how many tokens, itself included, a token of a layer sees the last
                             * ones; 0: all */
    int32_t position;       /* of the first new token in the text; read where there are windows or turns */
    const kvq_turns *turns; /* of the keys in pages, or null */
} kvq_pass;
#define KVQ_MOST_SESSIONS 4096

/* The new tokens of one layer, of a chain those of all its sessions. Strides are in floats, from one token to the next. */
typedef struct {
    const float *query; /* [tokens, heads, head_dim] */
    const float *key;   /* [tokens, kv_heads, head_dim] */
    const float *value; /* [tokens, kv_heads, head_dim] */
    float *out;         /* [tokens, heads, head_dim], contiguous */
    ptrdiff_t query_stride, key_stride, value_stride;
    float *row_squares; /* [tokens, heads]; null: in the last layer to each pass's own, if it has any */
} kvq_rows;

/* A matrix of quantized weights [n, k]. The weight at k of row n is the scale of its block of k times its code less 128, or,
 * with fewer bits, less the block's zero point; and the block's offset more, where there are offsets.
 *
 * As MatMulNBits of onnxruntime has it (com.microsoft, version 1): codes uint8 [n, blocks, block * bits / 8], of 4 bits the
 * first one low in its byte; scales [n, blocks]; zeros [n, (blocks + 1) / 2], 4 bits each, the first one low, or null: 8.
 * 5 and 6 bits lie there as 8 do, in the lowest ones of a byte each: codes [n, blocks, block] and zeros [n, blocks], never null.
 * offsets [n, blocks], or null: none; only with 4 bits and without zeros. What a row's values sum up to in a block is multiplied
 * with its offset as it is, not rounded to bytes. Scales and offsets are floats, or, where there are offsets, and with 5 and 6
 * bits, halves on request.
 *
 * Packed, which kvq_pack makes of it for a kernel: panels of KVQ_PANEL rows, of the last one those that are too many with
 * scales of 0. A word holds four neighbours of a row, so that a register holds those of neighbouring rows:
 *   codes [panels, blocks, block / 4, KVQ_PANEL] words of four bytes, the weights plus the kernel's weight_offset; of 4 bits
 *         [panels, blocks, block / 8, KVQ_PANEL] words whose bytes have codes of a block's first half low, of its second
 *         half high; of 5 and 6 bits those of the lowest four, and behind a block's the higher ones: with h of them
 *         [block * h / 32, KVQ_PANEL] words, the first h bits of their bytes those of the first word's low codes, then
 *         its high ones', then the second word's
 *   scales [panels, blocks, KVQ_PANEL]
 *   zeros [panels, blocks, KVQ_PANEL] bytes, or null: 8, of 4 bits
 *   offsets [panels, blocks, KVQ_PANEL], or null */
typedef struct {
    uint8_t *codes;
    void *scales;
    uint8_t *zeros;
    void *offsets;
    int32_t n, k, blocks; /* blocks: k in whole blocks; codes of the last one that are too many have no meaning */
    int32_t bits, block;  /* 4, 5, 6 or 8; KVQ_LEAST_BLOCK to KVQ_MOST_BLOCK, a power of two */
    int32_t halves;       /* 1: scales and offsets are halves; 0: floats */
} kvq_matrix;
#define KVQ_PANEL 16
#define KVQ_LEAST_BLOCK 32
#define KVQ_MOST_BLOCK 256

/* What a chain does next with the rows that it has: times a matrix; added to the residual stream and normed, times gains; silu
 * of the first half of the columns times the second; or attention of a layer, over the stores of the thread's passes. Of norm
 * and silu every block of so many columns times the Hadamard matrix, if block is not 0. */
enum { KVQ_STEP_PRODUCT, KVQ_STEP_ADD_NORM, KVQ_STEP_SWIGLU, KVQ_STEP_ATTENTION };
typedef struct {
    const kvq_matrix *matrix; /* of a product, packed for the chain's kernel */
    int32_t kind, block;
    float epsilon;
    int32_t layer, rotate;    /* of attention: attributes of the operator */
    int32_t inputs;           /* that it takes besides the rows, as the operator does: 3 or 6 */
} kvq_step;

/* Steps that follow one another, of one layer or of all. */
typedef struct {
    const kvq_step *step; /* the first is a product, at least one adds to the residual stream, a product follows attention */
    int32_t steps, kernel;
    int32_t threads;      /* that share the work */
    int32_t unused;
} kvq_chain;

/* Calls work(data, i) for 0 <= i < count, from whichever threads it likes, and returns when all are done. */
typedef void (*kvq_parallel)(void *context, void (*work)(void *data, size_t i), size_t count, void *data);

/* Attend from the new tokens over the pages and over themselves, causally.
 * parallel may be null: everything then runs in the calling thread.
 * Returns 0 or an error; all rows of the page table are looked at first. */
KVQ_EXPORT int32_t kvq_attend(const kvq_pass *pass, int32_t layer, const kvq_rows *rows, kvq_parallel parallel,
                              void *context);

/* Encode vectors x [vectors, head_dim] into words [vectors, ...] and scales [vectors] (not written where the precision
 * has none), byte for byte as runtime/precision/codecs does. Returns 0 or an error: REFUSED_VALUE where that refuses.
 * feedback: matrices of halves [vectors / each, head_dim, head_dim], one for `each` vectors after another, or null: entry (i, j), j > i,
 * is how much of channel i's error is taken from channel j before that is rounded. */
KVQ_EXPORT int32_t kvq_encode(int32_t kernel, int32_t precision, const float *x, size_t vectors, int32_t head_dim,
                              const uint16_t *feedback, size_t each, uint32_t *words, uint16_t *scales);

/* Returns 0 or an error. The values have to be storable, see kvq_movable. */
KVQ_EXPORT int32_t kvq_move_tokens(const kvq_move *move);

/* Whether all keys and values of a move are within the range of half precision, as every codec needs them, on whatever way
 * through the window: 1 or 0, or an error. Of a move it reads no more than those. */
KVQ_EXPORT int32_t kvq_movable(const kvq_move *move);

/* Whether all of x [count] are from -limit to limit, as no NaN is, by kernel (-1: the best): 1 or 0, or an error. */
KVQ_EXPORT int32_t kvq_within(int32_t kernel, const float *x, size_t count, float limit);

/* Whether vectors of that precision, in codes of so many bits and with a scale or without, are what this library reads
 * and writes: 1 or 0. */
KVQ_EXPORT int32_t kvq_knows(int32_t precision, int32_t bits, int32_t scale);

/* 32-bit words of a vector's codes; or an error. */
KVQ_EXPORT int32_t kvq_words(int32_t precision, int32_t head_dim);

/* Fill the arrays of `to`, which has the numbers of `from`, for a kernel (-1: the best). Returns 0 or an error. */
KVQ_EXPORT int32_t kvq_pack(int32_t kernel, const kvq_matrix *from, const kvq_matrix *to);

KVQ_EXPORT int32_t kvq_abi(void);
KVQ_EXPORT int32_t kvq_kernels(void);                 /* how many were compiled in, the best one last */
KVQ_EXPORT const char *kvq_kernel_name(int32_t i);
KVQ_EXPORT int32_t kvq_kernel_available(int32_t i);   /* 1 where this machine can run it */
KVQ_EXPORT int32_t kvq_kernel_products(int32_t i);    /* 1 where its products are to be used, not onnxruntime's */
KVQ_EXPORT const char *kvq_error_text(int32_t error); /* cause and remedy in one line; empty for a number that is none */

/* The pass that the Attention operator works on, when it runs in this thread; null takes it away.
 * Returns 0 or an error: of the pass, which is not set then; with null, of the operator that failed since. */
KVQ_EXPORT int32_t kvq_set_pass(const kvq_pass *pass);

/* The move that the Move operator carries out, when it runs in this thread; null takes it away. Returns as kvq_set_pass. */
KVQ_EXPORT int32_t kvq_set_move(const kvq_move *move);

#endif
