/* push.cuh: the sending half of a dispatch: which ranks a token goes to, the row it gets there, and
   the copies. Called by dispatch.cuh; receive.cuh is the other half.

   Tokens are cut into chunks, one thread block each; one more block has no tokens and sends the
   counts. Rank d's rows from this rank are in token order, so a token's row at d is the number of
   earlier tokens that go there.

   A dispatch has two barriers on its channel: all ids, weights and counts are there; all rows are
   there. Row maps need the first alone, and are made while rows travel. MOE_EP_ALL_TO_ALL has a
   third one between them (scatter.cuh), and MOE_EP_ALL_GATHER_COPY copies the rows elsewhere: in
   these forms this half sends no rows.

   In an all-gather every token has a row at every rank, its own number. Which ranks have an expert
   of it is marked all the same: those send a sum back. */
#ifndef MOE_EP_PUSH_CUH
#define MOE_EP_PUSH_CUH

#include "../base/fp8.cuh"
#include "desc.h"
#include "signal.cuh"

#define MOEI_EP_THREADS 512
#define MOEI_EP_WARPS (MOEI_EP_THREADS / MOE_WARP_SIZE)
#define MOEI_EP_VECTORS 4 /* of a row that a lane has in flight */
#define MOEI_EP_MAX_CHUNKS 128
#define MOEI_EP_ONE_LAUNCH 1024 /* most tokens of which a block counts those before its chunk */

/* Offsets of the buffers in every region, or in every message (message.cuh). */
typedef struct moei_ep_layout {
    uint64_t recv_x, recv_scales, recv_ids, recv_weights, recv_token, recv_count;
    uint64_t wire, wire_scales; /* fp8 rows, their scales */
    uint64_t partial, place, rows;
    uint64_t end; /* bytes from the region's begin */
    /* bytes from one received token to the next */
    int64_t x_step, scales_step, ids_step, weights_step, token_step;
    int64_t first;  /* a sender's first received token: rank C; in a message 0 */
    int32_t sender; /* its entry of recv_count: rank; in a message 0 */
} moei_ep_layout;

/* Sets the steps of buffers that are arrays of their own, and the sender's part of them. */
MOE_HOST void moei_ep_set_steps(moei_ep_layout* at, int rank, int recv_tokens, int top_k,
                                int num_scales, int64_t row_bytes)
{
    at->x_step = row_bytes;
    at->scales_step = (int64_t)num_scales * 4;
    at->ids_step = at->weights_step = (int64_t)top_k * 4;
    at->token_step = 4;
    at->first = (int64_t)rank * recv_tokens;
    at->sender = rank;
}

/* The argument of the kernels of dispatch and combine that touch peers. */
typedef struct moei_ep_args {
    moe_peers_args peers;
    moei_ep_layout at;
    const char* x;
    const float* scales; /* or null */
    const int32_t* ids;
    const float* weights;          /* or null */
    const int32_t* replica_offset; /* or null */
    const moe_ep_expert* replica;
    int32_t* chunk_count;                        /* [chunks, W]; null: not counted before */
    moe_place* send_place;                       /* [T, W]; or null */
    const moe_place* recv_place;                 /* [W C, K] */
    const int32_t *expert_count, *expert_offset; /* [P], [P + 1] */
    void** rows_table;                           /* [W]; or null */
    uint64_t table_at;          /* offset in each region of what rows_table names */
    int64_t x_pitch, row_bytes; /* bytes between rows of x; of a row */
    int64_t max_rows;           /* rows in expert order */
    int64_t sum_bytes;          /* of a row that a combine sends */
    moe_ep_counters* counters;  /* or null */
    uint64_t* waited;           /* where waits of the dispatch are added up; or null */
    int32_t num_tokens, num_experts, top_k, recv_tokens, num_scales, chunk_tokens, channel, tag;
    int32_t num_local;                   /* P */
    int32_t dispatch_form, combine_form; /* moe_ep_dispatch_form, moe_ep_combine_form */
    int32_t dtype;                       /* of x */
    int32_t wire_fp8;                    /* 1: rows for other ranks travel in fp8 */
    const int32_t* row_slot;             /* [max_rows] of the row maps */
    int32_t packs; /* 1: fills messages in this rank's memory (message.cuh): signals to nobody */
} moei_ep_args;

