/* combine_backward.h: the reference of moe/combine_backward.cuh. C11 and C++14; no CUDA.

     drows[t, k, :]     = weights[t, k] * dy[t, :]
     dweights[t, k]     = sum over h of dy[t, h] * row(place[t, k])[h]
     dshared[t, :]      = shared_weight[t] * dy[t, :]
     dshared_weight[t]  = sum over h of dy[t, h] * shared[t, h]

   drows is in slot order: the row that place[t, k] names gets drows[t, k, :]. A slot whose place
   has buffer -1, or is outside the table or past num_rows, has zeros. The gradient of the residual
   is dy.
   Functions: moe_ref_combine_backward_f32 and moe_ref_combine_backward_f64. */
#ifndef MOE_REF_COMBINE_BACKWARD_H
#define MOE_REF_COMBINE_BACKWARD_H

#include "combine.h"

typedef struct moe_ref_combine_backward_desc {
    moe_ref_combine_desc forward; /* combine's; the residual is not used */
    const void* dy;               /* [T, H] dy_dtype */
    int64_t dy_stride;            /* elements between rows; 0 = H */
    int32_t dy_dtype;             /* moe_dtype or MOE_REF_REAL */
} moe_ref_combine_backward_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "combine_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "combine_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
