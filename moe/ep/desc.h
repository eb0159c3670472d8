/* desc.h: buffers, dispatch and combine of expert parallelism: sizes, layout, descriptors. C11 and
   C++14. dispatch.cuh and combine.cuh define what they mean.

   Buffers of one exchange, in every rank's region from region_offset on. C = recv_tokens, b and r
   the bytes of an element of x and of rows; each is rounded up to 256 bytes:

     recv_x        W C H b        token rows, those from rank s from row s C on;
                   max_rows H b   MOE_EP_ALL_TO_ALL: a row for each slot, in expert order
     recv_scales   S 4 for each row of recv_x, where num_scales is S > 0: its scales
     wire          H and 4 ceil(H / 128) for each row of recv_x, MOE_EP_WIRE_FP8: rows as they
                   travel, and their scales
     recv_ids      W C K 4        experts of this rank that the token is for; -1: another rank's slot
     recv_weights  W C K 4        gate weights of its slots
     recv_token    W C 4          the token's number at its home
     recv_count    W 4            tokens that came from each rank
     partial       W C H r        MOE_EP_REDUCED: sums for this rank's tokens, those of rank s
                                  from row s C on; MOE_EP_REDUCE_SCATTER: this rank's sums for the
                                  tokens of all ranks
     place         max_tokens K 8 MOE_EP_ALL_TO_ALL, MOE_EP_GATHERED: where the row of each of this
                                  rank's slots is
     rows          max_rows H r   MOE_EP_GATHERED: the experts' rows, read by peers

   max_tokens is the most tokens of any rank. C is max_tokens: one rank may send all its tokens to
   one other. A smaller C, and fewer max_rows, are allowed: what does not fit stops all ranks with
   ROWS_FULL, and nothing is written out of bounds.

   One set of buffers serves any number of layers and steps of equal sizes (this whole struct),
   where dispatch and combine alternate: their barriers keep the next call from overtaking. Layers
   of other sizes need another set: at the same place its buffers would overlap these. Two
   dispatches before the first one's combine (micro-batches, or a backward pass that still reads
   recv_x) need two sets, at different region_offset and channel. */
#ifndef MOE_EP_DESC_H
#define MOE_EP_DESC_H

#include <stddef.h>

#include "../base/types.h"
#include "../layout.h"
#include "owner.h"

/* How tokens reach the experts. The rows in expert order, and their maps, are the same in all. */
typedef enum moe_ep_dispatch_form {
    MOE_EP_DISPATCH_DEFAULT = 0, /* MOE_EP_DEDUPLICATED */
    MOE_EP_DEDUPLICATED,         /* a token goes once to each rank that has an expert of it */
    MOE_EP_ALL_TO_ALL, /* a row for each slot, written in the owner's expert order: the experts read
                          rows in order */
    MOE_EP_ALL_GATHER, /* every token goes to every rank */
    MOE_EP_ALL_GATHER_COPY /* the same; copy engines move the rows, on a side stream */
} moe_ep_dispatch_form;

/* How results come back. */
typedef enum moe_ep_combine_form {
    MOE_EP_COMBINE_DEFAULT = 0, /* MOE_EP_REDUCED */
    MOE_EP_REDUCED,  /* rank-deduplicated: each rank sums its own experts' rows of a token first and
                       sends one row; rounds these sums to rows_dtype */
    MOE_EP_GATHERED, /* each token reads all its rows from all ranks: the sums of one GPU */
    MOE_EP_REDUCE_SCATTER /* each rank sums as in MOE_EP_REDUCED and keeps the sums; each token
                             reads one from every rank that has an expert of it */
} moe_ep_combine_form;

/* What rows are between ranks. */
typedef enum moe_ep_wire {
    MOE_EP_WIRE_DEFAULT = 0, /* as they are */
    /* e4m3 with a scale for each 128 elements (base/fp8.cuh), decoded into dtype where they arrive.
       Rows that stay on their rank are not rounded: results depend on where experts are */
    MOE_EP_WIRE_FP8 = 32
} moe_ep_wire;

