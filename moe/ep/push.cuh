/* push.cuh: the sending half of a dispatch: which ranks a token goes to, the row it gets there, and
   the copies. Called by dispatch.cuh.

   Tokens are cut into chunks, one thread block each. Rank d's rows from this rank are in token
   order, so a token's row at d is the number of earlier tokens that go there. */
#ifndef MOE_EP_PUSH_CUH
#define MOE_EP_PUSH_CUH

#include "desc.h"
#include "signal.cuh"

#define MOEI_EP_THREADS 512
#define MOEI_EP_WARPS (MOEI_EP_THREADS / MOE_WARP_SIZE)
#define MOEI_EP_VECTORS 4 /* of a row that a lane has in flight */
#define MOEI_EP_MAX_CHUNKS 128
#define MOEI_EP_FEW 16          /* tokens of a chunk */
#define MOEI_EP_ONE_LAUNCH 1024 /* most tokens of which a block counts those before its chunk */

/* Offsets of the buffers in every region. */
typedef struct moei_ep_layout {
    uint64_t recv_x, recv_scales, recv_ids, recv_weights, recv_token, recv_count;
    uint64_t partial, place, rows;
    uint64_t end; /* bytes from the region's begin */
} moei_ep_layout;

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
    int32_t* chunk_count;        /* [chunks, W]; null: not counted before */
    moe_place* send_place;       /* [T, W]; or null */
    const moe_place* recv_place; /* [W C, K] */
    void** rows_table;           /* [W]; or null */
    int64_t x_pitch, row_bytes;  /* bytes between rows of x; of a row */
    int32_t num_tokens, num_experts, top_k, recv_tokens, num_scales, chunk_tokens, channel, tag;
    int32_t wait; /* 1: the sending kernel waits for all ranks too */
} moei_ep_args;

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

/* Sets goes[d] of the calling warp: which of tokens t0 + lane, those below `end`, go to rank d. The
   whole warp. */
MOE_DEVICE void moei_ep_mark(const moei_ep_args* a, uint32_t* goes, int t0, int end)
{
    const int t = t0 + moe_lane();
    for (int d0 = 0; d0 < a->peers.num_ranks; d0 += 32) {
        uint32_t ranks = 0; /* bit i: the token goes to rank d0 + i */
        /* not unrolled: after the first load the others hit L1, and little code matters more */
        MOE_NO_UNROLL
        for (int k = 0; k < a->top_k && t < end; ++k) {
            const int id = a->ids[(int64_t)t * a->top_k + k];
            const unsigned r = (unsigned)(moei_ep_target(a, t, k, id).rank - d0);
            if (r < 32) ranks |= 1u << r;
        }
        for (int i = 0; i < 32 && d0 + i < a->peers.num_ranks; ++i) {
            const uint32_t lanes = __ballot_sync(MOE_FULL_WARP, ranks >> i & 1u);
            if (moe_lane() == 0) goes[d0 + i] = lanes;
        }
    }
}

/* Marks one round of tokens, those of the warps that have any, and turns base into the sums after
   it; before[w][d]: before warp w's tokens. All threads; ends with a barrier. */
