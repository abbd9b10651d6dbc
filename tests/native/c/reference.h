/* What the kernels are compared with: random packed pages, and attention and codecs written from the documentation
 * (runtime/native/kvq.h, runtime/kv/pages.py, runtime/precision/codecs), a value at a time and in double precision. */
#ifndef KVQ_REFERENCE_H
#define KVQ_REFERENCE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

/* Ids of all precisions that the library says it knows; what they mean is written down here a second time. */
#define ID_OF(name, id, bits, scale, products, with) id,
static const int WIDTHS[] = {KVQ_WIDTHS(ID_OF, )};

/* splitmix64 (Steele, Lea and Flood, 2014): the same numbers on every machine. */
static uint64_t seed;
static uint64_t random_bits(void) {
    uint64_t x = seed += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static int below(int n) { return (int)(random_bits() % (uint64_t)n); }
static double uniform(double low, double high) {
    return low + (high - low) * ((double)(random_bits() >> 11) * 0x1p-53);
}
#define PICK(list) ((list)[below(sizeof(list) / sizeof *(list))])

/* Exactly that many bytes, so that the address sanitizer sees any access beyond them. */
static void *exactly(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) {
        fprintf(stderr, "check_kernels: no memory\n");
        exit(2);
    }
    return memory;
}

static double half_value(uint16_t half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double x = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return half & 0x8000 ? -x : x;
}

/* The nearest half, ties to even; |x| <= 65504. */
static uint16_t nearest_half(double x) {
    double size = fabs(x), step = size < 0x1p-14 ? 0x1p-24 : ldexp(1, ilogb(size) - 10);
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    size = rint(size / step) * step;
    if (size < 0x1p-14) return sign | (uint16_t)(size * 0x1p24);
    int exponent = ilogb(size);
    return sign | (uint16_t)((exponent + 14) * 1024 + (int)ldexp(size, 10 - exponent));
}

/* Bits of a code. At 3 bits the third ones stand in words of their own, behind the others. */
static int code_bits(int width) { return width == KVQ_WINDOW ? 16 : width == KVQ_CODEBOOK4 ? 4 : width; }
static int plain_words(int width, int head_dim) {
    return (head_dim * (width == 3 ? 2 : code_bits(width)) + 31) / 32;
}
static int words_of(int width, int head_dim) {
    const int count = plain_words(width, head_dim);
    return width == 3 ? count + (count + 1) / 2 : count;
}

/* Code i of word j is channel i * words + j. Third bits of the words 2 j and 2 j + 1 stand in word j of theirs: byte b has
 * those of the codes 4 b, 4 b + 1, 4 b + 2, 4 b + 3 of the first, then of the second. */
typedef struct {
    int word, shift;
} bit_place;
static bit_place place_of(int width, int head_dim, int channel) {
    const int count = plain_words(width, head_dim);
    return (bit_place){channel % count, channel / count * (width == 3 ? 2 : code_bits(width))};
}
static bit_place third_bit(int head_dim, int channel) {
    const int count = plain_words(3, head_dim), word = channel % count, code = channel / count;
    return (bit_place){count + word / 2, code / 4 * 8 + word % 2 * 4 + code % 4};
}
static uint32_t word_mask(int width) { return width == 3 ? 3 : (1u << code_bits(width)) - 1; }

static int code_of_channel(int width, const uint32_t *words, size_t word_stride, int head_dim, int channel) {
    const bit_place at = place_of(width, head_dim, channel), third = third_bit(head_dim, channel);
    int code = (int)(words[at.word * word_stride] >> at.shift & word_mask(width));
    if (width == 3) code += (int)(words[third.word * word_stride] >> third.shift & 1) * 4;
    return code;
}
static void put_code(int width, uint32_t *words, size_t word_stride, int head_dim, int channel, uint32_t code) {
    const bit_place at = place_of(width, head_dim, channel), third = third_bit(head_dim, channel);
    words[at.word * word_stride] |= (code & word_mask(width)) << at.shift;
    if (width == 3) words[third.word * word_stride] |= code / 4 << third.shift;
}

