/* keep.cuh: capacity by weight: chooses the slots that each expert keeps, for route.cuh.

   place.cuh has written the slots in expert order to a list in the workspace. A thread block has
   one expert. The block finds the weight of the last slot to keep, digit by digit. Then the block
   gives rows to the kept slots, in slot order. A list of at most MOEI_ROUTE_KEEP_STEPS entries a
   thread is loaded once, into registers. A longer one is loaded round by round, each time again.
   All counts are integers, so nothing depends on the order of the threads. An expert with all slots
   gets one block too: correct, but slow. */
#ifndef MOE_ROUTE_KEEP_CUH
#define MOE_ROUTE_KEEP_CUH

#include "../base/numeric.cuh"
#include "place.cuh"

#define MOEI_ROUTE_KEEP_THREADS 1024 /* most threads a block; a power of two, at least 32 */
#define MOEI_ROUTE_KEEP_STEPS 4      /* most list entries of a thread in a round */

/* Shared memory of moei_route_keep. */
typedef struct moei_route_keep_shared {
    uint4 bin[MOEI_ROUTE_KEEP_THREADS]; /* slots by digit, four digits a thread */
    int warp_sum[2][MOE_WARP_SIZE];     /* of moei_route_warps_before: two, used in turn */
    uint32_t row, rows;                 /* rows of the experts before; of all */
    uint32_t differ;                    /* bits in which two keys of the list differ */
    int digit;                          /* the bin of the last slot to keep */
    int above, in;                      /* slots in the bins above; in this bin */
} moei_route_keep_shared;

/* The list's entries of one expert. */
typedef struct moei_route_part {
    const int32_t* slot; /* [count] */
    const float* weight; /* [count] */
    uint32_t count;      /* below 2^31: its sum with a round does not wrap */
    uint32_t round;      /* entries that the block has in registers at a time */
    int steps;           /* a thread's entries of these: 1 .. MOEI_ROUTE_KEEP_STEPS */
    float first;         /* weight of the first entry */
} moei_route_part;

/* A thread's entries of the round that begins at list position `begin`. A warp's
   entries are neighbours; so are entries i of its lanes. */
typedef struct moei_route_entries {
    int slot[MOEI_ROUTE_KEEP_STEPS];     /* as the list has it, unchecked; -1: no entry */
    float weight[MOEI_ROUTE_KEEP_STEPS]; /* of the slots; 0: no entry */
    uint32_t begin;                      /* a multiple of moei_route_part.round */
} moei_route_entries;

/* Which slots to keep: those whose key's bits from `shift` on are above `limit`, and the first
   `equal` slots where these bits equal `limit`. shift 32, limit 0: the first `equal` slots. */
typedef struct moei_route_limit {
    uint32_t limit; /* bits shift .. 31 of a key */
    int shift;      /* 0 .. 32 */
    int equal;      /* slots, 0 .. those of the expert */
} moei_route_limit;

/* Returns the key of a weight: larger for larger weights, 0 for NaN. */
MOE_DEVICE uint32_t moei_route_key(float w) { return moei_is_nan(w) ? 0u : moei_ordered(w); }

/* Returns the bits of a key from `shift` (0 .. 32) on. */
MOE_DEVICE uint32_t moei_route_key_bits(uint32_t key, int shift)
{
    return shift > 31 ? 0u : key >> shift;
}

/* Returns the `count` list entries from `from` on. Raises BAD_COUNT and returns none where they are
   not in the list. */
MOE_DEVICE moei_route_part moei_route_find_part(const moei_route_args* a, int from, int count)
{
    const int slots = a->d.num_tokens * a->d.top_k;
    moei_route_part p;
    if (from < 0 || count < 0 || (int64_t)from + count > slots) { /* not the counts of these ids */
        if (threadIdx.x == 0) moe_fault_raise(a->d.fault, MOE_FAULT_BAD_COUNT, a->d.rank, 0);
        from = count = 0;
    }
    p.slot = a->list_slot + from;
    p.weight = a->list_weight + from;
    p.count = (uint32_t)count;
    p.steps = (int)((p.count + blockDim.x - 1) >> (31 - __clz((int)blockDim.x)));
    if (p.steps == 0) p.steps = 1;
    if (p.steps > MOEI_ROUTE_KEEP_STEPS) p.steps = MOEI_ROUTE_KEEP_STEPS;
    p.round = blockDim.x * (uint32_t)p.steps;
    p.first = count ? __uint_as_float(moei_load4_early(p.weight)) : 0.0f;
    return p;
}