/* Sizes and layout of the buffers of one exchange: the same on all ranks. */
typedef struct moe_ep_buffers {
    uint64_t region_offset; /* in every region, a multiple of 256; 0 = MOE_PEERS_HEADER */
    int32_t channel;        /* channels `channel` and `channel` + 1 are this exchange's */
    int32_t dispatch_form;  /* moe_ep_dispatch_form; 0 = deduplicated */
    int32_t combine_form;   /* moe_ep_combine_form; 0 = reduced */
    int32_t max_tokens;     /* most tokens of any rank, >= 0 */
    int32_t recv_tokens;    /* C, most tokens that one rank sends to one other; 0 = max_tokens */
    int64_t max_rows;       /* most rows in expert order of any rank; 0 = W C K, and
                               min(W C K, E) (m - 1) more with row_multiple m */
    int32_t row_multiple;   /* m, as in route/desc.h; 0 = 1 */
    int32_t hidden;         /* H, multiple of 8, 8 .. 2^28 */
    int32_t num_experts;    /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;          /* K, 1 .. 2048 */
    int32_t dtype;          /* moe_dtype of x and y; 0 = bf16 */
    int32_t rows_dtype;     /* moe_dtype of rows and of what a combine sends; 0 = dtype */
    int32_t wire_dtype;     /* of x on its way: dtype or moe_ep_wire; 0 = dtype */
    int32_t num_scales;     /* S, fp32 scales that travel with each row, 0 .. 4096 */
} moe_ep_buffers;

/* Where this rank's buffers are: device addresses in its region; null: the forms have none. */
typedef struct moe_ep_view {
    void* recv_x;        /* [num_x, H] dtype */
    float* recv_scales;  /* [num_x, S] */
    int32_t* recv_ids;   /* [W C, K] */
    float* recv_weights; /* [W C, K] */
    int32_t* recv_token; /* [W C] */
    int32_t* recv_count; /* [W] */
    void* partial;       /* [W C, H] rows_dtype */
    moe_place* place;    /* [max_tokens, K] */
    void* rows;          /* [max_rows, H] rows_dtype */
    /* in the dispatch's workspace */
    int32_t* expert_count;  /* [P] rows of each of this rank's experts that hold a slot */
    int32_t* expert_offset; /* [P + 1] first row of each expert */
    int32_t* row_slot;      /* [max_rows] slot of each row, of recv_ids; token = slot / K */
    moe_place* recv_place;  /* [W C, K] row of each received slot */
    moe_place* send_place;  /* [T, W] where the sum of each rank is: row of `partial`; or
                               MOE_EP_REDUCE_SCATTER: {rank, row of its sums for this rank} */
    void** rows_table;      /* [W] gathered: address of every rank's rows; MOE_EP_REDUCE_SCATTER: of
                               its sums for this rank */
    int32_t* chunk_count;   /* counts by chunks of tokens, scratch */
    void* route_workspace;  /* scratch */
    int32_t recv_tokens;    /* C */
    int32_t num_local;      /* P, this rank's experts; 0: none */
    int64_t num_rows;       /* max_rows */
    int64_t num_x;          /* rows of recv_x */
    int32_t in_order; /* 1: recv_x is in expert order; 0: row_slot says which token a row is */
} moe_ep_view;

/* What a rank's exchanges have cost since the caller wrote zeros here: one that ends with a combine
   counts, of a backward pass that of dy and dx. Rows that stay on this rank do not count, but for
   expert_rows. A wait for ids begins beside this rank's own sending, one for
   rows or sums behind its own part: what others do in the same time is hidden. */
typedef struct moe_ep_counters {
    uint64_t calls;                 /* combines that ran */
    uint64_t sent_rows, sent_bytes; /* dispatch: rows of x to other ranks; all their bytes */
    uint64_t expert_rows;           /* rows of this rank's experts, padding included: its load */
    uint64_t return_rows, return_bytes; /* combine: rows that other ranks got from this one */
    uint64_t dispatch_wait_ns;          /* for the ids and the rows of all ranks */
    uint64_t combine_wait_ns;           /* for their sums or rows */
} moe_ep_counters;

