/* prepare.cuh: checks a layer form, computes its sizes, and fills in the descriptors of its
   stations, for block_layer.cuh. One function, moei_block_layer_plan, gives both sizes and
   launches. */
#ifndef MOE_BLOCK_LAYER_PREPARE_CUH
#define MOE_BLOCK_LAYER_PREPARE_CUH

#include "../block_sparse.cuh"
#include "../block_sparse/list.cuh"
#include "../combine.cuh"
#include "../fields.h"
#include "../gemm/desc.h"
#include "../permute.cuh"
#include "../route.cuh"
#include "act.cuh"
#include "setup.cuh"

/* The products, in the order in which they run. */
enum {
    MOEI_BLOCK_LAYER_UP,   /* pre = rows w1^T */
    MOEI_BLOCK_LAYER_DOWN, /* rows of y = act w2^T */
    MOEI_BLOCK_LAYER_DACT, /* backward: d = rows of dy w2 */
    MOEI_BLOCK_LAYER_DW2,  /* dy^T act */
    MOEI_BLOCK_LAYER_DW1,  /* pre_grad^T rows */
    MOEI_BLOCK_LAYER_DX,   /* pre_grad w1 */
    MOEI_BLOCK_LAYER_PRODUCTS
};

/* The plan of a call. */
typedef struct moei_block_layer {
    moe_block_layer_desc d; /* with its defaults */
    moe_block_layer_bytes bytes;
    int gated;                     /* 1: pre has gates and ups */
    int32_t room;                  /* experts that can be active */
    int32_t blocks[2];             /* block columns of an expert: of act, of pre */
    int64_t num_rows;              /* of the block-sparse matrices: T; sparse: R */
    int64_t runs;                  /* most pairs of a block row and an expert */
    moe_block_sparse_mask mask[2]; /* of act, of pre; the same where the activation is not gated */
    moe_route_desc route;
    moe_block_sparse_list_desc list[2]; /* of mask[0], mask[1] */
    moei_block_layer_active_args active;
    moei_block_layer_tables_args tables; /* as backward needs them */
    moei_block_layer_act_args act;
    void* rows;               /* [num_rows, H] sparse: the tokens' copies in expert order */
    void* pre;                /* packed output of the up product */
    uint64_t rows_bytes;      /* of rows */
    uint64_t act_bytes;       /* of act.act */
    moe_permute_desc permute; /* without x */
    moe_combine_desc combine; /* without y */
    moe_block_sparse_desc product[MOEI_BLOCK_LAYER_PRODUCTS];
} moei_block_layer;

/* Checks the experts' matrices [n, k] and fills in their strides. */
#define MOEI_BLOCK_LAYER_WEIGHTS(w, n, k, field)                                                   \
    do {                                                                                           \
        MOE_REQUIRE(!(w)->up && !(w)->up_table, MOE_ERR_CONFLICT, field);                          \
        MOE_REQUIRE((w)->major == 0 || (w)->major == MOE_MAJOR_K, MOE_ERR_OPTION, field);          \
        if ((w)->row_stride == 0) (w)->row_stride = (k);                                           \
        MOE_REQUIRE(moei_stride_fits((w)->row_stride, (k), (n)), MOE_ERR_STRIDE, field);           \
        if ((w)->expert_stride == 0) (w)->expert_stride = (w)->row_stride * (n);                   \
        MOE_REQUIRE(moei_stride_fits((w)->expert_stride, 1, d->num_experts), MOE_ERR_STRIDE,       \
                    field);                                                                        \
        MOE_REQUIRE((w)->row_stride % 8 == 0 && (w)->expert_stride % 8 == 0, MOE_ERR_ALIGN,        \
                    field);                                                                        \
        MOE_REQUIRE(!((w)->base && (w)->table), MOE_ERR_CONFLICT, field);                          \
    } while (0)

/* Checks a stride of x, y, dy or dx and fills in its default. */
#define MOEI_BLOCK_LAYER_STRIDE(stride, field)                                                     \
    do {                                                                                           \
        if ((stride) == 0) (stride) = d->hidden;                                                   \
        MOE_REQUIRE(moei_stride_fits((stride), d->hidden, d->num_tokens), MOE_ERR_STRIDE, field);  \
        MOE_REQUIRE((stride) % 8 == 0, MOE_ERR_ALIGN, field);                                      \
    } while (0)

