/* k_grouped.cuh: k-grouped GEMM on tensor cores: one product per expert, reduced over the expert's
   rows.

     C_e[i, j] = sum over rows r of expert e of A[a_row(r), i] * B[b_row(r), j]
     a_row(r) = a_index[r] / a_div,  b_row(r) = b_index[r] / b_div

   Gradients of an expert's weights are such products. For w1, A and B are the gradient of the
   pre-activations and the gathered tokens; for w2, the gathered gradient of y and the activations.

   In:   A [a_rows, m], B [b_rows, n] fp16 or bf16; expert_offset [E + 1]; indices [R]
   Out:  C [E, m, n] in the same dtype or fp32, overwritten or added to; an expert without rows has
         sums of 0, or its C is left as it is (empty_experts)
   m and n are multiples of 8. A row index of -1 excludes r from the sum: neither operand is read.
   Rows that no expert owns are not read. Options: gemm/k_desc.h.

   Accumulates in fp32, one sum for each element in ascending r: equal inputs give equal bits.
   Cost: 2 * R * m * n flops. One launch; with a workspace, on the wgmma path, a memset of 4 bytes
   before it. Minimum architecture: sm_75 (fp16), sm_80 (bf16). The wgmma path (grouped.cuh) takes
   products with an index of one operand at most, WMMA the others.

     moe_k_grouped_gemm_desc g = {0};
     g.a = dact;  g.b = x;  g.b_index = row_slot;  g.b_div = K;  g.b_rows = T;
     g.expert_offset = offset;  g.c = dw1;  g.c_dtype = MOE_FP32;  g.accumulate = 1;
     g.num_experts = E;  g.num_rows = R;  g.m = 2 * I;  g.n = H;
     moe_status s = moe_k_grouped_gemm(&g, stream); */
#ifndef MOE_GEMM_K_GROUPED_CUH
#define MOE_GEMM_K_GROUPED_CUH

#include "../base/check.h"
#include "../fields.h"
#include "../preload.cuh"
#include "k_desc.h"
#include "k_tile.cuh"
#include "variant.cuh"
#include "wgmma/map.cuh"
#include "wgmma/tile.cuh"

/* tile, its shape, thread blocks a multiprocessor. */
#define MOEI_K_GEMM_TILE_LIST(X, ...)                                                             \
    X(128x256, MOE_GEMM_SHAPE_128x256, 1, __VA_ARGS__)                                            \
    X(128x128, MOE_GEMM_SHAPE_128x128, 2, __VA_ARGS__)                                            \
    X(64x64, MOE_GEMM_SHAPE_64x64, 4, __VA_ARGS__)

/* The dtypes that all tiles are stamped with. Predefine the list to compile fewer kernels. */
#ifndef MOE_K_GEMM_DTYPE_LIST
#define MOE_K_GEMM_DTYPE_LIST(X)                                                                  \
    X(f16, MOE_FP16)                                                                              \
    X(bf16, MOE_BF16)
#endif

/* Versions of code that have a body: bf16 from sm_80; the largest tile where a block may have
   185 KB of shared memory. */
#define MOEI_K_GEMM_LEAST(dtype, tile_m, tile_n)                                                   \
    ((tile_m) * (tile_n) > 128 * 128 ? 90 : (dtype) == MOE_BF16 ? 80 : 75)
#define MOEI_K_GEMM_MOST(tile_m, tile_n) ((tile_m) * (tile_n) <= 128 * 128 ? MOEI_CODE_ANY : 119)

#define MOEI_K_GEMM_KERNEL(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks, suffix, \
                           dtype)                                                                  \
    MOE_KERNEL((warps_m) * (warps_n)*32, blocks)                                                   \
    moei_k_gemm_##name##_##suffix(MOE_ARG(moe_k_grouped_gemm_args) d)                              \
    {                                                                                              \
        MOE_SHARED(moei_k_shared, s);                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (MOEI_CODE_HERE(MOEI_K_GEMM_LEAST(dtype, tile_m, tile_n),                               \
                           MOEI_K_GEMM_MOST(tile_m, tile_n)) &&                                    \
            !moe_fault_stopped(d.fault))                                                           \
            moei_k_block(&d, shared, &s,                                                           \
                         moe_gemm_shape_of(tile_m, tile_n, tile_k, warps_m, warps_n, stages,       \
                                           dtype, MOE_MAJOR_MN, MOE_MAJOR_MN));                    \
    }
