/* Encoding and moving of tokens, byte for byte, and the arithmetic around attention. */
#ifndef KVQ_CHECK_CODECS_H
#define KVQ_CHECK_CODECS_H

#include "harness.h"

/* Vectors of the shapes that rounding goes wrong with, and of magnitudes up to the ends of single precision. */
static void fill_vector(float *x, int head_dim, int kind) {
    const double size = pow(10, uniform(-6, 4.8));
    for (int c = 0; c < head_dim; c++) switch (kind) {
        case 0: case 1: case 2: x[c] = (float)(uniform(-1, 1) * size); break;
        case 3: x[c] = 0; break;
        case 4: x[c] = below(2) ? -0.0f : (float)uniform(-1, 1); break;
        case 5: x[c] = (float)(below(511) - 255) / 2; break; /* ties at 8 bits: the largest is 127 or more */
        case 6: x[c] = c ? (float)(below(29) - 14) / 2 : 7; break; /* ties at 4 bits: the scale is one */
        case 7: x[c] = (float)uniform(-1, 1) * 0x1p-23f; break; /* halves and scales are subnormal */
        case 8: x[c] = (float)uniform(-1, 1) * 0x1p-126f; break; /* so is single precision */
        case 9: x[c] = (float)uniform(-65504, 65504); break;
        case 10: x[c] = c ? (float)uniform(-1, 1) : 30000; break;
        case 11: x[c] = (float)(uniform(-1, 1) * pow(10, uniform(3, 7.3))); break;
        case 12: x[c] = (float)uniform(-3e38, 3e38); break;
        case 13: /* ties between halves */
            x[c] = (float)half_value((uint16_t)(below(0x7bff) | below(2) << 15)) * (1 + 0x1p-11f);
            break;
        default: x[c] = (float)uniform(-1, 1); break;
        }
    if (kind > 13) x[head_dim / 2] = kind == 14 ? NAN : kind == 15 ? INFINITY : -65520;
    if (kind == 5) x[below(head_dim)] = below(2) ? 127 : -127;
    if (kind == 9) x[below(head_dim)] = below(2) ? 65504 : -65504;
}
enum { KINDS = 17, VECTORS = 3 };

static void check_encoding(int rounds) {
    static const int dims[] = {8, 16, 24, 40, 64, 80, 96, 128, 256, 1024};
    for (int i = 0; i < rounds * LENGTH(dims) * WIDTH_COUNT * KINDS; i++) {
        const int width = WIDTHS[i % WIDTH_COUNT], kind = i / WIDTH_COUNT % KINDS;
        const int d = dims[i / WIDTH_COUNT / KINDS % LENGTH(dims)], count = words_of(width, d);
        float *x = exactly(sizeof(float) * VECTORS * d);
        uint32_t *expected = exactly(4u * VECTORS * count), *plain = exactly(4u * VECTORS * count), *words;
        uint16_t expected_scales[VECTORS] = {0}, plain_scales[VECTORS] = {0}, *scales;
        int refused = 0;
        for (int v = 0; v < VECTORS; v++) {
            fill_vector(x + v * d, d, v == 1 ? kind : below(14));
            if (reference_encode(width, x + v * d, d, expected + v * count, expected_scales + v)) refused = KVQ_REFUSED_VALUE;
        }
        for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
            if (kernel && !is_checked(kernel)) continue; /* plain C is what others are compared with */
            words = exactly(4u * VECTORS * count), scales = exactly(width == 16 ? 0 : sizeof(uint16_t) * VECTORS);
            const int status = kvq_encode(kernel, width, x, VECTORS, d, NULL, 1, words, scales);
            if (!kernel && !status) {
                memcpy(plain, words, 4u * VECTORS * count);
                if (width != 16) memcpy(plain_scales, scales, sizeof plain_scales);
            }
            const size_t nbytes = sizeof(uint32_t) * VECTORS * count;
            const char *wrong = NULL;
            if (status != refused) wrong = status ? "refused" : "not refused";
            else if (status) wrong = NULL;
            else if (memcmp(words, expected, nbytes) || memcmp(words, plain, nbytes)) wrong = "other codes";
            else if (width != 16 && (memcmp(scales, expected_scales, sizeof expected_scales) ||
                                     memcmp(scales, plain_scales, sizeof plain_scales)))
                wrong = "another scale";
            if (wrong)
                fail("%s: encode: %s; %d bits, head_dim %d, kind %d", kvq_kernel_name(kernel), wrong, width, d, kind);
            done[kernel].encoded += VECTORS;
            free(words), free(scales);
        }
        free(x), free(expected), free(plain);
    }
}

