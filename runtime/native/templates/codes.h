/* The codes of packed weights as kernels read them: parts of panels, and codes of fewer than 8 bits in a byte each. */
#ifndef KVQ_CODES_H
#define KVQ_CODES_H

#include "vector.h"

/* Sums of a part stay in registers: PART_ROWS rows, PART_PANELS panels of columns in the lanes. */
#if LANES == 16
#define PART_PANELS 2
#define PART_ROWS 12
#else
#define PART_PANELS 1
#if defined(__aarch64__) || defined(DOT_KERNEL)
#define PART_ROWS 6
#else
#define PART_ROWS 4
#endif
#endif
#define PART_COLUMNS (PART_PANELS * KVQ_PANEL)
#define PART_VECTORS (PART_COLUMNS / LANES)
#define PANEL_VECTORS (KVQ_PANEL / LANES)

#ifdef DOT_KERNEL
/* Where codes are the unsigned side of a dot product, its sums of four fit without saturation whatever they are. */
enum { weight_offset = dot_offset_INT8, high_in_place = dot_offset_INT8 > 0 };
#else
enum { weight_offset = 0, high_in_place = 0 };
#endif

/* What a matrix has: bits of a code, zero points, offsets; and whether its scales and offsets are halves. */
typedef struct {
    int bits, zeros, offsets, halves;
} form;

/* A block of a part's panels. */
typedef struct {
    const uint32_t *words[PART_PANELS]; /* the weights as they are packed */
    const uint32_t *bytes[PART_PANELS]; /* as codes of a byte each: smaller ones where `multiply_by` was asked to expand them */
    const uint8_t *zeros[PART_PANELS];  /* null where there are none */
    const char *scales[PART_PANELS], *offsets[PART_PANELS];
} part_block;

/* Scales or offsets of LANES columns, from the one number `lane` on. */
INLINE vf numbers_of(form form, const char *of, int lane) {
    return form.halves ? load_halves((const uint16_t *)of + lane) : load_f((const float *)of + lane);
}

/* Place of vector v of a part within its panel's arrays [.., KVQ_PANEL]. */
#define PANEL_OF(v) ((v) / PANEL_VECTORS)
#define LANE_OF(v) ((v) % PANEL_VECTORS * LANES)

/* Zero points of a block in the columns of vector v, if it has any. */
INLINE vi zeros_of(const part_block *t, form form, int v) {
    typedef uint8_t bytes __attribute__((vector_size(LANES)));
    bytes zeros = {0};
    if (form.zeros && form.bits < 8) memcpy(&zeros, t->zeros[PANEL_OF(v)] + LANE_OF(v), sizeof zeros);
    return __builtin_convertvector(zeros, vi);
}

/* Words of a block of fewer than 8 bits, of two codes a byte, whose higher bits one further word has; 1 where there are none. */
INLINE int words_of_high(int bits) { return bits == 5 ? 4 : bits == 6 ? 2 : 1; }

/* The word that has the higher bits of word w of a block, whose words begin at `words`; zeros where there is none. */
INLINE vu high_bits(int bits, const uint32_t *words, int block, int w) {
    const int together = words_of_high(bits);
    return together > 1 ? load_u(words + (size_t)(block / 8 + w / together) * KVQ_PANEL) : (vu){0};
}

/* The low codes of a word of them, or the high ones, in a byte each; `more` has their higher bits behind those of i others. */
INLINE vu bytes_of(int bits, vu word, int high, vu more, int i) {
    const vu codes = (high ? word >> 4 : word) & 0x0f0f0f0fu;
    if (bits == 4) return codes;
    const int left = 4 - (bits - 4) * i;
    return codes | ((left > 0 ? more << left : more >> -left) & (bits == 5 ? 0x10101010u : 0x30303030u));
}

/* Codes of fewer bits than 8 in a byte each, to [block / 4, KVQ_PANEL]: as they are, or, where a block has zero points, as 8-bit
 * ones. Bits are a constant where it is used. */
INLINE void expand_codes_of(int bits, const part_block *t, int p, int block, uint32_t *to) {
    typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
    const form form = {.bits = bits, .zeros = t->zeros[p] != NULL};
    const int together = words_of_high(bits);
    for (int v = 0; v < PANEL_VECTORS; v++) {
        const vi zeros = form.zeros ? zeros_of(t, form, p * PANEL_VECTORS + v) - weight_offset : (vi){0};
        const bytes less = (bytes)((vu)(zeros & 0xff) * 0x01010101u);
        const uint32_t *words = t->words[p] + v * LANES;
        for (int w = 0; w < block / 8; w += together) {
            const vu more = high_bits(bits, words, block, w);
            UNROLL
            for (int i = 0; i < 2 * together; i++) { /* of each word first the low codes */
                const vu word = load_u(words + (size_t)(w + i / 2) * KVQ_PANEL);
                const bytes codes = (bytes)bytes_of(bits, word, i % 2, more, i) - less;
                memcpy(to + (size_t)(w + i / 2 + i % 2 * (block / 8)) * KVQ_PANEL + v * LANES, &codes, sizeof codes);
            }
        }
    }
}

static void expand_codes(int bits, const part_block *t, int p, int block, uint32_t *to) {
    if (bits == 4) expand_codes_of(4, t, p, block, to);
    else if (bits == 5) expand_codes_of(5, t, p, block, to);
    else expand_codes_of(6, t, p, block, to);
}

#endif
