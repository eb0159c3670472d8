/* args.h: the argument of the gate's kernels: moe_gate_desc with its defaults filled in, and with
   temperature and threshold in the form that kernels compute with. C11 and C++14. */
#ifndef MOE_GATE_ARGS_H
#define MOE_GATE_ARGS_H

#include "desc.h"

/* Fields named as in moe_gate_desc have its meaning, but 0 stands for no default. Keep the order of
   moe_gate_desc: another order made launches 1 to 4 % slower. */
typedef struct moei_gate_args {
    const void* logits;
    const float* expert_bias;
    const uint8_t* expert_disabled;
    const uint8_t* token_disabled;
    const uint64_t* seed_offset;
    int64_t logits_stride;
    int32_t logits_dtype;
    int32_t* ids;
    float* weights;
    int32_t* expert_count;
    int32_t* chunk_count;
    float* prob_sum;
    uint64_t* fault;
    int32_t num_tokens;
    int32_t num_experts;
    int32_t top_k;
    int32_t score;
    int32_t renormalize;
    float scale;
    float inverse_temperature; /* 1 / temperature: factor on the logits */
    float noise;
    float dropout;
    float least_logit; /* sigmoid: a choice of a smaller logit is unused; -inf: all are used */
    uint64_t seed;
    int32_t num_groups;
    int32_t top_groups;
    int32_t whole_batch;
    int32_t rank;
    void* workspace;
} moei_gate_args;

#endif
