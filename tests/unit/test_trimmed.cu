/* What a file with trimmed lists of kernels refuses, and by which field.
   nvcc -I. -arch=sm_90a tests/unit/test_trimmed.cu -o test_trimmed
   g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_trimmed.cu -o test_trimmed */
#include "tests/test.h"

#define MOE_GEMM_VARIANT_LIST(X, ...) X(f16_kn, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)
#define MOE_BLOCK_SPARSE_DTYPE_LIST(X) X(f16, MOE_FP16)
#define MOE_GATE_LIST(X)
#define MOE_GATE_RULES_LIST(X)
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
    d.op = MOE_BLOCK_SDD;
    d.a = address(0), d.b = address(1), d.c = address(2);
    d.m = d.n = d.k = 64;
    d.mask.row_offset = row_offset, d.mask.column_index = column_index;
    d.mask.rows = d.mask.columns = d.mask.block_rows = d.mask.block_columns = 64;
    d.mask.max_blocks = 1;
    CHECK_STATUS(moe_block_sparse(&d, test_now.stream), LACKS(dtype));
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_trimmed_gemm);
    RUN(test_trimmed_experts);
    RUN(test_trimmed_block_sparse);
    return test_end();
}
