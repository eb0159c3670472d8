/* place.cuh: the counting and the placing launch of route.cuh. */
#ifndef MOE_ROUTE_PLACE_CUH
#define MOE_ROUTE_PLACE_CUH

#include "../base/block.cuh"
#include "../base/copy.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "desc.h"
#include "rank.cuh"

#define MOEI_ROUTE_THREADS 512 /* most threads a block */
#define MOEI_ROUTE_STEPS 4 /* most slots of a thread in a round */

/* The argument of route's kernels. */
typedef struct moei_route_args {
    moe_route_desc d;  /* defaults filled in: num_replicas, row_multiple, capacity are not 0 */
    int32_t max_rows;  /* entries of row_slot and row_weight */
    int32_t list_only; /* 1: writes slot_row and place only for slots without a row */
    /* for keep.cuh, capacity by weight: all slots in expert order, placed without a capacity */
    int32_t* list_count;  /* [P] slots of each expert */
    int32_t* list_offset; /* [P + 1] first entry of each expert */
    int32_t* list_slot;   /* [T * K] slot of each entry */
    float* list_weight;   /* [T * K] weight of each entry */
} moei_route_args;

#define MOEI_ROUTE_NO_LIMIT 0x7fffffff /* a capacity that no expert reaches */

/* Returns the replica of expert `id` for the slot: number t % n of its n. Returns -1 and raises
   BAD_REPLICA where the expert has none, or the replica's number is out of range. With
   absent_replicas, an empty range or a replica_expert of -1 gives -1 without a fault. */
MOE_DEVICE int moei_route_replica(const moe_route_desc* d, uint32_t slot, int id)
{
    const int from = d->replica_offset[id], upto = d->replica_offset[id + 1];
    int e = from >= 0 && from == upto && upto <= d->num_replicas ? -1 : -2; /* absent, bad */
    if (from >= 0 && from < upto && upto <= d->num_replicas) {
        const uint32_t t = slot / (uint32_t)d->top_k;
        e = from + (int)(t % (uint32_t)(upto - from));
        if (d->replica_expert) e = d->replica_expert[e];
    }
    if (e >= 0 && e < d->num_replicas) return e;
    if (e != -1 || !d->absent_replicas)
        moe_fault_raise(d->fault, MOE_FAULT_BAD_REPLICA, d->rank, slot);
    return -1;
}

/* Returns the physical expert of a slot, or -1. An id that is neither an expert nor -1 sets the
   fault word. options, here and below, is a literal: 0 compiles plain routing alone. */
MOE_DEVICE int moei_route_id(const moe_route_desc* d, uint32_t slot, int id, const int options)
{
    if (id >= 0 && id < d->num_experts)
        return options && d->replica_offset ? moei_route_replica(d, slot, id) : id;
    if (id != -1) moe_fault_raise(d->fault, MOE_FAULT_BAD_ID, d->rank, slot);
    return -1;
}

/* Returns the first slot of a chunk; for the chunk after the last, T * K. Slots are below 2^31:
   unsigned sums of a slot and a block's threads do not wrap. */
MOE_DEVICE uint32_t moei_route_begin(const moe_route_desc* d, uint32_t chunk)
{
    const uint32_t num_tokens = (uint32_t)d->num_tokens;
    const uint32_t t = chunk * (uint32_t)moe_chunk_tokens(d->num_tokens);
    return (t < num_tokens ? t : num_tokens) * (uint32_t)d->top_k;
}

/* Counting, one block a chunk: writes how often the chunk chose each expert to chunk_count. count
   [P] is in shared memory. */
MOE_DEVICE_BODY void moei_route_count_chunk(const moe_route_desc* d, int* count, const int options)
{
    const int num_experts = d->num_replicas; /* physical experts */
    const uint32_t end = moei_route_begin(d, blockIdx.x + 1);

    moe_pdl_trigger();
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x) count[e] = 0;
    moe_pdl_wait();
    if (moe_fault_stopped(d->fault)) return;
    __syncthreads(); /* count is clear */
    for (uint32_t s = moei_route_begin(d, blockIdx.x) + threadIdx.x; s < end; s += blockDim.x) {
        const int e = moei_route_id(d, s, d->ids[s], options);
        if (e >= 0) atomicAdd(count + e, 1);
    }
    __syncthreads(); /* count is complete */
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x)
        d->chunk_count[blockIdx.x * (uint32_t)num_experts + e] = count[e];
}

/* Counting, for plain routing. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 1) moei_route_count(MOE_ARG(moei_route_args) a)
{
    MOE_SHARED_DYNAMIC(shared);
    moei_route_count_chunk(&a.d, (int*)shared, 0);
}

/* Counting, with replicas. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 1) moei_route_count_options(MOE_ARG(moei_route_args) a)
{
    MOE_SHARED_DYNAMIC(shared);
    moei_route_count_chunk(&a.d, (int*)shared, 1);
}

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

/* Adds the counts of experts e .. e + 3, those below P, of chunks from .. upto - 1 to *sum. */
MOE_DEVICE void moei_route_add_counts(uint4* sum, const moe_route_desc* d, int e, int from,
                                      int upto)
{
    const int num_experts = d->num_replicas;
    const int32_t* n = d->chunk_count + from * num_experts + e; /* at most 2^19 */
    if (num_experts % 4 == 0 && (uintptr_t)d->chunk_count % 16 == 0) {
        if (e >= num_experts) return;
        MOE_UNROLL_8
        for (int c = from; c < upto; ++c, n += num_experts) {
            const uint4 v = *(const uint4*)n;
            sum->x += v.x, sum->y += v.y, sum->z += v.z, sum->w += v.w;
        }
    } else {
        for (int c = from; c < upto; ++c, n += num_experts) {
            if (e < num_experts) sum->x += (unsigned)n[0];
            if (e + 1 < num_experts) sum->y += (unsigned)n[1];
            if (e + 2 < num_experts) sum->z += (unsigned)n[2];
            if (e + 3 < num_experts) sum->w += (unsigned)n[3];
        }
    }
}

