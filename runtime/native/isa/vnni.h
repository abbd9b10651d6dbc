/* What integer dot products of x86 (VNNI) have in common: the codes are their unsigned side. */
#ifndef KVQ_VNNI_H
#define KVQ_VNNI_H

#define DOT_KERNEL
enum { dot_offset_INT8 = 128, dot_offset_INT4 = 8, dot_offset_CODEBOOK = 10 };

INLINE vu dot_codes_INT8(vu word, int s) { return (void)s, word ^ 0x80808080u; }
INLINE vu dot_codes_INT4(vu word, int s) { return (word >> (4 * s)) & 0x0f0f0f0fu; }

/* Levels by code, in thirds; in every four bytes, as a shuffle looks them up. */
#define CODEBOOK_THIRDS (20 << 24 | 13 << 16 | 7 << 8 | 0)
#define CODEBOOK_CODES(word, s) (((word) >> (2 * (s))) & 0x03030303u)

#endif
