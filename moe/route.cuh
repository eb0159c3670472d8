/* route.cuh: ids -> expert order. Where each choice of each token stands when the choices are
   sorted by expert, and the maps back.

   In:   ids [T, K] int32: an expert 0 .. E-1, or -1 for a slot that is not used
         weights [T, K] fp32, if row_weight is wanted
   Out:  expert_count [E], expert_offset [E + 1]: expert e owns the rows
                           expert_offset[e] .. expert_offset[e + 1]
         slot_row [T, K]   row of a slot, -1 where it was dropped
         row_slot [T * K]  slot of a row, -1 past the last row
         row_weight [T * K] weight of a row, 0 past the last row
         place [T, K]      where the slot's row lives, for combine (layout.h)

   The order is stable: rows of one expert keep ascending slot order. Nothing depends on the
   order in which threads run, so the same ids give the same maps every time. An id that
   stands twice in one token gets two rows, and both its weights count. An id outside
   -1 .. E-1 sets the fault word and is treated as -1; the rest is right.

   Cost: two launches, or one when the gate has left its chunk_count. Traffic: the ids once a
   launch, the weights once, each output once, and by each of up to MOE_MAX_CHUNKS blocks all the
   chunk counts.
   Any E up to MOE_MAX_EXPERTS; T * K below 2^31. Minimum architecture: sm_75.

     moe_route_desc r = {0};
     r.ids = ids;  r.num_tokens = T;  r.num_experts = E;  r.top_k = K;
     r.expert_count = count;  r.expert_offset = offset;  r.row_slot = row_slot;  r.place = place;
     moe_route_workspace(&r, &bytes);   r.workspace = ...;  r.workspace_bytes = bytes;
     moe_status s = moe_route(&r, stream);

   Source: a counting sort by chunks. A block of the last launch adds up the counts of the chunks
   before its own, orders its slots by expert in shared memory, and so writes whole runs. */
#ifndef MOE_ROUTE_CUH
#define MOE_ROUTE_CUH

#include "base/block.cuh"
#include "base/copy.cuh"
#include "base/fault.cuh"
#include "layout.h"

typedef struct moe_route_desc {
    /* in */
    const int32_t* ids;   /* [T, K] */
    const float* weights; /* [T, K]; null unless row_weight is wanted */
    int32_t* chunk_count; /* [moe_num_chunks(T), E] as moe_gate left it for these very ids (if not,
                             BAD_COUNT); null: counted here, in the workspace */
    /* out */
    int32_t* expert_count;  /* [E] rows of each expert */
    int32_t* expert_offset; /* [E + 1] first row of each expert; the last entry is the total */
    int32_t* slot_row;      /* [T, K]; or null */
    int32_t* row_slot;      /* [T * K]; or null */
    float* row_weight;      /* [T * K]; or null */
    moe_place* place;       /* [T, K]; or null */
    uint64_t* fault;        /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;  /* T >= 0 */
    int32_t num_experts; /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;       /* K, 1 .. MOE_MAX_EXPERTS */
    int32_t place_kind;  /* moe_place_kind; 0 = one joined array */
    void* workspace;     /* 16-byte aligned; null if moe_route_workspace asks for 0 */
    size_t workspace_bytes;
} moe_route_desc;

#define MOEI_ROUTE_THREADS 512
#define MOEI_ROUTE_STEPS 4 /* slots of a thread that are under way together, at most */

/* Slot's expert, or -1; an id that is neither sets the fault word. */
MOE_DEVICE int moei_route_id(const moe_route_desc* d, uint32_t slot, int id)
{
    if (id >= 0 && id < d->num_experts) return id;
    if (id != -1) moei_fault_raise(d->fault, MOE_FAULT_BAD_ID, 0, slot);
    return -1;
}

/* First slot of a block's chunk, and of the one after it. (Slots are below 2^31: unsigned sums of
   them and of a block's threads do not wrap.) */
