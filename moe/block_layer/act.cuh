/* act.cuh: computes the activation, or its gradient, between the two products of a layer form: on
   packed sparse blocks, in fp32. Called by block_layer.cuh.

     forward    act = weight activation(pre)
     backward   d = gradient with respect to act: dweight = sum over I of d activation(pre)
                pre_grad = d weight activation'(pre); act is computed again and written over d

   A `run` is the part of one block row that belongs to one expert: I / `block` consecutive sparse
   blocks of act in its list. pre has the same, or twice as many where the activation is gated:
   gates, then ups. So the run's number and act's list give all addresses. A group of 2 to 32
   neighbouring lanes has one row of a run, 8 elements a lane at a time: reads the row's weight once
   and adds up dweight in a fixed order. Every element is read by the lane that writes it, so a
   gradient may overwrite its inputs. Rows without a token are written as zeros and take no part,
   with any contents: rows past the last one or between experts; in the batch form those of tokens
   that lack the expert.

   In the batch form a token that lacks an expert still has a row of zeros in the expert's sparse
   blocks. dw1 and dw2 would multiply the token's x and dy by these zeros. An infinity or NaN in
   x [t] makes the token's whole row of pre infinite or NaN, one in dy [t] that of d. Backward reads
   the first element of such a row. Where the element is infinite or NaN, backward marks the expert,
   and moe_block_sparse_depths excludes the row from the expert's products. The products of all
   other experts keep full speed. */
#ifndef MOE_BLOCK_LAYER_ACT_CUH
#define MOE_BLOCK_LAYER_ACT_CUH

#include "../activation.cuh"
#include "../base/copy.cuh"
#include "../base/fault.cuh"
#include "../base/warp.cuh"
#include "../fields.h"
#include "desc.h"

#define MOEI_BLOCK_LAYER_ACT_THREADS 256

/* Arguments of the kernels. */
typedef struct moei_block_layer_act_args {
    const uint16_t* pre;         /* packed, dtype */
    uint16_t* act;               /* packed, dtype; backward: d on entry */
    uint16_t* pre_grad;          /* packed, dtype; backward alone; may be pre */
    const int32_t* row_offset;   /* [row_blocks + 1] of act's list */
    const int32_t* column_index; /* of act's list */
    const int32_t* row_slot;     /* sparse: [num_rows] */
    const int32_t* ids;          /* sparse, batch: [T, K] */
    const int32_t* active_index; /* [E] -1: not active */
    const float* weights;        /* [T, K]; dense: [T, E] */
    float* dweights;             /* shape of weights; backward alone; or null */
    uint64_t* fault;             /* [1] fault word; or null */
    int32_t* lacking;    /* batch, backward: [E], zeros on entry; becomes 1 + the expert's row of
                            `held` where a token that lacks the expert is not finite; or null */
    uint8_t* held;       /* [active experts, held_stride] 1: the token has the expert; 0: it lacks
                            the expert */
    int64_t held_stride; /* bytes, a multiple of 16 */
    int64_t slots;       /* T * K; dense: 0 */
    int64_t row_grid;    /* thread blocks that compute rows; those after them zero the dweights of
                            slots without an active expert */
    int32_t form, num_rows, row_blocks, num_experts, top_k; /* moe_block_layer_form; rows of act;
                                                               their block rows; E; K */
    int32_t block_log2, lanes_log2; /* log2 of a sparse block's side; of the lanes of a row */
    int32_t run;                    /* sparse blocks of act in a run */
    int32_t gated;                  /* 1: pre has gates and ups; 0: pre is as wide as act */
    moei_activation activation;     /* applied to pre, as moei_activation_of returns it */
} moei_block_layer_act_args;

/* One row of a run. */
typedef struct moei_block_layer_act_row {
    int64_t act, pre;  /* index of its first element; in each next sparse block of the run the row
                          is block * block elements further */
    int64_t row;       /* of the matrix */
    int64_t weight_at; /* index in weights and dweights; batch: of the row's first slot */
    float weight;      /* 0 where the row is not live */
    int32_t expert;
    bool there; /* the run exists */
    bool live;  /* the row holds a token, batch: one that has the expert */
} moei_block_layer_act_row;

/* Returns the row of the calling lane's group. Called by a whole warp.
     1. Compute the run's number and the row's offsets.
     2. Find the run's block row and expert in act's list.
     3. Find the row's weight, and whether the row is live, by the form. */
