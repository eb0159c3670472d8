/* store.cuh: the way of a block-sparse tile of C, from accumulators to memory. */
#ifndef MOE_BLOCK_SPARSE_STORE_CUH
#define MOE_BLOCK_SPARSE_STORE_CUH

#include "../gemm/epilogue.cuh"
#include "../gemm/mma.cuh"
#include "where.cuh"

/* A warp stores its wm x wn accumulators, 16 rows (turned: columns) at a time through a strip of
   shared memory [16][inner + 8]. A lane has 8 neighbours in C, at one place along them. */
MOE_DEVICE void moei_block_store(const moei_block_args* d, const moei_block_shared* s,
                                 moei_mma_c acc[4][4], float* strip, int warp_m, int warp_n,
                                 const int wm, const int wn, const int turned, const int dtype)
{
    const moei_block_where* t = &s->tile;
    const int outer = turned ? wn : wm, inner = turned ? wm : wn, ld = inner + 8;
    const int bytes = d->c_dtype == MOE_FP32 ? 4 : 2;
    const int rows = MOEI_WARP / (inner / 8); /* that the warp stores at a time */
    const int r = moei_lane() / (inner / 8);  /* the lane's first */
    const int g = moei_lane() % (inner / 8) * 8;
    const int first = turned ? warp_n * wn : warp_m * wm;
    const int place = (turned ? warp_m * wm : warp_n * wn) + g;
    const int left = (turned ? t->rows : t->columns) - place;
    /* rows from the lane's first on */
    const int there = (turned ? t->columns : t->rows) - first - r;
    const uint64_t side =
        (turned ? s->x : s->y)[place / 16] + (uint64_t)((r * d->c.stride + g % 16) * bytes);
    const int64_t step = rows * d->c.stride * bytes;
    MOEI_UNROLL
    for (int o = 0; o < outer / 16; ++o) {
        const int chunk = first / 16 + o;
        const uint32_t have = turned ? s->have[chunk] >> place / 16 & s->rows >> place / 16
                                     : s->have[place / 16] >> chunk & s->rows >> chunk;
        const int n = have & 1 ? there - o * 16 : 0;
        uint64_t to = side + (turned ? s->y : s->x)[chunk];
        MOEI_UNROLL
        for (int i = 0; i < inner / 16; ++i)
            if (turned) moei_mma_store_turned(strip + i * 16, &acc[i][o], ld);
            else moei_mma_store(strip + i * 16, &acc[o][i], ld);
        __syncwarp(MOEI_FULL);
        if (left >= 8) {
            MOEI_UNROLL
            for (int p = 0; p < 16 / rows; ++p) {
                float v[8];
                MOEI_UNROLL
                for (int x = 0; x < 8; ++x) v[x] = strip[(p * rows + r) * ld + g + x];
                if (p * rows < n)
                    moei_epilogue_store8((void*)(uintptr_t)to, v, 0, bytes == 4 ? MOE_FP32 : dtype);
                to += (uint64_t)step;
            }
        } else {
            MOEI_NO_UNROLL
            for (int p = 0; p * rows < (n < 16 ? n : 16); ++p) {
                for (int x = 0; x < left; ++x)
                    moei_store_f32((void*)(uintptr_t)(to + (uint64_t)(p * step)), x, d->c_dtype,
                                   strip[(p * rows + r) * ld + g + x]);
            }
        }
        __syncwarp(MOEI_FULL);
    }
}

#endif