#define MOEI_K_GEMM_EXPAND(X, ...) X(__VA_ARGS__) /* a shape is six arguments */
#define MOEI_K_GEMM_KERNEL_OF(...) MOEI_K_GEMM_EXPAND(MOEI_K_GEMM_KERNEL, __VA_ARGS__)
#define MOEI_K_GEMM_KERNELS(suffix, dtype)                                                        \
    MOEI_K_GEMM_TILE_LIST(MOEI_K_GEMM_KERNEL_OF, suffix, dtype)
MOE_K_GEMM_DTYPE_LIST(MOEI_K_GEMM_KERNELS)
#undef MOEI_K_GEMM_KERNELS
#undef MOEI_K_GEMM_KERNEL_OF
#undef MOEI_K_GEMM_KERNEL

/* The kernels of the wgmma path: rows in order, or those of one operand gathered. */
#if MOEI_WGMMA_HERE
#define MOEI_K_GEMM_WGMMA_BODY(dtype, gathered)                                                    \
    MOE_SHARED(moei_wgmma_shared, s);                                                              \
    const moe_gemm_shape f =                                                                      \
        MOEI_WGMMA_SHAPE(MOEI_WGMMA_THREADS, dtype, MOE_MAJOR_MN, MOE_MAJOR_MN);                  \
    moei_wgmma_block(&p.a, shared, &s, gathered, 0, f);
#else
#define MOEI_K_GEMM_WGMMA_BODY(dtype, gathered) (void)shared;
#endif
#define MOEI_K_GEMM_WGMMA_KERNEL(suffix, dtype, rows, gathered)                                    \
    MOE_KERNEL(MOEI_WGMMA_THREADS, 1) moei_k_gemm_##rows##_##suffix(MOE_ARG(moei_wgmma_param) p)   \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        MOEI_K_GEMM_WGMMA_BODY(dtype, gathered)                                                    \
    }
#define MOEI_K_GEMM_WGMMA_KERNELS(suffix, dtype)                                                   \
    MOEI_K_GEMM_WGMMA_KERNEL(suffix, dtype, wgmma, 0)                                              \
    MOEI_K_GEMM_WGMMA_KERNEL(suffix, dtype, wgmma_gather, 1)
MOE_K_GEMM_DTYPE_LIST(MOEI_K_GEMM_WGMMA_KERNELS)
#undef MOEI_K_GEMM_WGMMA_KERNELS
#undef MOEI_K_GEMM_WGMMA_KERNEL
#undef MOEI_K_GEMM_WGMMA_BODY

