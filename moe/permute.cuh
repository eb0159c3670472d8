/* permute.cuh: copies token rows into expert order, and back, for callers that need rows moved.

     moe_permute     y[row, :]  = x[row_slot[row] / K, :]     zeros where row_slot is -1
     moe_unpermute   y[slot, :] = x[slot_row[slot], :]        zeros where slot_row is -1

   experts.cuh reads tokens, and combine.cuh rows, by index: neither copy is needed between these
   stations. Both copies move bits and change none.

   In:   permute: x [T, H], route's row_slot [num_rows] and, faster with it, slot_row [T, K]
         unpermute: x [num_rows, H], slot_row [T, K]
   Out:  permute: y [num_rows, H]; unpermute: y [T, K, H]. Every row is written once.
   num_rows is what moe_route_max_rows gives, or fewer where the caller knows how many rows exist.
   Elements are fp32, fp16, bf16 or any type of 4 or 2 bytes; rows of H single bytes are H / 2
   elements.

   A slot or row out of range gives zeros and sets the fault word (BAD_ROW; index: the row, for
   slot_row the slot). So does, with both maps, a row whose slot does not map to the row.

   Cost of unpermute: each row that slot_row names read once, each output written once. Of permute
   with both maps: each token read once and written K times, (T + num_rows) H elements. Without
   slot_row each row of y loads its token itself. A token's K rows are far apart, so x is read K
   times unless x fits into L2. All run at the rate of a device-to-device copy where addresses,
   strides and H allow 16-byte vectors; else with vectors of 8, 4 or 2 bytes, slower.
   Minimum architecture: sm_75.

     moe_permute_desc p = {0};
     p.x = x;  p.row_slot = row_slot;  p.slot_row = slot_row;  p.y = rows;
     p.num_tokens = T;  p.top_k = K;  p.hidden = H;  p.num_rows = num_rows;
     moe_status s = moe_permute(&p, stream);
     p.x = rows;  p.y = slots;                   // [T, K, H]
     s = moe_unpermute(&p, stream);

   For kernels of one's own: moe_copy_row (base/copy_row.cuh).

   Source: permute and unpermute of the field's grouped MoE layers, as gathers and with each token
   read once. */
#ifndef MOE_PERMUTE_CUH
#define MOE_PERMUTE_CUH

#include "base/check.h"
#include "base/copy.cuh"
#include "base/copy_row.cuh"
#include "base/fault.cuh"
#include "base/warp.cuh"
#include "faults.h"
#include "fields.h"
#include "layout.h"
#include "preload.cuh"

/* What moe_permute and moe_unpermute take. Pointers are device addresses, aligned to their
   elements. */
typedef struct moe_permute_desc {
    /* in */
    const void* x;           /* dtype. permute: [T, H]; unpermute: [num_rows, H] */
    const int32_t* row_slot; /* [num_rows] slot of each row, -1 = none; unpermute: not read */
    const int32_t* slot_row; /* [T, K] row of each slot, -1 = none; permute: may be null */
    int64_t x_stride;        /* elements between rows, >= H; 0 = H */
    int32_t dtype;           /* moe_dtype of x and y; 0 = bf16 */
    /* out */
    void* y;          /* dtype. permute: [num_rows, H]; unpermute: [T, K, H] */
    int64_t y_stride; /* elements between rows, >= H; 0 = H */
    uint64_t* fault;  /* [1] fault word; or null */
    /* sizes */
    int32_t num_tokens; /* T >= 0 */
    int32_t top_k;      /* K, 1 .. MOE_MAX_EXPERTS; T * K below 2^31 */
    int32_t hidden;     /* H, 1 .. 2^28 */
    int32_t rank;       /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
    int64_t num_rows;   /* rows of x or y in expert order, 0 .. 2^31 - 1 */
} moe_permute_desc;

