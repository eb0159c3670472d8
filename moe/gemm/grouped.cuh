/* grouped.cuh: grouped GEMM on tensor cores: one product per expert over that expert's rows.

     C[r, :] = activation( A[row(r), :] * B_e^T + bias_e ),  r in expert e,
     row(r)  = row_index[r] / row_div

   In:   A [a_rows, k], or mn-major [k, a_rows]; B_e [n, k], gated [2n, k]; fp16 or bf16
         expert_offset [E + 1] or a list of groups of rows, row_index [R]
   Out:  C [R, n] in expert order, in the same dtype or fp32
   Any number of rows per expert; n and k are multiples of 8. Layouts and options: gemm/desc.h.

   Rows of A are gathered by index while they are loaded: no permuted copy is made. Weights are read
   from the caller's layout (moe_weights). Kernels read the row counts from expert_offset or the
   list on the device: no copy to the host, and a captured graph replays with other routing.

   Rows of A may come, and rows of C be used, while the product runs: counters in memory (`ready`,
   `done`) tell which. Each may be another device's.

   Accumulates in fp32. Each element of C is one sum in ascending k: equal inputs give equal bits
   for one path and tile shape, which depend on shapes, device, driver and binary alone. With
   batch_invariant they do not depend on num_rows: a row has the same bits in any batch.

   Cost: 2 * R * n * k flops (twice that with a gated activation). One launch; with a workspace, on
   the wgmma path, a memset of 4 bytes before it. Minimum architecture: sm_75 (fp16), sm_80 (bf16).

     moe_grouped_gemm_desc g = {0};
     g.a = x;  g.row_index = row_slot;  g.row_div = K;  g.a_rows = T;
     g.b.base = w;  g.expert_offset = offset;  g.c = c;
     g.num_experts = E;  g.num_rows = T * K;  g.n = I;  g.k = H;
     g.workspace = ws;  g.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;     // may be left out
     moe_status s = moe_grouped_gemm(&g, stream);

   Two paths: WMMA on every architecture (tile.cuh), wgmma on Hopper (wgmma/tile.cuh). wgmma runs
   where the device and the binary have it (sm_90a), with A k-major and no row_div without
   row_index; mn-major weights must not interleave gates and ups. WMMA runs everything else.
   moe_grouped_gemm_plan tells which. A further path is added here: a kernel, an entry in
   moe_gemm_path, entries in moei_gemm_variants. */
#ifndef MOE_GEMM_GROUPED_CUH
#define MOE_GEMM_GROUPED_CUH

#include "../base/check.h"
#include "../fields.h"
#include "../preload.cuh"
#include "tile.cuh"
#include "variant.cuh"
#include "wgmma/map.cuh"
#include "wgmma/tile.cuh"

/* tile, its shape, thread blocks a multiprocessor. */
#define MOEI_GEMM_TILE_LIST(X)                                                                    \
    X(128x256, MOE_GEMM_SHAPE_128x256, 1)                                                         \
    X(128x128, MOE_GEMM_SHAPE_128x128, 2)                                                         \
    X(32x128, MOE_GEMM_SHAPE_32x128, 2)                                                           \
    X(64x64, MOE_GEMM_SHAPE_64x64, 4)

/* The dtype and majors that every tile is stamped with. Predefine the list to compile fewer or more
   kernels. */
#ifndef MOE_GEMM_VARIANT_LIST
#define MOE_GEMM_VARIANT_LIST(X, ...)                                                             \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(f16_kn, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)                                   \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                   \
    X(bf16_kn, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)
#endif

/* Versions of code that have a body: bf16 from sm_80; the largest tile where a block may have
   180 KB of shared memory. The largest tile leaves no register free: it is compiled for k-major
   operands only. */
#define MOEI_GEMM_LEAST(dtype, tile_m, tile_n, a_major, b_major)                                   \
    ((tile_m) * (tile_n) <= 128 * 128                       ? ((dtype) == MOE_BF16 ? 80 : 75)      \
     : (a_major) == MOE_MAJOR_K && (b_major) == MOE_MAJOR_K ? 90                                   \
                                                            : MOEI_CODE_NEVER)
#define MOEI_GEMM_MOST(tile_m, tile_n) ((tile_m) * (tile_n) <= 128 * 128 ? MOEI_CODE_ANY : 119)

