/* Operators of onnxruntime's graphs. A graph names no memory: which session a run belongs to is set by the caller, in
 * its own thread, with kvq_set_pass. The work runs on onnxruntime's own threads: they spin between two nodes, and a
 * second pool would have to fight them for the cores. */
#include <stdlib.h>

#include "nodes.h"

#if defined(_MSC_VER)
#define THREAD_LOCAL __declspec(thread)
#else
#define THREAD_LOCAL _Thread_local
#endif

static THREAD_LOCAL const kvq_pass *current_pass;
static THREAD_LOCAL const kvq_move *current_move;
static THREAD_LOCAL int32_t refused; /* by what has stopped an operator, or the pass from being set */

int32_t kvq_set_pass(const kvq_pass *pass) {
    const int32_t before = refused;
    refused = pass ? kvq_check_pass(pass) : 0;
    current_pass = refused ? NULL : pass;
    return pass ? refused : before;
}

int32_t kvq_set_move(const kvq_move *move) {
    const int32_t before = refused;
    refused = move ? kvq_check_move(move, move->tokens) : 0;
    current_move = refused ? NULL : move;
    return move ? refused : before;
}

void kvq_refused_by(int32_t error) { refused = error; }

enum { ATTENTION_INPUTS_NEEDED = 4, ATTENTION_INPUTS = 7, CHAIN_INPUTS_NEEDED = 3 };

/* What has stopped an operator that works on the thread's pass. */
static void stopped(run *r, int error) {
    if (error == KVQ_MISFIT_INPUT) fail(r, MISFIT);
    else if (error != KVQ_NO_PASS) refuse(r, error);
    else if (refused) fail(r, kvq_error_text(refused));
    else fail(r, "kvq::Attention: no session has set a pass with this layer in this thread");
}

typedef struct {
    const kvq_pass *pass;
    const kvq_projected *rows;
    int error;
} attention_run;

static void lead_attention(void *data, kvq_parallel parallel, void *context) {
    attention_run *a = data;
    a->error = kvq_attend_projected(a->pass, a->rows, parallel, context);
}

/* kvq::Attention: over the stores of the thread's passes.
 *   qkv [tokens, (heads + 2 kv_heads) * head_dim], cosine and sine [tokens, head_dim / 2], mean_key [kv_heads, head_dim],
 *   and perhaps scale, axes and stretch of a kvq_key_basis -> [tokens, heads * head_dim];
 *   attributes layer, rotate (of KVQ_ROTATE_...) */
static OrtStatus *attention(void *state, OrtKernelContext *context) {
    const node *self = state;
    const kvq_pass *pass = current_pass;
    run r = {self->api, context, NULL};
    if (!kvq_has_layer(pass, self->layer)) {
        stopped(&r, KVQ_NO_PASS);
        return r.status;
    }
    const size_t inputs = inputs_of(&r), tokens = (size_t)kvq_tokens_of(pass), columns = (size_t)pass->heads * pass->head_dim;
    if (!r.status && inputs != ATTENTION_INPUTS && inputs != ATTENTION_INPUTS_NEEDED) fail(&r, MISFIT);
    kvq_input input[ATTENTION_INPUTS] = {{NULL, 0}};
    for (size_t i = 0; i < inputs && !r.status; i++) input[i] = input_of(&r, i);
    kvq_projected rows = {
        input[0], input + 1, (int32_t)inputs - 1, (int32_t)self->layer, (int32_t)self->rotate, NULL, tokens, columns};
    rows.out = output(&r, 0, (int64_t)tokens, (int64_t)columns);
    if (r.status) return r.status;
    attention_run work = {pass, &rows, 0};
    run_in_team(&r, tokens, pass->threads, (led_work){lead_attention, &work});
    if (work.error) stopped(&r, work.error);
    return r.status;
}

typedef struct {
    const kvq_chain *chain;
    const kvq_chain_shape *shape;
    const kvq_chain_rows *rows;
    int error;
} chain_run;

static void lead_chain(void *data, kvq_parallel parallel, void *context) {
    chain_run *c = data;
    c->error = kvq_run_chain(c->chain, c->shape, c->rows, parallel, context);
}

