/* block_layer.cuh: computes three forms of the MoE layer as block-sparse products, forward and
   backward.

     y[t] = sum over experts e of weight(t, e) w2_e activation(w1_e x[t])

     dense    MOE_BLOCK_LAYER_DENSE: every expert for every token, weights [T, E]
     sparse   MOE_BLOCK_LAYER_SPARSE: each token's own K experts, ids and weights [T, K] of any
              gate
     batch    MOE_BLOCK_LAYER_BATCH: ids and weights [T, K] of a gate with whole_batch: each token
              has the batch's K experts or, with -1, fewer of them

   All three run the same code. The activations of all experts form one block-sparse matrix
   [rows, E * I], packed: only the sparse blocks of the pairs (row, expert) in use exist. w1 and w2
   are read in place, through tables with an address for each block column. The rows are the tokens
   themselves or, in the sparse form, copies of them in expert order, each expert's rows padded to
   whole sparse blocks.

     forward    rows = x, gathered          sparse alone: moe_route, moe_permute
                pre  = rows w1^T            sdd
                act  = weight activation(pre)
                y    = act w2^T             dsd; sparse: then moe_combine adds each token's rows
     backward   d    = dy w2                sdd: gradient with respect to act
                dweights = d . activation(pre)
                pre_grad = d weight activation'(pre)
                dw2  = dy^T act             dds
                dw1  = pre_grad^T rows      dsd
                dx   = pre_grad w1          dsd; sparse: then moe_combine

   In:   x [T, H], ids, weights, w1 [E, 2I, H] (gates, then ups; not gated [E, I, H]), w2 [E, H, I];
         backward: dy [T, H], `saved` as forward left it, and x, ids, weights, w1, w2 unchanged
   Out:  y [T, H]; dx [T, H], dw1, dw2, dweights (shape of weights), each unless null
   No biases. Any activation of moe_activation; gate and up concatenated; weights k-major.

   Gradients of experts that are not active are neither computed nor allocated. Active experts are
   those that a token has chosen; in the dense form all. dw1 and dw2 have max_experts matrices, and
   grad_expert, on the device, says which expert each holds. With max_experts = E and all experts
   active, matrix e belongs to expert e. More active experts than matrices, or in the batch form
   more than K in all: fault NO_ROOM (index: their number). No weights of an inactive expert are
   read.

   Memory: `saved` holds pre, from forward to backward (and maps and lists, some 0.1 % of pre at
   sparse blocks of 128); `workspace` is used while a call runs. Activations take, in units of
   rows * I elements: saved 2 (not gated 1), workspace 1. rows is T E; sparse: T K and fewer than
   `block` more for each expert; batch: T K, or T E if that is less. The sparse form's copies take
   another H elements a row. pre_grad is written over pre, unless act_grad gives it memory of its
   own: then a forward can serve several backwards.

   Numerics: fp32 accumulation and activation. pre, act, d, pre_grad and the sparse form's rows are
   rounded to the dtype. Equal inputs give equal bits. Dense and batch add experts in ascending
   order: batch with all experts is dense to the last bit. Where the clamped SwiGLU clamps a value,
   its gradient is 0 if dy and the weight are finite; at the limit itself the gradient passes.

   NaN and infinity stay with the tokens that have them. With any x, dy and weights, a token changes
   neither other tokens' y, dx and dweights, nor dw1 and dw2 of an expert that it lacks. A token
   without any expert has y and dx of 0, a slot of -1 has dweights of 0. Padding rows enter no
   product. The one exception: in the batch form, NaN or infinity in w1 (w2) of an active expert
   reaches dx (y) of the tokens that lack the expert too.

   Faults: an id outside -1 .. E-1: BAD_ID, and the slot is dropped. Null or misaligned entries in a
   table of weights: BAD_TABLE, for active experts alone. After a stop fault later calls write
   nothing.
   T = 0: no expert is active; backward writes grad_expert alone.

   Cost: the flops of the present sparse blocks, see block_sparse.cuh. No allocation, no
   synchronisation; can be captured in a graph and replayed with other inputs.
   Minimum architecture: sm_75 for fp16, sm_80 for bf16.

     moe_block_layer_desc l = {0};
     l.form = MOE_BLOCK_LAYER_SPARSE;
     l.x = x;  l.ids = ids;  l.weights = weights;  l.w1.base = w1;  l.w2.base = w2;  l.y = y;
     l.num_tokens = T;  l.hidden = H;  l.intermediate = I;  l.num_experts = E;  l.top_k = K;
     moe_block_layer_bytes bytes;
     moe_block_layer_sizes(&l, &bytes);
     l.saved = ...;      l.saved_bytes = bytes.saved;
     l.workspace = ...;  l.workspace_bytes = bytes.forward;     // or the larger one, for both
     moe_status s = moe_block_layer_forward(&l, stream);
     l.dy = dy;  l.dx = dx;  l.dw1 = dw1;  l.dw2 = dw2;  l.grad_expert = grad_expert;
     l.dweights = dweights;
     s = moe_block_layer_backward(&l, stream);

   Source of the method: the MoE layer as sdd, dsd and dds with sparse blocks by expert: Gale et
   al., MegaBlocks, arXiv 2211.15841. */