MOE_DEVICE void moei_ep_round(const moei_ep_args* a, const moei_ep_shared* s, int t0, int end)
{
    const int num_ranks = a->peers.num_ranks;
    const int warps = min((end - t0 + MOE_WARP_SIZE - 1) / MOE_WARP_SIZE, MOEI_EP_WARPS);
    if (moe_warp() < warps)
        moei_ep_mark(a, s->goes + moe_warp() * num_ranks, t0 + moe_warp() * MOE_WARP_SIZE, end);
    __syncthreads(); /* goes is complete */
    for (int d = (int)threadIdx.x; d < num_ranks; d += (int)blockDim.x) {
        int n = s->base[d];
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

/* Returns the row at rank d of the round's token number i, -1 where the token does not go there or
   has no room. */
MOE_DEVICE int moei_ep_row(const moei_ep_args* a, const moei_ep_shared* s, int i, int d)
{
    const int at = (i >> 5) * a->peers.num_ranks + d;
    const uint32_t goes = s->goes[at], bit = 1u << (i & 31);
    const int row = s->before[at] + __popc(goes & (bit - 1u));
    return (goes & bit) && row < a->recv_tokens ? row : -1;
}

/* Copies one piece of a token's row to all ranks that the token goes to: MOEI_EP_VECTORS vectors a
   lane from byte `from` on. The row is loaded once. The whole warp; `width` is a literal. */
MOE_DEVICE void moei_ep_copy(const moei_ep_args* a, const moei_ep_shared* s, int t, int i,
                             int64_t from, const int width)
{
    const char* x = a->x + t * a->x_pitch;
    uint4 v[MOEI_EP_VECTORS];
    from += moe_lane() * width;
    MOE_UNROLL
    for (int u = 0; u < MOEI_EP_VECTORS; ++u)
        if (from + u * MOE_WARP_SIZE * width < a->row_bytes)
            v[u] = moei_load_vector(x + from + u * MOE_WARP_SIZE * width, width);
    for (int q = 0; q < a->peers.num_ranks; ++q) {
        const int d = moe_peer_rotated(&a->peers, q), row = moei_ep_row(a, s, i, d);
        if (row < 0) continue;
        char* y = moe_peer_address(&a->peers, d, a->at.recv_x) +
                  ((int64_t)a->peers.rank * a->recv_tokens + row) * a->row_bytes;
        MOE_UNROLL
        for (int u = 0; u < MOEI_EP_VECTORS; ++u)
            if (from + u * MOE_WARP_SIZE * width < a->row_bytes)
                moei_store_vector(y + from + u * MOE_WARP_SIZE * width, v[u], width);
    }
}

/* Sends what belongs to the rows of tokens first .. upto - 1 of the round: ids and weights of their
   slots, scales, the tokens' numbers. Neighbouring threads have neighbouring slots, whose rows at a
   rank are neighbours too: a warp's stores fill vectors of 128 bytes, which on the link cost as
   much as one of 4. All threads. */
MOE_DEVICE void moei_ep_send_slots(const moei_ep_args* a, const moei_ep_shared* s, int t0,
                                   int first, int upto)
{
    const int top_k = a->top_k, slots = (upto - first) * top_k;
    for (int q = 0; q < a->peers.num_ranks; ++q) {
        const int d = moe_peer_rotated(&a->peers, q);
        char* base = moe_peer_address(&a->peers, d, 0);
        const int64_t own = (int64_t)a->peers.rank * a->recv_tokens;
        for (int j = (int)threadIdx.x; j < slots; j += (int)blockDim.x) {
            const int i = first + j / top_k, k = j % top_k, row = moei_ep_row(a, s, i, d);
            const int64_t slot = (int64_t)(t0 + i) * top_k + k, to = (own + row) * top_k + k;
            if (row < 0) continue;
            const moe_ep_expert e = moei_ep_target(a, t0 + i, k, a->ids[slot]);
            ((int32_t*)(base + a->at.recv_ids))[to] = e.rank == d ? e.expert : -1;
            ((float*)(base + a->at.recv_weights))[to] = a->weights ? a->weights[slot] : 1.0f;
            if (k == 0) ((int32_t*)(base + a->at.recv_token))[own + row] = t0 + i;
        }
        for (int j = (int)threadIdx.x; j < (upto - first) * a->num_scales; j += (int)blockDim.x) {
            const int i = first + j / a->num_scales, c = j % a->num_scales;
            const int row = moei_ep_row(a, s, i, d);
            if (row >= 0)
                ((float*)(base + a->at.recv_scales))[(own + row) * a->num_scales + c] =
                    a->scales[(int64_t)(t0 + i) * a->num_scales + c];
        }
    }
}

/* Writes the entries of send_place of tokens first .. upto - 1 of the round, and clears those of
   `place`. All threads. */
MOE_DEVICE void moei_ep_note_places(const moei_ep_args* a, const moei_ep_shared* s, int t0,
                                    int first, int upto)
{
    const int num_ranks = a->peers.num_ranks, top_k = a->top_k;
    const moe_place none = {-1, -1};
    if (a->send_place)
        for (int j = (int)threadIdx.x; j < (upto - first) * num_ranks; j += (int)blockDim.x) {
            const int i = first + j / num_ranks, d = j % num_ranks, row = moei_ep_row(a, s, i, d);
            moe_place p;
            p.buffer = row < 0 ? -1 : 0;
            p.row = row < 0 ? -1 : d * a->recv_tokens + row;
            a->send_place[(int64_t)(t0 + first) * num_ranks + j] = p;
        }
    if (a->rows_table)
        for (int j = (int)threadIdx.x; j < (upto - first) * top_k; j += (int)blockDim.x)
            ((moe_place*)(a->peers.base + a->at.place))[(int64_t)(t0 + first) * top_k + j] = none;
}

/* Ends a grid that stored to peers: each block adds its share to barrier n of the channel, which
   was moei_peer_next at the kernel's begin. With `wait` the last block waits until all blocks of
   all ranks have done so. All threads of every block. */
MOE_DEVICE void moei_ep_finish(const moe_peers_args* p, int channel, uint32_t n, int wait,
                               int phase, int tag)
{
    const uint32_t share = MOE_PEERS_UNIT / gridDim.x;
    const int last = blockIdx.x == gridDim.x - 1;
    __syncthreads(); /* all threads have stored */
    if (moe_warp() != 0) return;
    moei_peer_add_share(p, channel, n, last ? MOE_PEERS_UNIT - share * (gridDim.x - 1) : share,
                        last);
    if (last && wait) (void)moe_peer_barrier_wait(p, channel, phase, tag);
}

/* Sets base[d] to the rows of rank d before the calling block's chunk, from the counts. All
   threads; a barrier must follow. */
MOE_DEVICE void moei_ep_sum_chunks(const moei_ep_args* a, const moei_ep_shared* s)
{
    const int num_ranks = a->peers.num_ranks;
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

/* Sending, one block a chunk.
     1. rows of each rank before the chunk, from the counts; without counts, rounds begin at token 0
     Then in each round of MOEI_EP_THREADS tokens:
     2. marks the tokens' ranks
     3. sends what belongs to the rows of the chunk's tokens; after 4. where the tokens are few,
     since
        the rows take longer to arrive
     4. copies the rows: a warp has a piece of a row at a time
     At the end:
     5. the last chunk's block sends the counts; each block adds its share to the barrier */
MOE_DEVICE_BODY void moei_ep_push_chunk(const moei_ep_args* a, unsigned char* shared,
                                        const int width)
{
    const int num_ranks = a->peers.num_ranks, begin = (int)blockIdx.x * a->chunk_tokens;
    const int end = min(begin + a->chunk_tokens, a->num_tokens);
    const int piece = MOE_WARP_SIZE * MOEI_EP_VECTORS * width;
    const int pieces = (int)((a->row_bytes + piece - 1) / piece);
    moei_ep_shared s;
    uint32_t n;
    moei_peer_pdl_trigger(&a->peers, a->wait && blockIdx.x == gridDim.x - 1);
    moei_ep_carve_shared(&s, shared, num_ranks);
    moe_pdl_wait();
    n = moei_peer_next(&a->peers, a->channel);
    if (moe_fault_stopped(a->peers.fault)) {
        moei_ep_finish(&a->peers, a->channel, n, a->wait, MOE_PHASE_DISPATCH, a->tag);
        return;
    }
    if (a->chunk_count) moei_ep_sum_chunks(a, &s); /* 1. */
    else if ((int)threadIdx.x < num_ranks) s.base[threadIdx.x] = 0;
    __syncthreads(); /* base is complete */
    for (int t0 = a->chunk_count ? begin : 0; t0 < end; t0 += MOEI_EP_THREADS) {
        const int first = begin > t0 ? begin - t0 : 0, upto = min(end - t0, MOEI_EP_THREADS);
        moei_ep_round(a, &s, t0, end);                                              /* 2. */
        if (upto - first > MOEI_EP_FEW) moei_ep_send_slots(a, &s, t0, first, upto); /* 3. */
        for (int j = moe_warp(); j < (upto - first) * pieces; j += MOEI_EP_WARPS) { /* 4. */
            const int i = first + j / pieces, part = j % pieces;
            moei_ep_copy(a, &s, t0 + i, i, (int64_t)part * piece, width);
        }
        if (upto - first <= MOEI_EP_FEW) moei_ep_send_slots(a, &s, t0, first, upto); /* or here */
        moei_ep_note_places(a, &s, t0, first, upto);
        __syncthreads(); /* goes and before are read */
    }
    if (blockIdx.x == gridDim.x - 1) /* 5. */
        for (int d = (int)threadIdx.x; d < num_ranks; d += (int)blockDim.x) {
            const int rows = s.base[d];
            ((int32_t*)moe_peer_address(&a->peers, d, a->at.recv_count))[a->peers.rank] =
                min(rows, a->recv_tokens);
            if (rows > a->recv_tokens)
                moe_fault_raise(a->peers.fault, MOE_FAULT_ROWS_FULL, a->peers.rank, rows);
            if (a->rows_table) a->rows_table[d] = moe_peer_address(&a->peers, d, a->at.rows);
        }
    moei_ep_finish(&a->peers, a->channel, n, a->wait, MOE_PHASE_DISPATCH, a->tag);
}

/* Sending, for rows that allow vectors of 16, 4 or 2 bytes. */
#define MOEI_EP_PUSH(width)                                                                        \
    MOE_KERNEL(MOEI_EP_THREADS, 1) moei_ep_push_##width(MOE_ARG(moei_ep_args) a)                   \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moei_ep_push_chunk(&a, shared, width);                                                     \
    }
MOEI_EP_PUSH(16)
MOEI_EP_PUSH(4)
MOEI_EP_PUSH(2)
#undef MOEI_EP_PUSH

/* Waits until the rows of all ranks have come. */
MOE_KERNEL(32, 1) moei_ep_receive(MOE_ARG(moei_ep_args) a)
{
    moei_peer_pdl_trigger(&a.peers, 1);
    moe_pdl_wait();
    (void)moe_peer_barrier_wait(&a.peers, a.channel, MOE_PHASE_DISPATCH, a.tag);
}

/* Tells each token's home where its rows will be: place[t, k] = {this rank, row}. A thread has a
   received slot at a time. */
MOE_KERNEL(256, 1) moei_ep_answer(MOE_ARG(moei_ep_args) a)
{
    const int num_ranks = a.peers.num_ranks, top_k = a.top_k;
    const char* own = a.peers.base;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    for (int q = 0; q < num_ranks; ++q) {
        const int from = moe_peer_rotated(&a.peers, q);
        const int n = ((const int32_t*)(own + a.at.recv_count))[from] * top_k;
        const int64_t first = (int64_t)from * a.recv_tokens;
        moe_place* place = (moe_place*)moe_peer_address(&a.peers, from, a.at.place);
        for (int64_t j = blockIdx.x * blockDim.x + threadIdx.x; j < n;
             j += gridDim.x * blockDim.x) {
            const int i = (int)j;
            moe_place p = a.recv_place[first * top_k + i];
            const int token = ((const int32_t*)(own + a.at.recv_token))[first + i / top_k];
            if (p.buffer < 0) continue; /* another rank's slot */
            p.buffer = a.peers.rank;
            place[(int64_t)token * top_k + i % top_k] = p;
        }
    }
}

#endif
