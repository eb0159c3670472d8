/* desc.h: the gate's descriptor and its options. C11 and C++14. gate.cuh explains them. */
#ifndef MOE_GATE_DESC_H
#define MOE_GATE_DESC_H

#include <stddef.h>

#include "../base/status.h"
#include "../layout.h"

/* How a token's logits l [E] become scores. The weights of the chosen experts are their scores. */
typedef enum moe_score {
    MOE_SCORE_DEFAULT = 0,  /* MOE_SCORE_SOFTMAX */
    MOE_SCORE_SOFTMAX,      /* softmax over all experts, then select */
    MOE_SCORE_TOPK_SOFTMAX, /* select, then softmax over the selected */
    MOE_SCORE_SIGMOID,      /* sigmoid of each logit */
    MOE_SCORE_SPARSEMAX,    /* max(l - tau, 0); tau makes them sum to 1: many are exactly 0 */
    MOE_SCORE_QUADRATIC,    /* softmax of l^2 */
    MOE_SCORE_PIONEER       /* softmax of cos(l)^2 */
} moe_score;

#define MOE_GATE_MAX_GROUPS 32         /* most num_groups: one a lane of a warp */
#define MOE_GATE_MAX_COSINE 1048576.0f /* MOE_SCORE_PIONEER: |l| of this and more counts as NaN */

/* What moe_gate takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_gate_desc {
    /* in */
    const void* logits;             /* [T, E] logits_dtype */
    const float* expert_bias;       /* [E] added to the scores for choosing alone; null: none */
    const uint8_t* expert_disabled; /* [E] not 0: no token may choose the expert; null: none */
    const uint8_t* token_disabled;  /* [T] not 0: the token chooses nothing (padding); null: none */
    const uint64_t* seed_offset;    /* [1] added to seed: a replayed graph draws anew; null: 0 */
    int64_t logits_stride;          /* elements between rows, >= E; 0 = E */
    int32_t logits_dtype;           /* moe_dtype; 0 = fp32 */
    /* out */
    int32_t* ids;          /* [T, K] chosen experts, best first; -1 where unused */
    float* weights;        /* [T, K] weights of ids; 0 where unused */
    int32_t* expert_count; /* [E] slots that chose each expert; cleared before; or null */
    int32_t* chunk_count;  /* [moe_num_chunks(T), E] the same of each chunk, for route; or null */
    float* prob_sum;       /* [E] sum over all tokens of each expert's probability; or null */
    float* z_sum;          /* [1] sum over all tokens of lse^2, lse the logarithm of the sum of e^l
                              over the experts that the token sees; or null */
    uint64_t* fault;       /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;     /* T >= 0 */
    int32_t num_experts;    /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;          /* K, 1 .. E */
    int32_t score;          /* moe_score; 0 = softmax */
    int32_t renormalize;    /* 1: divides a token's weights by their sum; 0: does not */
    float scale;            /* factor on the weights, finite; 0 = 1 */
    float temperature;      /* divides the logits, 1e-30 .. 1e30; 0 = 1 */
    float noise;            /* standard deviation of the noise on the divided logits, finite,
                               >= 0; 0 = none */
    float dropout;          /* probability that a token excludes an expert, 0 <= dropout < 1,
                               rounded to 2^-16; 0 = none */
    float threshold;        /* sigmoid: least score that is used, 0 <= threshold < 1 */
    uint64_t seed;          /* of noise and dropout; any value */
    int32_t num_groups;     /* equal groups of neighbouring experts, 1 .. MOE_GATE_MAX_GROUPS;
                               divides E; 0 = 1 */
    int32_t top_groups;     /* groups that a token may choose from, 1 .. num_groups, together of
                               K experts or more; 0 = num_groups */
    int32_t whole_batch;    /* 1: one choice for all tokens, by the sums of their logits; or 0 */
    int32_t rank;           /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
    void* workspace;        /* 16-byte aligned; may be null where moe_gate_workspace gives 0 */
    size_t workspace_bytes; /* bytes at workspace, at least what moe_gate_workspace gives */
} moe_gate_desc;

/* Random draws of token t and expert e: moe_random_words(seed, c0, t, stream, 0) of base/random.h.
   Noise: c0 = e / 4. Words 0 and 1 give the normal numbers of e % 4 = 0 and 1; words 2 and 3 those
   of 2 and 3. Dropout: c0 = e / 8. The words hold eight numbers of 16 bits, low half first. Number
   e % 8 excludes the expert where the number is below moe_gate_dropout_steps. */
#define MOE_GATE_STREAM_NOISE 0
#define MOE_GATE_STREAM_DROPOUT 1

/* Returns the probability as a multiple of 2^-16, rounded; at least 1 where dropout is not 0. */
MOE_HOST_DEVICE int moe_gate_dropout_steps(float dropout)
{
    const int steps = (int)(dropout * 65536.0f + 0.5f);
    return steps > 65535 ? 65535 : steps < 1 && dropout > 0.0f ? 1 : steps;
}

#endif
