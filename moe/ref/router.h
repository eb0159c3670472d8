/* router.h: the reference of the router. C11 and C++14; no CUDA.

     logits[t, e] = sum over h of x[t, h] * w[e, h]

   Functions: moe_ref_router_f32 and moe_ref_router_f64. */
#ifndef MOE_REF_ROUTER_H
#define MOE_REF_ROUTER_H

#include "real.h"

typedef struct moe_ref_router_desc {
    const void* x;    /* [T, H] x_dtype */
    const void* w;    /* [E, H] w_dtype */
    int64_t x_stride; /* elements between rows; 0 = H */
    int64_t w_stride; /* elements between rows; 0 = H */
    int32_t x_dtype;  /* moe_dtype or MOE_REF_REAL */
    int32_t w_dtype;  /* moe_dtype or MOE_REF_REAL */
    int32_t num_tokens, num_experts, hidden; /* T, E, H */
} moe_ref_router_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "router.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "router.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
