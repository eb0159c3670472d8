/* combine/backward_token.cuh: the kernel body of combine_backward.cuh: one thread block computes
   the gradients of one token.

   A thread holds two vectors of the token's dy in registers and uses them for every row: 16 bytes
   of a row each. The first warp looks up all rows, once. */
#ifndef MOE_COMBINE_BACKWARD_TOKEN_CUH
#define MOE_COMBINE_BACKWARD_TOKEN_CUH

#include "../combine.cuh"

/* The argument of combine_backward's kernels: a descriptor that the host has checked. */
typedef struct moei_combine_backward_args {
    moe_combine_args rows;  /* the forward's rows. table and rows null: no dweights. weights and
                               shared_weight null: 1 each. top_k 0: slots have no output. y is not
                               used */
    moe_combine_args drows; /* the gradient's buffers: table, rows and row_pitch differ. Both null:
                               no gradient rows */
    const void* dy;         /* [T, H] dy_dtype */
    float* dweights;        /* [T, K]; or null */
    char* dshared;          /* [T, H] rows_dtype; or null */
    float* dshared_weight;  /* [T]; or null */
    int64_t dy_pitch, dshared_pitch; /* bytes between rows */
    int32_t dy_dtype;                /* moe_dtype, not 0 */
    int32_t wide;                    /* 1: H and the rows of dy allow 16-byte vectors */
} moei_combine_backward_args;

/* One of a token's rows. A token's block looks up those that exist, once, in slot order; the shared
   row is the last. */
typedef struct moei_combine_backward_source {
    const char* row; /* address of the forward's H elements, rows_dtype; null: no dot */
    char* drow;      /* address of the gradient's; null: none. May be row */
    float weight;    /* factor on dy, any fp32 */
    int32_t slot;    /* k of the slot; top_k: the shared row */
} moei_combine_backward_source;

/* Shared memory of a token, besides its sources. */
typedef struct moei_combine_backward_shared {
    moe_combine_shared found;                                            /* of the sources */
    float dot[MOEI_COMBINE_THREADS / MOE_WARP_SIZE][MOEI_COMBINE_GROUP]; /* each warp's sums */
} moei_combine_backward_shared;

/* Returns 1 where the shared row has an output. */
MOE_HOST_DEVICE int moei_combine_backward_has_shared(const moei_combine_backward_args* a)
{
    return a->dshared || a->dshared_weight;
}

/* Returns the most rows of a token, those of its slots and the shared one: entries of source. */
MOE_HOST_DEVICE int moei_combine_backward_sources(const moei_combine_backward_args* a)
{
    return a->rows.top_k + moei_combine_backward_has_shared(a);
}

/* Sets s->row and s->drow of a slot, as far as the descriptor has them. Returns false where the
   slot names no row; a wrong place or table entry sets the fault word (BAD_PLACE). */
MOE_DEVICE bool moei_combine_backward_find(const moei_combine_backward_args* a, int64_t slot,
                                           moei_combine_backward_source* s)
{
    const moe_place p = a->rows.place[slot];
    if (a->dweights) {
        s->row = moei_combine_row_at(&a->rows, slot, p);
        if (!s->row) return false;
    }
    if (a->drows.table || a->drows.rows) {
        s->drow = (char*)moei_combine_row_at(&a->drows, slot, p);
        if (!s->drow) return false;
    }
    return true;
}

/* Looks up the rows of token t: writes those that exist to source, in slot order, and their number
   to shared->found. A slot without a row gets dweights 0. All threads; the first warp works. Ends
   with a barrier. */