/* Refuses sizes and options that the header does not offer, and fills in their defaults. */
MOE_HOST moe_status moei_block_layer_check_options(moei_block_layer* l)
{
    moe_block_layer_desc* d = &l->d;
    MOE_REQUIRE(d->form >= MOE_BLOCK_LAYER_DENSE && d->form <= MOE_BLOCK_LAYER_BATCH,
                MOE_ERR_OPTION, form);
    MOE_REQUIRE(d->num_tokens >= 0 && d->num_tokens <= MOEI_SPARSE_MOST, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    if (d->form == MOE_BLOCK_LAYER_DENSE) {
        MOE_REQUIRE(d->top_k == 0, MOE_ERR_CONFLICT, top_k);
        MOE_REQUIRE(!d->ids, MOE_ERR_CONFLICT, ids);
    } else {
        MOE_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_COMBINE_MAX_TOP_K, MOE_ERR_RANGE, top_k);
    }
    MOE_REQUIRE((int64_t)d->num_tokens * d->top_k <= 0x7fffffff, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->hidden % 8 == 0, MOE_ERR_MULTIPLE, hidden);
    if (d->block == 0) d->block = 128;
    MOE_REQUIRE(moe_block_sparse_size_offered(d->block), MOE_ERR_OPTION, block);
    MOE_REQUIRE(d->intermediate >= 1 && d->intermediate <= 1 << 28, MOE_ERR_RANGE, intermediate);
    MOE_REQUIRE(d->intermediate % d->block == 0, MOE_ERR_MULTIPLE, intermediate);
    if (d->max_experts == 0) d->max_experts = d->num_experts;
    MOE_REQUIRE(d->max_experts >= 1 && d->max_experts <= d->num_experts, MOE_ERR_RANGE,
                max_experts);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOE_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->grad_dtype == 0) d->grad_dtype = d->dtype;
    MOE_REQUIRE(d->grad_dtype == d->dtype || d->grad_dtype == MOE_FP32, MOE_ERR_DTYPE, grad_dtype);
    if (d->activation == 0) d->activation = MOE_ACTIVATION_SWIGLU;
    MOE_TRY(moei_activation_check(d->activation, &d->alpha, &d->limit));
    l->gated = moe_activation_is_gated(d->activation);
    MOEI_BLOCK_LAYER_STRIDE(d->x_stride, x_stride);
    MOEI_BLOCK_LAYER_STRIDE(d->y_stride, y_stride);
    MOEI_BLOCK_LAYER_STRIDE(d->dy_stride, dy_stride);
    MOEI_BLOCK_LAYER_STRIDE(d->dx_stride, dx_stride);
    MOEI_BLOCK_LAYER_WEIGHTS(&d->w1, (int64_t)d->intermediate * (l->gated ? 2 : 1),
                             (int64_t)d->hidden, w1);
    MOEI_BLOCK_LAYER_WEIGHTS(&d->w2, (int64_t)d->hidden, (int64_t)d->intermediate, w2);
    return MOE_OK;
}

/* Returns the descriptor of a product with the fields that all products share; mask: 0 of act, 1 of
   pre. */
MOE_HOST moe_block_sparse_desc moei_block_layer_product(const moei_block_layer* l, int op, int mask)
{
    moe_block_sparse_desc p;
    memset(&p, 0, sizeof p);
    p.op = op;
    p.mask = l->mask[mask];
    p.packed = 1;
    p.dtype = l->d.dtype;
    p.choice = l->d.choice;
    p.fault = l->d.fault;
    p.rank = l->d.rank;
    return p;
}

/* Returns the filter that excludes tokens which lack an expert and are not finite from the expert's
   gradients (batch); mask as above. */
MOE_HOST moe_block_sparse_depths moei_block_layer_depths(const moei_block_layer* l, int mask)
{
    moe_block_sparse_depths p;
    memset(&p, 0, sizeof p);
    p.filter = l->act.lacking;
    p.keep = l->act.held;
    p.stride = l->act.held_stride;
    p.strips = l->blocks[mask];
    return p;
}

