/* combine.cuh: sums each token's K weighted expert rows, found through the pointer table.

     y[t, :] = residual[t, :] + sum over k of weights[t, k] * row(place[t, k])[:]
                              + shared_weight[t] * shared[t, :]
     row(p)  = table[p.buffer] + p.row * row_stride

   A token gathers its rows from any buffers: one joined array, one allocation an expert, the memory
   of a peer. Rows are not concatenated; no atomics, no workspace.

   In:   place [T, K] moe_place (route's), the table of buffers, weights [T, K] fp32
         residual [T, H] of y's dtype, optional
         shared [T, H] of the rows' dtype, optional: a shared expert's output for every token
   Out:  y [T, H], each element written once. A token without rows gets its residual and its shared
         row, or 0.
   Rows and y are fp32, fp16 or bf16, each its own dtype. y may be the residual itself.

   Numerics: the sum is fp32 in ascending k, the residual first, the shared row last; past 8 rows in
   groups of 8. The sum is rounded once. Equal inputs give equal bits.

   A place with buffer -1 is skipped. A place outside the table is skipped and sets the fault word
   (BAD_PLACE). The same holds for a place at num_rows or more, where num_rows is given, and for a
   buffer whose address is null or misaligned.
   K up to MOE_COMBINE_MAX_TOP_K.
   Cost: one launch; each row read once, each output written once, at the rate of a device-to-device
   copy. Rows move as 16-byte vectors where H is a multiple of 8 (fp32 rows: 4) and the addresses
   are aligned to 16 bytes; other shapes work, slower. Minimum architecture: sm_75.

     moe_combine_desc c = {0};
     c.table = table;  c.num_buffers = n;         // [n] device addresses, in device memory
     c.place = place;  c.weights = weights;  c.y = y;
     c.num_tokens = T; c.hidden = H;  c.top_k = K;
     moe_status s = moe_combine(&c, stream);

   For kernels of one's own: moe_combine_row finds the row of a slot, moe_combine_token computes one
   token's row of y.

   Source: the grouped combine without `cat`: pointer indirection in place of concatenation; here as
   a gather, so that the sum needs no atomics. */
#ifndef MOE_COMBINE_CUH
#define MOE_COMBINE_CUH

#include "base/check.h"
#include "base/copy.cuh"
#include "base/fault.cuh"
#include "base/numeric.cuh"
#include "base/warp.cuh"
#include "faults.h"
#include "fields.h"
#include "layout.h"
#include "preload.cuh"

/* What moe_combine takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_combine_desc {
    /* in */
    const void* const* table;   /* [num_buffers] address of each buffer; null: rows */
    const void* rows;           /* [num_rows, H] rows_dtype, the one buffer; null with a table */
    const moe_place* place;     /* [T, K] place of each slot's row; {-1, -1} = none */
    const float* weights;       /* [T, K] factor on each slot's row; null: 1 each */
    const void* residual;       /* [T, H] y_dtype, added first; null: none */
    const void* shared;         /* [T, H] rows_dtype, row t added to token t last; null: none */
    const float* shared_weight; /* [T] factor on shared; null: 1 each; null without shared */
    int64_t row_stride;         /* elements between rows of every buffer, >= H; 0 = H */
    int64_t residual_stride;    /* elements between rows, >= H; 0 = H */
    int64_t shared_stride;      /* elements between rows, >= H; 0 = H */
    int32_t rows_dtype;         /* moe_dtype; 0 = bf16 */
    /* out */
    void* y;          /* [T, H] y_dtype */
    int64_t y_stride; /* elements between rows, >= H; 0 = H */
    int32_t y_dtype;  /* moe_dtype; 0 = rows_dtype */
    uint64_t* fault;  /* [1] fault word; or null */
    /* sizes */
    int32_t num_tokens;  /* T >= 0 */
    int32_t hidden;      /* H, 1 .. 2^28 */
    int32_t top_k;       /* K, 1 .. MOE_COMBINE_MAX_TOP_K */
    int32_t num_buffers; /* entries of the table, >= 1; without a table 0 or 1 */
    int64_t num_rows;    /* most rows of any buffer: bounds places, and the extent of `rows` in the
                            check for overlaps; 0 = unknown: places are not bounded */
    int32_t rank;        /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
} moe_combine_desc;

