/* refusals.h: what moe_experts refuses, what its kernels record in the fault word, and its plan.

     test_experts_bad_rows      reads zeros for rows of no slot, and for rows of a wrong slot, which
                                set the fault word
     test_experts_bad_offsets   stops the up product at a bad offset, and the down product after it
     test_experts_no_rows       accepts no rows: none offered, or none used
     test_experts_plan          checks that the plan is what a launch of either product takes
     test_experts_refusals      refuses each wrong field and overlap with its own status, and queues
                                nothing
     test_experts_not_compiled  refuses a variant that this program did not compile, of either
                                product, before anything is queued */
#ifndef MOE_TESTS_EXPERTS_REFUSALS_H
#define MOE_TESTS_EXPERTS_REFUSALS_H

#include "tests/unit/experts/case.h"

static void test_experts_bad_rows(void)
{
    trand r = trand_new(5);
    for (int i = 0; i < 6; ++i) {
        experts_case c = normal_case(40, 48, 40, 6, 3);
        c.bias1 = c.bias2 = i & 1; /* a row of zeros gives the bias */
        c.none = i < 4 ? 5 : 0;
        c.bad = i < 2 ? 0 : 7;
        run_case(&c, &r);
    }
}

static void test_experts_bad_offsets(void)
{
    trand r = trand_new(6);
    for (int i = 0; i < 2; ++i) {
        experts_case c = normal_case(20, 48, 40, 4, 2);
        experts_bufs b;
        int32_t offset[5];
        bufs_new(&b, &c, &r);
        memcpy(offset, b.h_offset, sizeof offset);
        offset[2] = i ? -5 : 41;
        for (int valid = 0; valid < 2; ++valid) { /* the word still holds the stop fault then */
            tbuf_put(&b.offset, valid ? b.h_offset : offset);
            CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
            CHECK(untouched(&b), "outputs, valid offsets %d", valid);
            CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 1);
        }
        bufs_free(&b);
    }
}

static void test_experts_no_rows(void)
{
    trand r = trand_new(7);
    experts_case c = normal_case(20, 48, 40, 4, 2);
    experts_bufs b;
    moe_experts_desc d;
    bufs_new(&b, &c, &r);
    memset(b.h_offset, 0, sizeof b.h_offset);
    tbuf_put(&b.offset, b.h_offset);
    CHECK_STATUS(moe_experts(&b.d, test_now.stream), MOE_OK);
    CHECK(untouched(&b), "no row is used");
    d = b.d;
    d.num_tokens = 0;
    CHECK_STATUS(moe_experts(&d, test_now.stream), MOE_OK);
    d.row_slot = 0;
    d.top_k = 0;
    CHECK_STATUS(moe_experts(&d, test_now.stream), MOE_OK);
    CHECK(untouched(&b), "no row is there");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    bufs_free(&b);
}

static void test_experts_plan(void)
{
    trand r = trand_new(9);
    for (int tile = MOE_TILE_AUTO; tile <= MOE_TILE_64x64; ++tile) {
        experts_case c = normal_case(200, 64, 40, 3, 2);
        experts_bufs b;
        moe_gemm_plan p[2];
        c.tile = tile;
        test_poison(p, sizeof p);
        bufs_new(&b, &c, &r);
        if (CHECK_STATUS(moe_experts_plan(&b.d, p, p + 1), expected(&c)) && expected(&c) == MOE_OK)
            for (int i = 0; i < 2; ++i) test_plan(&p[i], c.dtype, tile);
        CHECK_PLAN_NULL(moe_experts_plan, &b.d);
        CHECK(untouched(&b), "a plan runs nothing");
        bufs_free(&b);
    }
}

TEST_REFUSED(calls_refuse, moe_experts, moe_experts_prepare, moe_experts)

/* Requires that all calls refuse d alike. */
static void all_refuse(const moe_experts_desc* d, moe_status want, const trefusal* at)
{
    calls_refuse(d, want, at);
    CHECK_STATUS_AT(at, moe_experts_up(d, test_now.stream), want);
    CHECK_STATUS_AT(at, moe_experts_down(d, test_now.stream), want);
}

TEST_REFUSED_PLAN(refused, moe_experts_plan, all_refuse, moe_experts)

