/* setup.cuh: finds the active experts of a layer form and writes the tables of their matrices'
   addresses, for block_layer.cuh.

     mark     batch: flag[e] = 1 for each e in ids
     active   from flags, offsets or none (dense): active [] (ascending, then -1) and active_index
              [E] (the expert's position in active, -1: not active)
     tables   w1_table [E 2I / block] (not gated E I / block), w2_table [E I / block]: the address
              of each block column of the activations, null for experts that are not active.
              Backward: the same of dw1 and dw2, by active_index; grad_expert; zeros in `lacking` of
              act.cuh */
#ifndef MOE_BLOCK_LAYER_SETUP_CUH
#define MOE_BLOCK_LAYER_SETUP_CUH

#include "../base/block.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "desc.h"

#define MOEI_BLOCK_LAYER_SETUP_THREADS 256

/* Arguments of mark and active. */
typedef struct moei_block_layer_active_args {
    const int32_t* ids;           /* mark: [slots] */
    const int32_t* expert_offset; /* sparse: [E + 1]; else null */
    int32_t* flag;                /* batch: [E], zeros before mark; else null */
    int32_t* active;              /* [entries] */
    int32_t* active_index;        /* [E] */
    int32_t* count;               /* [1] experts in active */
    uint64_t* fault;              /* [1] fault word; or null */
    int64_t slots;                /* T * K; dense: 0 */
    int32_t num_experts;          /* E */
    int32_t room;                 /* most experts that may be active; more: NO_ROOM */
    int32_t entries;              /* of active */
    int32_t rank;                 /* reported with a fault */
} moei_block_layer_active_args;

/* Sets the flag of each slot's expert, one slot a thread. Raises BAD_ID. */
MOE_KERNEL(MOEI_BLOCK_LAYER_SETUP_THREADS, 1)
moei_block_layer_mark(MOE_ARG(moei_block_layer_active_args) a)
{
    const int64_t slot = (int64_t)blockIdx.x * MOEI_BLOCK_LAYER_SETUP_THREADS + threadIdx.x;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.fault) || slot >= a.slots) return;
    {
        const int32_t e = a.ids[slot];
        if (e >= 0 && e < a.num_experts) a.flag[e] = 1; /* all threads that write it write 1 */
        else if (e != -1) moe_fault_raise(a.fault, MOE_FAULT_BAD_ID, a.rank, slot);
    }
}

/* Writes active, active_index and count. Launched as one thread block, which takes one expert a
   thread at a time. Raises NO_ROOM. */
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

/* Arguments of tables. */
typedef struct moei_block_layer_tables_args {
    moe_weights w1, w2;                      /* strides filled in */
    const int32_t* active;                   /* [E] written by active */
    const int32_t* active_index;             /* [E] */
    const int32_t* count;                    /* [1] */
    const void** w1_table;                   /* [E, blocks_pre] */
    const void** w2_table;                   /* [E, blocks_act] */
    void** dw1_table;                        /* [E, blocks_pre] backward with dw1; else null */
    void** dw2_table;                        /* [E, blocks_act] backward with dw2; else null */
    int32_t* grad_expert;                    /* [max_experts]; or null */
    int32_t* lacking;                        /* batch, backward: [E], becomes zeros; or null */
    char* dw1;                               /* [max_experts, 2I or I, H]; or null */
    char* dw2;                               /* [max_experts, H, I]; or null */
    uint64_t* fault;                         /* [1] fault word; or null */
    int64_t hidden, intermediate;            /* H, I */
    int32_t num_experts, max_experts, block; /* E; matrices of dw1 and dw2; of a sparse block */
    int32_t blocks_pre, blocks_act;          /* block columns of an expert in pre, in act */
    int32_t grad_bytes;                      /* of an element of dw1 and dw2 */
    int32_t no_tokens; /* 1: no expert is active, and only grad_expert is written; else 0 */
    int32_t rank;      /* reported with a fault */
} moei_block_layer_tables_args;

/* Returns the address of expert e's matrix; raises BAD_TABLE and returns null where the address is
   null or misaligned. */
MOE_DEVICE const char* moei_block_layer_matrix(const moe_weights* w, int e, uint64_t* fault,
                                               int rank)
{
    const char* p = w->table ? (const char*)w->table[e]
                             : (const char*)w->base + (int64_t)e * w->expert_stride * 2;
    if (p && ((uintptr_t)p & 15) == 0) return p;
    moe_fault_raise(fault, MOE_FAULT_BAD_TABLE, rank, e);
    return 0;
}

/* Writes the tables, grad_expert and `lacking`: one block column of pre a thread, which also does
   that of act (act has no more). More active experts than max_experts raise NO_ROOM; without a
   fault word only the first max_experts get gradients. */
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
    if (!a.no_tokens && i < (int64_t)a.num_experts * a.blocks_pre) {
        const int e = (int)(i / a.blocks_pre), j = (int)(i - (int64_t)e * a.blocks_pre);
        const int64_t at2 = (int64_t)e * a.blocks_act + j;
        const int64_t active = a.active_index[e];
        const bool grad = active >= 0 && active < a.max_experts;
        const char* p =
            active >= 0 ? moei_block_layer_matrix(&a.w1, e, a.fault, a.rank) : (const char*)0;
        a.w1_table[i] = p ? p + (int64_t)j * a.block * a.w1.row_stride * 2 : p;
        if (a.dw1_table) {
            const int64_t row = active * a.blocks_pre * a.block + (int64_t)j * a.block;
            a.dw1_table[i] = grad ? a.dw1 + row * a.hidden * a.grad_bytes : (char*)0;
        }
        if (j >= a.blocks_act) return;
        p = active >= 0 ? moei_block_layer_matrix(&a.w2, e, a.fault, a.rank) : (const char*)0;
        a.w2_table[at2] = p ? p + (int64_t)j * a.block * 2 : p;
        if (a.dw2_table) {
            const int64_t at = active * a.hidden * a.intermediate + (int64_t)j * a.block;
            a.dw2_table[at2] = grad ? a.dw2 + at * a.grad_bytes : (char*)0;
        }
    }
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moei_block_layer_setup_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_block_layer_mark));
    MOE_TRY(moe_preload_kernel((const void*)moei_block_layer_active));
    return moe_preload_kernel((const void*)moei_block_layer_tables);
}

#endif
