/* refusals.h: what moe_grouped_gemm refuses.

     test_gemm_refusals  refuses each wrong field and overlap with its own status, and queues
                         nothing */
#ifndef MOE_TESTS_GEMM_REFUSALS_H
#define MOE_TESTS_GEMM_REFUSALS_H

#include "tests/unit/gemm/run.h"

TEST_REFUSED(calls_refuse, moe_grouped_gemm, moe_grouped_gemm_prepare, moe_grouped_gemm)

/* Requires that the plan and all calls refuse d alike. Runs nothing where the plan accepts d: its
   addresses may be of no buffer. */
static void refused(const moe_grouped_gemm_desc* d, moe_status want, const trefusal* at)
{
    moe_gemm_plan p;
    const moe_status s = moe_grouped_gemm_plan(d, &p);
    test_status_at(at, s, want, "moe_grouped_gemm_plan");
    if (s == MOE_OK) return;
    calls_refuse(d, want, at);
}

static void test_gemm_refusals(void)
{
    static const int rows[] = {12, 9, 20};
    trand r = trand_new(11);
    gemm_case c = normal_case(3, rows, 64, 40);
    gemm_bufs b;
    moe_grouped_gemm_desc good, d;
    tbuf table;
    void* address[3];
    c.gather = 2;
    c.a_rows = 30;
    c.bias = 1;
    c.activation = MOE_ACTIVATION_SWIGLU;
    c.gate_up = MOE_GATE_UP_SEPARATE;
    bufs_new(&b, &c, &r);
    for (int e = 0; e < 3; ++e) address[e] = (char*)b.c.all.p + e * 12 * 128;
    table = tbuf_from("table", address, sizeof address, 0);
    good = b.d;
    CHECK_STATUS(moe_grouped_gemm(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED_NUM_EXPERTS();
    REFUSED_EACH(num_rows, MOE_ERR_RANGE, num_rows, -1, MOE_GEMM_MAX_ROWS + 1);
    REFUSED_EACH(n, MOE_ERR_RANGE, n, 0, -8);
    REFUSED(d.n = 68, MOE_ERR_MULTIPLE, n);
    REFUSED(d.n = (1 << 28) + 8, MOE_ERR_RANGE, n);
    REFUSED_EACH(k, MOE_ERR_RANGE, k, 0, -8);
    REFUSED(d.k = 36, MOE_ERR_MULTIPLE, k);
    REFUSED_EACH(dtype, MOE_ERR_DTYPE, dtype, MOE_FP32, -1, 4);
    REFUSED((d.dtype = MOE_BF16, d.c_dtype = MOE_FP16), MOE_ERR_DTYPE, c_dtype);
    REFUSED_EACH(c_dtype, MOE_ERR_DTYPE, c_dtype, 4, -1);
    REFUSED((d.dtype = MOE_FP16, d.c_dtype = MOE_BF16), MOE_ERR_DTYPE, c_dtype);
    REFUSED_EACH(activation, MOE_ERR_OPTION, activation, MOE_ACTIVATION_RELU2 + 1, -1);
    REFUSED(d.alpha = 1.702f, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.alpha = NAN, MOE_ERR_CONFLICT, alpha);
    REFUSED(d.limit = 7, MOE_ERR_CONFLICT, limit);
#define CLAMPED d.activation = MOE_ACTIVATION_SWIGLU_CLAMPED
    REFUSED((CLAMPED, d.alpha = INFINITY), MOE_ERR_RANGE, alpha);
    REFUSED((CLAMPED, d.alpha = -INFINITY), MOE_ERR_RANGE, alpha);
    REFUSED((CLAMPED, d.alpha = NAN), MOE_ERR_RANGE, alpha);
    REFUSED((CLAMPED, d.alpha = -2.4e38f), MOE_ERR_RANGE, alpha); /* times log2(e): infinite */
    REFUSED((CLAMPED, d.limit = INFINITY), MOE_ERR_RANGE, limit);
    REFUSED((CLAMPED, d.limit = NAN), MOE_ERR_RANGE, limit);
    REFUSED((CLAMPED, d.limit = -1), MOE_ERR_RANGE, limit);
    REFUSED((CLAMPED, d.limit = -1e-40f), MOE_ERR_RANGE, limit);
    REFUSED(d.activation = MOE_ACTIVATION_GELU, MOE_ERR_CONFLICT, b); /* a second matrix */
    REFUSED_EACH(gate_up, MOE_ERR_OPTION, gate_up, 4, -1);
    REFUSED_EACH(a_major, MOE_ERR_OPTION, a_major, 3, -1);
    REFUSED_EACH(b.major, MOE_ERR_OPTION, b_major, 3, -1);
    REFUSED(d.row_div = -1, MOE_ERR_RANGE, row_div);
    REFUSED_EACH(gradient, MOE_ERR_OPTION, gradient, 2, -1);
    REFUSED(d.row_weight = (const float*)d.c, MOE_ERR_CONFLICT, row_weight);
    REFUSED(d.act = d.c, MOE_ERR_CONFLICT, act);
    REFUSED(d.dot = (float*)d.c, MOE_ERR_CONFLICT, dot);
    REFUSED(d.gradient = 1, MOE_ERR_CONFLICT, gradient); /* grouped_gradient.cuh takes it */
    REFUSED_EACH(tile, MOE_ERR_OPTION, tile, MOE_TILE_64x64 + 1, -1);
    REFUSED((d.tile = MOE_TILE_128x256, d.path = MOE_GEMM_PATH_WMMA, d.b.major = MOE_MAJOR_MN),
            MOE_ERR_CONFLICT, tile);
    REFUSED_EACH(a_rows, MOE_ERR_RANGE, a_rows, -1, (int64_t)1 << 31);
    REFUSED_EACH(a_stride, MOE_ERR_STRIDE, a_stride, 32, -40);
    REFUSED(d.a_stride = 44, MOE_ERR_ALIGN, a_stride);
    REFUSED((d.a_major = MOE_MAJOR_MN, d.row_index = 0), MOE_ERR_ALIGN, a_stride); /* 30 rows */
    REFUSED((d.a_major = MOE_MAJOR_MN, d.row_index = 0, d.a_stride = 24), MOE_ERR_STRIDE, a_stride);
    REFUSED_EACH(b.row_stride, MOE_ERR_STRIDE, b_stride, 32, -40, (int64_t)1 << 60);
    REFUSED(d.b.expert_stride = (int64_t)1 << 60, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.row_stride = 44, MOE_ERR_ALIGN, b_stride);
    REFUSED((d.b.major = MOE_MAJOR_MN, d.b.row_stride = 56), MOE_ERR_STRIDE, b_stride);
    REFUSED((d.b.major = MOE_MAJOR_MN, d.gate_up = 0, d.b.up = 0, d.b.row_stride = 64),
            MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.expert_stride = -64, MOE_ERR_STRIDE, b_stride);
    REFUSED(d.b.expert_stride = 64 * 40 + 4, MOE_ERR_ALIGN, b_stride);
    REFUSED_EACH(c_stride, MOE_ERR_STRIDE, c_stride, 56, -64, INT64_MAX - 7);
    REFUSED(d.c_stride = 68, MOE_ERR_ALIGN, c_stride);
    REFUSED((d.a_major = MOE_MAJOR_MN, d.a_rows = 32), MOE_ERR_CONFLICT, row_index);
    REFUSED(d.c_table = (void* const*)table.p, MOE_ERR_CONFLICT, c);
    REFUSED(d.b.table = (const void* const*)table.p, MOE_ERR_CONFLICT, b);
    REFUSED(d.b.up_table = (const void* const*)table.p, MOE_ERR_CONFLICT, b);
    REFUSED(d.a = 0, MOE_ERR_NULL, a);
    REFUSED(d.b.base = 0, MOE_ERR_NULL, b);
    REFUSED(d.b.up = 0, MOE_ERR_NULL, b);
    REFUSED(d.c = 0, MOE_ERR_NULL, c);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE - 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace = AT(d.workspace, 8), MOE_ERR_ALIGN, workspace);
    REFUSED_EACH(path, MOE_ERR_OPTION, path, -1, MOE_GEMM_PATH_WGMMA + 1);
    REFUSED(d.a = AT(d.a, 8), MOE_ERR_ALIGN, a);
    REFUSED(d.b.base = AT(d.b.base, 8), MOE_ERR_ALIGN, b);
    REFUSED(d.b.up = AT(d.b.up, 8), MOE_ERR_ALIGN, b);
    REFUSED((d.b.base = 0, d.b.table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, b);
    REFUSED((d.b.up = 0, d.b.up_table = (const void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, b);
    REFUSED(d.c = AT(d.c, 8), MOE_ERR_ALIGN, c);
    REFUSED((d.c = 0, d.c_table = (void* const*)AT(table.p, 4)), MOE_ERR_ALIGN, c);
    REFUSED(d.row_index = (const int32_t*)AT(d.row_index, 2), MOE_ERR_ALIGN, row_index);
    REFUSED(d.bias = AT(d.bias, 1), MOE_ERR_ALIGN, bias);
    REFUSED(d.expert_offset = (const int32_t*)AT(d.expert_offset, 2), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.accumulate = 2, MOE_ERR_OPTION, accumulate);
    REFUSED(d.batch_invariant = 2, MOE_ERR_OPTION, batch_invariant);
    REFUSED(d.grid_limit = -1, MOE_ERR_RANGE, grid_limit);
    {
        const moe_gemm_group list[] = {{2, 0, 41}, {0, 0, 0}};
        const uint32_t zero = 0;
        tbuf group = tbuf_from("group", list, sizeof list, 0);
        tbuf flags = tbuf_from("flags", &zero, 4, 0); /* of one row block */
        moe_grouped_gemm_args args = {};
        moe_gemm_plan p = {};
#define LISTED d.group = (const moe_gemm_group*)group.p, d.num_groups = 2, d.expert_offset = 0
        REFUSED((LISTED, d.num_groups = 0), MOE_ERR_RANGE, num_groups);
        REFUSED((LISTED, d.num_groups = -1), MOE_ERR_RANGE, num_groups);
        REFUSED((LISTED, d.num_groups = MOE_MAX_EXPERTS + 1), MOE_ERR_RANGE, num_groups);
        REFUSED((LISTED, d.group = 0), MOE_ERR_NULL, group);
        REFUSED((LISTED, d.num_rows = 0, d.group = 0), MOE_ERR_NULL, group);
        REFUSED((LISTED, d.expert_offset = good.expert_offset), MOE_ERR_CONFLICT, group);
        REFUSED((LISTED, d.c = 0, d.c_table = (void* const*)table.p), MOE_ERR_CONFLICT, c_table);
        REFUSED((LISTED, d.group = (const moe_gemm_group*)AT(group.p, 2)), MOE_ERR_ALIGN, group);
        REFUSED((LISTED, d.group = (const moe_gemm_group*)AT(d.c, 16)), MOE_ERR_OVERLAP, c);
        REFUSED((LISTED, d.done = (uint32_t*)AT(group.p, 20)), MOE_ERR_OVERLAP, done);
        REFUSED(d.ready = (const uint32_t*)AT(flags.p, 2), MOE_ERR_ALIGN, ready);
        REFUSED(d.done = (uint32_t*)AT(flags.p, 2), MOE_ERR_ALIGN, done);
        REFUSED((d.ready = (const uint32_t*)flags.p, d.done = (uint32_t*)flags.p), MOE_ERR_OVERLAP,
                done);
        REFUSED(d.done = (uint32_t*)d.a, MOE_ERR_OVERLAP, done);
        REFUSED(d.done = (uint32_t*)AT(d.c, 41 * 64 * 2 - 4), MOE_ERR_OVERLAP, done);
        REFUSED(d.ready = (const uint32_t*)AT(d.c, 41 * 64 * 2 - 4), MOE_ERR_OVERLAP, c);
        REFUSED((d.done = (uint32_t*)flags.p, d.n = 1 << 27), MOE_ERR_RANGE, n);
        d = good;
        LISTED;
        d.ready = (const uint32_t*)flags.p;
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        CHECK_STATUS(moe_gemm_tile_resolve(&d, &args), MOE_STATUS(MOE_ERR_CONFLICT, ready));
        d.ready = 0, d.done = (uint32_t*)flags.p;
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        CHECK_STATUS(moe_gemm_tile_resolve(&d, &args), MOE_STATUS(MOE_ERR_CONFLICT, done));
        CHECK(args.a == 0, "a refused descriptor filled in arguments");
#undef LISTED
        CHECK(tbuf_holds(&flags, &zero) && tbuf_holds(&group, list), "a refused call counted");
        tbufs_free(TBUFS(&group, &flags));
    }
    REFUSED((d.activation = 0, d.gate_up = 0, d.b.up = 0, d.c_dtype = MOE_FP32, d.pre = b.pre.p),
            MOE_ERR_CONFLICT, pre);
    REFUSED(d.pre = AT(b.pre.p, 8), MOE_ERR_ALIGN, pre);
    REFUSED(d.pre = d.c, MOE_ERR_OVERLAP, pre);
    REFUSED(d.pre_stride = 2 * 64 - 8, MOE_ERR_STRIDE, pre_stride);
    REFUSED(d.pre_stride = 2 * 64 + 4, MOE_ERR_ALIGN, pre_stride);
    REFUSED_RANK_AND_FAULT();
    REFUSED(d.c = (void*)d.a, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = AT(d.a, 30 * 40 * 2 - 16), MOE_ERR_OVERLAP, c); /* its last 16 bytes */
    REFUSED(d.c = (void*)d.b.base, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = AT(d.b.base, 3 * 64 * 40 * 2 - 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.c = (void*)d.b.up, MOE_ERR_OVERLAP, c);
    REFUSED(d.c = DOWN_TO(AT(d.bias, 3 * 2 * 64 * 2 - 2), 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.c = DOWN_TO(AT(d.row_index, 40 * 4), 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.c = DOWN_TO(d.expert_offset, 16), MOE_ERR_OVERLAP, c);
    REFUSED(d.fault = (uint64_t*)d.a, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.b.base, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)d.b.up, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.bias, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.row_index, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)DOWN_TO(d.expert_offset, 8), MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)AT(d.c, 41 * 64 * 2 - 8), MOE_ERR_OVERLAP, fault);
    { /* last rows of strided buffers */
        char* const far = TEST_FAR;
        moe_gemm_plan p = {};
        REFUSED((d.a = far, d.a_stride = 48, d.c = far + 29 * 48 * 2 + 64), MOE_ERR_OVERLAP, c);
        d.c = far + 29 * 48 * 2 + 80; /* where A ends */
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        REFUSED((d.row_index = 0, d.a_major = MOE_MAJOR_MN, d.a = far, d.a_stride = 48,
                 d.c = far + 39 * 48 * 2 + 48),
                MOE_ERR_OVERLAP, c);
        d.c = far + 39 * 48 * 2 + 64; /* 30 of A's columns, and the next multiple of 16 bytes */
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        for (int up = 0; up < 2; ++up) { /* 64 rows an expert, 56 apart, experts 4096 apart */
            const int64_t end = (2 * 4096 + 63 * 56 + 40) * 2;
            REFUSED((d.b.row_stride = 56, d.b.expert_stride = 4096,
                     d.b.base = up ? far + (1 << 20) : far, d.b.up = up ? far : far + (1 << 20),
                     d.c = far + end - 16),
                    MOE_ERR_OVERLAP, c);
            d.c = far + end;
            CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        }
        REFUSED((d.c = far, d.c_stride = 80, d.a = far + (40 * 80 + 56) * 2), MOE_ERR_OVERLAP, c);
        REFUSED((d.c = far, d.c_stride = 80, d.fault = (uint64_t*)(far + (40 * 80 + 60) * 2)),
                MOE_ERR_OVERLAP, fault);
        REFUSED((d.c_dtype = MOE_FP32, d.c = far, d.c_stride = 80,
                 d.fault = (uint64_t*)(far + (40 * 80 + 62) * 4)),
                MOE_ERR_OVERLAP, fault);
        d.fault = (uint64_t*)(far + (40 * 80 + 64) * 4); /* where C ends */
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        REFUSED((d.bias = far, d.c = far + 3 * 2 * 64 * 2 - 16), MOE_ERR_OVERLAP, c);
    }
    { /* without rows only the offsets are required */
        moe_gemm_plan p = {};
        REFUSED((d.num_rows = 0, d.expert_offset = 0), MOE_ERR_NULL, expert_offset);
        REFUSED((d.num_rows = 0, d.expert_offset = (const int32_t*)AT(d.expert_offset, 2)),
                MOE_ERR_ALIGN, expert_offset);
        REFUSED((d.num_rows = 0, d.fault = (uint64_t*)AT(d.fault, 4)), MOE_ERR_ALIGN, fault);
        d = good;
        d.num_rows = 0;
        d.a = d.b.base = d.b.up = d.c = 0;
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
        d.c = (void*)good.a; /* neither is read or written */
        d.a = good.a;
        CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
    }
    /* the tables are read while C and the fault word are written */
    REFUSED((d.b.base = 0, d.b.table = (const void* const*)AT(d.c, 64)), MOE_ERR_OVERLAP, c);
    REFUSED((d.b.up = 0, d.b.up_table = (const void* const*)AT(d.c, 64)), MOE_ERR_OVERLAP, c);
    REFUSED((d.b.base = 0, d.b.table = (const void* const*)d.fault), MOE_ERR_OVERLAP, fault);
    REFUSED((d.c = 0, d.c_table = (void* const*)d.fault), MOE_ERR_OVERLAP, fault);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.c.all, 0), "a refused call wrote c");
    CHECK(tweights_same(&b.b) && tbuf_holds(&b.bias, b.h_bias), "or an input");
    CHECK(tbuf_holds(&table, address), "or a table");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    tbuf_free(&table);
    run_bufs(&b, &c);
}

static void gemm_refusals(void) { RUN(test_gemm_refusals); }

#endif
