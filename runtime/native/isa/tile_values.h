/* The values of a chunk, weighted, of some rows, by tiles. */
#ifndef KVQ_TILE_VALUES_H
#define KVQ_TILE_VALUES_H

#include "some_rows.h"

/* The weights of a segment as bytes, row by row, with zeros where a token has none. Returns whether any takes a third one. */
static int weight_bytes(const some_rows *s, int from, int slots) {
    const size_t part = (size_t)s->blocks * TILE_SIDE * SEGMENT;
    __m512i all = _mm512_setzero_si512();
    for (int t = 0; t < s->tokens; t++) {
        const float *weights = scores_of(s, t) + (size_t)(s->at[t] + from) * s->heads;
        uint8_t *to = s->weight + (size_t)t * s->heads * SEGMENT;
        for (int slot = 0; slot < slots; slot += TILE)
            for (int g = 0; g < s->heads; g++, weights += TILE) {
                __m128i *at = (__m128i *)(to + g * SEGMENT + slot);
                __m512i whole = _mm512_setzero_si512();
                if (from + slot < s->slots[t])
                    whole = _mm512_cvtps_epi32((__m512)(load_f(weights) * s->inverse[t * s->heads + g]));
                all = _mm512_or_si512(all, whole);
                _mm_store_si128(at, _mm512_cvtepi32_epi8(whole));
                _mm_store_si128(at + part / 16, _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
                _mm_store_si128(at + part / 8, _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 16)));
            }
    }
    return _mm512_test_epi32_mask(all, _mm512_set1_epi32(0xff << 8 * COMMON_PARTS)) != 0;
}

/* Where the channels of a precision are among the registers of codes_of_four. */
static void find_places(int precision, int words, int passes, uint32_t *place) {
    const int steps = 8 / low_bits_of(precision), low = low_words_of(precision, words);
    for (int pass = 0; pass < passes; pass++) {
        const dot_pass at = pass_of(precision, words, pass);
        for (int i = 0; i < 2; i++)
            for (int b = 0; b < 4; b++)
                for (int l = 0; l < 4; l++) {
                    const int first = (at.step + i * at.next_step) * low + at.word + i * at.next;
                    place[first + b * steps * low + l * at.stride] = (2 * pass + i) * LANES + 4 * l + b;
                }
    }
}

/* Four tokens' bytes of each channel, in their order: [channels / LANES, ..., LANES] at to and every `stride` behind it. */
INLINE void value_bytes(int precision, int words, int passes, const uint32_t *place, const uint32_t *values, uint32_t *to,
                        int stride) {
    __m512i code[2 * MOST_PASSES];
    for (int pass = 0; pass < passes; pass++) codes_of_four(precision, words, pass, values, code + 2 * pass);
    for (int c = 0; c < 2 * passes; c++) {
        const __m512i from = _mm512_loadu_si512(place + c * LANES);
        __m512i own = _mm512_permutex2var_epi32(code[0], from, code[1]);
        for (int pass = 1; pass < passes; pass++) {
            const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(from, 5), _mm512_set1_epi32(pass));
            const __m512i more = _mm512_permutex2var_epi32(code[2 * pass], from, code[2 * pass + 1]);
            own = _mm512_mask_mov_epi32(own, here, more);
        }
        _mm512_store_si512(to + c * stride, own);
    }
}

/* sum grows by a part of the weights of a segment times its values, for four vectors of channels at a time. */
USES_TILES INLINE void dot_values_of_rows(const some_rows *s, int part, int tiles, int fresh) {
    const int vectors = s->channels / LANES;
    for (int block = 0; block < s->blocks; block++) {
        const uint8_t *rows = s->weight + ((size_t)part * s->blocks + block) * TILE_SIDE * SEGMENT;
        for (int c = 0; c < vectors; c += 4) {
            const int count = vectors - c;
            int32_t *sums = s->sum + (((size_t)part * s->blocks + block) * vectors + c) * SUMS;
#define BEGIN(n, code)                                            \
    if (fresh) _tile_zero(n);                                     \
    else _tile_loadd(n, sums + n * SUMS, TILE_BYTES);
#define DOT(n, code)                                              \
    _tile_loadd(code, codes + n * SUMS, TILE_BYTES);              \
    _tile_dpbusd(n, 7, code);
#define END(n, code) _tile_stored(n, sums + n * SUMS, TILE_BYTES);
            FOR_BLOCKS(count, BEGIN)
            for (int k = 0; k < tiles; k++) {
                const uint32_t *codes = s->value + ((size_t)k * vectors + c) * SUMS;
                _tile_loadd(7, rows + k * TILE_BYTES, SEGMENT);
                FOR_BLOCKS(count, DOT)
            }
            FOR_BLOCKS(count, END)
#undef BEGIN
#undef DOT
#undef END
        }
    }
}