/* The argument of combine's kernels: a descriptor that moe_combine_resolve has checked. */
typedef struct moe_combine_args {
    const void* const* table;                                 /* [num_buffers]; null: rows */
    const void* rows;                                         /* rows_dtype; null with a table */
    const moe_place* place;                                   /* [T, K] */
    const float* weights;                                     /* [T, K]; null: 1 each */
    const void* residual;                                     /* [T, H] y_dtype; or null */
    const void* shared;                                       /* [T, H] rows_dtype; or null */
    const float* shared_weight;                               /* [T]; null: 1 each */
    void* y;                                                  /* [T, H] y_dtype */
    uint64_t* fault;                                          /* [1]; or null */
    int64_t row_pitch, residual_pitch, shared_pitch, y_pitch; /* bytes between rows */
    int64_t num_rows;                                         /* 0: does not bound places */
    int32_t rows_dtype, y_dtype;                              /* moe_dtype, not 0 */
    int32_t num_tokens;                                       /* T >= 0 */
    int32_t hidden;                                           /* H, 1 .. 2^28 */
    int32_t top_k;                                            /* K, 1 .. MOE_COMBINE_MAX_TOP_K */
    int32_t num_buffers; /* entries of the table; without a table 1 */
    int32_t rank;        /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
} moe_combine_args;

#define MOE_COMBINE_MAX_TOP_K 2048 /* 32 KB of shared memory a thread block */

#define MOEI_COMBINE_THREADS 256 /* most threads a block */

/* One of a token's rows and its factor. A token's block looks up those that exist, once, in slot
   order. */
typedef struct moe_combine_source {
    const char* row; /* address of the row's H elements, rows_dtype */
    float weight;    /* factor on the row, any fp32 */
} moe_combine_source;

/* Shared memory of moe_combine_token, besides its sources. */
typedef struct moe_combine_shared {
    int count;  /* of rows that exist */
    int narrow; /* 1: some row does not begin at a multiple of 16 bytes */
} moe_combine_shared;

/* Returns the address of the row that p, the place of a slot, names; as moe_combine_row below. */
MOE_DEVICE const char* moei_combine_row_at(const moe_combine_args* d, int64_t slot, moe_place p)
{
    const char* base;
    if (p.buffer == -1) return 0;
    if (p.buffer < 0 || p.buffer >= d->num_buffers || p.row < 0 ||
        (d->num_rows && p.row >= d->num_rows)) {
        moe_fault_raise(d->fault, MOE_FAULT_BAD_PLACE, d->rank, slot);
        return 0;
    }
    base = (const char*)(d->table ? d->table[p.buffer] : d->rows);
    if (!base || ((uintptr_t)base & (d->rows_dtype == MOE_FP32 ? 3 : 1)) != 0) {
        moe_fault_raise(d->fault, MOE_FAULT_BAD_PLACE, d->rank, slot);
        return 0;
    }
    return base + p.row * d->row_pitch;
}

/* Returns the address of the row that place[slot] names, through the pointer table; null where it
   names none. A wrong place sets the fault word (BAD_PLACE) and gives null. slot is an index into
   place alone: with top_k = E, for instance, place may be [T, E]. Any thread may call it. */
MOE_DEVICE const char* moe_combine_row(const moe_combine_args* d, int64_t slot)
{
    return moei_combine_row_at(d, slot, d->place[slot]);
}

/* Rows are summed in groups of 8, each in order, and the groups' sums are added in order: one chain
   over many rows would round once a row. */
#define MOEI_COMBINE_GROUP 8

/* A thread's 16-byte vectors of a token, and the rows that are added to them. */
typedef struct moei_combine_vector {
    const moe_combine_source* source; /* [count] the token's rows */
    int count;                        /* rows, 0 .. moe_combine_sources */
    int h, span, hidden;              /* column of the first vector; columns between vectors; H */
} moei_combine_vector;

/* Adds rows k0 .. k0 + rows - 1 to a thread's vectors acc[0 .. cols). Issues all loads before the
   first use, so that they are in flight together. full: 1 where all these rows and columns exist.
   rows_dtype, cols, rows and full are literals. */
