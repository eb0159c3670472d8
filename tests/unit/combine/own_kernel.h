/* own_kernel.h: the public device functions of combine, in kernels of the test.

   test_combine_own_kernel   moe_combine_row and moe_combine_token on grids of the test's own;
                             moe_combine_resolve */
#ifndef MOE_TESTS_COMBINE_OWN_KERNEL_H
#define MOE_TESTS_COMBINE_OWN_KERNEL_H

#include "tests/unit/combine/case.h"

typedef struct own_args {
    moe_combine_args d;
    char* rows; /* [T, K, H] in rows_dtype */
    int32_t first, step;
} own_args;

/* Copies the row of each slot; a slot without a row gets zeros. */
MOE_KERNEL(64, 1) own_rows_kernel(MOE_ARG(own_args) a)
{
    const int bytes = a.d.hidden * (a.d.rows_dtype == MOE_FP32 ? 4 : 2);
    const int64_t slots = (int64_t)a.d.num_tokens * a.d.top_k;
    for (int64_t s = blockIdx.x; s < slots; s += gridDim.x) {
        const char* row = moe_combine_row(&a.d, s);
        for (int i = (int)threadIdx.x; i < bytes; i += (int)blockDim.x)
            a.rows[s * bytes + i] = row ? row[i] : 0;
    }
}

/* Writes tokens first, first + step, ... of y. */
MOE_KERNEL(96, 1) own_tokens_kernel(MOE_ARG(own_args) a)
{
    MOE_SHARED(moe_combine_shared, shared);
    MOE_SHARED_DYNAMIC(source);
    for (int64_t t = a.first + (int64_t)blockIdx.x * a.step; t < a.d.num_tokens;
         t += (int64_t)gridDim.x * a.step) {
        if (a.d.rows_dtype == MOE_FP32)
            moe_combine_token(&a.d, t, &shared, (moe_combine_source*)source, MOE_FP32);
        else if (a.d.rows_dtype == MOE_BF16)
            moe_combine_token(&a.d, t, &shared, (moe_combine_source*)source, MOE_BF16);
        __syncthreads();
    }
}

/* Runs own_rows_kernel: every slot's row must be the buffer's, byte for byte. */
static void check_own_rows(own_args a, const combine_bufs* b, const combine_case* c)
{
    const int64_t slots = (int64_t)c->T * c->K;
    const int64_t row_bytes = c->H * moe_dtype_bytes(c->rows_dtype);
    const int64_t stride = (c->H + c->row_pad) * moe_dtype_bytes(c->rows_dtype);
    tbuf rows = tbuf_new("rows", (size_t)(slots * row_bytes), 0);
    moe_launch_config l = moe_grid(5, 64, 0, test_now.stream);
    char* got;
    int wrong = 0;
    a.rows = (char*)rows.p;
    CHECK_STATUS(MOE_LAUNCH(own_rows_kernel, l, a), MOE_OK);
    got = (char*)tbuf_copy(&rows);
    for (int64_t s = 0; s < slots; ++s) {
        const moe_place p = b->h_place[s];
        const int live = p.buffer >= 0 && p.buffer < b->count && p.row >= 0 && p.row < c->rows;
        for (int64_t k = 0; k < row_bytes; ++k)
            wrong += got[s * row_bytes + k] !=
                     (live ? ((char*)b->row[p.buffer])[p.row * stride + k] : 0);
    }
    CHECK(wrong == 0, "%d bytes of rows", wrong);
    free(got);
    tbuf_free(&rows);
}

static void test_combine_own_kernel(void)
{
    trand r = trand_new(16);
    for (int i = 0; i < 6; ++i) {
        combine_case c = normal_case(23, i & 1 ? 64 : 37, i == 2 ? 9 : 3);
        combine_bufs b;
        own_args a;
        c.rows_dtype = i & 2 ? MOE_FP32 : MOE_BF16;
        c.residual = i % 3;
        c.shared = i % 3;
        c.bad = i & 1 ? 20 : 0;
        c.row_pad = i == 4 ? 3 : 0;
        c.buffers = i == 5 ? 0 : 7;
        bufs_new(&b, &c, &r);
        CHECK_STATUS(moe_combine_resolve(&b.d, &a.d), MOE_OK);
        a.rows = 0;
        a.first = a.step = 0;
        check_own_rows(a, &b, &c);
        for (a.first = 0, a.step = 2; a.first < a.step; ++a.first) {
            moe_launch_config l =
                moe_grid(4, 96, (size_t)moe_combine_sources(&a.d) * sizeof(moe_combine_source),
                         test_now.stream);
            CHECK_STATUS(MOE_LAUNCH(own_tokens_kernel, l, a), MOE_OK);
        }
        compare(&b, &c);
        bufs_free(&b);
    }
    {
        moe_combine_desc d;
        moe_combine_args a, was;
        memset(&d, 0, sizeof d);
        memset(&a, 0xab, sizeof a);
        was = a;
        CHECK_STATUS(moe_combine_resolve(0, &a), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_combine_resolve(&d, 0), MOE_STATUS(MOE_ERR_NULL, desc));
        CHECK_STATUS(moe_combine_resolve(&d, &a), MOE_STATUS(MOE_ERR_RANGE, hidden));
        CHECK(!memcmp(&a, &was, sizeof a), "a refused descriptor filled in arguments");
    }
}

static void combine_own_kernel(void) { RUN(test_combine_own_kernel); }

#endif
