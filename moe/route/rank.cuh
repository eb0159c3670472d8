/* rank.cuh: route's inner function: which lanes of a warp chose the same expert. Called by
   place.cuh and by kernels of one's own. */
#ifndef MOE_ROUTE_RANK_CUH
#define MOE_ROUTE_RANK_CUH

#include "../base/warp.cuh"

/* Returns bits of the lanes whose v equals this lane's; v has `bits` bits. The whole warp calls it.
   Faster than __match_any_sync for many different v. */
MOE_DEVICE uint32_t moei_route_same(int v, int bits)
{
    uint32_t same = MOE_FULL_WARP;
    MOE_NO_UNROLL
    for (int b = 0; b < bits; ++b) {
        const uint32_t set = __ballot_sync(MOE_FULL_WARP, v >> b & 1);
        same &= v >> b & 1 ? set : ~set;
    }
    return same;
}

/* Ranks the lanes of a warp by expert, for kernels that sort slots themselves. Each lane has one
   choice: `expert` is 0 .. num_experts - 1, or negative for none. num_experts is 1 .. 2^30, the
   same in all lanes. Returns the number of lanes before this one with the same expert; sets *count
   to the number in all lanes. Both are 0 where expert is negative. All 32 lanes must call it.

   With a table of running counts, a lane's position among its expert's slots is the table's entry
   plus the rank. Then one lane of each expert (rank + 1 == count) adds count to the entry.
   An expert of num_experts or more is read modulo a power of two above num_experts. */
MOE_DEVICE int moe_route_rank(int expert, int num_experts, int* count)
{
    const int bits = 32 - __clz(num_experts); /* so that -1 differs from every expert */
    const uint32_t same = moei_route_same(expert < 0 ? -1 : expert, bits);
    *count = expert < 0 ? 0 : __popc(same);
    return expert < 0 ? 0 : __popc(same & ((1u << moe_lane()) - 1u));
}

#endif
