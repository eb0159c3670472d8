/* combine_scatter.cuh: adds weighted expert rows to their tokens by atomic additions, for callers
   without a map from slots to rows. combine.cuh is deterministic, and faster where route has
   written places.

     y[token(r), :] += row_weight[r] * row(r)[:]        for every row r of every expert
     row(r)   = table[e] + (r - first row of e) * row_stride,  or  rows + r * row_stride
     token(r) = row_token[r],  or  row_slot[r] / top_k

   In:   rows fp32, fp16 or bf16; where each expert's rows begin: expert_offset [E + 1],
         expert_count [E], or both (of a padded expert the count is less than its rows)
         y [T, H]: the caller sets it to 0, or to the residual, before
   Out:  y [T, H] fp32, fp16 or bf16
   Numerics: not deterministic: the order of the additions, and so the last bits of y, differ from
   run to run. weight * row is computed in fp32 and rounded to y's dtype; y is rounded at each
   addition. With K rows a token, bf16 y is exact to about (K + 1) 2^-8 of the sum of the
   |products|. Use fp32 y where memory allows.
   Faults: an expert whose offset or count is not possible is skipped (BAD_OFFSET). So is an expert
   with rows and a null or misaligned address (BAD_TABLE). With a fault word these two stop the
   whole launch, and which of the other experts' rows are in y is undefined. A row whose token is
   out of range is skipped (BAD_ROW); -1 is an unused row.

   Cost: one launch over a grid of (rows of the fullest expert) x (experts) x (groups of columns);
   thread blocks past an expert's last row exit at once. No concatenation, no workspace. Each row is
   read once; y takes one 16-byte reduction for each 16 bytes that a row changes (sm_90; narrower
   ones before). A group of columns is so small that the y of all tokens stays in L2 while rows are
   added. 16-byte vectors where the rows of y and of the expert begin at multiples of 16 bytes;
   other shapes work, slower. Minimum architecture: sm_75.

     cudaMemsetAsync(y, 0, T * H * 4, stream);
     moe_combine_scatter_desc c = {0};
     c.table = table;  c.expert_offset = offset;  c.row_token = token;  c.row_weight = weight;
     c.y = y;  c.y_dtype = MOE_FP32;
     c.num_tokens = T;  c.hidden = H;  c.num_experts = E;  c.num_rows = R;
     moe_status s = moe_combine_scatter(&c, stream);

   For kernels of one's own: moe_add_row_atomic.

   Source: the grouped combine without `cat`: pointer table, one launch, early exit, atomics. */
#ifndef MOE_COMBINE_SCATTER_CUH
#define MOE_COMBINE_SCATTER_CUH

#include "base/block.cuh"
#include "base/check.h"
#include "base/copy.cuh"
#include "base/fault.cuh"
#include "base/numeric.cuh"
#include "base/warp.cuh"
#include "faults.h"
#include "fields.h"
#include "layout.h"
#include "preload.cuh"

/* What moe_combine_scatter takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_combine_scatter_desc {
    /* in */
    const void* const* table;     /* [E] address of each expert's rows; null: rows */
    const void* rows;             /* [R, H] rows_dtype, of all experts; null with a table */
    const int32_t* expert_offset; /* [E + 1] first row of each expert; null: sums of the counts */
    const int32_t* expert_count;  /* [E] rows of each expert; null: all up to the next offset */
    const int32_t* row_token;     /* [R] token of each row, -1 = unused; null: row_slot */
    const int32_t* row_slot;      /* [R] route's: slot of each row, -1 = unused; null: row_token */
    const float* row_weight;      /* [R] factor on each row; null: 1 each */
    int64_t row_stride;           /* elements between rows, >= H; 0 = H */
    int32_t rows_dtype;           /* moe_dtype; 0 = bf16 */
    int32_t top_k;                /* K >= 1: slots of a token, with row_slot; else not read */
    /* in and out */
    void* y;          /* [T, H] y_dtype, added to */
    int64_t y_stride; /* elements between rows, >= H; 0 = H */
    int32_t y_dtype;  /* moe_dtype; 0 = rows_dtype */
    uint64_t* fault;  /* [1] fault word; or null */
    /* sizes */
    int32_t num_tokens;  /* T >= 0 */
    int32_t hidden;      /* H, 1 .. 2^28 */
    int32_t num_experts; /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t num_rows;    /* R >= 0: rows of all experts, entries of the [R] arrays */
    int32_t max_rows;    /* most rows of an expert, as far as the host knows, >= 0: sizes the grid
                            alone, an expert may have more; 0 = R */
    int32_t rank;        /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
} moe_combine_scatter_desc;

