/* Products with packed matrices against the same sums in double precision, and against themselves: a row's result does not
 * depend on the rows beside it. */
#ifndef KVQ_CHECK_PRODUCTS_H
#define KVQ_CHECK_PRODUCTS_H

#include "check_refusals.h"

/* A scale or an offset. */
static double number_of(const kvq_matrix *m, const void *numbers, size_t at) {
    return m->halves ? (double)half_value(((const uint16_t *)numbers)[at]) : ((const float *)numbers)[at];
}

/* The weight at column k of a row, as MatMulNBits defines it: its offset is not in it. */
static double weight_of(const kvq_matrix *m, int row, int k) {
    const int b = k / m->block, i = k % m->block;
    const size_t block = (size_t)row * m->blocks + b;
    const double scale = number_of(m, m->scales, block);
    if (m->bits == 8) return scale * (m->codes[block * m->block + i] - 128);
    if (m->bits != 4) return scale * (m->codes[block * m->block + i] - m->zeros[block]);
    const uint8_t *zeros = m->zeros ? m->zeros + (size_t)row * ((m->blocks + 1) / 2) : NULL;
    const int zero = zeros ? zeros[b / 2] >> (b % 2 * 4) & 15 : 8;
    return scale * ((m->codes[(block * m->block + i) / 2] >> (i % 2 * 4) & 15) - zero);
}

/* x as a row of bytes has it: rounded to steps of 1/127 of its block's largest magnitude. */
static double stepped(const kvq_matrix *m, const float *x, int k) {
    const int begin = k / m->block * m->block, end = begin + m->block < m->k ? begin + m->block : m->k;
    float largest = 0;
    for (int i = begin; i < end; i++) largest = fmaxf(largest, fabsf(x[i]));
    if (largest <= 1e-36f) return 0;
    const float code = nearbyintf(x[k] * (127 / largest));
    return (double)code * (largest / 127);
}

static double offset_of(const kvq_matrix *m, int row, int k) {
    return m->offsets ? number_of(m, m->offsets, (size_t)row * m->blocks + k / m->block) : 0;
}

static void free_matrix(kvq_matrix *m) { free(m->codes), free(m->scales), free(m->zeros), free(m->offsets); }

/* Bits that a code takes in a file. */
static int filed_bits(int bits) { return bits == 4 ? 4 : 8; }

/* Bytes of all zero points there. */
static size_t filed_zeros(int n, size_t blocks, int bits) { return n * (bits == 4 ? (blocks + 1) / 2 : blocks); }

/* Arrays of exactly their size for so many rows, with codes of so many bits each. */
static kvq_matrix matrix_of(int n, int k, int bits, int block, size_t rows, int held, size_t zeros, int offsets, int halves) {
    const int blocks = (k + block - 1) / block;
    const size_t numbers = (halves ? sizeof(uint16_t) : sizeof(float)) * rows * blocks;
    return (kvq_matrix){exactly(rows * blocks * block * held / 8), exactly(numbers), zeros ? exactly(zeros) : NULL,
                        offsets ? exactly(numbers) : NULL, n, k, blocks, bits, block, halves};
}

static void random_number(const kvq_matrix *m, void *numbers, size_t at, double x) {
    if (m->halves) ((uint16_t *)numbers)[at] = nearest_half(x);
    else ((float *)numbers)[at] = (float)x;
}