/* Tokens take slots of the window one after the other, what stood there goes to pages: nothing else changes. */
static void check_moves(int rounds) {
    static const int dims[] = {8, 24, 64, 128};
    enum { MOST_TOKENS = 5, PAGES = 2 };
    for (int i = 0; i < rounds * WIDTH_COUNT * WIDTH_COUNT; i++) {
        store s = {.layers = 1 + i % 2, .kv_heads = 1 + i % 3, .head_dim = dims[below(4)]};
        const int d = s.head_dim, vectors = s.layers * s.kv_heads, tokens = 1 + below(MOST_TOKENS);
        const int period = 1 + below(60), capacity = TILE * (1 + below(3));
        const int key_bits[PAGES] = {WIDTHS[i % WIDTH_COUNT], 4};
        const int value_bits[PAGES] = {WIDTHS[i / WIDTH_COUNT % WIDTH_COUNT], 2};
        if (key_bits[0] == KVQ_WINDOW || value_bits[0] == KVQ_WINDOW) continue; /* no page is of this kind */
        kvq_move_step step[MOST_TOKENS];
        const int first = below(period), to = below(capacity - MOST_TOKENS);
        for (int t = 0; t < tokens; t++)
            step[t] = (kvq_move_step){(first + t) % period, below(PAGES + 1) - 1, to + t};
        float *x[2] = {exactly(sizeof(float) * vectors * tokens * d), exactly(sizeof(float) * vectors * tokens * d)};
        for (int j = 0; j < 2 * vectors * tokens; j++) fill_vector(x[j % 2] + j / 2 * d, d, below(11));
        for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
            if (!is_checked(kernel)) continue;
            const uint64_t before = seed;
            store moved = s, expected = s;
            for (int copy = 0; copy < 2; copy++) {
                store *to_fill = copy ? &expected : &moved;
                seed = before;
                add_ring(to_fill, period, period, 0);
                for (int p = 0; p < PAGES; p++) add_page(to_fill, key_bits[p], value_bits[p], capacity, 0);
            }
            for (int t = 0; t < tokens; t++)
                for (int j = 0; j < 2 * vectors; j++) {
                    const int of_values = j % 2, row = j / 2, page = step[t].page;
                    const slot_place from = place(expected.page, of_values, row, step[t].window_slot, d);
                    float old[256];
                    for (int c = 0; c < d; c++) {
                        const int code = code_of_channel(KVQ_WINDOW, from.words, from.stride, d, c);
                        old[c] = (float)decoded(KVQ_WINDOW, code, *from.scale);
                    }
                    if (page >= 0)
                        put_vector(place(expected.page + 1 + page, of_values, row, step[t].page_slot, d),
                                   of_values ? value_bits[page] : key_bits[page], old, d);
                    put_vector(from, KVQ_WINDOW, x[of_values] + ((size_t)row * tokens + t) * d, d);
                }
            const kvq_move move = {s.layers, s.kv_heads, d, kernel, tokens, PAGES, x[0], x[1], NULL, moved.page, moved.page + 1,
                                   step, NULL, 0, 0, 0};
            if (kvq_move_tokens(&move)) fail("%s: move: it failed", kvq_kernel_name(kernel));
            for (int a = 0; a < moved.arrays; a++)
                if (memcmp(moved.array[a], expected.array[a], moved.nbytes[a]))
                    fail("%s: move: array %d is wrong; k%dv%d, head_dim %d, %d tokens", kvq_kernel_name(kernel), a,
                         key_bits[0], value_bits[0], d, tokens);
            release(&moved), release(&expected);
        }
        free(x[0]), free(x[1]);
    }
}