/* ---- adding one row ---- */

/* The elements of a row for 16 bytes of y, from column h on: width (a literal), 4 or 8. */
typedef struct moei_scatter_vector {
    uint4 raw[2]; /* rows_dtype, not multiplied yet */
} moei_scatter_vector;

/* Loads the `width` elements from column h of a row on, by aligned vectors of 16 or 8 bytes. */
MOE_DEVICE void moei_scatter_load(moei_scatter_vector* p, const void* row, int h,
                                  const int rows_dtype, const int width)
{
    if (rows_dtype == MOE_FP32) {
        p->raw[0] = moei_load16_once((const float*)row + h);
        if (width == 8) p->raw[1] = moei_load16_once((const float*)row + h + 4);
    } else if (width == 8) {
        p->raw[0] = moei_load16_once((const uint16_t*)row + h);
    } else {
        const uint2 u = moei_load8_once((const uint16_t*)row + h);
        p->raw[0].x = u.x, p->raw[0].y = u.y;
    }
}

/* Adds weight * *p to 16 bytes of y, from column h on, by moei_add16_atomic. */
MOE_DEVICE void moei_scatter_add(void* y, int y_dtype, const moei_scatter_vector* p, int h,
                                 float weight, const int rows_dtype, const int width)
{
    const uint32_t w[8] = {p->raw[0].x, p->raw[0].y, p->raw[0].z, p->raw[0].w,
                           p->raw[1].x, p->raw[1].y, p->raw[1].z, p->raw[1].w};
    float v[8];
    MOE_UNROLL
    for (int i = 0; i < width; i += 2) {
        if (rows_dtype == MOE_FP32) {
            v[i] = __uint_as_float(w[i]), v[i + 1] = __uint_as_float(w[i + 1]);
        } else {
            const float2 f = moe_unpack2(w[i / 2], rows_dtype);
            v[i] = f.x, v[i + 1] = f.y;
        }
    }
    MOE_UNROLL
    for (int i = 0; i < width; ++i) v[i] *= weight;
    if (width == 4)
        moei_add16_atomic((float*)y + h,
                          make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                     __float_as_uint(v[2]), __float_as_uint(v[3])),
                          MOE_FP32);
    else
        moei_add16_atomic((uint16_t*)y + h, moei_pack_8(v, y_dtype), y_dtype);
}

/* Adds columns 0 .. columns - 1, a multiple of width. A thread has four vectors in flight.
   rows_dtype and width are literals. */
MOE_DEVICE void moei_scatter_wide(void* y, int y_dtype, const void* row, float weight, int columns,
                                  int thread, int threads, const int rows_dtype, const int width)
{
    const int step = threads * width;
    for (int h = thread * width; h < columns; h += 4 * step) {
        moei_scatter_vector p[4];
        MOE_UNROLL
        for (int i = 0; i < 4; ++i)
            if (h + i * step < columns)
                moei_scatter_load(&p[i], row, h + i * step, rows_dtype, width);
        MOE_UNROLL
        for (int i = 0; i < 4; ++i)
            if (h + i * step < columns)
                moei_scatter_add(y, y_dtype, &p[i], h + i * step, weight, rows_dtype, width);
    }
}

/* Adds columns `begin` .. columns - 1 of any alignment: by pairs of 16-bit y where y allows, else
   by single elements. */
