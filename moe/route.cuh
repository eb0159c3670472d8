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

   Cost: three launches, or two when the gate has left its chunk_count. Traffic: the ids twice,
   each output once. Any E up to MOE_MAX_EXPERTS; T * K below 2^31.
   Minimum architecture: sm_75.

     moe_route_desc r = {0};
     r.ids = ids;  r.num_tokens = T;  r.num_experts = E;  r.top_k = K;
     r.expert_count = count;  r.expert_offset = offset;  r.row_slot = row_slot;  r.place = place;
     moe_route_workspace(&r, &bytes);   r.workspace = ...;  r.workspace_bytes = bytes;
     moe_status s = moe_route(&r, stream);

   Source: a counting sort by chunks: counts per chunk, one scan along the chunks of each
   expert, then each chunk places its own slots. */
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
    int32_t* chunk_count; /* [E, moe_num_chunks(T)] as moe_gate left it for these ids (it is
                             overwritten); null: counted here, in the workspace */
    /* out */
    int32_t* expert_count;  /* [E] rows of each expert */
    int32_t* expert_offset; /* [E + 1] first row of each expert; the last entry is the total */
    int32_t* slot_row;      /* [T, K]; or null */
    int32_t* row_slot;      /* [T * K]; or null */
    float* row_weight;      /* [T * K]; or null */
    moe_place* place;       /* [T, K]; or null */
    uint64_t* fault;        /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;     /* T >= 0 */
    int32_t num_experts;    /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;          /* K, 1 .. MOE_MAX_EXPERTS */
    int32_t place_kind;     /* moe_place_kind; 0 = one joined array */
    void* workspace;        /* 16-byte aligned; null if moe_route_workspace asks for 0 */
    size_t workspace_bytes;
} moe_route_desc;

#define MOEI_ROUTE_THREADS 256
#define MOEI_ROUTE_WARPS (MOEI_ROUTE_THREADS / MOEI_WARP)

/* Slot's expert, or -1; an id that is neither sets the fault word. */
MOE_DEVICE int moei_route_id(const moe_route_desc* d, int64_t slot)
{
    const int id = d->ids[slot];
    if (id >= 0 && id < d->num_experts) return id;
    if (id != -1) moei_fault_raise(d->fault, MOE_FAULT_BAD_ID, 0, slot);
    return -1;
}

/* Launch 1: how often each chunk chose each expert. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 2) moei_route_count(MOE_ARG(moe_route_desc) d)
{
    MOE_SHARED_DYNAMIC(shared);
    const int E = d.num_experts, chunks = (int)(blockDim.x >> 5);
    int* count = (int*)shared; /* [chunks][E] */
    const int64_t num_chunks = moe_num_chunks(d.num_tokens);
    const int64_t first = (int64_t)blockIdx.x * chunks, chunk = first + moei_warp();
    const int64_t slots = (int64_t)d.num_tokens * d.top_k;
    const int64_t chunk_slots = (int64_t)MOE_CHUNK_TOKENS * d.top_k;

    moei_let_next_start();
    moei_wait_for_previous();
    if (moei_fault_stopped(d.fault)) return;
    for (int i = (int)threadIdx.x; i < chunks * E; i += (int)blockDim.x) count[i] = 0;
    __syncthreads();
    for (int64_t s = chunk * chunk_slots + moei_lane(); s < slots && s < (chunk + 1) * chunk_slots;
         s += MOEI_WARP) {
        const int id = moei_route_id(&d, s);
        if (id >= 0) atomicAdd(count + moei_warp() * E + id, 1);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < chunks * E; i += (int)blockDim.x) {
        const int e = i / chunks, c = i % chunks; /* neighbours write neighbouring chunks */
        if (first + c < num_chunks) d.chunk_count[e * num_chunks + first + c] = count[c * E + e];
    }
}

