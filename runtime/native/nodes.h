/* What the nodes of onnxruntime's graphs have in common: their attributes, and one run of them. */
#ifndef KVQ_NODES_H
#define KVQ_NODES_H

#include "drivers.h"
#include "onnxruntime_abi.h"

/* A node: its attributes. */
typedef struct {
    const OrtApi *api;
    int64_t layer, rotate; /* of Attention */
    int64_t block;         /* of the others: size of the blocks of a row that they rotate, or 0 */
    float epsilon;         /* of AddNorm */
    int64_t matrix, kernel; /* of Product: address of a kvq_matrix, packed for that kernel */
    int64_t chain;          /* of Chain: address of a kvq_chain */
    kvq_chain_shape shape;
} node;

/* One execution of a node. The first thing that goes wrong stays in status, and what follows does nothing. */
typedef struct {
    const OrtApi *api;
    OrtKernelContext *context;
    OrtStatus *status;
} run;

#define MISFIT "kvq: an input does not have the shape that the session's pass or another input asks for"

static inline void fail(run *r, const char *why) {
    if (!r->status) r->status = CreateStatus(r->api)(ORT_FAIL, why);
}

/* The same for an error of the library, which kvq_set_pass tells again: `refused` is of operators.c. */
void kvq_refused_by(int32_t error);
static inline void refuse(run *r, int32_t error) {
    kvq_refused_by(error);
    fail(r, kvq_error_text(error));
}

/* Data of an input and how many floats it has; null when there is none such. Asking for a shape takes three more calls
 * and an allocation, which 200 nodes of a step would make for every input; what is read depends on the count alone. */
static inline const float *input(run *r, size_t index, size_t *count) {
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

static inline kvq_input input_of(run *r, size_t index) {
    kvq_input found;
    found.data = input(r, index, &found.count);
    return found;
}

static inline size_t inputs_of(run *r) {
    size_t inputs = 0;
    if (!r->status) r->status = KernelContext_GetInputCount(r->api)(r->context, &inputs);
    return inputs;
}

/* The same as `input` for one that has to have so many. */
static inline const float *floats(run *r, size_t index, int64_t wanted) {
    size_t count;
    const float *data = input(r, index, &count);
    if (!r->status && (wanted < 0 || count != (size_t)wanted)) fail(r, MISFIT);
    return r->status ? NULL : data;
}

/* The number of columns of an input that is a matrix. */
static inline int64_t columns_of(run *r, size_t index) {
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

static inline float *output(run *r, size_t index, int64_t rows, int64_t columns) {
    const int64_t shape[2] = {rows, columns};
    OrtValue *value = NULL;
    void *data = NULL;
    if (!r->status) r->status = KernelContext_GetOutput(r->api)(r->context, index, shape, 2, &value);
    if (!r->status) r->status = GetTensorMutableData(r->api)(value, &data);
    return r->status ? NULL : data;
}

/* Run work items on onnxruntime's threads, which take them one by one: as many batches as items. */
static inline void run_on_pool(void *context, void (*work)(void *, size_t), size_t count, void *data) {
    run *r = context;
    if (count == 1) work(data, 0);
    else if (!r->status) r->status = KernelContext_ParallelFor(r->api)(r->context, work, count, count, data);
}

/* Up to so many rows, threads are lent to a node once; with more a piece of work is long enough to be worth lending them anew. */
enum { TEAM_ROWS = 8 };

/* Run work that needs threads again and again: lead(data, parallel, context) hands its pieces to `parallel`. */
typedef struct {
    void (*lead)(void *data, kvq_parallel parallel, void *context);
    void *data;
} led_work;
static void lead_team(kvq_team *team, void *led) {
    const led_work *l = led;
    l->lead(l->data, kvq_team_parallel, team);
}
static inline void run_in_team(run *r, size_t rows, int threads, led_work led) {
    if (rows > TEAM_ROWS || threads < 2) {
        led.lead(led.data, run_on_pool, r);
        return;
    }
    kvq_team team = {.lead = lead_team, .data = &led, .threads = (uint32_t)threads};
    if (!r->status) r->status = KernelContext_ParallelFor(r->api)(r->context, kvq_join_team, team.threads, team.threads, &team);
}

/* Nodes of rows.c. */
OrtStatus *kvq_node_swiglu(void *state, OrtKernelContext *context);
OrtStatus *kvq_node_add_norm(void *state, OrtKernelContext *context);
OrtStatus *kvq_node_product(void *state, OrtKernelContext *context);

#endif
