/* pack.cuh: messages of an exchange: what is in them, and the kernels that pack and unpack. Called
   by message.cuh, which says when. push.cuh fills in the records: to it a message is a rank's
   region. */
#ifndef MOE_EP_PACK_CUH
#define MOE_EP_PACK_CUH

#include "push.cuh"

/* The first 16 bytes of a message. */
typedef struct moe_ep_message_header {
    int32_t tokens, slots; /* of the sender's, for the receiver */
    uint64_t fault;        /* the sender's fault word */
} moe_ep_message_header;

/* What the host reads between the two halves of a dispatch; pinned memory is faster. */
typedef struct moe_ep_message_counts {
    moe_ep_message_header sent[MOE_PEERS_MAX_RANKS];     /* [W] to each rank */
    moe_ep_message_header received[MOE_PEERS_MAX_RANKS]; /* [W] from each rank */
} moe_ep_message_counts;

/* What goes to one rank and comes from it. */
typedef struct moe_ep_segment {
    const void* send;
    void* recv;
    size_t send_bytes, recv_bytes; /* may be 0 */
} moe_ep_segment;

typedef enum moe_ep_segment_kind {
    MOE_EP_SEGMENT_HEADERS,
    MOE_EP_SEGMENT_RECORDS,
    MOE_EP_SEGMENT_ROWS
} moe_ep_segment_kind;

typedef enum moe_ep_message_part {
    MOE_EP_MESSAGE_PACK,
    MOE_EP_MESSAGE_UNPACK,
    MOE_EP_MESSAGE_PACK_ROWS,
    MOE_EP_MESSAGE_SUM,
    MOE_EP_MESSAGE_TAKE /* takes over a stop fault that a header has brought */
} moe_ep_message_part;

/* Addresses in the workspace; null: the form has none. C' = C + 1: a message has room for its
   header and C records. */
typedef struct moe_ep_message_view {
    const void* x;         /* received rows: token j of sender s is row s C' + j */
    int64_t x_stride;      /* elements between rows */
    int32_t num_x;         /* W C', num_tokens of the experts */
    int32_t num_local;     /* P */
    int64_t num_rows;      /* max_rows */
    int32_t* recv_ids;     /* [W C', K] expert of this rank, -1: another rank's slot, or no token */
    float* recv_weights;   /* [W C', K] */
    float* recv_scales;    /* [W C', S] */
    int32_t* recv_token;   /* [W C'] */
    int32_t* recv_count;   /* [W] */
    int32_t* expert_count; /* [P], like the next three: as in moe_ep_view */
    int32_t* expert_offset;
    int32_t* row_slot;
    moe_place* recv_place;
    void* partial; /* [W C', H] rows_dtype, reduced: sums for received tokens, as x is numbered */
    /* messages and scratch */
    char *send, *recv; /* [W][C'] records */
    char* back_send;   /* gathered: rows of other ranks' slots */
    char* back_recv;   /* gathered: rows of this rank's slots; reduced: [W C] sums of all ranks */
    moe_place* place;  /* [T, K] gathered: row of back_recv of each of this rank's slots */
    moe_place* send_place; /* [T, W] reduced: row of back_recv of each rank's sum */
    int32_t *rank_ids, *slot_count, *slot_offset;             /* [T, K] owner of each slot; [W] */
    int32_t *from_ids, *back_count, *back_offset, *back_slot; /* [W C', K] sender; [W] */
    moe_ep_message_counts* counts;                            /* [1] headers, for the host */
    int32_t* chunk_count;
    void* route_workspace;
} moe_ep_message_view;

/* The argument of these kernels. */
typedef struct moei_ep_message_args {
    moei_ep_args pack; /* of the sending kernels, over messages in this rank's memory */
    moe_ep_message_view v;
    moei_ep_layout at;                               /* of a received message */
    const char* rows;                                /* of the experts */
    int64_t message_bytes, record_bytes, back_bytes; /* back: of a row */
    int32_t rank, num_ranks, records;                /* C' */
} moei_ep_message_args;

#define MOEI_EP_MESSAGE_THREADS 256

/* Writes the owner of each of this rank's slots. A thread has a slot at a time. */
MOE_KERNEL(MOEI_EP_MESSAGE_THREADS, 1) moei_ep_message_owners(MOE_ARG(moei_ep_message_args) a)
{
    const int slots = a.pack.num_tokens * a.pack.top_k;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.pack.peers.fault)) return;
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < slots;
         i += gridDim.x * blockDim.x) {
        const int t = (int)i / a.pack.top_k, k = (int)i % a.pack.top_k;
        a.v.rank_ids[i] = moei_ep_target(&a.pack, t, k, a.pack.ids[i]).rank;
    }
}

/* Completes the headers: slots and the fault word; no tokens after a stop fault. One block, a rank
   a thread. */
MOE_KERNEL(MOE_PEERS_MAX_RANKS, 1) moei_ep_message_heads(MOE_ARG(moei_ep_message_args) a)
{
    const int d = (int)threadIdx.x;
    bool stops;
    moe_pdl_trigger();
    moe_pdl_wait();
    stops = moe_fault_stopped(a.pack.peers.fault);
    if (d >= a.num_ranks) return;
    moe_ep_message_header* h = (moe_ep_message_header*)(a.v.send + d * a.message_bytes);
    h->slots = stops || !a.v.slot_count ? 0 : a.v.slot_count[d];
    if (stops) h->tokens = 0;
    h->fault = *(const volatile uint64_t*)a.pack.peers.fault;
}

