/* What the exported functions refuse: every size and id that does not fit, one at a time, with the error that names it.
 * Whatever a refused call was given points to as little memory as possible, for the address sanitizer to watch. */
#ifndef KVQ_CHECK_REFUSALS_H
#define KVQ_CHECK_REFUSALS_H

#include <limits.h>

#include "check_attention.h"

/* A number that is put where it does not belong, and the error that has to follow. */
typedef struct {
    const char *what;
    size_t offset; /* of an int32_t in a structure */
    int32_t value;
    int error;
} misfit;

static void expect_error(const char *what, int32_t value, int found, int expected) {
    if (found != expected)
        fail("%s of %d: error %d (%s), expected %d", what, value, found, kvq_error_text(found), expected);
}

static int32_t *field(void *structure, size_t offset) { return (int32_t *)((char *)structure + offset); }

/* Ids that are none. */
static const int32_t UNKNOWN[] = {INT_MIN, -1, 0, 1, 6, 7, 9, 14, 17, 31, 32, 64, 255, 1 << 16, INT_MAX};

static void check_knowledge(void) {
    int known = 0;
    for (int id = -300; id <= 300; id++)
        for (int bits = -1; bits <= 33; bits++)
            for (int scale = 0; scale < 2; scale++) known += kvq_knows(id, bits, scale);
    if (known != WIDTH_COUNT) fail("%d precisions are known, of %d", known, WIDTH_COUNT);
    for (int i = 0; i < WIDTH_COUNT; i++)
        if (kvq_knows(WIDTHS[i], code_bits(WIDTHS[i]), WIDTHS[i] != 16) != 1) fail("precision %d is unknown", WIDTHS[i]);
    for (int i = 0; i < LENGTH(UNKNOWN); i++) {
        if (kvq_words(UNKNOWN[i], 64) != KVQ_UNKNOWN_PRECISION) fail("precision %d has words", UNKNOWN[i]);
        if (kvq_knows(UNKNOWN[i], 0, 0) || kvq_knows(UNKNOWN[i], 2, 1)) fail("precision %d is known", UNKNOWN[i]);
    }
    for (int error = -20; error <= 20; error++)
        if (!*kvq_error_text(error) != (error < KVQ_REFUSED_VALUE || error >= 0)) fail("text of error %d", error);
}

#define PASS(name, number, error) {"pass." #name, offsetof(kvq_pass, name), number, KVQ_##error}
static const misfit PASSES[] = {
    PASS(layers, 0, MISFIT_SHAPE), PASS(layers, -1, MISFIT_SHAPE), PASS(layers, INT_MAX, MISFIT_SHAPE),
    PASS(heads, 0, MISFIT_SHAPE), PASS(heads, 5, MISFIT_SHAPE), PASS(heads, -4, MISFIT_SHAPE),
    PASS(heads, 1 << 30, MISFIT_SHAPE), PASS(kv_heads, 0, MISFIT_SHAPE), PASS(kv_heads, 3, MISFIT_SHAPE),
    PASS(kv_heads, 8, MISFIT_SHAPE), PASS(kv_heads, -2, MISFIT_SHAPE), PASS(head_dim, 0, MISFIT_SHAPE),
    PASS(head_dim, -8, MISFIT_SHAPE), PASS(head_dim, MOST_CHANNELS + 1, MISFIT_SHAPE),
    PASS(head_dim, INT_MAX, MISFIT_SHAPE), PASS(tokens, -1, MISFIT_SHAPE), PASS(tokens, INT_MIN, MISFIT_SHAPE),
    PASS(pages, -1, MISFIT_PAGE), PASS(kernel, 1000, NO_KERNEL),
};
#define PAGE(name, number, error) {"page." #name, offsetof(kvq_page, name), number, KVQ_##error}
static const misfit PAGES_OF_32[] = {
    PAGE(capacity, 0, MISFIT_PAGE), PAGE(capacity, -16, MISFIT_PAGE), PAGE(capacity, 31, MISFIT_PAGE),
    PAGE(capacity, 16, MISFIT_PAGE), PAGE(begin, -16, MISFIT_PAGE), PAGE(begin, 8, MISFIT_PAGE),
    PAGE(begin, 48, MISFIT_PAGE), PAGE(begin, INT_MIN, MISFIT_PAGE), PAGE(end, 31, MISFIT_PAGE),
    PAGE(end, 48, MISFIT_PAGE), PAGE(end, -16, MISFIT_PAGE), PAGE(end, INT_MAX, MISFIT_PAGE),
    PAGE(first, -1, MISFIT_PAGE), PAGE(first, 32, MISFIT_PAGE), PAGE(count, -1, MISFIT_PAGE),
    PAGE(count, 33, MISFIT_PAGE), PAGE(count, INT_MAX, MISFIT_PAGE), PAGE(period, 0, MISFIT_PAGE),
    PAGE(period, -1, MISFIT_PAGE), PAGE(period, 33, MISFIT_PAGE), PAGE(period, 19, MISFIT_PAGE),
};

