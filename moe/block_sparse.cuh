/* block_sparse.cuh: computes C = A * B on tensor cores where one of the three is block-sparse.

     sdd   C sparse   C[i, j] = A[i, :] * B[:, j]            only for sparse blocks (i, j) of C
     dsd   A sparse   C[i, :] = sum of A[i, l] * B[l, :]     over sparse blocks (i, l) of A
     dds   B sparse   C[:, j] = sum of A[:, l] * B[l, j]     over sparse blocks (l, j) of B

   In:   A [m, k], B [k, n], rows contiguous, or stored transposed; fp16 or bf16
   Out:  C [m, n], rows contiguous; the dtype of A and B, or fp32
   Sparse blocks have 16, 32, 64 or 128 rows and, independently, as many columns; they may be ragged
   at the edges. Masks, storage and tables: block_sparse/desc.h.

   Masked-out sparse blocks are neither loaded nor computed, so their contents never matter. Those
   of C are not written; with zero_masked they become zeros. Rows (dsd) or columns (dds) of C
   without any sparse block become zeros. Both gradients are calls of the same three:

                 dA                            dB
     sdd   dsd(dC, B transposed)       dds(A transposed, dC)          with C's mask
     dsd   sdd(dC, B transposed)       dsd(A transposed, dC)          with A's mask
     dds   dds(dC, B transposed)       sdd(A transposed, dC)          with B's mask

   Numerics: fp32 accumulation; each element is one sum with k ascending. Equal inputs give equal
   bits, and a full mask gives those of the dense product by the same tile.

   Cost: 2 * elements of the present sparse blocks * k (dsd: n, dds: m) flops. One launch, or two
   where block rows are joined. A small launch before each makes the lists of strips; not where the
   mask is a list and no block rows are joined. zero_masked adds a launch.
   Minimum architecture: sm_75 for fp16, sm_80 for bf16.

     moe_block_sparse_desc d = {0};
     d.op = MOE_BLOCK_SPARSE_DSD;  d.a = a;  d.b = b;  d.c = c;  d.m = m;  d.n = n;  d.k = k;
     d.mask.bytes = mask;  d.mask.rows = m;  d.mask.columns = k;
     d.mask.block_rows = d.mask.block_columns = 64;
     moe_block_sparse_workspace(&d, &d.workspace_bytes);  d.workspace = ...;
     moe_status s = moe_block_sparse(&d, stream);

   The rule for tiles, without a choice: 128x256. Block rows of fewer than 128 rows are joined into
   strips. Where neighbouring block rows have the same block columns, sparse blocks of 16, 32 and 64
   run like large ones. Strips whose block rows differ share a tile badly: the device finds these
   strips. A second launch computes them by the fallback tile, 64x256 for sparse blocks of 64 rows,
   else 32x256. A packed matrix with sparse blocks of fewer than 128 rows runs by the tile of the
   sparse blocks' height alone. A smaller tile (64x256, then 64x64) runs where the device cannot run
   the first tile. A smaller tile also runs where C has fewer tiles than the device has
   multiprocessors. Walked by columns, block columns take the part of block rows.

   Source of the method: Gale, Narayanan, Young and Zaharia, MegaBlocks (2022), also of the names
   sdd, dsd and dds. */
#ifndef MOE_BLOCK_SPARSE_CUH
#define MOE_BLOCK_SPARSE_CUH

#include "block_sparse/list.cuh"
#include "block_sparse/prepare.cuh"
#include "preload.cuh"

/* name, tile_m, tile_n, tile_k, warps along rows and columns, stages, thread blocks a
   multiprocessor. */
#define MOEI_SPARSE_TILE_LIST(X, ...)                                                              \
    X(128x256, 128, 256, 64, 2, 4, 3, 1, __VA_ARGS__)                                              \
    X(64x256, 64, 256, 32, 1, 4, 4, 2, __VA_ARGS__)                                                \
    X(32x256, 32, 256, 64, 1, 4, 3, 2, __VA_ARGS__)                                                \
    X(64x64, 64, 64, 64, 2, 2, 2, 3, __VA_ARGS__)