/* Returns the list position of a thread's entry i in the round that begins at `begin`. */
MOE_DEVICE uint32_t moei_route_at(const moei_route_part* p, uint32_t begin, int i)
{
    return begin + (uint32_t)((moe_warp() * p->steps + i) * MOE_WARP_SIZE + moe_lane());
}

/* Returns whether this entry exists. */
MOE_DEVICE bool moei_route_is_entry(const moei_route_part* p, uint32_t begin, int i)
{
    return i < p->steps && moei_route_at(p, begin, i) < p->count;
}

/* Loads a thread's entries of the round that begins at `begin`. */
MOE_DEVICE void moei_route_load_entries(moei_route_entries* x, const moei_route_part* p,
                                        uint32_t begin)
{
    x->begin = begin;
    MOE_UNROLL
    for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i) {
        const uint32_t at = moei_route_at(p, begin, i);
        const bool in = moei_route_is_entry(p, begin, i);
        x->slot[i] = in ? (int)moei_load4_early(p->slot + at) : -1;
        x->weight[i] = in ? __uint_as_float(moei_load4_early(p->weight + at)) : 0.0f;
    }
}

/* Makes x the round that begins at `begin`. The only round of a short list stays loaded. */
MOE_DEVICE void moei_route_have_entries(moei_route_entries* x, const moei_route_part* p,
                                        uint32_t begin)
{
    if (x->begin != begin) moei_route_load_entries(x, p, begin);
}

/* Sets s->row and s->rows. Where the expert has too many slots, sets s->differ: digits then begin
   below the bits that all keys share, which spreads the keys over more bins and needs fewer passes.
   All threads; ends with a barrier. */
MOE_DEVICE void moei_route_sum_up(const moei_route_args* a, const moei_route_part* p,
                                  moei_route_entries* x, moei_route_keep_shared* s)
{
    const moe_route_desc* d = &a->d;
    const uint32_t capacity = (uint32_t)d->capacity;
    uint32_t before = 0, all = 0, differ = 0;
    for (int e = (int)threadIdx.x; e < d->num_replicas; e += (int)blockDim.x) {
        const uint32_t n = (uint32_t)a->list_count[e];
        const uint32_t rows = moei_route_padded(d, n < capacity ? n : capacity);
        all += rows;
        before += e < (int)blockIdx.x ? rows : 0;
    }
    for (uint32_t begin = 0; p->count > capacity && begin < p->count; begin += p->round) {
        moei_route_have_entries(x, p, begin);
        MOE_UNROLL
        for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i)
            if (moei_route_is_entry(p, begin, i))
                differ |= moei_route_key(x->weight[i]) ^ moei_route_key(p->first);
    }
    for (int l = MOE_WARP_SIZE / 2; l > 0; l >>= 1) {
        before += __shfl_xor_sync(MOE_FULL_WARP, before, l);
        all += __shfl_xor_sync(MOE_FULL_WARP, all, l);
        differ |= __shfl_xor_sync(MOE_FULL_WARP, differ, l);
    }
    if (moe_lane() == 0) { /* many warps have nothing to add */
        if (before) atomicAdd(&s->row, before);
        if (all) atomicAdd(&s->rows, all);
        if (differ) atomicOr(&s->differ, differ);
    }
    __syncthreads();
}

/* Returns the sum of n of the last lanes of the warps before this one. Sets *total to the sum over
   all warps. All threads. No barrier at the end: one must come before warp_sum is used again. */
MOE_DEVICE int moei_route_warps_before(int n, int* warp_sum, int* total)
{
    int sum, scan;
    if (moe_lane() == MOE_WARP_SIZE - 1) warp_sum[moe_warp()] = n;
    __syncthreads();
    sum = moe_lane() < (int)(blockDim.x >> 5) ? warp_sum[moe_lane()] : 0;
    scan = moe_warp_inclusive_scan(sum);
    *total = __shfl_sync(MOE_FULL_WARP, scan, MOE_WARP_SIZE - 1);
    return __shfl_sync(MOE_FULL_WARP, scan - sum, moe_warp());
}

/* Sets s->digit, s->above and s->in: the bin in which the number of slots, counted from the highest
   bin on, reaches `need`. Clears the bins. All threads; ends with a barrier. */
