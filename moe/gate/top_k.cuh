/* top_k.cuh: the K largest of a row by one warp, for the gate and for kernels of one's own. */
#ifndef MOE_GATE_TOP_K_CUH
#define MOE_GATE_TOP_K_CUH

#include "../base/numeric.cuh"
#include "../base/warp.cuh"

/* Writes to ids [K] the indices of the K largest of merit [E], in descending order, equals by
   ascending index. Never takes a NaN; writes -1 where nothing is left. All 32 lanes of a warp call
   it. merit and ids are in shared or global memory; what other threads wrote there must be visible.
   Reads merit once a choice. Ends with __syncwarp: the lanes may read ids. */
MOE_DEVICE void moe_warp_top_k(int32_t* ids, const float* merit, int num_experts, int top_k)
{
    uint32_t last = MOE_FULL_WARP;
    int last_at = -1;
    for (int k = 0; k < top_k; ++k) {
        uint32_t best = 0;
        int best_at = num_experts;
        for (int e = moe_lane(); e < num_experts; e += MOE_WARP_SIZE) {
            const float v = merit[e];
            const uint32_t key = moei_is_nan(v) ? 0 : moei_ordered(v);
            if ((key < last || (key == last && e > last_at)) && key > best) {
                best = key;
                best_at = e;
            }
        }
        last = moe_warp_max_u32(best);
        last_at = (int)~moe_warp_max_u32(~(uint32_t)(best == last ? best_at : num_experts));
        if (moe_lane() == 0) ids[k] = last_at < num_experts ? last_at : -1;
    }
    __syncwarp(MOE_FULL_WARP);
}

#endif