/* The positive levels of the codebooks, ascending; parts of them make 1, and a fit begins with so many root mean squares. */
typedef struct {
    int count, parts, level[8];
    double first;
} book;
static book book_of(int width) {
    if (width == 2) return (book){2, 3, {3, 10}, 0.4528};
    if (width == 3) return (book){4, 1, {3, 9, 16, 26}, 0.08302};
    if (width == KVQ_CODEBOOK4) return (book){8, 1, {4, 13, 22, 31, 41, 53, 68, 90}, 0.03030};
    return (book){0};
}

static double decoded(int width, int code, uint16_t scale) {
    const book levels = book_of(width);
    if (levels.count) {
        const int rank = code < levels.count ? levels.count - 1 - code : code - levels.count;
        const double level = (double)levels.level[rank] / levels.parts * half_value(scale);
        return code < levels.count ? -level : level;
    }
    switch (width) {
    case 16: return half_value((uint16_t)code);
    case KVQ_WINDOW: return (int16_t)code * half_value(scale);
    case 8: return (int8_t)code * half_value(scale);
    case 4: return (code - 8) * half_value(scale);
    default: return NAN; /* a precision that this file does not describe: every check fails */
    }
}

/* The page table of a random store, and its arrays. */
enum { MOST_ROWS = 300 };
typedef struct {
    int layers, kv_heads, head_dim;
    int pages, arrays;
    kvq_page page[MOST_ROWS];
    void *array[4 * MOST_ROWS];
    size_t nbytes[4 * MOST_ROWS];
    const kvq_turns *turns; /* or null */
} store;

static void release(store *s) {
    for (int i = 0; i < s->arrays; i++) free(s->array[i]);
    s->pages = s->arrays = 0;
}

/* Vectors of values about one in size, in words with a stride; codes beyond the last channel are zero. */
static void random_vector(int width, int head_dim, uint32_t *words, size_t word_stride, uint16_t *scale) {
    /* codes of a value of one, about */
    static const double unit[] = {[15] = 17000, [8] = 70, [5] = 50, [4] = 4, [3] = 16, [2] = 2.4};
    const int bits = code_bits(width), count = words_of(width, head_dim);
    for (int j = 0; j < count; j++) words[j * word_stride] = 0;
    for (int c = 0; c < head_dim; c++) {
        uint32_t code = width == 16 ? nearest_half(uniform(-1.7, 1.7)) : (uint32_t)random_bits() & ((1u << bits) - 1);
        put_code(width, words, word_stride, head_dim, c, code);
    }
    if (width != 16) *scale = nearest_half(uniform(0.5, 1.5) / unit[width]);
}

static void *new_array(store *s, size_t bytes) {
    s->nbytes[s->arrays] = bytes;
    return s->array[s->arrays++] = exactly(bytes);
}

static uint32_t *random_array(store *s, int width, int capacity, int tiled, uint16_t **scales) {
    const size_t vectors = (size_t)s->layers * s->kv_heads * capacity;
    const int words = words_of(width, s->head_dim);
    uint32_t *codes = new_array(s, vectors * words * 4);
    *scales = new_array(s, width == 16 ? 0 : vectors * 2);
    for (size_t i = 0; i < vectors; i++) {
        /* [tiles, words, TILE] or [tokens, words]; whole tiles, so tiles count through layers and heads. */
        uint32_t *first = tiled ? codes + i / TILE * TILE * words + i % TILE : codes + i * words;
        random_vector(width, s->head_dim, first, tiled ? TILE : 1, *scales + i);
    }
    return codes;
}

/* Rows of at most CHUNK_SLOTS slots for arrays that hold `count` tokens from slot `first` on, going round at `period`.
 * Slots without a token hold what earlier tokens left there. */
static void add_rows(store *s, int key_bits, int value_bits, int capacity, int first, int count, int period) {
    uint16_t *key_scales, *value_scales;
    uint32_t *keys = random_array(s, key_bits, capacity, 1, &key_scales);
    uint32_t *values = random_array(s, value_bits, capacity, 0, &value_scales);
    for (int begin = 0; begin < capacity; begin += CHUNK_SLOTS) {
        int end = capacity - begin < CHUNK_SLOTS ? capacity : begin + CHUNK_SLOTS;
        s->page[s->pages++] = (kvq_page){keys, key_scales, values, value_scales, key_bits, value_bits,
                                         capacity, begin, end, first, count, period, 0, 0, NULL, NULL};
    }
}
static int whole_tiles(int tokens) { return (tokens + TILE - 1) / TILE * TILE; }
static void add_page(store *s, int key_bits, int value_bits, int capacity, int count) {
    add_rows(s, key_bits, value_bits, capacity, 0, count, capacity);
}
static void add_ring(store *s, int period, int count, int first) {
    add_rows(s, KVQ_WINDOW, KVQ_WINDOW, whole_tiles(period), first, count, period);
}