MOE_DEVICE void moei_route_find_digit(moei_route_keep_shared* s, int need)
{
    const int own = (int)(blockDim.x - 1 - threadIdx.x); /* thread 0 has the highest bins */
    const uint4 v = s->bin[own];
    const int bin[4] = {(int)v.w, (int)v.z, (int)v.y, (int)v.x}; /* highest first */
    const int inclusive = moe_warp_inclusive_scan(bin[0] + bin[1] + bin[2] + bin[3]);
    int total;
    int upto = inclusive + moei_route_warps_before(inclusive, s->warp_sum[0], &total);
    s->bin[own] = make_uint4(0, 0, 0, 0);
    MOE_UNROLL
    for (int i = 3; i >= 0; --i) {
        const int before = upto - bin[i];
        if (before < need && need <= upto) { /* true in one bin of one thread */
            s->digit = own * 4 + 3 - i;
            s->above = before;
            s->in = bin[i];
        }
        upto = before;
    }
    __syncthreads();
}

/* Returns the limit that exactly `need` slots pass; the list has more. Requires clear bins. All
   threads. Each pass counts the next digit of the keys that match the limit so far. */
MOE_DEVICE moei_route_limit moei_route_select(const moei_route_part* p, moei_route_entries* x,
                                              moei_route_keep_shared* s, int need)
{
    const int digit_bits = 33 - __clz((int)blockDim.x); /* log2 of the bins, four a thread */
    uint32_t* bin = (uint32_t*)s->bin;
    moei_route_limit l;
    l.shift = s->differ ? 32 - __clz((int)s->differ) : 0;
    l.limit = moei_route_key_bits(moei_route_key(p->first), l.shift);
    l.equal = need;
    while (l.shift > 0) {
        const int above = l.shift, bits = above < digit_bits ? above : digit_bits;
        l.shift -= bits;
        for (uint32_t begin = 0; begin < p->count; begin += p->round) {
            moei_route_have_entries(x, p, begin);
            MOE_UNROLL
            for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i) {
                const uint32_t key = moei_route_key(x->weight[i]);
                if (moei_route_is_entry(p, begin, i) &&
                    moei_route_key_bits(key, above) == l.limit)
                    atomicAdd(bin + (key >> l.shift & ((1u << bits) - 1u)), 1u);
            }
        }
        __syncthreads();
        moei_route_find_digit(s, l.equal);
        l.limit = l.limit << bits | (uint32_t)s->digit;
        l.equal -= s->above;
        if (l.equal == s->in) break; /* keeps all of the bin: lower bits decide nothing */
    }
    return l;
}

/* Writes the row of a slot: row `at` of the expert's, from expert_row on; at = -1: none. A slot out
   of range comes from a list entry that the placing launch did not write. The placing launch has
   raised BAD_COUNT with its chunk: the index here is the last slot, so that the chunk's fault
   prevails. */
MOE_DEVICE void moei_route_write_slot(const moei_route_args* a, uint32_t expert_row, int slot,
                                      float weight, int at)
{
    const moe_route_desc* d = &a->d;
    const int row = at < 0 ? -1 : (int)(expert_row + (unsigned)at);
    if (slot < 0 || slot >= d->num_tokens * d->top_k || row < -1 || row >= a->max_rows) {
        moe_fault_raise(d->fault, MOE_FAULT_BAD_COUNT, d->rank, d->num_tokens * d->top_k - 1);
        return;
    }
    moei_route_write_row(d, slot, (int)blockIdx.x, (int)expert_row, row);
    if (row >= 0 && d->row_slot) d->row_slot[row] = slot;
    if (row >= 0 && d->row_weight) d->row_weight[row] = weight;
}

/* Sets bits of the lanes whose entry i is above the limit (*high), and at the limit (*same). The
   whole warp. */
MOE_DEVICE void moei_route_ballot(const moei_route_part* p, const moei_route_entries* x, int i,
                                  const moei_route_limit* l, uint32_t* high, uint32_t* same)
{
    const uint32_t bits = moei_route_key_bits(moei_route_key(x->weight[i]), l->shift);
    const bool in = moei_route_is_entry(p, x->begin, i);
    *high = __ballot_sync(MOE_FULL_WARP, in && bits > l->limit);
    *same = __ballot_sync(MOE_FULL_WARP, in && bits == l->limit);
}

/* Gives rows to the slots that `l` keeps, round by round in slot order. All threads.
     1. counts the entries above and at the limit, of each warp; their sums over the warps before
     2. a kept slot's row number: slots above before it + slots at the limit before it, of these at
        most l->equal */
