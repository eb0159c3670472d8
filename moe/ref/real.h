/* real.h: what the references share: loading a number, rounding one, locating a weight. C11 and
   C++14; no CUDA.

   Every reference exists twice, from one .inl file: moe_ref_<verb>_f32 computes in float,
   moe_ref_<verb>_f64 in double. A buffer is passed as void* and a dtype, as everywhere. The dtype
   MOE_REF_REAL marks a buffer of the reference's own numbers (float or double): one reference reads
   what another wrote, with no rounding in between. */
#ifndef MOE_REF_REAL_H
#define MOE_REF_REAL_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "../base/types.h"
#include "../layout.h"

/* A buffer of float for the _f32 functions, of double for the _f64 functions. */
#define MOE_REF_REAL (-1)

/* Returns v, or `dense` where v is 0. */
MOE_HOST int64_t moei_ref_or(int64_t v, int64_t dense) { return v ? v : dense; }

/* Returns the address of expert e's matrix [n, k] in weights given as base or table. */
MOE_HOST const void* moei_ref_matrix(const void* base, const void* const* table,
                                     const moe_weights* w, int dtype, int e, int n, int k)
{
    const int mn = w->major == MOE_MAJOR_MN;
    const int64_t row = moei_ref_or(w->row_stride, mn ? n : k);
    const int64_t expert = moei_ref_or(w->expert_stride, row * (mn ? k : n));
    return table ? table[e] : (const char*)base + e * expert * moe_dtype_bytes(dtype);
}

/* Returns the index of element (i, j) of a matrix [n, k]. */
MOE_HOST int64_t moei_ref_element(const moe_weights* w, int n, int k, int i, int j)
{
    if (w->major == MOE_MAJOR_MN) return j * moei_ref_or(w->row_stride, n) + i;
    return i * moei_ref_or(w->row_stride, k) + j;
}

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "real.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "real.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
