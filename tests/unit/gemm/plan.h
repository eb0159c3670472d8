/* plan.h: the plan, the table of variants, and a kernel of one's own that calls moe_gemm_tile.

     test_gemm_plan        checks that the plan is what a launch takes, for any shape
     test_gemm_table       checks that the table says of each variant what its launch takes
     test_gemm_rule        which path and tile the rule takes, on both sides of each of its bounds
     test_gemm_own_kernel  computes whole products tile by tile; a thread block an expert, which
                           reads the offsets itself */
#ifndef MOE_TESTS_GEMM_PLAN_H
#define MOE_TESTS_GEMM_PLAN_H

#include "tests/unit/gemm/run.h"

static void test_gemm_plan(void)
{
    static const int sizes[] = {8, 72, 512, 7168}, Es[] = {1, 7, 256, MOE_MAX_EXPERTS};
    static const int rows[] = {0, 1, 100, 8192, 1000000};
    for (int i = 0; i < 4 * 4 * 5 * 2 * 5 * 2; ++i) {
        const int tile = i / 160 % 5;
        moe_grouped_gemm_desc d = {};
        moe_gemm_plan p = {};
        moe_status want;
        test_poison(&p, sizeof p);
        d.n = sizes[i % 4], d.k = 64;
        d.num_experts = Es[i / 4 % 4], d.num_rows = rows[i / 16 % 5];
        d.activation = i / 80 % 2 ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
        d.tile = tile;
        d.a = d.b.base = d.c = (void*)(uintptr_t)4096; /* addresses only, nothing runs */
        d.b.base = (void*)((uintptr_t)1 << 44);
        d.c = (void*)((uintptr_t)1 << 45);
        d.expert_offset = (const int32_t*)((uintptr_t)1 << 46);
        d.dtype = i / 800 ? MOE_FP16 : MOE_BF16;
        want = test_gemm_status(d.dtype, tile);
        if (CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), want) && want == MOE_OK)
            test_plan(&p, d.dtype, tile);
    }
    {
        static const int m[] = {0, 128, 128, 32, 64}, n[] = {0, 256, 128, 128, 64};
        for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
            moe_grouped_gemm_desc d = {};
            moe_gemm_plan p = {};
            d.num_experts = 1, d.n = d.k = 8;
            d.tile = tile, d.dtype = MOE_FP16;
            if (test_gemm_status(MOE_FP16, tile) != MOE_OK) continue;
            CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
            CHECK(p.tile_m == m[tile] && p.tile_n == n[tile], "the name says %dx%d", m[tile],
                  n[tile]);
        }
        CHECK_STATUS(moe_grouped_gemm_plan(0, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    }
    for (int limit = 1; limit < 12; ++limit)
        for (int tile = MOE_TILE_128x256; tile <= MOE_TILE_64x64; ++tile) {
            moe_grouped_gemm_desc d = {};
            moe_gemm_plan p = {};
            d.num_experts = 1, d.n = d.k = 4096, d.dtype = MOE_FP16;
            d.tile = tile, d.grid_limit = limit;
            if (test_gemm_status(MOE_FP16, tile) != MOE_OK) continue;
            CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
            CHECK(p.blocks <= limit && p.blocks >= 1, "%d blocks of %d", p.blocks, limit);
        }
    CHECK(strcmp(moe_gemm_path_name(MOE_GEMM_PATH_WMMA), "wmma") == 0 &&
              strcmp(moe_gemm_path_name(MOE_GEMM_PATH_WGMMA), "wgmma") == 0 &&
              strcmp(moe_gemm_path_name(99), "none") == 0,
          "names of the paths");
}

static void test_gemm_table(void)
{
    int rows = 0;
    for (const moei_variant* v = moei_gemm_variants; v->kernel; ++v, ++rows) {
        const moe_gemm_shape f = v->shape;
        if (v->path == MOE_GEMM_PATH_WGMMA) {
            CHECK(v->smem >= moei_ring_bytes(f) && f.threads == MOEI_WGMMA_THREADS &&
                      f.tile_k == 64 && f.stages == MOEI_WGMMA_STAGES,
                  "%s: %d bytes", v->name, (int)v->smem);
            continue;
        }
        CHECK(v->smem == moei_ring_bytes(f) + moei_staging_bytes(f) &&
                  v->path == MOE_GEMM_PATH_WMMA,
              "%s: %d bytes, path %d", v->name, (int)v->smem, v->path);
        CHECK(f.threads == 32 * f.warps_m * f.warps_n && f.wm * f.warps_m == f.tile_m &&
                  f.wn * f.warps_n == f.tile_n && f.threads * 8 / f.tile_k == 32,
              "%s: a shape that contradicts itself", v->name);
        CHECK(v->tile == MOE_TILE_128x256 ||
                  moei_variant_find(moei_gemm_variants, v->tile, f.dtype, f.a_major, f.b_major) == v,
              "%s: another kernel has its place", v->name);
    }
    CHECK(rows > 0 && rows % 4 == 0, "%d kernels", rows);
}