/* Stores v to to[e] .. to[e + 3], those below num_experts. */
MOE_DEVICE void moei_route_store_counts(int* to, int e, int num_experts, uint4 v)
{
    if (e < num_experts) to[e] = (int)v.x;
    if (e + 1 < num_experts) to[e + 1] = (int)v.y;
    if (e + 2 < num_experts) to[e + 2] = (int)v.z;
    if (e + 3 < num_experts) to[e + 3] = (int)v.w;
}

/* How the chunk counts are summed: in groups of neighbouring chunks; a warp has 128 neighbouring
   experts of a group. Warps and groups are powers of two, given by their log2, so that nothing is
   divided. */
typedef struct moei_route_groups {
    int tiles_log2, log2, each; /* warps (or rounds of warps) a group; groups; chunks a group */
} moei_route_groups;

/* Returns the groups of this launch. */
MOE_DEVICE moei_route_groups moei_route_group(int num_experts, int chunks)
{
    const int tiles = (num_experts + 127) / 128, warps_log2 = 31 - __clz((int)blockDim.x >> 5);
    moei_route_groups g;
    g.tiles_log2 = 32 - __clz(tiles - 1);
    g.log2 = warps_log2 > g.tiles_log2 ? warps_log2 - g.tiles_log2 : 0;
    g.each = (chunks + (1 << g.log2) - 1) >> g.log2;
    return g;
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
   past `end`. */
MOE_DEVICE void moei_route_fetch(int* id, float* weight, const moe_route_desc* d, uint32_t begin,
                                 uint32_t end, int steps)
{
    const uint32_t first = begin + (uint32_t)(moe_warp() * steps * MOE_WARP_SIZE + moe_lane());
    MOE_UNROLL
    for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
        const uint32_t slot = first + (uint32_t)(i * MOE_WARP_SIZE);
        const bool in = slot < end && i < steps;
        id[i] = in ? (int)moei_load4_early(d->ids + slot) : -1;
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
            moe_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, d->rank, 0);
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

/* Placing, one block a chunk: gives each slot its row.
     1. loads the first round's ids and weights; offsets; clears the rows that pad experts
     Then in each round:
     2. rank: a slot's rank in its warp among the slots of its expert
     3. start: sums over the warps before; the first position of each expert
     4. row of each slot = base + rank in the block. Writes slot_row and place in slot order;
        collects the slots by position in shared memory
     5. loads the next round's ids and weights
     6. writes row_slot and row_weight by position: whole runs of rows; advances base
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

    moe_pdl_trigger();
    moei_route_carve(&s, shared, num_experts);
    moei_route_clear(&s, num_experts);
    moe_pdl_wait();
    if (moe_fault_stopped(d->fault)) return;
    moei_route_fetch(id, weight, d, begin, end, steps); /* 1. */
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
        MOE_UNROLL                                           /* 4. row */
        for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
            const uint32_t slot = first + (uint32_t)(i * MOE_WARP_SIZE);
            const int e = expert[i];
            bool write;
            int row = -1;
            if (e >= 0) {
                const int n = s.ahead[e * s.stride + moe_warp()] + rank[i], at = s.start[e] + n;
                row = (int)((unsigned)s.base[e] + (unsigned)n);
                if (options && (unsigned)row - (unsigned)s.offset[e] >= (unsigned)d->capacity) {
                    row = -1; /* over the capacity */
                } else if (row < 0 || row >= a->max_rows) { /* not the ids that were counted */
                    moe_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, d->rank, slot);
                    row = -1;
                }
                s.row[at] = row;
                s.slot[at] = (int)slot;
                s.weight[at] = weight[i];
            }
            write = i < steps && slot < end && !(options && a->list_only && row >= 0);
            if (write && d->slot_row) d->slot_row[slot] = row;
            if (write && d->place) {
                const bool split = d->place_kind == MOE_PLACE_BY_EXPERT;
                moe_place p;
                p.buffer = row < 0 ? -1 : split ? e : 0;
                p.row = row < 0 ? -1 : split ? row - s.offset[e] : row;
                d->place[slot] = p;
            }
        }
        moei_route_fetch(id, weight, d, begin + blockDim.x * (uint32_t)steps, end, steps); /* 5. */
        __syncthreads(); /* 6.; the positions are complete */
        for (int at = (int)threadIdx.x; at < taken; at += (int)blockDim.x) {
            const int row = s.row[at];
            if (row >= 0 && d->row_slot) d->row_slot[row] = s.slot[at];
            if (row >= 0 && d->row_weight) d->row_weight[row] = s.weight[at];
        }
        for (int e = (int)threadIdx.x; e < num_experts;
             e += (int)blockDim.x) { /* the next round's base */
            const int next = e + 1 < num_experts ? s.start[e + 1] : taken;
            s.base[e] = (int)((unsigned)s.base[e] + (unsigned)(next - s.start[e]));
        }
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
        moei_route_place_chunk(&a, shared, &scratch, options);                                     \
    }
MOEI_ROUTE_PLACE(moei_route_place, 0)
MOEI_ROUTE_PLACE(moei_route_place_options, 1)
#undef MOEI_ROUTE_PLACE

#endif
