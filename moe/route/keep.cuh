/* keep.cuh: capacity by weight: which slots of each expert stay, for route.cuh.

   The slots already stand in expert order in a list in the workspace (place.cuh wrote it). One
   block has one expert: it finds the weight of the last slot that stays, digit by digit, and then
   gives rows to those that stay, in slot order. All counts are integers, so nothing depends on the
   order of the threads. An expert with all slots has its block to itself: right, not quick. */
#ifndef MOE_ROUTE_KEEP_CUH
#define MOE_ROUTE_KEEP_CUH

#include "../base/numeric.cuh"
#include "place.cuh"

#define MOEI_ROUTE_KEEP_THREADS 1024 /* of a block, at most */
#define MOEI_ROUTE_KEEP_STEPS 4      /* list entries of a thread that are under way together */
#define MOEI_ROUTE_BIN_BITS 11       /* a digit */
#define MOEI_ROUTE_BINS (1 << MOEI_ROUTE_BIN_BITS)

typedef struct moei_route_keep_shared {
    moei_block_scan_scratch scratch;
    int bin[MOEI_ROUTE_BINS];
    uint32_t differ; /* bits in which two keys of the list differ */
    int digit;       /* the bin that the last slot to stay is in */
    int above, in;   /* slots in the bins above it, and in it */
} moei_route_keep_shared;

/* An expert's part of the list, and its first row. */
typedef struct moei_route_part {
    const int32_t* slot;
    const float* weight;
    int count;
    int row;  /* first row of the expert */
    int rows; /* of all experts */
} moei_route_part;

/* A slot stays where its key's bits from `shift` on are above `limit`, and so do the first `equal`
   slots where they are the same. shift 32, limit 0: the first `equal` slots stay. */
typedef struct moei_route_limit {
    uint32_t limit;
    int shift, equal;
} moei_route_limit;

/* Larger for larger weights, 0 for NaN. */
MOE_DEVICE uint32_t moei_route_key(float w) { return moei_is_nan(w) ? 0u : moei_ordered(w); }

/* The bits of a key from `shift` (0 .. 32) on. */
MOE_DEVICE uint32_t moei_route_key_bits(uint32_t key, int shift)
{
    return shift > 31 ? 0u : key >> shift;
}

/* This block's expert: counts, offsets and the part of the list. Ends with a barrier. */
MOE_DEVICE moei_route_part moei_route_find_part(const moei_route_args* a,
                                                moei_block_scan_scratch* scratch)
{
    const moe_route_desc* d = &a->d;
    const int P = d->num_replicas, own = (int)blockIdx.x, slots = d->num_tokens * d->top_k;
    const int from = a->list_offset[own];
    unsigned before = 0, all = 0;
    moei_route_part p;
    int sum;
    for (int e = (int)threadIdx.x; e < P; e += (int)blockDim.x) {
        const unsigned n = (unsigned)a->list_count[e];
        const unsigned rows =
            moei_route_padded(d, n < (unsigned)d->capacity ? n : (unsigned)d->capacity);
        all += rows;
        before += e < own ? rows : 0;
    }
    (void)moei_block_exclusive_scan((int)before, scratch, &sum);
    p.row = sum;
    (void)moei_block_exclusive_scan((int)all, scratch, &sum);
    p.rows = sum;
    p.count = a->list_count[own];
    if (from < 0 || p.count < 0 || (int64_t)from + p.count > slots) { /* not these ids' counts */
        if (threadIdx.x == 0) moei_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, 0, 0);
        p.count = 0;
    }
    p.slot = a->list_slot + (p.count ? from : 0);
    p.weight = a->list_weight + (p.count ? from : 0);
    return p;
}

/* The bits in which the keys of the list differ: a digit below the common ones spreads them over
   more bins, and it is read by fewer passes. */
MOE_DEVICE uint32_t moei_route_differ(const moei_route_part* p, moei_route_keep_shared* s)
{
    const uint32_t first = moei_route_key(p->weight[0]);
    uint32_t differ = 0;
    if (threadIdx.x == 0) s->differ = 0;
    __syncthreads();
    MOEI_UNROLL_8
    for (uint32_t i = threadIdx.x; i < (uint32_t)p->count; i += blockDim.x)
        differ |= moei_route_key(p->weight[i]) ^ first;
    for (int l = MOEI_WARP / 2; l > 0; l >>= 1) differ |= __shfl_xor_sync(MOEI_FULL, differ, l);
    if (moei_lane() == 0) atomicOr(&s->differ, differ);
    __syncthreads();
    return s->differ;
}

