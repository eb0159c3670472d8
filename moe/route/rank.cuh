/* rank.cuh: route's inner step: which lanes of a warp chose one expert. */
#ifndef MOE_ROUTE_RANK_CUH
#define MOE_ROUTE_RANK_CUH

#include "../base/warp.cuh"

/* The lanes whose v is this lane's; v has `bits` bits. Quicker than __match_any_sync for many
   different v. */
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

/* For kernels that sort slots by expert themselves. Each lane of a warp has one choice: `expert` is
   0 .. num_experts - 1, or negative where it has none; num_experts is 1 .. 2^30, the same in all
   lanes. Returns how many lanes before this one chose the same expert and sets *count to how many
   lanes chose it in all; both are 0 where expert is negative. All 32 lanes must call it.

   With a table of running counts, a lane's position among its expert's slots is the table's entry
   plus the rank; then one lane of each expert (rank + 1 == count) adds count to the entry.
   An expert of num_experts or more is read modulo a power of two above num_experts. */
MOE_DEVICE int moe_route_rank(int expert, int num_experts, int* count)
{
    const int bits = 32 - __clz(num_experts); /* so that -1 differs from every expert */
    const uint32_t same = moei_route_same(expert < 0 ? -1 : expert, bits);
    *count = expert < 0 ? 0 : __popc(same);
    return expert < 0 ? 0 : __popc(same & ((1u << moe_lane()) - 1u));
}

#endif