MOE_DEVICE void moei_scatter_narrow(void* y, int y_dtype, const void* row, int rows_dtype,
                                    float weight, int begin, int columns, int thread, int threads)
{
    const bool pairs = y_dtype != MOE_FP32 && ((uintptr_t)y & 3) == 0 && begin % 2 == 0;
    const int each = pairs ? 2 : 1;
    for (int i = begin + each * thread; i < columns; i += each * threads) {
        const float v = weight * moe_load_f32(row, i, rows_dtype);
        if (y_dtype == MOE_FP32) atomicAdd((float*)y + i, v);
        else if (pairs && i + 1 < columns)
            moei_add4_atomic((uint16_t*)y + i,
                             moe_pack2(v, weight * moe_load_f32(row, i + 1, rows_dtype), y_dtype),
                             y_dtype);
        else moei_add2_atomic((uint16_t*)y + i, moe_f32_to_half(v, y_dtype), y_dtype);
    }
}

/* Adds y[0 .. columns) += weight * row[0 .. columns), for kernels of one's own. Each element is one
   atomic addition at the scope of the device. `threads` threads share the work; this one is number
   `thread` of them: (lane, 32) for a warp, (threadIdx.x, blockDim.x) for a block. The threads need
   not converge: no barrier, no shared memory. y and row are in global memory, aligned to their
   elements; 16-byte vectors where both begin at multiples of 16. The dtypes are fp32, fp16 or bf16,
   best given as literals. Rounding: see the top. */
MOE_DEVICE void moe_add_row_atomic(void* y, int y_dtype, const void* row, int rows_dtype,
                                   float weight, int columns, int thread, int threads)
{
    const int width = y_dtype == MOE_FP32 ? 4 : 8;
    int done = 0;
    if ((((uintptr_t)y | (uintptr_t)row) & 15) == 0) {
        done = columns - columns % width;
        if (y_dtype == MOE_FP32) {
            if (rows_dtype == MOE_FP32)
                moei_scatter_wide(y, y_dtype, row, weight, done, thread, threads, MOE_FP32, 4);
            else if (rows_dtype == MOE_FP16)
                moei_scatter_wide(y, y_dtype, row, weight, done, thread, threads, MOE_FP16, 4);
            else moei_scatter_wide(y, y_dtype, row, weight, done, thread, threads, MOE_BF16, 4);
        } else {
            if (rows_dtype == MOE_FP32)
                moei_scatter_wide(y, y_dtype, row, weight, done, thread, threads, MOE_FP32, 8);
            else if (rows_dtype == MOE_FP16)
                moei_scatter_wide(y, y_dtype, row, weight, done, thread, threads, MOE_FP16, 8);
            else moei_scatter_wide(y, y_dtype, row, weight, done, thread, threads, MOE_BF16, 8);
        }
    }
    if (done < columns)
        moei_scatter_narrow(y, y_dtype, row, rows_dtype, weight, done, columns, thread, threads);
}

/* ---- the kernel ---- */

#define MOEI_SCATTER_THREADS 256 /* threads a block */
#define MOEI_SCATTER_WARPS (MOEI_SCATTER_THREADS / 32)
#define MOEI_SCATTER_ROWS 4 /* rows that a warp looks up together */

/* The argument of the kernels. */
typedef struct moei_scatter_args {
    moe_combine_scatter_desc d; /* defaults filled in */
    int32_t columns;            /* columns of a group; blockIdx.z is the group */
} moei_scatter_args;

/* Sets *begin and *count to the first row and the number of rows of expert e. Returns false, and
   raises BAD_OFFSET, where they are not possible. All threads of the block call it and get the same
   answer. */
MOE_DEVICE bool moei_scatter_rows(const moe_combine_scatter_desc* d,
                                  moe_block_scan_scratch* scratch, int e, int* begin, int* count)
{
    bool good;
    if (d->expert_offset) {
        const int first = d->expert_offset[e], end = d->expert_offset[e + 1];
        const int n = d->expert_count ? d->expert_count[e] : 0;
        good = first >= 0 && end >= first && end <= d->num_rows && n >= 0 && n <= end - first;
        *begin = first;
        *count = !good || d->expert_count ? n : end - first;
    } else {
        unsigned before = 0;
        int all, high;
        for (int i = (int)threadIdx.x; i < e; i += (int)blockDim.x) {
            const int n = d->expert_count[i];
            if (n > 0) before += (unsigned)n;
            if (before > 0x7fffffffu) before = 0x80000000u; /* more than any number of rows */
        }
        (void)moe_block_exclusive_scan((int)(before >> 16), scratch, &high);
        (void)moe_block_exclusive_scan((int)before, scratch, &all);
        *begin = all;
        *count = d->expert_count[e];
        good = high < 1 << 15 && /* no wrap: the sum is below 2^32 */
               *count >= 0 && (unsigned)all <= (unsigned)d->num_rows && *count <= d->num_rows - all;
    }
    if (!good && threadIdx.x == 0) moe_fault_raise(d->fault, MOE_FAULT_BAD_OFFSET, d->rank, e);
    return good;
}

