/* combine_backward.cuh: the gradients of combine: dy is written to each token's expert rows through
   the pointer table, and the gate weights get their gradients.

     drow(place[t, k])[:] = weights[t, k] * dy[t, :]
     dweights[t, k]       = sum over h of dy[t, h] * row(place[t, k])[h]
     dshared[t, :]        = shared_weight[t] * dy[t, :]
     dshared_weight[t]    = sum over h of dy[t, h] * shared[t, h]
     row(p)               = table[p.buffer] + p.row * row_stride
     drow(p)              = drows_table[p.buffer] + p.row * drows_stride

   The gradient of combine's residual is dy itself: nothing is written for it.

   In:   dy [T, H], place [T, K] and weights [T, K] as combine had them
         the table of combine's rows: for dweights alone
         shared [T, H]: for dshared_weight alone
   Out:  gradient rows, dweights [T, K], dshared [T, H], dshared_weight [T], each optional
   Rows, shared and their gradients are of rows_dtype: fp32, fp16 or bf16; dy has its own dtype.

   The gradient rows may replace the forward's rows: the same addresses and the same stride. A row
   is read before it is overwritten. Where gradient rows are written, no two slots name the same
   row: the last to store would win. A row that no slot names is neither read nor written, so
   padding between the experts' rows keeps what it holds.

   A place with buffer -1 gives dweights 0 and no row. So does a place outside the table, or one at
   num_rows or more, where num_rows is given. So does a buffer, of rows or of gradients, whose
   address is null or misaligned. All but -1 set the fault word (BAD_PLACE). After a stop fault
   nothing is written.

   Numerics: a gradient row is an fp32 product, each element rounded once to rows_dtype. A weight
   of 0 gives zeros where dy is finite. NaN or infinity in a token's dy or rows stays in that
   token's gradients. A dot is an fp32 sum in a fixed order: each thread adds its elements by
   ascending h, then lanes add at distances 16, 8, 4, 2 and 1, then warps in order. Which elements
   a thread adds follows from H, the dtypes, and whether the token's addresses allow 16-byte
   vectors. Equal inputs give equal bits.

   K up to MOE_COMBINE_MAX_TOP_K.
   Cost: one launch, no workspace, no atomics. dy is read once from memory; past 8 rows a token it
   may be read again from cache for every 8. Each forward row is read once, for dweights alone, and
   each gradient row is written once. Rows move as 16-byte vectors where H is a multiple of 8 (fp32
   rows: 4) and the addresses are aligned to 16 bytes; other shapes work, slower. Minimum
   architecture: sm_75.

     moe_combine_backward_desc c = {0};
     c.dy = dy;  c.place = place;  c.weights = weights;
     c.table = table;  c.num_buffers = n;          // combine's rows, for dweights
     c.drows_table = drows;  c.dweights = dweights;
     c.num_tokens = T;  c.hidden = H;  c.top_k = K;
     moe_status s = moe_combine_backward(&c, stream);

   Source: the transpose of the gather of combine.cuh: a scatter of one row to K places, which needs
   no atomics because every row belongs to one slot. */
#ifndef MOE_COMBINE_BACKWARD_CUH
#define MOE_COMBINE_BACKWARD_CUH

#include "combine/backward_token.cuh"

