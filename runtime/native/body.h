/* Everything a kernel consists of, compiled by its file for one instruction set. */
#include "encode.h"
#include "move.h"
#include "prefill.h"
#include "swiglu.h"

#define KERNEL(symbol, label, check, dot_products)                 \
    const kvq_kernel symbol = {.name = label,                      \
                               .available = check,                 \
                               .integer_dot = dot_products,        \
                               .decode = decode_item,              \
                               .prefill = prefill_item,            \
                               .swiglu = swiglu_row,               \
                               .move = move_token,                 \
                               .encode = encode_vectors}
