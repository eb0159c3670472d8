/* store.cuh: the way of a block-sparse tile of C, from accumulators to memory. */
#ifndef MOE_BLOCK_SPARSE_STORE_CUH
#define MOE_BLOCK_SPARSE_STORE_CUH

#include "../gemm/epilogue.cuh"
#include "../gemm/mma.cuh"
#include "address.cuh"

/* A warp stores its wm x wn accumulators, 16 rows (transposed: columns) at a time through a strip of
   shared memory [16][inner + 8]. A lane has 8 neighbours in C, at one place along them. */
MOE_DEVICE void moei_sparse_store(const moei_sparse_args* d, const moei_sparse_shared* s,
                                  moei_mma_c acc[4][4], float* strip, int warp_m, int warp_n,
                                  const int wm, const int wn, const int transposed, const int dtype)
{
    const moei_sparse_position* t = &s->tile;
    const int outer = transposed ? wn : wm, inner = transposed ? wm : wn, ld = inner + 8;
    const int bytes = d->c_dtype == MOE_FP32 ? 4 : 2;
    const int rows = MOE_WARP_SIZE / (inner / 8); /* that the warp stores at a time */
    const int r = moe_lane() / (inner / 8);       /* the lane's first */
    const int g = moe_lane() % (inner / 8) * 8;
    const int first = transposed ? warp_n * wn : warp_m * wm;
    const int place = (transposed ? warp_m * wm : warp_n * wn) + g;
    const int left = (transposed ? t->rows : t->columns) - place;
    /* rows from the lane's first on */
    const int there = (transposed ? t->columns : t->rows) - first - r;
    const uint64_t side =
        (transposed ? s->x : s->y)[place / 16] + (uint64_t)((r * d->c.stride + g % 16) * bytes);
    const int64_t step = rows * d->c.stride * bytes;
    MOE_UNROLL
    for (int o = 0; o < outer / 16; ++o) {
        const int slice = first / 16 + o;
        const uint32_t have = transposed ? s->have[slice] >> place / 16 & s->rows >> place / 16
                                         : s->have[place / 16] >> slice & s->rows >> slice;
        const int n = have & 1 ? there - o * 16 : 0;
        uint64_t to = side + (transposed ? s->y : s->x)[slice];
        MOE_UNROLL
        for (int i = 0; i < inner / 16; ++i)
            if (transposed) moei_mma_store_transposed(strip + i * 16, &acc[i][o], ld);
            else moei_mma_store(strip + i * 16, &acc[o][i], ld);
        __syncwarp(MOE_FULL_WARP);
        if (left >= 8) {
            MOE_UNROLL
            for (int p = 0; p < 16 / rows; ++p) {
                float v[8];
                MOE_UNROLL
                for (int x = 0; x < 8; ++x) v[x] = strip[(p * rows + r) * ld + g + x];
                if (p * rows < n)
                    moei_epilogue_store8((void*)(uintptr_t)to, v, 0, bytes == 4 ? MOE_FP32 : dtype);
                to += (uint64_t)step;
            }
        } else {
            MOE_NO_UNROLL
            for (int p = 0; p * rows < (n < 16 ? n : 16); ++p) {
                for (int x = 0; x < left; ++x)
                    moe_store_f32((void*)(uintptr_t)(to + (uint64_t)(p * step)), x, d->c_dtype,
                                  strip[(p * rows + r) * ld + g + x]);
            }
        }
        __syncwarp(MOE_FULL_WARP);
    }
}

#endif
