/* Values weighted by softmax, by float arithmetic. Weights lie as scores do, see scores.h. */
#ifndef KVQ_WEIGH_H
#define KVQ_WEIGH_H

#include "../kernel.h"
#include "vector.h"

/* Registers for sums: a pass over the tokens takes as many codes of a word as they hold for all heads. */
#if LANES == 16 || defined(__aarch64__)
#define SUM_REGISTERS 24
#else
#define SUM_REGISTERS 12
#endif

/* Weights are loaded again wherever they are used: beside the sums there is no room for them, and a sum that the compiler puts
 * into memory instead makes every token wait for the one before. */
INLINE const float *loaded_again(const float *weights) {
#if SUM_REGISTERS == 12
    __asm__ volatile("" : "+r"(weights)); /* volatile: else it is one for all */
#endif
    return weights;
}

/* Words that fill whole vectors: sums of `at_once` of their codes from place `first` on, see code_number, LANES words from j
 * on. `high`: what goes with each word where codes are split, see weigh_split. */
INLINE void weigh_vectors(int precision, int heads, int at_once, int first, int j, const uint32_t *values,
                          const uint32_t *high, int words, int slots, const float *weights, float *sums, int stride,
                          const char *next) {
    vf acc[DECODE_HEADS][8];
    for (int g = 0; g < heads; g++)
        for (int i = 0; i < at_once; i++) acc[g][i] = load_f(sums + g * stride + code_number(precision, first + i) * words + j);
    for (int tile = 0; tile < slots; tile += TILE) {
        if (!split_of(precision) && j + first == 0) prefetch(next + (size_t)tile * words * 4, words * TILE * 4);
        for (int t = 0; t < TILE; t++) {
            const int at = (tile + t) * words + j;
            const vw word = skip_codes(precision, words_beside(precision, values, high, at), code_number(precision, first));
            UNROLL
            for (int i = 0; i < at_once; i++) {
                const vf x = level(precision, word, code_number(precision, i));
                for (int g = 0; g < heads; g++) acc[g][i] += x * *loaded_again(weights + tile * heads + g * TILE + t);
            }
        }
    }
    for (int g = 0; g < heads; g++)
        for (int i = 0; i < at_once; i++) store_f(sums + g * stride + code_number(precision, first + i) * words + j, acc[g][i]);
}

/* Words of which a vector holds those of several tokens. */
INLINE void weigh_parts(int precision, int heads, int at_once, int first, const uint32_t *values, const uint32_t *high,
                        int words, int slots, const float *weights, float *sums, int stride, const char *next) {
    const int tokens = LANES / words; /* of one vector */
    vf acc[DECODE_HEADS][8];
    for (int g = 0; g < heads; g++)
        for (int i = 0; i < at_once; i++) acc[g][i] = splat(0);
    for (int tile = 0; tile < slots; tile += TILE) {
        if (!split_of(precision) && first == 0) prefetch(next + (size_t)tile * words * 4, words * TILE * 4);
        for (int t = 0; t < TILE; t += tokens) {
            const int at = (tile + t) * words;
            const vw word = skip_codes(precision, words_beside(precision, values, high, at), code_number(precision, first));
            vf weight[DECODE_HEADS];
            for (int g = 0; g < heads; g++) weight[g] = spread(weights + tile * heads + g * TILE + t, tokens);
            UNROLL
            for (int i = 0; i < at_once; i++) {
                const vf x = level(precision, word, code_number(precision, i));
                for (int g = 0; g < heads; g++) acc[g][i] += x * weight[g];
            }
        }
    }
    for (int g = 0; g < heads; g++)
        for (int i = 0; i < at_once; i++) {
            float lanes[LANES];
            store_f(lanes, acc[g][i]);
            for (int lane = 0; lane < LANES; lane++)
                sums[g * stride + code_number(precision, first + i) * words + lane % words] += lanes[lane];
        }
}

#if LANES == 8
/* The words of one token that fill half a vector, twice; where codes are split, `low` of them before those of high bits. */
INLINE vw words_twice(int precision, const uint32_t *code, int low) {
    const vi own = lane_numbers() & (LANES / 2 - 1);
    vw word;
    memcpy(&word.low, code, sizeof word.low / 2);
    memcpy((char *)&word.low + sizeof word.low / 2, code, sizeof word.low / 2);
    if (split_of(precision)) {
        uint64_t two;
        typedef uint64_t pairs __attribute__((vector_size(4 * LANES)));
        memcpy(&two, code + low, sizeof two);
        word.high = (vu)take_lanes((vf)(two - (pairs){0}), own / 2) >> (vu)(own % 2 * 4);
    }
    return word;
}

