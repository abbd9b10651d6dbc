/* Vectors whose rounding feeds errors back, several at once: channels follow one another, so a vector alone waits for every
 * one of them; here each lane is a vector, and all wait together. Byte for byte as one by one. */
#ifndef KVQ_FED_LANES_H
#define KVQ_FED_LANES_H

#include "encode.h"

#define FEWEST_FED 3 /* vectors; fewer are faster one by one */

/* A vector [head_dim in whole 16s], zeros behind head_dim, and where its codes and its scale go. */
typedef struct {
    int precision;
    const float *x;
    uint32_t *words;
    uint16_t *scale;
    int status; /* 0, or why it is refused */
} one_vector;

typedef struct {
    int count;
    const book_levels *book[LANES];
    one_vector *vector[LANES];
    book_fit fit[LANES];
    float peak[LANES];
    int32_t whole[MOST_CHANNELS * LANES]; /* [head_dim, LANES] */
    uint32_t code[MOST_CHANNELS * LANES];
    int64_t products[LANES], squares[LANES];
} fed_lanes;

/* The codebook of a precision; null of one that has none. */
INLINE const book_levels *book_of(int precision) {
    return precision == KVQ_CODEBOOK ? &BOOK2 : precision == KVQ_CODEBOOK3 ? &BOOK3 : precision == KVQ_CODEBOOK4 ? &BOOK4 : NULL;
}

/* A vector takes the next lane, unless it is refused. */
static void take_lane(fed_lanes *all, one_vector *v, const book_levels *book, int head_dim) {
    const int padded = (head_dim + 15) / 16 * 16, lane = all->count;
    int32_t whole[MOST_CHANNELS];
    uint32_t code[MOST_CHANNELS];
    const float peak = peak_of(v->x, padded);
    v->status = peak <= FLT_MAX ? 0 : KVQ_REFUSED_VALUE;
    if (v->status) return;
    all->book[lane] = book, all->vector[lane] = v, all->peak[lane] = peak;
    all->fit[lane] = fit_of(book, v->x, padded, head_dim, peak, whole, code);
    sign_as(v->x, padded, whole);
    for (int c = 0; c < head_dim; c++) all->whole[c * LANES + lane] = whole[c];
    all->count++;
}

/* What a lane's codebook is made of, lane by lane: level k of its positive half is level + the steps before k; a rank that
 * it does not have lies behind a border that nothing crosses. */
typedef struct {
    vf unit, border[7];
    vi level, step[7], count;
} lane_books;

/* Sums of levels times whole numbers, which have 17 bits, by their bytes; and of levels squared. */
typedef struct {
    vi high, low, squares;
} lane_sums;

static lane_books books_of(const fed_lanes *all) {
    lane_books books = {0};
    for (int lane = 0; lane < LANES; lane++) {
        const int own = lane < all->count ? lane : 0; /* an empty lane is as the first one, and nobody looks at it */
        const book_levels *book = all->book[own];
        books.unit[lane] = short_float((float)all->fit[own].scale / (float)book->parts);
        books.count[lane] = book->count, books.level[lane] = book->level[0];
        for (int k = 0; k < 7; k++) {
            const int has = k + 1 < book->count;
            books.border[k][lane] = has ? books.unit[lane] * ((float)(book->level[k] + book->level[k + 1]) / 2) : INFINITY;
            books.step[k][lane] = has ? book->level[k + 1] - book->level[k] : 0;
        }
    }
    return books;
}

#define FED_BLOCK 4 /* channels whose errors the later ones get together: each is then read and written once for all of them */

/* What rounding all lanes' channel i does wrong; its codes, and what they add to the sums. */
INLINE vf round_channel(fed_lanes *all, const lane_books *books, int i, vf now, lane_sums *sums) {
    const vf size = (vf)((vu)now & 0x7fffffff);
    const vi negative = now < 0, whole = (vi)load_u((const uint32_t *)all->whole + i * LANES);
    vi rank = {0}, level = books->level;
    UNROLL
    for (int k = 0; k < 7; k++) {
        const vi beyond = size > books->border[k];
        rank -= beyond, level += beyond & books->step[k];
    }
    const vf value = (vf)((vu)(books->unit * to_float(level)) ^ ((vu)negative & 0x80000000u));
    const vi signed_level = (level ^ negative) - negative, code = books->count + (rank ^ negative);
    sums->high += (whole >> 8) * signed_level, sums->low += (whole & 255) * signed_level;
    sums->squares += level * level;
    memcpy(all->code + i * LANES, &code, sizeof code);
    return (vf)((vu)(now - value) & 0xfffff800u); /* see short_float */
}

