/* place.cuh: the placing launch of route.cuh: offsets of the experts, then the row of each slot. */
#ifndef MOE_ROUTE_PLACE_CUH
#define MOE_ROUTE_PLACE_CUH

#include "../base/block.cuh"
#include "../base/copy.cuh"
#include "count.cuh"
#include "rank.cuh"

/* Shared memory of placing. A round is the slots that the block has in flight together. Their
   positions are their ranks by expert; slots without an expert have none. */
typedef struct moei_route_shared {
    uint16_t* ahead; /* [P][stride] slots of each warp in the round; then of the warps before */
    int stride;      /* warps, or one more to be odd: no bank conflicts between experts */
    int* row;        /* [positions] row of the slot; -1: none */
    int* slot;       /* [positions] the slot */
    float* weight;   /* [positions] its weight */
    int* base;       /* [P] row of the round's first slot of each expert */
    int* offset;     /* [P] first row of each expert */
    int* start;      /* [P] position of the round's first slot of each expert */
} moei_route_shared;

/* Returns the bytes of `ahead`, a multiple of 16. */
MOE_HOST_DEVICE size_t moei_route_ahead_bytes(int num_experts, int warps)
{
    return ((size_t)num_experts * (size_t)(warps | 1) * 2 + 15) / 16 * 16;
}

/* Returns the bytes of moei_route_shared's buffers. */
MOE_HOST_DEVICE size_t moei_route_shared_bytes(int num_experts, int warps)
{
    return moei_route_ahead_bytes(num_experts, warps) + (size_t)warps * 32 * MOEI_ROUTE_STEPS * 12 +
           (size_t)num_experts * 12;
}

/* Sets the addresses of *s from `shared` on. */
MOE_DEVICE void moei_route_carve(moei_route_shared* s, unsigned char* shared, int num_experts)
{
    const int warps = (int)(blockDim.x >> 5), positions = warps * 32 * MOEI_ROUTE_STEPS;
    s->ahead = (uint16_t*)shared;
    s->stride = warps | 1;
    s->row = (int*)(shared + moei_route_ahead_bytes(num_experts, warps));
    s->slot = s->row + positions;
    s->weight = (float*)(s->slot + positions);
    s->base = (int*)(s->weight + positions);
    s->offset = s->base + num_experts;
    s->start = s->offset + num_experts;
}

/* Clears `ahead`. All threads; a barrier must follow. */
MOE_DEVICE void moei_route_clear(const moei_route_shared* s, int num_experts)
{
    const int n = (int)(moei_route_ahead_bytes(num_experts, (int)(blockDim.x >> 5)) / 16);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        ((uint4*)s->ahead)[i] = make_uint4(0, 0, 0, 0);
}

/* Sets parts[g][e] to e's slots in group g, and s->base[e] to e's slots in the chunks of this
   block's group before its own. All threads; a barrier must follow. */
MOE_DEVICE void moei_route_sum(const moe_route_desc* d, const moei_route_shared* s, int* parts,
                               const moei_route_groups* g)
{
    const int num_experts = d->num_replicas, chunks = (int)gridDim.x, own = (int)blockIdx.x;
    MOE_NO_UNROLL
    for (int w = moe_warp(); w < 1 << (g->tiles_log2 + g->log2); w += (int)(blockDim.x >> 5)) {
        const int e = (w & ((1 << g->tiles_log2) - 1)) * 128 + moe_lane() * 4;
        const int group = w >> g->tiles_log2, from = group * g->each;
        const int upto = from + g->each < chunks ? from + g->each : chunks;
        const bool here = from <= own && own < upto;
        uint4 sum = make_uint4(0, 0, 0, 0);
        if (here) {
            moei_route_add_counts(&sum, d, e, from, own);
            moei_route_store_counts(s->base, e, num_experts, sum);
        }
        moei_route_add_counts(&sum, d, e, here ? own : from, upto);
        if (from < upto) moei_route_store_counts(parts + group * num_experts, e, num_experts, sum);
    }
}

/* Loads the ids and weights of a thread's slots in the round that begins at slot `begin`; id -1
   past `end` and where the token does not exist. */
MOE_DEVICE void moei_route_fetch(int* id, float* weight, const moe_route_desc* d, uint32_t begin,
                                 uint32_t end, int steps, const int options)
{
    const uint32_t first = begin + (uint32_t)(moe_warp() * steps * MOE_WARP_SIZE + moe_lane());
    MOE_UNROLL
    for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
        const uint32_t slot = first + (uint32_t)(i * MOE_WARP_SIZE);
        const bool in = slot < end && i < steps;
        id[i] = in ? moei_route_load_id(d, slot, end, options) : -1;
        weight[i] =
            in && d->row_weight ? __uint_as_float(moei_load4_early(d->weights + slot)) : 0.0f;
    }
}