/* Fills in the products. */
MOE_HOST void moei_block_layer_products(moei_block_layer* l)
{
    const moe_block_layer_desc* d = &l->d;
    const int sparse = d->form == MOE_BLOCK_LAYER_SPARSE;
    const int32_t num_rows = (int32_t)l->num_rows, hidden = d->hidden,
                  act_elems = d->num_experts * d->intermediate;
    const int32_t pre_elems = l->gated ? 2 * act_elems : act_elems;
    void *rows = l->rows, *pre = l->pre, *act = l->act.act;
    void* pre_grad = d->act_grad ? d->act_grad : pre;
    const void* const* w1 = (const void* const*)l->tables.w1_table;
    const void* const* w2 = (const void* const*)l->tables.w2_table;
    moe_block_sparse_desc* p = l->product;

    p[MOEI_BLOCK_LAYER_UP] = moei_block_layer_product(l, MOE_BLOCK_SPARSE_SDD, 1);
    p->a = sparse ? rows : d->x;
    p->a_stride = sparse ? hidden : d->x_stride;
    p->b_table = w1;
    p->b_stride = d->w1.row_stride;
    p->b_transposed = 1;
    p->c = pre;
    p->m = num_rows, p->n = pre_elems, p->k = hidden;

    p = l->product + MOEI_BLOCK_LAYER_DOWN;
    *p = moei_block_layer_product(l, MOE_BLOCK_SPARSE_DSD, 0);
    p->a = act;
    p->b_table = w2;
    p->b_stride = d->w2.row_stride;
    p->b_transposed = 1;
    p->c = sparse ? rows : d->y;
    p->c_stride = sparse ? hidden : d->y_stride;
    p->m = num_rows, p->n = hidden, p->k = act_elems;

    p = l->product + MOEI_BLOCK_LAYER_DACT;
    *p = moei_block_layer_product(l, MOE_BLOCK_SPARSE_SDD, 0);
    p->a = sparse ? rows : d->dy;
    p->a_stride = sparse ? hidden : d->dy_stride;
    p->b_table = w2;
    p->b_stride = d->w2.row_stride;
    p->c = act;
    p->m = num_rows, p->n = act_elems, p->k = hidden;

    p = l->product + MOEI_BLOCK_LAYER_DW2;
    *p = moei_block_layer_product(l, MOE_BLOCK_SPARSE_DDS, 0);
    p->a = sparse ? rows : d->dy;
    p->a_stride = sparse ? hidden : d->dy_stride;
    p->a_transposed = 1;
    p->b = act;
    p->c_table = l->tables.dw2_table;
    p->c_stride = d->intermediate;
    p->c_dtype = d->grad_dtype;
    p->m = hidden, p->n = act_elems, p->k = num_rows;
    p->depths = moei_block_layer_depths(l, 0);

    p = l->product + MOEI_BLOCK_LAYER_DW1;
    *p = moei_block_layer_product(l, MOE_BLOCK_SPARSE_DSD, 1);
    p->a = pre_grad;
    p->a_transposed = 1;
    p->b = sparse ? rows : d->x;
    p->b_stride = sparse ? hidden : d->x_stride;
    p->c_table = l->tables.dw1_table;
    p->c_stride = hidden;
    p->c_dtype = d->grad_dtype;
    p->m = pre_elems, p->n = hidden, p->k = num_rows;
    p->depths = moei_block_layer_depths(l, 1);

    p = l->product + MOEI_BLOCK_LAYER_DX;
    *p = moei_block_layer_product(l, MOE_BLOCK_SPARSE_DSD, 1);
    p->a = pre_grad;
    p->b_table = w1;
    p->b_stride = d->w1.row_stride;
    p->c = sparse ? rows : d->dx;
    p->c_stride = sparse ? hidden : d->dx_stride;
    p->m = num_rows, p->n = hidden, p->k = pre_elems;
}

/* Returns in *bytes the workspace of one product, from sizes alone. Strides count as 0: short ones
   need tables, which only a call has. */
MOE_HOST moe_status moei_block_layer_product_bytes(const moe_block_sparse_desc* product,
                                                   size_t* bytes)
{
    moe_block_sparse_desc p = *product;
    p.a_stride = p.b_stride = p.c_stride = 0;
    return moe_block_sparse_workspace(&p, bytes);
}

/* Fills in list and mask number i, with entries for all sparse blocks that can be present; carves
   their arrays out of `saved` at *at. */