MOE_DEVICE void moei_combine_backward_look_up(const moei_combine_backward_args* a, int64_t t,
                                              moei_combine_backward_shared* shared,
                                              moei_combine_backward_source* source)
{
    const int top_k = a->rows.top_k;
    int count = 0;
    if (moe_warp() == 0) {
        bool narrow = !a->wide;
        for (int k0 = 0; k0 < top_k; k0 += MOE_WARP_SIZE) {
            const int k = k0 + moe_lane();
            moei_combine_backward_source s = {0, 0, 1.0f, k};
            bool found = false;
            uint32_t live;
            if (k < top_k) {
                const int64_t slot = t * top_k + k;
                if (a->rows.weights) /* loaded together with the place, not after */
                    s.weight = __uint_as_float(moei_load4_early(a->rows.weights + slot));
                found = moei_combine_backward_find(a, slot, &s);
                if (!found && a->dweights) a->dweights[slot] = 0.0f;
            }
            live = __ballot_sync(MOE_FULL_WARP, found);
            if (found) {
                source[count + __popc(live & ((1u << moe_lane()) - 1u))] = s;
                narrow |= (((uintptr_t)s.row | (uintptr_t)s.drow) & 15) != 0;
            }
            count += __popc(live);
        }
        if (moei_combine_backward_has_shared(a)) {
            moei_combine_backward_source s = {0, 0, 1.0f, top_k};
            if (a->dshared_weight) s.row = (const char*)a->rows.shared + t * a->rows.shared_pitch;
            if (a->dshared) s.drow = a->dshared + t * a->dshared_pitch;
            if (moe_lane() == 0) {
                if (a->rows.shared_weight) s.weight = a->rows.shared_weight[t];
                source[count] = s;
            }
            narrow |= (((uintptr_t)s.row | (uintptr_t)s.drow) & 15) != 0;
            ++count;
        }
        narrow = __any_sync(MOE_FULL_WARP, narrow) != 0;
        if (moe_lane() == 0) {
            shared->found.count = count;
            shared->found.narrow = narrow;
        }
    }
    __syncthreads(); /* the sources are written */
}

/* Loads `width` elements of dy at p, 4 or 8, a literal, as they are stored. p is 16-byte aligned,
   with 4 elements of 16 bits 8-byte aligned. */
MOE_DEVICE void moei_combine_backward_load(uint4 raw[2], const char* p, int dtype, const int width)
{
    if (dtype == MOE_FP32) {
        raw[0] = moei_load16(p);
        if (width == 8) raw[1] = moei_load16(p + 16);
    } else if (width == 8) {
        raw[0] = moei_load16(p);
    } else {
        const uint2 u = *(const uint2*)p;
        raw[0] = make_uint4(u.x, u.y, 0, 0);
    }
}

/* Loads a thread's vectors of token t's dy at columns h and h + span, where these exist. */
MOE_DEVICE void moei_combine_backward_load_two(uint4 raw[2][2], const moei_combine_backward_args* a,
                                               int64_t t, int h, const int width)
{
    const char* dy = (const char*)a->dy + t * a->dy_pitch;
    MOE_UNROLL
    for (int c = 0; c < 2; ++c) {
        const int at = h + c * (int)blockDim.x * width;
        if (at < a->rows.hidden)
            moei_combine_backward_load(raw[c], dy + (int64_t)at * (a->dy_dtype == MOE_FP32 ? 4 : 2),
                                       a->dy_dtype, width);
    }
}

/* Unpacks such a load to fp32. */
MOE_DEVICE void moei_combine_backward_unpack(float* g, const uint4 raw[2], int dtype,
                                             const int width)
{
    if (dtype == MOE_FP32) {
        moei_unpack_16(g, raw[0], MOE_FP32);
        if (width == 8) moei_unpack_16(g + 4, raw[1], MOE_FP32);
    } else if (width == 8) {
        moei_unpack_8(g, raw[0], dtype);
    } else {
        const float2 a = moe_unpack2(raw[0].x, dtype), b = moe_unpack2(raw[0].y, dtype);
        g[0] = a.x, g[1] = a.y, g[2] = b.x, g[3] = b.y;
    }
}

/* Stores a 16-byte vector of w * g at p. The fp32 product is rounded once to rows_dtype. */
MOE_DEVICE void moei_combine_backward_store(char* p, const float* g, float w, const int rows_dtype)
{
    float v[8];
    MOE_UNROLL
    for (int i = 0; i < (rows_dtype == MOE_FP32 ? 4 : 8); ++i) v[i] = w * g[i];
    moei_store16_streaming(p, rows_dtype == MOE_FP32
                                  ? make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                               __float_as_uint(v[2]), __float_as_uint(v[3]))
                                  : moei_pack_8(v, rows_dtype));
}

/* A thread's two 16-byte vectors of a token, and the rows that they belong to. */
typedef struct moei_combine_backward_vector {
    const moei_combine_backward_source* source; /* [count] the token's rows */
    int count;                                  /* rows, 0 .. moei_combine_backward_sources */
    int h, span, hidden; /* column of the first vector; columns between the two; H */
} moei_combine_backward_vector;

/* Begins to bring the warp's parts of the forward's rows k and k + 1 into L2, those that exist: four
   lines of 128 bytes each vector. width: elements in a 16-byte vector. Loads of two rows alone are too
   few to keep memory busy. */