/* What the rule takes, with k-major operands in order, on 132 multiprocessors. */
typedef struct rule_case {
    int wgmma, experts, rows, n; /* rows: of an expert; wgmma 0: without that path */
    int gated, batch, path, tile; /* gated 2: as a gradient, whose B has n rows */
} rule_case;

static void test_gemm_rule(void)
{
    enum { NO = MOE_GEMM_PATH_WMMA, YES = MOE_GEMM_PATH_WGMMA };
    static const rule_case cases[] = {
        /* tiles of 32 x 128 that all run at one time, 264, or one more */
        {1, 1, 264 * 32, 128, 0, 0, NO, MOE_TILE_32x128},
        {1, 1, 264 * 32 + 1, 128, 0, 0, NO, MOE_TILE_128x128},
        {1, 1, 132 * 32, 256, 0, 0, NO, MOE_TILE_32x128},
        {1, 1, 132 * 32 + 1, 256, 0, 0, YES, MOE_TILE_128x256},
        {1, 1, 66 * 32, 256, 1, 0, NO, MOE_TILE_32x128},
        {1, 1, 66 * 32 + 1, 256, 1, 0, YES, MOE_TILE_128x256},
        {1, 1, 132 * 32, 256, 2, 0, NO, MOE_TILE_32x128},
        {1, 1, 132 * 32 + 1, 256, 2, 0, YES, MOE_TILE_128x256},
        {1, 264, 1, 128, 0, 0, NO, MOE_TILE_32x128},
        {1, 265, 1, 136, 0, 0, YES, MOE_TILE_128x256},
        /* the columns of a tile */
        {1, 1, 9000, 136, 0, 0, YES, MOE_TILE_128x256},
        {1, 1, 9000, 72, 1, 0, YES, MOE_TILE_128x256},
        {1, 1, 9000, 72, 0, 0, NO, MOE_TILE_128x128},
        {1, 1, 9000, 64, 0, 0, NO, MOE_TILE_64x64},
        /* without wgmma: tiles that fill the device, rows of an expert */
        {0, 1, 132 * 128, 136, 0, 0, NO, MOE_TILE_128x256},
        {0, 1, 131 * 128, 136, 0, 0, NO, MOE_TILE_128x128},
        {0, 128, 32, 1536, 0, 0, NO, MOE_TILE_32x128},
        {0, 128, 33, 1536, 0, 0, NO, MOE_TILE_128x256},
        {0, 512, 64, 128, 0, 0, NO, MOE_TILE_32x128},
        {0, 512, 65, 128, 0, 0, NO, MOE_TILE_128x128},
        /* batch_invariant: as for many rows */
        {1, 1, 1, 136, 0, 1, YES, MOE_TILE_128x256},
        {0, 1, 1, 136, 0, 1, NO, MOE_TILE_128x256},
        {1, 1, 1, 128, 0, 1, NO, MOE_TILE_128x128},
        {1, 1, 1, 64, 0, 1, NO, MOE_TILE_64x64},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
        const rule_case c = cases[i];
        const moei_variant* v = moei_gemm_variants;
        moe_grouped_gemm_desc d = {};
        d.num_experts = c.experts, d.num_rows = c.experts * c.rows, d.n = c.n, d.k = 64;
        d.activation = c.gated ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_NONE;
        d.batch_invariant = c.batch, d.gradient = c.gated == 2;
        while (v->shape.dtype != MOE_BF16 || v->shape.a_major != MOE_MAJOR_K ||
               v->shape.b_major != MOE_MAJOR_K || (v->path == MOE_GEMM_PATH_WGMMA && !c.wgmma) ||
               !moei_gemm_suits(v, &d, 132))
            ++v;
        CHECK(v->path == c.path && v->tile == c.tile, "case %d: path %d tile %d, not %d %d", (int)i,
              v->path, v->tile, c.path, c.tile);
    }
}

#define OWN_LIST(X)                                                                                \
    X(64x64, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K)                                                   \
    X(64x64, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_MN)                                                 \
    X(32x128, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN)                                                 \
    X(64x64, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_K)

