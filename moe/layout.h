/* layout.h: the shapes that the stations share. C11 and C++14; no CUDA.

   A token travels  logits -> gate -> route -> experts -> combine.

     T tokens, H hidden, I intermediate (width of one expert), E experts, K experts per token

     slot    t * K + k: one choice of one token. Arrays [T, K] are indexed by it.
     row     a position in expert order, 0 .. R. Expert e owns the rows
             expert_offset[e] .. expert_offset[e + 1]; within an expert, rows keep
             ascending slot order, so everything downstream is the same every run.
     maps    slot_row[slot] is the slot's row, row_slot[row] the row's slot;
             -1 where a slot was dropped (id -1 or out of range) or a row is unused.
     place   where a slot's row lives: {buffer, row in that buffer}.
             table[buffer] is the buffer's address. A buffer is whatever was convenient to
             the writer: one joined array (buffer 0), one allocation per expert, or the
             memory of a peer. Nobody copies rows together to please the reader. */
#ifndef MOE_LAYOUT_H
#define MOE_LAYOUT_H

#include <stdint.h>

#include "base/config.h"
#include "base/types.h"

#define MOE_MAX_EXPERTS 4096 /* E of gate, route, experts: fits the shared memory of all chips */

/* Where the row of a slot lives; buffer = row = -1: the slot was dropped. 8 bytes. */
typedef struct moe_place {
    int32_t buffer; /* index into the pointer table */
    int32_t row;    /* row within that buffer */
} moe_place;

/* How route fills the places. */
typedef enum moe_place_kind {
    MOE_PLACE_DEFAULT = 0, /* MOE_PLACE_JOINED */
    MOE_PLACE_JOINED,      /* {0, row}: all rows in one array, in expert order */
    MOE_PLACE_BY_EXPERT    /* {expert, row - expert_offset[expert]}: a buffer an expert */
} moe_place_kind;

/* Which axis of a matrix is contiguous in memory. K is the axis that a GEMM sums over. */
typedef enum moe_major {
    MOE_MAJOR_DEFAULT = 0, /* MOE_MAJOR_K */
    MOE_MAJOR_K,           /* rows of K elements: weights [E, N, K], as checkpoints have them */
    MOE_MAJOR_MN           /* rows of M (or N) elements: weights [E, K, N] */
} moe_major;

/* What happens between an MLP's two products. The gated ones take two columns of w1 to make one of
   the activations: act(gate) * up. Phi is the normal distribution, sigma the logistic function. */
typedef enum moe_activation {
    MOE_ACTIVATION_DEFAULT = 0,    /* each field says what it stands for */
    MOE_ACTIVATION_NONE,           /* v */
    MOE_ACTIVATION_SWIGLU,         /* gate sigma(gate) up */
    MOE_ACTIVATION_GEGLU,          /* gate Phi(gate) up */
    MOE_ACTIVATION_GEGLU_TANH,     /* the same with the tanh form of Phi */
    MOE_ACTIVATION_SWIGLU_CLAMPED, /* g sigma(alpha g) (u + 1); g = min(gate, limit), u = up held
                                      within -limit .. limit */
    MOE_ACTIVATION_SILU,           /* v sigma(v); from here on not gated */
    MOE_ACTIVATION_GELU,           /* v Phi(v) */
    MOE_ACTIVATION_GELU_TANH,      /* v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))) / 2 */
    MOE_ACTIVATION_RELU2           /* max(v, 0)^2 */
} moe_activation;

MOE_HOST_DEVICE int moe_activation_is_gated(int activation)
{
    return activation >= MOE_ACTIVATION_SWIGLU && activation <= MOE_ACTIVATION_SWIGLU_CLAMPED;
}

/* Where the up projection of a gated activation stands beside its gate. */
typedef enum moe_gate_up {
    MOE_GATE_UP_DEFAULT = 0,  /* MOE_GATE_UP_CONCATENATED */
    MOE_GATE_UP_CONCATENATED, /* w1 [2I, H]: gate rows 0 .. I-1, up rows I .. 2I-1 */
    MOE_GATE_UP_INTERLEAVED,  /* w1 [2I, H]: gate rows 0, 2, 4 ..., up rows 1, 3, 5 ... */
    MOE_GATE_UP_SEPARATE      /* w1 [I, H] is the gate; `up` or `up_table` the up projection */
} moe_gate_up;

/* The weights of all experts, used where they lie. Expert e's matrix begins at
     table ? table[e] : (char*)base + e * expert_stride elements
   and its rows are row_stride elements apart. The table itself is in device memory. Every
   matrix begins at a multiple of 16 bytes; entries of experts without rows are not read.
   Where gate and up are separate matrices, `up` or `up_table` holds the second one, laid out
   like the first. */
typedef struct moe_weights {
    const void* base;            /* one block, expert after expert; or null with a table */
    const void* const* table;    /* [E] device array of device addresses; or null */
    const void* up;              /* separate up projection, one block; or null */
    const void* const* up_table; /* [E] addresses of the separate up projections; or null */
    int64_t expert_stride;       /* elements between experts of a block; 0 = dense */
    int64_t row_stride;          /* elements between rows; 0 = dense */
    int32_t major;               /* moe_major; 0 = rows of K elements */
} moe_weights;

/* Gate and route cut the tokens into at most MOE_MAX_CHUNKS chunks of moe_chunk_tokens(T), the last
   maybe shorter: chunk_count [num_chunks, E] holds how often each chunk chose each expert. */
#define MOE_MAX_CHUNKS 128

MOE_HOST_DEVICE int64_t moe_chunk_tokens(int64_t num_tokens)
{
    const int64_t each = (num_tokens + MOE_MAX_CHUNKS - 1) / MOE_MAX_CHUNKS;
    return each > 16 ? (each + 15) / 16 * 16 : 16;
}

MOE_HOST_DEVICE int64_t moe_num_chunks(int64_t num_tokens)
{
    const int64_t each = moe_chunk_tokens(num_tokens);
    return (num_tokens + each - 1) / each;
}

#endif