MOE_DEVICE uint32_t moei_route_begin(const moe_route_desc* d, uint32_t chunk)
{
    const uint32_t T = (uint32_t)d->num_tokens;
    const uint32_t t = chunk * (uint32_t)moe_chunk_tokens(d->num_tokens);
    return (t < T ? t : T) * (uint32_t)d->top_k;
}

/* Launch 1, one block a chunk: how often it chose each expert. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 1) moei_route_count(MOE_ARG(moe_route_desc) d)
{
    MOE_SHARED_DYNAMIC(shared);
    const int E = d.num_experts;
    int* count = (int*)shared; /* [E] */
    const uint32_t end = moei_route_begin(&d, blockIdx.x + 1);

    moei_let_next_start();
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x) count[e] = 0;
    moei_wait_for_previous();
    if (moei_fault_stopped(d.fault)) return;
    __syncthreads();
    for (uint32_t s = moei_route_begin(&d, blockIdx.x) + threadIdx.x; s < end; s += blockDim.x) {
        const int e = moei_route_id(&d, s, d.ids[s]);
        if (e >= 0) atomicAdd(count + e, 1);
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x)
        d.chunk_count[blockIdx.x * (uint32_t)E + e] = count[e];
}

/* Shared memory of launch 2. A round is the slots that the block has under way together; its
   positions are the slots in order of expert, those of no expert left out. */
typedef struct moei_route_shared {
    uint16_t* ahead; /* [E][stride] slots of the round's warps before */
    int stride;      /* warps or one more: odd, so that neighbours lie in different banks */
    int* row;        /* [positions] */
    int* slot;       /* [positions] */
    float* weight;   /* [positions] */
    int* base;       /* [E] row of the round's first slot of each expert */
    int* offset;     /* [E] first row of each expert */
    int* start;      /* [E] position of the round's first slot of each expert */
} moei_route_shared;

MOE_HOST_DEVICE size_t moei_route_ahead_bytes(int E, int warps)
{
    return ((size_t)E * (size_t)(warps | 1) * 2 + 15) / 16 * 16;
}

MOE_HOST_DEVICE size_t moei_route_shared_bytes(int E, int warps)
{
    return moei_route_ahead_bytes(E, warps) + (size_t)warps * 32 * MOEI_ROUTE_STEPS * 12 +
           (size_t)E * 12;
}

MOE_DEVICE void moei_route_carve(moei_route_shared* s, unsigned char* shared, int E)
{
    const int warps = (int)(blockDim.x >> 5), positions = warps * 32 * MOEI_ROUTE_STEPS;
    s->ahead = (uint16_t*)shared;
    s->stride = warps | 1;
    s->row = (int*)(shared + moei_route_ahead_bytes(E, warps));
    s->slot = s->row + positions;
    s->weight = (float*)(s->slot + positions);
    s->base = (int*)(s->weight + positions);
    s->offset = s->base + E;
    s->start = s->offset + E;
}

/* Clears `ahead`; a barrier must follow. */
MOE_DEVICE void moei_route_clear(const moei_route_shared* s, int E)
{
    const int n = (int)(moei_route_ahead_bytes(E, (int)(blockDim.x >> 5)) / 16);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        ((uint4*)s->ahead)[i] = make_uint4(0, 0, 0, 0);
}

/* Adds up the counts of the experts e .. e + 3, those below E, over the chunks from .. upto. */
MOE_DEVICE void moei_route_add_counts(uint4* sum, const moe_route_desc* d, int e, int from,
                                      int upto)
{
    const int E = d->num_experts;
    const int32_t* n = d->chunk_count + from * E + e; /* at most 2^19 */
    if (E % 4 == 0 && (uintptr_t)d->chunk_count % 16 == 0) {
        if (e >= E) return;
        MOEI_UNROLL_8
        for (int c = from; c < upto; ++c, n += E) {
            const uint4 v = *(const uint4*)n;
            sum->x += v.x, sum->y += v.y, sum->z += v.z, sum->w += v.w;
        }
    } else {
        for (int c = from; c < upto; ++c, n += E) {
            if (e < E) sum->x += (unsigned)n[0];
            if (e + 1 < E) sum->y += (unsigned)n[1];
            if (e + 2 < E) sum->z += (unsigned)n[2];
            if (e + 3 < E) sum->w += (unsigned)n[3];
        }
    }
}

