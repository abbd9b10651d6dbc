/* Operators of onnxruntime's graphs. A graph names no memory: which session a run belongs to is set by the caller, in
 * its own thread, with kvq_set_pass. The work runs on onnxruntime's own threads: they spin between two nodes, and a
 * second pool would have to fight them for the cores. */
#include <stdlib.h>

#include "drivers.h"
#include "onnxruntime_abi.h"

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

enum { ATTENTION_INPUTS_NEEDED = 4, ATTENTION_INPUTS = 7, MOST_ROTATED = 1024 };

/* A node: its attributes. */
typedef struct {
    const OrtApi *api;
    int64_t layer, rotate; /* of Attention */
    int64_t block;         /* of the others: size of the blocks of a row that they rotate, or 0 */
    float epsilon;         /* of AddNorm */
    int64_t matrix, kernel; /* of Product: address of a kvq_matrix, packed for that kernel */
} node;

/* One execution of a node. The first thing that goes wrong stays in status, and what follows does nothing. */
typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    OrtStatus *status;
} run;

static const char MISFIT[] = "kvq: an input does not have the shape that the session's pass or another input asks for";

static void fail(run *r, const char *why) {
    if (!r->status) r->status = CreateStatus(r->api)(ORT_FAIL, why);
}

/* The same for an error of the library, which kvq_set_pass tells again. */
static void refuse(run *r, int32_t error) {
    refused = error;
    fail(r, kvq_error_text(error));
}

/* Data of an input and how many floats it has; null when there is none such. Asking for a shape takes three more calls
 * and an allocation, which 200 nodes of a step would make for every input; what is read depends on the count alone. */
static const float *input(run *r, size_t index, size_t *count) {
    const OrtApi *api = r->api;
    const OrtValue *value = NULL;
    void *data = NULL;
    *count = 0;
    if (!r->status) r->status = KernelContext_GetInput(api)(r->context, index, &value);
    if (!r->status && !value) fail(r, "kvq: an input is left out");
    if (!r->status) r->status = GetTensorSizeInBytes(api)(value, count);
    if (!r->status) r->status = GetTensorMutableData(api)((OrtValue *)value, &data);
    *count /= sizeof(float);
    return r->status ? NULL : data;
}

/* The same for an input that has to have so many. */
static const float *floats(run *r, size_t index, int64_t wanted) {
    size_t count;
    const float *data = input(r, index, &count);
    if (!r->status && (wanted < 0 || count != (size_t)wanted)) fail(r, MISFIT);
    return r->status ? NULL : data;
}

/* The number of columns of an input that is a matrix. */
static int64_t columns_of(run *r, size_t index) {
    const OrtApi *api = r->api;
    const OrtValue *value = NULL;
    OrtShapeInfo *info = NULL;
    size_t rank = 0;
    int64_t shape[2] = {0, 0};
    if (!r->status) r->status = KernelContext_GetInput(api)(r->context, index, &value);
    if (!r->status) r->status = GetTensorTypeAndShape(api)(value, &info);
    if (!r->status) r->status = GetDimensionsCount(api)(info, &rank);
    if (!r->status && rank != 2) fail(r, "kvq: an input is not a matrix");
    if (!r->status) r->status = GetDimensions(api)(info, shape, rank);
    if (info) ReleaseShapeInfo(api)(info);
    return shape[1];
}

static float *output(run *r, size_t index, int64_t rows, int64_t columns) {
    const int64_t shape[2] = {rows, columns};
    OrtValue *value = NULL;
    void *data = NULL;
    if (!r->status) r->status = KernelContext_GetOutput(r->api)(r->context, index, shape, 2, &value);
    if (!r->status) r->status = GetTensorMutableData(r->api)(value, &data);
    return r->status ? NULL : data;
}

