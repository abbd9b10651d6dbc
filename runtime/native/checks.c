/* What the exported functions refuse, before anything is read or written: what is behind them takes its arguments as they
 * are. A page's row is looked at once a call, its tokens never. */
#include "drivers.h"

#define MOST_LAYERS (1 << 16) /* and heads: sizes of all that is made for a pass then stay within 64 bits */

const char *kvq_error_text(int32_t error) {
    switch (error) {
#define TEXT(name, number, text) case number: return text;
        KVQ_ERRORS(TEXT)
#undef TEXT
    default: return "";
    }
}

int32_t kvq_knows(int32_t precision, int32_t bits, int32_t scale) {
    return width_number(precision) >= 0 && bits_of(precision) == bits && has_scale(precision) == !!scale;
}

int32_t kvq_words(int32_t precision, int32_t head_dim) {
    if (width_number(precision) < 0) return KVQ_UNKNOWN_PRECISION;
    if (head_dim < 1 || head_dim > MOST_CHANNELS) return KVQ_MISFIT_SHAPE;
    return words_per_vector(precision, head_dim);
}

static int counts(int32_t n) { return n >= 1 && n <= MOST_LAYERS; }
static int whole(int32_t slots) { return slots >= 0 && slots % TILE == 0; }

/* Capacity, begin and end of a row. */
static int in_tiles(const kvq_page *page) {
    if (page->capacity == TILE / 2 || page->capacity == TILE / 4) return !page->begin && page->end == page->capacity;
    return whole(page->capacity) && whole(page->begin) && whole(page->end);
}

static int check_shape(int32_t layers, int32_t kv_heads, int32_t head_dim, int32_t tokens) {
    const int fits = counts(layers) && counts(kv_heads) && head_dim >= 1 && head_dim <= MOST_CHANNELS && tokens >= 0;
    return fits ? 0 : KVQ_MISFIT_SHAPE;
}

/* Whether there are arrays of these precisions. */
static int check_arrays(const kvq_layer_arrays *arrays) {
    const int keys = arrays->key_precision, values = arrays->value_precision;
    if (width_number(keys) < 0 || width_number(values) < 0) return KVQ_UNKNOWN_PRECISION;
    if (!arrays->keys || !arrays->values) return KVQ_NO_DATA;
    return (has_scale(keys) && !arrays->key_scales) || (has_scale(values) && !arrays->value_scales) ? KVQ_NO_DATA : 0;
}

/* Those of a page, or of each of its layers; of a narrow one, see check_windows. */
static int check_all_arrays(const kvq_page *page, int32_t layers) {
    if (!page->layers)
        return check_arrays(&(kvq_layer_arrays){page->keys, page->key_scales, page->values, page->value_scales,
                                                page->key_precision, page->value_precision});
    for (int l = 0, refused; l < layers && !page->narrow; l++)
        if ((refused = check_arrays(page->layers + l))) return refused;
    return 0;
}

/* One row of a page table, of so many layers. */
static int check_page(const kvq_page *page, int32_t layers) {
    if (!in_tiles(page)) return KVQ_MISFIT_PAGE;
    if (page->end < page->begin || page->end > page->capacity || page->end - page->begin > CHUNK_SLOTS)
        return KVQ_MISFIT_PAGE;
    if (page->period < 1 || page->period > page->capacity || page->count < 0 || page->count > page->period ||
        page->first < 0 || page->first >= page->period)
        return KVQ_MISFIT_PAGE;
    return check_all_arrays(page, layers);
}

static int check_pages(const kvq_page *page, int32_t pages, int32_t layers) {
    if (pages < 0) return KVQ_MISFIT_PAGE;
    if (pages && !page) return KVQ_NO_DATA;
    for (int p = 0; p < pages; p++) {
        const int refused = check_page(page + p, layers);
        if (refused) return refused;
    }
    return 0;
}