MOE_DEVICE void moei_route_store_counts(int* to, int e, int E, uint4 v)
{
    if (e < E) to[e] = (int)v.x;
    if (e + 1 < E) to[e + 1] = (int)v.y;
    if (e + 2 < E) to[e + 2] = (int)v.z;
    if (e + 3 < E) to[e + 3] = (int)v.w;
}

/* The chunks are added up in groups of neighbours; a warp has 128 neighbouring experts of a group.
   All powers of two, so that nothing is divided: log2 of the warps (or rounds of warps) that share
   a group, and of the groups; chunks of a group. */
typedef struct moei_route_groups {
    int tiles_log2, log2, each;
} moei_route_groups;

MOE_DEVICE moei_route_groups moei_route_group(int E, int chunks)
{
    const int tiles = (E + 127) / 128, warps_log2 = 31 - __clz((int)blockDim.x >> 5);
    moei_route_groups g;
    g.tiles_log2 = 32 - __clz(tiles - 1);
    g.log2 = warps_log2 > g.tiles_log2 ? warps_log2 - g.tiles_log2 : 0;
    g.each = (chunks + (1 << g.log2) - 1) >> g.log2;
    return g;
}

/* parts[g][e] = rows of e in group g, base[e] = rows of e in the chunks of this block's group
   before its own. */
MOE_DEVICE void moei_route_sum(const moe_route_desc* d, const moei_route_shared* s, int* parts,
                               const moei_route_groups* g)
{
    const int E = d->num_experts, chunks = (int)gridDim.x, own = (int)blockIdx.x;
    MOEI_NO_UNROLL
    for (int w = moei_warp(); w < 1 << (g->tiles_log2 + g->log2); w += (int)(blockDim.x >> 5)) {
        const int e = (w & ((1 << g->tiles_log2) - 1)) * 128 + moei_lane() * 4;
        const int group = w >> g->tiles_log2, from = group * g->each;
        const int upto = from + g->each < chunks ? from + g->each : chunks;
        const bool here = from <= own && own < upto;
        uint4 sum = make_uint4(0, 0, 0, 0);
        if (here) {
            moei_route_add_counts(&sum, d, e, from, own);
            moei_route_store_counts(s->base, e, E, sum);
        }
        moei_route_add_counts(&sum, d, e, here ? own : from, upto);
        if (from < upto) moei_route_store_counts(parts + group * E, e, E, sum);
    }
}

/* The ids and weights of a thread's slots in the round that begins at `begin`; -1 past `end`. */
MOE_DEVICE void moei_route_fetch(int* id, float* weight, const moe_route_desc* d, uint32_t begin,
                                 uint32_t end, int steps)
{
    const uint32_t first = begin + (uint32_t)(moei_warp() * steps * MOEI_WARP + moei_lane());
    MOEI_UNROLL
    for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
        const uint32_t slot = first + (uint32_t)(i * MOEI_WARP);
        const bool in = slot < end && i < steps;
        id[i] = in ? (int)moei_load4_early(d->ids + slot) : -1;
        weight[i] =
            in && d->row_weight ? __uint_as_float(moei_load4_early(d->weights + slot)) : 0.0f;
    }
}

/* The lanes whose v is this lane's; v has `bits` bits. Quicker than __match_any_sync for many
   different v. */