MOE_DEVICE moei_block_layer_act_row moei_block_layer_act_find(const moei_block_layer_act_args* a)
{
    /* 1. run */
    const int block = 1 << a->block_log2, n = a->run, lanes = 1 << a->lanes_log2;
    const int lane = (int)threadIdx.x & (lanes - 1);
    const int64_t group = (int64_t)blockIdx.x * (MOEI_BLOCK_LAYER_ACT_THREADS >> a->lanes_log2) +
                          (threadIdx.x >> a->lanes_log2);
    const int64_t run = group >> a->block_log2, in_block = group & (block - 1);
    moei_block_layer_act_row r;
    r.there = run < a->row_offset[a->row_blocks] / n;
    r.live = false;
    r.act = ((run * n) << 2 * a->block_log2) + (in_block << a->block_log2);
    r.pre = ((run * n * (a->gated ? 2 : 1)) << 2 * a->block_log2) + (in_block << a->block_log2);
    r.row = r.weight_at = 0;
    r.expert = 0;
    r.weight = 0.0f;
    /* 2. block row and expert */
    if (r.there) {
        /* runs of a block row: block rows that have runs all have as many, and come first */
        const int each = a->row_offset[1] / n;
        r.row = ((int64_t)((uint32_t)run / (uint32_t)(each > 0 ? each : 1)) << a->block_log2) +
                in_block;
        r.expert = a->column_index[run * n] / n;
        r.live = r.row < a->num_rows;
    }
    /* 3. weight */
    if (a->form == MOE_BLOCK_LAYER_SPARSE) {
        const int32_t slot = r.live ? a->row_slot[r.row] : -1;
        r.live = slot >= 0 && slot < a->slots;
        r.weight_at = slot;
        if (r.live) r.weight = a->weights[slot];
    } else if (a->form == MOE_BLOCK_LAYER_BATCH) {
        r.weight_at = r.row * a->top_k;
        float has = 0.0f;
        for (int k = lane; r.live && k < a->top_k; k += lanes)
            if (a->ids[r.weight_at + k] == r.expert) {
                r.weight += a->weights[r.weight_at + k];
                has = 1.0f;
            }
        r.weight = moe_warp_sum(r.weight, lanes);
        r.live = moe_warp_max(has, lanes) > 0.0f;
    } else {
        r.weight_at = r.row * a->num_experts + r.expert;
        if (r.live) r.weight = a->weights[r.weight_at];
    }
    return r;
}

/* Returns 8 elements of act from the gates (or the plain numbers) and ups. */
MOE_DEVICE uint4 moei_block_layer_act_8(uint4 gate, uint4 up, float weight,
                                        const moei_block_layer_act_args* a, const int dtype)
{
    float v[8], u[8];
    moei_unpack_8(v, gate, dtype);
    moei_unpack_8(u, up, dtype);
    moei_activate(v, u, 8, &a->activation, a->gated != 0);
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] *= weight;
    return moei_pack_8(v, dtype);
}

/* Replaces 8 elements of gate, up and d by their gradients and act. Returns sum + the sum of each d
   times its activation, added in order. */
MOE_DEVICE float moei_block_layer_grad_8(uint4* gate, uint4* up, uint4* d, float weight, float sum,
                                         const moei_block_layer_act_args* a, const int dtype)
{
    float v[8], u[8], s[8], t[8];
    moei_unpack_8(v, *gate, dtype);
    moei_unpack_8(u, *up, dtype);
    moei_unpack_8(t, *d, dtype);
    MOE_UNROLL
    for (int i = 0; i < 8; i += 4)
        sum = moei_activate_backward_4(v + i, u + i, s + i, t + i, weight, sum, &a->activation,
                                       a->gated != 0);
    if (a->gated) *up = moei_pack_8(u, dtype);
    *gate = moei_pack_8(s, dtype);
    *d = moei_pack_8(v, dtype);
    return sum;
}

/* Computes the row, two 16-byte vectors of a lane in flight at a time. Returns the lane's part of
   dweight. backward and dtype are literals.
     1. Load two vectors of pre (gate, up) and, backward, of the gradient by act.
     2. Compute act, or the gradients and the lane's part of dweight; zeros where the row is unused.
     3. Store act and, backward, the gradient by pre. */