/* Launch 2, one block an expert: turns its counts into sums over the chunks before, in place,
   and writes the expert's total. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 2) moei_route_scan(MOE_ARG(moe_route_desc) d)
{
    MOE_SHARED(moei_block_scan_scratch, scratch);
    const int64_t num_chunks = moe_num_chunks(d.num_tokens);
    int32_t* count;
    int before = 0;

    moei_let_next_start();
    moei_wait_for_previous();
    if (moei_fault_stopped(d.fault)) return;
    count = d.chunk_count + (int64_t)blockIdx.x * num_chunks;
    /* a warp has 512 neighbours at a time, each lane four of every 128 of them */
    for (int64_t c = 0; c < num_chunks; c += 16 * MOEI_ROUTE_THREADS) {
        const int64_t mine = c + moei_warp() * 512 + moei_lane() * 4;
        const bool wide = num_chunks % 4 == 0 && ((uintptr_t)count & 15) == 0;
        int v[4][4], at[4], in_warp = 0, total;
        MOEI_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t m = mine + i * 128;
            if (wide && m < num_chunks) {
                const int4 q = *(const int4*)(count + m);
                v[i][0] = q.x, v[i][1] = q.y, v[i][2] = q.z, v[i][3] = q.w;
            } else {
                MOEI_UNROLL
                for (int j = 0; j < 4; ++j) v[i][j] = m + j < num_chunks ? count[m + j] : 0;
            }
        }
        MOEI_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int sum = v[i][0] + v[i][1] + v[i][2] + v[i][3];
            const int upto = moei_warp_inclusive_scan(sum);
            at[i] = in_warp + upto - sum;
            in_warp += __shfl_sync(MOEI_FULL, upto, 31);
        }
        { /* what the warps before have: the first lane brings its warp's sum */
            const int ahead =
                moei_block_exclusive_scan(moei_lane() == 0 ? in_warp : 0, &scratch, &total);
            before += __shfl_sync(MOEI_FULL, ahead, 0);
            MOEI_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int64_t m = mine + i * 128;
                int n = before + at[i];
                MOEI_UNROLL
                for (int j = 0; j < 4; ++j) {
                    const int next = n + v[i][j];
                    v[i][j] = n;
                    n = next;
                }
                if (wide && m < num_chunks) {
                    *(int4*)(count + m) = make_int4(v[i][0], v[i][1], v[i][2], v[i][3]);
                } else {
                    MOEI_UNROLL
                    for (int j = 0; j < 4; ++j)
                        if (m + j < num_chunks) count[m + j] = v[i][j];
                }
            }
            before += total - __shfl_sync(MOEI_FULL, ahead, 0);
        }
    }
    if (threadIdx.x == 0) d.expert_count[blockIdx.x] = before;
}

/* Steps of 32 slots whose ids and weights a warp fetches together. */
#define MOEI_ROUTE_BATCH 4

/* Fetches the experts of a warp's next MOEI_ROUTE_BATCH * 32 slots, their weights and the rows that
   their chunk's first slots of those experts get. What lies past the end, or is no expert, is -1. */
MOE_DEVICE void moei_route_fetch(int* id, float* weight, int* first, const moe_route_desc* d,
                                 int64_t chunk, int64_t s0, int64_t end)
{
    const int64_t num_chunks = moe_num_chunks(d->num_tokens);
    const float* weights = d->row_weight ? d->weights : (const float*)0;
    MOEI_UNROLL
    for (int i = 0; i < MOEI_ROUTE_BATCH; ++i) {
        const int64_t s = s0 + i * MOEI_WARP + moei_lane(), in = s < end ? s : end - 1;
        id[i] = (int)moei_load4_early(d->ids + in);
        weight[i] = weights ? __uint_as_float(moei_load4_early(weights + in)) : 0.0f;
    }
    MOEI_UNROLL
    for (int i = 0; i < MOEI_ROUTE_BATCH; ++i) {
        const int64_t s = s0 + i * MOEI_WARP + moei_lane();
        const bool expert = (unsigned)id[i] < (unsigned)d->num_experts;
        if (s < end && !expert && id[i] != -1)
            moei_fault_raise(d->fault, MOE_FAULT_BAD_ID, 0, s);
        if (s >= end || !expert) id[i] = -1;
        first[i] = (int)moei_load4_early(d->chunk_count + (id[i] < 0 ? 0 : id[i]) * num_chunks + chunk);
    }
}

/* Launch 3, one warp a chunk: gives each slot its row, 32 slots at a time in order. `taken` counts,
   per expert, the slots of the warp's chunk that have their row already. */