/* The dtypes of every tile. Define this list before the include to compile fewer kernels. */
#ifndef MOE_BLOCK_SPARSE_DTYPE_LIST
#define MOE_BLOCK_SPARSE_DTYPE_LIST(X)                                                             \
    X(f16, MOE_FP16)                                                                               \
    X(bf16, MOE_BF16)
#endif

/* Least version of code with a body: bf16 80; fp16 75 where the ring is below 64 KiB, else 80. */
#define MOEI_SPARSE_LEAST(dtype, tile_m, tile_n, tile_k, stages)                                   \
    ((dtype) == MOE_FP16 && (stages)*2 * ((tile_m) + (tile_n)) * (tile_k) < 65536 ? 75 : 80)

#define MOEI_SPARSE_KERNEL(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks, suffix, \
                           dtype)                                                                  \
    MOE_KERNEL((warps_m) * (warps_n)*32, blocks)                                                   \
    moei_sparse_##name##_##suffix(MOE_ARG(moei_sparse_args) d)                                     \
    {                                                                                              \
        MOE_SHARED(moei_sparse_shared, s);                                                         \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        const moe_gemm_shape f =                                                                   \
            moe_gemm_shape_of(tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, 0, 0);      \
        if (MOEI_CODE_HERE(MOEI_SPARSE_LEAST(dtype, tile_m, tile_n, tile_k, stages),               \
                           MOEI_CODE_ANY) &&                                                       \
            !moe_fault_stopped(d.fault))                                                           \
            for (int round = 0; moei_sparse_tile(&d, shared, &s, round, f); ++round)               \
                __syncthreads();                                                                   \
    }
#define MOEI_SPARSE_KERNELS(suffix, dtype) MOEI_SPARSE_TILE_LIST(MOEI_SPARSE_KERNEL, suffix, dtype)
MOE_BLOCK_SPARSE_DTYPE_LIST(MOEI_SPARSE_KERNELS)
#undef MOEI_SPARSE_KERNELS
#undef MOEI_SPARSE_KERNEL

static const moei_variant moei_sparse_variants[] = {
#define MOEI_SPARSE_ROW(name, tile_m, tile_n, tile_k, warps_m, warps_n, stages, blocks, suffix,    \
                        dtype)                                                                     \
    {(const void*)moei_sparse_##name##_##suffix,                                                   \
     "moei_sparse_" #name "_" #suffix,                                                             \
     MOE_GEMM_PATH_WMMA,                                                                           \
     MOEI_VARIANT_ANY_ROWS,                                                                        \
     1,                                                                                            \
     MOEI_SHAPE_INIT(tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, 0, 0),               \
     MOE_BLOCK_SPARSE_TILE_##name,                                                                 \
     blocks,                                                                                       \
     MOEI_RING_BYTES(1, tile_m, tile_n, tile_k, warps_m, warps_n, stages),                         \
     MOEI_SPARSE_LEAST(dtype, tile_m, tile_n, tile_k, stages),                                     \
     MOEI_CODE_ANY},
#define MOEI_SPARSE_ROWS(suffix, dtype) MOEI_SPARSE_TILE_LIST(MOEI_SPARSE_ROW, suffix, dtype)
    MOE_BLOCK_SPARSE_DTYPE_LIST(MOEI_SPARSE_ROWS)
#undef MOEI_SPARSE_ROWS
#undef MOEI_SPARSE_ROW
        MOEI_VARIANT_END};

/* Returns the kernel of one tile and dtype; null where MOE_BLOCK_SPARSE_DTYPE_LIST lacks the dtype.
   One kernel serves all majors: they are arguments. */
MOE_HOST const moei_variant* moei_sparse_variant(int tile, int dtype)
{
    return moei_variant_find(moei_sparse_variants, tile, dtype, 0, 0);
}

/* Refuses a dtype that this file was not compiled with, or that the device lacks. */
MOE_HOST moe_status moei_sparse_check_dtype(int dtype)
{
    moe_device dev;
    MOE_REQUIRE(moei_sparse_variant(MOE_BLOCK_SPARSE_TILE_64x64, dtype), MOE_ERR_NOT_COMPILED,
                dtype);
    MOE_TRY(moe_device_query(&dev));
    MOE_REQUIRE(MOE_ON_HOST || dtype == MOE_FP16 || dev.major >= 8, MOE_ERR_DEVICE, dtype);
    return MOE_OK;
}