/* Whatever is wrong with a row, every function that reads the table says so. */
static void expect_of_pages(const kvq_pass *pass, const kvq_rows *rows, const kvq_move *move, const char *what,
                            int32_t value, int error) {
    expect_error(what, value, kvq_attend(pass, 0, rows, NULL, NULL), error);
    expect_error(what, value, kvq_set_pass(pass), error);
    expect_error(what, value, kvq_set_pass(NULL), error);
    if (move) expect_error(what, value, kvq_move_tokens(move), error);
}

/* A store of one page and a window, and one new token of 2 KV heads for it. */
typedef struct {
    store s;
    kvq_pass pass;
    kvq_rows rows;
    kvq_move move;
    kvq_move_step step[2];
    float x[2 * 4 * 8], keys[2 * 2 * 8], values[2 * 2 * 8], out[2 * 4 * 8];
} fitting;

static void make_fitting(fitting *f, int tokens) {
    *f = (fitting){.s = {.layers = 1, .kv_heads = 2, .head_dim = 8}};
    add_page(&f->s, 8, 4, 32, 20);
    add_ring(&f->s, 5, 5, 0);
    f->rows = (kvq_rows){f->x, f->x, f->x, f->out, 32, 16, 16, NULL};
    f->step[0] = (kvq_move_step){0, 0, 20}, f->step[1] = (kvq_move_step){1, 0, 21};
    f->move = (kvq_move){1, 2, 8, 0, tokens, 1, f->keys, f->values, NULL, f->s.page + 1, f->s.page, f->step,
                         NULL, 0, 0, 0};
    f->pass = (kvq_pass){.layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 8, .tokens = tokens, .pages = 2,
                         .threads = 1, .page = f->s.page, .keys = f->keys, .values = f->values};
}

/* Layers with arrays of their own: these are looked at instead of the page's. */
static void check_refused_layers(fitting *f) {
    const kvq_page right = f->s.page[0], *page = &right;
    const kvq_layer_arrays fits = {page->keys, page->key_scales, page->values, page->value_scales,
                                   page->key_precision, page->value_precision};
    kvq_layer_arrays layer = fits;
    f->s.page[0] = (kvq_page){.capacity = right.capacity, .end = right.end, .count = right.count,
                              .period = right.period, .layers = &layer};
    expect_of_pages(&f->pass, &f->rows, &f->move, "layers of their own", 0, 0);
    for (int i = 0; i < 4; i++) {
        *(const void **)((char *)&layer + i * sizeof(void *)) = NULL;
        expect_of_pages(&f->pass, &f->rows, &f->move, "address of a layer", i, KVQ_NO_DATA);
        layer = fits;
    }
    for (int i = 0; i < LENGTH(UNKNOWN) * 2; i++) {
        *(i % 2 ? &layer.key_precision : &layer.value_precision) = UNKNOWN[i / 2];
        expect_of_pages(&f->pass, &f->rows, &f->move, "precision of a layer", UNKNOWN[i / 2], KVQ_UNKNOWN_PRECISION);
        layer = fits;
    }
    f->s.page[0].narrow = 1; /* of a pass without windows, and as a place for a token */
    expect_of_pages(&f->pass, &f->rows, NULL, "narrow", 1, KVQ_MISFIT_PAGE);
    expect_error("narrow", 1, kvq_move_tokens(&f->move), KVQ_MISFIT_MOVE);
    f->s.page[0].narrow = 0;
    f->s.page[1].layers = &layer; /* a window has one precision */
    expect_error("layers of a window", 1, kvq_move_tokens(&f->move), KVQ_MISFIT_MOVE);
    f->s.page[1].layers = NULL;
    f->s.page[0] = right;
}