MOE_DEVICE uint32_t moei_route_same(int v, int bits)
{
    uint32_t same = MOEI_FULL;
    MOEI_NO_UNROLL
    for (int b = 0; b < bits; ++b) {
        const uint32_t set = __ballot_sync(MOEI_FULL, v >> b & 1);
        same &= v >> b & 1 ? set : ~set;
    }
    return same;
}

/* Sums of rows, weighted by odd numbers: where one expert's differ, so do they. */
MOE_DEVICE uint32_t moei_route_checksum(int e, int row)
{
    return ((uint32_t)e * 0x9e3779b9u | 1u) * (uint32_t)row;
}

/* expert_offset and expert_count, written by one block; offset[e] and base[e] of this block's first
   round. Returns the number of rows; *checksum is that of the bases that a thread's experts must
   have in the end. */
MOE_DEVICE int moei_route_offsets(const moe_route_desc* d, const moei_route_shared* s,
                                  moei_block_scan_scratch* scratch, uint32_t* checksum)
{
    const int E = d->num_experts, chunks = d->num_tokens > 0 ? (int)gridDim.x : 0;
    const moei_route_groups group = moei_route_group(E, chunks);
    /* more experts than the warps have in one go are in one group */
    int* parts = E <= (int)blockDim.x * 4 ? s->row : s->start;
    int rows = 0;
    *checksum = 0;
    if (chunks > 0) moei_route_sum(d, s, parts, &group);
    __syncthreads();
    for (int e0 = 0; e0 < E; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x;
        unsigned all = 0, before = 0;
        int at, own = 0, total;
        if (e < E) {
            if (chunks > 0) own = d->chunk_count[(int)blockIdx.x * E + e];
            MOEI_UNROLL_8
            for (int g = 0; g < 1 << group.log2; ++g) {
                const int from = g * group.each;
                const unsigned n = from < chunks ? (unsigned)parts[g * E + e] : 0;
                all += n;
                before += from + group.each <= (int)blockIdx.x ? n : 0;
            }
        }
        at = (int)((unsigned)rows + (unsigned)moei_block_exclusive_scan((int)all, scratch, &total));
        if (e < E) {
            s->offset[e] = at;
            s->base[e] = (int)((unsigned)s->base[e] + before + (unsigned)at);
            *checksum += moei_route_checksum(e, (int)((unsigned)s->base[e] + (unsigned)own));
            if (blockIdx.x == 0) d->expert_count[e] = (int)all, d->expert_offset[e] = at;
        }
        rows = (int)((unsigned)rows + (unsigned)total);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        d->expert_offset[E] = rows;
        if (rows < 0 || (unsigned)rows > (unsigned)d->num_tokens * (unsigned)d->top_k)
            moei_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, 0, 0);
    }
    return rows;
}

/* How many of its warp's slots before it, in this step and those before, a lane's slot shares its
   expert with; counts it in `ahead`. */
MOE_DEVICE int moei_route_rank(const moei_route_shared* s, int expert, int bits)
{
    const uint32_t same = moei_route_same(expert, bits);
    uint16_t* count = s->ahead + (expert < 0 ? 0 : expert) * s->stride + moei_warp();
    const int rank = *count + __popc(same & ((1u << moei_lane()) - 1u));
    __syncwarp(MOEI_FULL);
    if (expert >= 0 && same >> moei_lane() == 1u) *count = (uint16_t)(rank + 1); /* the last one */
    __syncwarp(MOEI_FULL);
    return rank;
}

/* Turns each expert's counts of the warps into sums over the warps before, and gives each expert
   its first position. Returns the number of positions. Ends with a barrier. */