MOE_DEVICE void moei_combine_add(float acc[2][8], const moei_combine_vector p, int k0,
                                 const int rows_dtype, const int cols, const int rows,
                                 const int full)
{
    const int width = rows_dtype == MOE_FP32 ? 4 : 8; /* elements in a 16-byte vector of a row */
    uint4 raw[2][8];
    float v[8], sum[2][8];
    MOE_UNROLL
    for (int u = 0; u < rows; ++u) {
        MOE_UNROLL
        for (int c = 0; c < cols; ++c)
            if (full || (k0 + u < p.count && p.h + c * p.span < p.hidden))
                raw[c][u] =
                    moei_load16(p.source[k0 + u].row + (int64_t)(p.h + c * p.span) * (16 / width));
    }
    MOE_UNROLL
    for (int c = 0; c < cols; ++c) {
        MOE_UNROLL
        for (int i = 0; i < width; ++i) sum[c][i] = k0 ? 0.0f : acc[c][i];
    }
    MOE_UNROLL
    for (int u = 0; u < rows; ++u)
        if (full || k0 + u < p.count) {
            const float w = p.source[k0 + u].weight;
            MOE_UNROLL
            for (int c = 0; c < cols; ++c) {
                moei_unpack_16(v, raw[c][u], rows_dtype);
                MOE_UNROLL
                for (int i = 0; i < width; ++i) sum[c][i] = fmaf(w, v[i], sum[c][i]);
            }
        }
    MOE_UNROLL
    for (int c = 0; c < cols; ++c) {
        MOE_UNROLL
        for (int i = 0; i < width; ++i) acc[c][i] = k0 ? acc[c][i] + sum[c][i] : sum[c][i];
    }
}

/* Computes the token's columns in 16-byte vectors of rows. A thread has `cols` vectors at a time,
   with `rows` rows of each in flight together. rows_dtype, cols and rows are literals. */
MOE_DEVICE void moei_combine_wide(const moe_combine_args* d, const moe_combine_source* source,
                                  int count, char* y, const char* residual, const int rows_dtype,
                                  const int cols, const int rows)
{
    const int width = rows_dtype == MOE_FP32 ? 4 : 8, y_bytes = d->y_dtype == MOE_FP32 ? 4 : 2;
    const int hidden = d->hidden, span = (int)blockDim.x * width;
    for (int h = (int)threadIdx.x * width; h < hidden; h += cols * span) {
        const moei_combine_vector p = {source, count, h, span, hidden};
        float acc[2][8];
        int k0 = 0;
        MOE_UNROLL
        for (int c = 0; c < cols; ++c) {
            MOE_UNROLL
            for (int i = 0; i < width; ++i) acc[c][i] = 0.0f;
            if (d->residual && h + c * span < hidden)
                moei_load_some(acc[c], residual + (int64_t)(h + c * span) * y_bytes, d->y_dtype,
                               width);
        }
        if (h + (cols - 1) * span < hidden)
            for (; k0 + rows <= count; k0 += rows)
                moei_combine_add(acc, p, k0, rows_dtype, cols, rows, 1);
        for (; k0 < count; k0 += rows) moei_combine_add(acc, p, k0, rows_dtype, cols, rows, 0);
        MOE_UNROLL
        for (int c = 0; c < cols; ++c)
            if (h + c * span < hidden)
                moei_store_some(y + (int64_t)(h + c * span) * y_bytes, acc[c], d->y_dtype, width);
    }
}

/* Returns the most rows of a token, those of its slots and the shared one: entries of source. */
MOE_HOST_DEVICE int moe_combine_sources(const moe_combine_args* d)
{
    return d->top_k + (d->shared ? 1 : 0);
}

/* Looks up the rows of token t: writes those that exist to source, in slot order, and their number
   to *shared. All threads of a block of whole warps; the first warp works. Ends with a barrier. */
MOE_DEVICE void moei_combine_look_up(const moe_combine_args* d, int64_t t,
                                     moe_combine_shared* shared, moe_combine_source* source)
{
    const int top_k = d->top_k;
    int count = 0;
    if (moe_warp() == 0) {
        bool narrow = false;
        for (int k0 = 0; k0 < top_k; k0 += MOE_WARP_SIZE) {
            const int k = k0 + moe_lane();
            const float w = /* loaded together with the row's address, not after */
                k < top_k && d->weights
                    ? __uint_as_float(moei_load4_early(d->weights + t * top_k + k))
                    : 1.0f;
            const char* row = k < top_k ? moe_combine_row(d, t * top_k + k) : (const char*)0;
            const uint32_t live = __ballot_sync(MOE_FULL_WARP, row != 0);
            const int at = count + __popc(live & ((1u << moe_lane()) - 1u));
            if (row) {
                source[at].row = row;
                source[at].weight = w;
            }
            narrow |= ((uintptr_t)row & 15) != 0;
            count += __popc(live);
        }
        if (d->shared) {
            const char* row = (const char*)d->shared + t * d->shared_pitch;
            if (moe_lane() == 0) {
                source[count].row = row;
                source[count].weight = d->shared_weight ? d->shared_weight[t] : 1.0f;
            }
            narrow |= ((uintptr_t)row & 15) != 0;
            ++count;
        }
        narrow = __any_sync(MOE_FULL_WARP, narrow) != 0;
        if (moe_lane() == 0) {
            shared->count = count;
            shared->narrow = narrow;
        }
    }
    __syncthreads(); /* the sources are written */
}

