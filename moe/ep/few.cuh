/* few.cuh: rows in expert order for few received slots, in one thread block, which holds them all
   in shared memory: what route.cuh's two launches do for many. Called by receive.cuh. */
#ifndef MOE_EP_FEW_CUH
#define MOE_EP_FEW_CUH

#include "../route/place.cuh"

#define MOEI_EP_FEW_THREADS 1024 /* most threads */
#ifndef MOEI_EP_FEW_SLOTS
#define MOEI_EP_FEW_SLOTS 8192 /* most slots; a test may change it between calls */
#endif

/* Shared memory. Warp w has the slots w S .. (w + 1) S - 1, S = 32 steps. */
typedef struct moei_ep_few {
    moei_route_shared s; /* ahead, stride, offset, start; the rest is not used */
    int* item;           /* [warps * S] expert + 2^16 rank in its warp; -1: no expert */
    int steps;
} moei_ep_few;

/* Returns the steps of a block of so many threads. */
MOE_HOST_DEVICE int moei_ep_few_steps(int slots, int threads)
{
    return (slots + threads - 1) / threads;
}

/* Returns the bytes of the buffers. */
MOE_HOST_DEVICE size_t moei_ep_few_bytes(int num_experts, int slots, int threads)
{
    return moei_route_ahead_bytes(num_experts, threads / 32) +
           (size_t)(moei_ep_few_steps(slots, threads) * threads + 2 * num_experts) * 4;
}

/* Sets the addresses of *f from `shared` on, and clears `ahead`. All threads; a barrier must
   follow. */
MOE_DEVICE void moei_ep_few_begin(moei_ep_few* f, const moe_route_desc* d, unsigned char* shared)
{
    const int num_experts = d->num_replicas, warps = (int)(blockDim.x >> 5);
    f->steps = moei_ep_few_steps(d->num_tokens * d->top_k, (int)blockDim.x);
    f->s.ahead = (uint16_t*)shared;
    f->s.stride = warps | 1;
    f->item = (int*)(shared + moei_route_ahead_bytes(num_experts, warps));
    f->s.offset = f->item + f->steps * (int)blockDim.x;
    f->s.start = f->s.offset + num_experts;
    moei_route_clear(&f->s, num_experts);
}

/* Computes counts and offsets from `ahead`, which has each warp's counts: replaces them by sums
   over the warps before; sets offset[e], and start[e] = slots of e. Returns the number of rows. All
   threads; ends with a barrier. empty: 1: writes none of them to global memory. */
MOE_DEVICE int moei_ep_few_offsets(const moei_route_args* a, const moei_route_shared* s,
                                   moe_block_scan_scratch* scratch, int empty)
{
    const moe_route_desc* d = &a->d;
    const int num_experts = d->num_replicas, warps = (int)(blockDim.x >> 5);
    int rows = 0;
    MOE_NO_UNROLL
    for (int e = moe_warp(); e < num_experts; e += warps) { /* an expert a warp */
        uint16_t* count = s->ahead + e * s->stride;
        const int n = moe_lane() < warps ? count[moe_lane()] : 0;
        const int all = moe_warp_inclusive_scan(n);
        if (moe_lane() < warps) count[moe_lane()] = (uint16_t)(all - n);
        if (moe_lane() == MOE_WARP_SIZE - 1) s->start[e] = all;
    }
    __syncthreads(); /* start is complete */
    MOE_NO_UNROLL
    for (int e0 = 0; e0 < num_experts; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x, n = e < num_experts ? s->start[e] : 0;
        int total;
        const int at = rows + moe_block_exclusive_scan((int)moei_route_padded(d, (unsigned)n),
                                                       scratch, &total);
        if (e < num_experts) {
            s->offset[e] = at;
            if (!empty) {
                d->expert_count[e] = n;
                d->expert_offset[e] = at;
            }
        }
        rows += total;
    }
    __syncthreads(); /* offset is complete */
    if (threadIdx.x == 0 && !empty) {
        d->expert_offset[num_experts] = rows;
        if (rows > a->max_rows) moe_fault_raise(d->fault, MOE_FAULT_ROWS_FULL, d->rank, rows);
    }
    return rows;
}

/* Writes row_weight of the first `rows` rows, from row_slot. All threads. */
MOE_DEVICE void moei_ep_few_weigh(const moei_route_args* a, int rows)
{
    const moe_route_desc* d = &a->d;
    __syncthreads(); /* row_slot is written */
    MOE_NO_UNROLL
    for (int r = (int)threadIdx.x; r < min(rows, a->max_rows); r += (int)blockDim.x) {
        const int slot = d->row_slot[r];
        d->row_weight[r] = slot >= 0 ? d->weights[slot] : 0.0f;
    }
}

/* Gives each slot its row: expert_count, expert_offset, row_slot and place of a.
     1. rank: a slot's rank in its warp among the slots of its expert
     2. offsets
     3. row = offset + slots of the warps before + rank
     4. clears the rows that pad experts, and those past the last
   empty: 1: as if there were no slots, and writes nothing: it fetches the instructions while the
   kernel waits. All threads, behind a barrier. */
MOE_DEVICE_BODY void moei_ep_few_place(const moei_route_args* a, const moei_ep_few* f,
                                       moe_block_scan_scratch* scratch, int empty)
{
    const moe_route_desc* d = &a->d;
    const moei_route_shared* s = &f->s;
    const int num_experts = d->num_replicas, bits = 32 - __clz(num_experts);
    const uint32_t end = empty ? 0 : (uint32_t)(d->num_tokens * d->top_k);
    const uint32_t first = (uint32_t)(moe_warp() * f->steps * MOE_WARP_SIZE + moe_lane());
    int id = moei_route_load_id(d, first, end, 1), rows;
    MOE_NO_UNROLL
    for (int i = 0; i < f->steps; ++i) { /* 1. */
        const uint32_t slot = first + (uint32_t)(i * MOE_WARP_SIZE);
        const int expert = moei_route_id(d, slot, id, 1);
        int rank;
        id = moei_route_load_id(d, i + 1 < f->steps ? slot + MOE_WARP_SIZE : end, end, 1);
        rank = moei_route_warp_rank(s, expert, bits);
        f->item[slot] = expert < 0 ? -1 : expert | rank << 16;
    }
    __syncthreads();                                  /* ahead is complete */
    rows = moei_ep_few_offsets(a, s, scratch, empty); /* 2. */
    MOE_NO_UNROLL
    for (int i = 0; i < f->steps; ++i) { /* 3. */
        const uint32_t slot = first + (uint32_t)(i * MOE_WARP_SIZE);
        const int item = f->item[slot], expert = item < 0 ? 0 : item & 0xffff;
        int row = -1;
        if (slot >= end) break;
        if (item >= 0)
            row = s->offset[expert] + s->ahead[expert * s->stride + moe_warp()] + (item >> 16);
        if (row >= a->max_rows) row = -1;
        if (row >= 0) d->row_slot[row] = (int)slot;
        moei_route_write_row(d, (int)slot, expert, 0, row);
    }
    if (empty) return;
    if (d->row_multiple > 1) moei_route_pad(a, s); /* 4. */
    moei_route_clear_rows(a, (uint32_t)rows + threadIdx.x, (uint32_t)a->max_rows, blockDim.x);
    if (d->row_weight) moei_ep_few_weigh(a, rows);
}

#endif