/* Does every token go to every rank? */
MOE_HOST_DEVICE int moei_ep_form_to_all(int dispatch_form)
{
    return dispatch_form == MOE_EP_ALL_GATHER || dispatch_form == MOE_EP_ALL_GATHER_COPY;
}
MOE_HOST_DEVICE int moei_ep_to_all(const moei_ep_args* a)
{
    return moei_ep_form_to_all(a->dispatch_form);
}

/* Must homes be told where the rows of their slots are? */
MOE_HOST_DEVICE int moei_ep_forms_answer(int dispatch_form, int combine_form)
{
    return dispatch_form == MOE_EP_ALL_TO_ALL || combine_form == MOE_EP_GATHERED;
}

/* Does the sending kernel send the rows too? */
MOE_HOST_DEVICE int moei_ep_sends_rows(const moei_ep_args* a)
{
    return a->dispatch_form == MOE_EP_DEDUPLICATED || a->dispatch_form == MOE_EP_ALL_GATHER;
}

/* Shared memory of a chunk. */
typedef struct moei_ep_shared {
    uint32_t* goes; /* [warps][W] bit i: the warp's token number i goes to the rank */
    int* before;    /* [warps][W] rows of the rank before this warp's tokens */
    int* base;      /* [W] rows of the rank before the round; then before the next */
} moei_ep_shared;

/* Returns the bytes of moei_ep_shared's buffers. */
MOE_HOST_DEVICE size_t moei_ep_shared_bytes(int num_ranks)
{
    return (size_t)num_ranks * (MOEI_EP_WARPS * 2 + 1) * 4;
}

/* Sets the addresses of *s from `shared` on. */
MOE_DEVICE void moei_ep_carve_shared(moei_ep_shared* s, unsigned char* shared, int num_ranks)
{
    s->goes = (uint32_t*)shared;
    s->before = (int*)(s->goes + MOEI_EP_WARPS * num_ranks);
    s->base = s->before + MOEI_EP_WARPS * num_ranks;
}

/* Returns the rank and the expert there of slot k of token t, which has this id; rank -1: none. A
   wrong id (BAD_ID) or an expert without a replica in range (BAD_REPLICA) sets the fault word and
   gives none. */
MOE_DEVICE moe_ep_expert moei_ep_target(const moei_ep_args* a, int t, int k, int id)
{
    const int64_t slot = (int64_t)t * a->top_k + k;
    const int num_ranks = a->peers.num_ranks;
    moe_ep_expert e = {-1, -1};
    if (id < 0 || id >= a->num_experts) {
        if (id != -1) moe_fault_raise(a->peers.fault, MOE_FAULT_BAD_ID, a->peers.rank, slot);
    } else if (a->replica_offset) {
        const int from = a->replica_offset[id], n = a->replica_offset[id + 1] - from;
        if (from >= 0 && n > 0 && from + n <= a->replica_offset[a->num_experts])
            e = a->replica[from + t % n];
        if (e.rank < 0 || e.rank >= num_ranks || e.expert < 0) {
            moe_fault_raise(a->peers.fault, MOE_FAULT_BAD_REPLICA, a->peers.rank, slot);
            e.rank = -1;
        }
    } else {
        e.rank = moe_ep_owner(id, a->num_experts, num_ranks);
        e.expert = id - moe_ep_first(e.rank, a->num_experts, num_ranks);
    }
    return e;
}

/* Adds to goes[d], for each rank d, which of tokens t0 + lane, those below `end`, go there by their
   slots first, first + step, ... The whole warp. */
MOE_DEVICE void moei_ep_mark(const moei_ep_args* a, uint32_t* goes, int t0, int end, int first,
                             int step)
{
    const int t = t0 + moe_lane();
    MOE_NO_UNROLL
    for (int d0 = 0; d0 < a->peers.num_ranks; d0 += 32) {
        uint32_t ranks = 0; /* bit i: the token goes to rank d0 + i */
        /* not unrolled: after the first load the others hit L1, and little code matters more */
        MOE_NO_UNROLL
        for (int k = first; k < a->top_k && t < end; k += step) {
            const int id = a->ids[(int64_t)t * a->top_k + k];
            const unsigned r = (unsigned)(moei_ep_target(a, t, k, id).rank - d0);
            if (r < 32) ranks |= 1u << r;
        }
        MOE_NO_UNROLL
        for (int i = 0; i < 32 && d0 + i < a->peers.num_ranks; ++i) {
            const uint32_t lanes = __ballot_sync(MOE_FULL_WARP, ranks >> i & 1u);
            if (moe_lane() == 0 && lanes) atomicOr(goes + d0 + i, lanes);
        }
    }
}