/* kvq::Chain: x [tokens, k], a residual stream [tokens, n] and what the steps take besides, one after the other: the gains [n] of
 * each that adds to the stream, of attention what its operator takes behind qkv -> the residual stream and what the steps make of
 * x, [tokens, n] and [tokens, m];  attribute chain, the address of a kvq_chain, which no file has: the runtime puts such nodes
 * into a graph that it has read, see runtime/bundle/chaining.py. */
static OrtStatus *chain(void *state, OrtKernelContext *context) {
    const node *self = state;
    run r = {self->api, context, NULL};
    const kvq_chain_shape *shape = &self->shape;
    if (inputs_of(&r) != 2 + shape->inputs) fail(&r, "kvq: an input of a step is left out, or one too many");
    kvq_input *inputs = malloc(sizeof *inputs * shape->inputs);
    if (!inputs) refuse(&r, KVQ_NO_MEMORY);
    for (size_t i = 0; i < shape->inputs && !r.status; i++) inputs[i] = input_of(&r, 2 + i);
    size_t count;
    kvq_chain_rows rows = {.x = input(&r, 0, &count), .input = inputs, .pass = current_pass};
    if (!r.status && count % shape->in) fail(&r, MISFIT);
    rows.rows = count / shape->in;
    rows.residual = floats(&r, 1, (int64_t)(rows.rows * shape->residual));
    rows.sum = output(&r, 0, (int64_t)rows.rows, (int64_t)shape->residual);
    rows.out = output(&r, 1, (int64_t)rows.rows, (int64_t)shape->out);
    if (!r.status) {
        chain_run work = {(const kvq_chain *)(uintptr_t)self->chain, shape, &rows, 0};
        run_in_team(&r, rows.rows, work.chain->threads, (led_work){lead_chain, &work});
        if (work.error) stopped(&r, work.error);
    }
    free(inputs);
    return r.status;
}

typedef struct {
    const kvq_move *move;
    int failed;
} moved_layers;

static void move_work(void *data, size_t layer) {
    moved_layers *m = data;
    if (kvq_move_layers(m->move, (int)layer, (int)layer + 1)) __atomic_store_n(&m->failed, 1, __ATOMIC_RELAXED);
}

/* kvq::Move: the thread's move, on onnxruntime's threads, which spin for a while after a pass and would be in the way of
 * any others. Its input says nothing, [1] -> [1]. */
static OrtStatus *move(void *state, OrtKernelContext *context) {
    const node *self = state;
    run r = {self->api, context, NULL};
    moved_layers layers = {.move = current_move};
    float *out = output(&r, 0, 1, 1);
    if (!layers.move) fail(&r, "kvq::Move: no move was set in this thread");
    if (r.status) return r.status;
    *out = 0;
    if (layers.move->tokens > 0) run_on_pool(&r, move_work, (size_t)layers.move->layers, &layers);
    if (layers.failed) refuse(&r, KVQ_NO_MEMORY);
    return r.status;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **state);

static const char *attention_name(const OrtCustomOp *op) { (void)op; return "Attention"; }
static const char *add_norm_name(const OrtCustomOp *op) { (void)op; return "AddNorm"; }
static const char *chain_name(const OrtCustomOp *op) { (void)op; return "Chain"; }
static const char *move_name(const OrtCustomOp *op) { (void)op; return "Move"; }
static const char *product_name(const OrtCustomOp *op) { (void)op; return "Product"; }
static const char *swiglu_name(const OrtCustomOp *op) { (void)op; return "SwiGLU"; }
static const char *any_provider(const OrtCustomOp *op) { (void)op; return NULL; }
static int float_type(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_FLOAT; }
static int zero(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return 0; } /* required; default memory */
static size_t one(const OrtCustomOp *op) { (void)op; return 1; }
static size_t two(const OrtCustomOp *op) { (void)op; return 2; }
static size_t three(const OrtCustomOp *op) { (void)op; return 3; }
static int variadic_of_chain(const OrtCustomOp *op, size_t i) { (void)op; return i + 1 == CHAIN_INPUTS_NEEDED ? ORT_VARIADIC : 0; }
static int at_least_one(const OrtCustomOp *op) { (void)op; return 1; }
static size_t inputs_of_attention(const OrtCustomOp *op) { (void)op; return ATTENTION_INPUTS; }
static int optional_of_attention(const OrtCustomOp *op, size_t i) { (void)op; return i >= ATTENTION_INPUTS_NEEDED; }

