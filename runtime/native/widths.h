/* The precisions that this library knows. Whatever tells them apart in C comes from this one list: ids, sizes, the
 * dispatch to what is compiled for each, the masks, and what Python is told (kvq_knows). */
#ifndef KVQ_WIDTHS_H
#define KVQ_WIDTHS_H

/* X(name, id, bits, scale, products, with) for each precision; `with` is whatever the caller hands on.
 *   name      of its functions, level_<name> and so on: docs/native.md lists what a precision must bring
 *   id        its number in the page table, that of its codec in runtime/precision/codecs
 *   bits      of a code: 16, 8, 4 or 2, so that codes fill words of 32 bits; or 3, in words of their two low bits and
 *             words of their high bits, see split_of
 *   scale     SCALED where a vector has a half as its scale, else UNSCALED
 *   products  what integer dot products do with its codes: nothing (FLOATS), or they take a code's level as a byte, in
 *             WHOLES or in THIRDS */
#define KVQ_WIDTHS(X, with)                     \
    X(HALF, 16, 16, UNSCALED, FLOATS, with)     \
    X(WINDOW, 15, 16, SCALED, FLOATS, with)     \
    X(INT8, 8, 8, SCALED, WHOLES, with)         \
    X(INT4, 4, 4, SCALED, WHOLES, with)         \
    X(CODEBOOK4, 5, 4, SCALED, WHOLES, with)    \
    X(CODEBOOK3, 3, 3, SCALED, WHOLES, with)    \
    X(CODEBOOK, 2, 2, SCALED, THIRDS, with)

#define KVQ_SCALE_UNSCALED 0
#define KVQ_SCALE_SCALED 1

/* Something only for those that integer dot products take: KVQ_IF_WHOLE(products, something). */
#define KVQ_IF_WHOLE(products, ...) KVQ_IF_WHOLE_##products(__VA_ARGS__)
#define KVQ_IF_WHOLE_FLOATS(...)
#define KVQ_IF_WHOLE_WHOLES(...) __VA_ARGS__
#define KVQ_IF_WHOLE_THIRDS(...) __VA_ARGS__
#define KVQ_PARTS_FLOATS 0
#define KVQ_PARTS_WHOLES 1
#define KVQ_PARTS_THIRDS 3

/* KVQ_<name>: its id. NUMBER_<name>: its place in the list, and its bit in a mask of widths. */
#define KVQ_ID_OF(name, id, bits, scale, products, with) KVQ_##name = id,
#define KVQ_NUMBER_OF(name, id, bits, scale, products, with) NUMBER_##name,
enum { KVQ_WIDTHS(KVQ_ID_OF, ) };
enum { KVQ_WIDTHS(KVQ_NUMBER_OF, ) WIDTH_COUNT };

/* Codes are cut out of words; what is padded to whole 16s has no more than 16 of them in a word. */
#define KVQ_FITS(name, id, bits, scale, products, with) \
    _Static_assert((bits) == 3 || ((bits) >= 2 && (bits) <= 16 && 32 % (bits) == 0), #name ": its codes do not fill words");
KVQ_WIDTHS(KVQ_FITS, )
_Static_assert(WIDTH_COUNT <= 32, "a mask of widths is an unsigned int");

#define KVQ_INLINE static inline __attribute__((always_inline)) /* mostly of a constant */

/* The place of a precision in the list; -1 for one that is not there. Nothing goes on with such a one: see checks.c. */
#define KVQ_CASE(name, id, bits, scale, products, with) precision == id ? NUMBER_##name:
KVQ_INLINE int width_number(int precision) { return KVQ_WIDTHS(KVQ_CASE, ) -1; }
#undef KVQ_CASE

/* Bits of a code; 0 for an unknown precision. */
#define KVQ_CASE(name, id, bits, scale, products, with) precision == id ? bits:
KVQ_INLINE int bits_of(int precision) { return KVQ_WIDTHS(KVQ_CASE, ) 0; }
#undef KVQ_CASE

/* Whether its vectors have scales. */
#define KVQ_CASE(name, id, bits, scale, products, with) precision == id ? KVQ_SCALE_##scale:
KVQ_INLINE int has_scale(int precision) { return KVQ_WIDTHS(KVQ_CASE, ) 0; }
#undef KVQ_CASE

/* How many parts of a level integer dot products count in: 1 or 3; 0 where they do not take its codes. */
#define KVQ_CASE(name, id, bits, scale, products, with) precision == id ? KVQ_PARTS_##products:
KVQ_INLINE int parts_of(int precision) { return KVQ_WIDTHS(KVQ_CASE, ) 0; }
#undef KVQ_CASE

/* Whether codes lie in two parts: words of their low_bits, as any other's, and behind them words of their high bits, each
 * of which serves two words of low ones. Byte b of a low word has the codes 4 b to 4 b + 3; their high bits are bits 0 to
 * 3, for every second word 4 to 7, of byte b of the high word. */
KVQ_INLINE int split_of(int precision) { return bits_of(precision) == 3; }
KVQ_INLINE int low_bits_of(int precision) { return split_of(precision) ? 2 : bits_of(precision); }

/* Whether keys are stored less what turns with their position, see kvq_turns. */
KVQ_INLINE int kvq_turned(int precision) { return bits_of(precision) <= 4; }

/* 32-bit words of a vector's codes; how many of so many are not of high bits alone; and codes of such a word. */
KVQ_INLINE int words_per_vector(int precision, int head_dim) {
    const int low = (head_dim * low_bits_of(precision) + 31) / 32;
    return split_of(precision) ? low + (low + 1) / 2 : low;
}
KVQ_INLINE int low_words_of(int precision, int words) { return split_of(precision) ? words * 2 / 3 : words; }
KVQ_INLINE int codes_of(int precision) { return 32 / low_bits_of(precision); }

/* Where the high bit of code i is, for a first word. */
KVQ_INLINE int high_bit_of(int i) { return 8 * (i / 4) + i % 4; }

/* A switch over the precisions: `call` sees PRECISION as a constant and is compiled for each. */
#define WIDTH_CASE(name, id, bits, scale, products, call) \
    case id: { enum { PRECISION = id }; call; } break;
#define FOR_WIDTH(precision, call)     \
    switch (precision) {               \
        KVQ_WIDTHS(WIDTH_CASE, call)   \
    default: break;                    \
    }

/* One function for each precision and number of heads, where both are constants: KVQ_WIDTHS(X, heads) defines
 * function_<name>_<heads>, and TABLE_OF(function) has them by width_number and number of heads. */
#define ROW_OF(function) {function##_1, function##_2, function##_3, function##_4}
#define TABLE_ROW(name, id, bits, scale, products, function) ROW_OF(function##_##name),
#define TABLE_OF(function) {KVQ_WIDTHS(TABLE_ROW, function)}

#endif