#define MOEI_GEMM_KERNEL(variant, dtype, a_major, b_major, name, tile_m, tile_n, tile_k, warps_m,  \
                         warps_n, stages, blocks)                                                  \
    MOE_KERNEL((warps_m) * (warps_n)*32, blocks)                                                   \
    moei_gemm_##name##_##variant(MOE_ARG(moe_grouped_gemm_args) d)                                 \
    {                                                                                              \
        MOE_SHARED(moei_gemm_shared, s);                                                           \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (MOEI_CODE_HERE(MOEI_GEMM_LEAST(dtype, tile_m, tile_n, a_major, b_major),               \
                           MOEI_GEMM_MOST(tile_m, tile_n)) &&                                      \
            !moe_fault_stopped(d.fault))                                                           \
            moei_gemm_block(&d, shared, &s,                                                        \
                            moe_gemm_shape_of(tile_m, tile_n, tile_k, warps_m, warps_n, stages,    \
                                              dtype, a_major, b_major));                           \
    }
#define MOEI_GEMM_CHECK(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks)            \
    static_assert((stages) == 3, "moei_tiles.position has room for a loader two tiles ahead");
#define MOEI_GEMM_TILE_CHECK(...) MOEI_GEMM_CHECK(__VA_ARGS__)
MOEI_GEMM_TILE_LIST(MOEI_GEMM_TILE_CHECK)
#undef MOEI_GEMM_TILE_CHECK
#undef MOEI_GEMM_CHECK
#define MOEI_GEMM_TILE_KERNELS(...) MOE_GEMM_VARIANT_LIST(MOEI_GEMM_KERNEL, __VA_ARGS__)
MOEI_GEMM_TILE_LIST(MOEI_GEMM_TILE_KERNELS)
#undef MOEI_GEMM_TILE_KERNELS
#undef MOEI_GEMM_KERNEL

/* The kernels of the wgmma path, for k-major A: rows of A in order, or gathered. */
static_assert(sizeof(moei_wgmma_param) == sizeof(moei_wgmma_args),
              "moe_grouped_gemm_run launches with the args of a prepared product");
#define MOEI_GEMM_BOXED_K 512 /* most depths of tiles that are stored in boxes */
#define MOEI_GEMM_WGMMA_LEAST(a_major, b_major) ((a_major) == MOE_MAJOR_K ? 90 : MOEI_CODE_NEVER)
#if MOEI_WGMMA_HERE
#define MOEI_GEMM_WGMMA_BODY(dtype, a_major, b_major, gathered)                                    \
    MOE_SHARED(moei_wgmma_shared, s);                                                              \
    const moe_gemm_shape f = MOEI_WGMMA_SHAPE(dtype, a_major, b_major);                            \
    if (MOEI_GEMM_WGMMA_LEAST(a_major, b_major) == 90)                                             \
        moei_wgmma_block(&p.a, shared, &s, gathered, f);
#else
#define MOEI_GEMM_WGMMA_BODY(dtype, a_major, b_major, gathered) (void)shared;
#endif
#define MOEI_GEMM_WGMMA_KERNEL(variant, dtype, a_major, b_major, rows, gathered)                   \
    MOE_KERNEL(MOEI_WGMMA_THREADS, 1) moei_gemm_##rows##_##variant(MOE_ARG(moei_wgmma_param) p)    \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        MOEI_GEMM_WGMMA_BODY(dtype, a_major, b_major, gathered)                                    \
    }
MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_KERNEL, wgmma, 0)
MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_KERNEL, wgmma_gather, 1)
#undef MOEI_GEMM_WGMMA_KERNEL
#undef MOEI_GEMM_WGMMA_BODY

/* The variants, in order of preference. */
static const moei_variant moei_gemm_variants[] = {
#define MOEI_GEMM_WGMMA_ROW(variant, dtype, a_major, b_major, rows, gathered)                      \
    {(const void*)moei_gemm_##rows##_##variant,                                                    \
     "moei_gemm_" #rows "_" #variant,                                                              \
     MOE_GEMM_PATH_WGMMA,                                                                          \
     (gathered) ? MOEI_VARIANT_GATHERED : MOEI_VARIANT_IN_ORDER,                                   \
     2,                                                                                            \
     MOEI_WGMMA_SHAPE(dtype, a_major, b_major),                                                    \
     MOE_TILE_128x256,                                                                             \
     1,                                                                                            \
     MOEI_WGMMA_SMEM,                                                                              \
     MOEI_GEMM_WGMMA_LEAST(a_major, b_major),                                                      \
     90},
    MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_ROW, wgmma, 0)
        MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_ROW, wgmma_gather, 1)