MOE_DEVICE void moei_combine_backward_prefetch(const moei_combine_backward_vector p, int k,
                                               const int width)
{
    if (moe_lane() % 8 != 0) return;
    MOE_UNROLL
    for (int u = 0; u < 2; ++u) {
        const char* row = k + u < p.count ? p.source[k + u].row : (const char*)0;
        MOE_UNROLL
        for (int c = 0; c < 2; ++c)
            if (row && p.h + c * p.span < p.hidden)
                moei_prefetch_line(row + (int64_t)(p.h + c * p.span) * (16 / width));
    }
}

/* Stores the gradients of rows k and k + 1 from g, the thread's vectors of dy. With dots adds the
   thread's parts to dot[0] and dot[1]; issues all loads before the first use and before the first
   store, so a gradient may replace its row. full: 1 where these rows and columns all exist.
   rows_dtype, dots and full are literals. */
MOE_DEVICE void moei_combine_backward_rows(float* dot, const float g[2][8],
                                           const moei_combine_backward_vector p, int k,
                                           const int rows_dtype, const int dots, const int full)
{
    const int width = rows_dtype == MOE_FP32 ? 4 : 8; /* elements in a 16-byte vector of a row */
    uint4 raw[2][2];
    float v[8];
    if (dots) moei_combine_backward_prefetch(p, k + 2, width);
    MOE_UNROLL
    for (int u = 0; u < 2 && dots; ++u) {
        const char* row = full || k + u < p.count ? p.source[k + u].row : (const char*)0;
        MOE_UNROLL
        for (int c = 0; c < 2; ++c)
            if (row && (full || p.h + c * p.span < p.hidden))
                raw[c][u] = moei_load16(row + (int64_t)(p.h + c * p.span) * (16 / width));
    }
    MOE_UNROLL
    for (int u = 0; u < 2; ++u)
        if (full || k + u < p.count) {
            const moei_combine_backward_source s = p.source[k + u];
            MOE_UNROLL
            for (int c = 0; c < 2; ++c) {
                if (!full && p.h + c * p.span >= p.hidden) continue;
                if (dots && s.row) {
                    moei_unpack_16(v, raw[c][u], rows_dtype);
                    MOE_UNROLL
                    for (int i = 0; i < width; ++i) dot[u] = fmaf(g[c][i], v[i], dot[u]);
                }
                if (s.drow)
                    moei_combine_backward_store(s.drow + (int64_t)(p.h + c * p.span) * (16 / width),
                                                g[c], s.weight, rows_dtype);
            }
        }
}

/* Sums each of v[0 .. 8) over the warp, all at once: each of the first steps halves the numbers
   that a lane still adds. Returns the sum of v[lane / 4]. */
MOE_DEVICE float moei_combine_backward_warp_sums(float v[8])
{
    MOE_UNROLL
    for (int n = 4; n > 0; n /= 2) {
        const bool upper = (moe_lane() & (4 * n)) != 0;
        MOE_UNROLL
        for (int i = 0; i < n; ++i) {
            const float keep = upper ? v[i + n] : v[i], give = upper ? v[i] : v[i + n];
            v[i] = keep + __shfl_xor_sync(MOE_FULL_WARP, give, 4 * n);
        }
    }
    return moe_warp_sum(v[0], 4);
}

/* Sums the parts of all threads and stores the dots of rows k0 .. k0 + 7: dweights, and
   dshared_weight of the shared row. All threads. */
MOE_DEVICE void moei_combine_backward_dots(const moei_combine_backward_args* a, int64_t t,
                                           moei_combine_backward_shared* shared,
                                           const moei_combine_backward_source* source, float dot[8],
                                           int k0)
{
    const int warps = (int)(blockDim.x / MOE_WARP_SIZE), i = (int)threadIdx.x;
    const float sum = moei_combine_backward_warp_sums(dot);
    if (k0 > 0) __syncthreads(); /* the sums before have been read */
    if (moe_lane() % 4 == 0) shared->dot[moe_warp()][moe_lane() / 4] = sum;
    __syncthreads(); /* every warp's sums are written */
    if (i < MOEI_COMBINE_GROUP && k0 + i < shared->found.count) {
        const int k = source[k0 + i].slot;
        float all = 0.0f;
        for (int w = 0; w < warps; ++w) all += shared->dot[w][i];
        if (k < a->rows.top_k) {
            if (a->dweights) a->dweights[t * a->rows.top_k + k] = all;
        } else if (a->dshared_weight) {
            a->dshared_weight[t] = all;
        }
    }
}

/* Computes the token in 16-byte vectors, two of dy a thread at a time, for 8 rows and then the next
   8. raw holds a thread's first two vectors of dy. rows_dtype and dots are literals. */