/* What moe_combine_backward takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_combine_backward_desc {
    /* in */
    const void* dy;           /* [T, H] dy_dtype, gradient of combine's y */
    const void* const* table; /* [num_buffers] address of each buffer of combine's rows, or null:
                                   rows. For dweights alone, else null */
    const void* rows;         /* [num_rows, H] rows_dtype, the one buffer; null with a table. For
                                   dweights alone, else null */
    const moe_place* place;   /* [T, K] place of each slot's row; {-1, -1} = none. Not read without
                                   dweights, drows and drows_table */
    const float* weights;     /* [T, K] factor on each slot's row; null: 1 each. Not read without
                                   drows and drows_table */
    const void* shared;       /* [T, H] rows_dtype. For dshared_weight alone, else null */
    const float* shared_weight; /* [T] factor on shared; null: 1 each; null without dshared and
                                   dshared_weight. Not read without dshared */
    int64_t dy_stride;          /* elements between rows, >= H; 0 = H */
    int64_t row_stride;         /* elements between rows of every buffer, >= H; 0 = H */
    int64_t shared_stride;      /* elements between rows, >= H; 0 = H */
    int32_t dy_dtype;           /* moe_dtype; 0 = rows_dtype */
    int32_t rows_dtype;         /* moe_dtype of rows, drows, shared and dshared; 0 = bf16 */
    /* out; not all may be null */
    void* const* drows_table; /* [num_buffers] address of each buffer of gradients, or null. Not
                                 with rows */
    void* drows;              /* [num_rows, H] rows_dtype, the one buffer; or null. Not with a table
                                 or drows_table. May be rows, of the same stride */
    float* dweights;          /* [T, K] gradient of weights; or null */
    void* dshared;            /* [T, H] rows_dtype; or null. May be shared, of the same stride */
    float* dshared_weight;    /* [T] gradient of shared_weight; or null */
    int64_t drows_stride;     /* elements between rows of every buffer, >= H; 0 = H */
    int64_t dshared_stride;   /* elements between rows, >= H; 0 = H */
    uint64_t* fault;          /* [1] fault word; or null */
    /* sizes */
    int32_t num_tokens;  /* T >= 0 */
    int32_t hidden;      /* H, 1 .. 2^28 */
    int32_t top_k;       /* K, 1 .. MOE_COMBINE_MAX_TOP_K */
    int32_t num_buffers; /* entries of each table, >= 1; without tables 0 or 1 */
    int64_t num_rows;    /* most rows of any buffer: bounds places, and the extents of `rows` and
                            `drows` in the check for overlaps; 0 = unknown: no bound on places */
    int32_t rank;        /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
} moe_combine_backward_desc;

/* Thread blocks a multiprocessor: as many as need no spills. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
#define MOEI_COMBINE_BACKWARD_BLOCKS(dots) ((dots) ? 3 : 4)
#else
#define MOEI_COMBINE_BACKWARD_BLOCKS(dots) 2
#endif

/* The kernels of one dtype of rows: gradient rows alone, and with dots. One block a token. */
#define MOEI_COMBINE_BACKWARD_KERNEL(name, dtype, dots)                                            \
    MOE_KERNEL(MOEI_COMBINE_THREADS, MOEI_COMBINE_BACKWARD_BLOCKS(dots))                           \
    moei_combine_backward_##name(MOE_ARG(moei_combine_backward_args) a)                            \
    {                                                                                              \
        MOE_SHARED(moei_combine_backward_shared, shared);                                          \
        MOE_SHARED_DYNAMIC(source); /* [moei_combine_backward_sources(&a)] */                      \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (!moe_fault_stopped(a.rows.fault))                                                      \
            moei_combine_backward_token(&a, blockIdx.x, &shared,                                   \
                                        (moei_combine_backward_source*)source, dtype, dots);       \
    }