/* What moe_ep_dispatch takes. Pointers are device addresses, but for peers. */
typedef struct moe_ep_dispatch_desc {
    /* in */
    const moe_peers* peers;
    const void* x;        /* [T, H] dtype, 2-byte aligned; rows of 16-byte vectors are fastest */
    const float* scales;  /* [T, S]; null without scales */
    const int32_t* ids;   /* [T, K] expert 0 .. E - 1 of each slot, -1 = none */
    const float* weights; /* [T, K] gate weights; null: 1 each */
    const int32_t* replica_offset; /* [E + 1] of moe_ep_choose; null: floor(e W / E) */
    const moe_ep_expert* replica;  /* [replica_offset[E]] choice of moe_ep_choose; or null */
    int64_t x_stride;              /* elements between rows of x, >= H; 0 = H */
    uint64_t* fault;               /* [1] fault word, required */
    moe_ep_counters* counters;     /* [1] each combine adds to it, in one more launch; or null */
    float* row_weight; /* [view.num_rows] out: gate weight of each row, 0 = no slot; or null */
    /* sizes */
    int32_t num_tokens; /* T of this rank, 0 .. max_tokens */
    int32_t num_local;  /* P, this rank's experts; without replicas 0 = those that it owns; with
                             replicas required, 0 = none. Slots of an expert past P are dropped: the
                             receiving rank's fault word has BAD_ID or BAD_REPLICA */
    int32_t tag;        /* reported where a rank is late, 0 .. 2^24 - 1 */
    int32_t max_blocks; /* most thread blocks that send rows, 1 .. 128: few leave multiprocessors to
                           kernels beside them; 0 = as many as are useful */
    moe_ep_buffers buffers;
    /* MOE_EP_ALL_GATHER_COPY: of the caller's, on this rank's device */
    void* side_stream;   /* cudaStream_t, on which the copies run; not the dispatch's */
    void* side_event[2]; /* cudaEvent_t: records when the copies may begin, and that they ended */
    /* workspace */
    void* workspace;        /* 256-byte aligned; kept until the combine has run */
    size_t workspace_bytes; /* at least what moe_ep_dispatch_workspace returns */
} moe_ep_dispatch_desc;

/* Parts of a dispatch, in order. Where ranks share a GPU, MOE_EP_SEND also waits for the ids of all
   ranks. */
typedef enum moe_ep_part {
    MOE_EP_SEND,    /* ids, weights and rows to their ranks; MOE_EP_ALL_TO_ALL: no rows */
    MOE_EP_ROUTE,   /* waits for the ids of all ranks; received slots -> rows in expert order */
    MOE_EP_RECEIVE, /* waits for the rows of all ranks; MOE_EP_ALL_TO_ALL: tells the homes where
                       the rows must be, sends rows there, and waits for those of all ranks */
    MOE_EP_ANSWER,  /* gathered: tells the homes where the rows will be, where they do not know */
    MOE_EP_PARTS
} moe_ep_part;

/* What moe_ep_combine takes. */
typedef struct moe_ep_combine_desc {
    const moe_ep_dispatch_desc* dispatch; /* of this exchange, on the host */
    const void* rows;     /* [max_rows, H] rows_dtype, the experts' rows; gathered: null, they are
                         in the region (moe_ep_view.rows) */
    const float* weights; /* [T, K] the dispatch's own; null: 1 each, for a backward pass */
    const void* residual; /* [T, H] dtype, added first; or null */
    const void* shared;   /* [T, H] rows_dtype, added last; or null */
    const float* shared_weight;             /* [T] factor on shared; or null */
    int64_t residual_stride, shared_stride; /* elements between rows; 0 = H */
    void* y;                                /* [T, H] dtype */
    int64_t y_stride;                       /* elements between rows; 0 = H */
    int32_t tag;                            /* as in the dispatch */
    int32_t max_blocks; /* most thread blocks that reduce, likewise; 0 = as many as are useful */
} moe_ep_combine_desc;

#endif