/* Marks one round of tokens and turns base into the sums after it; before[w][d]: before warp w's
   tokens. Where the tokens are fewer than threads, several warps share their slots. All threads;
   ends with a barrier. */
MOE_DEVICE void moei_ep_round(const moei_ep_args* a, const moei_ep_shared* s, int t0, int end)
{
    const int num_ranks = a->peers.num_ranks;
    const int warps = min((end - t0 + MOE_WARP_SIZE - 1) / MOE_WARP_SIZE, MOEI_EP_WARPS);
    const int step = MOEI_EP_WARPS / warps, w0 = moe_warp() % warps, first = moe_warp() / warps;
    MOE_NO_UNROLL
    for (int j = (int)threadIdx.x; j < warps * num_ranks; j += (int)blockDim.x) s->goes[j] = 0;
    __syncthreads();
    if (first < step)
        moei_ep_mark(a, s->goes + w0 * num_ranks, t0 + w0 * MOE_WARP_SIZE, end, first, step);
    __syncthreads(); /* goes is complete */
    MOE_NO_UNROLL
    for (int d = (int)threadIdx.x; d < num_ranks; d += (int)blockDim.x) {
        int n = s->base[d];
        MOE_NO_UNROLL
        for (int w = 0; w < warps; ++w) {
            s->before[w * num_ranks + d] = n;
            n += __popc(s->goes[w * num_ranks + d]);
        }
        s->base[d] = n;
    }
    __syncthreads();
}

/* Counting, one block a chunk: chunk_count[chunk][d] = tokens of the chunk that go to rank d. */
MOE_KERNEL(MOEI_EP_THREADS, 1) moei_ep_count(MOE_ARG(moei_ep_args) a)
{
    MOE_SHARED_DYNAMIC(shared);
    const int num_ranks = a.peers.num_ranks, begin = (int)blockIdx.x * a.chunk_tokens;
    const int end = min(begin + a.chunk_tokens, a.num_tokens);
    moei_ep_shared s;
    moe_pdl_trigger();
    moei_ep_carve_shared(&s, shared, num_ranks);
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    for (int d = (int)threadIdx.x; d < num_ranks; d += (int)blockDim.x) s.base[d] = 0;
    for (int t = begin; t < end; t += MOEI_EP_THREADS) moei_ep_round(&a, &s, t, end);
    __syncthreads();
    for (int d = (int)threadIdx.x; d < num_ranks; d += (int)blockDim.x)
        a.chunk_count[blockIdx.x * (unsigned)num_ranks + (unsigned)d] = s.base[d];
}

/* Does rank d have an expert of the round's token number i? */
MOE_DEVICE int moei_ep_goes(const moei_ep_args* a, const moei_ep_shared* s, int i, int d)
{
    return (int)(s->goes[(i >> 5) * a->peers.num_ranks + d] >> (i & 31) & 1u);
}

/* Returns the row at rank d of token t0 + i, number i of the round that begins at t0; -1 where the
   token does not go there or has no room. */
MOE_DEVICE int moei_ep_row(const moei_ep_args* a, const moei_ep_shared* s, int t0, int i, int d)
{
    const int at = (i >> 5) * a->peers.num_ranks + d, all = moei_ep_to_all(a);
    const uint32_t goes = s->goes[at], bit = 1u << (i & 31);
    const int row = all ? t0 + i : s->before[at] + __popc(goes & (bit - 1u));
    return (all || (goes & bit)) && row < a->recv_tokens ? row : -1;
}

/* Loads one piece of a token's row: MOEI_EP_VECTORS vectors a lane from byte `from` on. The whole
   warp; `width`, here and below, is a literal. */
