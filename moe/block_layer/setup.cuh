/* setup.cuh: which experts a layer form has at work, and where their matrices lie in strips of
   blocks, for block_layer.cuh.

     mark     batch: flag[e] = 1 for each e in ids
     active   flags, or offsets, to active [] (ascending, then -1) and active_index [E] (the place in
              it, -1: not active)
     tables   w1_table [E 2I / block], w2_table [E I / block]: address of each strip of blocks of
              the active experts, null of the others; backward: the same of dw1 and dw2 by slots,
              grad_expert, and zeros in what act.cuh marks */
#ifndef MOE_BLOCK_LAYER_SETUP_CUH
#define MOE_BLOCK_LAYER_SETUP_CUH

#include "../base/block.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "desc.h"

#define MOEI_BLOCK_LAYER_SETUP_THREADS 256

typedef struct moei_block_layer_active_args {
    const int32_t* ids;           /* mark: [slots] */
    const int32_t* expert_offset; /* sparse: [E + 1]; else null */
    int32_t* flag;                /* batch: [E], cleared before mark; else null */
    int32_t* active;              /* [entries] */
    int32_t* active_index;        /* [E] */
    int32_t* count;               /* [1] experts in active */
    uint64_t* fault;
    int64_t slots;
    int32_t num_experts;
    int32_t room;    /* most experts there may be */
    int32_t entries; /* of active */
    int32_t rank;
} moei_block_layer_active_args;

MOE_KERNEL(MOEI_BLOCK_LAYER_SETUP_THREADS, 1)
moei_block_layer_mark(MOE_ARG(moei_block_layer_active_args) a)
{
    const int64_t slot = (int64_t)blockIdx.x * MOEI_BLOCK_LAYER_SETUP_THREADS + threadIdx.x;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.fault) || slot >= a.slots) return;
    {
        const int32_t e = a.ids[slot];
        if (e >= 0 && e < a.num_experts) a.flag[e] = 1; /* all who write it write this */
        else if (e != -1) moe_fault_raise(a.fault, MOE_FAULT_BAD_ID, a.rank, slot);
    }
}

/* One block. */
MOE_KERNEL(MOEI_BLOCK_LAYER_SETUP_THREADS, 1)
moei_block_layer_active(MOE_ARG(moei_block_layer_active_args) a)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    int before = 0;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.fault)) return;
    for (int e0 = 0; e0 < a.num_experts; e0 += MOEI_BLOCK_LAYER_SETUP_THREADS) {
        const int e = e0 + (int)threadIdx.x;
        int on = e < a.num_experts, at, all;
        if (on && a.flag) on = a.flag[e] != 0;
        if (on && a.expert_offset) on = a.expert_offset[e + 1] > a.expert_offset[e];
        at = before + moe_block_exclusive_scan(on, &scratch, &all);
        if (e < a.num_experts) a.active_index[e] = on && at < a.room ? at : -1;
        if (on && at < a.room) a.active[at] = e;
        before += all;
    }
    if (threadIdx.x == 0) {
        if (before > a.room) moe_fault_raise(a.fault, MOE_FAULT_NO_ROOM, a.rank, before);
        *a.count = before < a.room ? before : a.room;
    }
    for (int i = before + (int)threadIdx.x; i < a.entries; i += MOEI_BLOCK_LAYER_SETUP_THREADS)
        a.active[i] = -1;
}

typedef struct moei_block_layer_tables_args {
    moe_weights w1, w2; /* strides filled in */
    const int32_t* active;
    const int32_t* active_index;
    const int32_t* count;
    const void** w1_table;
    const void** w2_table;
    void** dw1_table; /* backward, where wanted; else null, and so the next */
    void** dw2_table;
    int32_t* grad_expert; /* or null */
    int32_t* lacking;     /* batch, backward: [num_experts], cleared; or null */
    char* dw1;
    char* dw2;
    uint64_t* fault;
    int64_t hidden, intermediate;
    int32_t num_experts, max_experts, block;
    int32_t strips1, strips2; /* of an expert in w1 and w2 */
    int32_t grad_bytes;       /* of an element of dw1 and dw2 */
    int32_t no_tokens;        /* 1: no expert is active; grad_expert alone is written */
    int32_t rank;
} moei_block_layer_tables_args;

/* An expert's matrix; null where the table's entry is of no use. */
MOE_DEVICE const char* moei_block_layer_matrix(const moe_weights* w, int e, uint64_t* fault,
                                               int rank)
{
    const char* p = w->table ? (const char*)w->table[e]
                             : (const char*)w->base + (int64_t)e * w->expert_stride * 2;
    if (p && ((uintptr_t)p & 15) == 0) return p;
    moe_fault_raise(fault, MOE_FAULT_BAD_TABLE, rank, e);
    return 0;
}

/* A thread a strip of w1; those of w2 are no more. */
MOE_KERNEL(MOEI_BLOCK_LAYER_SETUP_THREADS, 1)
moei_block_layer_tables(MOE_ARG(moei_block_layer_tables_args) a)
{
    const int64_t i = (int64_t)blockIdx.x * MOEI_BLOCK_LAYER_SETUP_THREADS + threadIdx.x;
    int count;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.fault)) return;
    count = a.no_tokens ? 0 : *a.count;
    if (a.grad_expert) {
        if (count > a.max_experts && a.fault) {
            if (i == 0) moe_fault_raise(a.fault, MOE_FAULT_NO_ROOM, a.rank, count);
            return;
        }
        if (i < a.max_experts) a.grad_expert[i] = i < count ? a.active[i] : -1;
    }
    if (a.lacking && i < a.num_experts) a.lacking[i] = 0;
    if (!a.no_tokens && i < (int64_t)a.num_experts * a.strips1) {
        const int e = (int)(i / a.strips1), j = (int)(i - (int64_t)e * a.strips1);
        const int64_t at2 = (int64_t)e * a.strips2 + j;
        const int64_t slot = a.active_index[e];
        const bool grad = slot >= 0 && slot < a.max_experts;
        const char* p =
            slot >= 0 ? moei_block_layer_matrix(&a.w1, e, a.fault, a.rank) : (const char*)0;
        a.w1_table[i] = p ? p + (int64_t)j * a.block * a.w1.row_stride * 2 : p;
        if (a.dw1_table) {
            const int64_t row = slot * a.strips1 * a.block + (int64_t)j * a.block;
            a.dw1_table[i] = grad ? a.dw1 + row * a.hidden * a.grad_bytes : (char*)0;
        }
        if (j >= a.strips2) return;
        p = slot >= 0 ? moei_block_layer_matrix(&a.w2, e, a.fault, a.rank) : (const char*)0;
        a.w2_table[at2] = p ? p + (int64_t)j * a.block * 2 : p;
        if (a.dw2_table) {
            const int64_t at = slot * a.hidden * a.intermediate + (int64_t)j * a.block;
            a.dw2_table[at2] = grad ? a.dw2 + at * a.grad_bytes : (char*)0;
        }
    }
}

MOE_HOST moe_status moei_block_layer_setup_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_block_layer_mark));
    MOE_TRY(moe_preload_kernel((const void*)moei_block_layer_active));
    return moe_preload_kernel((const void*)moei_block_layer_tables);
}

#endif