MOE_DEVICE int moei_route_starts(const moei_route_shared* s, int E,
                                 moei_block_scan_scratch* scratch)
{
    const int warps = (int)(blockDim.x >> 5);
    int taken = 0;
    for (int e0 = 0; e0 < E; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x;
        uint16_t* count = s->ahead + e * s->stride;
        int n = 0, total;
        for (int w = 0; w < warps && e < E; w += 8) {
            int v[8];
            MOEI_UNROLL
            for (int i = 0; i < 8; ++i) v[i] = w + i < warps ? count[w + i] : 0;
            MOEI_UNROLL
            for (int i = 0; i < 8; ++i) {
                if (w + i < warps) count[w + i] = (uint16_t)n;
                n += v[i];
            }
        }
        n = taken + moei_block_exclusive_scan(n, scratch, &total);
        if (e < E) s->start[e] = n;
        taken += total;
    }
    __syncthreads();
    return taken;
}

/* Launch 2, one block a chunk: gives each slot its row. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 1) moei_route_place(MOE_ARG(moe_route_desc) d)
{
    MOE_SHARED(moei_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    const int E = d.num_experts, slots = d.num_tokens * d.top_k, bits = 32 - __clz(E);
    const uint32_t end = moei_route_begin(&d, blockIdx.x + 1);
    uint32_t begin = moei_route_begin(&d, blockIdx.x);
    const int steps = (int)min((end - begin + blockDim.x - 1) / blockDim.x, MOEI_ROUTE_STEPS);
    uint32_t checksum;
    int id[MOEI_ROUTE_STEPS], rows;
    float weight[MOEI_ROUTE_STEPS];
    moei_route_shared s;

    moei_let_next_start();
    moei_route_carve(&s, shared, E);
    moei_route_clear(&s, E);
    moei_wait_for_previous();
    if (moei_fault_stopped(d.fault)) return;
    moei_route_fetch(id, weight, &d, begin, end, steps);
    rows = moei_route_offsets(&d, &s, &scratch, &checksum);

    for (; begin < end; begin += blockDim.x * (uint32_t)steps) {
        const uint32_t first = begin + (uint32_t)(moei_warp() * steps * MOEI_WARP + moei_lane());
        int expert[MOEI_ROUTE_STEPS], rank[MOEI_ROUTE_STEPS], taken;
        MOEI_UNROLL
        for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
            expert[i] = -1;
            rank[i] = 0;
            if (i < steps) {
                expert[i] = moei_route_id(&d, first + (uint32_t)(i * MOEI_WARP), id[i]);
                rank[i] = moei_route_rank(&s, expert[i], bits);
            }
        }
        __syncthreads();
        taken = moei_route_starts(&s, E, &scratch);
        MOEI_UNROLL
        for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
            const uint32_t slot = first + (uint32_t)(i * MOEI_WARP);
            const int e = expert[i];
            int row = -1;
            if (e >= 0) {
                const int n = s.ahead[e * s.stride + moei_warp()] + rank[i], at = s.start[e] + n;
                row = (int)((unsigned)s.base[e] + (unsigned)n);
                if (row < 0 || row >= slots) { /* these are not the ids that were counted */
                    moei_fault_raise(d.fault, MOE_FAULT_BAD_COUNT, 0, slot);
                    row = -1;
                }
                s.row[at] = row;
                s.slot[at] = (int)slot;
                s.weight[at] = weight[i];
            }
            if (i < steps && slot < end && d.slot_row) d.slot_row[slot] = row;
            if (i < steps && slot < end && d.place) {
                const bool split = d.place_kind == MOE_PLACE_BY_EXPERT;
                moe_place p;
                p.buffer = row < 0 ? -1 : split ? e : 0;
                p.row = row < 0 ? -1 : split ? row - s.offset[e] : row;
                d.place[slot] = p;
            }
        }
        moei_route_fetch(id, weight, &d, begin + blockDim.x * (uint32_t)steps, end, steps);
        __syncthreads();
        for (int at = (int)threadIdx.x; at < taken; at += (int)blockDim.x) {
            const int row = s.row[at];
            if (row >= 0 && d.row_slot) d.row_slot[row] = s.slot[at];
            if (row >= 0 && d.row_weight) d.row_weight[row] = s.weight[at];
        }
        for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x) { /* for the next round */
            const int next = e + 1 < E ? s.start[e + 1] : taken;
            s.base[e] = (int)((unsigned)s.base[e] + (unsigned)(next - s.start[e]));
        }
        if (begin + blockDim.x * (uint32_t)steps < end) {
            moei_route_clear(&s, E);
            __syncthreads();
        }
    }
    for (int e = (int)threadIdx.x; e < E; e += (int)blockDim.x)
        checksum -= moei_route_checksum(e, s.base[e]);
    if (slots > 0 && checksum != 0) /* the ids are not those that were counted */
        moei_fault_raise(d.fault, MOE_FAULT_BAD_COUNT, 0, moei_route_begin(&d, blockIdx.x));
    /* rows that no slot took */
    for (uint32_t r = (rows < 0 ? 0u : (uint32_t)rows) + blockIdx.x * blockDim.x + threadIdx.x;
         r < (uint32_t)slots; r += gridDim.x * blockDim.x) {
        if (d.row_slot) d.row_slot[r] = -1;
        if (d.row_weight) d.row_weight[r] = 0.0f;
    }
}