#ifndef MOE_BLOCK_LAYER_CUH
#define MOE_BLOCK_LAYER_CUH

#include "base/check.h"
#include "block_layer/desc.h"
#include "block_layer/prepare.cuh"
#include "preload.cuh"

/* Returns in *bytes what a layer of these sizes and options takes; reads no pointers. Errors: a
   size or option that is refused. */
MOE_HOST moe_status moe_block_layer_sizes(const moe_block_layer_desc* desc,
                                          moe_block_layer_bytes* bytes)
{
    moei_block_layer l;
    moe_block_layer_desc d;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    d.saved = d.workspace = 0;
    memset(bytes, 0, sizeof *bytes);
    MOE_TRY(moei_block_layer_plan(&d, &l));
    *bytes = l.bytes;
    return MOE_OK;
}

/* Refuses buffers of forward or backward that are null, misaligned or overlap. Requires a plan.
   Ignores buffers of the other call alone; without tokens also `saved` and `workspace`. */
MOE_HOST moe_status moei_block_layer_check_buffers(const moei_block_layer* l, int backward)
{
    const moe_block_layer_desc* d = &l->d;
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden, intermediate = d->intermediate,
                  num_experts = d->num_experts;
    const int64_t up_width = l->gated ? 2 * intermediate : intermediate;
    const uint64_t slots = (uint64_t)num_tokens * (uint64_t)d->top_k;
    const uint64_t weights =
        (d->form == MOE_BLOCK_LAYER_DENSE ? (uint64_t)(num_tokens * num_experts) : slots) * 4;
    const uint64_t grads = (uint64_t)d->max_experts * (uint64_t)moe_dtype_bytes(d->grad_dtype);
    const size_t workspace = backward ? l->bytes.backward : l->bytes.forward;
    const int in_place = d->dx && d->dx == d->dy && d->dx_stride == d->dy_stride;
    const int both = MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, written = MOE_BUFFER_WRITTEN;
    const moe_buffer b[] = {
        {d->x, moe_extent(num_tokens, d->x_stride, hidden, d->dtype), 16, MOE_BUFFER_REQUIRED,
         MOE_FIELD_x},
        {d->ids, slots * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_ids},
        {d->weights, weights, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_weights},
        {d->w1.base, moei_weight_extent(&d->w1, num_experts, up_width, hidden), 16,
         num_tokens && !d->w1.table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_w1},
        {d->w1.table, (uint64_t)num_experts * 8, 8, MOE_BUFFER_READ, MOE_FIELD_w1},
        {d->w2.base, moei_weight_extent(&d->w2, num_experts, hidden, intermediate), 16,
         num_tokens && !d->w2.table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_w2},
        {d->w2.table, (uint64_t)num_experts * 8, 8, MOE_BUFFER_READ, MOE_FIELD_w2},
        {backward ? d->dy : 0,
         in_place ? 0 : moe_extent(num_tokens, d->dy_stride, hidden, d->dtype), 16,
         backward ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_dy},
        {backward ? 0 : d->y, moe_extent(num_tokens, d->y_stride, hidden, d->dtype), 16,
         backward ? written : both, MOE_FIELD_y},
        {backward ? d->dx : 0, moe_extent(num_tokens, d->dx_stride, hidden, d->dtype), 16, written,
         MOE_FIELD_dx},
        {backward ? d->dw1 : 0, grads * (uint64_t)(up_width * hidden), 16, written, MOE_FIELD_dw1},
        {backward ? d->dw2 : 0, grads * (uint64_t)(hidden * intermediate), 16, written,
         MOE_FIELD_dw2},
        {backward ? d->dweights : 0, weights, 4, written, MOE_FIELD_dweights},
        {backward ? d->grad_expert : 0, (uint64_t)d->max_experts * 4, 4,
         backward && (d->dw1 || d->dw2) ? both : written, MOE_FIELD_grad_expert},
        {backward ? d->act_grad : 0, l->bytes.act_grad, 16, written, MOE_FIELD_act_grad},
        {num_tokens ? d->saved : 0, l->bytes.saved, 256, both, MOE_FIELD_saved},
        {num_tokens ? d->workspace : 0, workspace, 256, both, MOE_FIELD_workspace},
        {d->fault, 8, 8, written, MOE_FIELD_fault}};
    MOE_TRY(moe_check_buffers(b, (int)(sizeof b / sizeof b[0])));
    MOE_REQUIRE(d->saved_bytes >= l->bytes.saved, MOE_ERR_WORKSPACE, saved_bytes);
    MOE_REQUIRE(d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE, workspace_bytes);
    return MOE_OK;
}

