/* route.cuh: sorts the slots by expert: ids -> rows in expert order, and the row maps.

   slot_row[slot] = expert_offset[e] + number of kept slots of e before this one,  e = ids[slot];
   row_slot[slot_row[slot]] = slot

   In:   ids [T, K] int32: an expert 0 .. E-1, or -1 for an unused slot
         weights [T, K] fp32, for row_weight and for capacity by weight
   Out:  expert_count [P], expert_offset [P + 1]: expert e owns the rows
                           expert_offset[e] .. expert_offset[e + 1]; its slots have the first
                           expert_count[e] of them
         drop_count [P]    slots dropped for lack of capacity
         slot_row [T, K]   row of a slot, -1 where it was dropped
         row_slot [R]      slot of a row, -1 where a row has none, and past the last row
         row_weight [R]    weight of a row, 0 where row_slot is -1
         place [T, K]      place of a slot's row, for combine (layout.h)
   P is E, or with replicas their number. R is what moe_route_max_rows gives: T * K without options.

   The order is stable: rows of one expert keep ascending slot order. Nothing depends on the order
   in which threads run: the same ids give the same maps every time. An id that occurs twice in one
   token gets two rows, and both its weights count. An id outside -1 .. E-1 sets the fault word
   (BAD_ID) and counts as -1; all else is right.

   Options, in any combination. They apply to a slot in this order:
     replicas      An expert may have several copies. Token t's choice of e goes to replica number
                   t % n of the n entries replica_offset[e] .. replica_offset[e + 1] of
                   replica_expert. From here on "expert" is the physical expert, 0 .. P-1, in
                   counts, offsets and places. Slots of an expert without a replica, or whose
                   replica is out of range, are dropped and set the fault word (BAD_REPLICA).
     absent_replicas  With replicas: an expert without a replica (an empty range), or with
                   replica_expert -1, is elsewhere, for instance on another rank. Its slots are
                   dropped like those of id -1: slot_row -1, place {-1, -1}, no fault. drop_count
                   does not count them. Anything else out of range still sets the fault word.
     capacity      An expert keeps at most `capacity` slots: the first (MOE_DROP_BY_POSITION), or
                   those of the largest weights (MOE_DROP_BY_WEIGHT). The others are dropped:
                   slot_row -1, place {-1, -1}; drop_count counts them.
     part_count    The tokens are num_parts parts of equal size, of which only the first part_count
                   tokens exist: what several senders wrote into one array. Slots of the others
                   count as unused, whatever their ids.
     max_rows      Room for rows: a bound below what the sizes allow. Where the ids need more, the
                   stop fault ROWS_FULL says how many, and nothing is written past the room. Not
                   with capacity by weight.
     row_multiple  Each expert's rows begin and end at a multiple of row_multiple. The rows that pad
                   an expert hold no slot. An expert without a slot has no rows.

   Cost: two launches, or one with the gate's chunk_count; one more for capacity by weight. Traffic:
   the ids once a launch, the weights once, each output once, and all chunk counts by each of up to
   MOE_MAX_CHUNKS thread blocks. Capacity by weight also writes slots and weights to the workspace
   once, and reads them back from cache: once, or some four times where an expert has over 1.5 times
   the average of slots, or more than 4096.

   Any E up to MOE_MAX_EXPERTS; T * K, and the rows, below 2^31. Minimum architecture: sm_75.

     moe_route_desc r = {0};
     r.ids = ids;  r.num_tokens = T;  r.num_experts = E;  r.top_k = K;
     r.row_multiple = 128;              // options: here padding, and a capacity
     r.capacity = capacity;
     int64_t rows;
     moe_route_max_rows(&r, &rows);     // entries of row_slot: T * K without options
     r.expert_count = count;  r.expert_offset = offset;  r.row_slot = row_slot;  r.place = place;
     moe_route_workspace(&r, &bytes);   r.workspace = ...;  r.workspace_bytes = bytes;
     moe_status s = moe_route(&r, stream);

   For kernels of one's own: moe_route_rank (route/rank.cuh) gives a lane the number of lanes of its
   warp that chose the same expert, in all and before it.

   Source: a counting sort by chunks. In the placing launch a thread block adds up the counts of the
   chunks before its own. Then the thread block orders its slots by expert in shared memory and
   writes whole runs of rows. Capacity by weight: a radix selection in each expert's list. */