/* Sums the rows of token t that have been looked up: element by element where an address or H does
   not allow 16-byte vectors, else in vectors. All threads; rows_dtype is a literal. */
MOE_DEVICE void moei_combine_sum(const moe_combine_args* d, int64_t t,
                                 const moe_combine_shared* shared, const moe_combine_source* source,
                                 const int rows_dtype)
{
    const int hidden = d->hidden, most = moe_combine_sources(d), count = shared->count;
    char* y = (char*)d->y + t * d->y_pitch;
    const char* residual = (const char*)d->residual + t * d->residual_pitch; /* null: null */
    if (shared->narrow || (((uintptr_t)y | (uintptr_t)residual) & 15) != 0 ||
        hidden % (rows_dtype == MOE_FP32 ? 4 : 8) != 0) {
        for (int h = (int)threadIdx.x; h < hidden; h += (int)blockDim.x) {
            float acc = d->residual ? moe_load_f32(residual, h, d->y_dtype) : 0.0f;
            for (int k0 = 0; k0 < count; k0 += MOEI_COMBINE_GROUP) {
                float sum = k0 ? 0.0f : acc;
                for (int k = k0; k < count && k < k0 + MOEI_COMBINE_GROUP; ++k)
                    sum = fmaf(source[k].weight, moe_load_f32(source[k].row, h, rows_dtype), sum);
                acc = k0 ? acc + sum : sum;
            }
            moe_store_f32(y, h, d->y_dtype, acc);
        }
    } else if (most <= 2) {
        moei_combine_wide(d, source, count, y, residual, rows_dtype, 2, 2);
    } else if (most <= 4) {
        moei_combine_wide(d, source, count, y, residual, rows_dtype, 1, 4);
    } else {
        moei_combine_wide(d, source, count, y, residual, rows_dtype, 1, MOEI_COMBINE_GROUP);
    }
}

/* Computes row t of y. All threads of a block of whole warps call it together.
     1. the first warp looks the rows up, those that exist, in slot order
     2. all threads sum them

   The moe_combine_shared and moe_combine_sources(d) of moe_combine_source are in shared memory. A
   barrier must stand between two calls with the same ones. All that d points to is in global
   memory; this kernel may have written it before a barrier. rows_dtype is d's, a literal. */
MOE_DEVICE_BODY void moe_combine_token(const moe_combine_args* d, int64_t t,
                                       moe_combine_shared* shared, moe_combine_source* source,
                                       const int rows_dtype)
{
    moei_combine_look_up(d, t, shared, source);         /* 1. */
    moei_combine_sum(d, t, shared, source, rows_dtype); /* 2. */
}

/* Thread blocks a multiprocessor: four keep enough loads in flight, where 64 registers a thread
   suffice. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
#define MOEI_COMBINE_BLOCKS 4
#else
#define MOEI_COMBINE_BLOCKS 2
#endif

#define MOEI_COMBINE_LIST(X) X(fp32, MOE_FP32) X(fp16, MOE_FP16) X(bf16, MOE_BF16)

/* Combine for one dtype of rows: one block a token. */
#define MOEI_COMBINE_KERNEL(name, dtype)                                                           \
    MOE_KERNEL(MOEI_COMBINE_THREADS, MOEI_COMBINE_BLOCKS)                                          \
    moei_combine_##name(MOE_ARG(moe_combine_args) d)                                               \
    {                                                                                              \
        MOE_SHARED(moe_combine_shared, shared);                                                    \
        MOE_SHARED_DYNAMIC(source); /* [moe_combine_sources(&d)] */                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (!moe_fault_stopped(d.fault))                                                           \
            moe_combine_token(&d, blockIdx.x, &shared, (moe_combine_source*)source, dtype);        \
    }