/* A move's window, and the first `steps` of its steps; its pages are right. */
static int check_steps(const kvq_move *move, int steps) {
    if (steps && (!move->window || !move->step)) return KVQ_NO_DATA;
    for (int t = 0; t < steps; t++) {
        const kvq_move_step *step = move->step + t;
        if (step->window_slot < 0 || step->window_slot >= move->window->period) return KVQ_MISFIT_MOVE;
        if (step->page < -1 || step->page >= move->pages) return KVQ_MISFIT_MOVE;
        if (step->page < 0) continue;
        const kvq_page *page = move->page + step->page;
        if (step->page_slot < 0 || step->page_slot >= page->capacity) return KVQ_MISFIT_MOVE;
        if (page->narrow && page->layers) return KVQ_MISFIT_MOVE;
        if (!move->turned || !(page->layers || kvq_turned(page->key_precision))) continue;
        if (!page->positions) return KVQ_NO_DATA;
        const int32_t position = page->positions[step->page_slot], block = position / KVQ_TURN_BLOCK - move->first_block;
        if (position < 0 || block < 0 || block >= move->turn_blocks) return KVQ_MISFIT_MOVE;
    }
    return 0;
}

static int check_window(const kvq_page *window) {
    const int refused = window->layers ? KVQ_MISFIT_MOVE : check_page(window, 0);
    if (refused) return refused;
    const int is_window = window->key_precision == KVQ_WINDOW || window->key_precision == KVQ_INT8;
    return is_window && window->value_precision == window->key_precision && !window->begin && !kvq_shares_tiles(window) ? 0 : KVQ_MISFIT_MOVE;
}

int kvq_check_moved_values(const kvq_move *move) {
    if (!move) return KVQ_NO_DATA;
    const int refused = check_shape(move->layers, move->kv_heads, move->head_dim, move->tokens);
    if (refused) return refused;
    if (!kvq_choose_kernel(move->kernel)) return KVQ_NO_KERNEL;
    return move->tokens && (!move->keys || !move->values) ? KVQ_NO_DATA : 0;
}

int kvq_check_move(const kvq_move *move, int steps) {
    int refused = kvq_check_moved_values(move);
    if (!refused) refused = check_pages(move->page, move->pages, move->layers);
    if (!refused && move->window) refused = check_window(move->window);
    return refused ? refused : check_steps(move, steps);
}

/* What a pass does stepwise. */
static int check_stepwise(const kvq_pass *pass) {
    const kvq_move *move = pass->stepwise;
    const int same = move->layers == pass->layers && move->kv_heads == pass->kv_heads &&
                     move->head_dim == pass->head_dim && move->tokens == pass->tokens;
    if (!same) return KVQ_MISFIT_SHAPE;
    if (move->keys != pass->keys || move->values != pass->values || move->page != pass->page) return KVQ_MISFIT_MOVE;
    return move->pages > pass->pages ? KVQ_MISFIT_MOVE : kvq_check_move(move, pass->tokens - 1);
}

/* The windows of a pass's layers, and the pages that some of them have no part of. */
static int check_windows(const kvq_pass *pass) {
    if (pass->windows && (pass->position < 0 || pass->position > INT32_MAX - pass->tokens)) return KVQ_MISFIT_SHAPE;
    for (int l = 0; pass->windows && l < pass->layers; l++)
        if (pass->windows[l] < 0) return KVQ_MISFIT_SHAPE;
    for (int p = 0; p < pass->pages; p++)
        if (pass->page[p].narrow && (!pass->windows || kvq_shares_tiles(pass->page + p))) return KVQ_MISFIT_PAGE;
    for (int p = 0, refused; p < pass->pages; p++)
        for (int l = 0; pass->page[p].narrow && pass->page[p].layers && l < pass->layers; l++)
            if (!pass->windows[l] && (refused = check_arrays(pass->page[p].layers + l))) return refused;
    return 0;
}

/* What turns with the position. */
static int check_turns(const kvq_pass *pass) {
    const kvq_turns *turns = pass->turns;
    if (!turns) return 0;
    if (!turns->vectors || !turns->across || !turns->waves || !turns->which) return KVQ_NO_DATA;
    const int sizes = turns->rows >= 0 && turns->rows % TILE == 0 && turns->rows <= KVQ_TURN_MOST_ROWS &&
                      turns->blocks > 0 && turns->blocks % KVQ_TURN_BLOCKS == 0;
    if (!sizes || pass->position < 0 || pass->position > INT32_MAX - pass->tokens) return KVQ_MISFIT_SHAPE;
    if (((int64_t)pass->position + pass->tokens + KVQ_TURN_BLOCK - 1) / KVQ_TURN_BLOCK > turns->blocks) return KVQ_MISFIT_SHAPE;
    for (int l = 0; l < pass->layers; l++)
        if (turns->which[l] < -1 || turns->which[l] >= turns->sets) return KVQ_MISFIT_SHAPE;
    for (int p = 0; p < pass->pages; p++)
        if ((pass->page[p].layers || kvq_turned(pass->page[p].key_precision)) && !pass->page[p].positions) return KVQ_NO_DATA;
    return 0;
}