#ifndef MOE_ROUTE_CUH
#define MOE_ROUTE_CUH

#include "base/check.h"
#include "fields.h"
#include "preload.cuh"
#include "route/desc.h"
#include "route/keep.cuh"
#include "route/place.cuh"

/* Returns the most rows that these sizes and options can give. An expert without a slot has no
   rows, so no more experts than slots are padded. */
MOE_HOST int64_t moei_route_row_bound(const moe_route_desc* d)
{
    const int64_t num_replicas = d->num_replicas, m = d->row_multiple, capacity = d->capacity;
    const int64_t all = (int64_t)d->num_tokens * d->top_k;
    const int64_t slots = all < num_replicas * capacity ? all : num_replicas * capacity;
    const int64_t rows = (slots + (slots < num_replicas ? slots : num_replicas) * (m - 1)) / m * m;
    const int64_t full = num_replicas * ((capacity + m - 1) / m * m);
    const int64_t bound = rows < full ? rows : full;
    return d->max_rows && d->max_rows < bound ? d->max_rows : bound;
}

/* Refuses sizes and options that are out of range or contradict each other; fills in the
   defaults. */
MOE_HOST moe_status moei_route_check_options(moe_route_desc* d)
{
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_MAX_EXPERTS, MOE_ERR_RANGE, top_k);
    MOE_REQUIRE((int64_t)d->num_tokens * d->top_k <= 0x7fffffff, MOE_ERR_RANGE, num_tokens);
    if (d->num_replicas == 0) d->num_replicas = d->num_experts;
    MOE_REQUIRE(d->num_replicas >= 1 && d->num_replicas <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_replicas);
    MOE_REQUIRE(d->replica_offset || d->num_replicas == d->num_experts, MOE_ERR_CONFLICT,
                num_replicas);
    MOE_REQUIRE(d->replica_offset || !d->replica_expert, MOE_ERR_CONFLICT, replica_expert);
    MOE_REQUIRE(!d->replica_offset || !d->chunk_count, MOE_ERR_CONFLICT, chunk_count);
    MOE_REQUIRE(d->absent_replicas == 0 || d->absent_replicas == 1, MOE_ERR_OPTION,
                absent_replicas);
    MOE_REQUIRE(d->replica_offset || !d->absent_replicas, MOE_ERR_CONFLICT, absent_replicas);
    MOEI_REQUIRE_RANK(d);
    if (d->row_multiple == 0) d->row_multiple = 1;
    MOE_REQUIRE(d->row_multiple >= 1 && d->row_multiple <= MOE_ROUTE_MAX_MULTIPLE, MOE_ERR_RANGE,
                row_multiple);
    MOE_REQUIRE(d->capacity >= 0, MOE_ERR_RANGE, capacity);
    MOE_REQUIRE(d->drop_rule >= 0 && d->drop_rule <= MOE_DROP_BY_WEIGHT, MOE_ERR_OPTION, drop_rule);
    MOE_REQUIRE(d->capacity || !d->drop_rule, MOE_ERR_CONFLICT, drop_rule);
    if (d->capacity == 0) d->capacity = MOEI_ROUTE_NO_LIMIT;
    if (d->drop_rule == 0) d->drop_rule = MOE_DROP_BY_POSITION;
    MOE_REQUIRE(d->max_rows >= 0, MOE_ERR_RANGE, max_rows);
    MOE_REQUIRE(!d->max_rows || d->drop_rule != MOE_DROP_BY_WEIGHT, MOE_ERR_CONFLICT, max_rows);
    MOE_REQUIRE(moei_route_row_bound(d) <= 0x7fffffff, MOE_ERR_RANGE, row_multiple);
    MOE_REQUIRE(d->part_count ? d->num_parts >= 1 && d->num_tokens % d->num_parts == 0
                              : d->num_parts == 0,
                MOE_ERR_RANGE, num_parts);
    MOE_REQUIRE(!d->part_count || !d->chunk_count, MOE_ERR_CONFLICT, part_count);
    if (d->place_kind == 0) d->place_kind = MOE_PLACE_JOINED;
    MOE_REQUIRE(d->place_kind > 0 && d->place_kind <= MOE_PLACE_BY_EXPERT, MOE_ERR_OPTION,
                place_kind);
    return MOE_OK;
}

