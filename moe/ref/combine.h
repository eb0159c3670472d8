/* combine.h: the reference of moe/combine.cuh. C11 and C++14; no CUDA.

     y[t, :] = residual[t, :] + sum over k of weights[t, k] * row(place[t, k])[:]
                              + shared_weight[t] * shared[t, :]
     row(p)  = table[p.buffer] + p.row * row_stride

   A place with buffer -1 is skipped, and so is one outside the table or past num_rows.
   Functions: moe_ref_combine_f32 and moe_ref_combine_f64. */
#ifndef MOE_REF_COMBINE_H
#define MOE_REF_COMBINE_H

#include "real.h"

typedef struct moe_ref_combine_desc {
    const void* const* table; /* [num_buffers] host addresses; or null */
    const void* rows;         /* the one buffer, where the table is null */
    const moe_place* place;   /* [T, K] */
    const void* weights;      /* [T, K] weights_dtype; null = 1 each */
    const void* residual;     /* [T, H] residual_dtype; or null */
    const void* shared;       /* [T, H] rows_dtype; or null */
    const float* shared_weight; /* [T]; null = 1 each */
    int64_t row_stride;      /* elements between rows; 0 = H */
    int64_t residual_stride; /* elements between rows; 0 = H */
    int64_t shared_stride;   /* elements between rows; 0 = H */
    int32_t rows_dtype;      /* moe_dtype or MOE_REF_REAL, also of shared */
    int32_t weights_dtype;   /* moe_dtype or MOE_REF_REAL; 0 = fp32 */
    int32_t residual_dtype;  /* moe_dtype or MOE_REF_REAL */
    int32_t num_tokens, hidden, top_k; /* T, H, K */
    int32_t num_buffers; /* length of the table */
    int64_t num_rows;    /* rows of a buffer; 0 = not checked */
} moe_ref_combine_desc;

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "combine.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "combine.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