#define MOEI_PERMUTE_THREADS 256 /* most threads a block */
#define MOEI_PERMUTE_ROWS 8      /* rows of which a thread has a vector in flight, gathering */
#define MOEI_PERMUTE_TOKENS 4    /* tokens of which a thread has a vector in flight, by token */
#define MOEI_PERMUTE_LIST 2048   /* most entries of row in shared memory, looked up at once */

/* The argument of the kernels. A row is cut into vectors of 16, 8, 4 or 2 bytes, the same for all
   rows. `lanes` neighbouring threads have neighbouring vectors: a whole row, or one of its
   `columns` where the row is longer than a block. A block does `groups` rows at a time, several
   times. */
typedef struct moei_permute_args {
    const char* x;            /* x of the descriptor */
    char* y;                  /* y of the descriptor */
    const int32_t* index;     /* gathering: [count] entry of each row of y; by token: slot_row */
    const int32_t* check;     /* by token: row_slot, to check the way back */
    uint64_t* fault;          /* [1]; or null */
    int64_t x_bytes, y_bytes; /* bytes between rows */
    int64_t count;            /* gathering: rows of y; by token: tokens */
    int64_t limit;            /* valid entries of index are below limit */
    uint32_t div;             /* gathering: an entry / div is the row of x; by token: top_k */
    int32_t vectors;          /* vectors of a row */
    int32_t lanes;            /* threads a row; a power of two unless groups is 1 */
    int32_t lanes_log2;       /* log2 of lanes, unless groups is 1 */
    int32_t groups;           /* rows a block does at a time */
    int32_t columns;          /* blocks a row */
    int32_t list_log2;        /* by token: log2 of the entries that a token looks up at once */
    int32_t rank;             /* rank that a fault reports */
} moei_permute_args;

/* Position of a thread in the work. */
typedef struct moei_permute_at {
    int64_t row0; /* the block's first row of y, or its first token */
    int group;    /* 0 .. groups - 1 */
    int vector;   /* vector of each of its rows; may be past the row's last */
} moei_permute_at;

/* Returns the position of this thread. rows: rows (or tokens) that a thread does. */
MOE_DEVICE moei_permute_at moei_permute_find(const moei_permute_args* a, const int rows)
{
    const int lane = a->groups > 1 ? (int)threadIdx.x & (a->lanes - 1) : (int)threadIdx.x;
    uint32_t block = blockIdx.x, column = 0;
    moei_permute_at at;
    if (a->columns > 1) { /* the columns of a row are neighbouring blocks */
        block = blockIdx.x / (uint32_t)a->columns;
        column = blockIdx.x - block * (uint32_t)a->columns;
    }
    at.row0 = (int64_t)block * (a->groups * rows);
    at.group = a->groups > 1 ? (int)(threadIdx.x >> a->lanes_log2) : 0;
    at.vector = (int)column * a->lanes + lane;
    return at;
}

/* Gathers rows: y[i, :] = x[index[i] / div, :]. A thread looks its rows up, then loads a vector of
   each, then stores them. */
MOE_DEVICE_BODY void moei_permute_gather(const moei_permute_args* a, const int width)
{
    const moei_permute_at at = moei_permute_find(a, MOEI_PERMUTE_ROWS);
    const int64_t first = at.row0 + at.group, offset = (int64_t)at.vector * width;
    const bool in = at.vector < a->vectors;
    int32_t from[MOEI_PERMUTE_ROWS];
    uint4 v[MOEI_PERMUTE_ROWS];
    char* y = a->y + first * a->y_bytes + offset;
    MOE_UNROLL
    for (int u = 0; u < MOEI_PERMUTE_ROWS; ++u) {
        const int64_t row = first + u * a->groups;
        from[u] = row < a->count ? (int32_t)moei_load4_early(a->index + row) : -1;
    }
    MOE_UNROLL
    for (int u = 0; u < MOEI_PERMUTE_ROWS; ++u) {
        v[u] = make_uint4(0, 0, 0, 0);
        if ((uint32_t)from[u] < (uint32_t)a->limit) {
            const uint32_t row = a->div == 1 ? (uint32_t)from[u] : (uint32_t)from[u] / a->div;
            if (in) v[u] = moei_load_vector(a->x + row * a->x_bytes + offset, width);
        } else if (from[u] != -1) {
            moe_fault_raise(a->fault, MOE_FAULT_BAD_ROW, a->rank, first + u * a->groups);
        }
    }
    MOE_UNROLL
    for (int u = 0; u < MOEI_PERMUTE_ROWS; ++u) {
        if (in && first + u * a->groups < a->count) moei_store_vector(y, v[u], width);
        y += a->groups * a->y_bytes;
    }
}

