/* Tokens on their way through the recent window, see kvq_move. */
#ifndef KVQ_MOVE_H
#define KVQ_MOVE_H

#include "encode.h"

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

/* One vector, whose values are storable as kvq_movable has it. In a pass nobody has looked yet: there a value that is
 * refused, as the store will do it when the pass is over, leaves zeros. */
INLINE void encode_storable(int precision, const float *x, int head_dim, const uint16_t *feedback, uint32_t *words,
                            uint16_t *scale) {
    if (!encode_vectors(precision, x, 1, head_dim, feedback, 1, words, scale)) return;
    memset(words, 0, sizeof *words * words_per_vector(precision, head_dim));
    *scale = 0;
}

/* Token t's key or value of one layer and KV head, number `row` of all vectors, takes its slot of the window.
 * of_keys is a constant wherever this is inlined. */
INLINE void move_vector(const kvq_move *move, int of_keys, size_t row, int t) {
    const int d = move->head_dim;
    const float *new = (of_keys ? move->keys : move->values) + (row * move->tokens + t) * d;
    const kvq_move_step *step = move->step + t;
    const slot_codes held = slot_at(move->window, of_keys, row, step->window_slot, d);
    const int kept_at = move->window->key_precision; /* its values too */
    float x[MOST_CHANNELS];
    uint32_t words[MOST_WORDS];
    uint16_t scale = 0;
    if (step->page >= 0) {
        const kvq_page *page = move->page + step->page;
        const int precision = of_keys ? page->key_precision : page->value_precision;
        read_window(held, kept_at, x);
        if (of_keys && move->turned && kvq_turned(precision)) {
            const int block = page->positions[step->page_slot] / KVQ_TURN_BLOCK - move->first_block;
            const float *turned = move->turned + (row * move->turn_blocks + block) * d;
            __asm__ volatile("" : : "r"(x) : "memory"); /* the product is rounded by itself, as in numpy */
            for (int c = 0; c < d; c++) x[c] -= turned[c];
        }
        const uint16_t *feedback = of_keys && move->feedback ? move->feedback + row * d * d : NULL;
        encode_storable(precision, x, d, feedback, words, &scale);
        put(slot_at(page, of_keys, row, step->page_slot, d), words, scale, precision);
    }
    encode_storable(kept_at, new, d, NULL, words, &scale);
    put(held, words, scale, kept_at);
}

static void move_value(const kvq_move *move, size_t row, int t) { move_vector(move, 0, row, t); }
static void move_key(const kvq_move *move, size_t row, int t) { move_vector(move, 1, row, t); }

static void move_row(const kvq_move *move, int of_keys, size_t row, int t) {
    (of_keys ? move_key : move_value)(move, row, t);
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
            for (int t = 0; t < move->tokens; t++) move_row(move, of_keys, i, t);
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