#undef MOEI_GEMM_WGMMA_ROW
#define MOEI_GEMM_ROW(variant, dtype, a_major, b_major, name, tile_m, tile_n, tile_k, warps_m,     \
                      warps_n, stages, blocks)                                                     \
    {(const void*)moei_gemm_##name##_##variant,                                                    \
     "moei_gemm_" #name "_" #variant,                                                              \
     MOE_GEMM_PATH_WMMA,                                                                           \
     MOEI_VARIANT_ANY_ROWS,                                                                        \
     1,                                                                                            \
     MOEI_SHAPE_INIT(tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, a_major, b_major),   \
     MOE_TILE_##name,                                                                              \
     blocks,                                                                                       \
     MOEI_RING_BYTES(1, tile_m, tile_n, tile_k, warps_m, warps_n, stages) +                        \
         MOEI_STAGING_BYTES(tile_m, tile_n, tile_k, warps_m, warps_n, stages),                     \
     MOEI_GEMM_LEAST(dtype, tile_m, tile_n, a_major, b_major),                                     \
     MOEI_GEMM_MOST(tile_m, tile_n)},
#define MOEI_GEMM_ROWS(...) MOE_GEMM_VARIANT_LIST(MOEI_GEMM_ROW, __VA_ARGS__)
            MOEI_GEMM_TILE_LIST(MOEI_GEMM_ROWS)
#undef MOEI_GEMM_ROWS
#undef MOEI_GEMM_ROW
                MOEI_VARIANT_END};

/* Returns the groups of rows that a product may have. */
MOE_HOST int64_t moei_gemm_groups(const moe_grouped_gemm_desc* d)
{
    return d->group ? d->num_groups : d->num_experts;
}

/* Returns 1 where v has a good tile for these sizes on a device of `sms` multiprocessors; with
   batch_invariant num_rows is ignored. bench/bench_tiles.cu fitted the numbers:
     128x256  where its tiles fill the device; wgmma also where experts have more than 64 rows, WMMA
              where they have more than 32
     128x128  where experts have more than 64 rows
     32x128   otherwise; 64x64 where it does not run */
MOE_HOST int moei_gemm_suits(const moei_variant* v, const moe_grouped_gemm_desc* d, int sms)
{
    const int64_t tile_m = v->shape.tile_m, tile_n = v->shape.tile_n;
    const int64_t most = moei_gemm_groups(d), groups = d->num_rows < most ? d->num_rows : most;
    const int64_t rows = groups ? d->num_rows / groups : 0; /* of a group, on average */
    const int64_t b_rows = (int64_t)d->n * (moe_activation_is_gated(d->activation) ? 2 : 1);
    const int64_t tiles =
        ((rows + tile_m - 1) / tile_m) * groups * ((b_rows + tile_n - 1) / tile_n);
    const int many = d->batch_invariant, wgmma = v->path == MOE_GEMM_PATH_WGMMA;
    switch (v->tile) {
    case MOE_TILE_128x256:
        return b_rows > 128 &&
               (many || (wgmma ? rows > 64 || tiles >= sms : rows > 32 && tiles >= sms));
    case MOE_TILE_128x128: return many || rows > 64;
    default: return 1;
    }
}