/* Shared memory of moei_permute_by_token. */
typedef struct moei_permute_shared {
    int32_t row[MOEI_PERMUTE_LIST]; /* rows of y that the block's tokens go to; -1: none */
    uint32_t empty[MOEI_PERMUTE_THREADS / MOE_WARP_SIZE]; /* bits of rows that no slot fills */
} moei_permute_shared;

/* Writes zeros to the rows of this block's share that no slot fills. A row is either cleared here
   or written by its slot's token, never both. All threads. */
MOE_DEVICE void moei_permute_zero(const moei_permute_args* a, moei_permute_shared* s,
                                  const int width)
{
    const int64_t each = (a->limit + gridDim.x - 1) / gridDim.x, slots = a->count * a->div;
    const int64_t begin = blockIdx.x * each;
    const int64_t end = begin + each < a->limit ? begin + each : a->limit;
    for (int64_t r0 = begin; r0 < end; r0 += blockDim.x) {
        const int64_t r = r0 + threadIdx.x;
        bool empty = false;
        uint32_t lanes;
        if (r < end) {
            const int32_t slot = a->check[r];
            empty = slot < 0 || slot >= slots || a->index[slot] != (int32_t)r;
            if (empty && slot != -1) moe_fault_raise(a->fault, MOE_FAULT_BAD_ROW, a->rank, r);
        }
        lanes = __ballot_sync(MOE_FULL_WARP, empty);
        __syncthreads(); /* all warps have read the words of the round before */
        if (moe_lane() == 0) s->empty[moe_warp()] = lanes;
        __syncthreads(); /* the words are written */
        for (int w = 0; w < (int)(blockDim.x >> 5); ++w)
            for (uint32_t left = s->empty[w]; left; left &= left - 1) {
                char* y = a->y + (r0 + w * MOE_WARP_SIZE + __ffs((int)left) - 1) * a->y_bytes;
                for (int i = (int)threadIdx.x; i < a->vectors; i += (int)blockDim.x)
                    moei_store_vector(y + (int64_t)i * width, make_uint4(0, 0, 0, 0), width);
            }
    }
}

/* Returns the row of y that a slot goes to: index[slot], where that row's own entry names the slot;
   else -1, and BAD_ROW unless the entry is -1. */
MOE_DEVICE int32_t moei_permute_row(const moei_permute_args* a, int64_t slot)
{
    const int32_t r = a->index[slot];
    if (r == -1) return -1;
    if (r >= 0 && r < a->limit) {
        if (a->check[r] == (int32_t)slot) return r;
        moe_fault_raise(a->fault, MOE_FAULT_BAD_ROW, a->rank, r);
    } else {
        moe_fault_raise(a->fault, MOE_FAULT_BAD_ROW, a->rank, slot);
    }
    return -1;
}

/* Reads each token once and writes it to its rows: y[index[t * K + k], :] = x[t, :]. The block
   looks the rows up while the vectors are in flight. Then clears the rows that no slot fills. */