MOE_DEVICE void moei_ep_load(uint4* v, const moei_ep_args* a, int t, int64_t from, const int width)
{
    const char* x = a->x + t * a->x_pitch;
    from += moe_lane() * width;
    MOE_UNROLL
    for (int u = 0; u < MOEI_EP_VECTORS; ++u)
        if (from + u * MOE_WARP_SIZE * width < a->row_bytes)
            v[u] = moei_load_vector(x + from + u * MOE_WARP_SIZE * width, width);
}

/* A piece of a row in fp8. */
typedef struct moei_ep_fp8 {
    uint2 code[MOEI_EP_VECTORS];
    float scale[MOEI_EP_VECTORS]; /* of the lane's group */
} moei_ep_fp8;

/* Encodes the piece from byte `from` on, which is loaded in vectors of 16 bytes. The whole warp. */
MOE_DEVICE void moei_ep_encode(moei_ep_fp8* f, const uint4* v, const moei_ep_args* a, int64_t from)
{
    MOE_UNROLL
    for (int u = 0; u < MOEI_EP_VECTORS; ++u) {
        const int in = from + (u * MOE_WARP_SIZE + moe_lane()) * 16 < a->row_bytes;
        f->code[u] = moei_fp8_encode_8(in ? v[u] : make_uint4(0, 0, 0, 0), f->scale + u, a->dtype);
    }
}

/* Stores it in row `row` of a rank's wire. The whole warp. */
MOE_DEVICE void moei_ep_store_fp8(const moei_ep_fp8* f, const moei_ep_args* a, int rank,
                                  int64_t row, int64_t from)
{
    const int hidden = (int)(a->row_bytes / 2),
              groups = (hidden + MOE_FP8_GROUP - 1) / MOE_FP8_GROUP;
    char* y = moe_peer_address(&a->peers, rank, a->at.wire) + row * hidden;
    float* scales = (float*)moe_peer_address(&a->peers, rank, a->at.wire_scales) + row * groups;
    MOE_UNROLL
    for (int u = 0; u < MOEI_EP_VECTORS; ++u) {
        const int h = (int)(from / 2) + (u * MOE_WARP_SIZE + moe_lane()) * 8;
        if (h >= hidden) continue;
        *(uint2*)(y + h) = f->code[u];
        if (h % MOE_FP8_GROUP == 0) scales[h / MOE_FP8_GROUP] = f->scale[u];
    }
}

/* Stores the piece at all ranks that token t0 + i goes to. fp8: 1: other ranks get it in fp8; a
   literal, here and below. The whole warp. */
MOE_DEVICE void moei_ep_store(const uint4* v, const moei_ep_args* a, const moei_ep_shared* s,
                              int t0, int i, int64_t from, const int width, const int fp8)
{
    const int64_t at = from + moe_lane() * width;
    moei_ep_fp8 f;
    if (fp8) moei_ep_encode(&f, v, a, from);
    MOE_NO_UNROLL
    for (int q = 0; q < a->peers.num_ranks; ++q) {
        const int d = moe_peer_rotated(&a->peers, q), row = moei_ep_row(a, s, t0, i, d);
        if (row < 0) continue;
        if (fp8 && d != a->peers.rank) {
            moei_ep_store_fp8(&f, a, d, a->at.first + row, from);
            continue;
        }
        char* y = moe_peer_address(&a->peers, d, a->at.recv_x) + (a->at.first + row) * a->at.x_step;
        MOE_UNROLL
        for (int u = 0; u < MOEI_EP_VECTORS; ++u)
            if (at + u * MOE_WARP_SIZE * width < a->row_bytes)
                moei_store_vector(y + at + u * MOE_WARP_SIZE * width, v[u], width);
    }
}

/* Sends what belongs to tokens first .. upto - 1 of the round: ids and weights of their slots, the
   tokens' numbers, and scales where they travel with tokens. Neighbouring threads have neighbouring
   slots, whose rows at a rank are neighbours too: a warp's stores fill vectors of 128 bytes, which
   on the link cost as much as one of 4. All threads. */