#define OPERATOR(get_name, inputs, characteristic, outputs, run_it)                                         \
    {                                                                                                            \
        .version = ORT_API_VERSION, .GetName = get_name, .GetExecutionProviderType = any_provider,               \
        .GetInputType = float_type, .GetInputTypeCount = inputs, .GetOutputType = float_type,                          \
        .GetOutputTypeCount = outputs, .KernelDestroy = free, .GetInputCharacteristic = characteristic,          \
        .GetOutputCharacteristic = zero, .GetInputMemoryType = zero, .CreateKernelV2 = create,                   \
        .KernelComputeV2 = run_it, .GetVariadicInputMinArity = at_least_one,                                     \
        .GetVariadicInputHomogeneity = at_least_one,                                                             \
    }
static const OrtCustomOp ATTENTION =
    OPERATOR(attention_name, inputs_of_attention, optional_of_attention, one, attention);
static const OrtCustomOp SWIGLU = OPERATOR(swiglu_name, one, zero, one, kvq_node_swiglu);
static const OrtCustomOp ADD_NORM = OPERATOR(add_norm_name, three, zero, two, kvq_node_add_norm);
static const OrtCustomOp MOVE = OPERATOR(move_name, one, zero, one, move);
static const OrtCustomOp PRODUCT = OPERATOR(product_name, one, zero, one, kvq_node_product);
static const OrtCustomOp CHAIN = OPERATOR(chain_name, three, variadic_of_chain, two, chain);

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **state) {
    node *self = calloc(1, sizeof *self);
    if (!self) return CreateStatus(api)(ORT_FAIL, "kvq: no memory");
    self->api = api;
    OrtStatus *status = NULL;
    if (op == &ATTENTION) {
        status = KernelInfoGetAttribute_int64(api)(info, "layer", &self->layer);
        if (!status) status = KernelInfoGetAttribute_int64(api)(info, "rotate", &self->rotate);
    } else if (op == &PRODUCT) {
        status = KernelInfoGetAttribute_int64(api)(info, "matrix", &self->matrix);
        if (!status) status = KernelInfoGetAttribute_int64(api)(info, "kernel", &self->kernel);
        if (!status && kvq_check_matrix((int32_t)self->kernel, (const kvq_matrix *)(uintptr_t)self->matrix))
            status = CreateStatus(api)(ORT_FAIL, "kvq::Product: a matrix that is none");
    } else if (op == &CHAIN) {
        status = KernelInfoGetAttribute_int64(api)(info, "chain", &self->chain);
        if (!status && kvq_check_chain((const kvq_chain *)(uintptr_t)self->chain, &self->shape))
            status = CreateStatus(api)(ORT_FAIL, "kvq::Chain: steps that do not fit together");
    } else {
        OrtStatus *left_out = KernelInfoGetAttribute_int64(api)(info, "block", &self->block);
        if (left_out) ReleaseStatus(api)(left_out);
    }
    if (op == &ADD_NORM) status = KernelInfoGetAttribute_float(api)(info, "epsilon", &self->epsilon);
    if (status) free(self);
    else *state = self;
    return status;
}

/* Called by onnxruntime for every set of session options that names this library. */
KVQ_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    OrtCustomOpDomain *domain = NULL; /* stays for the life of the process: sessions keep referring to it */
    OrtStatus *status = CreateCustomOpDomain(api)("kvq", &domain);
    if (!status) status = CustomOpDomain_Add(api)(domain, &ATTENTION);
    if (!status) status = CustomOpDomain_Add(api)(domain, &SWIGLU);
    if (!status) status = CustomOpDomain_Add(api)(domain, &ADD_NORM);
    if (!status) status = CustomOpDomain_Add(api)(domain, &PRODUCT);
    if (!status) status = CustomOpDomain_Add(api)(domain, &CHAIN);
    if (!status) status = CustomOpDomain_Add(api)(domain, &MOVE);
    if (!status) status = AddCustomOpDomain(api)(options, domain);
    return status;
}