/* Returns an expert's term of a checksum: row times an odd number. The sums differ where one
   expert's rows differ. */
MOE_DEVICE uint32_t moei_route_checksum(int e, int row)
{
    return ((uint32_t)e * 0x9e3779b9u | 1u) * (uint32_t)row;
}

/* Returns the rows of an expert that keeps `kept` slots. */
MOE_DEVICE unsigned moei_route_padded(const moe_route_desc* d, unsigned kept)
{
    const unsigned m = (unsigned)d->row_multiple;
    return m == 1 ? kept : (kept + m - 1) / m * m;
}

/* Computes offsets; block 0 writes the counts and offsets. Sets s->offset[e], and s->base[e] of
   this block's first round; with options s->start[e] = slots that e keeps. Returns the number of
   rows. Sets *checksum to the sum over this thread's experts of the bases that they must reach in
   the end. All threads.
     1. sums the chunk counts by group
     2. each thread adds up the groups of its experts, and a prefix sum gives their offsets */
MOE_DEVICE int moei_route_offsets(const moei_route_args* a, const moei_route_shared* s,
                                  moe_block_scan_scratch* scratch, uint32_t* checksum,
                                  const int options)
{
    const moe_route_desc* d = &a->d;
    const int num_experts = d->num_replicas, chunks = d->num_tokens > 0 ? (int)gridDim.x : 0;
    const moei_route_groups group = moei_route_group(num_experts, chunks);
    /* with more experts than all warps take at once, all chunks are one group */
    int* parts = num_experts <= (int)blockDim.x * 4 ? s->row : s->start;
    int rows = 0;
    *checksum = 0;
    if (chunks > 0) moei_route_sum(d, s, parts, &group); /* 1. */
    __syncthreads(); /* 2.; parts and base are complete */
    for (int e0 = 0; e0 < num_experts; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x;
        unsigned all = 0, before = 0, kept, taken;
        int at, own = 0, total;
        if (e < num_experts) {
            if (chunks > 0) own = d->chunk_count[(int)blockIdx.x * num_experts + e];
            MOE_UNROLL_8
            for (int g = 0; g < 1 << group.log2; ++g) {
                const int from = g * group.each;
                const unsigned n = from < chunks ? (unsigned)parts[g * num_experts + e] : 0;
                all += n;
                before += from + group.each <= (int)blockIdx.x ? n : 0;
            }
        }
        kept = options && all > (unsigned)d->capacity ? (unsigned)d->capacity : all;
        taken = options ? moei_route_padded(d, kept) : kept;
        at =
            (int)((unsigned)rows + (unsigned)moe_block_exclusive_scan((int)taken, scratch, &total));
        if (e < num_experts) {
            s->offset[e] = at;
            s->base[e] = (int)((unsigned)s->base[e] + before + (unsigned)at);
            *checksum += moei_route_checksum(e, (int)((unsigned)s->base[e] + (unsigned)own));
            if (options) s->start[e] = (int)kept; /* only this thread has read parts[e] */
            if (blockIdx.x == 0) {
                d->expert_count[e] = (int)kept, d->expert_offset[e] = at;
                if (options && d->drop_count) d->drop_count[e] = (int)(all - kept);
            }
        }
        rows = (int)((unsigned)rows + (unsigned)total);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        d->expert_offset[num_experts] = rows;
        if (rows < 0 || rows > a->max_rows)
            moe_fault_raise(d->fault, options && d->max_rows ? MOE_FAULT_ROWS_FULL :
            MOE_FAULT_BAD_COUNT,
                            d->rank, options && d->max_rows ? rows : 0);
    }
    return rows;
}

/* Clears the rows from, from + step, ... below upto: they hold no slot. Stays below max_rows,
   whatever the counts say. */
MOE_DEVICE void moei_route_clear_rows(const moei_route_args* a, uint32_t from, uint32_t upto,
                                      uint32_t step)
{
    if (upto > (uint32_t)a->max_rows) upto = (uint32_t)a->max_rows;
    for (uint32_t r = from; r < upto; r += step) {
        if (a->d.row_slot) a->d.row_slot[r] = -1;
        if (a->d.row_weight) a->d.row_weight[r] = 0.0f;
    }
}

/* Clears the rows that pad experts, an expert a warp. start[e]: slots that e keeps. */
MOE_DEVICE void moei_route_pad(const moei_route_args* a, const moei_route_shared* s)
{
    const int num_experts = a->d.num_replicas, warps = (int)(blockDim.x >> 5);
    MOE_NO_UNROLL
    for (int e = (int)blockIdx.x * warps + moe_warp(); e < num_experts;
         e += (int)gridDim.x * warps) {
        const unsigned kept = (unsigned)s->start[e], from = (unsigned)s->offset[e] + kept;
        const unsigned n = moei_route_padded(&a->d, kept) - kept; /* below row_multiple */
        if (from <= 0x7fffffffu)
            moei_route_clear_rows(a, from + (unsigned)moe_lane(), from + n, MOE_WARP_SIZE);
    }
}