MOEI_COMBINE_LIST(MOEI_COMBINE_KERNEL)
#undef MOEI_COMBINE_KERNEL

/* Refuses sizes and options that are out of range or contradict each other; fills in the
   defaults. */
MOE_HOST moe_status moei_combine_check_options(moe_combine_desc* d)
{
    const int64_t num_tokens = d->num_tokens;
    MOE_REQUIRE(num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_COMBINE_MAX_TOP_K, MOE_ERR_RANGE, top_k);
    if (d->rows_dtype == 0) d->rows_dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(d->rows_dtype), MOE_ERR_DTYPE, rows_dtype);
    if (d->y_dtype == 0) d->y_dtype = d->rows_dtype;
    MOE_REQUIRE(moe_dtype_bytes(d->y_dtype), MOE_ERR_DTYPE, y_dtype);
    if (d->row_stride == 0) d->row_stride = d->hidden;
    if (d->y_stride == 0) d->y_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->y_stride, d->hidden, num_tokens), MOE_ERR_STRIDE, y_stride);
    if (d->residual_stride == 0) d->residual_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->residual_stride, d->hidden, num_tokens), MOE_ERR_STRIDE,
                residual_stride);
    if (d->shared_stride == 0) d->shared_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->shared_stride, d->hidden, num_tokens), MOE_ERR_STRIDE,
                shared_stride);
    MOE_REQUIRE(d->shared || !d->shared_weight, MOE_ERR_CONFLICT, shared_weight);
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(d->num_rows >= 0, MOE_ERR_RANGE, num_rows);
    MOE_REQUIRE(moei_stride_fits(d->row_stride, d->hidden, d->num_rows ? d->num_rows : 1 << 20),
                MOE_ERR_STRIDE, row_stride);
    if (d->table) {
        MOE_REQUIRE(!d->rows, MOE_ERR_CONFLICT, rows);
        MOE_REQUIRE(d->num_buffers >= 1, MOE_ERR_RANGE, num_buffers);
    } else {
        MOE_REQUIRE(d->num_buffers == 0 || d->num_buffers == 1, MOE_ERR_RANGE, num_buffers);
        d->num_buffers = 1;
    }
    return MOE_OK;
}