static void check_refused_passes(void) {
    fitting f;
    make_fitting(&f, 1);
    expect_of_pages(&f.pass, &f.rows, &f.move, "nothing wrong", 0, 0);
    for (int i = 0; i < LENGTH(PASSES); i++) {
        kvq_pass pass = f.pass;
        *field(&pass, PASSES[i].offset) = PASSES[i].value;
        expect_of_pages(&pass, &f.rows, NULL, PASSES[i].what, PASSES[i].value, PASSES[i].error);
    }
    for (int i = 0; i < LENGTH(PAGES_OF_32); i++) {
        const kvq_page right = f.s.page[0];
        *field(f.s.page, PAGES_OF_32[i].offset) = PAGES_OF_32[i].value;
        expect_of_pages(&f.pass, &f.rows, &f.move, PAGES_OF_32[i].what, PAGES_OF_32[i].value, PAGES_OF_32[i].error);
        f.s.page[0] = right;
    }
    for (int i = 0; i < LENGTH(UNKNOWN) * 2; i++) {
        const kvq_page right = f.s.page[0];
        *(i % 2 ? &f.s.page[0].key_precision : &f.s.page[0].value_precision) = UNKNOWN[i / 2];
        expect_of_pages(&f.pass, &f.rows, &f.move, "precision", UNKNOWN[i / 2], KVQ_UNKNOWN_PRECISION);
        f.s.page[0] = right;
    }
    for (int i = 0; i < 4; i++) {
        const kvq_page right = f.s.page[0];
        *(const void **)((char *)f.s.page + i * sizeof(void *)) = NULL;
        expect_of_pages(&f.pass, &f.rows, &f.move, "address", i, KVQ_NO_DATA);
        f.s.page[0] = right;
    }
    check_refused_layers(&f);
    f.s.page[0].capacity = f.s.page[0].end = f.s.page[0].period = CHUNK_SLOTS + TILE; /* longer than a row may be */
    expect_of_pages(&f.pass, &f.rows, &f.move, "slots", CHUNK_SLOTS + TILE, KVQ_MISFIT_PAGE);
    f.pass.page = NULL;
    expect_of_pages(&f.pass, &f.rows, NULL, "no page table", 0, KVQ_NO_DATA);
    f.pass.pages = 0; /* then there need not be one */
    expect_of_pages(&f.pass, &f.rows, NULL, "no pages", 0, 0);
    for (int i = 0; i < 4; i++) {
        kvq_rows rows = f.rows;
        *(const void **)((char *)&rows + i * sizeof(void *)) = NULL;
        expect_error("rows", i, kvq_attend(&f.pass, 0, &rows, NULL, NULL), KVQ_NO_DATA);
    }
    expect_error("no rows", 0, kvq_attend(&f.pass, 0, NULL, NULL, NULL), KVQ_NO_DATA);
    expect_error("no pass", 0, kvq_attend(NULL, 0, &f.rows, NULL, NULL), KVQ_NO_DATA);
    expect_error("layer", 1, kvq_attend(&f.pass, 1, &f.rows, NULL, NULL), KVQ_MISFIT_SHAPE);
    expect_error("layer", -1, kvq_attend(&f.pass, -1, &f.rows, NULL, NULL), KVQ_MISFIT_SHAPE);
    f.pass.tokens = 0;
    expect_error("no tokens", 0, kvq_attend(&f.pass, 0, &f.rows, NULL, NULL), 0);
    release(&f.s);
}

#define MOVE(name, number, error) {"move." #name, offsetof(kvq_move, name), number, KVQ_##error}
static const misfit MOVES[] = {
    MOVE(layers, 0, MISFIT_SHAPE), MOVE(kv_heads, -1, MISFIT_SHAPE), MOVE(head_dim, MOST_CHANNELS + 1, MISFIT_SHAPE),
    MOVE(head_dim, 0, MISFIT_SHAPE), MOVE(tokens, -1, MISFIT_SHAPE), MOVE(kernel, 1000, NO_KERNEL),
};
#define STEP(name, number) {"step." #name, offsetof(kvq_move_step, name), number, KVQ_MISFIT_MOVE}
static const misfit STEPS[] = {
    STEP(window_slot, -1), STEP(window_slot, 5), STEP(window_slot, INT_MAX), STEP(page, 1), STEP(page, -2),
    STEP(page, INT_MAX), STEP(page_slot, -1), STEP(page_slot, 32), STEP(page_slot, INT_MIN),
};

