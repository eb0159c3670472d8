/* wgmma.h: the grouped GEMM on the wgmma path, where this device and binary have it.

     test_wgmma_rows    experts of 0, 1, 63 .. 65, 127 .. 129, 191 .. 193 rows, mixed
     test_wgmma_steps   sums of 1 to 17 stages: less than the ring has, the ring, several rounds
     test_wgmma_gather  gathered rows: none, out of range, tiles that end early
     test_wgmma_one     one expert, with and without offsets, index and workspace
     test_wgmma_table   a table of C with a misaligned address
     test_wgmma_many    more tiles than blocks, experts of very different sizes
     test_wgmma_bits    the same bits with tiles handed out in another order
     test_wgmma_fresh   1,000 calls back to back, each on new rows, weights and numbers of rows, twice:
                        the same hashes
     test_wgmma_stop    another stream raises a stop fault while a product begins: all or nothing
     test_wgmma_path    who takes what, and the refusals of a path that is asked for */
#ifndef MOE_TESTS_GEMM_WGMMA_H
#define MOE_TESTS_GEMM_WGMMA_H

#include "tests/unit/gemm/fresh.h"
#include "tests/unit/gemm/run.h"

#if !MOE_ON_HOST
#include <cuda.h>
static_assert(MOEI_TENSOR_FP16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 &&
                  MOEI_TENSOR_BF16 == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 &&
                  MOEI_TENSOR_SWIZZLE_128B == CU_TENSOR_MAP_SWIZZLE_128B &&
                  MOEI_TENSOR_PROMOTION_256B == CU_TENSOR_MAP_L2_PROMOTION_L2_256B &&
                  CU_TENSOR_MAP_INTERLEAVE_NONE == 0 && CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE == 0 &&
                  sizeof(CUtensorMap) == sizeof(moei_tensor_map),
              "map.cuh has the values of cuda.h");
#endif

/* Returns whether the path runs here. */
static int wgmma_here(void)
{
    static const int one[] = {1};
    const gemm_case c = normal_case(1, one, 8, 8);
    moe_grouped_gemm_desc d = {};
    moe_gemm_plan p;
    d.num_experts = 1, d.n = d.k = 8, d.dtype = c.dtype;
    d.path = MOE_GEMM_PATH_WGMMA, d.tile = MOE_TILE_128x256;
    if (moe_grouped_gemm_plan(&d, &p) == MOE_OK) return 1;
    test_leave_out("no wgmma on this device, or no code of sm_90a");
    return 0;
}

/* Returns a case for this path with all else drawn. */
static gemm_case wgmma_case(int E, const int* rows, int n, int k, trand* r)
{
    gemm_case c = normal_case(E, rows, n, k);
    randomise(&c, r);
    if (c.b_major == MOE_MAJOR_MN && c.gate_up == MOE_GATE_UP_INTERLEAVED)
        c.gate_up = MOE_GATE_UP_SEPARATE; /* of mn-major weights the path takes no others */
    c.tile = MOE_TILE_128x256;
    c.path = MOE_GEMM_PATH_WGMMA;
    return c;
}

static void test_wgmma_rows(void)
{
    static const int sizes[] = {0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193};
    trand r = trand_new(31);
    if (!wgmma_here()) return;
    for (int i = 0; i < (MOE_ON_HOST ? 16 : 120); ++i) {
        static const int ns[] = {8, 64, 120, 128, 136, 256, 264, 520};
        int rows[5];
        gemm_case c;
        for (int e = 0; e < 5; ++e) rows[e] = sizes[trand_int(&r, 0, 10)];
        c = wgmma_case(5, rows, ns[trand_int(&r, 0, 7)], 8 * (int)trand_int(&r, 1, 20), &r);
        c.sampled = MOE_ON_HOST ? 7 : 3;
        run_case(&c, &r);
    }
}

static void test_wgmma_steps(void)
{
    static const int ks[] = {8, 64, 256, 320, 520, 128, 200, 512, 1032};
    const size_t count = test_long() ? sizeof ks / sizeof *ks : 5;
    static const int rows[] = {70, 0, 129};
    trand r = trand_new(32);
    if (!wgmma_here()) return;
    for (size_t i = 0; i < count; ++i)
        for (int gather = 0; gather < 4; gather += 3) {
            gemm_case c = wgmma_case(3, rows, 272, ks[i], &r);
            c.gather = gather;
            c.sampled = 13;
            run_case(&c, &r);
        }
}

static void test_wgmma_gather(void)
{
    static const int rows[] = {17, 0, 70, 1, 140};
    trand r = trand_new(33);
    if (!wgmma_here()) return;
    for (int i = 0; i < (MOE_ON_HOST ? 8 : 48); ++i) {
        gemm_case c = wgmma_case(5, rows, 8 * (int)trand_int(&r, 1, 40), i & 1 ? 40 : 136, &r);
        c.gather = i % 3 == 0 ? 1 : (int)trand_int(&r, 2, 9);
        c.a_rows = (int)trand_int(&r, 1, 90);
        c.none = i % 4 == 1 || i % 4 == 3 ? 20 : 0;
        c.bad = i % 4 >= 2 ? 10 : 0;
        c.sampled = 5;
        run_case(&c, &r);
    }
    for (int i = 0; i < 2; ++i) { /* without an index, rows past A's end are bad ones too */
        gemm_case c = wgmma_case(5, rows, 136, 72, &r);
        c.a_rows = i ? 140 : 100;
        run_case(&c, &r);
    }
}

