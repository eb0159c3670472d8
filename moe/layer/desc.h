/* desc.h: the layer's descriptor, its parts and the view of its workspace. C11 and C++14. layer.cuh
   defines what they mean. */
#ifndef MOE_LAYER_DESC_H
#define MOE_LAYER_DESC_H

#include "../gate/desc.h"
#include "../route/desc.h"

/* A shared expert: an MLP that every token passes, whatever the gate chose. Several shared experts
   are one of their joint width Is. w1 then has the gates of all and after them the ups of all as
   rows (interleaved: expert after expert); w2 concatenates theirs along Is. */
typedef struct moe_layer_shared {
    moe_weights w1;       /* [2 Is, H] per gate_up, not gated [Is, H], dtype */
    moe_weights w2;       /* [H, Is] dtype */
    const void* bias1;    /* [2 Is] or [Is] dtype; or null */
    const void* bias2;    /* [H] dtype; or null */
    const float* weight;  /* [T] factor on the expert's output for each token; null = 1 each */
    int32_t intermediate; /* Is, multiple of 8; 0 = no shared expert: all other fields are 0 */
    int32_t activation;   /* moe_activation; 0 = SwiGLU; as in experts.cuh, like the next */
    int32_t gate_up;      /* moe_gate_up; 0 = concatenated */
    float alpha, limit;   /* of the clamped SwiGLU, as in experts.cuh; else 0 */
} moe_layer_shared;

typedef struct moe_layer_desc {
    /* in */
    const void* x;           /* [T, H] dtype, 16-byte aligned */
    const void* router;      /* [E, H] router_dtype; null with logits or ids */
    const float* logits;     /* [T, E] in place of the router; or null */
    const int32_t* ids;      /* [T, K] in place of router and gate, -1 = unused; or null */
    const float* weights;    /* [T, K] with ids; else null */
    moe_weights w1;          /* [P, 2I, H] per gate_up, not gated [P, I, H], dtype */
    moe_weights w2;          /* [P, H, I] dtype */
    const void* bias1;       /* [P, 2I] or [P, I] dtype; or null */
    const void* bias2;       /* [P, H] dtype; or null */
    const void* residual;    /* [T, H] dtype added to y; or null */
    int64_t x_stride;        /* elements between rows; 0 = H; multiple of 8 */
    int64_t residual_stride; /* elements between rows; 0 = H */
    /* out */
    void* y;          /* [T, H] dtype */
    int64_t y_stride; /* elements between rows; 0 = H */
    uint64_t* fault;  /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;   /* T >= 0; T K < 2^31 */
    int32_t hidden;       /* H, multiple of 8 */
    int32_t intermediate; /* I, multiple of 8 */
    int32_t num_experts;  /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;        /* K, 1 .. MOE_COMBINE_MAX_TOP_K; at most E unless ids are given */
    int32_t dtype;        /* fp16 or bf16; 0 = bf16 */
    int32_t rows_dtype;   /* of the rows that combine adds: dtype or fp32; 0 = dtype. With fp16 a
                             row past 65504 is infinite, however small its weight */
    int32_t router_dtype; /* moe_dtype; 0 = dtype */
    int32_t activation;   /* moe_activation; 0 = SwiGLU; as in experts.cuh, like the next */
    int32_t gate_up;      /* moe_gate_up; 0 = concatenated */
    float alpha, limit;   /* of the clamped SwiGLU, as in experts.cuh; else 0 */
    int32_t tile;         /* moe_tile of all products of experts; 0 = chosen by shape and device */
    int32_t rank;         /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* 1: kernels are chosen without regard to T, as for many tokens: a token's bits do not depend on
       other tokens, but for dropped slots and whole_batch. Slower for few. 0: chosen by T too */
    int32_t batch_invariant;
    /* options of the stations, as in their own headers; what the layer fills in (buffers between
       the stations, sizes, fault word, rank, workspace) is 0 here */
    moe_gate_desc gate;      /* rules and their buffers, sums of usage; all 0 with ids */
    moe_route_desc route;    /* replicas, padding, capacity; drop_count, slot_row, row_weight */
    moe_layer_shared shared; /* all 0 = no shared expert */
    /* training: what a backward pass (layer_backward.cuh) needs is kept */
    void* saved;        /* 256-byte aligned, written by forward, read by its backward; null: forward
                           alone, nothing is kept */
    size_t saved_bytes; /* at least what moe_layer_saved returns */
    int32_t recompute; /* 1: backward computes the pre-activations again, saved has none; 0: kept */
    /* workspace */
    void* workspace;        /* 256-byte aligned, for one call at a time */
    size_t workspace_bytes; /* at least what moe_layer_workspace returns */
} moe_layer_desc;