/* A block a chunk: a thread for each of its slots or, where it adds up the counts of many chunks,
   more; within bounds, and no more warps than the device's shared memory has room for (one warp,
   with 4096 experts, wants 57 KB). */
MOE_HOST moe_status moei_route_grid(moei_launch_config* c, const moe_route_desc* d, int placing,
                                    cudaStream_t stream)
{
    const int64_t chunks = moe_num_chunks(d->num_tokens);
    const int64_t slots = moe_chunk_tokens(d->num_tokens) * d->top_k;
    const int64_t sums = placing ? chunks * ((d->num_experts + 127) / 128) : 0;
    size_t smem = (size_t)d->num_experts * 4;
    int warps = MOEI_ROUTE_THREADS / 32;
    moei_device device;
    MOEI_TRY(moei_device_query(&device));
    while (warps > 8 && slots <= warps * 16 && sums <= warps * 4) warps /= 2;
    if (placing)
        while ((smem = moei_route_shared_bytes(d->num_experts, warps)) + 1024 >
                   (size_t)device.smem_block &&
               warps > 1)
            warps /= 2;
    *c = moei_grid(chunks > 0 ? chunks : 1, warps * 32, smem, stream);
    c->dependent = 1;
    return MOE_OK;
}

MOE_HOST moe_status moei_route_check(moe_route_desc* d)
{
    uint64_t slots;
    MOEI_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                 num_experts);
    MOEI_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_MAX_EXPERTS, MOE_ERR_RANGE, top_k);
    slots = (uint64_t)d->num_tokens * (uint64_t)d->top_k;
    MOEI_REQUIRE(slots <= 0x7fffffffu, MOE_ERR_RANGE, num_tokens);
    if (d->place_kind == 0) d->place_kind = MOE_PLACE_JOINED;
    MOEI_REQUIRE(d->place_kind > 0 && d->place_kind <= MOE_PLACE_BY_EXPERT, MOE_ERR_OPTION,
                 place_kind);
    MOEI_REQUIRE(d->expert_count, MOE_ERR_NULL, expert_count);
    MOEI_REQUIRE(d->expert_offset, MOE_ERR_NULL, expert_offset);
    MOEI_REQUIRE(d->ids || slots == 0, MOE_ERR_NULL, ids);
    MOEI_REQUIRE(d->weights || !d->row_weight || slots == 0, MOE_ERR_NULL, weights);
    MOEI_REQUIRE(moei_aligned(d->ids, 4), MOE_ERR_ALIGN, ids);
    MOEI_REQUIRE(moei_aligned(d->weights, 4), MOE_ERR_ALIGN, weights);
    MOEI_REQUIRE(moei_aligned(d->chunk_count, 4), MOE_ERR_ALIGN, chunk_count);
    MOEI_REQUIRE(moei_aligned(d->expert_count, 4), MOE_ERR_ALIGN, expert_count);
    MOEI_REQUIRE(moei_aligned(d->expert_offset, 4), MOE_ERR_ALIGN, expert_offset);
    MOEI_REQUIRE(moei_aligned(d->slot_row, 4), MOE_ERR_ALIGN, slot_row);
    MOEI_REQUIRE(moei_aligned(d->row_slot, 4), MOE_ERR_ALIGN, row_slot);
    MOEI_REQUIRE(moei_aligned(d->row_weight, 4), MOE_ERR_ALIGN, row_weight);
    MOEI_REQUIRE(moei_aligned(d->place, 8), MOE_ERR_ALIGN, place);
    MOEI_REQUIRE(moei_aligned(d->workspace, 16), MOE_ERR_ALIGN, workspace);
    MOEI_REQUIRE(moei_aligned(d->fault, 8), MOE_ERR_ALIGN, fault);
    {
        const moei_range r[] = {
            {d->ids, slots * 4, MOE_FIELD_ids},
            {d->weights, slots * 4, MOE_FIELD_weights},
            {d->chunk_count, (uint64_t)d->num_experts * (uint64_t)moe_num_chunks(d->num_tokens) * 4,
             d->chunk_count == d->workspace ? MOE_FIELD_workspace : MOE_FIELD_chunk_count},
            {d->expert_count, (uint64_t)d->num_experts * 4, MOE_FIELD_expert_count},
            {d->expert_offset, (uint64_t)d->num_experts * 4 + 4, MOE_FIELD_expert_offset},
            {d->slot_row, slots * 4, MOE_FIELD_slot_row},
            {d->row_slot, slots * 4, MOE_FIELD_row_slot},
            {d->row_weight, slots * 4, MOE_FIELD_row_weight},
            {d->place, slots * 8, MOE_FIELD_place},
            {d->fault, 8, MOE_FIELD_fault}};
        return moei_disjoint(r, 2, 10);
    }
}