/* Checks options and buffers, and plans forward or backward. */
MOE_HOST moe_status moei_block_layer_check(const moe_block_layer_desc* desc, int backward,
                                           moei_block_layer* l)
{
    MOE_TRY(moei_block_layer_plan(desc, l));
    MOE_REQUIRE(!backward || !desc->grad_expert || desc->dw1 || desc->dw2, MOE_ERR_CONFLICT,
                grad_expert);
    return moei_block_layer_check_buffers(l, backward);
}

/* A prepared forward or backward: everything but the stream, for the device that was current.
   Launches of the other call, or of other options, have null kernels. */
typedef struct moe_block_layer_prepared {
    moe_route_prepared route;
    int32_t* flag;     /* [E] of active experts, cleared first; or null */
    size_t flag_bytes; /* of flag */
    moei_block_layer_active_args active_args;
    moe_launch mark, active;                /* both of active_args */
    moe_block_sparse_list_prepared list[2]; /* of act, of pre */
    moei_block_layer_tables_args tables_args;
    moe_launch tables;
    moe_permute_prepared gather[2];       /* before the first, and before the third product */
    moe_block_sparse_prepared product[4]; /* up, down; or dact, dw2, dw1, dx */
    moei_block_layer_act_args act_args;
    moe_launch act; /* between the first two products */
    moe_combine_prepared combine;
} moe_block_layer_prepared;

/* Prepares product i of a plan. */
MOE_HOST moe_status moei_block_layer_prepare_product(const moei_block_layer* l, int i,
                                                     moe_block_sparse_prepared* p)
{
    const moe_status s = moe_block_sparse_prepare(&l->product[i], p);
    return moe_status_kind(s) == MOE_ERR_RANGE ? MOE_STATUS(MOE_ERR_RANGE, num_tokens) : s;
}

/* Prepares the launch that writes the tables of addresses. */
MOE_HOST moe_status moei_block_layer_prepare_tables(const moei_block_layer* l, int backward,
                                                    moe_block_layer_prepared* p)
{
    moei_block_layer_tables_args* a = &p->tables_args;
    const int64_t blocks =
        l->d.num_tokens ? (int64_t)l->tables.num_experts * l->tables.blocks_pre : 0;
    const int64_t threads = blocks > l->tables.max_experts ? blocks : l->tables.max_experts;
    moe_launch_config c =
        moe_grid((threads + MOEI_BLOCK_LAYER_SETUP_THREADS - 1) / MOEI_BLOCK_LAYER_SETUP_THREADS,
                 MOEI_BLOCK_LAYER_SETUP_THREADS, 0, 0);
    c.dependent = 1;
    *a = l->tables;
    a->no_tokens = l->d.num_tokens == 0;
    if (!backward) a->grad_expert = 0;
    if (!backward || !a->dw1) a->dw1_table = 0;
    if (!backward || !a->dw2) a->dw2_table = 0;
    if (!backward) a->lacking = 0;
    return MOE_PREPARE(&p->tables, moei_block_layer_tables, c);
}

/* Prepares, in the sparse form alone, the gather of x or dy (stride in elements) into rows in
   expert order. */