/* The same for the rows of token t alone, without tiles. */
static void dot_values_of_token(const some_rows *s, int part, int tiles, int t) {
    const int vectors = s->channels / LANES;
    for (int r = t * s->heads; r < (t + 1) * s->heads; r++) {
        const uint8_t *row = s->weight + ((size_t)part * s->blocks * TILE_SIDE + r) * SEGMENT;
        for (int c = 0; c < vectors; c++) {
            int32_t *to = s->sum + (((size_t)part * s->blocks + r / TILE_SIDE) * vectors + c) * SUMS + r % TILE_SIDE * LANES;
            vi sum = (vi)load_u((const uint32_t *)to);
            for (int k = 0; k < tiles * TILE_BYTES / 4; k++) {
                int32_t four;
                memcpy(&four, row + 4 * k, sizeof four);
                const uint32_t *codes = s->value + ((size_t)k / TILE_SIDE * vectors + c) * SUMS + k % TILE_SIDE * LANES;
                sum = dot_words(sum, (vu)_mm512_set1_epi32(four), load_u(codes));
            }
            memcpy(to, &sum, sizeof sum);
        }
    }
}

/* The weighted values of a page, which `most` slots are seen of: sums grow. */
USES_TILES INLINE void weigh_page(int precision, some_rows *s, int p, int most, int words, int passes) {
    const int vectors = s->channels / LANES;
    const size_t part_sums = (size_t)s->blocks * vectors * SUMS;
    for (int from = 0; from < most; from += SEGMENT) {
        const int slots = most - from < SEGMENT ? most - from : SEGMENT, tiles = (slots + TILE_BYTES - 1) / TILE_BYTES;
        const int parts = weight_bytes(s, from, tiles * TILE_BYTES) ? WEIGHT_PARTS : COMMON_PARTS;
        for (int t = 0; t < (s->shared ? 1 : s->tokens); t++) {
            const kvq_page *page = page_of(s, t, p);
            const uint32_t *values = page->values + (s->vector_row * page->capacity + page->begin + from) * words;
            const int own = (s->shared ? slots : s->slots[t] - from) / 4;
            for (int group = 0; group < tiles * TILE_SIDE; group++) {
                uint32_t *to = s->value + (size_t)group / TILE_SIDE * vectors * SUMS + group % TILE_SIDE * LANES;
                if (group < own) value_bytes(precision, words, passes, s->place, values + 4 * group * words, to, SUMS);
                else
                    for (int c = 0; c < vectors; c++) memset(to + c * SUMS, 0, TILE_BYTES);
            }
            for (int part = 0; part < parts; part++) {
                if (s->shared) {
                    dot_values_of_rows(s, part, tiles, !s->begun[part]);
                } else {
                    if (!s->begun[part]) memset(s->sum + part * part_sums, 0, sizeof *s->sum * part_sums);
                    dot_values_of_token(s, part, tiles, t);
                }
                s->begun[part] = 1;
            }
        }
    }
}

