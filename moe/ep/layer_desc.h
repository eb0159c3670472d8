/* layer_desc.h: the descriptor and the parts of the layer over ranks. C11 and C++14. layer.cuh and
   layer_backward.cuh define what they mean. */
#ifndef MOE_EP_LAYER_DESC_H
#define MOE_EP_LAYER_DESC_H

#include "../layer/backward_desc.h"
#include "desc.h"
#include "peers.h"

/* What moe_ep_layer_forward takes. */
typedef struct moe_ep_layer_desc {
    moe_layer_desc layer;          /* of this rank's tokens; w1, w2, biases: of its P experts */
    const moe_peers* peers;        /* this rank's group */
    const int32_t* replica_offset; /* as in moe_ep_dispatch_desc, like the next two */
    const moe_ep_expert* replica;
    int32_t num_local;
    int32_t tag; /* reported where a rank is late, 0 .. 2^24 - 1 */
    /* 0: all tokens are exchanged at once. Else router and gate see all of them, then so many
       tokens at a time are dispatched, computed and combined: region and workspace have room for
       these alone. The same on all ranks */
    int32_t microbatch_tokens;
    void *side_stream, *side_event[2]; /* as in moe_ep_dispatch_desc, like the next */
    moe_ep_counters* counters;
    /* training, with layer.saved; read by layer_backward.cuh too */
    int32_t redispatch_x; /* 1: backward dispatches x again; 0: it reads recv_x, which stays in the
                             region until then: these buffers are no other layer's */
    int32_t count_rows;   /* 1: moe_ep_layer_count comes between two halves of the forward, and what
                             follows has room for num_rows rows; 0: for buffers.max_rows */
    int64_t num_rows;     /* with count_rows: what moe_ep_layer_count returned; 0 before */
    /* [num_rows, 2I], not gated [num_rows, I] dtype, 16-byte aligned: with count_rows the
       pre-activations, which are not in `saved` then; null with recompute */
    void* pre;
    /* the same on all ranks. What `layer` has is 0 here: hidden, num_experts, top_k, dtype,
       rows_dtype, row_multiple; and num_scales */
    moe_ep_buffers buffers;
} moe_ep_layer_desc;

/* Parts of a layer over ranks, in the order of moe_ep_layer_run. */
typedef enum moe_ep_layer_part {
    MOE_EP_LAYER_ROUTER,
    MOE_EP_LAYER_GATE,
    MOE_EP_LAYER_SEND,
    MOE_EP_LAYER_SHARED_UP,
    MOE_EP_LAYER_SHARED_DOWN,
    MOE_EP_LAYER_ROUTE,
    MOE_EP_LAYER_RECEIVE,
    MOE_EP_LAYER_ANSWER,
    MOE_EP_LAYER_UP,
    MOE_EP_LAYER_DOWN,
    MOE_EP_LAYER_COMBINE,
    MOE_EP_LAYER_PARTS
} moe_ep_layer_part;

/* Returns the name of a part, "?" for a value that is none: static storage. */
MOE_HOST const char* moe_ep_layer_part_name(int part)
{
    static const char* const name[] = {"router",      "gate",  "send",    "shared_up",
                                       "shared_down", "route", "receive", "answer",
                                       "up",          "down",  "combine"};
    return part >= 0 && part < MOE_EP_LAYER_PARTS ? name[part] : "?";
}

/* What moe_ep_layer_backward takes. Options are the same on all ranks, and so is which of dx and
   drouter is null. */
typedef struct moe_ep_layer_backward_desc {
    moe_ep_layer_desc forward; /* as the forward was called, with layer.saved. layer.y and residual
                                  are not used; layer.workspace may be another */
    /* dy, gradients and options of this rank; grads.layer is all 0 */
    moe_layer_backward_desc grads;
    uint64_t gradient_offset; /* in every region, a multiple of 256: where the buffers of gradients
                                 begin; 0 = behind those of forward.buffers. One place serves all
                                 layers of equal sizes */
    int32_t gradient_channel; /* channels from this one, three, are the gradients'; 0 = those behind
                                 forward.buffers.channel + 1 */
    int32_t gradient_wire;    /* rows of dy between ranks: moe_ep_wire; 0 = as they are. Those of x
                                 sent again: forward.buffers.wire_dtype */
    /* 1: dx is combined on the side stream while dw2 and dw1 are computed, and x is sent again there
       by few thread blocks. Copies of dy and of x take [R, H] 2 more of workspace where they are made.
       Requires forward.side_stream and both events; 0: one stage after the other */
    int32_t overlap;
    /* most thread blocks of what runs beside products, 1 .. 128; 0: 24 for x, any number for the
       combine */
    int32_t overlap_blocks;
    int32_t local_router; /* 1: drouter is of this rank's tokens alone; 0: summed over all */
} moe_ep_layer_backward_desc;

/* Stages of the backward pass, in the order of moe_ep_layer_backward_run. */
typedef enum moe_ep_layer_backward_stage {
    MOE_EP_BACKWARD_SEND_DY,   /* rows of dy to the ranks of their experts */
    MOE_EP_BACKWARD_SHARED,    /* shared expert: all that needs dy alone */
    MOE_EP_BACKWARD_RECEIVE,   /* waits for the rows of dy of all ranks */
    MOE_EP_BACKWARD_SEND_X,    /* with redispatch_x: x, on the side stream where there is one */
    MOE_EP_BACKWARD_RECOMPUTE, /* pre-activations, with recompute; waits for x first */
    MOE_EP_BACKWARD_GATHER_DY, /* as in moe_layer_backward_stage, like PRE, DW2, DBIAS2 */
    MOE_EP_BACKWARD_PRE,
    MOE_EP_BACKWARD_SEND_DWEIGHTS, /* gradients of gate weights to the homes of the tokens */
    MOE_EP_BACKWARD_DW2,
    MOE_EP_BACKWARD_DBIAS2,
    MOE_EP_BACKWARD_RECEIVE_DWEIGHTS, /* waits for those of all ranks */
    MOE_EP_BACKWARD_GATE,             /* dlogits */
    MOE_EP_BACKWARD_ROUTER,           /* this rank's part of drouter, the router's part of dx */
    MOE_EP_BACKWARD_SHARED_DX,        /* shared expert: the rest */
    MOE_EP_BACKWARD_RECEIVE_X,        /* with redispatch_x: waits for x */
    MOE_EP_BACKWARD_GATHER_X,         /* as in moe_layer_backward_stage, like DW1, DBIAS1, ROWS */
    MOE_EP_BACKWARD_DW1,
    MOE_EP_BACKWARD_DBIAS1,
    MOE_EP_BACKWARD_ROWS,
    MOE_EP_BACKWARD_COMBINE, /* dx */
    MOE_EP_BACKWARD_DROUTER, /* the sum over ranks */
    MOE_EP_BACKWARD_STAGES
} moe_ep_layer_backward_stage;

/* Returns the name of a stage, "?" for a value that is none: static storage. */
MOE_HOST const char* moe_ep_layer_backward_stage_name(int stage)
{
    static const char* const name[] = {
        "send_dy",   "shared",   "receive", "send_x",     "recompute", "gather_dy", "pre",
        "send_dw",   "dw2",      "dbias2",  "receive_dw", "gate",      "router",    "shared_dx",
        "receive_x", "gather_x", "dw1",     "dbias1",     "rows",      "combine",   "drouter"};
    return stage >= 0 && stage < MOE_EP_BACKWARD_STAGES ? name[stage] : "?";
}

#endif
