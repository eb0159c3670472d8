/* own_kernel.h: moe_add_row_atomic in a kernel of the test

   test_scatter_foreign_kernel  called by warps and by a thread block */
#ifndef MOE_TESTS_COMBINE_SCATTER_OWN_KERNEL_H
#define MOE_TESTS_COMBINE_SCATTER_OWN_KERNEL_H

#include "tests/unit/combine_scatter/case.h"

/* Warp w adds row w to y[0], then the whole block adds row 0 to y[1]. */
typedef struct foreign_args {
    void* y;
    const void* rows;
    int y_dtype, rows_dtype, columns, stride;
} foreign_args;

MOE_KERNEL(128, 1) foreign_kernel(MOE_ARG(foreign_args) a)
{
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int yb = a.y_dtype == MOE_FP32 ? 4 : 2, rb = a.rows_dtype == MOE_FP32 ? 4 : 2;
    moe_add_row_atomic(a.y, a.y_dtype, (const char*)a.rows + warp * a.stride * rb, a.rows_dtype,
                       (float)(warp + 1), a.columns, lane, 32);
    moe_add_row_atomic((char*)a.y + a.stride * yb, a.y_dtype, a.rows, a.rows_dtype, 0.5f, a.columns,
                       (int)threadIdx.x, (int)blockDim.x);
}

static void test_scatter_foreign_kernel(void)
{
    trand r = trand_new(12);
    for (int i = 0; i < 27; ++i) {
        const int columns = i < 9 ? 328 : i < 18 ? 1 : 77, stride = i < 9 ? 328 : 79;
        const int from = MOE_FP32 + i % 3, to = MOE_FP32 + i / 3 % 3;
        void *rows = test_host(4 * stride * 4), *y0 = test_host(2 * stride * 4), *y;
        tbuf b_rows, b_y;
        foreign_args a;
        moe_launch_config l;
        int wrong = 0;
        trand_fill_int(&r, rows, 4 * stride, from, -4, 4);
        trand_fill_int(&r, y0, 2 * stride, to, -4, 4);
        b_rows = tbuf_from("rows", rows, (size_t)(4 * stride * moe_dtype_bytes(from)), 0);
        b_y = tbuf_from("y", y0, (size_t)(2 * stride * moe_dtype_bytes(to)), 0);
        a.y = b_y.p, a.rows = b_rows.p;
        a.y_dtype = to, a.rows_dtype = from, a.columns = columns, a.stride = stride;
        l = moe_grid(1, 128, 0, test_now.stream);
        CHECK_STATUS(MOE_LAUNCH(foreign_kernel, l, a), MOE_OK);
        y = tbuf_copy(&b_y);
        for (int h = 0; h < stride; ++h) { /* all of it exact, halves too */
            float sum = moe_load(y0, h, to), half = moe_load(y0, stride + h, to);
            for (int w = 0; w < 4 && h < columns; ++w)
                sum += (float)(w + 1) * moe_load(rows, w * stride + h, from);
            if (h < columns) half += 0.5f * moe_load(rows, h, from);
            wrong += moe_load(y, h, to) != sum || moe_load(y, stride + h, to) != half;
        }
        CHECK(wrong == 0, "%s -> %s, %d columns: %d wrong", moe_dtype_name(from),
              moe_dtype_name(to), columns, wrong);
        tbufs_free(TBUFS(&b_rows, &b_y));
        free(rows), free(y0), free(y);
    }
}

static void combine_scatter_own_kernel(void)
{
    RUN(test_scatter_foreign_kernel);
}

#endif