/* Sets *rows to the entries that row_slot and row_weight must have: T * K without options, more
   with row_multiple, fewer with a capacity. Reads the sizes and the options. Errors: theirs;
   row_multiple (MOE_ERR_RANGE) also where the rows would be 2^31 or more. */
MOE_HOST moe_status moe_route_max_rows(const moe_route_desc* desc, int64_t* rows)
{
    moe_route_desc d;
    MOE_REQUIRE(desc && rows, MOE_ERR_NULL, desc);
    d = *desc;
    MOE_TRY(moei_route_check_options(&d));
    *rows = moei_route_row_bound(&d);
    return MOE_OK;
}

/* Sets the buffers of the workspace in *a, unless a is null; returns their bytes. Requires defaults
   filled in. counted: chunk_count is given, or will be. */
MOE_HOST size_t moei_route_carve_workspace(const moe_route_desc* d, moei_route_args* a, int counted)
{
    char* base = (char*)d->workspace;
    const uint64_t num_replicas = (uint64_t)d->num_replicas;
    const uint64_t slots = (uint64_t)d->num_tokens * (uint64_t)d->top_k;
    moei_route_args unused;
    size_t at = 0;
    if (!a) a = &unused;
    if (!counted)
        a->d.chunk_count = (int32_t*)moei_carve(
            base, &at, num_replicas * (uint64_t)moe_num_chunks(d->num_tokens) * 4);
    if (d->drop_rule == MOE_DROP_BY_WEIGHT) {
        a->list_count = (int32_t*)moei_carve(base, &at, num_replicas * 4);
        a->list_offset = (int32_t*)moei_carve(base, &at, num_replicas * 4 + 4);
        a->list_slot = (int32_t*)moei_carve(base, &at, slots * 4);
        a->list_weight = (float*)moei_carve(base, &at, slots * 4);
    }
    return at;
}

/* Refuses buffers that are missing, misaligned or overlapping. Requires checked options. */
MOE_HOST moe_status moei_route_check_buffers(const moe_route_desc* d)
{
    const uint64_t num_experts = (uint64_t)d->num_experts, num_replicas = (uint64_t)d->num_replicas;
    const uint64_t slots = (uint64_t)d->num_tokens * (uint64_t)d->top_k;
    const uint64_t rows = (uint64_t)moei_route_row_bound(d);
    const uint64_t workspace = moei_route_carve_workspace(d, 0, d->chunk_count != 0);
    const int weigh = d->row_weight || d->drop_rule == MOE_DROP_BY_WEIGHT;
    const moe_buffer b[] = {
        {d->ids, slots * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_ids},
        {d->weights, slots * 4, 4, weigh ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_weights},
        {d->part_count, (uint64_t)d->num_parts * 4, 4, MOE_BUFFER_READ, MOE_FIELD_part_count},
        {d->replica_offset, num_experts * 4 + 4, 4, MOE_BUFFER_READ, MOE_FIELD_replica_offset},
        {d->replica_expert, num_replicas * 4, 4, MOE_BUFFER_READ, MOE_FIELD_replica_expert},
        {d->chunk_count, num_replicas * (uint64_t)moe_num_chunks(d->num_tokens) * 4, 4,
         MOE_BUFFER_WRITTEN, MOE_FIELD_chunk_count},
        {d->workspace, workspace, 16, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_workspace},
        {d->expert_count, num_replicas * 4, 4, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_expert_count},
        {d->expert_offset, num_replicas * 4 + 4, 4, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_expert_offset},
        {d->drop_count, num_replicas * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_drop_count},
        {d->slot_row, slots * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_slot_row},
        {d->row_slot, rows * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_row_slot},
        {d->row_weight, rows * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_row_weight},
        {d->place, slots * 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_place},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE,
                workspace_bytes);
    return moe_check_buffers(b, (int)(sizeof b / sizeof b[0]));
}