static void check_product(int kernel, int n, int k, int bits, int block, int with_zeros, int with_offsets, int halves,
                          int rows) {
    const size_t blocks = (k + block - 1) / block, padded = (n + KVQ_PANEL - 1) / KVQ_PANEL * KVQ_PANEL;
    const size_t zeros = with_zeros ? filed_zeros(n, blocks, bits) : 0, codes = n * blocks * block * filed_bits(bits) / 8;
    kvq_matrix from = matrix_of(n, k, bits, block, n, filed_bits(bits), zeros, with_offsets, halves);
    kvq_matrix to = matrix_of(n, k, bits, block, padded, bits, with_zeros ? padded * blocks : 0, with_offsets, halves);
    const int most = bits == 4 ? 255 : (1 << bits) - 1; /* of a byte of codes, or of zero points */
    float *x = exactly(sizeof(float) * rows * k), *out = exactly(sizeof(float) * rows * n);
    float *alone = exactly(sizeof(float) * n);
    for (size_t i = 0; i < codes; i++) from.codes[i] = (uint8_t)(random_bits() & (uint64_t)most);
    for (size_t i = 0; i < n * blocks; i++) random_number(&from, from.scales, i, uniform(1e-4, 1e-2));
    for (size_t i = 0; with_offsets && i < n * blocks; i++) random_number(&from, from.offsets, i, uniform(-1, 1));
    for (size_t i = 0; i < zeros; i++) from.zeros[i] = (uint8_t)(random_bits() & (uint64_t)most);
    for (int i = 0; i < rows * k; i++) x[i] = (float)(uniform(-1, 1) * (below(50) ? 1 : 40));
    if (kvq_pack(kernel, &from, &to)) fail("a matrix [%d, %d] of %d bits in blocks of %d is refused", n, k, bits, block);
    if (kvq_product(kernel, &to, x, rows, out, PICK(WAYS), &shared_calls)) fail("a product is refused");
    for (int r = 0; r < rows; r += r < 3 ? 1 : 5) {
        for (int c = 0; c < n; c += n > 100 ? 7 : 1) {
            double wanted = 0, size = 0;
            for (int i = 0; i < k; i++) {
                const double term = weight_of(&from, c, i) * stepped(&from, x + r * k, i);
                const double more = offset_of(&from, c, i) * x[r * k + i];
                wanted += term + more, size += fabs(term) + fabs(more);
            }
            const double error = fabs(out[r * n + c] - wanted);
            if (!(error <= 1e-6 * size + 1e-30))
                fail("kernel %s: product [%d, %d] of %d bits in blocks of %d: %g is %g, off by %g", kvq_kernel_name(kernel),
                     n, k, bits, block, wanted, out[r * n + c], error);
        }
        kvq_product(kernel, &to, x + r * k, 1, alone, NULL, NULL);
        if (memcmp(alone, out + r * n, sizeof(float) * n)) fail("kernel %s: a row differs alone", kvq_kernel_name(kernel));
    }
    free_matrix(&from), free_matrix(&to), free(x), free(out), free(alone);
}

/* A matrix of 8 bits that fits, with one thing wrong at a time. */
#define MATRIX(name, number, error) {"matrix." #name, offsetof(kvq_matrix, name), number, KVQ_##error}
static const misfit MATRICES[] = {
    MATRIX(n, 0, MISFIT_SHAPE), MATRIX(n, -1, MISFIT_SHAPE), MATRIX(n, 17, MISFIT_SHAPE), MATRIX(k, 0, MISFIT_SHAPE),
    MATRIX(k, INT_MAX, MISFIT_SHAPE), MATRIX(k, 65, MISFIT_SHAPE), MATRIX(blocks, 0, MISFIT_SHAPE),
    MATRIX(blocks, 3, MISFIT_SHAPE), MATRIX(bits, 0, MISFIT_SHAPE), MATRIX(bits, 7, MISFIT_SHAPE),
    MATRIX(bits, 5, NO_DATA), MATRIX(bits, 6, NO_DATA), MATRIX(bits, 4, MISFIT_SHAPE), MATRIX(block, 0, MISFIT_SHAPE), MATRIX(block, 16, MISFIT_SHAPE),
    MATRIX(block, 48, MISFIT_SHAPE), MATRIX(block, 512, MISFIT_SHAPE), MATRIX(block, INT_MIN, MISFIT_SHAPE),
    MATRIX(halves, 1, MISFIT_SHAPE), MATRIX(halves, 2, MISFIT_SHAPE), MATRIX(halves, -1, MISFIT_SHAPE),
};