/* Returns the kernel of the fallback tile for the strips that tile t leaves; null where t computes
   all of them. */
MOE_HOST const moei_variant* moei_sparse_fallback(const moe_block_sparse_desc* d,
                                                  const moei_variant* t, int fallback)
{
    const moei_variant* r = moei_sparse_variant(fallback, d->dtype);
    return r && r->shape.tile_m < t->shape.tile_m && moei_sparse_join(d, t) > 1 ? r : 0;
}

/* Returns the tile that is as high as the sparse blocks: 128x256, 64x256 or 32x256. */
MOE_HOST int moei_sparse_tile_of_blocks(const moe_block_sparse_desc* d)
{
    const int height = moei_sparse_by_column(d) ? d->mask.block_columns : d->mask.block_rows;
    return height >= 128  ? MOE_BLOCK_SPARSE_TILE_128x256
           : height == 64 ? MOE_BLOCK_SPARSE_TILE_64x256
                          : MOE_BLOCK_SPARSE_TILE_32x256;
}

/* Chooses the tiles of a checked descriptor: the caller's, or by the rule at the top. Writes the
   tile to t[0] and the fallback tile, or null, to t[1]. */
MOE_HOST moe_status moei_sparse_choose(const moe_block_sparse_desc* d, const moei_variant** t)
{
    const int block_tile = moei_sparse_tile_of_blocks(d);
    const int candidates[] = {d->choice.tile ? d->choice.tile
                              : d->packed    ? block_tile /* block rows cannot be joined */
                                             : MOE_BLOCK_SPARSE_TILE_128x256,
                              MOE_BLOCK_SPARSE_TILE_64x256, MOE_BLOCK_SPARSE_TILE_64x64};
    moe_device dev;
    MOE_TRY(moei_sparse_check_dtype(d->dtype));
    MOE_TRY(moe_device_query(&dev));
    for (int w = 0; w < 3; ++w) {
        const moei_variant* o = moei_sparse_variant(candidates[w], d->dtype);
        const int64_t rows = d->op == MOE_BLOCK_SPARSE_DDS ? d->n : d->m;
        const int64_t columns = d->op == MOE_BLOCK_SPARSE_DDS ? d->m : d->n;
        const int enough = (rows + o->shape.tile_m - 1) / o->shape.tile_m *
                               ((columns + o->shape.tile_n - 1) / o->shape.tile_n) >=
                           dev.sms;
        int runs;
        MOE_TRY(moei_variant_runs(o, &dev, 0, &runs));
        t[0] = o;
        MOE_REQUIRE(runs || !d->choice.tile, MOE_ERR_DEVICE, choice);
        if (!runs || !(w == 2 || d->choice.tile || enough)) continue;
        t[1] = moei_sparse_fallback(d, o,
                                    d->choice.tile ? d->choice.fallback_tile
                                    : w < 2        ? block_tile
                                                   : 0);
        if (t[1]) MOE_TRY(moei_variant_runs(t[1], &dev, 0, &runs));
        MOE_REQUIRE(runs || !d->choice.tile, MOE_ERR_DEVICE, choice);
        if (!runs) t[1] = 0;
        return MOE_OK;
    }
    return MOE_STATUS(MOE_ERR_DEVICE, dtype); /* often: built without -arch=sm_80 or later */
}

/* Plans both tiles; their buffers of the workspace begin at `base`. Returns its bytes in *bytes. */
MOE_HOST moe_status moei_sparse_plan_both(const moe_block_sparse_desc* d,
                                          const moei_variant* const* t, char* base, size_t* bytes,
                                          moei_sparse_plan* p)
{
    *bytes = 0;
    MOE_TRY(moei_sparse_plan_tile(d, t[0], base, bytes, 0, &p[0]));
    return t[1] ? moei_sparse_plan_tile(d, t[1], base, bytes, &p[0], &p[1]) : MOE_OK;
}