/* Refuses what moe_route_desc does not allow; fills in the defaults. */
MOE_HOST moe_status moei_route_check(moe_route_desc* d)
{
    MOE_TRY(moei_route_check_options(d));
    return moei_route_check_buffers(d);
}

/* Sets *c to a thread block for each chunk, of 256 .. MOEI_ROUTE_THREADS threads: one for each
   slot, or more where a block adds up the counts of many chunks. placing: 1 for the placing launch,
   0 for the counting launch. The placing launch has fewer warps where the device's shared memory
   has no room for more: one warp, with 4096 experts, needs 57 KB. */
MOE_HOST moe_status moei_route_grid(moe_launch_config* c, const moe_route_desc* d, int placing)
{
    const int64_t chunks = moe_num_chunks(d->num_tokens);
    const int64_t slots = moe_chunk_tokens(d->num_tokens) * d->top_k;
    const int64_t sums = placing ? chunks * ((d->num_replicas + 127) / 128) : 0;
    size_t smem = (size_t)d->num_replicas * 4;
    int warps = MOEI_ROUTE_THREADS / 32;
    moe_device device;
    MOE_TRY(moe_device_query(&device));
    while (warps > 8 && slots <= warps * 16 && sums <= warps * 4) warps /= 2;
    if (placing)
        while ((smem = moei_route_shared_bytes(d->num_replicas, warps)) + 1024 >
                   (size_t)device.smem_block &&
               warps > 1)
            warps /= 2;
    *c = moe_grid(chunks > 0 ? chunks : 1, warps * 32, smem, 0);
    c->dependent = 1;
    return MOE_OK;
}

/* Sets *bytes to the workspace that moe_route needs: P * moe_num_chunks(T) * 4, or 0 where
   chunk_count is given; for capacity by weight (P * 2 + 1 + T * K * 2) * 4 more. Each buffer is
   rounded up to 256 bytes. Reads the sizes, the options and chunk_count; errors: theirs. */
MOE_HOST moe_status moe_route_workspace(const moe_route_desc* desc, size_t* bytes)
{
    moe_route_desc d;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    MOE_TRY(moei_route_check_options(&d));
    d.workspace = 0;
    *bytes = moei_route_carve_workspace(&d, 0, d.chunk_count != 0);
    return MOE_OK;
}

/* A prepared routing: all but the stream, for the device that was current in prepare. */
typedef struct moe_route_prepared {
    moei_route_args args;
    moei_route_args list;          /* capacity by weight: the argument of placing */
    moe_launch count, place, keep; /* each is empty where the options do not need it */
} moe_route_prepared;

/* Capacity by weight: prepares the placing of all slots into the list, and the launch that gives
   rows to each expert's best slots. */
