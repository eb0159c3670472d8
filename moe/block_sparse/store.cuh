/* store.cuh: stores a warp's accumulators of a block-sparse tile to C, for tile.cuh. */
#ifndef MOE_BLOCK_SPARSE_STORE_CUH
#define MOE_BLOCK_SPARSE_STORE_CUH

#include "../gemm/epilogue.cuh"
#include "../gemm/mma.cuh"
#include "address.cuh"

/* Stores a warp's wm x wn accumulators through `staging`, [16][inner + 8] fp32. Called
   by a whole warp; wm, wn, transposed and dtype are literals. Where C is stored transposed,
   exchange rows and columns below.
     1. Find the lane's 8 neighbours: columns `column` .. column + 7 of every row that the lane
        stores.
     2. For each slice of 16 rows, write the fragments to the staging (__syncwarp: all lanes have).
     3. Store the slice from the staging: 16-byte vectors, or single elements at the tile's edge
        (__syncwarp: the next slice overwrites the staging). */
MOE_DEVICE void moei_sparse_store(const moei_sparse_args* d, const moei_sparse_shared* s,
                                  moei_mma_c acc[4][4], float* staging, int warp_m, int warp_n,
                                  const int wm, const int wn, const int transposed, const int dtype)
{
    const moei_sparse_position* t = &s->tile;
    const int outer = transposed ? wn : wm, inner = transposed ? wm : wn, ld = inner + 8;
    const int bytes = d->c_dtype == MOE_FP32 ? 4 : 2;
    const int rows = MOE_WARP_SIZE / (inner / 8); /* rows that the warp stores at a time */
    const int r = moe_lane() / (inner / 8);       /* the lane's first row */
    const int g = moe_lane() % (inner / 8) * 8;
    const int first = transposed ? warp_n * wn : warp_m * wm;
    const int column = (transposed ? warp_m * wm : warp_n * wn) + g;
    /* columns of the tile from `column` on, rows from the lane's first on */
    const int columns_left = (transposed ? t->rows : t->columns) - column;
    const int rows_left = (transposed ? t->columns : t->rows) - first - r;
    const uint64_t side =
        (transposed ? s->x : s->y)[column / 16] + (uint64_t)((r * d->c.stride + g % 16) * bytes);
    const int64_t step = rows * d->c.stride * bytes;
    MOE_UNROLL
    for (int o = 0; o < outer / 16; ++o) {
        const int slice = first / 16 + o;
        const uint32_t have = transposed ? s->have[slice] >> column / 16 & s->rows >> column / 16
                                         : s->have[column / 16] >> slice & s->rows >> slice;
        const int n = have & 1 ? rows_left - o * 16 : 0;
        uint64_t to = side + (transposed ? s->y : s->x)[slice];
        /* 2. staging */
        MOE_UNROLL
        for (int i = 0; i < inner / 16; ++i)
            if (transposed) moei_mma_store_transposed(staging + i * 16, &acc[i][o], ld);
            else moei_mma_store(staging + i * 16, &acc[o][i], ld);
        __syncwarp(MOE_FULL_WARP);
        /* 3. C */
        if (columns_left >= 8) {
            MOE_UNROLL
            for (int p = 0; p < 16 / rows; ++p) {
                float v[8];
                MOE_UNROLL
                for (int x = 0; x < 8; ++x) v[x] = staging[(p * rows + r) * ld + g + x];
                if (p * rows < n)
                    moei_epilogue_store8((void*)(uintptr_t)to, v, 0, bytes == 4 ? MOE_FP32 : dtype);
                to += (uint64_t)step;
            }
        } else {
            MOE_NO_UNROLL
            for (int p = 0; p * rows < (n < 16 ? n : 16); ++p) {
                for (int x = 0; x < columns_left; ++x)
                    moe_store_f32((void*)(uintptr_t)(to + (uint64_t)(p * step)), x, d->c_dtype,
                                  staging[(p * rows + r) * ld + g + x]);
            }
        }
        __syncwarp(MOE_FULL_WARP);
    }
}

#endif