MOE_HOST moe_status moei_block_layer_prepare_gather(const moei_block_layer* l, const void* x,
                                                    int64_t stride, moe_permute_prepared* p)
{
    moe_permute_desc d = l->permute;
    if (l->d.form != MOE_BLOCK_LAYER_SPARSE) return MOE_OK;
    d.x = x;
    d.x_stride = stride;
    return moe_permute_prepare(&d, p);
}

/* Prepares, in the sparse form alone, the sum of each token's rows into y or dx. */
MOE_HOST moe_status moei_block_layer_prepare_combine(const moei_block_layer* l, void* y,
                                                     int64_t stride, moe_combine_prepared* p)
{
    moe_combine_desc d = l->combine;
    if (l->d.form != MOE_BLOCK_LAYER_SPARSE) return MOE_OK;
    d.y = y;
    d.y_stride = stride;
    return moe_combine_prepare(&d, p);
}

/* Prepares the launches that find the active experts and make the lists; backward finds their
   results in `saved`. */
MOE_HOST moe_status moei_block_layer_prepare_lists(const moei_block_layer* l,
                                                   moe_block_layer_prepared* p)
{
    moe_launch_config c = moe_grid(1, MOEI_BLOCK_LAYER_SETUP_THREADS, 0, 0);
    c.dependent = 1;
    p->active_args = l->active;
    MOE_TRY(MOE_PREPARE(&p->active, moei_block_layer_active, c));
    if (l->d.form == MOE_BLOCK_LAYER_BATCH) {
        p->flag = l->active.flag;
        p->flag_bytes = (size_t)l->d.num_experts * 4;
        c = moe_grid((l->active.slots + MOEI_BLOCK_LAYER_SETUP_THREADS - 1) /
                         MOEI_BLOCK_LAYER_SETUP_THREADS,
                     MOEI_BLOCK_LAYER_SETUP_THREADS, 0, 0);
        c.dependent = 1;
        MOE_TRY(MOE_PREPARE(&p->mark, moei_block_layer_mark, c));
    }
    for (int i = 0; i <= l->gated; ++i)
        MOE_TRY(moe_block_sparse_list_prepare(&l->list[i], &p->list[i]));
    return MOE_OK;
}

/* Fills in *p, which is all zero. */
MOE_HOST moe_status moei_block_layer_prepare_forward(const moe_block_layer_desc* desc,
                                                     moe_block_layer_prepared* p)
{
    moei_block_layer l;
    MOE_TRY(moei_block_layer_check(desc, 0, &l));
    if (l.d.num_tokens == 0) return MOE_OK;
    MOE_TRY(moei_block_layer_prepare_product(&l, MOEI_BLOCK_LAYER_UP, &p->product[0]));
    MOE_TRY(moei_block_layer_prepare_product(&l, MOEI_BLOCK_LAYER_DOWN, &p->product[1]));
    if (l.d.form == MOE_BLOCK_LAYER_SPARSE) MOE_TRY(moe_route_prepare(&l.route, &p->route));
    MOE_TRY(moei_block_layer_prepare_lists(&l, p));
    MOE_TRY(moei_block_layer_prepare_tables(&l, 0, p));
    MOE_TRY(moei_block_layer_prepare_gather(&l, l.d.x, l.d.x_stride, &p->gather[0]));
    p->act_args = l.act;
    MOE_TRY(moei_block_layer_act_prepare(&p->act, &p->act_args, l.runs, 0, l.d.dtype));
    return moei_block_layer_prepare_combine(&l, l.d.y, l.d.y_stride, &p->combine);
}

/* Prepares forward, which writes y, and the data of backward to `saved`. moe_block_layer_run queues
   the launches any number of times. Errors: every field as documented, each with its own status. T
   = 0 is no error. */
MOE_HOST moe_status moe_block_layer_prepare_forward(const moe_block_layer_desc* desc,
                                                    moe_block_layer_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_block_layer_prepare_forward(desc, p));
}

