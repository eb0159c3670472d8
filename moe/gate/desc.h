/* desc.h: the gate's descriptor and its options. C11 and C++14. What they mean: gate.cuh. */
#ifndef MOE_GATE_DESC_H
#define MOE_GATE_DESC_H

#include <stddef.h>

#include "../base/status.h"
#include "../layout.h"

/* What a token's logits l [E] become; the weights of the chosen are read from it. */
typedef enum moe_score {
    MOE_SCORE_DEFAULT = 0,  /* MOE_SCORE_SOFTMAX */
    MOE_SCORE_SOFTMAX,      /* softmax over all experts, then select */
    MOE_SCORE_TOPK_SOFTMAX, /* select, then softmax over the selected */
    MOE_SCORE_SIGMOID,      /* sigmoid of each logit */
    MOE_SCORE_SPARSEMAX,    /* max(l - tau, 0), tau such that they sum to 1: many are exactly 0 */
    MOE_SCORE_QUADRATIC,    /* softmax of l^2 */
    MOE_SCORE_PIONEER       /* softmax of cos(l)^2 */
} moe_score;

#define MOE_GATE_MAX_GROUPS 32
#define MOE_GATE_MAX_COSINE 1048576.0f /* |l| from which on MOE_SCORE_PIONEER counts as NaN */

typedef struct moe_gate_desc {
    /* in */
    const void* logits;          /* [T, E] logits_dtype */
    const float* expert_bias;    /* [E] added to the scores for selection alone; or null */
    const uint8_t* expert_disabled; /* [E] not 0: the expert is switched off; or null */
    const uint8_t* token_disabled;  /* [T] not 0: the token selects nothing (padding); or null */
    const uint64_t* seed_offset; /* [1] added to seed: a replayed graph draws anew; or null */
    int64_t logits_stride;       /* elements between rows; 0 = E */
    int32_t logits_dtype;        /* moe_dtype; 0 = fp32 */
    /* out */
    int32_t* ids;          /* [T, K] experts chosen, best first; -1 where unused */
    float* weights;        /* [T, K]; 0 where unused */
    int32_t* expert_count; /* [E] slots that chose each expert; or null; cleared first, always */
    int32_t* chunk_count;  /* [moe_num_chunks(T), E] the same per chunk, for route; or null */
    float* prob_sum;       /* [E] sum over the tokens of each expert's probability; or null */
    uint64_t* fault;       /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;  /* T >= 0 */
    int32_t num_experts; /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;       /* K, 1 .. E */
    int32_t score;       /* moe_score; 0 = softmax */
    int32_t renormalize; /* 0 or 1: divide a token's weights by their sum */
    float scale;         /* factor on the weights, finite; 0 = 1 */
    float temperature;   /* divides the logits, 1e-30 .. 1e30; 0 = 1 */
    float noise;         /* standard deviation of normal noise on the divided logits; 0 = none */
    float dropout;       /* chance that a token does not see an expert, 0 <= dropout < 1, in
                            steps of 2^-16 */
    float threshold;     /* sigmoid: least score that is used, 0 <= threshold < 1 */
    uint64_t seed;       /* of noise and dropout */
    int32_t num_groups;  /* neighbouring experts in so many equal groups; 0 = 1; divides E */
    int32_t top_groups;  /* groups a token may choose from, best first; 0 = num_groups */
    int32_t whole_batch; /* 1: one selection for all tokens, by the sums of their logits */
    int32_t rank;        /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    void* workspace;     /* 16-byte aligned; null if moe_gate_workspace asks for 0 */
    size_t workspace_bytes;
} moe_gate_desc;

/* What is drawn for token t and expert e, by moe_random_words(seed, c0, t, stream, 0) of
   base/random.h. Noise: c0 = e / 4; words 0 and 1 make the normal numbers of e % 4 = 0 and 1, words
   2 and 3 the others. Dropout: c0 = e / 8; the e % 8-th 16 bits of the words, low half first, drop
   the expert where they are below moe_gate_dropout_steps. */
#define MOE_GATE_STREAM_NOISE 0
#define MOE_GATE_STREAM_DROPOUT 1

/* The chance in steps of 2^-16, rounded; at least one step where it is not 0. */
MOE_HOST_DEVICE int moe_gate_dropout_steps(float dropout)
{
    const int steps = (int)(dropout * 65536.0f + 0.5f);
    return steps > 65535 ? 65535 : steps < 1 && dropout > 0.0f ? 1 : steps;
}

#endif