/* Adds one group of columns of some rows of expert blockIdx.y. All threads of the block.
     1. the expert's rows and their address; faults
     2. each warp looks up to four rows up together, one in each of four lanes
     3. the warp adds these rows one after another */
MOE_DEVICE_BODY void moei_scatter_block(const moei_scatter_args* a, moe_block_scan_scratch* scratch,
                                        const int rows_dtype)
{
    const moe_combine_scatter_desc* d = &a->d;
    const int e = (int)blockIdx.y, column = (int)blockIdx.z * a->columns;
    const int left = d->hidden - column, columns = a->columns < left ? a->columns : left;
    const int row_bytes = rows_dtype == MOE_FP32 ? 4 : 2, y_bytes = d->y_dtype == MOE_FP32 ? 4 : 2;
    const int block_rows = MOEI_SCATTER_WARPS * MOEI_SCATTER_ROWS;
    const char* base;
    int begin, count;

    if (!moei_scatter_rows(d, scratch, e, &begin, &count)) return; /* 1. rows */
    if ((int64_t)blockIdx.x * block_rows >= count) return;
    base = d->table ? (const char*)d->table[e]
                    : (const char*)d->rows + begin * d->row_stride * row_bytes;
    if (!base || ((uintptr_t)base & (uintptr_t)(row_bytes - 1)) != 0) {
        if (threadIdx.x == 0) moe_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, d->rank, e);
        return;
    }
    /* after the checks: every run meets the same faults, whichever block is first */
    if (moe_fault_stopped(d->fault)) return;
    for (int64_t first = (int64_t)blockIdx.x * block_rows + moe_warp(); first < count;
         first += (int64_t)gridDim.x * block_rows) {
        const int64_t mine = first + (int64_t)moe_lane() * MOEI_SCATTER_WARPS;
        int token = -1;
        float weight = 1.0f;
        if (moe_lane() < MOEI_SCATTER_ROWS && mine < count) { /* 2. look up */
            const int64_t r = begin + mine;
            token = d->row_token ? d->row_token[r] : d->row_slot[r];
            if (d->row_weight) weight = d->row_weight[r];
            if (token >= 0 && d->row_slot) token /= d->top_k;
            if (token < -1 || token >= d->num_tokens) {
                moe_fault_raise(d->fault, MOE_FAULT_BAD_ROW, d->rank, r);
                token = -1;
            }
        }
        for (int i = 0; i < MOEI_SCATTER_ROWS; ++i) { /* 3. add */
            const int t = __shfl_sync(MOE_FULL_WARP, token, i);
            const float w = __shfl_sync(MOE_FULL_WARP, weight, i);
            if (t < 0) continue;
            moe_add_row_atomic((char*)d->y + (t * d->y_stride + column) * y_bytes, d->y_dtype,
                               base + ((first + i * MOEI_SCATTER_WARPS) * d->row_stride + column) *
                                          row_bytes,
                               rows_dtype, w, columns, moe_lane(), 32);
        }
    }
}

/* Thread blocks a multiprocessor: four where 64 registers a thread suffice. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
#define MOEI_SCATTER_BLOCKS 4
#else
#define MOEI_SCATTER_BLOCKS 2
#endif

#define MOEI_SCATTER_LIST(X) X(fp32, MOE_FP32) X(fp16, MOE_FP16) X(bf16, MOE_BF16)

/* The kernel for one dtype of rows. */
#define MOEI_SCATTER_KERNEL(name, dtype)                                                           \
    MOE_KERNEL(MOEI_SCATTER_THREADS, MOEI_SCATTER_BLOCKS)                                          \
    moei_combine_scatter_##name(MOE_ARG(moei_scatter_args) a)                                      \
    {                                                                                              \
        MOE_SHARED(moe_block_scan_scratch, scratch);                                               \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        moei_scatter_block(&a, &scratch, dtype);                                                   \
    }