/* As weigh_dot, for all rows: `count` neighbouring pages from p on whose values have one precision; `slots` of each token. */
USES_TILES INLINE void weigh_together(int precision, some_rows *s, int chunk, int p, int count, const int *slots) {
    const int words = words_per_vector(precision, s->task->pass->head_dim), vectors = s->channels / LANES;
    const int passes = low_words_of(precision, words) * (8 / low_bits_of(precision)) / 8;
    const size_t stride = partial_bytes(s->task) / sizeof(float), part_sums = (size_t)s->blocks * vectors * SUMS;
    find_places(precision, words, passes, s->place);
    for (int r = 0; r < s->rows; r++) {
        s->unit[r] = weight_unit(sum_lanes(s->softmax[r].scaled_squares), slots[r / s->heads]);
        s->inverse[r] = s->unit[r] > FLT_MIN ? 1 / s->unit[r] : 0;
    }
    memset(s->begun, 0, sizeof s->begun);
    for (int i = p; i < p + count; i++) {
        const int most = look_at(s, i);
        if (most <= 0) continue;
        weigh_page(precision, s, i, most, words, passes);
        for (int t = 0; t < s->tokens; t++) s->at[t] += s->slots[t];
    }
    for (int r = 0; r < s->rows; r++) {
        float *sums = (float *)(partial_of(s, r / s->heads, chunk) + sizeof(kvq_partial)) + r % s->heads * stride;
        const uint32_t *from = (uint32_t *)s->sum + (size_t)(r / TILE_SIDE) * vectors * SUMS + r % TILE_SIDE * LANES;
        for (int c = 0; c < vectors; c++, from += SUMS) {
            vi part[WEIGHT_PARTS];
            for (int i = 0; i < WEIGHT_PARTS; i++) part[i] = s->begun[i] ? (vi)load_u(from + i * part_sums) : (vi){0};
            vf values = whole_values(precision, part, s->unit[r]);
            __asm__("" : "+v"(values)); /* rounded before it is added, as add_dots has it */
            store_f(sums + c * LANES, load_f(sums + c * LANES) + values);
        }
    }
}

/* weigh_softmax of so many heads: a constant in each. */
typedef int (*softmax_function)(const kvq_page *page, size_t vector_row, int most, int together, const float *maximum,
                                float *weights, softmax_sums *softmax, int *count);
#define SOFTMAX(heads)                                                                                               \
    NOINLINE int softmax_##heads(const kvq_page *page, size_t vector_row, int most, int together,                   \
                                 const float *maximum, float *weights, softmax_sums *softmax, int *count) {         \
        return weigh_softmax(heads, page, vector_row, most, together, maximum, weights, softmax, count);            \
    }
SOFTMAX(1) SOFTMAX(2) SOFTMAX(3) SOFTMAX(4)
static const softmax_function SOFTMAX_OF[DECODE_HEADS] = ROW_OF(softmax);

/* Whether tokens find the same codes in any of some pages. */
static int any_shared(some_rows *s, int first, int count) {
    for (int p = first; p < first + count; p++)
        if (look_at(s, p) > 0 && s->shared) return 1;
    return 0;
}

/* As chunk_values. */
USES_TILES static void chunk_values_of_rows(some_rows *s, int chunk, int begin, int end) {
    const int stride = (int)(partial_bytes(s->task) / sizeof(float));
    for (int p = begin, count; p < end; p += count) {
        const int precision = page_of(s, 0, p)->value_precision;
        const int words = words_per_vector(precision, s->task->pass->head_dim), together = dot_values_fit(precision, words);
        int slots[MOST_TOGETHER];
        for (int t = 0; t < s->tokens; t++)
            slots[t] = SOFTMAX_OF[s->heads - 1](page_of(s, t, p), s->vector_row, end - p, together,
                                                s->maximum + t * s->heads, scores_of(s, t) + s->at[t] * s->heads,
                                                s->softmax + t * s->heads, &count);
        if (slots[0] <= 0) continue;
        if (together && any_shared(s, p, count)) {
            FOR_WIDTH(precision, weigh_together(PRECISION, s, chunk, p, count, slots))
            continue;
        }
        for (int t = 0; t < s->tokens; t++) {
            const kvq_page *page = page_of(s, t, p);
            const char *values = codes_at(s->task + t, page, s->vector_row, 0);
            float *weights = scores_of(s, t) + s->at[t] * s->heads, squares[DECODE_HEADS];
            float *sums = (float *)(partial_of(s, t, chunk) + sizeof(kvq_partial));
            for (int g = 0; g < s->heads; g++) squares[g] = sum_lanes(s->softmax[t * s->heads + g].scaled_squares);
            if (together)
                weigh_run(s->heads, words, page, count, s->vector_row, slots[t], weights, squares, sums, stride, values);
            else
                WEIGH_OF[width_number(precision)][s->heads - 1]((const uint32_t *)values, words, slots[t], weights, sums,
                                                                stride, values);
            s->at[t] += slots[t];
        }
    }
}

#endif
