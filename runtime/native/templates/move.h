/* Tokens on their way through the recent window, see kvq_move. */
#ifndef KVQ_MOVE_H
#define KVQ_MOVE_H

#include "fed_lanes.h"

/* The codes of one token in a row of a page: words `step` apart from `first` on, and their scale. The arrays are the
 * store's own, which is the one that asks for the change. */
typedef struct {
    uint32_t *first;
    uint16_t *scale;
    ptrdiff_t step;
    int words;
} slot_codes;

INLINE slot_codes slot_at(const kvq_page *page, int of_keys, size_t vector_row, int slot, int head_dim) {
    const int words = words_per_vector(of_keys ? page->key_precision : page->value_precision, head_dim);
    const uint32_t *codes = of_keys ? page->keys : page->values;
    const uint16_t *scales = of_keys ? page->key_scales : page->value_scales;
    const size_t row = vector_row * page->capacity;
    const size_t first = of_keys ? (row + slot / TILE * TILE) * words + slot % TILE : (row + slot) * words;
    return (slot_codes){(uint32_t *)codes + first, (uint16_t *)scales + row + slot, of_keys ? TILE : 1, words};
}

static void put(slot_codes to, const uint32_t *words, uint16_t scale, int precision) {
    for (int j = 0; j < to.words; j++) to.first[j * to.step] = words[j];
    if (has_scale(precision)) *to.scale = scale;
}

/* A vector of the window, [words * codes of a word]: at 8 bits as any page of int8, or at 16. */
static void read_window(slot_codes from, int precision, float *x) {
    const float scale = half_scalar(*from.scale);
    const int n = from.words;
    uint32_t words[MOST_WORDS];
    for (int j = 0; j < n; j++) words[j] = from.first[j * from.step];
    if (precision == KVQ_INT8) {
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < n; j++) x[i * n + j] = (float)(int8_t)(words[j] >> 8 * i) * scale;
        return;
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < n; j++) x[i * n + j] = (float)(int16_t)(words[j] >> 16 * i) * scale;
}

/* What a vector becomes that is refused, as the store will do it when the pass is over: in a pass nobody has looked yet whether
 * values are storable, as kvq_movable has it. */
INLINE void zeros_if_refused(const one_vector *v, int head_dim) {
    if (!v->status) return;
    memset(v->words, 0, sizeof *v->words * words_per_vector(v->precision, head_dim));
    *v->scale = 0;
}

/* Those whom the tokens [first, first + count), at most LANES, drive out of the window go to their pages, all before one of the
 * tokens takes its slot: keys or values of one layer and KV head, number `row` of all vectors. of_keys is a constant wherever
 * this is inlined. */
INLINE void leave_window(const kvq_move *move, int of_keys, size_t row, int first, int count) {
    const int d = move->head_dim, padded = (d + 15) / 16 * 16;
    float x[LANES][MOST_CHANNELS];
    uint32_t words[LANES][MOST_WORDS];
    uint16_t scale[LANES];
    one_vector leaving[LANES];
    slot_codes place[LANES];
    int n = 0;
    for (int t = first; t < first + count; t++) {
        const kvq_move_step *step = move->step + t;
        if (step->page < 0) continue;
        const kvq_page *page = move->page + step->page;
        const int precision = of_keys ? page->key_precision : page->value_precision;
        read_window(slot_at(move->window, of_keys, row, step->window_slot, d), move->window->key_precision, x[n]);
        memset(x[n] + d, 0, sizeof(float) * (padded - d));
        if (of_keys && move->turned && kvq_turned(precision)) {
            const int block = page->positions[step->page_slot] / KVQ_TURN_BLOCK - move->first_block;
            const float *turned = move->turned + (row * move->turn_blocks + block) * d;
            __asm__ volatile("" : : "r"(x[n]) : "memory"); /* the product is rounded by itself, as in numpy */
            for (int c = 0; c < d; c++) x[n][c] -= turned[c];
        }
        scale[n] = 0;
        place[n] = slot_at(page, of_keys, row, step->page_slot, d);
        leaving[n] = (one_vector){precision, x[n], words[n], scale + n, 0};
        n++;
    }
    encode_together(leaving, n, of_keys && move->feedback ? move->feedback + row * d * d : NULL, d);
    for (int i = 0; i < n; i++) {
        zeros_if_refused(leaving + i, d);
        put(place[i], words[i], scale[i], leaving[i].precision);
    }
}