static void test_experts_refusals(void)
{
    enum { T = 20, H = 64, I = 40, E = 3, K = 2, ROWS = T * K };
    trand r = trand_new(10);
    experts_case c = normal_case(T, H, I, E, K);
    experts_bufs b;
    moe_experts_desc good, d;
    tbuf table, arena = tbuf_new("arena", 65536, 0); /* an output and any input */
    void* address[E];
    c.bias1 = c.bias2 = 1;
    c.gate_up = MOE_GATE_UP_SEPARATE;
    bufs_new(&b, &c, &r);
    for (int e = 0; e < E; ++e) address[e] = b.rows.all.p;
    table = tbuf_from("table", address, sizeof address, 0);
    good = b.d;
    CHECK_STATUS(moe_experts(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED_MLP();
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED((d.num_tokens = INT32_MAX, d.top_k = INT32_MAX), MOE_ERR_RANGE, num_tokens);
    REFUSED((d.num_tokens = 0, d.num_rows = ROWS), MOE_ERR_RANGE, num_tokens);
    REFUSED(d.num_rows = -1, MOE_ERR_RANGE, num_rows);
    REFUSED(d.batch_invariant = -1, MOE_ERR_OPTION, batch_invariant);
    REFUSED(d.grid_limit = -1, MOE_ERR_RANGE, grid_limit);
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, -1);
    REFUSED((d.row_slot = 0, d.top_k = -1, d.num_rows = ROWS), MOE_ERR_RANGE, top_k);
    REFUSED(d.activation = MOE_ACTIVATION_SILU, MOE_ERR_CONFLICT, w1); /* a second matrix */
    REFUSED((d.activation = MOE_ACTIVATION_SILU, d.w1.up = 0, d.alpha = 1), MOE_ERR_CONFLICT,
            alpha);
    REFUSED_EACH(act_stride, MOE_ERR_STRIDE, act_stride, 32, -40);
    REFUSED(d.act_stride = 44, MOE_ERR_ALIGN, act_stride);
    REFUSED_EACH(row_stride, MOE_ERR_STRIDE, row_stride, 56, -64);
    REFUSED(d.row_stride = 68, MOE_ERR_ALIGN, row_stride);
    REFUSED(d.w1.up_table = (const void* const*)table.p, MOE_ERR_CONFLICT, w1);
    REFUSED(d.table = (void* const*)table.p, MOE_ERR_CONFLICT, rows);
    REFUSED(d.w1.up = 0, MOE_ERR_NULL, w1);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.act = 0, MOE_ERR_NULL, act);
    REFUSED(d.rows = 0, MOE_ERR_NULL, rows);
    REFUSED(d.w1.up = AT(d.w1.up, 2), MOE_ERR_ALIGN, w1);
    REFUSED((d.w1.up = 0, d.w1.up_table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, w1);
    REFUSED((d.rows = 0, d.table = (void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, rows);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.expert_offset, 2), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.row_slot = (const int32_t*)AT(d.row_slot, 2), MOE_ERR_ALIGN, row_slot);
    REFUSED(d.act = AT(d.act, 8), MOE_ERR_ALIGN, act);
    REFUSED(d.rows = AT(d.rows, 8), MOE_ERR_ALIGN, rows);
    REFUSED(d.pre = AT(arena.p, 8), MOE_ERR_ALIGN, pre);
    /* without tokens too */
    REFUSED((d.num_tokens = 0, d.expert_offset = 0), MOE_ERR_NULL, expert_offset);
    /* Neither act and pre, written first, nor rows may overlap an input of either product. */
    for (int end = 0; end < 2; ++end) { /* an input over an output's first or last bytes */
        void* const at = AT(arena.p, end ? ROWS * I * 2 - 16 : 0);
        good.act = arena.p;
        REFUSED(d.x = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.w1.base = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.w1.up = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.bias1 = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.row_slot = (const int32_t*)at, MOE_ERR_OVERLAP, act);
        REFUSED(d.expert_offset = (const int32_t*)at, MOE_ERR_OVERLAP, act);
        REFUSED(d.w2.base = at, MOE_ERR_OVERLAP, act);
        REFUSED(d.bias2 = at, MOE_ERR_OVERLAP, act);
        good.act = b.act.p;
    }
    for (int end = 0; end < 2; ++end) {
        void* const at = AT(arena.p, end ? ROWS * 2 * I * 2 - 16 : 0);
        good.pre = arena.p;
        REFUSED(d.x = at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.w1.base = at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.w1.up = at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.bias1 = at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.row_slot = (const int32_t*)at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.expert_offset = (const int32_t*)at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.w2.base = at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.bias2 = at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.act = at, MOE_ERR_OVERLAP, pre);
        REFUSED(d.rows = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.fault = (uint64_t*)at, MOE_ERR_OVERLAP, fault);
        good.pre = 0;
    }
    for (int end = 0; end < 2; ++end) {
        void* const at = AT(arena.p, end ? ROWS * H * 2 - 16 : 0);
        good.rows = arena.p;
        REFUSED(d.act = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.w2.base = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.bias2 = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.expert_offset = (const int32_t*)at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.x = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.w1.base = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.w1.up = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.bias1 = at, MOE_ERR_OVERLAP, rows);
        REFUSED(d.row_slot = (const int32_t*)at, MOE_ERR_OVERLAP, rows);
        good.rows = b.rows.all.p;
    }
    {
        char* const far = TEST_FAR;
        const size_t bias = E * 2 * I * 2; /* bytes, of gates and of ups */
        const size_t last = (ROWS - 1) * 2;
        moe_gemm_plan up, down;
        /* the biases of the last ups; rows may begin where they end */
        REFUSED((d.rows = far, d.bias1 = far - bias + 2), MOE_ERR_OVERLAP, rows);
        d.bias1 = far - bias;
        CHECK_STATUS(moe_experts_plan(&d, &up, &down), MOE_OK);
        REFUSED((d.act = far, d.bias1 = far - bias + 2), MOE_ERR_OVERLAP, act);
        REFUSED((d.rows = far, d.bias2 = far - E * H * 2 + 2), MOE_ERR_OVERLAP, rows);
        /* tables of which one entry overlaps */
        REFUSED((d.rows = far, d.w1.up = 0, d.w1.up_table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.rows = far, d.w1.base = 0, d.w1.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.rows = far, d.w2.base = 0, d.w2.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.act = far, d.w1.up = 0, d.w1.up_table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        REFUSED((d.act = far, d.w1.base = 0, d.w1.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        REFUSED((d.act = far, d.w2.base = 0, d.w2.table = (const void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        REFUSED((d.act = far, d.rows = 0, d.table = (void* const*)(far - E * 8 + 8)),
                MOE_ERR_OVERLAP, act);
        /* the last rows of strided buffers */
        REFUSED((d.x = far, d.x_stride = 72, d.rows = far + (T - 1) * 72 * 2 + 112),
                MOE_ERR_OVERLAP, rows);
        REFUSED((d.x = far, d.x_stride = 72, d.act = far + (T - 1) * 72 * 2 + 112), MOE_ERR_OVERLAP,
                act);
        REFUSED((d.act = far, d.act_stride = 48, d.rows = far + last * 48 + 64), MOE_ERR_OVERLAP,
                rows);
        REFUSED((d.rows = far, d.row_stride = 72, d.fault = (uint64_t*)(far + last * 72 + 120)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.rows = far, d.row_stride = 72, d.act = far + last * 72 + 112), MOE_ERR_OVERLAP,
                rows);
        REFUSED((d.rows = far, d.row_stride = 72, d.x = far + last * 72 + 112), MOE_ERR_OVERLAP,
                rows);
    }
    /* the last bytes of the last expert's weights */
    REFUSED((d.w1.base = arena.p, d.act = AT(arena.p, E * I * H * 2 - 16)), MOE_ERR_OVERLAP, act);
    REFUSED((d.w2.base = arena.p, d.act = AT(arena.p, E * I * H * 2 - 16)), MOE_ERR_OVERLAP, act);
    REFUSED(d.fault = (uint64_t*)d.x, MOE_ERR_OVERLAP, fault);
    REFUSED((d.rows = 0, d.table = (void* const*)d.fault), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.w1.base, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.w1.up, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.w2.base, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.bias1, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.bias2, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.expert_offset, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.row_slot, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.act, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)AT(d.rows, ROWS * H * 2 - 8), MOE_ERR_OVERLAP, fault);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(untouched(&b) && tbuf_holds(&arena, 0), "a refused call wrote an output");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    tbufs_free(TBUFS(&arena, &table));
    run_bufs(&b, &c);
}

static void test_experts_not_compiled(void)
{
    trand r = trand_new(11);
    for (int second = 0; second < 2; ++second) {
        experts_case c = normal_case(20, 64, 40, 3, 2);
        experts_bufs b;
        moe_gemm_plan up, down;
        c.dtype = c.rows_dtype = MOE_FP16;
        c.major1 = second ? MOE_MAJOR_K : MOE_MAJOR_MN;
        c.major2 = second ? MOE_MAJOR_MN : MOE_MAJOR_K;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_experts_plan(&b.d, &up, &down), expected(&c));
        CHECK_STATUS(moe_experts(&b.d, test_now.stream), expected(&c));
        CHECK(moe_status_kind(expected(&c)) == MOE_ERR_NOT_COMPILED, "product %d", second);
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(untouched(&b), "refused because of product %d, but something was queued", second);
        bufs_free(&b);
    }
}

static void experts_refusals(void)
{
    RUN(test_experts_bad_rows);
    RUN(test_experts_bad_offsets);
    RUN(test_experts_no_rows);
    RUN(test_experts_plan);
    RUN(test_experts_refusals);
    RUN(test_experts_not_compiled);
}

#endif
