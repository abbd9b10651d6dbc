/* A token's way through the recent window, see kvq_move. */
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

static slot_codes slot_at(const kvq_page *page, int of_keys, size_t vector_row, int slot, int head_dim) {
    const int words = words_per_vector(of_keys ? page->key_bits : page->value_bits, head_dim);
    const uint32_t *codes = of_keys ? page->keys : page->values;
    const uint16_t *scales = of_keys ? page->key_scales : page->value_scales;
    const size_t row = vector_row * page->capacity;
    const size_t first = of_keys ? (row + slot / TILE * TILE) * words + slot % TILE : (row + slot) * words;
    return (slot_codes){(uint32_t *)codes + first, (uint16_t *)scales + row + slot, of_keys ? TILE : 1, words};
}

static void put(slot_codes to, const uint32_t *words, uint16_t scale, int bits) {
    for (int j = 0; j < to.words; j++) to.first[j * to.step] = words[j];
    if (bits != 16) *to.scale = scale;
}

static void read_window(slot_codes from, float *x) {
    const float scale = half_scalar(*from.scale);
    for (int j = 0; j < from.words; j++) {
        const uint32_t word = from.first[j * from.step];
        x[j] = (float)(int16_t)word * scale;
        x[from.words + j] = (float)(int16_t)(word >> 16) * scale;
    }
}

/* A key's words lie a cache line apart and were last used a whole forward pass ago. */
static void expect(slot_codes at) {
    for (int j = 0; j < at.words; j += at.step == 1 ? TILE : 1) __builtin_prefetch(at.first + j * at.step, 1, 3);
}

static int move_token(const kvq_move *move) {
    const int d = move->head_dim;
    const size_t vectors = (size_t)move->layers * move->kv_heads;
    float x[1024];
    uint32_t words[512];
    uint16_t scale = 0;
    /* First see that nothing will be refused: what has moved cannot be brought back. */
    for (size_t i = 0; i < 2 * vectors; i++) {
        const float *new = i < vectors ? move->keys + i * d : move->values + (i - vectors) * d;
        for (int c = 0; c < d; c++)
            if (!(fabsf(new[c]) <= 65504.0f)) return -1;
    }
    for (int of_keys = 0; of_keys < 2; of_keys++)
        for (size_t i = 0; i < vectors; i++) {
            const slot_codes held = slot_at(move->window, of_keys, i, move->window_slot, d);
            if (i + 1 < vectors) {
                expect(slot_at(move->window, of_keys, i + 1, move->window_slot, d));
                if (move->page) expect(slot_at(move->page, of_keys, i + 1, move->page_slot, d));
            }
            if (move->page) {
                const int bits = of_keys ? move->page->key_bits : move->page->value_bits;
                read_window(held, x);
                encode_vectors(bits, x, 1, d, words, &scale);
                put(slot_at(move->page, of_keys, i, move->page_slot, d), words, scale, bits);
            }
            encode_vectors(WINDOW_BITS, (of_keys ? move->keys : move->values) + i * d, 1, d, words, &scale);
            put(held, words, scale, WINDOW_BITS);
        }
    return 0;
}

#endif
