/* The few entries of onnxruntime's C interface that a custom operator needs.
 *
 * The interface is a table of functions that only ever grows at its end, so a position never changes its meaning;
 * the positions below are those of the public header onnxruntime_c_api.h, API version 23 (onnxruntime 1.23). */
#ifndef KVQ_ONNXRUNTIME_ABI_H
#define KVQ_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_API_VERSION = 23, ORT_FAIL = 1, ORT_FLOAT = 1 /* element type */, ORT_VARIADIC = 2 /* input */ };

typedef struct OrtStatus OrtStatus;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtShapeInfo OrtShapeInfo; /* OrtTensorTypeAndShapeInfo */

typedef struct {
    void (*functions[319])(void);
} OrtApi;

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

#define ORT(api, position, result, ...) ((result(*)(__VA_ARGS__))(api)->functions[position])

#define CreateStatus(api) ORT(api, 0, OrtStatus *, int, const char *)
#define CreateCustomOpDomain(api) ORT(api, 26, OrtStatus *, const char *, OrtCustomOpDomain **)
#define CustomOpDomain_Add(api) ORT(api, 27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)
#define AddCustomOpDomain(api) ORT(api, 28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)
#define GetTensorMutableData(api) ORT(api, 51, OrtStatus *, OrtValue *, void **)
#define GetDimensionsCount(api) ORT(api, 61, OrtStatus *, const OrtShapeInfo *, size_t *)
#define GetDimensions(api) ORT(api, 62, OrtStatus *, const OrtShapeInfo *, int64_t *, size_t)
#define GetTensorTypeAndShape(api) ORT(api, 65, OrtStatus *, const OrtValue *, OrtShapeInfo **)
#define KernelInfoGetAttribute_float(api) ORT(api, 85, OrtStatus *, const OrtKernelInfo *, const char *, float *)
#define KernelInfoGetAttribute_int64(api) ORT(api, 86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *)
#define KernelContext_GetInputCount(api) ORT(api, 88, OrtStatus *, const OrtKernelContext *, size_t *)
#define KernelContext_GetInput(api) ORT(api, 90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)
#define KernelContext_GetOutput(api) \
    ORT(api, 91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define ReleaseStatus(api) ORT(api, 93, void, OrtStatus *)
#define ReleaseShapeInfo(api) ORT(api, 99, void, OrtShapeInfo *)
#define KernelContext_ParallelFor(api) \
    ORT(api, 274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)
#define GetTensorSizeInBytes(api) ORT(api, 318, OrtStatus *, const OrtValue *, size_t *)

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, void *);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
    /* From version 18 on; null where there is nothing to say. */
    void *GetMayInplace, *ReleaseMayInplace, *GetAliasMap, *ReleaseAliasMap;
};

#endif
