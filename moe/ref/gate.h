/* gate.h: the reference of moe/gate.cuh without rules. C11 and C++14; no CUDA.

     softmax        p_e = exp(l_e) / sum_j exp(l_j); the K largest; weight = p_e
     top-k softmax  the K largest l_e; weight = softmax over those K alone
     sigmoid        the K largest; weight = 1 / (1 + exp(-l_e))

   With `renormalize` the K weights are divided by their sum, unless the sum is 0. Then the weights
   are multiplied by `scale`. Choices are in descending order of the logit, equal ones in ascending
   order of the expert. Several +inf share a softmax equally. -inf has score 0 and is not chosen:
   with fewer other logits than K the last choices have id -1 and weight 0. A row with a NaN gets
   ids -1 and weights 0.

   Functions: moe_ref_gate_f32 and moe_ref_gate_f64. */
#ifndef MOE_REF_GATE_H
#define MOE_REF_GATE_H

#include "../gate/desc.h"
#include "real.h"

typedef struct moe_ref_gate_desc {
    const void* logits;    /* [T, E] logits_dtype */
    int64_t logits_stride; /* elements between rows; 0 = E */
    int32_t logits_dtype;  /* moe_dtype or MOE_REF_REAL */
    int32_t num_tokens, num_experts, top_k; /* T, E, K */
    int32_t score;       /* moe_score, one of the three above; 0 = softmax */
    int32_t renormalize; /* 0 or 1 */
    float scale;         /* factor on the weights; 0 = 1 */
} moe_ref_gate_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "gate.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "gate.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
