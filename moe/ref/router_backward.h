/* router_backward.h: the reference of moe/router_backward.cuh. C11 and C++14; no CUDA.

     dx[t, h]      = sum over e of dlogits[t, e] * w[e, h]
     drouter[e, h] = sum over t of dlogits[t, e] * x[t, h]     without tokens whose dlogits are all 0

   Functions: moe_ref_router_backward_f32 and moe_ref_router_backward_f64. */
#ifndef MOE_REF_ROUTER_BACKWARD_H
#define MOE_REF_ROUTER_BACKWARD_H

#include "router.h"

typedef struct moe_ref_router_backward_desc {
    moe_ref_router_desc forward; /* x, w and sizes */
    const void* dlogits;         /* [T, E] dlogits_dtype */
    int64_t dlogits_stride;      /* elements between rows; 0 = E */
    int32_t dlogits_dtype;       /* moe_dtype or MOE_REF_REAL; 0 = fp32 */
} moe_ref_router_backward_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "router_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "router_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