/* Token t takes its slot. */
INLINE void enter_window(const kvq_move *move, int of_keys, size_t row, int t) {
    const int d = move->head_dim, padded = (d + 15) / 16 * 16, kept_at = move->window->key_precision; /* its values too */
    float x[MOST_CHANNELS];
    uint32_t words[MOST_WORDS];
    uint16_t scale = 0;
    memcpy(x, (of_keys ? move->keys : move->values) + (row * move->tokens + t) * d, sizeof(float) * d);
    memset(x + d, 0, sizeof(float) * (padded - d));
    one_vector v = {kept_at, x, words, &scale, 0};
    v.status = encode_any(kept_at, x, NULL, d, words, &scale);
    zeros_if_refused(&v, d);
    put(slot_at(move->window, of_keys, row, move->step[t].window_slot, d), words, scale, kept_at);
}

/* The same of any number of tokens whose slots differ. */
static void leave_rows(const kvq_move *move, int of_keys, size_t row, int first, int count) {
    for (int t = first, end = first + count; t < end; t += LANES) {
        const int some = end - t < LANES ? end - t : LANES;
        if (of_keys) leave_window(move, 1, row, t, some);
        else leave_window(move, 0, row, t, some);
    }
}
static void enter_row(const kvq_move *move, int of_keys, size_t row, int t) { enter_window(move, of_keys, row, t); }

/* Tokens in their order, as many at a time as the window has slots. */
static void move_row(const kvq_move *move, int of_keys, size_t row) {
    const int most = move->window->period;
    for (int t = 0; t < move->tokens; t += most) {
        const int some = move->tokens - t < most ? move->tokens - t : most;
        leave_rows(move, of_keys, row, t, some);
        for (int i = t; i < t + some; i++) enter_row(move, of_keys, row, i);
    }
}

/* A key's words lie a cache line apart and were last used a whole forward pass ago. */
static void expect(slot_codes at) {
    for (int j = 0; j < at.words; j += at.step == 1 ? TILE : 1) __builtin_prefetch(at.first + j * at.step, 1, 3);
}

/* A matrix of feedback was last used just as long ago. */
static void expect_feedback(const kvq_move *move, size_t row) {
    const size_t each = (size_t)move->head_dim * move->head_dim;
    const char *at = (const char *)(move->feedback + row * each);
    for (size_t i = 0; i < each * sizeof *move->feedback; i += 64) __builtin_prefetch(at + i, 0, 3);
}

static void move_tokens(const kvq_move *move) {
    const size_t vectors = (size_t)move->layers * move->kv_heads;
    const int d = move->head_dim;
    const kvq_move_step *first = move->step;
    for (int of_keys = 0; of_keys < 2; of_keys++)
        for (size_t i = 0; i < vectors; i++) {
            if (i + 1 < vectors) {
                expect(slot_at(move->window, of_keys, i + 1, first->window_slot, d));
                if (first->page >= 0) expect(slot_at(move->page + first->page, of_keys, i + 1, first->page_slot, d));
                if (of_keys && move->feedback && first->page >= 0) expect_feedback(move, i + 1);
            }
            move_row(move, of_keys, i);
        }
}

static int within(const float *x, size_t count, float limit) {
    size_t i = 0;
    vu wrong = {0};
    for (; i + LANES <= count; i += LANES) wrong |= ~(vu)((vf)((vu)load_f(x + i) & 0x7fffffff) <= limit);
    uint32_t lanes[LANES], any = 0;
    memcpy(lanes, &wrong, sizeof lanes);
    for (int lane = 0; lane < LANES; lane++) any |= lanes[lane];
    for (; i < count; i++) any |= !(fabsf(x[i]) <= limit);
    return !any;
}

#endif