MOE_DEVICE_BODY void moei_permute_by_token(const moei_permute_args* a, moei_permute_shared* s,
                                           const int width)
{
    const moei_permute_at at = moei_permute_find(a, MOEI_PERMUTE_TOKENS);
    const int64_t first = at.row0 + at.group, offset = (int64_t)at.vector * width;
    const bool in = at.vector < a->vectors;
    const int top_k = (int)a->div, listed = 1 << a->list_log2;
    const int entries = (a->groups * MOEI_PERMUTE_TOKENS) << a->list_log2;
    uint4 v[MOEI_PERMUTE_TOKENS];
    MOE_UNROLL
    for (int u = 0; u < MOEI_PERMUTE_TOKENS; ++u) {
        const int64_t t = first + u * a->groups;
        v[u] = make_uint4(0, 0, 0, 0);
        if (in && t < a->count) v[u] = moei_load_vector(a->x + t * a->x_bytes + offset, width);
    }
    for (int k0 = 0; k0 < top_k; k0 += listed) {
        if (k0 > 0) __syncthreads(); /* the rows before have been used */
        for (int i = (int)threadIdx.x; i < entries; i += (int)blockDim.x) {
            const int64_t t = at.row0 + (i >> a->list_log2);
            const int k = k0 + (i & (listed - 1));
            s->row[i] = t < a->count && k < top_k ? moei_permute_row(a, t * top_k + k) : -1;
        }
        __syncthreads(); /* s->row is written */
        MOE_UNROLL
        for (int u = 0; u < MOEI_PERMUTE_TOKENS; ++u) {
            const int32_t* row = s->row + ((at.group + u * a->groups) << a->list_log2);
            for (int k = 0; k < listed && in; ++k) {
                const int32_t r = row[k];
                char* y = a->y + r * a->y_bytes + offset;
                if (r < 0) continue;
                if (width == 16) moei_store16_streaming(y, v[u]); /* rows far apart */
                else moei_store_vector(y, v[u], width);
            }
        }
    }
    moei_permute_zero(a, s, width);
}

#define MOEI_PERMUTE_LIST_OF(X) X(16) X(8) X(4) X(2)

/* The kernels for vectors of `width` bytes: gathering, and by token. */
#define MOEI_PERMUTE_KERNELS(width)                                                                \
    MOE_KERNEL(MOEI_PERMUTE_THREADS, 4) moei_permute_gather_##width(MOE_ARG(moei_permute_args) a)  \
    {                                                                                              \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (!moe_fault_stopped(a.fault)) moei_permute_gather(&a, width);                           \
    }                                                                                              \
    MOE_KERNEL(MOEI_PERMUTE_THREADS, 4) moei_permute_token_##width(MOE_ARG(moei_permute_args) a)   \
    {                                                                                              \
        MOE_SHARED(moei_permute_shared, shared);                                                   \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (!moe_fault_stopped(a.fault)) moei_permute_by_token(&a, &shared, width);                \
    }
MOEI_PERMUTE_LIST_OF(MOEI_PERMUTE_KERNELS)
#undef MOEI_PERMUTE_KERNELS

/* Refuses sizes and options that are out of range or contradict each other; fills in the defaults.
   `back` is 1 for unpermute. */
MOE_HOST moe_status moei_permute_check_options(moe_permute_desc* d, int back)
{
    int64_t slots;
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->top_k >= 1 && d->top_k <= MOE_MAX_EXPERTS, MOE_ERR_RANGE, top_k);
    slots = (int64_t)d->num_tokens * d->top_k;
    MOE_REQUIRE(slots <= 0x7fffffff, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->num_rows >= 0 && d->num_rows <= 0x7fffffff, MOE_ERR_RANGE, num_rows);
    MOEI_REQUIRE_RANK(d);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(d->dtype), MOE_ERR_DTYPE, dtype);
    if (d->x_stride == 0) d->x_stride = d->hidden;
    if (d->y_stride == 0) d->y_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->x_stride, d->hidden, back ? d->num_rows : d->num_tokens),
                MOE_ERR_STRIDE, x_stride);
    MOE_REQUIRE(moei_stride_fits(d->y_stride, d->hidden, back ? slots : d->num_rows),
                MOE_ERR_STRIDE, y_stride);
    return MOE_OK;
}

