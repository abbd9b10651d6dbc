/* Pages as one layer has them, made before a kernel sees them: pages with room for less than a tile, whose layers share
 * tiles, become pages of whole tiles; those whose layers have precisions of their own, pages of one; narrow ones, which some layers have no part of, and what is outside of a layer's
 * window are left out. Kernels know nothing of it, but for prefill, whose rows see different tokens. */
#include <stdlib.h>
#include <string.h>

#include "drivers.h"

/* Whether some pages are not as kernels take them, in every layer alike. */
static int any_by_layer(const kvq_page *page, int pages) {
    for (int p = 0; p < pages; p++)
        if (kvq_shares_tiles(page + p) || page[p].layers) return 1;
    return 0;
}

kvq_page kvq_page_layer(const kvq_page *page, int layer, int as, int kv_heads, int head_dim) {
    kvq_page row = *page;
    int shared = 1, lane = 0;
    if (kvq_shares_tiles(page)) {
        shared = TILE / page->capacity;
        lane = layer % shared * page->capacity;
        row.capacity = row.end = TILE;
    }
    ptrdiff_t slots = (ptrdiff_t)(layer / shared - as) * kv_heads * row.capacity;
    if (page->layers) { /* begins with the layer itself */
        const kvq_layer_arrays *own = page->layers + layer;
        row.keys = own->keys, row.key_scales = own->key_scales, row.key_precision = own->key_precision;
        row.values = own->values, row.value_scales = own->value_scales, row.value_precision = own->value_precision;
        row.layers = NULL;
        slots = -(ptrdiff_t)as * kv_heads * row.capacity, lane = 0;
    }
    row.keys += slots * words_per_vector(row.key_precision, head_dim) + lane;
    row.values += (slots + lane) * words_per_vector(row.value_precision, head_dim);
    if (has_scale(row.key_precision)) row.key_scales += slots + lane;
    if (has_scale(row.value_precision)) row.value_scales += slots + lane;
    return row;
}

/* The row in which the vectors of `layer` are where they would be, had the page all layers; of a layer with a window it
 * has no token. */
static void widen(kvq_page *page, const int32_t *windows, int layer, int kv_heads, int head_dim) {
    int row = 0;
    for (int l = 0; l < layer; l++) row += !windows[l];
    if (windows[layer]) {
        page->count = page->first = 0;
        return;
    }
    if (page->layers) {
        *page = kvq_page_layer(page, layer, layer, kv_heads, head_dim);
        return;
    }
    const ptrdiff_t slots = (ptrdiff_t)(row - layer) * kv_heads * page->capacity;
    page->keys += slots * words_per_vector(page->key_precision, head_dim);
    page->values += slots * words_per_vector(page->value_precision, head_dim);
    if (has_scale(page->key_precision)) page->key_scales += slots;
    if (has_scale(page->value_precision)) page->value_scales += slots;
}

/* How many of a page's tokens stand before a position. */
static int tokens_before(const kvq_page *page, int position) {
    int low = 0, high = page->count;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (page->positions[middle] < position) low = middle + 1;
        else high = middle;
    }
    return low;
}

void kvq_cut_pages(kvq_page *page, int pages, int next, int window) {
    const int start = next - window + 1; /* the first position that is seen */
    for (int p = 0; start > 0 && p < pages; p++, page++) {
        if (!page->count) continue;
        if (!page->positions) { /* the ring of the newest tokens */
            if (window - 1 >= page->count) continue;
            page->count = window - 1;
            page->first = page->count ? start % page->period : 0;
            continue;
        }
        const int unseen = tokens_before(page, start), used = (page->count + TILE - 1) / TILE * TILE;
        if (!unseen) continue;
        page->count -= unseen;
        page->first = page->count ? unseen : 0;
        if (!page->count) continue;
        page->begin = unseen / TILE * TILE;
        if (used < page->end) page->end = used;
    }
}

int kvq_pass_of_layer(const kvq_pass *pass, int layer, kvq_layer_pass *own) {
    own->pass = *pass;
    own->page = NULL;
    if (!pass->windows && !any_by_layer(pass->page, pass->pages)) return 0;
    if (!(own->page = malloc(sizeof *own->page * ((size_t)pass->pages + 1)))) return KVQ_NO_MEMORY;
    if (pass->pages) memcpy(own->page, pass->page, sizeof *own->page * (size_t)pass->pages);
    for (int p = 0; p < pass->pages; p++) {
        if (pass->page[p].narrow) widen(own->page + p, pass->windows, layer, pass->kv_heads, pass->head_dim);
        else if (kvq_shares_tiles(pass->page + p) || pass->page[p].layers)
            own->page[p] = kvq_page_layer(pass->page + p, layer, layer, pass->kv_heads, pass->head_dim);
    }
    own->pass.page = own->page;
    if (pass->windows && pass->windows[layer] && !(pass->stepwise && pass->tokens > 1)) /* there each token sees others */
        kvq_cut_pages(own->page, pass->pages, pass->position, pass->windows[layer]);
    if (pass->stepwise) { /* of the same pages; its window is among those of whole tiles */
        own->stepwise = *pass->stepwise;
        own->stepwise.page = own->page;
        own->pass.stepwise = &own->stepwise;
    }
    return 0;
}

int kvq_move_layers(const kvq_move *move, int first, int end) {
    const kvq_kernel *kernel = kvq_choose_kernel(move->kernel);
    const int all = first == 0 && end == move->layers;
    if (all && !any_by_layer(move->page, move->pages)) return kernel->move(move), 0;
    kvq_page *page = malloc(sizeof *page * (size_t)move->pages);
    if (!page) return KVQ_NO_MEMORY;
    const size_t floats = (size_t)move->kv_heads * move->tokens * move->head_dim; /* of a layer */
    for (int layer = first; layer < end; layer++) {
        const kvq_page window = kvq_page_layer(move->window, layer, 0, move->kv_heads, move->head_dim);
        for (int p = 0; p < move->pages; p++)
            page[p] = kvq_page_layer(move->page + p, layer, 0, move->kv_heads, move->head_dim);
        kvq_move own = *move;
        own.layers = 1;
        own.keys += layer * floats, own.values += layer * floats;
        if (own.feedback) own.feedback += (size_t)layer * move->kv_heads * move->head_dim * move->head_dim;
        if (own.turned) own.turned += (size_t)layer * move->kv_heads * move->turn_blocks * move->head_dim;
        own.window = &window, own.page = page;
        kernel->move(&own);
    }
    free(page);
    return 0;
}