/* The variants, in order of preference. */
static const moei_variant moei_k_gemm_variants[] = {
#define MOEI_K_GEMM_WGMMA_ROW(suffix, dtype, name, gathered)                                       \
    {(const void*)moei_k_gemm_##name##_##suffix,                                                   \
     "moei_k_gemm_" #name "_" #suffix,                                                             \
     MOE_GEMM_PATH_WGMMA,                                                                          \
     (gathered) ? MOEI_VARIANT_GATHERED : MOEI_VARIANT_IN_ORDER,                                   \
     2,                                                                                            \
     MOEI_WGMMA_SHAPE(MOEI_WGMMA_THREADS, dtype, MOE_MAJOR_MN, MOE_MAJOR_MN),                      \
     MOE_TILE_128x256,                                                                             \
     1,                                                                                            \
     MOEI_WGMMA_SMEM,                                                                              \
     90,                                                                                           \
     90},
#define MOEI_K_GEMM_WGMMA_ROWS(suffix, dtype)                                                      \
    MOEI_K_GEMM_WGMMA_ROW(suffix, dtype, wgmma, 0)                                                 \
    MOEI_K_GEMM_WGMMA_ROW(suffix, dtype, wgmma_gather, 1)
    MOE_K_GEMM_DTYPE_LIST(MOEI_K_GEMM_WGMMA_ROWS)
#undef MOEI_K_GEMM_WGMMA_ROWS
#undef MOEI_K_GEMM_WGMMA_ROW
#define MOEI_K_GEMM_ROW(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks, suffix,    \
                        dtype)                                                                     \
    {(const void*)moei_k_gemm_##name##_##suffix,                                                   \
     "moei_k_gemm_" #name "_" #suffix,                                                             \
     MOE_GEMM_PATH_WMMA,                                                                           \
     MOEI_VARIANT_ANY_ROWS,                                                                        \
     1,                                                                                            \
     MOEI_SHAPE_INIT(tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, MOE_MAJOR_MN,        \
                     MOE_MAJOR_MN),                                                                \
     MOE_TILE_##name,                                                                              \
     blocks,                                                                                       \
     MOEI_RING_BYTES(1, tile_m, tile_n, tile_k, warps_m, warps_n, stages) +                        \
         MOEI_STAGING_BYTES(tile_m, tile_n, tile_k, warps_m, warps_n, stages),                     \
     MOEI_K_GEMM_LEAST(dtype, tile_m, tile_n),                                                     \
     MOEI_K_GEMM_MOST(tile_m, tile_n)},
#define MOEI_K_GEMM_ROW_OF(...) MOEI_K_GEMM_EXPAND(MOEI_K_GEMM_ROW, __VA_ARGS__)
#define MOEI_K_GEMM_ROWS(suffix, dtype) MOEI_K_GEMM_TILE_LIST(MOEI_K_GEMM_ROW_OF, suffix, dtype)
        MOE_K_GEMM_DTYPE_LIST(MOEI_K_GEMM_ROWS)
#undef MOEI_K_GEMM_ROWS
#undef MOEI_K_GEMM_ROW_OF
#undef MOEI_K_GEMM_ROW
            MOEI_VARIANT_END};

/* ---- the launch ---- */

/* Checks one operand's stride and rows, and fills in their defaults. */
MOE_HOST moe_status moei_k_check_side(int64_t* stride, int64_t* rows, int64_t columns,
                                      int32_t num_rows, int stride_field, int rows_field)
{
    if (*rows == 0) *rows = num_rows;
    if (*rows < 0 || *rows > MOE_GEMM_MAX_ROWS)
        return (moe_status)(MOE_ERR_RANGE | (rows_field << 8));
    if (*stride == 0) *stride = columns;
    if (!moei_stride_fits(*stride, columns, *rows))
        return (moe_status)(MOE_ERR_STRIDE | (stride_field << 8));
    return *stride % 8 == 0 ? MOE_OK : (moe_status)(MOE_ERR_ALIGN | (stride_field << 8));
}