#define MOEI_COMBINE_BACKWARD_KERNELS(name, dtype)                                                 \
    MOEI_COMBINE_BACKWARD_KERNEL(name, dtype, 0)                                                   \
    MOEI_COMBINE_BACKWARD_KERNEL(name##_dots, dtype, 1)
MOEI_COMBINE_LIST(MOEI_COMBINE_BACKWARD_KERNELS)
#undef MOEI_COMBINE_BACKWARD_KERNELS
#undef MOEI_COMBINE_BACKWARD_KERNEL

/* Returns 1 where slots have an output: dweights or gradient rows. */
MOE_HOST int moei_combine_backward_has_slots(const moe_combine_backward_desc* d)
{
    return d->dweights || d->drows || d->drows_table;
}

/* Refuses inputs without their output, and rows and gradients of different layouts. */
MOE_HOST moe_status moei_combine_backward_check_pairs(moe_combine_backward_desc* d)
{
    MOE_REQUIRE(!d->table || d->dweights, MOE_ERR_CONFLICT, table);
    MOE_REQUIRE(!d->rows || (d->dweights && !d->table), MOE_ERR_CONFLICT, rows);
    MOE_REQUIRE(!d->drows_table || !d->rows, MOE_ERR_CONFLICT, drows_table);
    MOE_REQUIRE(!d->drows || (!d->table && !d->drows_table), MOE_ERR_CONFLICT, drows);
    MOE_REQUIRE(!d->shared || d->dshared_weight, MOE_ERR_CONFLICT, shared);
    MOE_REQUIRE(!d->shared_weight || d->dshared || d->dshared_weight, MOE_ERR_CONFLICT,
                shared_weight);
    if (d->table || d->drows_table) {
        MOE_REQUIRE(d->num_buffers >= 1, MOE_ERR_RANGE, num_buffers);
    } else {
        MOE_REQUIRE(d->num_buffers == 0 || d->num_buffers == 1, MOE_ERR_RANGE, num_buffers);
        d->num_buffers = 1;
    }
    return MOE_OK;
}

/* Fills in a stride's default. Refuses one that is less than H or leaves 64 bits. */
#define MOEI_COMBINE_BACKWARD_STRIDE(field, rows)                                                  \
    do {                                                                                           \
        if (d->field == 0) d->field = d->hidden;                                                   \
        MOE_REQUIRE(moei_stride_fits(d->field, d->hidden, rows), MOE_ERR_STRIDE, field);           \
    } while (0)

/* Refuses sizes and options that are out of range or contradict each other; fills in the
   defaults. */
MOE_HOST moe_status moei_combine_backward_check_options(moe_combine_backward_desc* d)
{
    int64_t rows;
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_COMBINE_MAX_TOP_K, MOE_ERR_RANGE, top_k);
    if (d->rows_dtype == 0) d->rows_dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(d->rows_dtype), MOE_ERR_DTYPE, rows_dtype);
    if (d->dy_dtype == 0) d->dy_dtype = d->rows_dtype;
    MOE_REQUIRE(moe_dtype_bytes(d->dy_dtype), MOE_ERR_DTYPE, dy_dtype);
    MOEI_REQUIRE_RANK(d);
    MOE_REQUIRE(d->num_rows >= 0, MOE_ERR_RANGE, num_rows);
    rows = d->num_rows ? d->num_rows : 1 << 20;
    MOEI_COMBINE_BACKWARD_STRIDE(dy_stride, d->num_tokens);
    MOEI_COMBINE_BACKWARD_STRIDE(row_stride, rows);
    MOEI_COMBINE_BACKWARD_STRIDE(drows_stride, rows);
    MOEI_COMBINE_BACKWARD_STRIDE(shared_stride, d->num_tokens);
    MOEI_COMBINE_BACKWARD_STRIDE(dshared_stride, d->num_tokens);
    return moei_combine_backward_check_pairs(d);
}
#undef MOEI_COMBINE_BACKWARD_STRIDE