/* Refuses sizes and options that the header does not offer, and fills in the defaults. */
MOE_HOST moe_status moei_gemm_check_options(moe_grouped_gemm_desc* d)
{
    const int gated = moe_activation_is_gated(d->activation);
    int64_t b_rows, b_cols;
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(d->num_rows >= 0 && d->num_rows <= MOE_GEMM_MAX_ROWS, MOE_ERR_RANGE, num_rows);
    MOE_REQUIRE(d->n >= 1 && d->n <= (1 << 28), MOE_ERR_RANGE, n);
    MOE_REQUIRE(d->n % 8 == 0, MOE_ERR_MULTIPLE, n);
    MOE_REQUIRE(d->k >= 1 && d->k <= (1 << 28), MOE_ERR_RANGE, k);
    MOE_REQUIRE(d->k % 8 == 0, MOE_ERR_MULTIPLE, k);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOE_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->c_dtype == 0) d->c_dtype = d->dtype;
    MOE_REQUIRE(d->c_dtype == d->dtype || d->c_dtype == MOE_FP32, MOE_ERR_DTYPE, c_dtype);
    if (d->activation == 0) d->activation = MOE_ACTIVATION_NONE;
    MOE_TRY(moei_activation_check(d->activation, &d->alpha, &d->limit));
    if (d->gate_up == 0) d->gate_up = MOE_GATE_UP_CONCATENATED;
    MOE_REQUIRE(d->gate_up >= 0 && d->gate_up <= MOE_GATE_UP_SEPARATE, MOE_ERR_OPTION, gate_up);
    MOE_REQUIRE((gated && d->gate_up == MOE_GATE_UP_SEPARATE) || (!d->b.up && !d->b.up_table),
                MOE_ERR_CONFLICT, b);
    if (d->a_major == 0) d->a_major = MOE_MAJOR_K;
    MOE_REQUIRE(d->a_major == MOE_MAJOR_K || d->a_major == MOE_MAJOR_MN, MOE_ERR_OPTION, a_major);
    if (d->b.major == 0) d->b.major = MOE_MAJOR_K;
    MOE_REQUIRE(d->b.major == MOE_MAJOR_K || d->b.major == MOE_MAJOR_MN, MOE_ERR_OPTION, b_major);
    MOE_REQUIRE((d->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
    MOEI_REQUIRE_RANK(d);
    if (d->row_div == 0) d->row_div = 1;
    MOE_REQUIRE(d->row_div >= 1, MOE_ERR_RANGE, row_div);
    MOE_REQUIRE(d->tile >= 0 && d->tile <= MOE_TILE_64x64, MOE_ERR_OPTION, tile);
    MOE_REQUIRE(d->path >= 0 && d->path <= MOE_GEMM_PATH_WGMMA, MOE_ERR_OPTION, path);
    MOE_REQUIRE((d->batch_invariant | 1) == 1, MOE_ERR_OPTION, batch_invariant);
    MOE_REQUIRE(d->grid_limit >= 0, MOE_ERR_RANGE, grid_limit);
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= MOE_GROUPED_GEMM_WORKSPACE,
                MOE_ERR_WORKSPACE, workspace_bytes);

    MOE_REQUIRE(d->a_rows >= 0 && d->a_rows <= MOE_GEMM_MAX_ROWS, MOE_ERR_RANGE, a_rows);
    if (d->a_rows == 0) d->a_rows = d->num_rows;
    {
        const int64_t inner = d->a_major == MOE_MAJOR_K ? d->k : d->a_rows;
        const int64_t outer = d->a_major == MOE_MAJOR_K ? d->a_rows : d->k;
        if (d->a_stride == 0) d->a_stride = inner;
        MOE_REQUIRE(moei_stride_fits(d->a_stride, inner, outer), MOE_ERR_STRIDE, a_stride);
        MOE_REQUIRE(d->a_stride % 8 == 0, MOE_ERR_ALIGN, a_stride);
    }
    b_rows = (int64_t)d->n * (gated && d->gate_up != MOE_GATE_UP_SEPARATE ? 2 : 1);
    b_cols = d->b.major == MOE_MAJOR_K ? d->k : b_rows;
    if (d->b.major == MOE_MAJOR_MN) b_rows = d->k;
    if (d->b.row_stride == 0) d->b.row_stride = b_cols;
    MOE_REQUIRE(moei_stride_fits(d->b.row_stride, b_cols, b_rows), MOE_ERR_STRIDE, b_stride);
    MOE_REQUIRE(d->b.row_stride % 8 == 0, MOE_ERR_ALIGN, b_stride);
    if (d->b.expert_stride == 0) d->b.expert_stride = d->b.row_stride * b_rows;
    MOE_REQUIRE(moei_stride_fits(d->b.expert_stride, d->num_experts > 1, d->num_experts),
                MOE_ERR_STRIDE, b_stride);
    MOE_REQUIRE(d->b.expert_stride % 8 == 0, MOE_ERR_ALIGN, b_stride);
    if (d->c_stride == 0) d->c_stride = d->n;
    MOE_REQUIRE(moei_stride_fits(d->c_stride, d->n, d->num_rows), MOE_ERR_STRIDE, c_stride);
    MOE_REQUIRE(d->c_stride % 8 == 0, MOE_ERR_ALIGN, c_stride);

    if (d->pre_stride == 0) d->pre_stride = gated ? 2 * (int64_t)d->n : d->n;
    MOE_REQUIRE(moei_stride_fits(d->pre_stride, gated ? 2 * (int64_t)d->n : d->n, d->num_rows),
                MOE_ERR_STRIDE, pre_stride);
    MOE_REQUIRE(d->pre_stride % 8 == 0, MOE_ERR_ALIGN, pre_stride);
    MOE_REQUIRE(!d->pre || d->activation != MOE_ACTIVATION_NONE, MOE_ERR_CONFLICT, pre);

    if (d->group || d->num_groups) {
        MOE_REQUIRE(d->num_groups >= 1 && d->num_groups <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                    num_groups);
        MOE_REQUIRE(!d->expert_offset, MOE_ERR_CONFLICT, group);
        MOE_REQUIRE(!d->c_table, MOE_ERR_CONFLICT, c_table);
    }
    if (d->ready_timeout_ms == 0) d->ready_timeout_ms = 10000;
    MOE_REQUIRE(!d->done || d->n < 1 << 27, MOE_ERR_RANGE, n);

    MOE_REQUIRE(!(d->row_index && d->a_major == MOE_MAJOR_MN), MOE_ERR_CONFLICT, row_index);
    MOE_REQUIRE(!(d->c && d->c_table), MOE_ERR_CONFLICT, c);
    MOE_REQUIRE(!(d->b.base && d->b.table), MOE_ERR_CONFLICT, b);
    MOE_REQUIRE(!(d->b.up && d->b.up_table), MOE_ERR_CONFLICT, b);
    return MOE_OK;
}