/* Refuses sizes and options that the header does not offer, and fills in the defaults. */
MOE_HOST moe_status moei_k_check_options(moe_k_grouped_gemm_desc* d)
{
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(d->num_rows >= 0 && d->num_rows <= MOE_K_GEMM_MAX_ROWS, MOE_ERR_RANGE, num_rows);
    MOE_REQUIRE(d->m >= 1 && d->m <= (1 << 28), MOE_ERR_RANGE, m);
    MOE_REQUIRE(d->m % 8 == 0, MOE_ERR_MULTIPLE, m);
    MOE_REQUIRE(d->n >= 1 && d->n <= (1 << 28), MOE_ERR_RANGE, n);
    MOE_REQUIRE(d->n % 8 == 0, MOE_ERR_MULTIPLE, n);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOE_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->c_dtype == 0) d->c_dtype = d->dtype;
    MOE_REQUIRE(d->c_dtype == d->dtype || d->c_dtype == MOE_FP32, MOE_ERR_DTYPE, c_dtype);
    if (d->a_div == 0) d->a_div = 1;
    MOE_REQUIRE(d->a_div >= 1, MOE_ERR_RANGE, a_div);
    if (d->b_div == 0) d->b_div = 1;
    MOE_REQUIRE(d->b_div >= 1, MOE_ERR_RANGE, b_div);
    MOE_REQUIRE((d->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
    MOE_REQUIRE((d->empty_experts | 1) == 1, MOE_ERR_OPTION, empty_experts);
    MOE_REQUIRE(d->tile == 0 || d->tile == MOE_TILE_128x256 || d->tile == MOE_TILE_128x128 ||
                    d->tile == MOE_TILE_64x64,
                MOE_ERR_OPTION, tile);
    MOE_REQUIRE(d->grid_limit >= 0, MOE_ERR_RANGE, grid_limit);
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(d->path >= 0 && d->path <= MOE_GEMM_PATH_WGMMA, MOE_ERR_OPTION, path);
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= MOE_GROUPED_GEMM_WORKSPACE,
                MOE_ERR_WORKSPACE, workspace_bytes);
    MOE_TRY(moei_k_check_side(&d->a_stride, &d->a_rows, d->m, d->num_rows, MOE_FIELD_a_stride,
                              MOE_FIELD_a_rows));
    MOE_TRY(moei_k_check_side(&d->b_stride, &d->b_rows, d->n, d->num_rows, MOE_FIELD_b_stride,
                              MOE_FIELD_b_rows));
    if (d->c_stride == 0) d->c_stride = d->n;
    MOE_REQUIRE(moei_stride_fits(d->c_stride, d->n, d->m), MOE_ERR_STRIDE, c_stride);
    MOE_REQUIRE(d->c_stride % 8 == 0, MOE_ERR_ALIGN, c_stride);
    if (d->c_expert_stride == 0) d->c_expert_stride = d->c_stride * d->m;
    MOE_REQUIRE(moei_stride_fits(d->c_expert_stride,
                                 d->num_experts > 1 ? d->c_stride * (d->m - 1) + d->n : 0,
                                 d->num_experts),
                MOE_ERR_STRIDE, c_expert_stride);
    MOE_REQUIRE(d->c_expert_stride % 8 == 0, MOE_ERR_ALIGN, c_expert_stride);
    MOE_REQUIRE(!(d->c && d->c_table), MOE_ERR_CONFLICT, c);
    return MOE_OK;
}