/* Refuses buffers that are missing, misaligned or overlapping. Requires checked options. */
MOE_HOST moe_status moei_combine_backward_check_buffers(const moe_combine_backward_desc* d)
{
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden;
    const uint64_t slots = (uint64_t)num_tokens * (uint64_t)d->top_k;
    const uint64_t each = (uint64_t)num_tokens * 4, entries = (uint64_t)d->num_buffers * 8;
    const int64_t rows = d->num_rows ? d->num_rows : 1;
    const uint32_t align = (uint32_t)moe_dtype_bytes(d->rows_dtype);
    const bool same_rows = d->rows == d->drows && d->row_stride == d->drows_stride;
    const bool same_shared =
        d->shared && d->shared == d->dshared && d->shared_stride == d->dshared_stride;
    const int place = moei_combine_backward_has_slots(d) ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ;
    const int table = d->dweights && !d->rows ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ;
    const int shared = d->dshared_weight ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ;
    const moe_buffer b[] = {
        {d->dy, moe_extent(num_tokens, d->dy_stride, hidden, d->dy_dtype),
         (uint32_t)moe_dtype_bytes(d->dy_dtype), MOE_BUFFER_REQUIRED, MOE_FIELD_dy},
        {d->table, entries, 8, table, MOE_FIELD_table},
        {d->rows, same_rows ? 0 : moe_extent(rows, d->row_stride, hidden, d->rows_dtype), align,
         MOE_BUFFER_READ, MOE_FIELD_rows},
        {d->place, slots * 8, 8, place, MOE_FIELD_place},
        {d->weights, slots * 4, 4, MOE_BUFFER_READ, MOE_FIELD_weights},
        {d->shared,
         same_shared ? 0 : moe_extent(num_tokens, d->shared_stride, hidden, d->rows_dtype), align,
         shared, MOE_FIELD_shared},
        {d->shared_weight, each, 4, MOE_BUFFER_READ, MOE_FIELD_shared_weight},
        {d->drows_table, entries, 8, MOE_BUFFER_READ, MOE_FIELD_drows_table},
        {d->drows, moe_extent(rows, d->drows_stride, hidden, d->rows_dtype), align,
         MOE_BUFFER_WRITTEN, MOE_FIELD_drows},
        {d->dweights, slots * 4, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_dweights},
        {d->dshared, moe_extent(num_tokens, d->dshared_stride, hidden, d->rows_dtype), align,
         MOE_BUFFER_WRITTEN, MOE_FIELD_dshared},
        {d->dshared_weight, each, 4, MOE_BUFFER_WRITTEN, MOE_FIELD_dshared_weight},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (num_tokens == 0) return moe_check_buffers(b + count - 1, 1); /* the fault word alone */
    MOE_REQUIRE(moei_combine_backward_has_slots(d) || d->dshared || d->dshared_weight, MOE_ERR_NULL,
                drows);
    return moe_check_buffers(b, count);
}

/* Resolves a checked descriptor into the kernels' argument, which is all zeros. */
MOE_HOST void moei_combine_backward_resolve(const moe_combine_backward_desc* d,
                                            moei_combine_backward_args* a)
{
    const int64_t row = moe_dtype_bytes(d->rows_dtype), dy = moe_dtype_bytes(d->dy_dtype);
    const int width = d->rows_dtype == MOE_FP32 ? 4 : 8;
    a->rows.table = d->table;
    a->rows.rows = d->rows;
    a->rows.row_pitch = d->row_stride * row;
    a->rows.place = d->place;
    if (d->drows || d->drows_table) a->rows.weights = d->weights;
    a->rows.shared = d->shared;
    a->rows.shared_pitch = d->shared_stride * row;
    if (d->dshared) a->rows.shared_weight = d->shared_weight;
    a->rows.fault = d->fault;
    a->rows.num_rows = d->num_rows;
    a->rows.rows_dtype = d->rows_dtype;
    a->rows.num_tokens = d->num_tokens;
    a->rows.hidden = d->hidden;
    a->rows.top_k = moei_combine_backward_has_slots(d) ? d->top_k : 0;
    a->rows.num_buffers = d->num_buffers;
    a->rows.rank = d->rank;
    a->drows = a->rows;
    a->drows.table = (const void* const*)d->drows_table;
    a->drows.rows = d->drows;
    a->drows.row_pitch = d->drows_stride * row;
    a->dy = d->dy;
    a->dweights = d->dweights;
    a->dshared = (char*)d->dshared;
    a->dshared_weight = d->dshared_weight;
    a->dy_pitch = d->dy_stride * dy;
    a->dshared_pitch = d->dshared_stride * row;
    a->dy_dtype = d->dy_dtype;
    a->wide = d->hidden % width == 0 && moei_aligned(d->dy, 16) && a->dy_pitch % 16 == 0;
}

/* A prepared combine_backward: all but the stream, for the device that was current in prepare. */
typedef struct moe_combine_backward_prepared {
    moei_combine_backward_args args;
    moe_launch launch; /* empty with T = 0 */
} moe_combine_backward_prepared;

/* Returns the threads of a block: as few as do a token's vectors in as many rounds as the most
   threads would need. A thread does two vectors, or one element, a round. */
MOE_HOST int moei_combine_backward_threads(const moei_combine_backward_args* a)
{
    const int each = !a->wide ? 1 : a->rows.rows_dtype == MOE_FP32 ? 2 * 4 : 2 * 8;
    const int most = MOEI_COMBINE_THREADS * each;
    const int rounds = (a->rows.hidden + most - 1) / most;
    const int threads = (a->rows.hidden + rounds * each - 1) / (rounds * each);
    return (threads + MOE_WARP_SIZE - 1) / MOE_WARP_SIZE * MOE_WARP_SIZE;
}

/* Fills in *p, which is all zeros. */
MOE_HOST moe_status moei_combine_backward_prepare(const moe_combine_backward_desc* desc,
                                                  moe_combine_backward_prepared* p)
{
    const moei_combine_backward_args* a = &p->args;
    moe_combine_backward_desc d = *desc;
    moe_launch_config c;
    int dots;
    MOE_TRY(moei_combine_backward_check_options(&d));
    MOE_TRY(moei_combine_backward_check_buffers(&d));
    moei_combine_backward_resolve(&d, &p->args);
    if (d.num_tokens == 0) return MOE_OK;
    dots = d.dweights || d.dshared_weight;
    c = moe_grid(d.num_tokens, moei_combine_backward_threads(a),
                 (size_t)moei_combine_backward_sources(a) * sizeof(moei_combine_backward_source),
                 0);
    c.dependent = 1;
#define MOEI_COMBINE_BACKWARD_CASE(name, dtype)                                                    \
    if (d.rows_dtype == dtype && dots)                                                             \
        return MOE_PREPARE(&p->launch, moei_combine_backward_##name##_dots, c);                    \
    if (d.rows_dtype == dtype) return MOE_PREPARE(&p->launch, moei_combine_backward_##name, c);
    MOEI_COMBINE_LIST(MOEI_COMBINE_BACKWARD_CASE)
#undef MOEI_COMBINE_BACKWARD_CASE
    return MOE_STATUS(MOE_ERR_DTYPE, rows_dtype);
}

/* Prepares a combine_backward, which moe_combine_backward_run queues any number of times. Errors: a
   status for each field of the descriptor that is not as documented; MOE_ERR_NULL (drows) where
   every output is null. T = 0 is no error. */
MOE_HOST moe_status moe_combine_backward_prepare(const moe_combine_backward_desc* desc,
                                                 moe_combine_backward_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_combine_backward_prepare(desc, p));
}

/* Queues a prepared combine_backward on `stream`. */
MOE_HOST moe_status moe_combine_backward_run(const moe_combine_backward_prepared* p,
                                             cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}

/* Prepares and runs. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_combine_backward(const moe_combine_backward_desc* desc, cudaStream_t stream)
{
    moe_combine_backward_prepared p;
    MOE_TRY(moe_combine_backward_prepare(desc, &p));
    return moe_combine_backward_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_combine_backward_preload(void)
{
#define MOEI_COMBINE_BACKWARD_LOAD(name, dtype)                                                    \
    MOE_TRY(moe_preload_kernel((const void*)moei_combine_backward_##name));                        \
    MOE_TRY(moe_preload_kernel((const void*)moei_combine_backward_##name##_dots));
    MOEI_COMBINE_LIST(MOEI_COMBINE_BACKWARD_LOAD)
#undef MOEI_COMBINE_BACKWARD_LOAD
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(combine_backward)

#endif
