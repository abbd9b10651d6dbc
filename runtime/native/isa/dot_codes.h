/* Codes as integer products of x86 take them: unsigned bytes. */
#ifndef KVQ_DOT_CODES_H
#define KVQ_DOT_CODES_H

enum {
    dot_offset_INT8 = 128,
    dot_offset_INT4 = 8,
    dot_offset_CODEBOOK4 = 90,
    dot_offset_CODEBOOK3 = 26,
    dot_offset_CODEBOOK = 10,
};

INLINE vu dot_codes_INT8(vw word, int s) { return (void)s, word.low ^ 0x80808080u; }
INLINE vu dot_codes_INT4(vw word, int s) { return (word.low >> (4 * s)) & 0x0f0f0f0fu; }

/* Levels by code, counted from the lowest; an instruction set defines shuffle_bytes(bytes, x): those of 16 bytes by the bytes
 * of x, each below 16. It may define choose_bits(mask, a, b): a's bits where the mask has ones, else b's. */
#ifndef choose_bits
#define choose_bits(mask, a, b) (((a) & (mask)) | ((b) & ~(mask)))
#endif
static const uint8_t CODEBOOK4_BYTES[16] = {0, 22, 37, 49, 59, 68, 77, 86, 94, 103, 112, 121, 131, 143, 158, 180};
static const uint8_t CODEBOOK3_BYTES[16] = {0, 10, 17, 23, 29, 35, 42, 52};
INLINE vu dot_codes_CODEBOOK4(vw word, int s) {
    return shuffle_bytes(CODEBOOK4_BYTES, (word.low >> (4 * s)) & 0x0f0f0f0fu);
}
INLINE vu dot_codes_CODEBOOK3(vw word, int s) {
    const vu low = word.low >> (2 * s), high = s < 2 ? word.high << (2 - s) : word.high >> (s - 2);
    return shuffle_bytes(CODEBOOK3_BYTES, choose_bits(0x03030303u, low, high) & 0x07070707u);
}

/* Levels by code, in thirds; in every four bytes, as a shuffle looks them up. */
#define CODEBOOK_THIRDS (20 << 24 | 13 << 16 | 7 << 8 | 0)
#define CODEBOOK_CODES(word, s) (((word).low >> (2 * (s))) & 0x03030303u)

#endif