/* Refuses buffers that are missing, misaligned or overlapping. Requires checked options. */
MOE_HOST moe_status moei_combine_check_buffers(const moe_combine_desc* d)
{
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden;
    const uint64_t slots = (uint64_t)num_tokens * (uint64_t)d->top_k;
    const uint32_t row_align = (uint32_t)moe_dtype_bytes(d->rows_dtype);
    const uint32_t y_align = (uint32_t)moe_dtype_bytes(d->y_dtype);
    const bool in_place = d->residual == d->y && d->residual_stride == d->y_stride;
    const moe_buffer b[] = {
        {d->table, (uint64_t)d->num_buffers * 8, 8, d->rows ? MOE_BUFFER_READ : MOE_BUFFER_REQUIRED,
         MOE_FIELD_table},
        {d->rows, moe_extent(d->num_rows ? d->num_rows : 1, d->row_stride, hidden, d->rows_dtype),
         row_align, MOE_BUFFER_READ, MOE_FIELD_rows},
        {d->place, slots * 8, 8, MOE_BUFFER_REQUIRED, MOE_FIELD_place},
        {d->weights, slots * 4, 4, MOE_BUFFER_READ, MOE_FIELD_weights},
        {d->residual, in_place ? 0 : moe_extent(num_tokens, d->residual_stride, hidden, d->y_dtype),
         y_align, MOE_BUFFER_READ, MOE_FIELD_residual},
        {d->shared, moe_extent(num_tokens, d->shared_stride, hidden, d->rows_dtype), row_align,
         MOE_BUFFER_READ, MOE_FIELD_shared},
        {d->shared_weight, (uint64_t)num_tokens * 4, 4, MOE_BUFFER_READ, MOE_FIELD_shared_weight},
        {d->y, moe_extent(num_tokens, d->y_stride, hidden, d->y_dtype), y_align,
         MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_y},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (num_tokens == 0) return moe_check_buffers(b + count - 1, 1); /* the fault word alone */
    return moe_check_buffers(b, count);
}

/* Refuses what moe_combine_desc does not allow; fills in the defaults. */
MOE_HOST moe_status moei_combine_check(moe_combine_desc* d)
{
    MOE_TRY(moei_combine_check_options(d));
    return moei_combine_check_buffers(d);
}

/* Checks a descriptor and resolves it into the kernels' argument, also for kernels of one's own
   that call moe_combine_token or moe_combine_row. Errors: those of moe_combine_prepare, which leave
   *args unchanged; MOE_ERR_NULL (desc) where desc or args is null. */
MOE_HOST moe_status moe_combine_resolve(const moe_combine_desc* desc, moe_combine_args* args)
{
    moe_combine_desc d;
    int64_t row, y;
    MOE_REQUIRE(desc && args, MOE_ERR_NULL, desc);
    d = *desc;
    MOE_TRY(moei_combine_check(&d));
    row = moe_dtype_bytes(d.rows_dtype);
    y = moe_dtype_bytes(d.y_dtype);
    memset(args, 0, sizeof *args);
    args->table = d.table;
    args->rows = d.rows;
    args->place = d.place;
    args->weights = d.weights;
    args->residual = d.residual;
    args->shared = d.shared;
    args->shared_weight = d.shared_weight;
    args->y = d.y;
    args->fault = d.fault;
    args->row_pitch = d.row_stride * row;
    args->residual_pitch = d.residual ? d.residual_stride * y : 0;
    args->shared_pitch = d.shared_stride * row;
    args->y_pitch = d.y_stride * y;
    args->num_rows = d.num_rows;
    args->rows_dtype = d.rows_dtype;
    args->y_dtype = d.y_dtype;
    args->num_tokens = d.num_tokens;
    args->hidden = d.hidden;
    args->top_k = d.top_k;
    args->num_buffers = d.num_buffers;
    args->rank = d.rank;
    return MOE_OK;
}

/* A prepared combine: all but the stream, for the device that was current in prepare. */
typedef struct moe_combine_prepared {
    moe_combine_args args;
    moe_launch launch; /* empty with T = 0 */
} moe_combine_prepared;

/* Fills in *p, which is all zeros. */
MOE_HOST moe_status moei_combine_prepare(const moe_combine_desc* desc, moe_combine_prepared* p)
{
    const moe_combine_args* d = &p->args;
    moe_launch_config c;
    int threads, vectors;
    MOE_TRY(moe_combine_resolve(desc, &p->args));
    if (d->num_tokens == 0) return MOE_OK;
    vectors =
        (d->hidden + 7) / 8 * (d->rows_dtype == MOE_FP32 ? 2 : 1); /* 16-byte vectors of a row */
    threads = ((moe_combine_sources(d) <= 2 ? (vectors + 1) / 2 : vectors) + 31) / 32 * 32;
    if (threads > MOEI_COMBINE_THREADS) threads = MOEI_COMBINE_THREADS;
    c = moe_grid(d->num_tokens, threads,
                 (size_t)moe_combine_sources(d) * sizeof(moe_combine_source), 0);
    c.dependent = 1;
#define MOEI_COMBINE_CASE(name, dtype)                                                             \
    if (d->rows_dtype == dtype) return MOE_PREPARE(&p->launch, moei_combine_##name, c);
    MOEI_COMBINE_LIST(MOEI_COMBINE_CASE)
#undef MOEI_COMBINE_CASE
    return MOE_STATUS(MOE_ERR_DTYPE, rows_dtype);
}

/* Prepares a combine, which moe_combine_run queues any number of times. Errors: a status for each
   field of moe_combine_desc that is not as documented. T = 0 is no error. */
MOE_HOST moe_status moe_combine_prepare(const moe_combine_desc* desc, moe_combine_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_combine_prepare(desc, p));
}

/* Queues a prepared combine on `stream`. */
MOE_HOST moe_status moe_combine_run(const moe_combine_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_combine(const moe_combine_desc* desc, cudaStream_t stream)
{
    moe_combine_prepared p;
    MOE_TRY(moe_combine_prepare(desc, &p));
    return moe_combine_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_combine_preload(void)
{
#define MOEI_COMBINE_LOAD(name, dtype)                                                             \
    MOE_TRY(moe_preload_kernel((const void*)moei_combine_##name));
    MOEI_COMBINE_LIST(MOEI_COMBINE_LOAD)
#undef MOEI_COMBINE_LOAD
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(combine)

#endif