MOE_DEVICE float moei_block_layer_act_row_8(const moei_block_layer_act_args* a,
                                            const moei_block_layer_act_row* r, const int backward,
                                            const int dtype)
{
    const int lanes = 1 << a->lanes_log2, lane = (int)threadIdx.x & (lanes - 1);
    const int width_log2 = a->block_log2 - 3; /* 16-byte vectors in a row of one sparse block */
    const int vectors = r->there ? a->run << width_log2 : 0;
    const int64_t to_up = (int64_t)a->run << 2 * a->block_log2;
    float sum = 0.0f;
    for (int p0 = lane; p0 < vectors; p0 += 2 * lanes) {
        uint4 gate[2], up[2], d[2];
        int64_t at[2];
        MOE_UNROLL
        for (int u = 0; u < 2; ++u) {
            const int p = p0 + u * lanes;
            at[u] = ((int64_t)(p >> width_log2) << 2 * a->block_log2) +
                    ((p & ((1 << width_log2) - 1)) << 3);
            gate[u] = up[u] = d[u] = make_uint4(0, 0, 0, 0);
            if (r->live && p < vectors) {
                gate[u] = moei_load16(a->pre + r->pre + at[u]);
                if (a->gated) up[u] = moei_load16(a->pre + r->pre + to_up + at[u]);
                if (backward) d[u] = moei_load16(a->act + r->act + at[u]);
            }
        }
        MOE_UNROLL
        for (int u = 0; u < 2; ++u) {
            if (p0 + u * lanes >= vectors) break;
            if (r->live) { /* else zeros are written */
                if (backward)
                    sum =
                        moei_block_layer_grad_8(&gate[u], &up[u], &d[u], r->weight, sum, a, dtype);
                else d[u] = moei_block_layer_act_8(gate[u], up[u], r->weight, a, dtype);
            }
            moei_store16(a->act + r->act + at[u], d[u]);
            if (backward) {
                moei_store16(a->pre_grad + r->pre + at[u], gate[u]);
                if (a->gated) moei_store16(a->pre_grad + r->pre + to_up + at[u], up[u]);
            }
        }
    }
    return sum;
}

/* Returns true where the fp16 or bf16 number is infinite or NaN. */
MOE_DEVICE bool moei_block_layer_odd(uint16_t v, const int dtype)
{
    const int infinite = dtype == MOE_FP16 ? 0x7c00 : 0x7f80;
    return (v & infinite) == infinite;
}

/* Batch, backward: writes to `held` whether the row's token has the expert. Marks the expert where
   a token without the expert must not enter the expert's products. Called by the group's first
   lane, before this lane overwrites the row's first element of pre and d. */
MOE_DEVICE void moei_block_layer_act_hold(const moei_block_layer_act_args* a,
                                          const moei_block_layer_act_row* r, const int dtype)
{
    const int32_t active = a->active_index[r->expert];
    if (active < 0 || r->row >= a->num_rows) return;
    a->held[active * a->held_stride + r->row] = r->live;
    if (!r->live && (moei_block_layer_odd(a->pre[r->pre], dtype) ||
                     moei_block_layer_odd(a->act[r->act], dtype)))
        a->lacking[r->expert] = active + 1; /* all lanes that write it write this value */
}

/* Forward: one row of a run a group of lanes. */
MOE_DEVICE_BODY void moei_block_layer_act_forward(const moei_block_layer_act_args* a,
                                                  const int dtype)
{
    const moei_block_layer_act_row r = moei_block_layer_act_find(a);
    (void)moei_block_layer_act_row_8(a, &r, 0, dtype);
}

/* Backward: the first row_grid thread blocks have one row of a run a group of lanes; the others
   zero dweights, one slot a thread. */