/* fed_back of all lanes. */
static void feed_lanes(fed_lanes *all, const uint16_t *feedback, int head_dim) {
    const lane_books books = books_of(all);
    float rest[MOST_CHANNELS * LANES], share[FED_BLOCK][MOST_CHANNELS + LANES];
    lane_sums sums = {{0}, {0}, {0}};
    for (int c = 0; c < head_dim; c++) store_f(rest + c * LANES, to_float((vi)load_u((const uint32_t *)all->whole + c * LANES)));
    for (int first = 0; first < head_dim; first += FED_BLOCK) {
        const int channels = head_dim - first < FED_BLOCK ? head_dim - first : FED_BLOCK, behind = first + channels;
        vf error[FED_BLOCK] = {{0}};
        for (int i = 0; i < channels; i++) {
            const uint16_t *row = feedback + (size_t)(first + i) * head_dim;
            for (int c = first / LANES * LANES; c + LANES <= head_dim; c += LANES) store_f(share[i] + c, load_halves(row + c));
            for (int c = head_dim / LANES * LANES; c < head_dim; c++) share[i][c] = half_scalar(row[c]);
            vf now = load_f(rest + (first + i) * LANES);
            for (int before = 0; before < i; before++) now -= error[before] * share[before][first + i];
            error[i] = round_channel(all, &books, first + i, now, &sums);
        }
        for (int c = behind; c < head_dim; c++) { /* in their order, as one by one */
            vf now = load_f(rest + c * LANES);
            for (int i = 0; i < FED_BLOCK; i++) now -= error[i] * share[i][c];
            store_f(rest + c * LANES, now);
        }
    }
    for (int lane = 0; lane < all->count; lane++)
        all->products[lane] = (int64_t)sums.high[lane] * 256 + sums.low[lane], all->squares[lane] = sums.squares[lane];
}

/* A lane's codes and scale go where they belong. */
static void leave_lane(const fed_lanes *all, int lane, int head_dim) {
    const int padded = (head_dim + 15) / 16 * 16;
    one_vector *v = all->vector[lane];
    uint32_t code[MOST_CHANNELS + 16];
    const double scale = fed_scale(all->book[lane], all->products[lane], all->squares[lane], all->fit[lane].total);
    const int half = half_above(scale_of_peak(scale, all->peak[lane]));
    v->status = half < 0 ? KVQ_REFUSED_VALUE : 0;
    if (v->status) return;
    *v->scale = (uint16_t)half;
    for (int c = 0; c < head_dim; c++) code[c] = all->code[c * LANES + lane];
    for (int c = head_dim; c < padded; c++) code[c] = 0;
    FOR_WIDTH(v->precision, pack(PRECISION, code, head_dim, v->words))
}

/* At most LANES vectors with one matrix of feedback, or null. */
static void encode_together(one_vector *vectors, int count, const uint16_t *feedback, int head_dim) {
    int fed = 0;
    for (int i = 0; feedback && i < count; i++) fed += book_of(vectors[i].precision) != NULL;
    fed_lanes all;
    all.count = 0;
    for (int i = 0; i < count; i++) {
        one_vector *v = vectors + i;
        const book_levels *book = fed < FEWEST_FED ? NULL : book_of(v->precision);
        if (book) take_lane(&all, v, book, head_dim);
        else v->status = encode_any(v->precision, v->x, feedback, head_dim, v->words, v->scale);
    }
    if (!all.count) return;
    feed_lanes(&all, feedback, head_dim);
    for (int lane = 0; lane < all.count; lane++) leave_lane(&all, lane, head_dim);
}

/* feedback, each: see kvq_encode. */
static int encode_vectors(int precision, const float *x, size_t vectors, int head_dim, const uint16_t *feedback, size_t each,
                          uint32_t *words, uint16_t *scales) {
    const int padded = (head_dim + 15) / 16 * 16, count = words_per_vector(precision, head_dim);
    float padded_x[LANES][MOST_CHANNELS];
    one_vector some[LANES];
    for (int lane = 0; lane < LANES; lane++) memset(padded_x[lane] + head_dim, 0, sizeof(float) * (padded - head_dim));
    for (size_t i = 0, run; i < vectors; i += run) {
        run = feedback ? each - i % each : LANES; /* of one matrix */
        if (run > LANES) run = LANES;
        if (run > vectors - i) run = vectors - i;
        for (size_t v = 0; v < run; v++) {
            memcpy(padded_x[v], x + (i + v) * head_dim, sizeof(float) * head_dim);
            some[v] = (one_vector){precision, padded_x[v], words + (i + v) * count, scales + i + v, 0};
        }
        encode_together(some, (int)run, feedback ? feedback + i / each * head_dim * head_dim : NULL, head_dim);
        for (size_t v = 0; v < run; v++)
            if (some[v].status) return some[v].status;
    }
    return 0;
}

#endif