/* Refuses buffers that are absent, misaligned or overlap. Requires checked options. */
MOE_HOST moe_status moei_gemm_check_buffers(const moe_grouped_gemm_desc* d)
{
    const int64_t num_experts = d->num_experts, num_rows = d->num_rows, n = d->n, k = d->k;
    const int gated = moe_activation_is_gated(d->activation);
    const int separate = gated && d->gate_up == MOE_GATE_UP_SEPARATE;
    const int64_t all_n = gated ? 2 * n : n; /* rows of gate and up */
    const uint64_t matrices = moei_weight_extent(&d->b, num_experts, separate ? n : all_n, k);
    const uint64_t table = (uint64_t)num_experts * 8;
    const uint64_t flags =
        (uint64_t)(num_rows + MOE_GEMM_ROW_BLOCK - 1) / MOE_GEMM_ROW_BLOCK * sizeof(uint32_t);
    const moe_buffer b[] = {
        {d->a,
         d->a_major == MOE_MAJOR_K ? moe_extent(d->a_rows, d->a_stride, k, d->dtype)
                                   : moe_extent(k, d->a_stride, d->a_rows, d->dtype),
         16, MOE_BUFFER_REQUIRED, MOE_FIELD_a},
        {d->b.base, matrices, 16, d->b.table ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_b},
        {d->b.up, matrices, 16, separate && !d->b.up_table ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_b},
        {d->b.table, table, 8, MOE_BUFFER_READ, MOE_FIELD_b},
        {d->b.up_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_b},
        {d->bias, (uint64_t)(num_experts * all_n) * 2, 2, MOE_BUFFER_READ, MOE_FIELD_bias},
        {d->row_index, (uint64_t)num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_row_index},
        {d->c_table, table, 8, MOE_BUFFER_READ, MOE_FIELD_c},
        {d->c, moe_extent(num_rows, d->c_stride, n, d->c_dtype), 16,
         d->c_table ? MOE_BUFFER_WRITTEN : MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_c},
        {d->pre, moe_extent(num_rows, d->pre_stride, all_n, d->dtype), 16, MOE_BUFFER_WRITTEN,
         MOE_FIELD_pre},
        {d->ready, flags, 4, MOE_BUFFER_READ, MOE_FIELD_ready},
        {d->done, flags, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_done},
        {d->group, (uint64_t)d->num_groups * sizeof(moe_gemm_group), 4, MOE_BUFFER_REQUIRED,
         MOE_FIELD_group},
        {d->expert_offset, (uint64_t)num_experts * 4 + 4, 4,
         num_experts > 1 && !d->group ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ,
         MOE_FIELD_expert_offset},
        {d->workspace, MOE_GROUPED_GEMM_WORKSPACE, 16, MOE_BUFFER_WRITTEN, MOE_FIELD_workspace},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (num_rows == 0) /* groups or offsets, workspace and fault word alone */
        return moe_check_buffers(b + count - 4, 4);
    return moe_check_buffers(b, count);
}

/* Returns 1 where the wgmma path can take a checked product: A k-major, rows gathered or undivided;
   gates and ups not interleaved where B is mn-major; room for a cluster; sizes within the limits of
   tensor maps. */
MOE_HOST int moei_gemm_wgmma_takes(const moe_grouped_gemm_desc* d)
{
    const int64_t most = (int64_t)1 << 39;
    return d->a_major == MOE_MAJOR_K && (d->row_index || d->row_div == 1) && d->grid_limit != 1 &&
           d->a_stride < most && d->b.row_stride < most / 2 &&
           !(d->b.major == MOE_MAJOR_MN && moe_activation_is_gated(d->activation) &&
             d->gate_up == MOE_GATE_UP_INTERLEAVED);
}

/* Returns 1 where tensor copies store full tiles on the wgmma path: rows in order, tiles of few
   steps, C one array of 16-bit elements, room for the boxes beside the first tiles of all groups. */
MOE_HOST int moei_gemm_boxed(const moe_grouped_gemm_desc* d)
{
    return !d->row_index && d->k <= MOEI_GEMM_BOXED_K && d->c && d->c_dtype != MOE_FP32 &&
           d->c_stride < (int64_t)1 << 39 && moei_gemm_groups(d) <= 2048;
}

/* Encodes the tensor maps of a checked product with rows: gates and ups as two matrices of n rows,
   however they lie in memory. */
MOE_HOST moe_status moei_gemm_encode(moei_wgmma_args* a, const moe_grouped_gemm_desc* d)
{
    const int gated = moe_activation_is_gated(d->activation), mn = d->b.major == MOE_MAJOR_MN;
    moei_tensor t;
    memset(&t, 0, sizeof t);
    t.dtype = d->dtype;
    t.base = d->a;
    t.columns = d->k;
    t.rows = d->a_rows;
    t.row_stride = d->a_stride;
    t.box_rows = 64;
    if (!d->row_index) MOE_TRY(moei_tensor_encode(&a->a, &t));
    a->boxes = moei_gemm_boxed(d);
    if (a->boxes) {
        moei_tensor c = t;
        c.base = d->c;
        c.columns = d->n;
        c.rows = d->num_rows;
        c.row_stride = d->c_stride;
        MOE_TRY(moei_tensor_encode(&a->c, &c));
    }
    t.columns = mn ? d->n : d->k;
    t.rows = mn ? d->k : d->n;
    t.row_stride = d->b.row_stride;
    t.box_rows = mn ? 64 : 128;
    a->up = 0;
    if (gated && d->gate_up == MOE_GATE_UP_CONCATENATED)
        a->up = (mn ? (int64_t)d->n : d->b.row_stride * d->n) * 2;
    if (gated && d->gate_up == MOE_GATE_UP_INTERLEAVED) {
        a->up = d->b.row_stride * 2;
        t.row_stride *= 2;
    }
    return moei_tensor_encode(&a->b, &t);
}

/* Checks options and buffers, and fills in the defaults. */
MOE_HOST moe_status moei_gemm_check(moe_grouped_gemm_desc* d)
{
    MOE_TRY(moei_gemm_check_options(d));
    return moei_gemm_check_buffers(d);
}

/* Returns the kernel's args for a checked descriptor. */
MOE_HOST moe_grouped_gemm_args moei_gemm_args_of(const moe_grouped_gemm_desc* d)
{
    moe_grouped_gemm_args a;
    memset(&a, 0, sizeof a);
    a.a = d->a;
    a.row_index = d->row_index;
    a.expert_offset = d->expert_offset;
    a.b = d->b;
    a.c.base = d->c;
    a.c.table = d->c_table;
    a.c.stride = d->c_stride;
    a.c.bias = d->bias;
    a.c.dtype = d->c_dtype;
    a.c.bias_dtype = d->dtype;
    a.c.activation = d->activation;
    a.c.gated = moe_activation_is_gated(d->activation) ? d->gate_up : 0;
    a.c.accumulate = d->accumulate;
    a.c.alpha = d->alpha;
    a.c.limit = d->limit;
    a.c.pre = d->pre;
    a.c.pre_stride = d->pre_stride;
    a.fault = d->fault;
    a.a_stride = d->a_stride;
    a.a_rows = d->a_rows;
    a.num_experts = d->num_experts;
    a.num_rows = d->num_rows;
    a.n = d->n;
    a.k = d->k;
    a.row_div = d->row_div;
    a.rank = d->rank;
    a.group = d->group;
    a.num_groups = d->num_groups;
    a.ready = d->ready;
    a.ready_value = d->ready_value;
    a.ready_timeout_ms = d->ready_timeout_ms;
    a.done = d->done;
    return a;
}

/* Checks a descriptor and resolves it into the args of moe_gemm_tile (tile.cuh), for a kernel of
   one's own. Errors: refused fields as of moe_grouped_gemm; MOE_ERR_CONFLICT for ready and done,
   which moe_gemm_tile does not heed; *args is then unchanged. To compile no
   kernel of this header, define MOE_GEMM_VARIANT_LIST(X, ...) as nothing before the #include. */
MOE_HOST moe_status moe_gemm_tile_resolve(const moe_grouped_gemm_desc* desc,
                                          moe_grouped_gemm_args* args)
{
    moe_grouped_gemm_desc d;
    MOE_REQUIRE(desc && args, MOE_ERR_NULL, desc);
    d = *desc;
    MOE_TRY(moei_gemm_check(&d));
    MOE_REQUIRE(!d.ready, MOE_ERR_CONFLICT, ready);
    MOE_REQUIRE(!d.done, MOE_ERR_CONFLICT, done);
    *args = moei_gemm_args_of(&d);
    return MOE_OK;
}

/* Refuses a product that MOE_GEMM_VARIANT_LIST lacks. Names the first of dtype, a_major, b_major
   that no entry matches. */
MOE_HOST moe_status moei_gemm_listed(const moe_grouped_gemm_desc* d)
{
    int dtype = 0, a_major = 0, b_major = 0;
    for (const moei_variant* v = moei_gemm_variants; v->kernel; ++v) {
        const int agrees = v->shape.dtype == d->dtype;
        dtype |= agrees;
        a_major |= agrees && v->shape.a_major == d->a_major;
        b_major |= agrees && v->shape.a_major == d->a_major && v->shape.b_major == d->b.major;
    }
    MOE_REQUIRE(dtype, MOE_ERR_NOT_COMPILED, dtype);
    MOE_REQUIRE(a_major, MOE_ERR_NOT_COMPILED, a_major);
    MOE_REQUIRE(b_major, MOE_ERR_NOT_COMPILED, b_major);
    return MOE_OK;
}

/* Returns the shared memory that depends on the product, bytes: tile_start, boxes. */
MOE_HOST size_t moei_gemm_more(const moei_variant* v, const moe_grouped_gemm_desc* d)
{
    const int boxed = v->path == MOE_GEMM_PATH_WGMMA && moei_gemm_boxed(d);
    return ((size_t)moei_gemm_groups(d) + 1) * 4 + (boxed ? 2 * MOEI_WGMMA_BOX : 0);
}

/* Sets *chosen to the variant for a checked descriptor on *dev: the first that suits and runs. */
MOE_HOST moe_status moei_gemm_choose(const moe_grouped_gemm_desc* d, const moe_device* dev,
                                     const moei_variant** chosen)
{
    int compiled = 0; /* 1: the requested tile has a body with these majors in some version */
    MOE_TRY(moei_gemm_listed(d));
    MOE_REQUIRE(MOE_ON_HOST || d->dtype == MOE_FP16 || dev->major >= 8, MOE_ERR_DEVICE, dtype);
    for (const moei_variant* v = moei_gemm_variants; v->kernel; ++v) {
        int runs;
        if (v->shape.dtype != d->dtype || v->shape.a_major != d->a_major ||
            v->shape.b_major != d->b.major ||
            v->rows == (d->row_index ? MOEI_VARIANT_IN_ORDER : MOEI_VARIANT_GATHERED) ||
            (d->path && v->path != d->path) ||
            (v->path == MOE_GEMM_PATH_WGMMA && !moei_gemm_wgmma_takes(d)) ||
            !(d->tile ? v->tile == d->tile
                      : d->path == MOE_GEMM_PATH_WGMMA || moei_gemm_suits(v, d, dev->sms)))
            continue;
        compiled |= v->least != MOEI_CODE_NEVER;
        MOE_TRY(moei_variant_runs(v, dev, moei_gemm_more(v, d), &runs));
        *chosen = v;
        if (runs) return MOE_OK;
    }
    MOE_REQUIRE(d->path != MOE_GEMM_PATH_WGMMA, compiled ? MOE_ERR_DEVICE : MOE_ERR_CONFLICT, path);
    MOE_REQUIRE(!d->tile || compiled, MOE_ERR_CONFLICT, tile);
    MOE_REQUIRE(!d->tile, MOE_ERR_DEVICE, tile);
    return MOE_STATUS(MOE_ERR_DEVICE, dtype); /* built without -arch=sm_80 or later, most often */
}

/* A prepared product: all but its stream is resolved, for the device that was current. */
typedef struct moe_grouped_gemm_prepared {
    moei_wgmma_args args; /* of the kernel; the WMMA path reads args.d alone */
    moe_gemm_plan plan;   /* the choice of kernel and grid */
    moe_launch launch;    /* kernel null: run queues nothing */
} moe_grouped_gemm_prepared;

/* Prepares *p, which is empty, for a checked descriptor. */
MOE_HOST moe_status moei_gemm_prepare(const moe_grouped_gemm_desc* d, moe_grouped_gemm_prepared* p)
{
    moe_device dev;
    const moei_variant* v = 0;
    int64_t columns, tiles;
    MOE_TRY(moe_device_query(&dev));
    MOE_TRY(moei_gemm_choose(d, &dev, &v));
    columns = moe_activation_is_gated(d->activation) ? v->shape.tile_n / 2 : v->shape.tile_n;
    tiles = ((int64_t)d->num_rows / v->shape.tile_m + moei_gemm_groups(d) + 1) *
            ((d->n + columns - 1) / columns); /* upper bound */
    MOE_REQUIRE(tiles <= MOEI_VARIANT_MAX_TILES, MOE_ERR_RANGE, num_rows);
    p->args.d = moei_gemm_args_of(d);
    p->plan = moei_variant_plan(v, &dev, tiles, moei_gemm_more(v, d), d->grid_limit);
    if (d->num_rows == 0) return MOE_OK;
    if (v->path == MOE_GEMM_PATH_WGMMA) {
        const moe_status s = moei_gemm_encode(&p->args, d);
        if (s != MOE_OK && !d->path) { /* a driver without tensor maps, or one that refuses these */
            moe_grouped_gemm_desc other = *d;
            other.path = MOE_GEMM_PATH_WMMA;
            return moei_gemm_prepare(&other, p);
        }
        MOE_TRY(s);
        p->args.ticket = (int32_t*)d->workspace;
    }
    return moei_variant_prepare(&p->launch, v, p->plan.blocks, moei_gemm_more(v, d));
}

/* Prepares *p, which is empty, for an unchecked descriptor. */
MOE_HOST moe_status moei_gemm_check_prepare(const moe_grouped_gemm_desc* desc,
                                            moe_grouped_gemm_prepared* p)
{
    moe_grouped_gemm_desc d = *desc;
    MOE_TRY(moei_gemm_check(&d));
    return moei_gemm_prepare(&d, p);
}

/* Prepares a product; moe_grouped_gemm_run queues it any number of times. *p keeps the addresses of
   tables, not their entries. Errors: each field that is not as documented in desc.h, with its own
   status; MOE_ERR_DEVICE where the device or this binary has no kernel for it; MOE_ERR_NOT_COMPILED
   where MOE_GEMM_VARIANT_LIST has none. num_rows = 0 is no error. On an error *p is empty. */
MOE_HOST moe_status moe_grouped_gemm_prepare(const moe_grouped_gemm_desc* desc,
                                             moe_grouped_gemm_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_gemm_check_prepare(desc, p));
}

