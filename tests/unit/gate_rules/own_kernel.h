/* own_kernel.h: moe_warp_top_k in a kernel of the test

   test_warp_top_k  one warp, a row in shared memory */
#ifndef MOE_TESTS_GATE_RULES_OWN_KERNEL_H
#define MOE_TESTS_GATE_RULES_OWN_KERNEL_H

#include "tests/unit/gate_rules/case.h"

/* moe_warp_top_k from a kernel of one's own: one warp, a row in shared memory. */
typedef struct top_args {
    const float* merit;
    int32_t* ids;
    int32_t num_experts, top_k;
} top_args;

typedef struct top_shared {
    float row[300];
} top_shared;

MOE_KERNEL(32, 1) top_kernel(MOE_ARG(top_args) d)
{
    MOE_SHARED(top_shared, s);
    for (int e = moe_lane(); e < d.num_experts; e += MOE_WARP_SIZE)
        s.row[e] = d.merit[(int64_t)blockIdx.x * d.num_experts + e];
    __syncwarp(MOE_FULL_WARP);
    moe_warp_top_k(d.ids + (int64_t)blockIdx.x * d.top_k, s.row, d.num_experts, d.top_k);
}

static void test_warp_top_k(void)
{
    enum { ROWS = 20, E = 300, K = 12 };
    trand r = trand_new(12);
    float* merit = (float*)test_host(ROWS * E * 4);
    int32_t* want = (int32_t*)test_host(ROWS * K * 4);
    tbuf in, out;
    top_args a;
    moe_launch_config c = moe_grid(ROWS, 32, 0, test_now.stream);
    for (int row = 0; row < ROWS; ++row) {
        char taken[E];
        memset(taken, 0, sizeof taken);
        for (int e = 0; e < E; ++e) {
            merit[row * E + e] = row & 1 ? (float)trand_int(&r, -2, 2) : trand_normal(&r);
            if (row >= ROWS - 3 && (row == ROWS - 1 || trand_int(&r, 0, 40)))
                merit[row * E + e] = NAN;
        }
        for (int k = 0; k < K; ++k) {
            int best = -1;
            for (int e = 0; e < E; ++e) {
                const float v = merit[row * E + e];
                if (v == v && !taken[e] && (best < 0 || v > merit[row * E + best])) best = e;
            }
            want[row * K + k] = best;
            if (best >= 0) taken[best] = 1;
        }
    }
    in = tbuf_from("merit", merit, ROWS * E * 4, 0);
    out = tbuf_new("ids", ROWS * K * 4, 0);
    a.merit = (const float*)in.p;
    a.ids = (int32_t*)out.p;
    a.num_experts = E;
    a.top_k = K;
    CHECK_STATUS(MOE_LAUNCH(top_kernel, c, a), MOE_OK);
    CHECK(tbuf_holds(&out, want), "ids");
    tbuf_free(&in);
    tbuf_free(&out);
    free(merit);
    free(want);
}

static void gate_rules_own_kernel(void)
{
    RUN(test_warp_top_k);
}

#endif
