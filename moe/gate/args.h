/* args.h: the argument of the gate's kernels: moe_gate_desc with its defaults filled in, and with
   temperature and threshold in the form that kernels compute with. C11 and C++14. */
#ifndef MOE_GATE_ARGS_H
#define MOE_GATE_ARGS_H

#include "desc.h"

/* Fields named as in moe_gate_desc have its meaning, but 0 stands for no default. Keep the order of
   moe_gate_desc: another order made launches 1 to 4 % slower. z_sum came later, at the end. */
typedef struct moei_gate_args {
    const void* logits;             /* [T, E] logits_dtype */
    const float* expert_bias;       /* [E]; or null */
    const uint8_t* expert_disabled; /* [E] not 0: disabled; or null */
    const uint8_t* token_disabled;  /* [T] not 0: disabled; or null */
    const uint64_t* seed_offset;    /* [1] added to seed; or null */
    int64_t logits_stride;          /* elements between rows, >= E */
    int32_t logits_dtype;           /* moe_dtype, not 0 */
    int32_t* ids;                   /* [T, K]; -1 where unused */
    float* weights;                 /* [T, K]; 0 where unused */
    int32_t* expert_count;          /* [E]; or null */
    int32_t* chunk_count;           /* [moe_num_chunks(T), E]; or null */
    float* prob_sum;                /* [E]; or null */
    uint64_t* fault;                /* [1] fault word; or null */
    int32_t num_tokens;             /* T */
    int32_t num_experts;            /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;                  /* K, 1 .. E */
    int32_t score;                  /* moe_score, not MOE_SCORE_DEFAULT */
    int32_t renormalize;            /* 0 or 1 */
    float scale;                    /* factor on the weights, finite */
    float inverse_temperature;      /* 1 / temperature, factor on the logits: 1e-30 .. 1e30 */
    float noise;                    /* standard deviation, finite, >= 0 */
    float dropout;                  /* probability, 0 <= dropout < 1 */
    float least_logit;              /* sigmoid: a choice of a smaller logit is unused; -inf: all are
                                       used */
    uint64_t seed;                  /* of noise and dropout; any value */
    int32_t num_groups;             /* 1 .. MOE_GATE_MAX_GROUPS, divides E; 1: no rule of groups */
    int32_t top_groups;             /* 1 .. num_groups */
    int32_t whole_batch;            /* 0 or 1 */
    int32_t rank;                   /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    void* workspace;                /* of moe_gate_workspace's bytes, 16-byte aligned; or null */
    float* z_sum;                   /* [1]; or null */
} moei_gate_args;

#endif