/* Queues a prepared product whose counter of tiles is 0. */
MOE_HOST moe_status moei_gemm_run_cleared(const moe_grouped_gemm_prepared* p, cudaStream_t stream)
{
    if (p->plan.path != MOE_GEMM_PATH_WGMMA) return MOE_RUN(&p->launch, p->args.d, stream);
    return MOE_RUN(&p->launch, *(const moei_wgmma_param*)(const void*)&p->args, stream);
}

/* Queues a prepared product on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_grouped_gemm_run(const moe_grouped_gemm_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    if (p->args.ticket && p->launch.kernel)
        MOE_TRY_CUDA(cudaMemsetAsync(p->args.ticket, 0, 4, stream));
    return moei_gemm_run_cleared(p, stream);
}

/* Sets *plan to the kernel and grid of moe_grouped_gemm for this descriptor on the current device.
   Errors as of moe_grouped_gemm_prepare. */
MOE_HOST moe_status moe_grouped_gemm_plan(const moe_grouped_gemm_desc* desc, moe_gemm_plan* plan)
{
    moe_grouped_gemm_prepared p;
    MOE_REQUIRE(desc && plan, MOE_ERR_NULL, desc);
    MOE_TRY(moe_grouped_gemm_prepare(desc, &p));
    *plan = p.plan;
    return MOE_OK;
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_grouped_gemm(const moe_grouped_gemm_desc* desc, cudaStream_t stream)
{
    moe_grouped_gemm_prepared p;
    MOE_TRY(moe_grouped_gemm_prepare(desc, &p));
    return moe_grouped_gemm_run(&p, stream);
}

/* Loads this header's kernels, before their first launch. */
MOE_HOST moe_status moe_grouped_gemm_preload(void)
{
    return moei_variant_preload(moei_gemm_variants);
}

MOEI_PRELOAD_INCLUDED(grouped_gemm)

#endif