MOE_HOST moe_status moei_block_layer_list(moei_block_layer* l, int i, size_t* at)
{
    const moe_block_layer_desc* d = &l->d;
    const int64_t columns = (int64_t)d->num_experts * d->intermediate * (i ? 2 : 1);
    const int64_t blocks = l->runs * l->blocks[i];
    moe_block_sparse_list_desc* list = &l->list[i];
    moe_block_sparse_mask* m = &l->mask[i];
    uint64_t entries, row_blocks, column_blocks;
    MOE_REQUIRE(columns <= MOEI_SPARSE_MOST && blocks <= 0x7fffffff, MOE_ERR_RANGE, intermediate);
    entries = (uint64_t)blocks * 4;
    list->rows = (int32_t)l->num_rows;
    list->columns = (int32_t)columns;
    list->block_rows = list->block_columns = d->block;
    list->num_experts = d->num_experts;
    list->max_blocks = (int32_t)blocks;
    list->fault = d->fault;
    list->rank = d->rank;
    if (d->form == MOE_BLOCK_LAYER_SPARSE) {
        list->expert_offset = l->route.expert_offset;
    } else {
        list->ids = l->active.active;
        list->top_k = l->room;
        list->whole_batch = 1;
    }
    row_blocks = (uint64_t)moe_block_sparse_count(list->rows, d->block);
    column_blocks = (uint64_t)(columns / d->block);
    list->row_offset = (int32_t*)moei_carve((char*)d->saved, at, row_blocks * 4 + 4);
    list->column_offset = (int32_t*)moei_carve((char*)d->saved, at, column_blocks * 4 + 4);
    list->column_index = (int32_t*)moei_carve((char*)d->saved, at, entries);
    list->row_index = (int32_t*)moei_carve((char*)d->saved, at, entries);
    list->position = (int32_t*)moei_carve((char*)d->saved, at, entries);
    m->row_offset = list->row_offset;
    m->column_index = list->column_index;
    m->column_offset = list->column_offset;
    m->row_index = list->row_index;
    m->position = list->position;
    m->rows = list->rows;
    m->columns = list->columns;
    m->block_rows = m->block_columns = d->block;
    m->max_blocks = list->max_blocks;
    return MOE_OK;
}

/* Fills in the route of the sparse form and carves its outputs out of `saved` at *at. */
MOE_HOST moe_status moei_block_layer_route(moei_block_layer* l, size_t* at)
{
    const moe_block_layer_desc* d = &l->d;
    const uint64_t num_experts = (uint64_t)d->num_experts;
    const uint64_t slots = (uint64_t)d->num_tokens * (uint64_t)d->top_k;
    moe_route_desc* r = &l->route;
    r->ids = d->ids;
    r->num_tokens = d->num_tokens;
    r->num_experts = d->num_experts;
    r->top_k = d->top_k;
    r->row_multiple = d->block;
    r->fault = d->fault;
    r->rank = d->rank;
    {
        const moe_status s = moe_route_max_rows(r, &l->num_rows);
        MOE_REQUIRE(s == MOE_OK && l->num_rows <= MOEI_SPARSE_MOST, MOE_ERR_RANGE, num_tokens);
    }
    r->expert_count = (int32_t*)moei_carve((char*)d->saved, at, num_experts * 4);
    r->expert_offset = (int32_t*)moei_carve((char*)d->saved, at, num_experts * 4 + 4);
    r->slot_row = (int32_t*)moei_carve((char*)d->saved, at, slots * 4);
    r->row_slot = (int32_t*)moei_carve((char*)d->saved, at, (uint64_t)l->num_rows * 4);
    r->place = (moe_place*)moei_carve((char*)d->saved, at, slots * 8);
    return moe_route_workspace(r, &r->workspace_bytes);
}

/* Fills in the kernels' arguments that follow from sizes. */
MOE_HOST void moei_block_layer_sizes(moei_block_layer* l)
{
    const moe_block_layer_desc* d = &l->d;
    const int32_t num_experts = d->num_experts;
    l->num_rows = d->num_tokens;
    l->room = d->form == MOE_BLOCK_LAYER_BATCH && d->top_k < num_experts ? d->top_k : num_experts;
    l->tables.w1 = d->w1;
    l->tables.w2 = d->w2;
    l->tables.grad_expert = d->grad_expert;
    l->tables.dw1 = (char*)d->dw1;
    l->tables.dw2 = (char*)d->dw2;
    l->tables.fault = d->fault;
    l->tables.rank = d->rank;
    l->tables.hidden = d->hidden;
    l->tables.intermediate = d->intermediate;
    l->tables.num_experts = num_experts;
    l->tables.max_experts = d->max_experts;
    l->tables.block = d->block;
    l->tables.grad_bytes = moe_dtype_bytes(d->grad_dtype);
    l->blocks[0] = l->tables.blocks_act = d->intermediate / d->block;
    l->blocks[1] = l->tables.blocks_pre = l->blocks[0] * (l->gated ? 2 : 1);

    l->active.ids = d->ids;
    l->active.fault = d->fault;
    l->active.rank = d->rank;
    l->active.slots = (int64_t)d->num_tokens * d->top_k;
    l->active.num_experts = l->active.entries = num_experts;
    l->active.room = l->room;
}