MOE_DEVICE_BODY void moei_block_layer_act_backward(const moei_block_layer_act_args* a,
                                                   const int dtype)
{
    const int lanes = 1 << a->lanes_log2, lane = (int)threadIdx.x & (lanes - 1);
    if (blockIdx.x >= a->row_grid) { /* slots without an active expert */
        const int64_t slot =
            (blockIdx.x - a->row_grid) * MOEI_BLOCK_LAYER_ACT_THREADS + (int64_t)threadIdx.x;
        const int32_t e = slot < a->slots ? a->ids[slot] : 0;
        if (slot < a->slots && (e < 0 || e >= a->num_experts || a->active_index[e] < 0))
            a->dweights[slot] = 0.0f;
    } else {
        const moei_block_layer_act_row r = moei_block_layer_act_find(a);
        float sum;
        if (a->lacking && lane == 0 && r.there) moei_block_layer_act_hold(a, &r, dtype);
        sum = moe_warp_sum(moei_block_layer_act_row_8(a, &r, 1, dtype), lanes);
        if (!a->dweights || !r.live) return;
        if (a->form == MOE_BLOCK_LAYER_BATCH) {
            for (int k = lane; k < a->top_k; k += lanes)
                if (a->ids[r.weight_at + k] == r.expert) a->dweights[r.weight_at + k] = sum;
        } else if (lane == 0) {
            a->dweights[r.weight_at] = sum;
        }
    }
}

#define MOEI_BLOCK_LAYER_ACT_LIST(X) X(fp16, MOE_FP16) X(bf16, MOE_BF16)

#define MOEI_BLOCK_LAYER_ACT_KERNELS(name, dtype)                                                  \
    MOE_KERNEL(MOEI_BLOCK_LAYER_ACT_THREADS, 2)                                                    \
    moei_block_layer_act_forward_##name(MOE_ARG(moei_block_layer_act_args) a)                      \
    {                                                                                              \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (!moe_fault_stopped(a.fault)) moei_block_layer_act_forward(&a, dtype);                  \
    }                                                                                              \
    MOE_KERNEL(MOEI_BLOCK_LAYER_ACT_THREADS, 2)                                                    \
    moei_block_layer_act_backward_##name(MOE_ARG(moei_block_layer_act_args) a)                     \
    {                                                                                              \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (!moe_fault_stopped(a.fault)) moei_block_layer_act_backward(&a, dtype);                 \
    }
MOEI_BLOCK_LAYER_ACT_LIST(MOEI_BLOCK_LAYER_ACT_KERNELS)
#undef MOEI_BLOCK_LAYER_ACT_KERNELS

/* Prepares the forward or backward kernel, and fills in lanes_log2 and row_grid of *a. `runs`: the
   most that can exist. */
MOE_HOST moe_status moei_block_layer_act_prepare(moe_launch* l, moei_block_layer_act_args* a,
                                                 int64_t runs, int backward, int dtype)
{
    const int vectors = a->run << (a->block_log2 - 3);
    moe_launch_config c;
    int64_t zero_grid = 0;
    int groups;
    a->lanes_log2 = 1;
    while (a->lanes_log2 < 5 && 1 << a->lanes_log2 < vectors) ++a->lanes_log2;
    groups = MOEI_BLOCK_LAYER_ACT_THREADS >> a->lanes_log2;
    a->row_grid = ((runs << a->block_log2) + groups - 1) / groups;
    if (backward && a->dweights)
        zero_grid = (a->slots + MOEI_BLOCK_LAYER_ACT_THREADS - 1) / MOEI_BLOCK_LAYER_ACT_THREADS;
    if (a->row_grid + zero_grid == 0) return MOE_OK;
    c = moe_grid(a->row_grid + zero_grid, MOEI_BLOCK_LAYER_ACT_THREADS, 0, 0);
    c.dependent = 1;
#define MOEI_BLOCK_LAYER_ACT_CASE(name, dt)                                                        \
    if (dtype == dt && backward) return MOE_PREPARE(l, moei_block_layer_act_backward_##name, c);   \
    if (dtype == dt) return MOE_PREPARE(l, moei_block_layer_act_forward_##name, c);
    MOEI_BLOCK_LAYER_ACT_LIST(MOEI_BLOCK_LAYER_ACT_CASE)
#undef MOEI_BLOCK_LAYER_ACT_CASE
    return MOE_STATUS(MOE_ERR_DTYPE, dtype);
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moei_block_layer_act_preload(void)
{
#define MOEI_BLOCK_LAYER_ACT_LOAD(name, dt)                                                        \
    MOE_TRY(moe_preload_kernel((const void*)moei_block_layer_act_forward_##name));                 \
    MOE_TRY(moe_preload_kernel((const void*)moei_block_layer_act_backward_##name));
    MOEI_BLOCK_LAYER_ACT_LIST(MOEI_BLOCK_LAYER_ACT_LOAD)
#undef MOEI_BLOCK_LAYER_ACT_LOAD
    return MOE_OK;
}

#endif