/* Bytes of workspace that moe_route wants: E * moe_num_chunks(T) * 4, or 0 when chunk_count is
   given. Reads only num_tokens, num_experts and chunk_count. */
MOE_HOST moe_status moe_route_workspace(const moe_route_desc* desc, size_t* bytes)
{
    MOEI_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    MOEI_REQUIRE(desc->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE(desc->num_experts >= 1 && desc->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                 num_experts);
    *bytes = desc->chunk_count
                 ? 0
                 : (size_t)desc->num_experts * (size_t)moe_num_chunks(desc->num_tokens) * 4;
    return MOE_OK;
}

/* Queues the routing on `stream`. Errors: every field as documented above, each with its own
   status; nothing is queued then. T = 0 writes zero counts and offsets. */
MOE_HOST moe_status moe_route(const moe_route_desc* desc, cudaStream_t stream)
{
    moe_route_desc d;
    moei_launch_config c;
    size_t want;
    MOEI_REQUIRE(desc, MOE_ERR_NULL, desc);
    d = *desc;
    MOEI_TRY(moe_route_workspace(&d, &want));
    if (want > 0) {
        MOEI_REQUIRE(d.workspace, MOE_ERR_NULL, workspace);
        MOEI_REQUIRE(want <= d.workspace_bytes, MOE_ERR_WORKSPACE, workspace_bytes);
        d.chunk_count = (int32_t*)d.workspace;
    }
    MOEI_TRY(moei_route_check(&d));
    if (want > 0) {
        MOEI_TRY(moei_route_grid(&c, &d, 0, stream));
        MOEI_TRY(MOE_LAUNCH(moei_route_count, c, d));
    }
    MOEI_TRY(moei_route_grid(&c, &d, 1, stream));
    return MOE_LAUNCH(moei_route_place, c, d);
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moe_route_preload(void)
{
    MOEI_TRY(moei_preload((const void*)moei_route_count));
    return moei_preload((const void*)moei_route_place);
}

#endif