/* A value that some codec behind some window does not take is found wherever it stands, and no other one; and so is one beyond a limit. */
static void check_movable(void) {
    static const float wrong[] = {NAN, INFINITY, -INFINITY, 65025, -65504, 3e38f}, right[] = {65024, -65024, 0, 1e-40f};
    for (int n = 1; n <= 70; n++)
        for (int at = 0; at < n; at++) {
            float *x = exactly(sizeof(float) * n), *y = exactly(sizeof(float) * n);
            for (int i = 0; i < n; i++) x[i] = PICK(right), y[i] = PICK(right);
            const float at_fault = PICK(wrong);
            for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
                if (!is_checked(kernel)) continue;
                const kvq_move move = {.layers = 1, .kv_heads = 1, .head_dim = 1, .kernel = kernel, .tokens = n,
                                       .keys = n % 2 ? x : y, .values = n % 2 ? y : x};
                x[at] = 1;
                if (kvq_movable(&move) != 1) fail("%s: movable: %d values are refused", kvq_kernel_name(kernel), n);
                x[at] = at_fault;
                if (kvq_movable(&move) != 0)
                    fail("%s: movable: %g at %d of %d is taken", kvq_kernel_name(kernel), x[at], at, n);
                if (kvq_within(kernel, x, n, 1e30f) != (fabsf(x[at]) <= 1e30f))
                    fail("%s: within: wrong of %g at %d of %d", kvq_kernel_name(kernel), x[at], at, n);
            }
            free(y);
            free(x);
        }
}

/* Against the exact function, in parts of each output: every row length, so every rest of a vector. */
static void check_swiglu(void) {
    for (int n = 1; n <= 70; n++)
        for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
            if (!is_checked(kernel)) continue;
            float *x = exactly(sizeof(float) * 2 * n), *out = exactly(sizeof(float) * n);
            for (int i = 0; i < 2 * n; i++) x[i] = (float)(uniform(-1, 1) * PICK(((const double[]){1, 10, 100, 1e4})));
            kvq_swiglu(kernel, x, n, out);
            for (int i = 0; i < n; i++) {
                const double up = x[n + i], expected = x[i] / (1 + exp(-(double)x[i])) * up;
                if (!(fabs(out[i] - expected) <= 1e-6 * fabs(expected) + 1e-30 * fabs(up)))
                    fail("%s: swiglu of %g is %g, expected %g", kvq_kernel_name(kernel), x[i], out[i] / up,
                         expected / up);
            }
            free(x), free(out);
        }
}

/* Residual sum and RMS norm against double precision: every row length, tiny and huge values. */
static void check_add_norm(void) {
    for (int n = 1; n <= 70; n++)
        for (int kernel = 0; kernel < kvq_kernels(); kernel++) {
            if (!is_checked(kernel)) continue;
            float *x = exactly(sizeof(float) * n), *y = exactly(sizeof(float) * n), *gain = exactly(sizeof(float) * n);
            float *sum = exactly(sizeof(float) * n), *normed = exactly(sizeof(float) * n);
            const double size = PICK(((const double[]){0, 1e-6, 1, 1e4})), epsilon = PICK(((const double[]){1e-6, 1e-2}));
            double squares = 0;
            for (int i = 0; i < n; i++) {
                x[i] = (float)uniform(-size, size), y[i] = (float)uniform(-size, size), gain[i] = (float)uniform(-2, 2);
                squares += (double)(x[i] + y[i]) * (x[i] + y[i]);
            }
            kvq_add_norm(kernel, x, y, gain, n, (float)epsilon, sum, normed);
            for (int i = 0; i < n; i++) {
                const double expected = gain[i] * (double)(x[i] + y[i]) / sqrt(squares / n + (float)epsilon);
                if (sum[i] != x[i] + y[i] || !(fabs(normed[i] - expected) <= 1e-6 * fabs(expected)))
                    fail("%s: add_norm of %d values: %g, %g, expected %g, %g", kvq_kernel_name(kernel), n, sum[i],
                         normed[i], x[i] + y[i], expected);
            }
            free(x), free(y), free(gain), free(sum), free(normed);
        }
}