/* Returns in *bytes the workspace of moe_block_sparse for this descriptor: for its choice or,
   without one, enough for any choice. Reads sizes and options, and which pointers of the mask and
   the tables are null. Errors: a field of these that is refused. */
MOE_HOST moe_status moe_block_sparse_workspace(const moe_block_sparse_desc* desc, size_t* bytes)
{
    moe_block_sparse_desc d;
    moe_status refused = MOE_OK;
    int offered = 0;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    MOE_TRY(moei_sparse_check_options(&d));
    *bytes = 0;
    if (d.m == 0 || d.n == 0) return MOE_OK;
    MOE_REQUIRE(moei_sparse_variant(MOE_BLOCK_SPARSE_TILE_64x64, d.dtype), MOE_ERR_NOT_COMPILED,
                dtype);
    for (const moei_variant* o = moei_sparse_variants; o->kernel; ++o)
        for (int fallback = 0; fallback <= MOE_BLOCK_SPARSE_TILE_64x64; ++fallback) {
            const moei_variant* const t[] = {o, moei_sparse_fallback(&d, o, fallback)};
            moei_sparse_plan p[2];
            moe_status s;
            size_t needed;
            if (o->shape.dtype != d.dtype) continue;
            if (d.choice.tile && (d.choice.tile != o->tile || d.choice.fallback_tile != fallback))
                continue;
            s = moei_sparse_plan_both(&d, t, 0, &needed, p);
            if (s != MOE_OK) { /* too many tiles of this shape */
                refused = s;
                continue;
            }
            offered = 1;
            if (needed > *bytes) *bytes = needed;
        }
    return offered ? MOE_OK : refused;
}

/* Arguments of moei_sparse_zero. */
typedef struct moei_sparse_zero_args {
    moe_block_sparse_mask mask;
    char* c;                      /* [m, n], strided */
    int64_t stride;               /* elements between rows of c */
    uint64_t* fault;              /* [1] fault word; or null */
    int32_t rows, columns, bytes; /* RB, CB; bytes of an element of c */
} moei_sparse_zero_args;

/* Writes zeros to the masked-out sparse blocks of C. A thread block takes every gridDim.x-th sparse
   block, its threads 8 elements each.
     1. Find the sparse block in the mask: its byte, its bit, or its entry by binary search.
     2. Skip a present sparse block, and a block row whose offsets are bad: the product reports them
        where it walks the rows.
     3. Write zeros, 16 bytes at a time; elements one by one at the right edge. */
MOE_KERNEL(256, 1) moei_sparse_zero(MOE_ARG(moei_sparse_zero_args) d)
{
    const moe_block_sparse_mask* m = &d.mask;
    const int64_t blocks = (int64_t)d.rows * d.columns;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
        const int i = (int)(b / d.columns), j = (int)(b % d.columns);
        const int row = i * m->block_rows, column = j * m->block_columns;
        const int height = m->rows - row < m->block_rows ? m->rows - row : m->block_rows;
        const int width =
            m->columns - column < m->block_columns ? m->columns - column : m->block_columns;
        bool has;
        if (m->bytes) has = m->bytes[b] != 0;
        else if (m->bits)
            has = m->bits[i * (int64_t)((d.columns + 31) / 32) + j / 32] >> (j & 31) & 1;
        else {
            int lo = m->row_offset[i], hi = m->row_offset[i + 1]; /* lo: first entry >= j */
            const int end = hi;
            /* a bad list gets no zeros; the product checks the list */
            if (lo < 0 || hi < lo || hi > m->max_blocks) continue;
            while (lo < hi) {
                const int mid = (lo + hi) >> 1;
                if (m->column_index[mid] < j) lo = mid + 1;
                else hi = mid;
            }
            has = lo < end && m->column_index[lo] == j;
        }
        if (has) continue;
        for (int u = (int)threadIdx.x; u < height * m->block_columns / 8; u += 256) {
            const int r = u / (m->block_columns / 8), g = u % (m->block_columns / 8) * 8;
            char* to = d.c + ((row + r) * d.stride + column + g) * d.bytes;
            if (g + 8 <= width) {
                moei_store16(to, make_uint4(0, 0, 0, 0));
                if (d.bytes == 4) moei_store16(to + 16, make_uint4(0, 0, 0, 0));
            } else {
                for (int x = 0; x < (width - g) * d.bytes / 2; ++x) ((uint16_t*)to)[x] = 0;
            }
        }
    }
}

