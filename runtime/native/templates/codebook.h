/* Levels of the codebooks of 3 and 4 bits, those of runtime/precision/codecs/codebook.py. */
#ifndef KVQ_CODEBOOK_H
#define KVQ_CODEBOOK_H

#include <stdint.h>

/* By code; a book of eight is there twice, so that a fourth bit of the code does not matter. */
typedef struct {
    float level[16];
    int8_t whole[16]; /* the same, as integer dot products take them */
} codebook;

#define CODEBOOK3_LEVELS -26, -16, -9, -3, 3, 9, 16, 26
#define CODEBOOK4_LEVELS -90, -68, -53, -41, -31, -22, -13, -4, 4, 13, 22, 31, 41, 53, 68, 90
static const codebook CODEBOOK3_BOOK = {{CODEBOOK3_LEVELS, CODEBOOK3_LEVELS}, {CODEBOOK3_LEVELS, CODEBOOK3_LEVELS}};
static const codebook CODEBOOK4_BOOK = {{CODEBOOK4_LEVELS}, {CODEBOOK4_LEVELS}};

#endif