/* What in_basis makes of a key or a query, in place. */
static void expect_basis(double *x, const kvq_key_basis *basis, int kv_head, int is_key, int d) {
    double more[256] = {0};
    for (int c = 0; c < d; c++) {
        const double scale = basis->scale[kv_head * d + c];
        x[c] = is_key ? x[c] * scale : x[c] / scale;
    }
    for (int j = kv_head * basis->rank; j < (kv_head + 1) * basis->rank; j++) {
        const double stretch = basis->stretch[j];
        double along = 0;
        for (int c = 0; c < d; c++) along += x[c] * basis->axes[j * d + c];
        for (int c = 0; c < d; c++) more[c] += ((is_key ? stretch : 1 / stretch) - 1) * along * basis->axes[j * d + c];
    }
    for (int c = 0; c < d; c++) x[c] += more[c];
}

/* Rotary embedding, basis, rotation, centring. */
static void check_prepare(int kernel) {
    static const int dims[] = {8, 24, 64, 128, 256};
    for (int i = 0; i < 8 * LENGTH(dims); i++) {
        const int d = dims[i / 8], half = d / 2, heads = 4, kv_heads = 2, tokens = 2, rotate = d & (d - 1) ? 0 : i % 4;
        float *qkv = random_rows(tokens, (heads + 2 * kv_heads) * d, (heads + 2 * kv_heads) * d);
        float *cosine = random_rows(tokens, half, half), *sine = random_rows(tokens, half, half);
        float *mean = random_rows(kv_heads, d, d), *out = exactly(sizeof(float) * tokens * (heads + 2 * kv_heads) * d);
        const int rank = i % 4;
        float *scale = random_rows(kv_heads, d, d), *axes = random_rows(kv_heads * rank, d, d);
        float *stretch = exactly(sizeof(float) * kv_heads * rank);
        for (int k = 0; k < kv_heads * rank; k++) stretch[k] = (float)uniform(0.5, 2);
        for (int k = 0; k < kv_heads * d; k++) scale[k] = copysignf(0.5f + fabsf(scale[k]), scale[k]);
        for (int k = 0; k < kv_heads * rank * d; k++) axes[k] /= sqrtf((float)d);
        const int based = i / 4 % 2;
        const kvq_key_basis basis = {based ? scale : NULL, axes, stretch, rank};
        const kvq_prepare prepare = {qkv, cosine, sine, mean, basis, out, heads, kv_heads, d, rotate, kernel};
        for (int n = tokens * (heads + kv_heads); n-- > 0;) {
            const int h = n % (heads + kv_heads);
            kvq_choose_kernel(kernel)->prepare(&prepare, n / (heads + kv_heads), h, h + 1);
        }
        const int prepared = heads + kv_heads * (rotate & 2 ? 2 : 1);
        double worst = 0;
        for (int t = 0; t < tokens; t++)
            for (int h = 0; h < prepared; h++) {
                const int value = h >= heads + kv_heads, turn = value ? rotate & 2 : rotate & 1;
                const float *x = qkv + (t * (heads + 2 * kv_heads) + h) * d;
                double turned[256], rotated[256];
                for (int c = 0; c < half; c++) {
                    const double a = x[c], b = x[half + c];
                    turned[c] = value ? a : a * cosine[t * half + c] - b * sine[t * half + c];
                    turned[half + c] = value ? b : b * cosine[t * half + c] + a * sine[t * half + c];
                }
                if (based && !value) expect_basis(turned, &basis, h < heads ? h / (heads / kv_heads) : h - heads, h >= heads, d);
                for (int c = 0; c < d; c++) {
                    rotated[c] = turn ? 0 : turned[c];
                    for (int k = 0; turn && k < d; k++) /* Sylvester's matrix */
                        rotated[c] += (__builtin_parity(c & k) ? -turned[k] : turned[k]) / sqrt(d);
                    if (h >= heads && !value) rotated[c] -= mean[(h - heads) * d + c];
                    worst = fmax(worst, fabs(out[(t * prepared + h) * d + c] - rotated[c]));
                }
            }
        if (!(worst < (based ? 1e-4 : 1e-5)))
            fail("%s: prepare: error %g; head_dim %d, rotate %d, basis %d", kvq_kernel_name(kernel), worst, d, rotate, based);
        free(scale), free(axes), free(stretch);
        free(qkv), free(cosine), free(sine), free(mean), free(out);
    }
}

#endif