/* Where the vector of a slot of one layer and KV head lies. */
typedef struct {
    uint32_t *words;
    uint16_t *scale;
    size_t stride;
} slot_place;
static slot_place place(const kvq_page *page, int of_values, size_t row, int slot, int head_dim) {
    const size_t at = row * page->capacity + slot;
    const int words = words_of(of_values ? page->value_precision : page->key_precision, head_dim);
    if (of_values) return (slot_place){(uint32_t *)page->values + at * words, (uint16_t *)page->value_scales + at, 1};
    uint32_t *first = (uint32_t *)page->keys + at / TILE * TILE * words + at % TILE;
    return (slot_place){first, (uint16_t *)page->key_scales + at, TILE};
}

/* What channel c of a key was stored less, that stands in a slot of a page. */
static double taken_off(const store *s, const kvq_page *page, int layer, int kv_head, int slot, int c) {
    const kvq_turns *turns = s->turns;
    double sum = 0;
    if (!turns || page->key_precision == 15 || code_bits(page->key_precision) > 4 || turns->which[layer] < 0) return 0;
    for (int r = 0; r < turns->rows; r++) {
        const size_t row = ((size_t)layer * s->kv_heads + kv_head) * turns->rows + r;
        const size_t wave = ((size_t)turns->which[layer] * turns->rows + r) * turns->blocks + page->positions[slot] / 16;
        sum += (double)turns->vectors[row * s->head_dim + c] * turns->waves[wave];
    }
    return sum;
}

/* Append the tokens of one layer and KV head to keys, values [tokens, head_dim]; returns how many. Null: count only. */
static int read_tokens(const store *s, int layer, int kv_head, double *keys, double *values) {
    const int d = s->head_dim;
    const size_t row = (size_t)layer * s->kv_heads + kv_head;
    int n = 0;
    for (int p = 0; p < s->pages; p++) {
        const kvq_page *page = s->page + p;
        for (int slot = page->begin; slot < page->end; slot++) {
            if (slot >= page->period) continue;
            if (((slot - page->first) % page->period + page->period) % page->period >= page->count) continue;
            const slot_place key = place(page, 0, row, slot, d), value = place(page, 1, row, slot, d);
            const uint16_t key_scale = page->key_precision == 16 ? 0 : *key.scale;
            const uint16_t value_scale = page->value_precision == 16 ? 0 : *value.scale;
            for (int c = 0; keys && c < d; c++) {
                int k = code_of_channel(page->key_precision, key.words, key.stride, d, c);
                int v = code_of_channel(page->value_precision, value.words, value.stride, d, c);
                keys[(size_t)n * d + c] = decoded(page->key_precision, k, key_scale) + taken_off(s, page, layer, kv_head, slot, c);
                values[(size_t)n * d + c] = decoded(page->value_precision, v, value_scale);
            }
            n++;
        }
    }
    return n;
}

/* Causal attention of the new tokens over the store and themselves: out [tokens, heads, head_dim], squares [tokens,
 * heads]. */
static void reference_attend(const store *s, int heads, int tokens, int layer, const kvq_rows *rows, double *out,
                             double *squares) {
    const int d = s->head_dim, group = heads / s->kv_heads, cached = read_tokens(s, layer, 0, NULL, NULL);
    double *keys = exactly(sizeof(double) * (size_t)(cached + tokens) * d);
    double *values = exactly(sizeof(double) * (size_t)(cached + tokens) * d);
    double *score = exactly(sizeof(double) * (size_t)(cached + tokens));
    for (int kv_head = 0; kv_head < s->kv_heads; kv_head++) {
        read_tokens(s, layer, kv_head, keys, values);
        for (int t = 0; t < tokens; t++)
            for (int c = 0; c < d; c++) {
                keys[(size_t)(cached + t) * d + c] = rows->key[t * rows->key_stride + kv_head * d + c];
                values[(size_t)(cached + t) * d + c] = rows->value[t * rows->value_stride + kv_head * d + c];
            }
        for (int row = 0; row < group * tokens; row++) {
            const int t = row / group, head = kv_head * group + row % group, seen = cached + t + 1;
            const float *query = rows->query + t * rows->query_stride + (size_t)head * d;
            double *result = out + ((size_t)t * heads + head) * d, top = -HUGE_VAL, total = 0, square = 0;
            for (int i = 0; i < seen; i++) {
                score[i] = 0;
                for (int c = 0; c < d; c++) score[i] += query[c] * keys[(size_t)i * d + c];
                score[i] /= sqrt(d);
                top = fmax(top, score[i]);
            }
            for (int c = 0; c < d; c++) result[c] = 0;
            for (int i = 0; i < seen; i++) {
                double weight = exp(score[i] - top);
                total += weight, square += weight * weight;
                for (int c = 0; c < d; c++) result[c] += weight * values[(size_t)i * d + c];
            }
            for (int c = 0; c < d; c++) result[c] /= total;
            squares[(size_t)t * heads + head] = square / (total * total);
        }
    }
    free(keys), free(values), free(score);
}

