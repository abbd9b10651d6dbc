/* Everything a kernel consists of, compiled by its file for one instruction set. */
#include "fed_lanes.h"
#include "matrix.h"
#include "move.h"
#include "norm.h"
#include "prefill.h"
#include "prepare.h"
#include "query.h"
#include "swiglu.h"
#include "turns.h"

#define KERNEL(symbol, label, check, dot_products) KERNEL_WITH(symbol, label, check, dot_products, multiply, decode_each, needs_none)
#define KERNEL_WITH(symbol, label, check, dot_products, products, rows, rows_memory) \
    const kvq_kernel symbol = {.name = label,                      \
                               .available = check,                 \
                               .integer_dot = dot_products,        \
                               .decode = decode_item,              \
                               .decode_rows = rows,                \
                               .rows_bytes = rows_memory,          \
                               .query = prepare_query,             \
                               .turn = turned_products,            \
                               .merge = merge_head,                \
                               .prefill = prefill_item,            \
                               .prepare = prepare_heads,           \
                               .rotate = rotate_heads,             \
                               .swiglu = swiglu_row,               \
                               .add_norm = add_norm_row,           \
                               .quantize = quantize_row,           \
                               .product = products,                \
                               .product_panels = PART_PANELS,      \
                               .weight_offset = weight_offset,     \
                               .own_products = own_products,       \
                               .move = move_tokens,                \
                               .leave_rows = leave_rows,           \
                               .enter_row = enter_row,             \
                               .within = within,                   \
                               .encode = encode_vectors}
