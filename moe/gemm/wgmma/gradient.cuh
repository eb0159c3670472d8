/* gradient.cuh: the backward pass through an activation on Hopper: from a consumer's accumulators
   to C, act and dot (gemm/gradient.cuh), stored at once. Called by consume.cuh.

   A lane's accumulators are pairs of columns (ptx.cuh). moei_quad_transpose gives the lane 8
   neighbouring columns of one row: those of a 16-byte vector of pre and of C. */
#ifndef MOE_GEMM_WGMMA_GRADIENT_CUH
#define MOE_GEMM_WGMMA_GRADIENT_CUH

#include "../gradient.cuh"
#include "store.cuh"

#if MOEI_WGMMA_HERE

/* p [8] = P in 8 neighbouring columns of the lane, from accumulators v [32], those of 64 columns.
   i, uniform, tells which: bit 0: the columns from 32 on; bit 1: row r + 8, not r. The whole warp
   calls it. */
MOE_DEVICE void moei_wgmma_vector(float p[8], const float* v, int i)
{
    uint32_t x[8];
    MOE_UNROLL
    for (int j = 0; j < 8; ++j) {
        const float* from = v + j % 4 * 4 + j / 4;
        x[j] = __float_as_uint(i & 2 ? (i & 1 ? from[18] : from[2]) : i & 1 ? from[16] : from[0]);
    }
    moei_quad_transpose(x);
    moei_quad_transpose(x + 4);
    MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        p[2 * j] = __uint_as_float(x[j]);
        p[2 * j + 1] = __uint_as_float(x[4 + j]);
    }
}

/* Loads pre of vector i of the lane: 64 columns of the upper row, then of the lower row, then the
   next 64 columns. column: the first one. */
MOE_DEVICE moei_gradient_pre moei_wgmma_load_pre(const moe_grouped_gemm_args* d,
                                                 const moei_gradient_row* upper,
                                                 const moei_gradient_row* lower, int column, int i)
{
    const moei_gradient_row r = i & 2 ? *lower : *upper;
    return moei_gradient_load(d, &r, column + i / 4 * 64 + i % 2 * 32, 4);
}

/* Ends a tile whose results go where *p says, from row `row` on; nothing is pending after it. For
   each vector of the lane:
     1. load pre of the next one, which arrives meanwhile
     2. take P of this one; compute and store
     3. dot: add up 32 columns by shuffles; store the sum of 64
   Accumulators move up 64 columns at a time: the code stands once, for the first ones. */
MOE_DEVICE void moei_wgmma_gradient(moei_wgmma_pending* p, float acc[128],
                                    const moe_grouped_gemm_args* d, int row, const int dtype)
{
    const int column = d->n - p->columns; /* the lane's first of 8, in each 32 columns */
    /* of the tile and after; a shuffle: the compiler must know that the loop is uniform */
    const int columns = __shfl_sync(MOE_FULL_WARP, p->columns, 0);
    const moei_gradient_row upper = moei_gradient_row_of(d, row, p->rows > 0);
    const moei_gradient_row lower = moei_gradient_row_of(d, row + 8, p->rows > 8);
    moei_gradient_pre next = moei_wgmma_load_pre(d, &upper, &lower, column, 0);
    int i = 0;
    MOE_NO_UNROLL
    do {
        float first = 0.0f;
        MOE_NO_UNROLL
        do {
            const int at = column + i / 4 * 64 + i % 2 * 32;
            const moei_gradient_row r = i & 2 ? lower : upper;
            moei_gradient_pre pre = next;
            float v[8], sum;
            next = moei_wgmma_load_pre(d, &upper, &lower, column, i + 1); /* 1. */
            moei_wgmma_vector(v, acc, i);                                 /* 2. */
            sum = moei_gradient_vector(d, &r, at, &pre, v, 4, dtype);
            if (d->gradient.dot) { /* 3. */
                sum = moe_warp_sum(sum, 4);
                if (i % 2 == 0) first = sum;
                else if (r.there && moe_lane() % 4 == 0)
                    moei_gradient_store_dot(d, r.row, at - 32, first + sum);
            }
        } while (++i % 4);
        MOE_UNROLL
        for (int j = 0; j < 96; ++j) acc[j] = acc[j + 32];
    } while (i < 16 && i / 4 * 64 < columns);
    p->next = p->groups = 8; /* all are stored */
}

#endif
#endif