/* Codes and scale of a codebook, as runtime/precision/codecs/codebook.py fits them. */
static float fitted_scale(book levels, const float *x, int head_dim, float peak, uint32_t *code) {
    double scale = 0, total = 0, products = 0; /* sums: whole numbers below 2^53 */
    for (int round = -1; round < 3; round++) {
        double squares = 0;
        products = 0;
        for (int c = 0; c < head_dim; c++) {
            double magnitude = peak > 0 ? fabsf(rintf(x[c] / peak * 65536.0f)) : 0;
            int rank = 0;
            for (int k = 1; k < levels.count; k++) /* the nearest level */
                rank += magnitude > scale * (float)((levels.level[k - 1] + levels.level[k]) / (2.0 * levels.parts));
            const int level = levels.level[rank];
            if (round < 0) total += magnitude * magnitude;
            products += magnitude * level;
            squares += level * level;
            code[c] = (uint32_t)(x[c] >= 0 ? levels.count + rank : levels.count - 1 - rank);
        }
        scale = round < 0 ? levels.first * sqrt(total / head_dim) : levels.parts * products / squares;
    }
    double stored = (scale + 4 * (products > 0 ? levels.parts * total / products : 0)) / 5;
    return (float)(fmin(stored, 1.5 * scale) * (double)(peak / 65536.0f));
}

/* One vector; -1 for what a codec refuses. */
static int reference_encode(int width, const float *x, int head_dim, uint32_t *words, uint16_t *scale_out) {
    const int bits = code_bits(width), count = words_of(width, head_dim), top = (1 << (bits - 1)) - 1;
    const book levels = book_of(width);
    float peak = 0, scale = 0;
    uint32_t fitted[1024];
    for (int c = 0; c < head_dim; c++) {
        if (!isfinite(x[c])) return -1;
        peak = fmaxf(peak, fabsf(x[c]));
    }
    if (bits == 16 && peak > 65504) return -1;
    if (width != 16) {
        scale = levels.count ? fitted_scale(levels, x, head_dim, peak, fitted) : peak / (float)top;
        if (scale > 65504) return -1;
        *scale_out = nearest_half(scale);
        if (half_value(*scale_out) < scale) ++*scale_out; /* rounded up, so that the largest value never clips */
        scale = (float)half_value(*scale_out);
    }
    for (int j = 0; j < count; j++) words[j] = 0;
    for (int c = 0; c < head_dim; c++) {
        uint32_t code;
        if (width == 16) code = nearest_half(x[c]);
        else if (levels.count) code = fitted[c];
        else {
            float q = scale > 0 ? rintf(x[c] / scale) : 0;
            q = fminf(fmaxf(q, (float)(-top - 1)), (float)top);
            code = (uint32_t)((int)q + (width == 4 ? 8 : 0)) & (uint32_t)(2 * top + 1);
        }
        put_code(width, words, 1, head_dim, c, code);
    }
    return 0;
}

/* Encode a vector into a slot. */
static void put_vector(slot_place to, int width, const float *x, int head_dim) {
    uint32_t words[512];
    uint16_t scale = 0;
    reference_encode(width, x, head_dim, words, &scale);
    for (int j = 0; j < words_of(width, head_dim); j++) to.words[j * to.stride] = words[j];
    if (width != 16) *to.scale = scale;
}

#endif