static void check_refused_moves(void) {
    fitting f;
    make_fitting(&f, 2);
    f.pass.stepwise = &f.move;
    expect_of_pages(&f.pass, &f.rows, &f.move, "nothing wrong stepwise", 0, 0);
    for (int i = 0; i < LENGTH(MOVES); i++) {
        kvq_move move = f.move;
        *field(&move, MOVES[i].offset) = MOVES[i].value;
        expect_error(MOVES[i].what, MOVES[i].value, kvq_move_tokens(&move), MOVES[i].error);
        expect_error(MOVES[i].what, MOVES[i].value, kvq_movable(&move), MOVES[i].error);
        f.pass.stepwise = &move;
        expect_of_pages(&f.pass, &f.rows, NULL, MOVES[i].what, MOVES[i].value, MOVES[i].error);
        f.pass.stepwise = &f.move;
    }
    for (int i = 0; i < LENGTH(STEPS); i++) {
        const kvq_move_step right = f.step[0];
        *field(f.step, STEPS[i].offset) = STEPS[i].value;
        expect_of_pages(&f.pass, &f.rows, &f.move, STEPS[i].what, STEPS[i].value, STEPS[i].error);
        f.step[0] = right;
    }
    f.s.page[1].begin = TILE; /* the window's row is another one, or not the window's */
    expect_of_pages(&f.pass, &f.rows, &f.move, "begin of the window", TILE, KVQ_MISFIT_MOVE);
    f.s.page[1].begin = 0, f.s.page[1].value_precision = KVQ_HALF;
    expect_of_pages(&f.pass, &f.rows, &f.move, "precision of the window", KVQ_HALF, KVQ_MISFIT_MOVE);
    f.s.page[1].value_precision = UNKNOWN[0];
    expect_of_pages(&f.pass, &f.rows, &f.move, "precision of the window", UNKNOWN[0], KVQ_UNKNOWN_PRECISION);
    f.s.page[1].value_precision = KVQ_WINDOW;
    static const size_t needed[] = {offsetof(kvq_move, keys), offsetof(kvq_move, values), offsetof(kvq_move, window),
                                    offsetof(kvq_move, page), offsetof(kvq_move, step)};
    for (int i = 0; i < 5; i++) {
        kvq_move move = f.move;
        *(const void **)((char *)&move + needed[i]) = NULL;
        expect_error("address of a move", i, kvq_move_tokens(&move), KVQ_NO_DATA);
        if (i < 2) expect_error("address of a move", i, kvq_movable(&move), KVQ_NO_DATA);
        f.pass.stepwise = &move;
        const int foreign = i < 2 || i == 3; /* not the pass's own */
        expect_of_pages(&f.pass, &f.rows, NULL, "address of a move", i, foreign ? KVQ_MISFIT_MOVE : KVQ_NO_DATA);
    }
    kvq_move move = f.move;
    move.pages = 3;
    f.pass.stepwise = &move;
    expect_of_pages(&f.pass, &f.rows, NULL, "pages of a move", 3, KVQ_MISFIT_MOVE);
    move.pages = 1, move.kv_heads = 1;
    expect_of_pages(&f.pass, &f.rows, NULL, "kv_heads of a move", 1, KVQ_MISFIT_SHAPE);
    expect_error("no move", 0, kvq_move_tokens(NULL), KVQ_NO_DATA);
    expect_error("no move", 0, kvq_movable(NULL), KVQ_NO_DATA);
    release(&f.s);
}

static void check_refused_encoding(void) {
    const float x[1] = {1};
    uint32_t words[1] = {7};
    uint16_t scale = 7;
    for (int i = 0; i < LENGTH(UNKNOWN); i++)
        expect_error("encode", UNKNOWN[i], kvq_encode(0, UNKNOWN[i], x, 1, 1, NULL, 1, words, &scale), KVQ_UNKNOWN_PRECISION);
    static const int32_t dims[] = {INT_MIN, -1, 0, MOST_CHANNELS + 1, INT_MAX};
    for (int i = 0; i < LENGTH(dims); i++)
        expect_error("head_dim", dims[i], kvq_encode(0, KVQ_INT8, x, 1, dims[i], NULL, 1, words, &scale), KVQ_MISFIT_SHAPE);
    expect_error("x", 0, kvq_encode(0, KVQ_INT8, NULL, 1, 1, NULL, 1, words, &scale), KVQ_NO_DATA);
    expect_error("words", 0, kvq_encode(0, KVQ_INT8, x, 1, 1, NULL, 1, NULL, &scale), KVQ_NO_DATA);
    expect_error("scales", 0, kvq_encode(0, KVQ_INT8, x, 1, 1, NULL, 1, words, NULL), KVQ_NO_DATA);
    expect_error("feedback of no vectors each", 0, kvq_encode(0, KVQ_INT8, x, 1, 1, &scale, 0, words, &scale), KVQ_MISFIT_SHAPE);
    if (words[0] != 7 || scale != 7) fail("a refused call has written");
    expect_error("no scales at 16 bits", 0, kvq_encode(0, KVQ_HALF, x, 1, 1, NULL, 1, words, NULL), 0);
    expect_error("no vectors", 0, kvq_encode(0, KVQ_INT8, NULL, 0, 8, NULL, 1, NULL, NULL), 0);
    expect_error("within", 0, kvq_within(0, NULL, 1, 1), KVQ_NO_DATA);
    expect_error("within", 0, kvq_within(0, NULL, 0, 1), 1);
}

#endif
