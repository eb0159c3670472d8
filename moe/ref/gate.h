/* gate.h: the reference of moe/gate.cuh. C11 and C++14; no CUDA.

     softmax        p_e = exp(l_e) / sum_j exp(l_j); the K largest; weight = p_e
     top-k softmax  the K largest l_e; weight = softmax over those K alone
     sigmoid        the K largest; weight = 1 / (1 + exp(-l_e))

   then the K weights are divided by their sum if `renormalize` is set (a sum of 0 divides
   nothing), then multiplied by `scale`. Choices stand in descending order of the logit, equals
   in ascending order of the expert. +inf shares a softmax among its equals; -inf has score 0 and is
   not chosen: with fewer other logits than K the last choices have id -1 and weight 0. A row that
   holds a NaN gets ids -1 and weights 0.

   moe_ref_gate_f32 and moe_ref_gate_f64. */
#ifndef MOE_REF_GATE_H
#define MOE_REF_GATE_H

#include "../gate/desc.h"
#include "real.h"

typedef struct moe_ref_gate_desc {
    const void* logits;    /* [T, E] logits_dtype */
    int64_t logits_stride; /* elements between rows; 0 = E */
    int32_t logits_dtype;  /* moe_dtype or MOE_REF_REAL */
    int32_t num_tokens, num_experts, top_k;
    int32_t score;       /* moe_score, one of the three; 0 = softmax */
    int32_t renormalize; /* 0 or 1 */
    float scale;         /* 0 = 1 */
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
