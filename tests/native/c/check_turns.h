/* Pages whose keys are stored less what turns with their position. */
#ifndef CHECK_TURNS_H
#define CHECK_TURNS_H

#include "check_attention.h"

/* Ascending positions below `most`, which no page has more tokens than, for every page: neighbours, or far apart. Behind them is nothing that may be used. */
static void give_positions(store *s, int most) {
    for (int p = 0; p < s->pages; p++) {
        kvq_page *page = s->page + p;
        if (page->key_precision == KVQ_WINDOW) continue;
        int32_t *positions = exactly(sizeof(int32_t) * page->capacity);
        const int drawn = 1 + below(3) * below(9), fits = most / (page->count + 1), gap = drawn < fits ? drawn : fits;
        const int room = most - gap * page->count;
        for (int i = 0; i < page->capacity; i++) positions[i] = INT32_MAX - i;
        for (int i = 0, at = below(room > 1 ? room : 1); i < page->count; i++, at += 1 + below(gap)) positions[i] = at;
        page->positions = positions;
    }
}

static float *drawn_floats(size_t count) {
    float *x = exactly(sizeof(float) * count);
    for (size_t i = 0; i < count; i++) x[i] = (float)uniform(-1, 1);
    return x;
}

/* Mixed stores some of whose layers turn. */
static void check_turns(int cases) {
    for (int i = 0; i < cases; i++) {
        store s = {.layers = 1 + below(3), .kv_heads = 1 + below(3), .head_dim = PICK(HEAD_DIMS)};
        const int sets = 1 + below(2), rows = 16 * (1 + below(3)), blocks = 64 * (1 + below(3));
        const size_t vectors = (size_t)s.layers * s.kv_heads * rows * s.head_dim;
        float *vector = drawn_floats(vectors), *across = exactly(sizeof(float) * vectors);
        float *waves = drawn_floats((size_t)sets * rows * blocks);
        int32_t *which = exactly(sizeof(int32_t) * s.layers);
        for (int l = 0; l < s.layers; l++) which[l] = l ? below(sets + 1) - 1 : 0;
        for (size_t v = 0; v < vectors; v++) vector[v] *= 0.2f;
        for (size_t h = 0; h < (size_t)s.layers * s.kv_heads; h++)
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < s.head_dim; c++)
                    across[(h * s.head_dim + c) * rows + r] = vector[(h * rows + r) * s.head_dim + c];
        const kvq_turns turns = {vector, across, waves, which, sets, rows, blocks};
        for (int left = 1 + below(6); left; left--) {
            const int capacity = TILE * (1 + below(8));
            add_page(&s, PICK(WIDTHS), PICK(WIDTHS), capacity, below(3) ? capacity : below(capacity + 1));
        }
        give_positions(&s, 16 * blocks - 200);
        if (below(2)) add_ring(&s, 16, 1 + below(16), 0);
        s.turns = &turns;
        const int layer = below(s.layers);
        check_attention(&s, (new_tokens){.what = "turned", .group = PICK(GROUPS), .tokens = i % 2 ? 1 : PICK(NEW),
                                         .threads = 1 + below(4), .way = below(LENGTH(WAYS)), .layer = layer, .squares = 1});
        for (int p = 0; p < s.pages; p++) free((void *)s.page[p].positions);
        release(&s);
        free(vector), free(across), free(waves), free(which);
    }
}

#endif