MOEI_SCATTER_LIST(MOEI_SCATTER_KERNEL)
#undef MOEI_SCATTER_KERNEL

/* ---- the station ---- */

/* Refuses sizes and options that are out of range or contradict each other; fills in the
   defaults. */
MOE_HOST moe_status moei_scatter_check_options(moe_combine_scatter_desc* d)
{
    const int64_t num_tokens = d->num_tokens, num_rows = d->num_rows, num_experts = d->num_experts;
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(num_experts >= 1 && num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE, num_experts);
    MOE_REQUIRE(num_rows >= 0, MOE_ERR_RANGE, num_rows);
    MOE_REQUIRE(d->max_rows >= 0, MOE_ERR_RANGE, max_rows);
    if (d->max_rows == 0 || d->max_rows > num_rows) d->max_rows = d->num_rows;
    if (d->rows_dtype == 0) d->rows_dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(d->rows_dtype), MOE_ERR_DTYPE, rows_dtype);
    if (d->y_dtype == 0) d->y_dtype = d->rows_dtype;
    MOE_REQUIRE(moe_dtype_bytes(d->y_dtype), MOE_ERR_DTYPE, y_dtype);
    if (d->row_stride == 0) d->row_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->row_stride, d->hidden, num_rows), MOE_ERR_STRIDE, row_stride);
    if (d->y_stride == 0) d->y_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->y_stride, d->hidden, num_tokens), MOE_ERR_STRIDE, y_stride);
    MOE_REQUIRE(!(d->table && d->rows), MOE_ERR_CONFLICT, rows);
    MOE_REQUIRE(!(d->row_token && d->row_slot), MOE_ERR_CONFLICT, row_slot);
    MOE_REQUIRE(!d->row_slot || d->top_k >= 1, MOE_ERR_RANGE, top_k);
    return MOE_OK;
}