static int check_one_pass(const kvq_pass *pass) {
    int refused = check_shape(pass->layers, pass->kv_heads, pass->head_dim, pass->tokens);
    if (refused) return refused;
    if (!counts(pass->heads) || pass->heads % pass->kv_heads) return KVQ_MISFIT_SHAPE;
    if (!kvq_choose_kernel(pass->kernel)) return KVQ_NO_KERNEL;
    refused = check_pages(pass->page, pass->pages, pass->layers);
    if (!refused) refused = check_windows(pass);
    if (!refused) refused = check_turns(pass);
    return refused || !pass->stepwise || pass->tokens < 2 ? refused : check_stepwise(pass);
}

int kvq_check_pass(const kvq_pass *pass) {
    if (!pass) return KVQ_NO_DATA;
    int sessions = 0;
    for (const kvq_pass *p = pass; p; p = p->next) {
        const int same = p->layers == pass->layers && p->heads == pass->heads && p->kv_heads == pass->kv_heads &&
                         p->head_dim == pass->head_dim && p->kernel == pass->kernel;
        if (!same || ++sessions > KVQ_MOST_SESSIONS) return KVQ_MISFIT_SHAPE;
        const int refused = check_one_pass(p);
        if (refused) return refused;
    }
    return 0;
}

int kvq_check_rows(const kvq_pass *pass, int32_t layer, const kvq_rows *rows) {
    if (layer < 0 || layer >= pass->layers) return KVQ_MISFIT_SHAPE;
    if (!rows || (kvq_tokens_of(pass) && !(rows->query && rows->key && rows->value && rows->out))) return KVQ_NO_DATA;
    return 0;
}

int kvq_check_encode(int32_t kernel, int32_t precision, const float *x, size_t vectors, int32_t head_dim,
                     const uint32_t *words, const uint16_t *scales) {
    if (width_number(precision) < 0) return KVQ_UNKNOWN_PRECISION;
    if (check_shape(1, 1, head_dim, 1)) return KVQ_MISFIT_SHAPE;
    if (!kvq_choose_kernel(kernel)) return KVQ_NO_KERNEL;
    return vectors && (!x || !words || (has_scale(precision) && !scales)) ? KVQ_NO_DATA : 0;
}

int kvq_check_matrix(int32_t kernel, const kvq_matrix *m) {
    if (!m) return KVQ_NO_DATA;
    const int32_t block = m->block;
    const int whole = block >= KVQ_LEAST_BLOCK && block <= KVQ_MOST_BLOCK && !(block & (block - 1));
    const int between = m->bits == 5 || m->bits == 6; /* in a byte each, in files */
    if (!whole || (m->bits != 4 && m->bits != 8 && !between)) return KVQ_MISFIT_SHAPE;
    if (m->n < 1 || m->k < 1 || m->k > INT32_MAX - block || m->blocks != (m->k + block - 1) / block)
        return KVQ_MISFIT_SHAPE;
    if (!kvq_choose_kernel(kernel)) return KVQ_NO_KERNEL;
    if ((m->bits == 8 && m->zeros) || (m->bits != 4 && m->offsets)) return KVQ_MISFIT_SHAPE;
    if ((m->zeros && m->offsets) || (m->halves != 0 && m->halves != 1)) return KVQ_MISFIT_SHAPE;
    if (m->halves && !m->offsets && !between) return KVQ_MISFIT_SHAPE;
    return m->codes && m->scales && (m->zeros || !between) ? 0 : KVQ_NO_DATA;
}

int kvq_check_pack(int32_t kernel, const kvq_matrix *from, const kvq_matrix *to) {
    int refused = kvq_check_matrix(kernel, from);
    if (!refused) refused = kvq_check_matrix(kernel, to);
    if (refused) return refused;
    const int same = from->n == to->n && from->k == to->k && from->bits == to->bits && from->block == to->block &&
                     from->halves == to->halves;
    if (!same) return KVQ_MISFIT_SHAPE;
    return !from->zeros != !to->zeros || !from->offsets != !to->offsets ? KVQ_NO_DATA : 0;
}