static void test_wgmma_one(void)
{
    trand r = trand_new(37);
    if (!wgmma_here()) return;
    for (int i = 0; i < (MOE_ON_HOST ? 4 : 24); ++i) {
        const int rows[] = {(int)trand_int(&r, 1, MOE_ON_HOST ? 3000 : 9000)};
        gemm_case c = wgmma_case(1, rows, 8 * (int)trand_int(&r, 1, 40), 8, &r);
        c.k = 8 * (int)trand_int(&r, 1, 9);
        c.gather = i % 4 == 3;
        c.lead = c.slack = 0;
        c.no_offset = i >> 1 & 1;
        c.no_ticket = (int)trand_int(&r, 0, 1);
        c.sampled = 97;
        run_case(&c, &r);
    }
}

static void test_wgmma_table(void)
{
    static const int rows[] = {3, 200, 0};
    static void* const bad[] = {(void*)16, (void*)24, (void*)0}; /* expert 1's is misaligned */
    trand r = trand_new(38);
    gemm_case c = normal_case(3, rows, 40, 24);
    gemm_bufs b;
    tbuf table = tbuf_from("table", bad, sizeof bad, 8);
    if (!wgmma_here()) return;
    c.path = MOE_GEMM_PATH_WGMMA, c.tile = MOE_TILE_128x256;
    bufs_new(&b, &c, &r);
    b.d.c = 0, b.d.c_table = (void* const*)table.p;
    CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT_AT(&b.fault, MOE_FAULT_BAD_TABLE, 1);
    tbufs_free(TBUFS(&table));
    bufs_free(&b);
}

static void test_wgmma_many(void)
{
    static const int rows[] = {700, 1, 0, 64, 0, 3, 260, 130};
    trand r = trand_new(34);
    if (!wgmma_here()) return;
    for (int i = 0; i < (MOE_ON_HOST ? 1 : 12); ++i) {
        gemm_case c = wgmma_case(8, rows, MOE_ON_HOST ? 400 : 2056, 72, &r);
        if (!MOE_ON_HOST)
            for (int e = 0; e < 8; ++e) c.rows[e] *= (int)trand_int(&r, 1, 9);
        c.sampled = MOE_ON_HOST ? 61 : 37;
        run_case(&c, &r);
    }
}

static void test_wgmma_bits(void)
{
    static const int rows[] = {300, 5, 0, 129};
    trand r = trand_new(35);
    if (!wgmma_here()) return;
    for (int i = 0; i < 4; ++i) {
        gemm_case c = wgmma_case(4, rows, MOE_ON_HOST ? 264 : 4104, MOE_ON_HOST ? 72 : 712, &r);
        gemm_bufs b;
        void* want;
        c.gather = i & 1 ? 2 : 0;
        c.c_table = 0; /* all of C in one buffer */
        bufs_new(&b, &c, &r);
        b.d.accumulate = 0;
        test_same_bits("wgmma", call_gemm, &b.d, TBUFS(&b.c.all), MOE_ON_HOST ? 2 : 300);
        want = tbuf_copy(&b.c.all);
        tbuf_poison(&b.c.all);
        b.d.workspace = 0; /* fixed order */
        CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b.c.all, want), "without a workspace the bits differ");
        free(want);
        bufs_free(&b);
    }
}

static void test_wgmma_fresh(void)
{
    enum { CALLS = MOE_ON_HOST ? 4 : 1000 };
    static const int rows[] = {300, 5, 0, 129, 260};
    static const int32_t other[] = {0, 0, 192, 512, 513, 694}; /* offsets of every other call */
    trand r = trand_new(36);
    if (!wgmma_here()) return;
    for (int gather = 0; gather < 2; ++gather) {
        gemm_case c = wgmma_case(5, rows, MOE_ON_HOST ? 264 : 1032, MOE_ON_HOST ? 72 : 712, &r);
        static unsigned long long hash[2][CALLS];
        const moe_launch_config l = moe_grid(MOE_ON_HOST ? 1 : 64, 256, 0, test_now.stream);
        tbuf bh = tbuf_new("hash", sizeof hash, 0), offsets[2];
        gemm_bufs b;
        c.gather = gather ? 2 : 0;
        c.c_table = c.lead = c.slack = 0; /* all of C in one buffer */
        bufs_new(&b, &c, &r);
        offsets[0] = tbuf_from("offset", b.h_offset, sizeof other, 4);
        offsets[1] = tbuf_from("offset", other, sizeof other, 4);
        b.d.accumulate = 0;
        TEST_CUDA(cudaMemset(bh.p, 0, sizeof hash));
        for (int pass = 0; pass < 2; ++pass)
            for (int i = 0; i < CALLS; ++i) {
                fill_fresh(b.a.p, (int64_t)(b.a.bytes / 2), i, c.dtype, l);
                fill_fresh(b.b.part[0][0].p, (int64_t)(b.b.part[0][0].bytes / 2), i + CALLS,
                           c.dtype, l);
                b.d.expert_offset = (const int32_t*)offsets[i & 1].p;
                TEST_CUDA(cudaMemsetAsync(b.c.all.p, 0x22, b.c.all.bytes, test_now.stream));
                CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
                add_hash(&b.c.all, (unsigned long long*)bh.p + pass * CALLS + i, l);
            }
        tbuf_get(&bh, hash);
        check_hashes(hash[0], hash[1], CALLS);
        tbufs_free(TBUFS(&bh, &offsets[0], &offsets[1]));
        bufs_free(&b);
    }
}