/* Returns how many slots of this warp before the lane's slot, in this call and earlier ones of the
   round, have the same expert; counts the slot in `ahead`. The whole warp calls it. */
MOE_DEVICE int moei_route_warp_rank(const moei_route_shared* s, int expert, int bits)
{
    const uint32_t same = moei_route_same(expert, bits);
    uint16_t* count = s->ahead + (expert < 0 ? 0 : expert) * s->stride + moe_warp();
    const int rank = *count + __popc(same & ((1u << moe_lane()) - 1u));
    __syncwarp(MOE_FULL_WARP); /* all lanes have read the count */
    if (expert >= 0 && same >> moe_lane() == 1u) *count = (uint16_t)(rank + 1); /* last one */
    __syncwarp(MOE_FULL_WARP);
    return rank;
}

/* Replaces each expert's counts of the warps in `ahead` by sums over the warps before. Sets
   s->start to each expert's first position. Returns the number of positions. All threads; ends with
   a barrier. */
MOE_DEVICE int moei_route_starts(const moei_route_shared* s, int num_experts,
                                 moe_block_scan_scratch* scratch)
{
    const int warps = (int)(blockDim.x >> 5);
    int taken = 0;
    for (int e0 = 0; e0 < num_experts; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x;
        uint16_t* count = s->ahead + e * s->stride;
        int n = 0, total;
        for (int w = 0; w < warps && e < num_experts; w += 8) {
            int v[8];
            MOE_UNROLL
            for (int i = 0; i < 8; ++i) v[i] = w + i < warps ? count[w + i] : 0;
            MOE_UNROLL
            for (int i = 0; i < 8; ++i) {
                if (w + i < warps) count[w + i] = (uint16_t)n;
                n += v[i];
            }
        }
        n = taken + moe_block_exclusive_scan(n, scratch, &total);
        if (e < num_experts) s->start[e] = n;
        taken += total;
    }
    __syncthreads();
    return taken;
}

/* Computes the row of a slot from its rank in its warp, and collects the slot by position in shared
   memory. Returns -1 where the slot has no expert or is over the capacity, and, with a fault, where
   the ids are not those that were counted. */
MOE_DEVICE int moei_route_place_slot(const moei_route_args* a, const moei_route_shared* s,
                                     uint32_t slot, int expert, int rank, float weight,
                                     const int options)
{
    const moe_route_desc* d = &a->d;
    int row = -1;
    if (expert >= 0) {
        const int n = s->ahead[expert * s->stride + moe_warp()] + rank, at = s->start[expert] + n;
        row = (int)((unsigned)s->base[expert] + (unsigned)n);
        if (options && (unsigned)row - (unsigned)s->offset[expert] >= (unsigned)d->capacity) {
            row = -1; /* over the capacity */
        } else if (row < 0 || row >= a->max_rows) {
            moe_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, d->rank, slot);
            row = -1;
        }
        s->row[at] = row;
        s->slot[at] = (int)slot;
        s->weight[at] = weight;
    }
    return row;
}

/* Writes slot_row and place of a slot whose expert begins at row `offset`; row -1: none. */
MOE_DEVICE void moei_route_write_row(const moe_route_desc* d, int slot, int expert, int offset,
                                     int row)
{
    if (d->slot_row) d->slot_row[slot] = row;
    if (d->place) {
        const bool by_expert = d->place_kind == MOE_PLACE_BY_EXPERT;
        moe_place p;
        p.buffer = row < 0 ? -1 : by_expert ? expert : 0;
        p.row = row < 0 ? -1 : by_expert ? row - offset : row;
        d->place[slot] = p;
    }
}

/* Writes row_slot and row_weight of the round's slots by position: whole runs of rows. Advances
   base to the next round. All threads. */
MOE_DEVICE void moei_route_write_slots(const moei_route_args* a, const moei_route_shared* s,
                                       int taken)
{
    const moe_route_desc* d = &a->d;
    const int num_experts = d->num_replicas;
    for (int at = (int)threadIdx.x; at < taken; at += (int)blockDim.x) {
        const int row = s->row[at];
        if (row >= 0 && d->row_slot) d->row_slot[row] = s->slot[at];
        if (row >= 0 && d->row_weight) d->row_weight[row] = s->weight[at];
    }
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) {
        const int next = e + 1 < num_experts ? s->start[e + 1] : taken;
        s->base[e] = (int)((unsigned)s->base[e] + (unsigned)(next - s->start[e]));
    }
}

