/* test_trimmed.cu: what a file with trimmed lists of kernels refuses, and by which field.

     nvcc -I. -arch=sm_90a tests/unit/test_trimmed.cu -o test_trimmed
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_trimmed.cu -o test_trimmed

   test_trimmed_gemm          grouped GEMM: dtype and majors that the list lacks
   test_trimmed_experts       the same of w1 and w2
   test_trimmed_block_sparse  block-sparse product: dtype
   test_trimmed_router        bf16 split of two terms, which hold 16 bits of a weight */
#include "tests/test.h"

#define MOE_GEMM_VARIANT_LIST(X, ...) X(f16_kn, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)
#define MOE_BLOCK_SPARSE_DTYPE_LIST(X) X(f16, MOE_FP16)
#define MOE_GATE_LIST(X)
#define MOE_GATE_RULES_LIST(X)
#define MOE_ROUTER_BF16_TERMS 2
#include "moe/moe.cuh"

#define LACKS(field) MOE_STATUS(MOE_ERR_NOT_COMPILED, field)

/* Addresses that no kernel sees: every call here is refused, or only planned. */
static void* address(int i) { return (void*)((uintptr_t)(i + 1) << 30); }

static void test_trimmed_gemm(void)
{
    moe_grouped_gemm_desc d;
    moe_gemm_plan p;
    char text[MOE_STATUS_TEXT];
    memset(&d, 0, sizeof d);
    d.a = address(0), d.b.base = address(1), d.c = address(2);
    d.num_experts = 1, d.num_rows = 16, d.n = d.k = 64;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), LACKS(dtype));
    CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), LACKS(dtype));
    d.dtype = MOE_FP16;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), LACKS(b_major));
    d.b.major = MOE_MAJOR_MN;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), MOE_OK);
    d.a_major = MOE_MAJOR_MN;
    CHECK_STATUS(moe_grouped_gemm_plan(&d, &p), LACKS(a_major));
    CHECK_STATUS(moe_grouped_gemm(&d, test_now.stream), LACKS(a_major));
    d.n = 60;
    CHECK(!strcmp(moe_status_describe(moe_grouped_gemm_plan(&d, &p), text),
                  "n: not a multiple of 8 (or of the block)"),
          "%s", text);
}

static void test_trimmed_experts(void)
{
    moe_experts_desc d;
    moe_gemm_plan up, down;
    char text[MOE_STATUS_TEXT];
    memset(&d, 0, sizeof d);
    d.x = address(0), d.w1.base = address(1), d.w2.base = address(2);
    d.act = address(3), d.rows = address(4);
    d.num_rows = 16, d.hidden = d.intermediate = 64, d.num_experts = 1;
    CHECK(!strcmp(moe_status_describe(moe_experts_plan(&d, &up, &down), text),
                  "dtype: not in the list of kernels that this file was compiled with"),
          "%s", text);
    d.dtype = MOE_FP16;
    d.w1.major = MOE_MAJOR_MN;
    CHECK_STATUS(moe_experts_plan(&d, &up, &down), LACKS(w2));
    d.w2.major = MOE_MAJOR_MN;
    CHECK_STATUS(moe_experts_plan(&d, &up, &down), MOE_OK);
    d.w1.major = MOE_MAJOR_K;
    CHECK_STATUS(moe_experts(&d, test_now.stream), LACKS(w1));
}

static void test_trimmed_block_sparse(void)
{
    moe_block_sparse_desc d;
    int32_t row_offset[2] = {0, 1}, column_index[1] = {0};
    memset(&d, 0, sizeof d);
    d.op = MOE_BLOCK_SPARSE_SDD;
    d.a = address(0), d.b = address(1), d.c = address(2);
    d.m = d.n = d.k = 64;
    d.mask.row_offset = row_offset, d.mask.column_index = column_index;
    d.mask.rows = d.mask.columns = d.mask.block_rows = d.mask.block_columns = 64;
    d.mask.max_blocks = 1;
    CHECK_STATUS(moe_block_sparse(&d, test_now.stream), LACKS(dtype));
}

/* Two terms hold 16 bits of a weight: those are exact, the bits below are rounded off. */
static void test_trimmed_router(void)
{
    enum { T = 260, H = 72, E = 24 };
    moe_device dev;
    trand r = trand_new(1);
    if (moe_device_query(&dev) != MOE_OK || dev.major < 8) return;
    for (int way = 0; way < 4; ++way) {
        const int small = way & 1, dtype = way & 2 ? MOE_FP16 : MOE_BF16;
        uint16_t x[T * H];
        float w[E * H], got[T * E];
        tbuf bx, bw, logits;
        moe_router_desc d;
        moe_router_prepared p;
        int wrong = 0, nonzero = 0;
        if (moei_bf16_split_variant(small, dtype)->smem > (size_t)dev.smem_block) continue;
        logits = tbuf_new("logits", sizeof got, 16);
        for (int i = 0; i < T * H; ++i) moe_store(x, i, dtype, (float)trand_int(&r, -1, 1));
        for (int i = 0; i < E * H; ++i) w[i] = (float)trand_int(&r, -32768, 32768) / 256;
        for (int h = 0; h < H; ++h) moe_store(x, h, dtype, h == 5);
        w[7 * H + 5] = 1 + ldexpf(1, -9) + ldexpf(1, -20);
        bx = tbuf_from("x", x, sizeof x, 16);
        bw = tbuf_from("router", w, sizeof w, 16);
        memset(&d, 0, sizeof d);
        d.x = bx.p, d.x_dtype = dtype;
        d.router = bw.p, d.router_dtype = MOE_FP32;
        d.logits = (float*)logits.p;
        d.num_tokens = T, d.hidden = H, d.num_experts = E;
        memset(&p, 0, sizeof p);
        CHECK_STATUS(moe_router_prepare(&d, &p), MOE_OK);
        CHECK(p.path == MOE_ROUTER_BF16_SPLIT_LARGE || p.path == MOE_ROUTER_BF16_SPLIT_SMALL, "%d",
              p.path);
        CHECK_STATUS(moei_bf16_split_prepare(&p.gemm.launch, &p.args, small), MOE_OK);
        CHECK_STATUS(moe_router_run(&p, test_now.stream), MOE_OK);
        tbuf_get(&logits, got);
        CHECK(got[7] == 1 + ldexpf(1, -9), "%.9g", got[7]);
        w[7 * H + 5] = 1 + ldexpf(1, -9);
        for (int t = 0; t < T; ++t)
            for (int e = 0; e < E; ++e) {
                double sum = 0;
                for (int h = 0; h < H; ++h)
                    sum += moe_load(x, t * H + h, dtype) * (double)w[e * H + h];
                if (e == 7 && t > 0) continue; /* sums with the rounded weight are rounded too */
                wrong += got[t * E + e] != sum;
                nonzero += sum != 0;
            }
        CHECK(wrong == 0 && nonzero > T * E / 2, "way %d: %d wrong", way, wrong);
        tbuf_free(&bx), tbuf_free(&bw), tbuf_free(&logits);
    }
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_trimmed_gemm);
    RUN(test_trimmed_experts);
    RUN(test_trimmed_block_sparse);
    RUN(test_trimmed_router);
    return test_end();
}