/* Refuses buffers that are absent, misaligned or overlap. Requires checked options. */
MOE_HOST moe_status moei_k_check_buffers(const moe_k_grouped_gemm_desc* d)
{
    const uint64_t num_experts = (uint64_t)d->num_experts, num_rows = (uint64_t)d->num_rows;
    const uint64_t c =
        (num_experts - 1) * (uint64_t)d->c_expert_stride * (d->c_dtype == MOE_FP32 ? 4u : 2u) +
        moe_extent(d->m, d->c_stride, d->n, d->c_dtype);
    const int read = num_rows ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ;
    const moe_buffer b[] = {
        {d->a, num_rows ? moe_extent(d->a_rows, d->a_stride, d->m, d->dtype) : 0, 16, read,
         MOE_FIELD_a},
        {d->b, num_rows ? moe_extent(d->b_rows, d->b_stride, d->n, d->dtype) : 0, 16, read,
         MOE_FIELD_b},
        {d->a_index, num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_a_index},
        {d->b_index, num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_b_index},
        {d->c_table, num_experts * 8, 8, MOE_BUFFER_READ, MOE_FIELD_c},
        {d->expert_offset, num_experts * 4 + 4, 4,
         num_experts > 1 ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_expert_offset},
        {d->c, c, 16, d->c_table ? MOE_BUFFER_WRITTEN : MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_c},
        {d->workspace, MOE_GROUPED_GEMM_WORKSPACE, 16, MOE_BUFFER_WRITTEN, MOE_FIELD_workspace},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    return moe_check_buffers(b, (int)(sizeof b / sizeof b[0]));
}

/* A prepared product: all but its stream is resolved, for the device that was current. */
typedef struct moe_k_grouped_gemm_prepared {
    moei_wgmma_args wgmma;        /* of the wgmma path's kernel */
    moe_k_grouped_gemm_args args; /* of the other kernels */
    moe_gemm_plan plan;           /* the choice of kernel and grid */
    moe_launch launch;            /* kernel null: run queues nothing */
} moe_k_grouped_gemm_prepared;

/* Returns 1 where v computes C's transpose (moei_k_encode). */
MOE_HOST int moei_k_transposes(const moe_k_grouped_gemm_desc* d, const moei_variant* v)
{
    return v->path == MOE_GEMM_PATH_WGMMA && d->b_index;
}

/* Returns the tiles of all experts. */
MOE_HOST int64_t moei_k_num_tiles(const moe_k_grouped_gemm_desc* d, const moei_variant* v)
{
    const int64_t m = moei_k_transposes(d, v) ? d->n : d->m;
    const int64_t n = moei_k_transposes(d, v) ? d->m : d->n;
    return ((m + v->shape.tile_m - 1) / v->shape.tile_m) *
           ((n + v->shape.tile_n - 1) / v->shape.tile_n) * d->num_experts;
}

/* Returns 1 where v has the tile that the caller asks for, or else a good tile for these sizes. */
MOE_HOST int moei_k_suits(const moei_variant* v, const moe_k_grouped_gemm_desc* d, int sms)
{
    const int n = moei_k_transposes(d, v) ? d->m : d->n;
    if (d->tile) return v->tile == d->tile;
    return v->tile == MOE_TILE_64x64 || d->path == MOE_GEMM_PATH_WGMMA ||
           (moei_k_num_tiles(d, v) >= sms && (v->tile != MOE_TILE_128x256 || n > 128));
}

/* Returns the kernel's args for a checked descriptor. */
MOE_HOST moe_k_grouped_gemm_args moei_k_args_of(const moe_k_grouped_gemm_desc* d)
{
    const void* any = d->c ? (const void*)d->c : (const void*)d->c_table;
    moe_k_grouped_gemm_args a;
    memset(&a, 0, sizeof a);
    a.a = d->a ? d->a : any;
    a.b = d->b ? d->b : any;
    a.a_index = d->a_index;
    a.b_index = d->b_index;
    a.expert_offset = d->expert_offset;
    a.c.base = d->c;
    a.c.table = d->c_table;
    a.c.stride = d->c_stride;
    a.c.dtype = d->c_dtype;
    a.c.bias_dtype = d->dtype;
    a.c.activation = MOE_ACTIVATION_NONE;
    a.c.accumulate = d->accumulate;
    a.fault = d->fault;
    a.a_stride = d->a_stride;
    a.b_stride = d->b_stride;
    a.a_rows = d->a_rows;
    a.b_rows = d->b_rows;
    a.c_expert_bytes = d->c_expert_stride * moe_dtype_bytes(d->c_dtype);
    a.num_experts = d->num_experts;
    a.num_rows = d->num_rows;
    a.m = d->m;
    a.n = d->n;
    a.a_div = d->a_div;
    a.b_div = d->b_div;
    a.rank = d->rank;
    a.skip_empty = d->empty_experts;
    return a;
}

/* Returns 1 where the wgmma path can take a checked product: at most one operand gathered, within 64
   GiB (k_gather.cuh); all rows of the others there; strides within the limits of tensor maps. */
MOE_HOST int moei_k_wgmma_takes(const moe_k_grouped_gemm_desc* d)
{
    const int64_t most = (int64_t)1 << 39, far = (int64_t)1 << 35; /* elements */
    return !(d->a_index && d->a_rows * d->a_stride >= far) &&
           !(d->b_index && d->b_rows * d->b_stride >= far) && !(d->a_index && d->b_index) &&
           d->grid_limit != 1 && d->a_stride < most && d->b_stride < most &&
           (d->a_index || (d->a_div == 1 && d->a_rows >= d->num_rows)) &&
           (d->b_index || (d->b_div == 1 && d->b_rows >= d->num_rows));
}

/* Returns the product whose results are the transposes of those of *a: A and B change places. */
MOE_HOST moe_k_grouped_gemm_args moei_k_transposed(const moe_k_grouped_gemm_args* a)
{
    moe_k_grouped_gemm_args t = *a;
    t.a = a->b, t.b = a->a;
    t.a_index = a->b_index, t.b_index = a->a_index;
    t.a_stride = a->b_stride, t.b_stride = a->a_stride;
    t.a_rows = a->b_rows, t.b_rows = a->a_rows;
    t.a_div = a->b_div, t.b_div = a->a_div;
    t.m = a->n, t.n = a->m;
    return t;
}

/* Sets the args of the wgmma path's kernel from those of the others; encodes the tensor maps. The
   kernel gathers rows of its A. Where those of B are gathered it gets the transposed product, and
   stores each result transposed. */
MOE_HOST moe_status moei_k_encode(moei_wgmma_args* w, const moe_k_grouped_gemm_args* args)
{
    const moe_k_grouped_gemm_args product = args->b_index ? moei_k_transposed(args) : *args;
    const moe_k_grouped_gemm_args* a = &product;
    moei_tensor t;
    w->transposed = args->b_index != 0;
    w->d.a = a->a;
    w->d.a_stride = a->a_stride;
    w->d.a_rows = a->a_rows;
    w->d.row_index = a->a_index;
    w->d.row_div = a->a_div;
    w->d.b.base = a->b;
    w->d.b.row_stride = a->b_stride;
    w->d.b.major = MOE_MAJOR_MN;
    w->d.c = a->c;
    w->d.expert_offset = a->expert_offset;
    w->d.num_experts = a->num_experts;
    w->d.num_rows = a->num_rows;
    w->d.n = a->n;
    w->d.fault = a->fault;
    w->d.rank = a->rank;
    w->m = a->m;
    w->c_expert_bytes = a->c_expert_bytes;
    w->skip_empty = a->skip_empty;
    memset(&t, 0, sizeof t);
    if (a->num_rows == 0) /* neither is read, and may be any address; of C a block is mapped */
        w->d.a = w->d.b.base =
            (const void*)((uintptr_t)(a->c.base ? a->c.base : (const void*)a->c.table) &
                          ~(uintptr_t)15);
    t.base = w->d.a;
    t.dtype = a->c.bias_dtype;
    t.rows = a->num_rows > 0 ? a->num_rows : 1;
    t.box_rows = 64;
    t.columns = w->m;
    t.row_stride = w->d.a_stride;
    if (!w->d.row_index) MOE_TRY(moei_tensor_encode(&w->a, &t));
    t.columns = w->d.n;
    t.row_stride = w->d.b.row_stride;
    return moei_tensor_encode(&w->b, &t);
}

/* Returns the shared memory that depends on the experts, bytes: tile_start [E + 1] on the wgmma
   path. */
MOE_HOST size_t moei_k_more(const moei_variant* v, const moe_k_grouped_gemm_desc* d)
{
    return v->path == MOE_GEMM_PATH_WGMMA ? ((size_t)d->num_experts + 1) * 4 : 0;
}

/* Prepares *p, which is empty, for an unchecked descriptor. */
MOE_HOST moe_status moei_k_prepare(const moe_k_grouped_gemm_desc* desc,
                                   moe_k_grouped_gemm_prepared* p)
{
    moe_k_grouped_gemm_desc checked = *desc;
    const moe_k_grouped_gemm_desc* d = &checked;
    moe_device dev;
    MOE_TRY(moei_k_check_options(&checked));
    MOE_TRY(moei_k_check_buffers(d));
    MOE_TRY(moe_device_query(&dev));
    MOE_REQUIRE(MOE_ON_HOST || d->dtype == MOE_FP16 || dev.major >= 8, MOE_ERR_DEVICE, dtype);
    MOE_REQUIRE(moei_variant_find(moei_k_gemm_variants, MOE_TILE_64x64, d->dtype, MOE_MAJOR_MN,
                                  MOE_MAJOR_MN),
                MOE_ERR_NOT_COMPILED, dtype);
    for (const moei_variant* v = moei_k_gemm_variants; v->kernel; ++v) {
        const int64_t tiles = moei_k_num_tiles(d, v);
        int runs;
        const int wgmma = v->path == MOE_GEMM_PATH_WGMMA;
        if (v->shape.dtype != d->dtype || (d->path && v->path != d->path) ||
            v->rows == (d->a_index || d->b_index ? MOEI_VARIANT_IN_ORDER : MOEI_VARIANT_GATHERED) ||
            (wgmma && !moei_k_wgmma_takes(d)) || !moei_k_suits(v, d, dev.sms))
            continue;
        MOE_TRY(moei_variant_runs(v, &dev, moei_k_more(v, d), &runs));
        if (!runs) continue;
        MOE_REQUIRE(tiles <= MOEI_VARIANT_MAX_TILES, MOE_ERR_RANGE, m);
        p->args = moei_k_args_of(d);
        if (wgmma) {
            const moe_status s = moei_k_encode(&p->wgmma, &p->args);
            if (s != MOE_OK && !d->path) continue; /* a driver without tensor maps */
            MOE_TRY(s);
            p->wgmma.ticket = (int32_t*)d->workspace;
        }
        p->plan = moei_variant_plan(v, &dev, tiles, moei_k_more(v, d), d->grid_limit);
        return moei_variant_prepare(&p->launch, v, p->plan.blocks, moei_k_more(v, d));
    }
    MOE_REQUIRE(d->path != MOE_GEMM_PATH_WGMMA,
                moei_k_wgmma_takes(d) ? MOE_ERR_DEVICE : MOE_ERR_CONFLICT, path);
    MOE_REQUIRE(!d->tile, MOE_ERR_DEVICE, tile);
    return MOE_STATUS(MOE_ERR_DEVICE, dtype); /* built without -arch=sm_80 or later, most often */
}

/* Prepares a product; moe_k_grouped_gemm_run queues it any number of times. Errors: each field that
   is not as documented in k_desc.h, with its own status; MOE_ERR_DEVICE where the device or this
   binary has no kernel for it; MOE_ERR_NOT_COMPILED where MOE_K_GEMM_DTYPE_LIST lacks dtype.
   num_rows = 0 is no error. On an error *p is empty. */
MOE_HOST moe_status moe_k_grouped_gemm_prepare(const moe_k_grouped_gemm_desc* desc,
                                               moe_k_grouped_gemm_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_k_prepare(desc, p));
}

/* Queues a prepared product on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_k_grouped_gemm_run(const moe_k_grouped_gemm_prepared* p,
                                           cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    if (p->plan.path != MOE_GEMM_PATH_WGMMA) return MOE_RUN(&p->launch, p->args, stream);
    if (p->wgmma.ticket) MOE_TRY_CUDA(cudaMemsetAsync(p->wgmma.ticket, 0, 4, stream));
    return MOE_RUN(&p->launch, *(const moei_wgmma_param*)(const void*)&p->wgmma, stream);
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_k_grouped_gemm(const moe_k_grouped_gemm_desc* desc, cudaStream_t stream)
{
    moe_k_grouped_gemm_prepared p;
    MOE_TRY(moe_k_grouped_gemm_prepare(desc, &p));
    return moe_k_grouped_gemm_run(&p, stream);
}

/* Loads this header's kernels, before their first launch. */
MOE_HOST moe_status moe_k_grouped_gemm_preload(void)
{
    return moei_variant_preload(moei_k_gemm_variants);
}

MOEI_PRELOAD_INCLUDED(k_grouped_gemm)

#endif