MOE_DEVICE void moei_combine_backward_wide(const moei_combine_backward_args* a, int64_t t,
                                           moei_combine_backward_shared* shared,
                                           const moei_combine_backward_source* source,
                                           uint4 raw[2][2], const int rows_dtype, const int dots)
{
    const int width = rows_dtype == MOE_FP32 ? 4 : 8;
    const int hidden = a->rows.hidden, span = (int)blockDim.x * width;
    const int count = shared->found.count, first = (int)threadIdx.x * width;
    float g[2][8];
    MOE_UNROLL
    for (int c = 0; c < 2; ++c)
        if (first + c * span < hidden)
            moei_combine_backward_unpack(g[c], raw[c], a->dy_dtype, width);
    for (int k0 = 0; k0 < count; k0 += MOEI_COMBINE_GROUP) {
        float dot[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (int h = first; h < hidden; h += 2 * span) {
            const moei_combine_backward_vector p = {source, count, h, span, hidden};
            if (h != first || (k0 > 0 && 2 * span < hidden)) {
                moei_combine_backward_load_two(raw, a, t, h, width);
                MOE_UNROLL
                for (int c = 0; c < 2; ++c)
                    if (h + c * span < hidden)
                        moei_combine_backward_unpack(g[c], raw[c], a->dy_dtype, width);
            }
            MOE_UNROLL
            for (int u = 0; u < MOEI_COMBINE_GROUP; u += 2) {
                if (k0 + u + 2 <= count && h + span < hidden)
                    moei_combine_backward_rows(dot + u, g, p, k0 + u, rows_dtype, dots, 1);
                else if (k0 + u < count)
                    moei_combine_backward_rows(dot + u, g, p, k0 + u, rows_dtype, dots, 0);
            }
        }
        if (dots) moei_combine_backward_dots(a, t, shared, source, dot, k0);
    }
}

/* Computes the token element by element, for addresses or an H that do not allow 16-byte vectors.
   rows_dtype and dots are literals. */
MOE_DEVICE void moei_combine_backward_elements(const moei_combine_backward_args* a, int64_t t,
                                               moei_combine_backward_shared* shared,
                                               const moei_combine_backward_source* source,
                                               const int rows_dtype, const int dots)
{
    const int hidden = a->rows.hidden, count = shared->found.count;
    const char* dy = (const char*)a->dy + t * a->dy_pitch;
    for (int k0 = 0; k0 < count; k0 += MOEI_COMBINE_GROUP) {
        float dot[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (int h = (int)threadIdx.x; h < hidden; h += (int)blockDim.x) {
            const float g = moe_load_f32(dy, h, a->dy_dtype);
            float v[8];
            MOE_UNROLL
            for (int u = 0; u < MOEI_COMBINE_GROUP; ++u)
                if (dots && k0 + u < count && source[k0 + u].row)
                    v[u] = moe_load_f32(source[k0 + u].row, h, rows_dtype);
            MOE_UNROLL
            for (int u = 0; u < MOEI_COMBINE_GROUP; ++u)
                if (k0 + u < count) {
                    const moei_combine_backward_source s = source[k0 + u];
                    if (dots && s.row) dot[u] = fmaf(g, v[u], dot[u]);
                    if (s.drow) moe_store_f32(s.drow, h, rows_dtype, s.weight * g);
                }
        }
        if (dots) moei_combine_backward_dots(a, t, shared, source, dot, k0);
    }
}

/* Computes the gradients of token t. All threads of a block of whole warps call it together.
     1. every thread loads its first vectors of dy
     2. the first warp looks the rows up, those that exist, in slot order
     3. all threads store the gradient rows and compute the dots

   The shared struct and moei_combine_backward_sources(a) sources are in shared memory. rows_dtype
   is the rows', dots 1 where dweights or dshared_weight is an output: literals. */
MOE_DEVICE_BODY void moei_combine_backward_token(const moei_combine_backward_args* a, int64_t t,
                                                 moei_combine_backward_shared* shared,
                                                 moei_combine_backward_source* source,
                                                 const int rows_dtype, const int dots)
{
    const int width = rows_dtype == MOE_FP32 ? 4 : 8;
    uint4 raw[2][2];
    if (a->wide) /* 1. */
        moei_combine_backward_load_two(raw, a, t, (int)threadIdx.x * width, width);
    moei_combine_backward_look_up(a, t, shared, source); /* 2. */
    if (shared->found.narrow)                            /* 3. */
        moei_combine_backward_elements(a, t, shared, source, rows_dtype, dots);
    else moei_combine_backward_wide(a, t, shared, source, raw, rows_dtype, dots);
}

#endif