/* Words that fill half a vector: its lower half takes the codes of one step, its upper half those of the next one. */
INLINE void weigh_halves(int precision, int heads, int step, const uint32_t *values, int words, int slots,
                         const float *weights, float *sums, int stride, const char *next) {
    enum { BYTES = 4 };
    const int steps = 8 / low_bits_of(precision), low = low_words_of(precision, words);
    const vu upper = (vu)(lane_numbers() / (LANES / 2)) + step;
    vf acc[DECODE_HEADS][BYTES];
    for (int g = 0; g < heads; g++)
        for (int b = 0; b < BYTES; b++) acc[g][b] = splat(0);
    for (int tile = 0; tile < slots; tile += TILE) {
        if (step == 0) prefetch(next + (size_t)tile * words * 4, words * TILE * 4);
        for (int t = 0; t < TILE; t++) {
            vw word = words_twice(precision, values + (size_t)(tile + t) * words, low);
            word.low >>= upper * low_bits_of(precision);
            if (split_of(precision)) word.high >>= upper;
            UNROLL
            for (int b = 0; b < BYTES; b++) {
                const vf x = level(precision, word, b * steps);
                for (int g = 0; g < heads; g++) acc[g][b] += x * *loaded_again(weights + tile * heads + g * TILE + t);
            }
        }
    }
    for (int g = 0; g < heads; g++)
        for (int b = 0; b < BYTES; b++) {
            float lanes[LANES];
            store_f(lanes, acc[g][b]);
            for (int lane = 0; lane < LANES; lane++)
                sums[g * stride + (b * steps + step + lane / low) * low + lane % low] += lanes[lane];
        }
}
#endif

/* The same for tokens whose words lie beside what goes with them. */
INLINE void weigh_words(int precision, int heads, const uint32_t *values, const uint32_t *high, int words, int slots,
                        const float *weights, float *sums, int stride, const char *next) {
    const int codes = codes_of(precision), most = heads * 8 <= SUM_REGISTERS ? 8 : heads * 4 <= SUM_REGISTERS ? 4 : 2;
    const int at_once = codes < most ? codes : most;
    if (words % LANES == 0) {
        for (int j = 0; j < words; j += LANES)
            for (int first = 0; first < codes; first += at_once)
                weigh_vectors(precision, heads, at_once, first, j, values, high, words, slots, weights, sums, stride,
                              next);
    } else if (LANES % words == 0) {
        for (int first = 0; first < codes; first += at_once)
            weigh_parts(precision, heads, at_once, first, values, high, words, slots, weights, sums, stride, next);
    } else { /* a head_dim whose words do not line up with the vectors */
        for (int t = 0; t < slots; t++)
            for (int j = 0; j < words; j++)
                for (int i = 0; i < codes; i++) {
                    const size_t at = (size_t)t * words + j;
                    vw word = {.low = values[at] - (vu){0}};
                    if (split_of(precision)) word.high = high[at] - (vu){0};
                    const float x = level(precision, word, i)[0];
                    for (int g = 0; g < heads; g++)
                        sums[g * stride + i * words + j] += weights[(t / TILE * heads + g) * TILE + t % TILE] * x;
                }
    }
}

/* Codes in two parts: some tokens at a time, low words and what goes with each are laid side by side. */
INLINE void weigh_split(int precision, int heads, const uint32_t *values, int words, int slots, const float *weights,
                        float *sums, int stride, const char *next) {
    enum { ROOM = TILE * MOST_LOW };
    uint32_t low_word[ROOM + LANES], high_word[ROOM + LANES];
    const int low = low_words_of(precision, words), most = ROOM / low / TILE * TILE;
    for (int t = 0; t < slots; t += most) {
        const int tokens = slots - t < most ? slots - t : most;
        for (int i = 0; i < tokens; i++) {
            const uint32_t *code = values + (size_t)(t + i) * words;
            memcpy(low_word + i * low, code, sizeof *code * low);
            high_words(code + low, low, high_word + i * low);
        }
        prefetch(next + (size_t)t * words * 4, tokens * words * 4);
        weigh_words(precision, heads, low_word, high_word, low, tokens, weights + (size_t)t * heads, sums, stride, next);
    }
}

/* sums[head][channel] += weights[head][token] * level[token][channel] over `slots` tokens of a page. */
INLINE void weigh(int precision, int heads, const uint32_t *values, int words, int slots, const float *weights, float *sums,
                  int stride, const char *next) {
#ifdef HALF_REGISTERS
    if (precision == KVQ_HALF && words % 8 == 0) {
        half_weigh(heads, values, words, slots, weights, sums, stride, next);
        return;
    }
#endif
#if LANES == 8
    if (low_bits_of(precision) < 8 && 2 * low_words_of(precision, words) == LANES) {
        for (int step = 0; step < 8 / low_bits_of(precision); step += 2)
            weigh_halves(precision, heads, step, values, words, slots, weights, sums, stride, next);
        return;
    }
#endif
    if (split_of(precision)) weigh_split(precision, heads, values, words, slots, weights, sums, stride, next);
    else weigh_words(precision, heads, values, NULL, words, slots, weights, sums, stride, next);
}

typedef void (*weigh_function)(const uint32_t *values, int words, int slots, const float *weights, float *sums,
                               int stride, const char *next);
#define WEIGH(name, id, bits, scale, products, heads)                                                                \
    NOINLINE void weigh_##name##_##heads(const uint32_t *values, int words, int slots, const float *weights,        \
                                         float *sums, int stride, const char *next) {                               \
        weigh(id, heads, values, words, slots, weights, sums, stride, next);                                        \
    }
KVQ_WIDTHS(WEIGH, 1) KVQ_WIDTHS(WEIGH, 2) KVQ_WIDTHS(WEIGH, 3) KVQ_WIDTHS(WEIGH, 4)
static const weigh_function WEIGH_OF[][DECODE_HEADS] = TABLE_OF(weigh);

#endif