/* A prepared product: everything but the stream, for the device that was current. */
typedef struct moe_block_sparse_prepared {
    moei_sparse_zero_args zero;
    moe_launch zeroes; /* of zero; every launch is empty where not needed */
    struct {
        moei_sparse_args args;
        moei_sparse_strips_args strips;
        moe_launch lists, product; /* of strips; of args */
    } tile[2];                     /* the tile; the fallback tile */
} moe_block_sparse_prepared;

/* Prepares the launch that writes zeros, for a checked descriptor. */
MOE_HOST moe_status moei_sparse_prepare_zeroes(const moe_block_sparse_desc* d,
                                               moe_block_sparse_prepared* p)
{
    moei_sparse_zero_args* z = &p->zero;
    const int64_t rows = moe_block_sparse_count(d->m, d->mask.block_rows);
    const int64_t blocks = rows * moe_block_sparse_count(d->n, d->mask.block_columns);
    moe_launch_config c = moe_grid(blocks < 4096 ? blocks : 4096, 256, 0, 0);
    z->mask = d->mask;
    z->c = (char*)d->c;
    z->stride = d->c_stride;
    z->fault = d->fault;
    z->rows = (int32_t)rows;
    z->columns = moe_block_sparse_count(d->n, d->mask.block_columns);
    z->bytes = moe_dtype_bytes(d->c_dtype);
    c.dependent = 1;
    return MOE_PREPARE(&p->zeroes, moei_sparse_zero, c);
}

/* Fills in *p, which is all zero. */
MOE_HOST moe_status moei_sparse_prepare(const moe_block_sparse_desc* desc,
                                        moe_block_sparse_prepared* p)
{
    moe_block_sparse_desc d;
    const moei_variant* t[2];
    moei_sparse_plan plan[2];
    size_t bytes;
    d = *desc;
    MOE_TRY(moei_sparse_check_options(&d));
    MOE_TRY(moei_sparse_choose(&d, t));
    if (d.m == 0 || d.n == 0) return moei_sparse_check_buffers(&d, 0);
    MOE_TRY(moei_sparse_plan_both(&d, t, (char*)d.workspace, &bytes, plan));
    MOE_TRY(moei_sparse_check_buffers(&d, bytes));
    if (d.zero_masked) MOE_TRY(moei_sparse_prepare_zeroes(&d, p));
    for (int i = 0; i < 2 && t[i]; ++i) {
        p->tile[i].args = plan[i].args;
        p->tile[i].strips = plan[i].strips;
        if (plan[i].num_strips) {
            moe_launch_config c = moe_grid(plan[i].num_strips, MOEI_SPARSE_STRIPS_THREADS, 0, 0);
            c.dependent = 1;
            MOE_TRY(MOE_PREPARE(&p->tile[i].lists, moei_sparse_strips, c));
        }
        if (plan[i].tiles)
            MOE_TRY(moei_variant_prepare(&p->tile[i].product, t[i], plan[i].tiles, 0));
    }
    return MOE_OK;
}

/* Prepares a product: moe_block_sparse_run queues the launches any number of times. Between runs
   the mask may change; max_blocks and the addresses of the arrays and tables may not. Errors: every
   field as documented in block_sparse/desc.h, each with its own status. Sizes of 0 are no error. */
MOE_HOST moe_status moe_block_sparse_prepare(const moe_block_sparse_desc* desc,
                                             moe_block_sparse_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_sparse_prepare(desc, p));
}