MOE_HOST moe_status moei_route_prepare_by_weight(moe_route_prepared* p,
                                                 const moe_launch_config* placing)
{
    const moei_route_args* a = &p->args;
    const int64_t slots = (int64_t)a->d.num_tokens * a->d.top_k, num_replicas = a->d.num_replicas;
    moei_route_args* list = &p->list;
    moe_launch_config c;
    int threads = slots / num_replicas > 64 ? 256 : 64;
    *list = *a;
    list->d.expert_count = a->list_count;
    list->d.expert_offset = a->list_offset;
    list->d.row_slot = a->list_slot;
    list->d.row_weight = a->list_weight;
    list->d.drop_count = 0;
    list->d.row_multiple = 1;
    list->d.capacity = MOEI_ROUTE_NO_LIMIT;
    list->max_rows = (int32_t)slots;
    list->list_only = 1;
    MOE_TRY(MOE_PREPARE(&p->place, moei_route_place_options, *placing));
    /* an expert with up to half more slots than the average is read once */
    while (threads < MOEI_ROUTE_KEEP_THREADS &&
           threads * MOEI_ROUTE_KEEP_STEPS < slots / num_replicas * 3 / 2)
        threads *= 2;
    c = moe_grid(num_replicas, threads, 0, 0);
    c.dependent = 1;
    return MOE_PREPARE(&p->keep, moei_route_keep, c);
}

/* Checks a descriptor and fills in *a, the kernels' argument, which is all zeros. */
MOE_HOST moe_status moei_route_resolve(const moe_route_desc* desc, moei_route_args* a)
{
    a->d = *desc;
    MOE_TRY(moei_route_check(&a->d));
    a->max_rows = (int32_t)moei_route_row_bound(&a->d);
    (void)moei_route_carve_workspace(&a->d, a, a->d.chunk_count != 0);
    return MOE_OK;
}

/* Fills in *p, which is all zeros. */
MOE_HOST moe_status moei_route_prepare(const moe_route_desc* desc, moe_route_prepared* p)
{
    moei_route_args* a = &p->args;
    moe_launch_config c;
    MOE_TRY(moei_route_resolve(desc, a));
    if (!desc->chunk_count && a->d.num_tokens > 0) {
        MOE_TRY(moei_route_grid(&c, &a->d, 0));
        if (a->d.replica_offset || a->d.part_count)
            MOE_TRY(MOE_PREPARE(&p->count, moei_route_count_options, c));
        else MOE_TRY(MOE_PREPARE(&p->count, moei_route_count, c));
    }
    MOE_TRY(moei_route_grid(&c, &a->d, 1));
    if (a->d.drop_rule == MOE_DROP_BY_WEIGHT) return moei_route_prepare_by_weight(p, &c);
    if (a->d.replica_offset || a->d.part_count || a->d.max_rows || a->d.drop_count ||
        a->d.row_multiple > 1 || a->d.capacity != MOEI_ROUTE_NO_LIMIT)
        return MOE_PREPARE(&p->place, moei_route_place_options, c);
    return MOE_PREPARE(&p->place, moei_route_place, c);
}

/* Prepares a routing, which moe_route_run queues any number of times. Errors: a status for each
   field of moe_route_desc that is not as documented. */
MOE_HOST moe_status moe_route_prepare(const moe_route_desc* desc, moe_route_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_route_prepare(desc, p));
}

/* Queues a prepared routing on `stream`. T = 0 writes zero counts and offsets. */
MOE_HOST moe_status moe_route_run(const moe_route_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->count, p->args, stream));
    if (!p->keep.kernel) return MOE_RUN(&p->place, p->args, stream);
    MOE_TRY(MOE_RUN(&p->place, p->list, stream));
    return MOE_RUN(&p->keep, p->args, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_route(const moe_route_desc* desc, cudaStream_t stream)
{
    moe_route_prepared p;
    MOE_TRY(moe_route_prepare(desc, &p));
    return moe_route_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_route_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_route_count));
    MOE_TRY(moe_preload_kernel((const void*)moei_route_count_options));
    MOE_TRY(moe_preload_kernel((const void*)moei_route_place));
    MOE_TRY(moe_preload_kernel((const void*)moei_route_place_options));
    return moe_preload_kernel((const void*)moei_route_keep);
}

MOEI_PRELOAD_INCLUDED(route)

#endif
