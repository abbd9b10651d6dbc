/* The operator kvq::Attention: attention over the session's store as a node of onnxruntime's graph.
 *
 *   query_key float [tokens, heads + kv_heads, head_dim], value float [tokens, kv_heads, head_dim]
 *   -> attention float [tokens, heads * head_dim];  attribute layer
 *
 * A graph names no memory: which session a run belongs to is set by the caller, in its own thread, with kvq_set_pass.
 * The work runs on onnxruntime's own threads: they spin between two nodes, and a second pool would have to fight them. */
#include <stdlib.h>

#include "kvq.h"
#include "onnxruntime_abi.h"

#if defined(_MSC_VER)
#define THREAD_LOCAL __declspec(thread)
#else
#define THREAD_LOCAL _Thread_local
#endif

static THREAD_LOCAL const kvq_pass *current_pass;

void kvq_set_pass(const kvq_pass *pass) { current_pass = pass; }
const kvq_pass *kvq_current_pass(void) { return current_pass; }

typedef struct {
    const OrtApi *api;
    int64_t layer;
} attention_kernel;

typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    OrtStatus *status;
} pool;

static void run_on_pool(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    pool *p = context;
    /* As many batches as items: the threads then take them one by one. */
    p->status = KernelContext_ParallelFor(p->api)(p->context, work, count, count, data);
}

/* Data of an input whose shape is [tokens, heads, head_dim]; null with a status otherwise. */
static const float *input(const attention_kernel *kernel, OrtKernelContext *context, size_t index, const int64_t *shape,
                          OrtStatus **status) {
    const OrtApi *api = kernel->api;
    const OrtValue *value = NULL;
    OrtShapeInfo *info = NULL;
    int64_t found[3];
    size_t rank = 0;
    void *data = NULL;
    if ((*status = KernelContext_GetInput(api)(context, index, &value))) return NULL;
    if ((*status = GetTensorTypeAndShape(api)(value, &info))) return NULL;
    *status = GetDimensionsCount(api)(info, &rank);
    if (!*status && rank == 3) *status = GetDimensions(api)(info, found, 3);
    ReleaseShapeInfo(api)(info);
    if (*status) return NULL;
    if (rank != 3 || found[0] != shape[0] || found[1] != shape[1] || found[2] != shape[2]) {
        *status = CreateStatus(api)(ORT_FAIL, "kvq::Attention: an input does not have the session's shape");
        return NULL;
    }
    if ((*status = GetTensorMutableData(api)((OrtValue *)value, &data))) return NULL;
    return data;
}

static OrtStatus *compute(void *state, OrtKernelContext *context) {
    const attention_kernel *kernel = state;
    const OrtApi *api = kernel->api;
    const kvq_pass *pass = current_pass;
    OrtStatus *status = NULL;
    if (!pass || kernel->layer < 0 || kernel->layer >= pass->layers)
        return CreateStatus(api)(ORT_FAIL, "kvq::Attention: no session has set a pass with this layer in this thread");

    const int64_t both[3] = {pass->tokens, pass->heads + pass->kv_heads, pass->head_dim};
    const int64_t values[3] = {pass->tokens, pass->kv_heads, pass->head_dim};
    const float *query = input(kernel, context, 0, both, &status);
    if (status) return status;
    const float *value = input(kernel, context, 1, values, &status);
    if (status) return status;
    const int64_t shape[2] = {pass->tokens, (int64_t)pass->heads * pass->head_dim};
    OrtValue *output = NULL;
    void *out = NULL;
    if ((status = KernelContext_GetOutput(api)(context, 0, shape, 2, &output))) return status;
    if ((status = GetTensorMutableData(api)(output, &out))) return status;

    const kvq_rows rows = {
        .query = query,
        .key = query + (size_t)pass->heads * pass->head_dim,
        .value = value,
        .out = out,
        .query_stride = (ptrdiff_t)both[1] * both[2],
        .key_stride = (ptrdiff_t)both[1] * both[2],
        .value_stride = (ptrdiff_t)values[1] * values[2],
        .row_squares = kernel->layer == pass->layers - 1 ? pass->row_squares : NULL,
    };
    pool threads = {api, context, NULL};
    if (kvq_attend(pass, (int32_t)kernel->layer, &rows, run_on_pool, &threads))
        return CreateStatus(api)(ORT_FAIL, "kvq::Attention: no memory");
    return threads.status;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **state) {
    (void)op;
    attention_kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) return CreateStatus(api)(ORT_FAIL, "kvq::Attention: no memory");
    kernel->api = api;
    OrtStatus *status = KernelInfoGetAttribute_int64(api)(info, "layer", &kernel->layer);
    if (status) free(kernel);
    else *state = kernel;
    return status;
}

static const char *name(const OrtCustomOp *op) { (void)op; return "Attention"; }
static const char *any_provider(const OrtCustomOp *op) { (void)op; return NULL; }
static int float_type(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return ORT_FLOAT; }
static int zero(const OrtCustomOp *op, size_t i) { (void)op, (void)i; return 0; } /* required; default memory */
static size_t two(const OrtCustomOp *op) { (void)op; return 2; }
static size_t one(const OrtCustomOp *op) { (void)op; return 1; }

static const OrtCustomOp ATTENTION = {
    .version = ORT_API_VERSION,
    .GetName = name,
    .GetExecutionProviderType = any_provider,
    .GetInputType = float_type,
    .GetInputTypeCount = two,
    .GetOutputType = float_type,
    .GetOutputTypeCount = one,
    .KernelDestroy = free,
    .GetInputCharacteristic = zero,
    .GetOutputCharacteristic = zero,
    .GetInputMemoryType = zero,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
};

/* Called by onnxruntime for every session option set that names this library. */
KVQ_EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    OrtCustomOpDomain *domain = NULL; /* stays for the life of the process: sessions keep referring to it */
    OrtStatus *status = CreateCustomOpDomain(api)("kvq", &domain);
    if (!status) status = CustomOpDomain_Add(api)(domain, &ATTENTION);
    if (!status) status = AddCustomOpDomain(api)(options, domain);
    return status;
}