MOE_KERNEL(MOEI_ROUTE_THREADS, 2) moei_route_place(MOE_ARG(moe_route_desc) d)
{
    MOE_SHARED(moei_block_scan_scratch, scratch);
    MOE_SHARED_DYNAMIC(shared);
    const int E = d.num_experts, warps = (int)(blockDim.x >> 5);
    int* offset = (int*)shared;                                  /* [E] first row of each expert */
    uint16_t* taken = (uint16_t*)(offset + E) + moei_warp() * E; /* [warps][E] */
    const int64_t chunk = (int64_t)blockIdx.x * warps + moei_warp();
    const int64_t slots = (int64_t)d.num_tokens * d.top_k;
    const int64_t chunk_slots = (int64_t)MOE_CHUNK_TOKENS * d.top_k, begin = chunk * chunk_slots;
    const int64_t end = begin + chunk_slots < slots ? begin + chunk_slots : slots;
    int id[MOEI_ROUTE_BATCH], first[MOEI_ROUTE_BATCH], rows = 0;
    float weight[MOEI_ROUTE_BATCH];

    moei_let_next_start();
    for (int e = moei_lane(); e < E; e += MOEI_WARP) taken[e] = 0;
    moei_wait_for_previous();
    if (moei_fault_stopped(d.fault)) return;

    if (begin < end) moei_route_fetch(id, weight, first, &d, chunk, begin, end);
    for (int e0 = 0; e0 < E; e0 += (int)blockDim.x) {
        const int e = e0 + (int)threadIdx.x;
        int total;
        const int at = moei_block_exclusive_scan(e < E ? d.expert_count[e] : 0, &scratch, &total);
        if (e < E) {
            offset[e] = rows + at;
            if (blockIdx.x == 0) d.expert_offset[e] = rows + at;
        }
        rows += total;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) d.expert_offset[E] = rows;
    __syncthreads();

    for (int64_t s0 = begin; s0 < end; s0 += MOEI_ROUTE_BATCH * MOEI_WARP) {
        if (s0 > begin) moei_route_fetch(id, weight, first, &d, chunk, s0, end);
        MOEI_UNROLL
        for (int i = 0; i < MOEI_ROUTE_BATCH; ++i) { /* in slot order: this makes it stable */
            const int64_t s = s0 + i * MOEI_WARP + moei_lane();
            const int e = id[i];
            const uint32_t same = __match_any_sync(MOEI_FULL, e);
            const int before = __popc(same & ((1u << moei_lane()) - 1u));
            int local = -1, row = -1; /* row within the expert, and in expert order */
            if (e >= 0) {
                local = first[i] + taken[e] + before;
                row = offset[e] + local;
                if (row < 0 || row >= slots) { /* chunk_count is not what the gate left for these ids */
                    moei_fault_raise(d.fault, MOE_FAULT_BAD_COUNT, 0, s);
                    local = row = -1;
                }
            }
            __syncwarp(MOEI_FULL);
            if (e >= 0 && before == 0) taken[e] = (uint16_t)(taken[e] + __popc(same));
            __syncwarp(MOEI_FULL);
            if (s < end && d.slot_row) d.slot_row[s] = row;
            if (s < end && d.place) {
                moe_place p;
                const bool split = d.place_kind == MOE_PLACE_BY_EXPERT;
                p.buffer = row < 0 ? -1 : split ? e : 0;
                p.row = split ? local : row;
                d.place[s] = p;
            }
            if (row >= 0 && d.row_slot) d.row_slot[row] = (int32_t)s;
            if (row >= 0 && d.row_weight) d.row_weight[row] = weight[i];
        }
    }
    /* rows that no slot took */
    for (int64_t r = rows + (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < slots;
         r += (int64_t)gridDim.x * blockDim.x) {
        if (d.row_slot) d.row_slot[r] = -1;
        if (d.row_weight) d.row_weight[r] = 0.0f;
    }
}

/* Warps of a block that counts or places, and its shared memory: less than 48 KB for any E. */
MOE_HOST moei_launch_config moei_route_grid(const moe_route_desc* d, int placing, cudaStream_t stream)
{
    const int64_t chunks = moe_num_chunks(d->num_tokens);
    const size_t each = (size_t)d->num_experts * (placing ? 2 : 4);
    const size_t all = placing ? (size_t)d->num_experts * 4 : 0;
    int warps = MOEI_ROUTE_WARPS;
    while (warps > 1 && all + (size_t)warps * each > 40 * 1024) warps /= 2;
    return moei_grid(chunks > 0 ? (chunks + warps - 1) / warps : 1, warps * MOEI_WARP,
                     all + (size_t)warps * each, stream);
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
        c = moei_route_grid(&d, 0, stream);
        c.dependent = 1;
        MOEI_TRY(MOE_LAUNCH(moei_route_count, c, d));
    }
    c = moei_grid(d.num_experts, MOEI_ROUTE_THREADS, 0, stream);
    c.dependent = 1;
    MOEI_TRY(MOE_LAUNCH(moei_route_scan, c, d));
    c = moei_route_grid(&d, 1, stream);
    c.dependent = 1;
    return MOE_LAUNCH(moei_route_place, c, d);
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moe_route_preload(void)
{
    MOEI_TRY(moei_preload((const void*)moei_route_count));
    MOEI_TRY(moei_preload((const void*)moei_route_scan));
    return moei_preload((const void*)moei_route_place);
}

#endif