static void check_refused_matrices(void) {
    kvq_matrix from = matrix_of(16, 64, 8, 32, 16, 8, 0, 0, 0), to = matrix_of(16, 64, 8, 32, 16, 8, 0, 0, 0);
    memset(from.codes, 128, 16 * 64);
    memset(from.scales, 0, sizeof(float) * 32);
    expect_error("a matrix that fits", 0, kvq_pack(0, &from, &to), 0);
    expect_error("no matrix", 0, kvq_pack(0, NULL, &to), KVQ_NO_DATA);
    expect_error("no matrix", 1, kvq_pack(0, &from, NULL), KVQ_NO_DATA);
    expect_error("kernel", 1000, kvq_pack(1000, &from, &to), KVQ_NO_KERNEL);
    for (int i = 0; i < LENGTH(MATRICES); i++)
        for (int side = 0; side < 2; side++) {
            kvq_matrix wrong = side ? from : to;
            *field(&wrong, MATRICES[i].offset) = MATRICES[i].value;
            const int found = side ? kvq_pack(0, &wrong, &to) : kvq_pack(0, &from, &wrong);
            expect_error(MATRICES[i].what, MATRICES[i].value, found, MATRICES[i].error);
        }
    for (int side = 0; side < 4; side++) {
        kvq_matrix left = from, right = to;
        if (side % 2) *(side / 2 ? &left.codes : &right.codes) = NULL;
        else *(side / 2 ? &left.scales : &right.scales) = NULL;
        expect_error("an address", side, kvq_pack(0, &left, &right), KVQ_NO_DATA);
    }
    for (int side = 0; side < 2; side++) {
        kvq_matrix left = from, right = to;
        *(side ? &left.offsets : &right.offsets) = from.scales;
        expect_error("offsets of 8 bits", side, kvq_pack(0, &left, &right), KVQ_MISFIT_SHAPE);
        left.bits = right.bits = 4;
        expect_error("offsets of one side", side, kvq_pack(0, &left, &right), KVQ_NO_DATA);
        left.offsets = right.offsets = from.scales;
        left.halves = side, right.halves = !side;
        expect_error("halves of one side", side, kvq_pack(0, &left, &right), KVQ_MISFIT_SHAPE);
        left.halves = right.halves = 0, left.zeros = right.zeros = from.codes;
        expect_error("zero points and offsets", side, kvq_pack(0, &left, &right), KVQ_MISFIT_SHAPE);
        left = from, right = to;
        left.bits = right.bits = 4;
        *(side ? &left.zeros : &right.zeros) = from.codes;
        expect_error("zero points of one side", side, kvq_pack(0, &left, &right), KVQ_NO_DATA);
        left.zeros = right.zeros = from.codes;
        left.bits = right.bits = 8;
        expect_error("zero points of 8 bits", side, kvq_pack(0, &left, &right), KVQ_MISFIT_SHAPE);
        left.bits = right.bits = 5 + side;
        expect_error("halves of 5 or 6 bits", side, (left.halves = right.halves = 1, kvq_pack(0, &left, &right)), 0);
        left.offsets = right.offsets = from.scales;
        expect_error("offsets of 5 or 6 bits", side, kvq_pack(0, &left, &right), KVQ_MISFIT_SHAPE);
    }
    free_matrix(&from), free_matrix(&to);
}

static void check_products(int quick) {
    static const int BLOCKS[] = {32, 64, 128, 256};
    static const int KINDS[][4] = { /* bits, zero points, offsets, halves */
        {8, 0, 0, 0}, {4, 0, 0, 0}, {4, 1, 0, 0}, {4, 0, 1, 0}, {4, 0, 1, 1}, {5, 1, 0, 0}, {5, 1, 0, 1}, {6, 1, 0, 0}, {6, 1, 0, 1},
    };
    for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
        if (!is_checked(kernel)) continue;
        for (int i = 0; i < LENGTH(BLOCKS); i++)
            for (int kind = 0; kind < LENGTH(KINDS); kind++) {
                const int bits = KINDS[kind][0], zeros = KINDS[kind][1], offsets = KINDS[kind][2], halves = KINDS[kind][3];
                const int rows = 1 + below(quick ? 20 : 60);
                check_product(kernel, 1 + below(70), 1 + below(300), bits, BLOCKS[i], zeros, offsets, halves, rows);
                check_product(kernel, 48, 2 * BLOCKS[i], bits, BLOCKS[i], zeros, offsets, halves, 33);
            }
        if (!quick) check_product(kernel, 40, 576, 8, 64, 0, 0, 0, PRODUCT_MOST_ROWS + 7);
    }
}

#endif