/* Collects the headers for the host. One block, a rank a thread. */
MOE_KERNEL(MOE_PEERS_MAX_RANKS, 1) moei_ep_message_collect(MOE_ARG(moei_ep_message_args) a)
{
    const int r = (int)threadIdx.x;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (r >= a.num_ranks) return;
    a.v.counts->sent[r] = *(const moe_ep_message_header*)(a.v.send + r * a.message_bytes);
    a.v.counts->received[r] = *(const moe_ep_message_header*)(a.v.recv + r * a.message_bytes);
}

/* Takes ids, weights, scales and numbers out of the received messages, and notes the sender of each
   slot. An expert past P counts as -1 and sets BAD_ID. Slots past the last token get the id -1. A
   warp has a token at a time. */
MOE_KERNEL(MOEI_EP_MESSAGE_THREADS, 1) moei_ep_message_unpack(MOE_ARG(moei_ep_message_args) a)
{
    const int top_k = a.pack.top_k, num_scales = a.pack.num_scales;
    const int warps = (int)(gridDim.x * blockDim.x) / MOE_WARP_SIZE;
    const int first = (int)(blockIdx.x * blockDim.x) / MOE_WARP_SIZE + moe_warp();
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.pack.peers.fault)) return;
    for (int s = first; s < a.num_ranks && moe_lane() == 0; s += warps)
        a.v.recv_count[s] =
            min(((const moe_ep_message_header*)(a.v.recv + s * a.message_bytes))->tokens,
                a.records - 1);
    for (int i = first; i < a.num_ranks * a.records; i += warps) {
        const int s = i / a.records, j = i % a.records;
        const char* message = a.v.recv + s * a.message_bytes;
        const int32_t* ids = (const int32_t*)(message + a.at.recv_ids + j * a.at.ids_step);
        const float* weights = (const float*)(message + a.at.recv_weights + j * a.at.weights_step);
        const float* scales = (const float*)(message + a.at.recv_scales + j * a.at.scales_step);
        const int came = j < ((const moe_ep_message_header*)message)->tokens && j < a.records - 1;
        for (int k = moe_lane(); k < top_k; k += MOE_WARP_SIZE) {
            const int64_t slot = (int64_t)i * top_k + k;
            int id = came ? ids[k] : -1;
            if (a.v.from_ids) /* a row goes back, whatever the expert */
                a.v.from_ids[slot] = id < 0 ? -1 : s;
            if (id >= a.v.num_local) {
                moe_fault_raise(a.pack.peers.fault, MOE_FAULT_BAD_ID, a.rank, slot);
                id = -1;
            }
            a.v.recv_ids[slot] = id;
            a.v.recv_weights[slot] = came ? weights[k] : 0.0f;
        }
        if (!came) continue;
        for (int c = moe_lane(); c < num_scales; c += MOE_WARP_SIZE)
            a.v.recv_scales[(int64_t)i * num_scales + c] = scales[c];
        if (moe_lane() == 0)
            a.v.recv_token[i] = *(const int32_t*)(message + a.at.recv_token + j * a.at.token_step);
    }
}

/* Renews the fault words of the headers; gathered: packs the experts' rows in the order of the
   senders' slots, zeros for a slot without a row. A block has a row at a time. */
MOE_KERNEL(MOEI_EP_MESSAGE_THREADS, 1) moei_ep_message_pack_rows(MOE_ARG(moei_ep_message_args) a)
{
    const int d = (int)threadIdx.x;
    bool stops;
    moe_pdl_trigger();
    moe_pdl_wait();
    stops = moe_fault_stopped(a.pack.peers.fault);
    if (blockIdx.x == 0 && d < a.num_ranks)
        ((moe_ep_message_header*)(a.v.send + d * a.message_bytes))->fault =
            *(const volatile uint64_t*)a.pack.peers.fault;
    if (stops || !a.v.back_send) return;
    for (int b = (int)blockIdx.x; b < a.v.back_offset[a.num_ranks]; b += (int)gridDim.x) {
        const int row = a.v.recv_place[a.v.back_slot[b]].row;
        char* to = a.v.back_send + b * a.back_bytes;
        if (row >= 0)
            moe_copy_row(to, a.rows + row * a.back_bytes, a.back_bytes, d, (int)blockDim.x);
        else
            for (int64_t i = d; i < a.back_bytes / 16; i += blockDim.x)
                ((uint4*)to)[i] = make_uint4(0, 0, 0, 0);
    }
}

/* Takes over a stop fault of any rank. One warp. */
MOE_KERNEL(32, 1) moei_ep_message_take(MOE_ARG(moei_ep_message_args) a)
{
    moe_pdl_trigger();
    moe_pdl_wait();
    for (int s = moe_lane(); s < a.num_ranks; s += MOE_WARP_SIZE) {
        const uint64_t word =
            ((const moe_ep_message_header*)(a.v.recv + s * a.message_bytes))->fault;
        if (MOEI_FAULT_STOPS(word))
            atomicMax((unsigned long long*)a.pack.peers.fault, (unsigned long long)word);
    }
}

#endif
