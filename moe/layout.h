/* layout.h: the shapes that all stations share. C11 and C++14; no CUDA.

   A token passes  logits -> gate -> route -> experts -> combine.

     T tokens, H hidden width, I intermediate width of one expert, E experts, K experts per token,
     R rows

     slot    t * K + k: one choice of one token. Arrays [T, K] are indexed by slot.
     row     a position in expert order, 0 .. R-1. Expert e owns the rows from
             expert_offset[e] up to expert_offset[e + 1]. Within an expert rows are in
             ascending slot order, so every later result is the same every run.
     maps    slot_row[slot] is the slot's row, row_slot[row] the row's slot;
             -1 where a slot was dropped (id -1 or out of range, or its expert is full) or a
             row is unused.
     place   where a slot's row is stored: {buffer, row in that buffer}; table[buffer] is the
             buffer's address. The writer of the rows chooses the buffers: one joined array
             (buffer 0), one allocation per expert, or the memory of a peer. No station
             copies rows into one buffer for the reader. */
#ifndef MOE_LAYOUT_H
#define MOE_LAYOUT_H

#include <stdint.h>

#include "base/config.h"
#include "base/types.h"

#define MOE_MAX_EXPERTS 4096 /* largest E: fits the shared memory of all devices */

/* Where the row of a slot is stored; buffer = row = -1: the slot was dropped. 8 bytes. */
typedef struct moe_place {
    int32_t buffer; /* index into the pointer table; -1: none */
    int32_t row;    /* row in that buffer; -1: none */
} moe_place;

/* How route fills in the places. */
typedef enum moe_place_kind {
    MOE_PLACE_DEFAULT = 0, /* MOE_PLACE_JOINED */
    MOE_PLACE_JOINED,      /* {0, row}: all rows in one array, in expert order */
    MOE_PLACE_BY_EXPERT    /* {expert, row - expert_offset[expert]}: one buffer per expert */
} moe_place_kind;

/* Which axis of a matrix is contiguous in memory. k is the axis that a product reduces. */
typedef enum moe_major {
    MOE_MAJOR_DEFAULT = 0, /* MOE_MAJOR_K */
    MOE_MAJOR_K,           /* k-major: rows of k elements; weights [E, n, k], as of nn.Linear */
    MOE_MAJOR_MN           /* mn-major: rows of m (or n) elements; weights [E, k, n] */
} moe_major;

/* The activation between the two products of an MLP. A gated one makes one column of the
   activations from two of the first product: act(gate) * up. The others map one column v. Phi is
   the normal distribution function, sigma the logistic function. */
typedef enum moe_activation {
    MOE_ACTIVATION_DEFAULT = 0,    /* each field's comment names its default */
    MOE_ACTIVATION_NONE,           /* v */
    MOE_ACTIVATION_SWIGLU,         /* gate sigma(gate) up */
    MOE_ACTIVATION_GEGLU,          /* gate Phi(gate) up */
    MOE_ACTIVATION_GEGLU_TANH,     /* gate Phi(gate) up, with the tanh form of Phi */
    MOE_ACTIVATION_SWIGLU_CLAMPED, /* g sigma(alpha g) (u + 1); g = min(gate, limit), u = up clamped
                                      to -limit .. limit */
    MOE_ACTIVATION_SILU,           /* v sigma(v); this and the following are not gated */
    MOE_ACTIVATION_GELU,           /* v Phi(v) */
    MOE_ACTIVATION_GELU_TANH,      /* v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))) / 2 */
    MOE_ACTIVATION_RELU2           /* max(v, 0)^2 */
} moe_activation;

/* Returns 1 for an activation that takes a gate and an up, else 0. */
MOE_HOST_DEVICE int moe_activation_is_gated(int activation)
{
    return activation >= MOE_ACTIVATION_SWIGLU && activation <= MOE_ACTIVATION_SWIGLU_CLAMPED;
}

/* Position of the up projection of a gated activation, relative to its gate. */
typedef enum moe_gate_up {
    MOE_GATE_UP_DEFAULT = 0,  /* MOE_GATE_UP_CONCATENATED */
    MOE_GATE_UP_CONCATENATED, /* w1 [2I, H]: gate rows 0 .. I-1, up rows I .. 2I-1 */
    MOE_GATE_UP_INTERLEAVED,  /* w1 [2I, H]: gate rows 0, 2, 4 ..., up rows 1, 3, 5 ... */
    MOE_GATE_UP_SEPARATE      /* w1 [I, H] is the gate; `up` or `up_table` the up projection */
} moe_gate_up;

/* The weights of all experts, used in place. Expert e's matrix begins at
     table ? table[e] : (char*)base + e * expert_stride elements
   and its rows are row_stride elements apart. The table itself is in device memory. Every matrix
   begins at a multiple of 16 bytes. Table entries of experts without rows are not read. Where
   gate and up are separate matrices, `up` or `up_table` holds the up, with the same layout and
   strides. */
typedef struct moe_weights {
    const void* base;            /* one array, expert after expert; or null with a table */
    const void* const* table;    /* [E] device array of device addresses; or null */
    const void* up;              /* the same for separate up projections; or null */
    const void* const* up_table; /* [E] device array, the same for the ups; or null */
    int64_t expert_stride;       /* elements between experts in base and up; 0 = dense */
    int64_t row_stride;          /* elements between rows; 0 = dense */
    int32_t major;               /* moe_major; 0 = k-major, rows of k elements */
} moe_weights;

/* Gradients of the weights of all experts: matrices of the same shapes and major as a moe_weights,
   with the fields' meaning there. */
typedef struct moe_weight_grads {
    void* base;            /* one array, expert after expert; or null */
    void* const* table;    /* [E] device array of device addresses; or null */
    void* up;              /* the same for separate up projections; or null */
    void* const* up_table; /* [E] device array, the same for the ups; or null */
    int64_t expert_stride; /* elements between experts in base and up; 0 = dense */
    int64_t row_stride;    /* elements between rows; 0 = dense */
} moe_weight_grads;

/* Gate and route cut the tokens into at most MOE_MAX_CHUNKS chunks of moe_chunk_tokens(T) tokens;
   the last may be shorter. chunk_count [num_chunks, E] holds how often each chunk chose each
   expert. */
#define MOE_MAX_CHUNKS 128

/* Returns the tokens of one chunk: a multiple of 16, at least 16. */
MOE_HOST_DEVICE int64_t moe_chunk_tokens(int64_t num_tokens)
{
    const int64_t each = (num_tokens + MOE_MAX_CHUNKS - 1) / MOE_MAX_CHUNKS;
    return each > 16 ? (each + 15) / 16 * 16 : 16;
}

/* Returns the number of chunks, 0 .. MOE_MAX_CHUNKS. */
MOE_HOST_DEVICE int64_t moe_num_chunks(int64_t num_tokens)
{
    const int64_t each = moe_chunk_tokens(num_tokens);
    return (num_tokens + each - 1) / each;
}

#endif