/* Finds digit, above and in: the bin in which the slots counted from the highest bin on reach
   `need`. Ends with a barrier. */
MOE_DEVICE void moei_route_find_digit(moei_route_keep_shared* s, int need)
{
    const int each = MOEI_ROUTE_BINS / (int)blockDim.x; /* bins of a thread, highest first */
    const int top = MOEI_ROUTE_BINS - 1 - (int)threadIdx.x * each;
    int n = 0, before, total;
    for (int i = 0; i < each; ++i) n += s->bin[top - i];
    before = moei_block_exclusive_scan(n, &s->scratch, &total);
    if (before < need && need <= before + n) /* one thread */
        for (int i = 0; i < each; ++i) {
            const int in = s->bin[top - i];
            if (before < need && need <= before + in) {
                s->digit = top - i;
                s->above = before;
                s->in = in;
            }
            before += in;
        }
    __syncthreads();
}

/* The limit that `need` slots, fewer than the list has, pass. */
MOE_DEVICE moei_route_limit moei_route_select(const moei_route_part* p, moei_route_keep_shared* s,
                                              int need)
{
    const uint32_t differ = moei_route_differ(p, s);
    moei_route_limit l;
    l.shift = differ ? 32 - __clz((int)differ) : 0;
    l.limit = moei_route_key_bits(moei_route_key(p->weight[0]), l.shift);
    l.equal = need;
    while (l.shift > 0) {
        const int above = l.shift;
        const int bits = above < MOEI_ROUTE_BIN_BITS ? above : MOEI_ROUTE_BIN_BITS;
        for (int i = (int)threadIdx.x; i < MOEI_ROUTE_BINS; i += (int)blockDim.x) s->bin[i] = 0;
        __syncthreads();
        l.shift -= bits;
        for (uint32_t i = threadIdx.x; i < (uint32_t)p->count; i += blockDim.x) {
            const uint32_t key = moei_route_key(p->weight[i]);
            if (moei_route_key_bits(key, above) == l.limit)
                atomicAdd(s->bin + (int)(key >> l.shift & ((1u << bits) - 1u)), 1);
        }
        __syncthreads();
        moei_route_find_digit(s, l.equal);
        l.limit = l.limit << bits | (uint32_t)s->digit;
        l.equal -= s->above;
        if (l.equal == s->in) break; /* all of the bin stay: what is below decides nothing */
    }
    return l;
}

/* Gives a slot its row, or none. */
MOE_DEVICE void moei_route_write_slot(const moei_route_args* a, const moei_route_part* p, int slot,
                                      float weight, int at)
{
    const moe_route_desc* d = &a->d;
    const bool split = d->place_kind == MOE_PLACE_BY_EXPERT;
    int row = at < 0 ? -1 : (int)((unsigned)p->row + (unsigned)at);
    moe_place place;
    if (slot < 0 || slot >= d->num_tokens * d->top_k || row < -1 || row >= a->max_rows) {
        moei_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, 0, slot < 0 ? 0 : slot);
        return;
    }
    if (d->slot_row) d->slot_row[slot] = row;
    place.buffer = row < 0 ? -1 : split ? (int)blockIdx.x : 0;
    place.row = row < 0 ? -1 : split ? at : row;
    if (d->place) d->place[slot] = place;
    if (row >= 0 && d->row_slot) d->row_slot[row] = slot;
    if (row >= 0 && d->row_weight) d->row_weight[row] = weight;
}

