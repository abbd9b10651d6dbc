/* Attention of a layer from what its projection yields, as operators have it. */
#include <stdlib.h>

#include "drivers.h"

int kvq_has_layer(const kvq_pass *pass, int64_t layer) { return pass && layer >= 0 && layer < pass->layers; }

/* Whether inputs have the sizes that the pass asks for; fills `prepare` but for its memory. */
static int take_inputs(const kvq_pass *pass, const kvq_projected *rows, kvq_prepare *prepare) {
    const size_t d = pass->head_dim, tokens = (size_t)kvq_tokens_of(pass), channels = pass->kv_heads * d;
    const size_t wanted[] = {tokens * (d / 2), tokens * (d / 2), channels, channels};
    if (rows->qkv.count != tokens * ((size_t)pass->heads * d + 2 * channels)) return KVQ_MISFIT_INPUT;
    if (rows->rows != tokens || rows->columns != pass->heads * d) return KVQ_MISFIT_INPUT;
    for (int i = 0; i < rows->inputs && i < 4; i++)
        if (rows->input[i].count != wanted[i]) return KVQ_MISFIT_INPUT;
    *prepare = (kvq_prepare){
        .qkv = rows->qkv.data,
        .cosine = rows->input[0].data,
        .sine = rows->input[1].data,
        .mean_key = rows->input[2].data,
        .heads = pass->heads,
        .kv_heads = pass->kv_heads,
        .head_dim = pass->head_dim,
        .rotate = d & (d - 1) ? 0 : rows->rotate & (KVQ_ROTATE_KEYS | KVQ_ROTATE_VALUES),
        .kernel = pass->kernel,
    };
    if (rows->inputs < 6) return 0;
    const kvq_input axes = rows->input[4], stretch = rows->input[5];
    const size_t rank = stretch.count / pass->kv_heads;
    if (rank > d || stretch.count % pass->kv_heads || axes.count != channels * rank) return KVQ_MISFIT_INPUT;
    prepare->basis = (kvq_key_basis){rows->input[3].data, axes.data, stretch.data, (int32_t)rank};
    return 0;
}

typedef struct {
    float *x; /* [tokens, heads, head_dim] */
    size_t heads;
    int32_t head_dim, kernel;
} turned_rows;

static void turn_back(void *data, size_t token) {
    const turned_rows *t = data;
    kvq_rotate_heads(t->kernel, t->x + token * t->heads * t->head_dim, t->heads, t->head_dim);
}

int kvq_attend_projected(const kvq_pass *pass, const kvq_projected *rows, kvq_parallel parallel, void *context) {
    if (!kvq_has_layer(pass, rows->layer)) return KVQ_NO_PASS;
    kvq_prepare prepare;
    int failed = take_inputs(pass, rows, &prepare);
    if (failed) return failed;
    const size_t d = pass->head_dim, tokens = (size_t)kvq_tokens_of(pass), both = (size_t)pass->heads + pass->kv_heads;
    const size_t prepared = (size_t)kvq_prepared_heads(&prepare);
    const int turned = prepare.rotate & KVQ_ROTATE_VALUES, back = turned && !(rows->rotate & KVQ_STAY_ROTATED);
    if (!(prepare.out = malloc(sizeof(float) * tokens * prepared * d))) return KVQ_NO_MEMORY;
    const kvq_rows made = {
        .query = prepare.out,
        .key = prepare.out + pass->heads * d,
        .value = (turned ? prepare.out : prepare.qkv) + both * d,
        .out = rows->out,
        .query_stride = (ptrdiff_t)(prepared * d),
        .key_stride = (ptrdiff_t)(prepared * d),
        .value_stride = (ptrdiff_t)((turned ? prepared : both + pass->kv_heads) * d),
    };
    failed = kvq_prepare_and_attend(pass, rows->layer, &made, &prepare, parallel, context);
    free(prepare.out);
    if (back && !failed)
        parallel(context, turn_back, tokens, &(turned_rows){rows->out, (size_t)pass->heads, pass->head_dim, pass->kernel});
    return failed;
}