MOE_DEVICE void moei_ep_send_slots(const moei_ep_args* a, const moei_ep_shared* s, int t0,
                                   int first, int upto)
{
    const int top_k = a->top_k, slots = (upto - first) * top_k;
    const int num_scales = a->dispatch_form == MOE_EP_ALL_TO_ALL ? 0 : a->num_scales;
    const int scales = (upto - first) * num_scales, num_ranks = a->peers.num_ranks;
    MOE_NO_UNROLL
    for (int n = (int)threadIdx.x; n < slots * num_ranks; n += (int)blockDim.x) {
        const int d = moe_peer_rotated(&a->peers, n / slots), j = n % slots;
        const int i = first + j / top_k, k = j % top_k, row = moei_ep_row(a, s, t0, i, d);
        const int64_t slot = (int64_t)(t0 + i) * top_k + k, to = a->at.first + row;
        char* base = moe_peer_address(&a->peers, d, 0);
        if (row < 0) continue;
        const moe_ep_expert e = moei_ep_target(a, t0 + i, k, a->ids[slot]);
        ((int32_t*)(base + a->at.recv_ids + to * a->at.ids_step))[k] = e.rank == d ? e.expert : -1;
        ((float*)(base + a->at.recv_weights + to * a->at.weights_step))[k] =
            a->weights ? a->weights[slot] : 1.0f;
        if (k == 0) *(int32_t*)(base + a->at.recv_token + to * a->at.token_step) = t0 + i;
    }
    MOE_NO_UNROLL
    for (int n = (int)threadIdx.x; n < scales * num_ranks; n += (int)blockDim.x) {
        const int d = moe_peer_rotated(&a->peers, n / scales), j = n % scales;
        const int i = first + j / num_scales, c = j % num_scales;
        const int row = moei_ep_row(a, s, t0, i, d);
        char* to = moe_peer_address(&a->peers, d, a->at.recv_scales);
        if (row >= 0)
            ((float*)(to + (a->at.first + row) * a->at.scales_step))[c] =
                a->scales[(int64_t)(t0 + i) * num_scales + c];
    }
}

/* Writes the entries of send_place of tokens first .. upto - 1 of the round, and clears those of
   `place`. All threads. */
MOE_DEVICE void moei_ep_note_places(const moei_ep_args* a, const moei_ep_shared* s, int t0,
                                    int first, int upto)
{
    const int num_ranks = a->peers.num_ranks, top_k = a->top_k;
    const int keeps = a->combine_form == MOE_EP_REDUCE_SCATTER; /* the ranks keep their sums */
    const moe_place none = {-1, -1};
    if (a->send_place) MOE_NO_UNROLL
    for (int j = (int)threadIdx.x; j < (upto - first) * num_ranks; j += (int)blockDim.x) {
        const int i = first + j / num_ranks, d = j % num_ranks;
        const int row = moei_ep_goes(a, s, i, d) ? moei_ep_row(a, s, t0, i, d) : -1;
        moe_place p = none;
        if (row >= 0) {
            p.buffer = keeps ? d : 0;
            p.row = keeps ? row : d * a->recv_tokens + row;
        }
        a->send_place[(int64_t)(t0 + first) * num_ranks + j] = p;
    }
    if (moei_ep_forms_answer(a->dispatch_form, a->combine_form)) MOE_NO_UNROLL
    for (int j = (int)threadIdx.x; j < (upto - first) * top_k; j += (int)blockDim.x)
        ((moe_place*)(a->peers.base + a->at.place))[(int64_t)(t0 + first) * top_k + j] = none;
}

/* Arrives at barrier n of a channel with a grid that stored to peers: each block adds its share;
   the last block's counts the rank as come. A block that began after a stop fault (`stopped`) adds
   nothing; the last block then sends that fault. All threads of every block; the last warp adds,
   after a barrier of the block. */
MOE_DEVICE void moei_ep_arrive(const moe_peers_args* p, int channel, uint32_t n, bool stopped)
{
    const uint32_t share = MOE_PEERS_UNIT / gridDim.x;
    const int last = blockIdx.x == gridDim.x - 1;
    __syncthreads(); /* all threads have stored */
    if (moe_warp() == (int)(blockDim.x >> 5) - 1 && (last || !stopped))
        moei_peer_add_share(p, channel, n, last ? MOE_PEERS_UNIT - share * (gridDim.x - 1) : share,
                            last);
}

/* Sets base[d] to the rows of rank d before the calling block's chunk, from the counts. All
   threads; a barrier must follow. */