/* Carves `saved`: active experts, route, lists, pre. Sets the bytes of act and of the rows. */
MOE_HOST moe_status moei_block_layer_carve_saved(moei_block_layer* l)
{
    const moe_block_layer_desc* d = &l->d;
    const uint64_t entries = (uint64_t)d->num_experts * 4;
    const int sparse = d->form == MOE_BLOCK_LAYER_SPARSE;
    size_t at = 0;
    l->active.active = (int32_t*)moei_carve((char*)d->saved, &at, entries);
    l->active.active_index = (int32_t*)moei_carve((char*)d->saved, &at, entries);
    l->active.count = (int32_t*)moei_carve((char*)d->saved, &at, 4);
    if (d->form == MOE_BLOCK_LAYER_BATCH)
        l->active.flag = (int32_t*)moei_carve((char*)d->saved, &at, entries);
    if (sparse) MOE_TRY(moei_block_layer_route(l, &at));
    l->runs = (l->num_rows + d->block - 1) / d->block * (sparse ? 1 : l->room);
    MOE_TRY(moei_block_layer_list(l, 0, &at));
    l->mask[1] = l->mask[0];
    if (l->gated) MOE_TRY(moei_block_layer_list(l, 1, &at));
    l->act_bytes = (uint64_t)l->mask[0].max_blocks * (uint64_t)(d->block * d->block) * 2;
    l->rows_bytes = sparse ? (uint64_t)l->num_rows * (uint64_t)d->hidden * 2 : 0;
    l->bytes.act_grad = (size_t)l->act_bytes * (l->gated ? 2 : 1);
    l->pre = moei_carve((char*)d->saved, &at, l->bytes.act_grad);
    l->bytes.saved = at;
    return MOE_OK;
}

/* Carves the buffers of the workspace that outlive a launch: those of both calls, then those of
   backward alone. Sets bytes.forward and bytes.backward to where the stations' memory begins. */
MOE_HOST void moei_block_layer_carve_buffers(moei_block_layer* l)
{
    const moe_block_layer_desc* d = &l->d;
    char* workspace = (char*)d->workspace;
    const uint64_t entries = (uint64_t)d->num_experts * 8;
    const uint64_t table1 = entries * (uint64_t)l->blocks[1];
    const uint64_t table2 = entries * (uint64_t)l->blocks[0];
    size_t at = 0;
    l->tables.w1_table = (const void**)moei_carve(workspace, &at, table1);
    l->tables.w2_table = (const void**)moei_carve(workspace, &at, table2);
    l->rows = moei_carve(workspace, &at, l->rows_bytes);
    l->act.act = (uint16_t*)moei_carve(workspace, &at, l->act_bytes);
    l->bytes.forward = at;
    l->tables.dw1_table = (void**)moei_carve(workspace, &at, table1);
    l->tables.dw2_table = (void**)moei_carve(workspace, &at, table2);
    if (d->form == MOE_BLOCK_LAYER_BATCH) {
        l->act.held_stride = (l->num_rows + 15) / 16 * 16;
        l->act.held =
            (uint8_t*)moei_carve(workspace, &at, (uint64_t)(l->room * l->act.held_stride));
        l->act.lacking = (int32_t*)moei_carve(workspace, &at, (uint64_t)d->num_experts * 4);
        if (!d->dw1 && !d->dw2) l->act.lacking = 0;
        l->tables.lacking = l->act.lacking;
    }
    l->bytes.backward = at;
}

/* Carves the workspace of the stations behind the buffers. One station runs at a time, and nothing
   in it outlives its launch: all use the same memory. */