typedef struct raise_args {
    uint64_t* fault;
    int32_t delay;
} raise_args;

/* Raises a stop fault some turns of a loop after it begins. */
MOE_KERNEL(32, 1) raise_kernel(MOE_ARG(raise_args) d)
{
    for (int i = 0; i < d.delay; ++i) MOE_SPIN();
    if (threadIdx.x == 0) moe_fault_raise(d.fault, MOE_FAULT_BAD_OFFSET, TEST_RANK, 1);
}

static void test_wgmma_stop(void)
{
    static const int rows[] = {4};
    trand r = trand_new(39);
    gemm_case c = normal_case(1, rows, 8, 8);
    gemm_bufs b;
    cudaStream_t other;
    if (!wgmma_here()) return;
    c.path = MOE_GEMM_PATH_WGMMA, c.tile = MOE_TILE_128x256;
    bufs_new(&b, &c, &r);
    TEST_CUDA(cudaStreamCreate(&other));
    for (int i = 0; i < (MOE_ON_HOST ? 300 : 5000); ++i) {
        const raise_args a = {(uint64_t*)b.fault.p, i % (MOE_ON_HOST ? 12 : 200)};
        const moe_launch_config l = moe_grid(1, 32, 0, other);
        tfault_put(&b.fault, MOE_FAULT_NONE, 0);
        tbuf_poison(&b.c.all);
        CHECK_STATUS(MOE_LAUNCH(raise_kernel, l, a), MOE_OK);
        CHECK_STATUS(moe_grouped_gemm(&b.d, test_now.stream), MOE_OK);
        TEST_CUDA(cudaDeviceSynchronize());
        if (tgrouped_untouched(&b.c)) continue;
        tfault_put(&b.fault, MOE_FAULT_NONE, 0);
        compare(&b, &c);
    }
    TEST_CUDA(cudaStreamDestroy(other));
    bufs_free(&b);
}

static void test_wgmma_path(void)
{
    moe_grouped_gemm_desc d = {};
    moe_gemm_plan p;
    if (!wgmma_here()) return;
    d.num_experts = 1, d.n = 4096, d.k = 1024, d.dtype = test_half();
    d.path = MOE_GEMM_PATH_WGMMA;
    for (int i = 0; i < 2; ++i) {
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        CHECK(p.path == MOE_GEMM_PATH_WGMMA && p.threads == 384, "path %d", p.path);
        d.tile = MOE_TILE_128x256;
    }
    d.tile = MOE_TILE_64x64;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_STATUS(MOE_ERR_CONFLICT, path));
    d.tile = MOE_TILE_128x256;
    d.path = MOE_GEMM_PATH_WMMA;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
    CHECK(p.path == MOE_GEMM_PATH_WMMA, "path %d", p.path);
    d.path = MOE_GEMM_PATH_WGMMA;
    d.row_div = 2; /* divides rows in order too, which tensor copies do not */
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_STATUS(MOE_ERR_CONFLICT, path));
    d.row_div = 0, d.grid_limit = 1; /* less than a cluster */
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_STATUS(MOE_ERR_CONFLICT, path));
    d.grid_limit = 0, d.b.major = MOE_MAJOR_MN, d.activation = MOE_ACTIVATION_SWIGLU;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
    d.gate_up = MOE_GATE_UP_INTERLEAVED; /* neighbouring columns: no tensor copy parts them */
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_STATUS(MOE_ERR_CONFLICT, path));
    d.gate_up = 0, d.activation = 0, d.b.major = 0;
    d.path = MOE_GEMM_PATH_WGMMA + 1;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_STATUS(MOE_ERR_OPTION, path));
    d.path = 0;
    d.workspace = &p, d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE - 1;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_STATUS(MOE_ERR_WORKSPACE, workspace_bytes));
}

static void gemm_wgmma(void)
{
    RUN(test_wgmma_rows);
    RUN(test_wgmma_steps);
    RUN(test_wgmma_gather);
    RUN(test_wgmma_one);
    RUN(test_wgmma_table);
    RUN(test_wgmma_many);
    RUN(test_wgmma_bits);
    RUN(test_wgmma_fresh);
    RUN(test_wgmma_stop);
    RUN(test_wgmma_path);
}

#endif