/* Placing, one block a chunk: gives each slot its row.
     1. loads the first round's ids and weights; offsets; clears the rows that pad experts
     Then in each round:
     2. rank: a slot's rank in its warp among the slots of its expert
     3. start: sums over the warps before; the first position of each expert
     4. row of each slot = base + rank in the block. Writes slot_row and place in slot order;
        collects the slots by position in shared memory
     5. loads the next round's ids and weights
     6. writes row_slot and row_weight by position; advances base
     At the end:
     7. compares checksums; clears the rows past the last */
MOE_DEVICE_BODY void moei_route_place_chunk(const moei_route_args* a, unsigned char* shared,
                                            moe_block_scan_scratch* scratch, const int options)
{
    const moe_route_desc* d = &a->d;
    const int num_experts = d->num_replicas, bits = 32 - __clz(num_experts);
    const uint32_t end = moei_route_begin(d, blockIdx.x + 1);
    uint32_t begin = moei_route_begin(d, blockIdx.x);
    const int steps = (int)min((end - begin + blockDim.x - 1) / blockDim.x, MOEI_ROUTE_STEPS);
    uint32_t checksum;
    int id[MOEI_ROUTE_STEPS], rows;
    float weight[MOEI_ROUTE_STEPS];
    moei_route_shared s;

    moei_route_carve(&s, shared, num_experts);
    moei_route_clear(&s, num_experts);
    moe_pdl_wait();
    if (moe_fault_stopped(d->fault)) return;
    moei_route_fetch(id, weight, d, begin, end, steps, options); /* 1. */
    rows = moei_route_offsets(a, &s, scratch, &checksum, options);
    if (options && d->row_multiple > 1) {
        __syncthreads(); /* start is complete */
        moei_route_pad(a, &s); /* a barrier stands before start is written again */
    }

    for (; begin < end; begin += blockDim.x * (uint32_t)steps) {
        const uint32_t first = begin + (uint32_t)(moe_warp() * steps * MOE_WARP_SIZE + moe_lane());
        int expert[MOEI_ROUTE_STEPS], rank[MOEI_ROUTE_STEPS], taken;
        if (options) { /* 2. the loads of all replicas are in flight together */
            MOE_UNROLL
            for (int i = 0; i < MOEI_ROUTE_STEPS; ++i)
                if (i < steps)
                    id[i] = moei_route_id(d, first + (uint32_t)(i * MOE_WARP_SIZE), id[i], 1);
        }
        MOE_UNROLL /* 2. rank */
        for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
            expert[i] = -1;
            rank[i] = 0;
            if (i < steps) {
                expert[i] = options
                                ? id[i]
                                : moei_route_id(d, first + (uint32_t)(i * MOE_WARP_SIZE), id[i], 0);
                rank[i] = moei_route_warp_rank(&s, expert[i], bits);
            }
        }
        __syncthreads(); /* ahead is complete */
        taken = moei_route_starts(&s, num_experts, scratch); /* 3. start */
        MOE_UNROLL
        for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) { /* 4. row */
            const uint32_t slot = first + (uint32_t)(i * MOE_WARP_SIZE);
            const int row =
                moei_route_place_slot(a, &s, slot, expert[i], rank[i], weight[i], options);
            if (i < steps && slot < end && !(options && a->list_only && row >= 0))
                moei_route_write_row(d, (int)slot, expert[i],
                                     expert[i] < 0 ? 0 : s.offset[expert[i]], row);
        }
        moei_route_fetch(id, weight, d, begin + blockDim.x * (uint32_t)steps, end, steps,
                         options); /* 5. */
        __syncthreads(); /* 6.; the positions are complete */
        moei_route_write_slots(a, &s, taken);
        if (begin + blockDim.x * (uint32_t)steps < end) {
            moei_route_clear(&s, num_experts);
            __syncthreads();
        }
    }
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x)
        checksum -= moei_route_checksum(e, s.base[e]);
    if (d->num_tokens > 0 && checksum != 0) /* 7. not the ids that were counted */
        moe_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, d->rank, moei_route_begin(d, blockIdx.x));
    if (rows < 0) rows = 0;
    moei_route_clear_rows(a, (uint32_t)rows + blockIdx.x * blockDim.x + threadIdx.x,
                          (uint32_t)a->max_rows, gridDim.x * blockDim.x); /* past the last row */
}

/* Placing without and with options. */
#define MOEI_ROUTE_PLACE(name, options)                                                            \
    MOE_KERNEL(MOEI_ROUTE_THREADS, 1) name(MOE_ARG(moei_route_args) a)                             \
    {                                                                                              \
        MOE_SHARED(moe_block_scan_scratch, scratch);                                               \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moei_route_place_chunk(&a, shared, &scratch, options);                                     \
    }
MOEI_ROUTE_PLACE(moei_route_place, 0)
MOEI_ROUTE_PLACE(moei_route_place_options, 1)
#undef MOEI_ROUTE_PLACE

#endif