/* Refuses buffers that are missing, misaligned or overlapping. Requires checked options. */
MOE_HOST moe_status moei_permute_check_buffers(const moe_permute_desc* d, int back)
{
    const int64_t slots = (int64_t)d->num_tokens * d->top_k;
    const int64_t x_rows = back ? d->num_rows : d->num_tokens, y_rows = back ? slots : d->num_rows;
    const uint32_t align = (uint32_t)moe_dtype_bytes(d->dtype);
    const moe_buffer b[] = {{d->x, moe_extent(x_rows, d->x_stride, d->hidden, d->dtype), align,
                             MOE_BUFFER_REQUIRED, MOE_FIELD_x},
                            {d->row_slot, back ? 0 : (uint64_t)d->num_rows * 4, 4,
                             MOE_BUFFER_REQUIRED, MOE_FIELD_row_slot},
                            {d->slot_row, (uint64_t)slots * 4, 4,
                             back ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_slot_row},
                            {d->y, moe_extent(y_rows, d->y_stride, d->hidden, d->dtype), align,
                             MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_y},
                            {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (y_rows == 0) return moe_check_buffers(b + count - 1, 1); /* the fault word alone */
    return moe_check_buffers(b, count);
}

/* Refuses what moe_permute_desc does not allow; fills in the defaults. */
MOE_HOST moe_status moei_permute_check(moe_permute_desc* d, int back)
{
    MOE_TRY(moei_permute_check_options(d, back));
    return moei_permute_check_buffers(d, back);
}

/* Sets how rows are cut into vectors, lanes, groups and columns, and *blocks to the number of
   thread blocks, where a thread does `rows` rows. Returns the bytes of a vector. */
MOE_HOST int moei_permute_cut(moei_permute_args* a, const moe_permute_desc* d, int rows,
                              int64_t* blocks)
{
    const int64_t row = (int64_t)d->hidden * moe_dtype_bytes(d->dtype);
    const uint64_t all = (uint64_t)(uintptr_t)a->x | (uint64_t)(uintptr_t)a->y |
                         (uint64_t)a->x_bytes | (uint64_t)a->y_bytes | (uint64_t)row;
    int width = 16, each;
    while (all % (uint64_t)width != 0) width /= 2;
    a->vectors = (int32_t)(row / width);
    a->columns = (a->vectors + MOEI_PERMUTE_THREADS - 1) / MOEI_PERMUTE_THREADS;
    each = (a->vectors + a->columns - 1) / a->columns;
    a->groups = 1;
    a->lanes = (each + 31) / 32 * 32;
    if (each <= MOEI_PERMUTE_THREADS / 2) { /* several rows at a time in a block */
        while (1 << a->lanes_log2 < each) ++a->lanes_log2;
        a->lanes = 1 << a->lanes_log2;
        a->groups = MOEI_PERMUTE_THREADS / a->lanes;
    }
    *blocks = (a->count + a->groups * rows - 1) / (a->groups * rows) * a->columns;
    return width;
}

/* A prepared permute or unpermute: all but the stream, for the device current in prepare. */
typedef struct moe_permute_prepared {
    moei_permute_args args;
    moe_launch launch; /* empty where y has no rows */
} moe_permute_prepared;

/* Fills in *p, which is all zeros. back: 1 for unpermute. */
MOE_HOST moe_status moei_permute_prepare(const moe_permute_desc* desc, int back,
                                         moe_permute_prepared* p)
{
    moe_permute_desc d;
    moei_permute_args* a;
    moe_launch_config c;
    int by_token, width;
    int64_t blocks, slots;
    d = *desc;
    a = &p->args;
    MOE_TRY(moei_permute_check(&d, back));
    slots = (int64_t)d.num_tokens * d.top_k;
    if ((back ? slots : d.num_rows) == 0) return MOE_OK;
    by_token = !back && d.slot_row && slots > 0;
    a->x = (const char*)d.x;
    a->y = (char*)d.y;
    a->fault = d.fault;
    a->rank = d.rank;
    a->x_bytes = d.x_stride * moe_dtype_bytes(d.dtype);
    a->y_bytes = d.y_stride * moe_dtype_bytes(d.dtype);
    a->index = back || by_token ? d.slot_row : d.row_slot;
    a->check = d.row_slot;
    a->count = back ? slots : by_token ? d.num_tokens : d.num_rows;
    a->limit = back || by_token ? d.num_rows : slots;
    a->div = back ? 1u : (uint32_t)d.top_k;
    width = moei_permute_cut(a, &d, by_token ? MOEI_PERMUTE_TOKENS : MOEI_PERMUTE_ROWS, &blocks);
    MOE_REQUIRE(blocks <= 0x7fffffff, MOE_ERR_RANGE, hidden);
    /* by token: the entries that the block's tokens look up at once fit into the list */
    while (1 << a->list_log2 < d.top_k &&
           (a->groups * MOEI_PERMUTE_TOKENS) << (a->list_log2 + 1) <= MOEI_PERMUTE_LIST)
        ++a->list_log2;
    c = moe_grid(blocks, a->groups * a->lanes, 0, 0);
    c.dependent = 1;
#define MOEI_PERMUTE_CASE(bytes)                                                                  \
    if (width == bytes && by_token)                                                               \
        return MOE_PREPARE(&p->launch, moei_permute_token_##bytes, c);                            \
    if (width == bytes) return MOE_PREPARE(&p->launch, moei_permute_gather_##bytes, c);
    MOEI_PERMUTE_LIST_OF(MOEI_PERMUTE_CASE)
#undef MOEI_PERMUTE_CASE
    return MOE_STATUS(MOE_ERR_DTYPE, dtype);
}

/* Prepares a permute, which moe_permute_run queues any number of times. Errors: a status for each
   field of the descriptor that is not as documented. num_rows = 0 is no error; T = 0 gives
   zeros. */
MOE_HOST moe_status moe_permute_prepare(const moe_permute_desc* desc, moe_permute_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_permute_prepare(desc, 0, p));
}

/* Prepares an unpermute, for moe_permute_run too: the same descriptor with x and y exchanged. T = 0
   is no error; with num_rows = 0 every row that slot_row names is out of range. */
MOE_HOST moe_status moe_unpermute_prepare(const moe_permute_desc* desc, moe_permute_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_permute_prepare(desc, 1, p));
}

/* Queues a prepared permute or unpermute on `stream`. */
MOE_HOST moe_status moe_permute_run(const moe_permute_prepared* p, cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}

/* Prepares and runs a permute. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_permute(const moe_permute_desc* desc, cudaStream_t stream)
{
    moe_permute_prepared p;
    MOE_TRY(moe_permute_prepare(desc, &p));
    return moe_permute_run(&p, stream);
}

/* Prepares and runs an unpermute. Queues nothing where a field is refused. */
MOE_HOST moe_status moe_unpermute(const moe_permute_desc* desc, cudaStream_t stream)
{
    moe_permute_prepared p;
    MOE_TRY(moe_unpermute_prepare(desc, &p));
    return moe_permute_run(&p, stream);
}

/* Loads this header's kernels now rather than at their first launch. */
MOE_HOST moe_status moe_permute_preload(void)
{
#define MOEI_PERMUTE_LOAD(width)                                                                   \
    MOE_TRY(moe_preload_kernel((const void*)moei_permute_gather_##width));                         \
    MOE_TRY(moe_preload_kernel((const void*)moei_permute_token_##width));
    MOEI_PERMUTE_LIST_OF(MOEI_PERMUTE_LOAD)
#undef MOEI_PERMUTE_LOAD
    return MOE_OK;
}

MOEI_PRELOAD_INCLUDED(permute)

#endif