/* What stays from forward to backward. */
typedef struct moe_layer_saved_item {
    const char* name;      /* static storage */
    int64_t rows, columns; /* shape */
    int32_t element;       /* bytes of an element */
    int32_t caller;        /* 1: memory of the caller's, not in `saved`; unchanged until backward */
    uint64_t bytes;        /* in `saved` a multiple of 256, of the caller's as its shape says */
} moe_layer_saved_item;

#define MOE_LAYER_SAVED_MOST 12

typedef struct moe_layer_saved_list {
    size_t bytes;  /* of `saved`: the sum over the items in `saved` */
    int32_t count; /* of items */
    moe_layer_saved_item item[MOE_LAYER_SAVED_MOST];
} moe_layer_saved_list;

/* Addresses of the buffers of the workspace and of `saved`. What the caller gave points to the
   caller's own buffer; what this layer does not use is null. */
typedef struct moe_layer_view {
    float* logits;           /* [T, E]; null where ids were given */
    int32_t* ids;            /* [T, K] */
    float* weights;          /* [T, K] */
    int32_t* chunk_count;    /* [moe_num_chunks(T), E]; null with ids or replicas */
    void* gate_workspace;    /* moe_gate_workspace bytes; or null */
    void* route_workspace;   /* moe_route_workspace bytes; or null */
    int32_t* expert_count;   /* [P] */
    int32_t* expert_offset;  /* [P + 1] */
    int32_t* row_slot;       /* [R] */
    moe_place* place;        /* [T, K] */
    void* experts_workspace; /* of the experts, then of the shared expert */
    void* act;               /* [R, I] dtype */
    void* rows;              /* [R, H] rows_dtype */
    int32_t* slot_row;       /* [T, K] row of each slot; with `saved` alone, like the next three */
    float* row_weight;       /* [R] weight of each row */
    void* pre;            /* [R, 2I], not gated [R, I] dtype: pre-activations; null: recomputed */
    void* shared_pre;     /* [T, 2 Is], not gated [T, Is] dtype; null without a shared expert */
    void* shared_act;     /* [T, Is] dtype; null without a shared expert */
    void* shared_rows;    /* [T, H] rows_dtype; null without a shared expert */
    int64_t num_rows;     /* R, the most rows; T * K without options of route */
    int32_t num_physical; /* P, experts that have weights; E without replicas */
} moe_layer_view;

/* Parts of a layer, in the order of moe_layer_run. */
typedef enum moe_layer_part {
    MOE_LAYER_ROUTER,
    MOE_LAYER_GATE,
    MOE_LAYER_ROUTE,
    MOE_LAYER_UP,
    MOE_LAYER_DOWN,
    MOE_LAYER_SHARED_UP,
    MOE_LAYER_SHARED_DOWN,
    MOE_LAYER_COMBINE,
    MOE_LAYER_PARTS
} moe_layer_part;

/* Returns the name of a part, "?" for a value that is none: static storage. */
MOE_HOST const char* moe_layer_part_name(int part)
{
    static const char* const name[] = {"router", "gate",      "route",       "up",
                                       "down",   "shared_up", "shared_down", "combine"};
    return part >= 0 && part < MOE_LAYER_PARTS ? name[part] : "?";
}

#endif