MOE_DEVICE void moei_ep_sum_chunks(const moei_ep_args* a, const moei_ep_shared* s)
{
    const int num_ranks = a->peers.num_ranks;
    MOE_NO_UNROLL
    for (int d = moe_warp(); d < num_ranks; d += MOEI_EP_WARPS) { /* a rank a warp */
        int n = 0;
        MOE_UNROLL
        for (int c = 0; c < MOEI_EP_MAX_CHUNKS; c += MOE_WARP_SIZE)
            if (c + moe_lane() < (int)blockIdx.x)
                n += a->chunk_count[(c + moe_lane()) * num_ranks + d];
        n = moe_warp_inclusive_scan(n);
        if (moe_lane() == MOE_WARP_SIZE - 1) s->base[d] = n;
    }
}

/* Sets base[d] to the rows of rank d before the round in which this block begins: from the counts;
   without counts rounds begin at token 0. All threads; a barrier must follow. */
MOE_DEVICE void moei_ep_begin(const moei_ep_args* a, const moei_ep_shared* s)
{
    if (a->chunk_count) moei_ep_sum_chunks(a, s);
    else if ((int)threadIdx.x < a->peers.num_ranks) s->base[threadIdx.x] = 0;
}

/* Sends this rank's counts of tokens, and writes rows_table. The last block, all threads, when base
   is final. */
MOE_DEVICE void moei_ep_send_counts(const moei_ep_args* a, const moei_ep_shared* s)
{
    MOE_NO_UNROLL
    for (int d = (int)threadIdx.x; d < a->peers.num_ranks; d += (int)blockDim.x) {
        const int rows = moei_ep_to_all(a) ? a->num_tokens : s->base[d];
        ((int32_t*)moe_peer_address(&a->peers, d, a->at.recv_count))[a->at.sender] =
            min(rows, a->recv_tokens);
        if (rows > a->recv_tokens)
            moe_fault_raise(a->peers.fault, MOE_FAULT_ROWS_FULL, a->peers.rank, rows);
        if (a->rows_table) a->rows_table[d] = moe_peer_address(&a->peers, d, a->table_at);
    }
}

/* Sending, one block a chunk and one more, in rounds of MOEI_EP_THREADS tokens. Marks the ranks of
   each round's tokens, then
     1. sends what belongs to the rows of the chunk's tokens; the last block, which has no tokens,
        sends the counts; each block arrives at barrier n
     2. copies the rows, where it does (moei_ep_sends_rows): a warp has a piece of a row at a time;
        each block arrives at barrier n + 1
   The first piece of each warp is loaded before anything else. Marks of one round serve both. */