/* Run work items on onnxruntime's threads, which take them one by one: as many batches as items. */
static void run_on_pool(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    run *r = context;
    if (count == 1) work(data, 0);
    else if (!r->status) r->status = KernelContext_ParallelFor(r->api)(r->context, work, count, count, data);
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

/* The last inputs of Attention, if it has them. */
static kvq_key_basis basis_of(run *r, const kvq_pass *pass) {
    size_t inputs = 0, stretches;
    if (!r->status) r->status = KernelContext_GetInputCount(r->api)(r->context, &inputs);
    if (inputs != ATTENTION_INPUTS && inputs != ATTENTION_INPUTS_NEEDED) fail(r, MISFIT);
    if (r->status || inputs == ATTENTION_INPUTS_NEEDED) return (kvq_key_basis){NULL};
    const int64_t channels = (int64_t)pass->kv_heads * pass->head_dim;
    kvq_key_basis basis = {.scale = floats(r, 4, channels), .stretch = input(r, 6, &stretches)};
    basis.rank = stretches / pass->kv_heads > (size_t)pass->head_dim ? -1 : (int32_t)(stretches / pass->kv_heads);
    if (!r->status && (basis.rank < 0 || stretches % pass->kv_heads)) fail(r, MISFIT);
    basis.axes = floats(r, 5, channels * basis.rank);
    return basis;
}

/* kvq::Attention: over the stores of the thread's passes.
 *   qkv [tokens, (heads + 2 kv_heads) * head_dim], cosine and sine [tokens, head_dim / 2], mean_key [kv_heads, head_dim],
 *   and perhaps scale, axes and stretch of a kvq_key_basis -> [tokens, heads * head_dim];
 *   attributes layer, rotate (of KVQ_ROTATE_...) */
static OrtStatus *attention(void *state, OrtKernelContext *context) {
    const node *self = state;
    const kvq_pass *pass = current_pass;
    run r = {self->api, context, NULL};
    if (!pass || self->layer < 0 || self->layer >= pass->layers) {
        if (refused) fail(&r, kvq_error_text(refused));
        fail(&r, "kvq::Attention: no session has set a pass with this layer in this thread");
        return r.status;
    }
    const int64_t d = pass->head_dim, tokens = kvq_tokens_of(pass), both = pass->heads + pass->kv_heads;
    kvq_prepare prepare = {
        .qkv = floats(&r, 0, tokens * (both + pass->kv_heads) * d),
        .cosine = floats(&r, 1, tokens * (d / 2)),
        .sine = floats(&r, 2, tokens * (d / 2)),
        .mean_key = floats(&r, 3, pass->kv_heads * d),
        .basis = basis_of(&r, pass),
        .heads = pass->heads,
        .kv_heads = pass->kv_heads,
        .head_dim = pass->head_dim,
        .rotate = d & (d - 1) ? 0 : (int32_t)(self->rotate & (KVQ_ROTATE_KEYS | KVQ_ROTATE_VALUES)),
        .kernel = pass->kernel,
    };
    float *out = output(&r, 0, tokens, pass->heads * d);
    const int64_t prepared = kvq_prepared_heads(&prepare);
    const int turned = prepare.rotate & KVQ_ROTATE_VALUES;
    if (!r.status && !(prepare.out = malloc(sizeof(float) * (size_t)(tokens * prepared * d))))
        refuse(&r, KVQ_NO_MEMORY);
    if (r.status) return r.status;

    const kvq_rows rows = {
        .query = prepare.out,
        .key = prepare.out + pass->heads * d,
        .value = (turned ? prepare.out : prepare.qkv) + both * d,
        .out = out,
        .query_stride = prepared * d,
        .key_stride = prepared * d,
        .value_stride = (both + pass->kv_heads) * d,
    };
    const int error = kvq_prepare_and_attend(pass, (int32_t)self->layer, &rows, &prepare, run_on_pool, &r);
    if (error) refuse(&r, error);
    free(prepare.out);
    if (turned && !r.status)
        run_on_pool(&r, turn_back, (size_t)tokens, &(turned_rows){out, (size_t)pass->heads, pass->head_dim, pass->kernel});
    return r.status;
}

/* The blocks that a node rotates of rows of so many columns: a power of two that divides them; 0: none. */
static size_t rotated_blocks(run *r, const node *self, int64_t columns) {
    const int64_t block = self->block;
    if (!r->status && block && (block < 0 || block > MOST_ROTATED || block & (block - 1) || columns % block))
        fail(r, "kvq: block is neither 0 nor a power of two up to 1024 that divides the columns");
    return r->status ? 0 : (size_t)block;
}

static void rotate_row(float *x, size_t columns, size_t block) {
    if (block) kvq_rotate_heads(-1, x, columns / block, (int32_t)block);
}

typedef struct {
    const float *x;
    float *out;
    size_t columns, block;
} swiglu_rows;

static void swiglu_work(void *data, size_t row) {
    const swiglu_rows *s = data;
    float *out = s->out + row * s->columns;
    kvq_swiglu(-1, s->x + row * 2 * s->columns, s->columns, out);
    rotate_row(out, s->columns, s->block);
}

/* kvq::SwiGLU: [tokens, 2 n] -> [tokens, n], silu of the first half times the second, every block of so many columns
 * times the Hadamard matrix;  attribute block, 0 if left out */
static OrtStatus *swiglu(void *state, OrtKernelContext *context) {
    const node *self = state;
    run r = {self->api, context, NULL};
    const int64_t both = columns_of(&r, 0);
    size_t count;
    swiglu_rows rows = {.x = input(&r, 0, &count), .columns = (size_t)both / 2};
    if (!r.status && both % 2) fail(&r, "kvq::SwiGLU: an odd number of columns");
    rows.block = rotated_blocks(&r, self, both / 2);
    const int64_t all_rows = both ? (int64_t)count / both : 0;
    rows.out = output(&r, 0, all_rows, both / 2);
    if (!r.status) run_on_pool(&r, swiglu_work, (size_t)all_rows, &rows);
    return r.status;
}

typedef struct {
    const float *x, *y, *gain;
    float *sum, *normed;
    size_t columns, block;
    float epsilon;
} norm_rows;

static void norm_work(void *data, size_t row) {
    const norm_rows *s = data;
    const size_t at = row * s->columns;
    kvq_add_norm(-1, s->x + at, s->y + at, s->gain, s->columns, s->epsilon, s->sum + at, s->normed + at);
    rotate_row(s->normed + at, s->columns, s->block);
}

/* kvq::AddNorm: x, y [tokens, n], gain [n] -> x + y and its RMS norm times gain, [tokens, n] each, of the norm every
 * block of so many columns times the Hadamard matrix;  attributes epsilon, and block, 0 if left out */
static OrtStatus *add_norm(void *state, OrtKernelContext *context) {
    const node *self = state;
    run r = {self->api, context, NULL};
    size_t count, columns;
    norm_rows rows = {.gain = input(&r, 2, &columns), .x = input(&r, 0, &count), .epsilon = self->epsilon};
    rows.y = floats(&r, 1, (int64_t)count);
    if (!r.status && (columns ? count % columns : count)) fail(&r, "kvq::AddNorm: not as many gains as columns");
    const int64_t all_rows = columns ? (int64_t)(count / columns) : 0;
    rows.columns = columns;
    rows.block = rotated_blocks(&r, self, (int64_t)columns);
    rows.sum = output(&r, 0, all_rows, (int64_t)columns);
    rows.normed = output(&r, 1, all_rows, (int64_t)columns);
    if (!r.status) run_on_pool(&r, norm_work, (size_t)all_rows, &rows);
    return r.status;
}

/* kvq::Product: x [rows, k] -> [rows, n], x times the transpose of a packed matrix;  attributes matrix, the address of a
 * kvq_matrix, and kernel, the number of that which it was packed for. No file has them: the runtime puts such nodes into a
 * graph that it has read, see runtime/bundle/renaming.py, and keeps the matrix for as long as the graph. */
static OrtStatus *product(void *state, OrtKernelContext *context) {
    const node *self = state;
    const kvq_matrix *m = (const kvq_matrix *)(uintptr_t)self->matrix;
    run r = {self->api, context, NULL};
    size_t count;
    const float *x = input(&r, 0, &count);
    if (!r.status && count % m->k) fail(&r, MISFIT);
    const size_t rows = count / m->k;
    float *out = output(&r, 0, (int64_t)rows, m->n);
    if (r.status) return r.status;
    const int error = kvq_product((int32_t)self->kernel, m, x, rows, out, run_on_pool, &r);
    if (error) refuse(&r, error);
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
static const char *move_name(const OrtCustomOp *op) { (void)op; return "Move"; }
static const char *product_name(const OrtCustomOp *op) { (void)op; return "Product"; }
static const char *swiglu_name(const OrtCustomOp *op) { (void)op; return "SwiGLU"; }
static const char *any_provider(const OrtCustomOp *op) { (void)op; return NULL; }
static int float_type(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_FLOAT; }
static int zero(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return 0; } /* required; default memory */
static size_t one(const OrtCustomOp *op) { (void)op; return 1; }
static size_t two(const OrtCustomOp *op) { (void)op; return 2; }
static size_t three(const OrtCustomOp *op) { (void)op; return 3; }
static size_t inputs_of_attention(const OrtCustomOp *op) { (void)op; return ATTENTION_INPUTS; }
static int optional_of_attention(const OrtCustomOp *op, size_t i) { (void)op; return i >= ATTENTION_INPUTS_NEEDED; }

#define OPERATOR(get_name, inputs, characteristic, outputs, run_it)                                         \
    {                                                                                                            \
        .version = ORT_API_VERSION, .GetName = get_name, .GetExecutionProviderType = any_provider,               \
        .GetInputType = float_type, .GetInputTypeCount = inputs, .GetOutputType = float_type,                          \
        .GetOutputTypeCount = outputs, .KernelDestroy = free, .GetInputCharacteristic = characteristic,          \
        .GetOutputCharacteristic = zero, .GetInputMemoryType = zero, .CreateKernelV2 = create,                   \
        .KernelComputeV2 = run_it,                                                                               \
    }
static const OrtCustomOp ATTENTION =
    OPERATOR(attention_name, inputs_of_attention, optional_of_attention, one, attention);
static const OrtCustomOp SWIGLU = OPERATOR(swiglu_name, one, zero, one, swiglu);
static const OrtCustomOp ADD_NORM = OPERATOR(add_norm_name, three, zero, two, add_norm);
static const OrtCustomOp MOVE = OPERATOR(move_name, one, zero, one, move);
static const OrtCustomOp PRODUCT = OPERATOR(product_name, one, zero, one, product);

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
    if (!status) status = CustomOpDomain_Add(api)(domain, &MOVE);
    if (!status) status = AddCustomOpDomain(api)(options, domain);
    return status;
}