MOE_HOST moe_status moei_block_layer_carve_stations(moei_block_layer* l)
{
    char* workspace = (char*)l->d.workspace;
    size_t most[2] = {l->route.workspace_bytes, 0}; /* of forward, of backward */
    void* at[2];
    for (int i = 0; i <= l->gated; ++i) {
        MOE_TRY(moe_block_sparse_list_workspace(&l->list[i], &l->list[i].workspace_bytes));
        if (l->list[i].workspace_bytes > most[0]) most[0] = l->list[i].workspace_bytes;
    }
    for (int i = 0; i < MOEI_BLOCK_LAYER_PRODUCTS; ++i) {
        size_t* bytes = &l->product[i].workspace_bytes;
        MOE_TRY(moei_block_layer_product_bytes(&l->product[i], bytes));
        if (*bytes > most[i > MOEI_BLOCK_LAYER_DOWN]) most[i > MOEI_BLOCK_LAYER_DOWN] = *bytes;
    }
    at[0] = moei_carve(workspace, &l->bytes.forward, most[0]);
    at[1] = moei_carve(workspace, &l->bytes.backward, most[1]);
    l->route.workspace = at[0];
    for (int i = 0; i <= l->gated; ++i) l->list[i].workspace = at[0];
    for (int i = 0; i < MOEI_BLOCK_LAYER_PRODUCTS; ++i)
        if (l->product[i].workspace_bytes) l->product[i].workspace = at[i > MOEI_BLOCK_LAYER_DOWN];
    return MOE_OK;
}

/* Fills in what reads the carved buffers: arguments of the kernels, permute and combine. */
MOE_HOST void moei_block_layer_connect(moei_block_layer* l)
{
    const moe_block_layer_desc* d = &l->d;
    l->tables.active = l->active.active;
    l->tables.active_index = l->active.active_index;
    l->tables.count = l->active.count;
    l->active.expert_offset = l->route.expert_offset;

    l->act.pre = (const uint16_t*)l->pre;
    l->act.pre_grad = (uint16_t*)(d->act_grad ? d->act_grad : l->pre);
    l->act.row_offset = l->mask[0].row_offset;
    l->act.column_index = l->mask[0].column_index;
    l->act.row_slot = l->route.row_slot;
    l->act.ids = d->ids;
    l->act.active_index = l->active.active_index;
    l->act.weights = d->weights;
    l->act.dweights = d->dweights;
    l->act.fault = d->fault;
    l->act.slots = l->active.slots;
    l->act.form = d->form;
    l->act.num_rows = (int32_t)l->num_rows;
    l->act.row_blocks = moe_block_sparse_count((int32_t)l->num_rows, d->block);
    l->act.num_experts = d->num_experts;
    l->act.top_k = d->top_k;
    l->act.run = l->blocks[0];
    while (1 << l->act.block_log2 < d->block) ++l->act.block_log2;
    l->act.activation = moei_activation_of(d->activation, d->alpha, d->limit);
    l->act.gated = l->gated;

    l->permute.row_slot = l->route.row_slot;
    l->permute.slot_row = l->route.slot_row;
    l->permute.dtype = d->dtype;
    l->permute.y = l->rows;
    l->permute.fault = d->fault;
    l->permute.rank = d->rank;
    l->permute.num_tokens = d->num_tokens;
    l->permute.top_k = d->top_k;
    l->permute.hidden = d->hidden;
    l->permute.num_rows = l->num_rows;
    l->combine.rows = l->rows;
    l->combine.place = l->route.place;
    l->combine.rows_dtype = d->dtype;
    l->combine.fault = d->fault;
    l->combine.rank = d->rank;
    l->combine.num_tokens = d->num_tokens;
    l->combine.hidden = d->hidden;
    l->combine.top_k = d->top_k;
    l->combine.num_rows = l->num_rows;
}

/* Checks sizes and options and fills in *l. Always computes the bytes; with memory in the
   descriptor, also the addresses of all buffers in it. */
MOE_HOST moe_status moei_block_layer_plan(const moe_block_layer_desc* desc, moei_block_layer* l)
{
    memset(l, 0, sizeof *l);
    l->d = *desc;
    MOE_TRY(moei_block_layer_check_options(l));
    moei_block_layer_sizes(l);
    if (l->d.num_tokens == 0) return MOE_OK; /* nothing is kept */
    MOE_TRY(moei_block_layer_carve_saved(l));
    moei_block_layer_carve_buffers(l);
    moei_block_layer_products(l);
    MOE_TRY(moei_block_layer_carve_stations(l));
    moei_block_layer_connect(l);
    return MOE_OK;
}

#endif