typedef struct own_args {
    moe_grouped_gemm_args d;
    int32_t tile, dtype, a_major, b_major, tile_rows, column_tiles;
} own_args;

MOE_KERNEL(256, 1) own_kernel(MOE_ARG(own_args) a)
{
    MOE_SHARED_DYNAMIC(shared);
    const int e = (int)blockIdx.x;
    const int begin = a.d.expert_offset[e], end = a.d.expert_offset[e + 1];
    const int first = a.a_major == MOE_MAJOR_MN ? begin / 8 * 8 : begin;
    for (int row = first; begin < end && row < end; row += a.tile_rows)
        for (int column = 0; column < a.column_tiles; ++column) {
            const moe_tile_position t = {e, begin, end, row, column};
#define OWN_TILE(name, dt, am, bm)                                                                 \
    if (a.tile == MOE_TILE_##name && a.dtype == dt && a.a_major == am && a.b_major == bm &&        \
        MOEI_CODE_HERE(dt == MOE_BF16 ? 80 : 75, MOEI_CODE_ANY))                                   \
        moe_gemm_tile(&a.d, t, shared, moe_gemm_shape_of(MOE_GEMM_SHAPE_##name, dt, am, bm));
            OWN_LIST(OWN_TILE)
#undef OWN_TILE
        }
}

static void test_gemm_own_kernel(void)
{
    static const struct {
        int tile, dtype, a_major, b_major;
    } variant[] = {
#define OWN_ROW(name, dt, am, bm) {MOE_TILE_##name, dt, am, bm},
        OWN_LIST(OWN_ROW)
#undef OWN_ROW
    };
    static const int some[] = {70, 0, 9, 33};
    trand r = trand_new(22);
    for (int v = 0; v < 4; ++v)
        for (int i = 0; i < 6; ++i) {
            gemm_case c = normal_case(4, some, i & 1 ? 72 : 136, i & 2 ? 40 : 136);
            gemm_bufs b;
            own_args a = {};
            moe_gemm_plan p = {};
            moe_launch_config l;
            if (test_gemm_status(variant[v].dtype, variant[v].tile) != MOE_OK) continue;
            randomise(&c, &r);
            c.tile = variant[v].tile, c.dtype = variant[v].dtype;
            c.a_major = variant[v].a_major, c.b_major = variant[v].b_major;
            c.c_dtype = i & 1 ? MOE_FP32 : c.dtype;
            if (i >= 4 && c.a_major == MOE_MAJOR_K) {
                c.gather = 3;
                c.a_rows = 50;
                c.none = c.bad = 10;
            }
            bufs_new(&b, &c, &r);
            CHECK_STATUS(moe_gemm_tile_resolve(&b.d, &a.d), MOE_OK);
            CHECK_STATUS(moe_grouped_gemm_plan(&b.d, &p), MOE_OK);
            a.tile = c.tile, a.dtype = c.dtype, a.a_major = c.a_major, a.b_major = c.b_major;
            a.tile_rows = p.tile_m;
            a.column_tiles = (c.n * (is_gated(&c) ? 2 : 1) + p.tile_n - 1) / p.tile_n;
#define OWN_SMEM(name, dt, am, bm)                                                                 \
    if (c.tile == MOE_TILE_##name && c.a_major == am && c.b_major == bm)                           \
        l = moe_grid(c.E, p.threads,                                                               \
                     moe_gemm_tile_smem(moe_gemm_shape_of(MOE_GEMM_SHAPE_##name, dt, am, bm)),     \
                     test_now.stream);
            OWN_LIST(OWN_SMEM)
#undef OWN_SMEM
            CHECK_STATUS(MOE_LAUNCH(own_kernel, l, a), MOE_OK);
            compare(&b, &c);
            bufs_free(&b);
        }
    {
        moe_grouped_gemm_desc d = {};
        moe_grouped_gemm_args a, was;
        memset(&a, 0xab, sizeof a);
        was = a;
        CHECK_STATUS(moe_gemm_tile_resolve(0, &a), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_gemm_tile_resolve(&d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_gemm_tile_resolve(&d, &a), MOE_STATUS(MOE_ERR_RANGE, num_experts));
        CHECK(!memcmp(&a, &was, sizeof a), "a refused descriptor filled in arguments");
    }
}

static void gemm_plan(void)
{
    RUN(test_gemm_plan);
    RUN(test_gemm_table);
    RUN(test_gemm_rule);
    RUN(test_gemm_own_kernel);
}

#endif