/* Walks the list in slot order: a warp has 32 neighbours a step. */
MOE_DEVICE void moei_route_write_part(const moei_route_args* a, const moei_route_part* p,
                                      moei_route_keep_shared* s, const moei_route_limit* l)
{
    const uint32_t count = (uint32_t)p->count; /* below 2^31: sums of it do not wrap */
    const int steps = (int)min((count + blockDim.x - 1) / blockDim.x, MOEI_ROUTE_KEEP_STEPS);
    const uint32_t lower = (1u << moei_lane()) - 1u;
    int above = 0, equal = 0; /* among the slots before */
    for (uint32_t begin = 0; begin < count; begin += blockDim.x * (uint32_t)steps) {
        const uint32_t first = begin + (uint32_t)(moei_warp() * steps * MOEI_WARP + moei_lane());
        uint32_t high[MOEI_ROUTE_KEEP_STEPS], same[MOEI_ROUTE_KEEP_STEPS];
        int slot[MOEI_ROUTE_KEEP_STEPS], n = 0, more, same_before, total;
        float weight[MOEI_ROUTE_KEEP_STEPS];
        MOEI_UNROLL
        for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i) {
            const uint32_t at = first + (uint32_t)(i * MOEI_WARP);
            const bool in = i < steps && at < count;
            slot[i] = in ? (int)moei_load4_early(p->slot + at) : -1;
            weight[i] = in ? __uint_as_float(moei_load4_early(p->weight + at)) : 0.0f;
        }
        MOEI_UNROLL
        for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i) {
            const bool in = i < steps && first + (uint32_t)(i * MOEI_WARP) < count;
            const uint32_t bits = moei_route_key_bits(moei_route_key(weight[i]), l->shift);
            high[i] = __ballot_sync(MOEI_FULL, in && bits > l->limit);
            same[i] = __ballot_sync(MOEI_FULL, in && bits == l->limit);
            n += __popc(high[i]) | __popc(same[i]) << 16; /* at most 2^12 each in the block */
        }
        n = moei_block_exclusive_scan(moei_lane() == 0 ? n : 0, &s->scratch, &total);
        n = __shfl_sync(MOEI_FULL, n, 0);
        more = above + (n & 0xffff);
        same_before = equal + (n >> 16);
        MOEI_UNROLL
        for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i) {
            const int rank = same_before + __popc(same[i] & lower);
            const bool stays = (high[i] >> moei_lane() & 1u) != 0 ||
                               ((same[i] >> moei_lane() & 1u) != 0 && rank < l->equal);
            const int at =
                more + __popc(high[i] & lower) + (rank < l->equal ? rank : l->equal);
            if (i < steps && first + (uint32_t)(i * MOEI_WARP) < count)
                moei_route_write_slot(a, p, slot[i], weight[i], stays ? at : -1);
            more += __popc(high[i]);
            same_before += __popc(same[i]);
        }
        above += total & 0xffff;
        equal += total >> 16;
    }
}

/* One block an expert: gives rows to the slots that stay, and writes its counts. */
MOE_KERNEL(MOEI_ROUTE_KEEP_THREADS, 1) moei_route_keep(MOE_ARG(moei_route_args) a)
{
    MOE_SHARED(moei_route_keep_shared, s);
    const int e = (int)blockIdx.x;
    moei_route_part p;
    moei_route_limit l;
    int kept, padded;

    moei_let_next_start();
    moei_wait_for_previous();
    if (moei_fault_stopped(a.d.fault)) return;
    p = moei_route_find_part(&a, &s.scratch);
    kept = p.count < a.d.capacity ? p.count : a.d.capacity;
    l.limit = 0, l.shift = 32, l.equal = p.count;
    if (p.count > kept) l = moei_route_select(&p, &s, kept);
    moei_route_write_part(&a, &p, &s, &l);

    padded = (int)moei_route_padded(&a.d, (unsigned)kept);
    if (threadIdx.x == 0) {
        a.d.expert_count[e] = kept;
        a.d.expert_offset[e] = p.row;
        if (a.d.drop_count) a.d.drop_count[e] = p.count - kept;
        if (e == a.d.num_replicas - 1) a.d.expert_offset[e + 1] = p.rows;
    }
    if (p.row >= 0) /* the rows that fill the expert up */
        moei_route_clear_rows(&a, (uint32_t)p.row + (uint32_t)kept + threadIdx.x,
                              (uint32_t)p.row + (uint32_t)padded, blockDim.x);
    if (p.rows >= 0) /* rows past the last */
        moei_route_clear_rows(&a, (uint32_t)p.rows + blockIdx.x * blockDim.x + threadIdx.x,
                              (uint32_t)a.max_rows, gridDim.x * blockDim.x);
}

#endif