/* Fills in *p, which is all zero. */
MOE_HOST moe_status moei_block_layer_prepare_backward(const moe_block_layer_desc* desc,
                                                      moe_block_layer_prepared* p)
{
    moei_block_layer l;
    MOE_TRY(moei_block_layer_check(desc, 1, &l));
    if (l.d.num_tokens == 0)
        return l.d.grad_expert ? moei_block_layer_prepare_tables(&l, 1, p) : MOE_OK;
    MOE_TRY(moei_block_layer_prepare_product(&l, MOEI_BLOCK_LAYER_DACT, &p->product[0]));
    if (l.d.dw2)
        MOE_TRY(moei_block_layer_prepare_product(&l, MOEI_BLOCK_LAYER_DW2, &p->product[1]));
    if (l.d.dw1)
        MOE_TRY(moei_block_layer_prepare_product(&l, MOEI_BLOCK_LAYER_DW1, &p->product[2]));
    if (l.d.dx) MOE_TRY(moei_block_layer_prepare_product(&l, MOEI_BLOCK_LAYER_DX, &p->product[3]));
    MOE_TRY(moei_block_layer_prepare_tables(&l, 1, p));
    MOE_TRY(moei_block_layer_prepare_gather(&l, l.d.dy, l.d.dy_stride, &p->gather[0]));
    p->act_args = l.act;
    MOE_TRY(moei_block_layer_act_prepare(&p->act, &p->act_args, l.runs, 1, l.d.dtype));
    if (l.d.dw1) /* the sparse form's rows of dy have been read: x is gathered over them */
        MOE_TRY(moei_block_layer_prepare_gather(&l, l.d.x, l.d.x_stride, &p->gather[1]));
    if (!l.d.dx) return MOE_OK;
    return moei_block_layer_prepare_combine(&l, l.d.dx, l.d.dx_stride, &p->combine);
}

/* Prepares backward, which writes each gradient that is not null. moe_block_layer_run queues the
   launches. Requires `saved` as left by a forward with the same form, sizes, options and inputs;
   overwrites pre in `saved` unless act_grad is given. Errors: as of forward. */
MOE_HOST moe_status moe_block_layer_prepare_backward(const moe_block_layer_desc* desc,
                                                     moe_block_layer_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_block_layer_prepare_backward(desc, p));
}

/* Queues a prepared forward or backward on `stream`. */
MOE_HOST moe_status moe_block_layer_run(const moe_block_layer_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(moe_route_run(&p->route, stream));
    if (p->flag) MOE_TRY_CUDA(cudaMemsetAsync(p->flag, 0, p->flag_bytes, stream));
    MOE_TRY(MOE_RUN(&p->mark, p->active_args, stream));
    MOE_TRY(MOE_RUN(&p->active, p->active_args, stream));
    for (int i = 0; i < 2; ++i) MOE_TRY(moe_block_sparse_list_run(&p->list[i], stream));
    MOE_TRY(MOE_RUN(&p->tables, p->tables_args, stream));
    MOE_TRY(moe_permute_run(&p->gather[0], stream));
    MOE_TRY(moe_block_sparse_run(&p->product[0], stream));
    MOE_TRY(MOE_RUN(&p->act, p->act_args, stream));
    MOE_TRY(moe_block_sparse_run(&p->product[1], stream));
    MOE_TRY(moe_permute_run(&p->gather[1], stream));
    MOE_TRY(moe_block_sparse_run(&p->product[2], stream));
    MOE_TRY(moe_block_sparse_run(&p->product[3], stream));
    return moe_combine_run(&p->combine, stream);
}

/* Prepares and runs forward. Queues and writes nothing where a field is refused. */
MOE_HOST moe_status moe_block_layer_forward(const moe_block_layer_desc* desc, cudaStream_t stream)
{
    moe_block_layer_prepared p;
    MOE_TRY(moe_block_layer_prepare_forward(desc, &p));
    return moe_block_layer_run(&p, stream);
}

/* Prepares and runs backward. Queues and writes nothing where a field is refused. */
MOE_HOST moe_status moe_block_layer_backward(const moe_block_layer_desc* desc, cudaStream_t stream)
{
    moe_block_layer_prepared p;
    MOE_TRY(moe_block_layer_prepare_backward(desc, &p));
    return moe_block_layer_run(&p, stream);
}

/* Loads now, for the current device, all kernels that the layer forms may run. */
MOE_HOST moe_status moe_block_layer_preload(void)
{
    MOE_TRY(moe_route_preload());
    MOE_TRY(moe_permute_preload());
    MOE_TRY(moe_combine_preload());
    MOE_TRY(moe_block_sparse_list_preload());
    MOE_TRY(moe_block_sparse_preload());
    MOE_TRY(moei_block_layer_act_preload());
    return moei_block_layer_setup_preload();
}

MOEI_PRELOAD_INCLUDED(block_layer)

#endif