/* Refuses buffers that are missing, misaligned or overlapping. Requires checked options. */
MOE_HOST moe_status moei_scatter_check_buffers(const moe_combine_scatter_desc* d)
{
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden;
    const uint64_t num_rows = (uint64_t)d->num_rows, num_experts = (uint64_t)d->num_experts;
    const moe_buffer b[] = {
        {d->table, num_experts * 8, 8, d->rows ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED,
         MOE_FIELD_table},
        {d->rows, moe_extent(d->num_rows, d->row_stride, hidden, d->rows_dtype),
         (uint32_t)moe_dtype_bytes(d->rows_dtype), MOE_BUFFER_READ, MOE_FIELD_rows},
        {d->expert_offset, num_experts * 4 + 4, 4,
         d->expert_count ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED, MOE_FIELD_expert_offset},
        {d->expert_count, num_experts * 4, 4, MOE_BUFFER_READ, MOE_FIELD_expert_count},
        {d->row_token, num_rows * 4, 4, d->row_slot ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED,
         MOE_FIELD_row_token},
        {d->row_slot, num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_row_slot},
        {d->row_weight, num_rows * 4, 4, MOE_BUFFER_READ, MOE_FIELD_row_weight},
        {d->y, moe_extent(num_tokens, d->y_stride, hidden, d->y_dtype),
         (uint32_t)moe_dtype_bytes(d->y_dtype), MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN,
         MOE_FIELD_y},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (num_tokens == 0 || num_rows == 0)
        return moe_check_buffers(b + count - 1, 1); /* the fault word alone */
    return moe_check_buffers(b, count);
}

/* Refuses what moe_combine_scatter_desc does not allow; fills in the defaults. */
MOE_HOST moe_status moei_scatter_check(moe_combine_scatter_desc* d)
{
    MOE_TRY(moei_scatter_check_options(d));
    return moei_scatter_check_buffers(d);
}

/* Most bytes of y, of all tokens, in a group of columns: they stay in L2 while rows pass through. A
   file may predefine it. */
#ifndef MOE_SCATTER_Y_BYTES
#define MOE_SCATTER_Y_BYTES (16 << 20)
#endif
#define MOEI_SCATTER_LEAST 512      /* least columns of a group of several */
#define MOEI_SCATTER_GRID (1 << 17) /* thread blocks, about; beyond, blocks loop over rows */

/* Returns the columns of a group, a multiple of 256: as many as keep y in L2, or fewer where the
   rows are too few to keep the device busy. sms: multiprocessors. */
MOE_HOST int moei_scatter_columns(const moe_combine_scatter_desc* d, int sms)
{
    const int64_t hidden = d->hidden;
    const int64_t fit =
        MOE_SCATTER_Y_BYTES / ((int64_t)d->num_tokens * moe_dtype_bytes(d->y_dtype));
    const int64_t spread =
        hidden * d->num_rows / ((int64_t)sms * 32); /* 32 warps a multiprocessor */
    int64_t columns = fit < spread ? fit : spread, groups;
    if (columns < MOEI_SCATTER_LEAST) columns = MOEI_SCATTER_LEAST;
    groups = (hidden + columns - 1) / columns;
    if (groups > 1024) groups = 1024;
    return (int)(((hidden + groups - 1) / groups + 255) / 256 * 256);
}

/* A prepared scatter: all but the stream, for the device that was current in prepare. */
typedef struct moe_combine_scatter_prepared {
    moei_scatter_args args;
    moe_launch launch; /* empty with T = 0 or R = 0 */
} moe_combine_scatter_prepared;

/* Fills in *p, which is all zeros. */
MOE_HOST moe_status moei_scatter_prepare(const moe_combine_scatter_desc* desc,
                                         moe_combine_scatter_prepared* p)
{
    moei_scatter_args* a;
    moe_launch_config c;
    moe_device dev;
    int64_t blocks, most, groups;
    a = &p->args;
    a->d = *desc;
    MOE_TRY(moei_scatter_check(&a->d));
    if (a->d.num_tokens == 0 || a->d.num_rows == 0) return MOE_OK;
    MOE_TRY(moe_device_query(&dev));
    a->columns = moei_scatter_columns(&a->d, dev.sms);
    groups = ((int64_t)a->d.hidden + a->columns - 1) / a->columns;
    blocks = ((int64_t)a->d.max_rows + MOEI_SCATTER_WARPS * MOEI_SCATTER_ROWS - 1) /
             (MOEI_SCATTER_WARPS * MOEI_SCATTER_ROWS);
    most = MOEI_SCATTER_GRID / (a->d.num_experts * groups);
    if (blocks > most) blocks = most;
    c = moe_grid(blocks < 1 ? 1 : blocks, MOEI_SCATTER_THREADS, 0, 0);
    c.grid.y = (unsigned)a->d.num_experts;
    c.grid.z = (unsigned)groups;
    c.dependent = 1;
#define MOEI_SCATTER_CASE(name, dtype)                                                            \
    if (a->d.rows_dtype == dtype) return MOE_PREPARE(&p->launch, moei_combine_scatter_##name, c);
    MOEI_SCATTER_LIST(MOEI_SCATTER_CASE)
#undef MOEI_SCATTER_CASE
    return MOE_STATUS(MOE_ERR_DTYPE, rows_dtype);
}

/* Prepares a scatter, which moe_combine_scatter_run queues any number of times. Errors: a status
   for each field of the descriptor that is not as documented. T = 0 or R = 0 is no error. */
MOE_HOST moe_status moe_combine_scatter_prepare(const moe_combine_scatter_desc* desc,
                                                moe_combine_scatter_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_scatter_prepare(desc, p));
}

/* Queues prepared additions on `stream`. */
MOE_HOST moe_status moe_combine_scatter_run(const moe_combine_scatter_prepared* p,
                                            cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_combine_scatter(const moe_combine_scatter_desc* desc, cudaStream_t stream)
{
    moe_combine_scatter_prepared p;
    MOE_TRY(moe_combine_scatter_prepare(desc, &p));
    return moe_combine_scatter_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_combine_scatter_preload(void)
{
#define MOEI_SCATTER_LOAD(name, dtype)                                                             \
    MOE_TRY(moe_preload_kernel((const void*)moei_combine_scatter_##name));
    MOEI_SCATTER_LIST(MOEI_SCATTER_LOAD)
#undef MOEI_SCATTER_LOAD
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(combine_scatter)

#endif
