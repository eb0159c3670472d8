/* count.cuh: the counting launch of route.cuh: how often each chunk of tokens chose each expert.
   And what reads these counts back: sums of them over groups of chunks. */
#ifndef MOE_ROUTE_COUNT_CUH
#define MOE_ROUTE_COUNT_CUH

#include "../base/copy.cuh"
#include "../base/fault.cuh"
#include "../faults.h"
#include "desc.h"

#define MOEI_ROUTE_THREADS 512 /* most threads a block */

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

/* Returns true where the slot's token exists: it is one of the first part_count of its part. */
MOE_DEVICE bool moei_route_exists(const moe_route_desc* d, uint32_t slot)
{
    const uint32_t t = slot / (uint32_t)d->top_k;
    const uint32_t each = (uint32_t)d->num_tokens / (uint32_t)d->num_parts, part = t / each;
    return (int)(t - part * each) < d->part_count[part];
}

/* Returns the first slot of a chunk; for the chunk after the last, T * K. Slots are below 2^31:
   unsigned sums of a slot and a block's threads do not wrap. */
MOE_DEVICE uint32_t moei_route_begin(const moe_route_desc* d, uint32_t chunk)
{
    const uint32_t num_tokens = (uint32_t)d->num_tokens;
    const uint32_t t = chunk * (uint32_t)moe_chunk_tokens(d->num_tokens);
    return (t < num_tokens ? t : num_tokens) * (uint32_t)d->top_k;
}

#define MOEI_ROUTE_STEPS 4 /* most slots of a thread in a round */

/* Returns the id of a slot; -1 from `end` on and where the token does not exist. */
MOE_DEVICE int moei_route_load_id(const moe_route_desc* d, uint32_t slot, uint32_t end,
                                  const int options)
{
    int id = slot < end ? (int)moei_load4_early(d->ids + slot) : -1;
    if (options && d->part_count && slot < end && !moei_route_exists(d, slot)) id = -1;
    return id;
}

/* Clears count [P], in shared memory. All threads; a barrier must follow. */
MOE_DEVICE void moei_route_clear_count(const moe_route_desc* d, int* count)
{
    for (int e = (int)threadIdx.x; e < d->num_replicas; e += (int)blockDim.x) count[e] = 0;
}

/* Counting, one block a chunk: writes how often the chunk chose each expert to chunk_count. count
   [P] is in shared memory, clear, behind a barrier. */
MOE_DEVICE_BODY void moei_route_count_chunk(const moe_route_desc* d, int* count, const int options)
{
    const int num_experts = d->num_replicas; /* physical experts */
    const uint32_t end = moei_route_begin(d, blockIdx.x + 1);

    for (uint32_t s = moei_route_begin(d, blockIdx.x) + threadIdx.x; s < end;
         s += blockDim.x * MOEI_ROUTE_STEPS) {
        int id[MOEI_ROUTE_STEPS];
        MOE_UNROLL /* the loads are in flight together */
        for (int i = 0; i < MOEI_ROUTE_STEPS; ++i)
            id[i] = moei_route_load_id(d, s + (uint32_t)i * blockDim.x, end, options);
        MOE_UNROLL
        for (int i = 0; i < MOEI_ROUTE_STEPS; ++i) {
            const int e = moei_route_id(d, s + (uint32_t)i * blockDim.x, id[i], options);
            if (e >= 0) atomicAdd(count + e, 1);
        }
    }
    __syncthreads(); /* count is complete */
    for (int e = (int)threadIdx.x; e < num_experts; e += (int)blockDim.x)
        d->chunk_count[blockIdx.x * (uint32_t)num_experts + e] = count[e];
}

/* Counting: for plain routing; with replicas or parts. */
#define MOEI_ROUTE_COUNT(name, options)                                                            \
    MOE_KERNEL(MOEI_ROUTE_THREADS, 1) name(MOE_ARG(moei_route_args) a)                             \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moei_route_clear_count(&a.d, (int*)shared);                                                \
        moe_pdl_wait();                                                                            \
        if (moe_fault_stopped(a.d.fault)) return;                                                  \
        __syncthreads(); /* count is clear */                                                      \
        moei_route_count_chunk(&a.d, (int*)shared, options);                                       \
    }
MOEI_ROUTE_COUNT(moei_route_count, 0)
MOEI_ROUTE_COUNT(moei_route_count_options, 1)
#undef MOEI_ROUTE_COUNT

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

#endif