MOE_DEVICE void moei_route_write_part(const moei_route_args* a, const moei_route_part* p,
                                      moei_route_entries* x, moei_route_keep_shared* s,
                                      const moei_route_limit* l)
{
    const uint32_t lane = 1u << moe_lane(), expert_row = s->row;
    int above = 0, equal = 0; /* of the rounds before */
    int buffer = 0;           /* of warp_sum: a warp that is ahead uses the other one */
    for (uint32_t begin = 0; begin < p->count; begin += p->round, buffer ^= 1) {
        uint32_t high, same;
        int n = 0, more, same_before, total;
        moei_route_have_entries(x, p, begin);
        MOE_UNROLL
        for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i) {
            if (i >= p->steps) break;
            moei_route_ballot(p, x, i, l, &high, &same);
            n += __popc(high) | __popc(same) << 16; /* at most 2^12 each in the block */
        }
        n = moei_route_warps_before(n, s->warp_sum[buffer], &total);
        more = above + (n & 0xffff);
        same_before = equal + (n >> 16);
        MOE_UNROLL
        for (int i = 0; i < MOEI_ROUTE_KEEP_STEPS; ++i) {
            int rank, at;
            if (i >= p->steps) break;
            moei_route_ballot(p, x, i, l, &high, &same); /* again: fewer registers */
            rank = same_before + __popc(same & (lane - 1u));
            at = more + __popc(high & (lane - 1u)) + (rank < l->equal ? rank : l->equal);
            if (!(high & lane) && !((same & lane) && rank < l->equal)) at = -1;
            if (moei_route_is_entry(p, begin, i))
                moei_route_write_slot(a, expert_row, x->slot[i], x->weight[i], at);
            more += __popc(high);
            same_before += __popc(same);
        }
        above += total & 0xffff;
        equal += total >> 16;
    }
}

/* Runs one block an expert: gives rows to the slots it keeps, and writes counts and offsets.
     1. this expert's entries of the list
     2. row of its first slot; the limit, where it has too many slots
     3. rows, counts and offsets
     4. clears the rows that pad the expert, and its share of the rows past the last */
MOE_KERNEL(MOEI_ROUTE_KEEP_THREADS, 1) moei_route_keep(MOE_ARG(moei_route_args) a)
{
    MOE_SHARED(moei_route_keep_shared, s);
    const int e = (int)blockIdx.x;
    moei_route_part p;
    moei_route_entries x;
    moei_route_limit l;
    int from, count, kept, padded, row, rows;

    moe_pdl_trigger();
    s.bin[threadIdx.x] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) s.row = s.rows = s.differ = 0;
    __syncthreads(); /* bin, row, rows and differ are clear */
    moe_pdl_wait();
    from = (int)moei_load4_early(a.list_offset + e); /* loaded together with the fault word */
    count = (int)moei_load4_early(a.list_count + e);
    if (moe_fault_stopped(a.d.fault)) return;
    p = moei_route_find_part(&a, from, count); /* 1. */
    moei_route_load_entries(&x, &p, 0);
    moei_route_sum_up(&a, &p, &x, &s); /* 2. */
    count = (int)p.count;
    kept = count < a.d.capacity ? count : a.d.capacity;
    l.limit = 0, l.shift = 32, l.equal = count;
    if (count > kept) l = moei_route_select(&p, &x, &s, kept);
    moei_route_write_part(&a, &p, &x, &s, &l); /* 3. */
    padded = (int)moei_route_padded(&a.d, (unsigned)kept);
    row = (int)s.row, rows = (int)s.rows;
    if (threadIdx.x == 0) {
        a.d.expert_count[e] = kept;
        a.d.expert_offset[e] = row;
        if (a.d.drop_count) a.d.drop_count[e] = count - kept;
        if (e == a.d.num_replicas - 1) a.d.expert_offset[e + 1] = rows;
    }
    if (row >= 0) /* 4. the rows that pad the expert */
        moei_route_clear_rows(&a, (uint32_t)row + (uint32_t)kept + threadIdx.x,
                              (uint32_t)row + (uint32_t)padded, blockDim.x);
    if (rows >= 0) /* the rows past the last */
        moei_route_clear_rows(&a, (uint32_t)rows + blockIdx.x * blockDim.x + threadIdx.x,
                              (uint32_t)a.max_rows, gridDim.x * blockDim.x);
}

#endif