MOE_DEVICE_BODY void moei_ep_push_chunk(const moei_ep_args* a, unsigned char* shared,
                                        const int width, const int fp8)
{
    const int num_ranks = a->peers.num_ranks, begin = (int)blockIdx.x * a->chunk_tokens;
    const int end = min(begin + a->chunk_tokens, a->num_tokens);
    const int begin_round = a->chunk_count || moei_ep_to_all(a) ? begin : 0;
    const int passes = moei_ep_sends_rows(a) ? 2 : 1;
    const int piece = MOE_WARP_SIZE * MOEI_EP_VECTORS * width;
    const int pieces = (int)((a->row_bytes + piece - 1) / piece);
    int held = begin + moe_warp() / pieces; /* token of which v has this warp's first piece */
    const int last = blockIdx.x == gridDim.x - 1, ids_at = begin_round + (int)threadIdx.x;
    uint4 v[MOEI_EP_VECTORS];
    moei_ep_shared s;
    uint32_t n;
    bool stop;
    moei_ep_carve_shared(&s, shared, num_ranks);
    moe_pdl_wait();
    n = a->packs ? 0 : moei_peer_next(&a->peers, a->channel);
    /* after the wait: the kernels behind, which write row maps beside this one, rely on it that all
       kernels ahead have ended */
    moei_peer_pdl_trigger(&a->peers, last);
    stop = threadIdx.x == 0 && moe_fault_stops(a->peers.fault);
    if (ids_at < end) (void)moei_load4_early(a->ids + (int64_t)ids_at * a->top_k); /* into L1 */
    if (passes == 2 && held < end)
        moei_ep_load(v, a, held, (int64_t)(moe_warp() % pieces) * piece, width);
    MOE_NO_UNROLL
    for (int pass = 1; pass <= passes; ++pass) {
        const int mark = pass == 1 || end - begin_round > MOEI_EP_THREADS;
        if (mark) {
            moei_ep_begin(a, &s);
            if (__syncthreads_or(stop)) { /* base is complete */
                if (!a->packs) moei_ep_arrive(&a->peers, a->channel, n, true);
                return;
            }
        }
        MOE_NO_UNROLL
        for (int t0 = begin_round; t0 < end; t0 += MOEI_EP_THREADS) {
            const int first = begin > t0 ? begin - t0 : 0, upto = min(end - t0, MOEI_EP_THREADS);
            if (mark) moei_ep_round(a, &s, t0, end);
            if (pass == 1) {
                moei_ep_send_slots(a, &s, t0, first, upto);
                moei_ep_note_places(a, &s, t0, first, upto);
            } else {
                MOE_NO_UNROLL
                for (int j = moe_warp(); j < (upto - first) * pieces; j += MOEI_EP_WARPS) {
                    const int i = first + j / pieces;
                    const int64_t from = (int64_t)(j % pieces) * piece;
                    if (t0 + i != held) moei_ep_load(v, a, t0 + i, from, width);
                    held = -1;
                    moei_ep_store(v, a, &s, t0, i, from, width, fp8);
                }
            }
            if (mark) __syncthreads(); /* goes and before are read */
        }
        if (pass == 1 && last) moei_ep_send_counts(a, &s);
        if (!a->packs) moei_ep_arrive(&a->peers, a->channel, n + pass - 1, false);
        __syncthreads(); /* the link keeps their order: the signal for ids goes ahead of rows */
    }
    if (last && a->peers.shared && moe_warp() == 0) /* see signal.cuh: fewer warps wait this way */
        (void)moei_peer_reach_timed(&a->peers, a->channel, n, MOE_PHASE_DISPATCH, a->tag,
                                    a->waited);
}

/* Kernels that send rows: X(name, bytes of the vectors that rows allow, 1: in fp8). */
#define MOEI_EP_WIDTHS(X) X(16, 16, 0) X(4, 4, 0) X(2, 2, 0) X(fp8, 16, 1)

#define MOEI_EP_PUSH(name, width, fp8)                                                             \
    MOE_KERNEL(MOEI_EP_THREADS, 1) moei_ep_push_##name(MOE_ARG(moei_ep_args) a)                    \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moei_ep_push_chunk(&a, shared, width, fp8);                                                \
    }
MOEI_EP_WIDTHS(MOEI_EP_PUSH)
#undef MOEI_EP_PUSH

/* Returns the width of the vectors that rows of x allow: 16, 4 or 2 bytes. */
MOE_HOST int moei_ep_width(const moei_ep_args* a)
{
    const uint64_t all = (uint64_t)(uintptr_t)a->x | (uint64_t)a->x_pitch | (uint64_t)a->row_bytes;
    return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 2;
}

/* Returns the chunks of tokens. */
MOE_HOST int64_t moei_ep_chunks(const moei_ep_args* a)
{
    return (a->num_tokens + a->chunk_tokens - 1) / a->chunk_tokens;
}

/* Prepares the kernels that send; *count stays empty where nothing is counted before. */
MOE_HOST moe_status moei_ep_prepare_push(const moei_ep_args* a, moe_launch* count, moe_launch* push)
{
    const size_t shared = moei_ep_shared_bytes(a->peers.num_ranks);
    const int width = moei_ep_width(a);
    moe_launch_config c = moe_grid(moei_ep_chunks(a), MOEI_EP_THREADS, shared, 0);
    c.dependent = 1;
    if (a->chunk_count) MOE_TRY(MOE_PREPARE(count, moei_ep_count, c));
    c = moe_grid(moei_ep_chunks(a) + 1, MOEI_EP_THREADS, shared, 0); /* the last has no chunk */
    c.dependent = 1;
    if (a->wire_fp8) return MOE_PREPARE(push, moei_ep_push_fp8, c);
    if (width == 16) return MOE_PREPARE(push, moei_ep_push_16, c);
    if (width == 4) return MOE_PREPARE(push, moei_ep_push_4, c);
    return MOE_PREPARE(push, moei_ep_push_2, c);
}

#endif