/* Queues a prepared product on `stream`. */
MOE_HOST moe_status moe_block_sparse_run(const moe_block_sparse_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    MOE_TRY(MOE_RUN(&p->zeroes, p->zero, stream));
    for (int i = 0; i < 2; ++i) MOE_TRY(MOE_RUN(&p->tile[i].lists, p->tile[i].strips, stream));
    for (int i = 0; i < 2; ++i) MOE_TRY(MOE_RUN(&p->tile[i].product, p->tile[i].args, stream));
    return MOE_OK;
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_block_sparse(const moe_block_sparse_desc* desc, cudaStream_t stream)
{
    moe_block_sparse_prepared p;
    MOE_TRY(moe_block_sparse_prepare(desc, &p));
    return moe_block_sparse_run(&p, stream);
}

/* Fills in the fastest choice for this call. Times every tile that the device runs, with this mask,
   and again with a fallback tile where block rows are joined. Unlike the other functions, runs the
   product a few dozen times, and waits for the stream. Each run writes C. Makes and destroys two
   events. Ignores desc->choice; the workspace must have the bytes for any choice. Not allowed while
   a graph is captured. Errors: those of moe_block_sparse_prepare, and of the runtime. */
MOE_HOST moe_status moe_block_sparse_tune(const moe_block_sparse_desc* desc, cudaStream_t stream,
                                          moe_block_sparse_choice* choice)
{
    moe_block_sparse_desc d;
    moe_block_sparse_choice found;
    cudaEvent_t begin, end;
    moe_status status = MOE_OK;
    float best = 0.0f;
    MOE_REQUIRE(desc && choice, MOE_ERR_NULL, desc);
    d = *desc;
    memset(&d.choice, 0, sizeof d.choice);
    memset(&found, 0, sizeof found);
    {
        size_t bytes;
        MOE_TRY(moe_block_sparse_workspace(&d, &bytes));
        MOE_TRY(moei_sparse_check(&d, bytes));
    }
    d.fault = 0; /* a stop fault would stop the timed runs; later calls raise theirs */
    MOE_TRY_CUDA(cudaEventCreate(&begin));
    status = moe_cuda_status(cudaEventCreate(&end));
    if (status != MOE_OK) {
        cudaEventDestroy(begin);
        return status;
    }
    for (int i = 0; i < 2 * MOE_BLOCK_SPARSE_TILE_64x64 && status == MOE_OK; ++i) {
        const moei_variant* t = moei_sparse_variant(i / 2 + 1, d.dtype);
        float quickest = 0.0f;
        if (!t) continue;
        d.choice.tile = t->tile;
        d.choice.fallback_tile = i % 2 ? moei_sparse_tile_of_blocks(&d) : 0;
        if (i % 2 && !moei_sparse_fallback(&d, t, d.choice.fallback_tile)) continue;
        status = moe_block_sparse(&d, stream);
        if (moe_status_kind(status) == MOE_ERR_DEVICE) { /* the device cannot run this tile */
            status = MOE_OK;
            continue;
        }
        for (int rep = 0; rep < 5 && status == MOE_OK; ++rep) {
            float ms = 0.0f;
            status = moe_cuda_status(cudaEventRecord(begin, stream));
            if (status == MOE_OK) status = moe_block_sparse(&d, stream);
            if (status == MOE_OK) status = moe_cuda_status(cudaEventRecord(end, stream));
            if (status == MOE_OK) status = moe_cuda_status(cudaEventSynchronize(end));
            if (status == MOE_OK) status = moe_cuda_status(cudaEventElapsedTime(&ms, begin, end));
            if (rep == 0 || ms < quickest) quickest = ms;
        }
        if (status == MOE_OK && (found.tile == 0 || quickest < best)) {
            best = quickest;
            found = d.choice;
        }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    if (status == MOE_OK && found.tile == 0) status = MOE_STATUS(MOE_ERR_DEVICE, dtype);
    if (status == MOE_OK) *choice = found;
    return status;
}

/* Loads this header's kernels now, for the current device. */
MOE_HOST moe_status moe_block_sparse_preload(void)
{
    MOE_TRY(moei_variant_preload(moei_sparse_variants));
    MOE_TRY(moe_preload_kernel((const void*)moei_sparse_zero));
    return moe_preload_kernel((const void*)moei_sparse_strips);
}

MOEI_PRELOAD_INCLUDED(block_sparse)

#endif
