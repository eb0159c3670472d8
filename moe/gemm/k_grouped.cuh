/* k_grouped.cuh: grouped GEMM whose reduced dimension is the ragged one, one product per expert:

     C_e[i, j] = sum over rows r of expert e of A[a_row(r), i] * B[b_row(r), j]
     a_row(r) = a_index[r] / a_div,  b_row(r) = b_index[r] / b_div

   Gradients of an expert's weights are such products: of w1 with the gradient of the pre-activations
   and the gathered tokens, of w2 with the gathered gradient of y and the activations.

   In:   A [a_rows, m], B [b_rows, n] fp16 or bf16; expert_offset [E + 1]; indices [R]
   Out:  C [E, m, n] in the same dtype or fp32, written or added to; an expert without rows has zeros
   A row index of -1 is a row of zeros. Rows that no expert owns are not read, so they may hold
   anything. fp32 accumulation, one sum for each element in ascending r: equal inputs give equal bits.

   Cost: 2 * R * m * n flops. One launch. m and n multiples of 8. fp16 from sm_75, bf16 from sm_80.

     moe_k_grouped_gemm_desc g = {0};
     g.a = dact;  g.b = x;  g.b_index = row_slot;  g.b_div = K;  g.b_rows = T;
     g.expert_offset = offset;  g.c = dw1;  g.c_dtype = MOE_FP32;  g.accumulate = 1;
     g.num_experts = E;  g.num_rows = R;  g.m = 2 * I;  g.n = H;
     moe_status s = moe_k_grouped_gemm(&g, stream); */
#ifndef MOE_GEMM_K_GROUPED_CUH
#define MOE_GEMM_K_GROUPED_CUH

#include "../base/check.h"
#include "../fields.h"
#include "epilogue.cuh"
#include "mainloop.cuh"
#include "schedule.cuh"
#include "variant.cuh"

typedef struct moe_k_grouped_gemm_desc {
    /* in */
    const void* a;                /* [a_rows, m] dtype, 16-byte aligned */
    const void* b;                /* [b_rows, n] dtype, 16-byte aligned */
    int64_t a_stride, b_stride;   /* elements between rows; 0 = dense; multiples of 8 */
    int64_t a_rows, b_rows;       /* 0 = num_rows */
    const int32_t* a_index;       /* [num_rows] see above, -1 = a row of zeros; null = r itself */
    const int32_t* b_index;       /* the same */
    const int32_t* expert_offset; /* [E + 1]; null with one expert: all num_rows rows */
    /* out */
    void* c;                 /* [E, m, n] c_dtype, 16-byte aligned; or null with a table */
    void* const* c_table;    /* [E] device array: each expert's matrix, 16-byte aligned; or null */
    int64_t c_stride;        /* elements between rows; 0 = n; multiple of 8 */
    int64_t c_expert_stride; /* elements between matrices of c; 0 = m c_stride; multiple of 8 */
    uint64_t* fault;         /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_experts;  /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t num_rows;     /* R, 0 .. MOE_GEMM_MAX_ROWS: most that there can be */
    int32_t m, n;         /* rows and columns of each C; multiples of 8 */
    int32_t a_div, b_div; /* 0 = 1; K turns slots into tokens */
    int32_t dtype;        /* of A and B: fp16 or bf16; 0 = bf16 */
    int32_t c_dtype;      /* dtype or fp32; 0 = dtype */
    int32_t accumulate;   /* 1: added to what C holds; 0: written */
    int32_t tile;         /* MOE_TILE_128x128, MOE_TILE_64x64; 0 = chosen by shape and device */
} moe_k_grouped_gemm_desc;

/* Both tiles read rows of 16-byte pieces; as MOE_GEMM_SHAPE_*, then blocks a multiprocessor. */
#define MOEI_K_GEMM_TILE_LIST(X, ...)                                                             \
    X(128x128, MOE_GEMM_SHAPE_128x128, 2, __VA_ARGS__)                                            \
    X(64x64, MOE_GEMM_SHAPE_64x64, 4, __VA_ARGS__)

/* dtypes that both tiles are stamped with; predefine it to trim what is compiled. */
#ifndef MOE_K_GEMM_DTYPE_LIST
#define MOE_K_GEMM_DTYPE_LIST(X)                                                                  \
    X(f16, MOE_FP16)                                                                              \
    X(bf16, MOE_BF16)
#endif

/* ---- a block's tiles: each expert has as many ---- */

typedef struct moei_k_tiles {
    int32_t num_tiles, row_tiles, column_tiles; /* of all experts; of one */
} moei_k_tiles;

/* Where tile number `index` lies: first row and column of C_e, rows begin .. end of A and B. Rows of
   C fastest, so that neighbours share columns of B. */
MOE_DEVICE moe_tile_position moei_k_tile(const moe_k_grouped_gemm_desc* d, const moei_k_tiles* s,
                                         int index, const moe_gemm_shape f)
{
    const int each = s->row_tiles * s->column_tiles, local = index % each;
    moe_tile_position t;
    t.expert = index / each;
    t.begin = d->expert_offset ? d->expert_offset[t.expert] : 0;
    t.end = d->expert_offset ? d->expert_offset[t.expert + 1] : d->num_rows;
    t.row = local % s->row_tiles * f.tm;
    t.column = local / s->row_tiles * f.tn;
    return t;
}

/* ---- the loader ---- */

#define MOEI_K_STEP 32 /* rows of a step: tk of both tiles */

/* Shared memory: the rows of A and B that the next steps copy, resolved; -1: zeros. Step number n has
   slot n % 4. */
typedef struct moei_k_shared {
    int32_t row[4][2][MOEI_K_STEP];
} moei_k_shared;

/* Rows that are left of a tile's expert. */
typedef struct moei_k_rows {
    int32_t begin, end, tile;
} moei_k_rows;

/* What a thread copies next: of A and of B one 16-byte piece of some rows of each step. Warps 0 and 1
   find the rows, of A and of B, two steps ahead: a lane has one row of a step, whose index it reads
   three steps ahead. */
typedef struct moei_k_loader {
    const char *a, *b;      /* of the piece in row 0 */
    int32_t a_keep, b_keep; /* bytes of the piece: 16, or 0 past the last column */
    int32_t slot;           /* of the step to copy */
    moei_k_rows copy, look; /* of the step to copy; of the index to read */
    int32_t index, at;      /* warps 0, 1: read for the step to find next, and where it stood */
    moei_k_shared* shared;
} moei_k_loader;

/* On to the next tile that has rows, if the current one has none left. */
MOE_DEVICE bool moei_k_rows_next(moei_k_rows* p, const moe_k_grouped_gemm_desc* d,
                                 const moei_k_tiles* s, const moe_gemm_shape f)
{
    bool moved = false;
    while (p->begin >= p->end && p->tile < s->num_tiles) {
        p->tile += (int)gridDim.x;
        moved = true;
        if (p->tile < s->num_tiles) {
            const moe_tile_position t = moei_k_tile(d, s, p->tile, f);
            p->begin = t.begin;
            p->end = t.end;
        }
    }
    return moved;
}

/* Warps 0 and 1: reads the index of the lane's row of the step after those that were looked at. */
MOE_DEVICE void moei_k_read(moei_k_loader* p, const moe_k_grouped_gemm_desc* d,
                            const moei_k_tiles* s, const moe_gemm_shape f)
{
    const int32_t* index = moei_warp() == 0 ? d->a_index : d->b_index;
    (void)moei_k_rows_next(&p->look, d, s, f);
    p->at = p->look.begin + moei_lane();
    p->index = p->at >= p->look.end ? -1 : index ? index[p->at] : p->at;
    p->look.begin += MOEI_K_STEP;
}

/* Warps 0 and 1: resolves the rows of the step with this slot, whose index has been read, and reads
   the next one's. */
MOE_DEVICE void moei_k_find(moei_k_loader* p, const moe_k_grouped_gemm_desc* d,
                            const moei_k_tiles* s, int slot, const moe_gemm_shape f)
{
    const int side = moei_warp();
    if (side < 2) {
        const int div = side == 0 ? d->a_div : d->b_div;
        int row = p->index;
        if (div > 1 && row >= 0) row = row / div;
        if (row >= (side == 0 ? d->a_rows : d->b_rows) || row < -1) {
            moei_fault_raise(d->fault, MOE_FAULT_BAD_ROW, 0, p->at);
            row = -1;
        }
        p->shared->row[slot][side][moei_lane()] = row;
        moei_k_read(p, d, s, f);
    }
}

/* Points the copies at the columns of the tile. */
MOE_DEVICE void moei_k_loader_columns(moei_k_loader* p, const moe_k_grouped_gemm_desc* d,
                                      const moei_k_tiles* s, const moe_gemm_shape f)
{
    if (p->copy.tile < s->num_tiles) {
        const moe_tile_position t = moei_k_tile(d, s, p->copy.tile, f);
        const int i = t.row + (int)threadIdx.x % (f.tm / 8) * 8;
        const int j = t.column + (int)threadIdx.x % (f.tn / 8) * 8;
        p->a = (const char*)d->a + (i < d->m ? i : 0) * 2;
        p->b = (const char*)d->b + (j < d->n ? j : 0) * 2;
        p->a_keep = i < d->m ? 16 : 0;
        p->b_keep = j < d->n ? 16 : 0;
    }
}

/* Begins with the block's first tile; all threads of the block. On return the rows of the first two
   steps are there for every thread. */
MOE_DEVICE void moei_k_loader_begin(moei_k_loader* p, const moe_k_grouped_gemm_desc* d,
                                    const moei_k_tiles* s, moei_k_shared* shared,
                                    const moe_gemm_shape f)
{
    const moe_tile_position t = moei_k_tile(d, s, (int)blockIdx.x, f);
    p->shared = shared;
    p->slot = 0;
    p->copy.begin = t.begin;
    p->copy.end = t.end;
    p->copy.tile = (int)blockIdx.x;
    p->look = p->copy;
    p->index = -1, p->at = 0;
    moei_k_loader_columns(p, d, s, f);
    if (moei_warp() < 2) moei_k_read(p, d, s, f);
    moei_k_find(p, d, s, 0, f);
    moei_k_find(p, d, s, 1, f);
    __syncthreads();
}

MOE_DEVICE void moei_k_loader_advance(moei_k_loader* p, const moe_k_grouped_gemm_desc* d,
                                      const moei_k_tiles* s, const moe_gemm_shape f)
{
    if (moei_k_rows_next(&p->copy, d, s, f)) moei_k_loader_columns(p, d, s, f);
    moei_k_find(p, d, s, (p->slot + 2) & 3, f);
}

/* Copies part `part` of `parts` of one operand's rows of a step. */
MOE_DEVICE void moei_k_copy(const int32_t* row, const char* from, int64_t stride, int keep,
                            uint16_t* stage, const int part, const int parts, const int width,
                            const int threads)
{
    const int piece = (int)threadIdx.x % (width / 8), line = (int)threadIdx.x / (width / 8);
    const int each = threads / (width / 8);
    MOEI_UNROLL
    for (int i = part; i < MOEI_K_STEP / each; i += parts) {
        const int r = row[i * each + line];
        moei_copy16_async(stage + moei_swizzled(i * each + line, piece * 8, width),
                          from + (r >= 0 ? r : 0) * stride * 2, r >= 0 ? keep : 0);
    }
}

MOE_DEVICE void moei_k_loader_copy(moei_k_loader* p, const moe_k_grouped_gemm_desc* d, uint16_t* sa,
                                   uint16_t* sb, const int part, const int parts,
                                   const moe_gemm_shape f)
{
    moei_k_copy(p->shared->row[p->slot][0], p->a, d->a_stride, p->a_keep, sa, part, parts, f.tm,
                f.threads);
    moei_k_copy(p->shared->row[p->slot][1], p->b, d->b_stride, p->b_keep, sb, part, parts, f.tn,
                f.threads);
    if (part < parts - 1) return;
    p->copy.begin += MOEI_K_STEP;
    p->slot = (p->slot + 1) & 3;
}

#define MOEI_LOADER moei_k_loader
#define MOEI_LOADER_DESC moe_k_grouped_gemm_desc
#define MOEI_LOADER_TILES moei_k_tiles
#define MOEI_TILE_START moei_k_tile_start
#define MOEI_TILE_STEPS moei_k_tile_steps
#include "steps.inl"
#undef MOEI_LOADER
#undef MOEI_LOADER_DESC
#undef MOEI_LOADER_TILES
#undef MOEI_TILE_START
#undef MOEI_TILE_STEPS

/* ---- the kernel ---- */

/* Are the offsets in order and within the rows, and do the tables name an address, aligned to 16
   bytes, for each expert? All threads of the block call it. Where not, the fault word is set. */
MOE_DEVICE bool moei_k_good(const moe_k_grouped_gemm_desc* d)
{
    bool bad = false;
    for (int e = (int)threadIdx.x; e < d->num_experts; e += (int)blockDim.x) {
        const int begin = d->expert_offset ? d->expert_offset[e] : 0;
        const int end = d->expert_offset ? d->expert_offset[e + 1] : d->num_rows;
        const uintptr_t c = d->c_table ? (uintptr_t)d->c_table[e] : 16;
        if (begin < 0 || end < begin || end > d->num_rows) {
            bad = true;
            moei_fault_raise(d->fault, MOE_FAULT_BAD_OFFSET, 0, e);
        }
        if (!c || (c & 15) != 0) {
            bad = true;
            moei_fault_raise(d->fault, MOE_FAULT_BAD_TABLE, 0, e);
        }
    }
    return !__syncthreads_or(bad);
}

/* What the epilogue stores of a tile: C_e's rows are its own. */
MOE_DEVICE moe_grouped_gemm_desc moei_k_store_of(const moe_k_grouped_gemm_desc* d, int expert)
{
    moe_grouped_gemm_desc c;
    c.c = d->c_table ? d->c_table[expert]
                     : (char*)d->c + (int64_t)expert * d->c_expert_stride *
                                         (d->c_dtype == MOE_FP32 ? 4 : 2);
    c.c_table = 0;
    c.c_stride = d->c_stride;
    c.c_dtype = d->c_dtype;
    c.n = d->n;
    c.bias = 0;
    c.gate_up = 0;
    c.activation = MOE_ACTIVATION_NONE;
    c.alpha = c.limit = 0.0f;
    c.dtype = d->dtype;
    c.accumulate = d->accumulate;
    return c;
}

/* Shared memory of a block, bytes: the ring, then the epilogue's strips. */
MOE_HOST_DEVICE size_t moei_k_smem(const moe_gemm_shape f)
{
    return moei_ring_bytes(f) + (size_t)f.threads / 32 * (size_t)moei_strip_floats(f.wn) * 4;
}

/* A block computes tiles blockIdx.x, blockIdx.x + gridDim.x, ... */
MOE_DEVICE_BODY void moei_k_block(const moe_k_grouped_gemm_desc* d, unsigned char* shared,
                                  moei_k_shared* s, const moe_gemm_shape f)
{
    uint16_t* ring = (uint16_t*)shared;
    float* strip = (float*)(ring + f.stages * (f.tm + f.tn) * f.tk) +
                   moei_warp() * moei_strip_floats(f.wn);
    const int warp_m = moei_warp() % f.warps_m, warp_n = moei_warp() / f.warps_m;
    moei_ring r = moei_ring_of(ring, f);
    moei_k_tiles tiles;
    moei_k_loader load;

    if (!moei_k_good(d)) return;
    tiles.row_tiles = (d->m + f.tm - 1) / f.tm;
    tiles.column_tiles = (d->n + f.tn - 1) / f.tn;
    tiles.num_tiles = tiles.row_tiles * tiles.column_tiles * d->num_experts;
    if ((int)blockIdx.x >= tiles.num_tiles) return;
    moei_k_loader_begin(&load, d, &tiles, s, f);
    moei_k_tile_start(&load, &r, d, &tiles, f);
    for (int tile = (int)blockIdx.x; tile < tiles.num_tiles; tile += (int)gridDim.x) {
        const moe_tile_position t = moei_k_tile(d, &tiles, tile, f);
        const moe_grouped_gemm_desc c = moei_k_store_of(d, t.expert);
        moe_tile_position whole = t; /* the epilogue counts rows of C */
        moei_mma_c acc[4][4];
        moei_tile_zero(acc, f);
        if (t.end > t.begin)
            moei_k_tile_steps(acc, &load, &r, d, &tiles, (t.end - t.begin + f.tk - 1) / f.tk, f);
        whole.begin = 0;
        whole.end = d->m;
        moei_epilogue_warp(&c, &whole, acc, strip, t.row + warp_m * f.wm, t.column + warp_n * f.wn,
                           f.wm, f.wn);
    }
    moei_copy_wait(0); /* the steps past the last tile */
}

#define MOEI_K_GEMM_LEAST(dtype) ((dtype) == MOE_BF16 ? 80 : 75)

#define MOEI_K_GEMM_KERNEL(name, tm, tn, kb, wm, wn, stages, blocks, suffix, dtype)               \
    MOE_KERNEL((wm) * (wn) * 32, blocks)                                                          \
    moei_k_gemm_##name##_##suffix(MOE_ARG(moe_k_grouped_gemm_desc) d)                             \
    {                                                                                             \
        MOE_SHARED(moei_k_shared, s);                                                             \
        MOE_SHARED_DYNAMIC(shared);                                                               \
        moei_let_next_start();                                                                    \
        moei_wait_for_previous();                                                                 \
        if (MOEI_CODE_HERE(MOEI_K_GEMM_LEAST(dtype), MOEI_CODE_ANY) &&                            \
            !moei_fault_stopped(d.fault))                                                         \
            moei_k_block(&d, shared, &s,                                                          \
                         moe_gemm_shape_of(tm, tn, kb, wm, wn, stages, dtype, MOE_MAJOR_MN,       \
                                           MOE_MAJOR_MN));                                        \
    }
#define MOEI_K_GEMM_EXPAND(X, ...) X(__VA_ARGS__) /* a shape is six arguments */
#define MOEI_K_GEMM_KERNEL_OF(...) MOEI_K_GEMM_EXPAND(MOEI_K_GEMM_KERNEL, __VA_ARGS__)
#define MOEI_K_GEMM_KERNELS(suffix, dtype)                                                        \
    MOEI_K_GEMM_TILE_LIST(MOEI_K_GEMM_KERNEL_OF, suffix, dtype)
MOE_K_GEMM_DTYPE_LIST(MOEI_K_GEMM_KERNELS)
#undef MOEI_K_GEMM_KERNELS
#undef MOEI_K_GEMM_KERNEL_OF
#undef MOEI_K_GEMM_KERNEL

/* In order of preference. */
static const moei_variant moei_k_gemm_variants[] = {
#define MOEI_K_GEMM_ROW(name, tm, tn, kb, wm, wn, stages, blocks, suffix, dtype)                  \
    {(const void*)moei_k_gemm_##name##_##suffix,                                                  \
     "moei_k_gemm_" #name "_" #suffix,                                                            \
     MOEI_SHAPE_INIT(tm, tn, kb, wm, wn, stages, dtype, MOE_MAJOR_MN, MOE_MAJOR_MN),              \
     MOE_TILE_##name,                                                                             \
     blocks,                                                                                      \
     MOEI_K_GEMM_LEAST(dtype),                                                                    \
     MOEI_CODE_ANY},
#define MOEI_K_GEMM_ROW_OF(...) MOEI_K_GEMM_EXPAND(MOEI_K_GEMM_ROW, __VA_ARGS__)
#define MOEI_K_GEMM_ROWS(suffix, dtype) MOEI_K_GEMM_TILE_LIST(MOEI_K_GEMM_ROW_OF, suffix, dtype)
    MOE_K_GEMM_DTYPE_LIST(MOEI_K_GEMM_ROWS)
#undef MOEI_K_GEMM_ROWS
#undef MOEI_K_GEMM_ROW_OF
#undef MOEI_K_GEMM_ROW
    MOEI_VARIANT_END};

/* ---- the launch ---- */

/* One operand's stride and rows. */
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
    MOEI_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                 num_experts);
    MOEI_REQUIRE(d->num_rows >= 0 && d->num_rows <= MOE_GEMM_MAX_ROWS, MOE_ERR_RANGE, num_rows);
    MOEI_REQUIRE(d->m >= 1 && d->m <= (1 << 28), MOE_ERR_RANGE, m);
    MOEI_REQUIRE(d->m % 8 == 0, MOE_ERR_MULTIPLE, m);
    MOEI_REQUIRE(d->n >= 1 && d->n <= (1 << 28), MOE_ERR_RANGE, n);
    MOEI_REQUIRE(d->n % 8 == 0, MOE_ERR_MULTIPLE, n);
    if (d->dtype == 0) d->dtype = MOE_BF16;
    MOEI_REQUIRE(d->dtype == MOE_BF16 || d->dtype == MOE_FP16, MOE_ERR_DTYPE, dtype);
    if (d->c_dtype == 0) d->c_dtype = d->dtype;
    MOEI_REQUIRE(d->c_dtype == d->dtype || d->c_dtype == MOE_FP32, MOE_ERR_DTYPE, c_dtype);
    if (d->a_div == 0) d->a_div = 1;
    MOEI_REQUIRE(d->a_div >= 1, MOE_ERR_RANGE, row_div);
    if (d->b_div == 0) d->b_div = 1;
    MOEI_REQUIRE(d->b_div >= 1, MOE_ERR_RANGE, row_div);
    MOEI_REQUIRE((d->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
    MOEI_REQUIRE(d->tile == 0 || d->tile == MOE_TILE_128x128 || d->tile == MOE_TILE_64x64,
                 MOE_ERR_OPTION, tile);
    MOEI_TRY(moei_k_check_side(&d->a_stride, &d->a_rows, d->m, d->num_rows, MOE_FIELD_a_stride,
                               MOE_FIELD_a_rows));
    MOEI_TRY(moei_k_check_side(&d->b_stride, &d->b_rows, d->n, d->num_rows, MOE_FIELD_b_stride,
                               MOE_FIELD_b_rows));
    if (d->c_stride == 0) d->c_stride = d->n;
    MOEI_REQUIRE(moei_stride_fits(d->c_stride, d->n, d->m), MOE_ERR_STRIDE, c_stride);
    MOEI_REQUIRE(d->c_stride % 8 == 0, MOE_ERR_ALIGN, c_stride);
    if (d->c_expert_stride == 0) d->c_expert_stride = d->c_stride * d->m;
    MOEI_REQUIRE(moei_stride_fits(d->c_expert_stride,
                                  d->num_experts > 1 ? d->c_stride * (d->m - 1) + d->n : 0,
                                  d->num_experts),
                 MOE_ERR_STRIDE, c_stride);
    MOEI_REQUIRE(d->c_expert_stride % 8 == 0, MOE_ERR_ALIGN, c_stride);
    MOEI_REQUIRE(!(d->c && d->c_table), MOE_ERR_CONFLICT, c);
    return MOE_OK;
}

/* Refuses buffers that are absent, misaligned or overlap; options have been checked. */
MOE_HOST moe_status moei_k_check_buffers(const moe_k_grouped_gemm_desc* d)
{
    const uint64_t E = (uint64_t)d->num_experts, R = (uint64_t)d->num_rows;
    const uint64_t c = (E - 1) * (uint64_t)d->c_expert_stride * (d->c_dtype == MOE_FP32 ? 4u : 2u) +
                       moei_extent(d->m, d->c_stride, d->n, d->c_dtype);
    const int read = R ? MOEI_REQUIRED : MOEI_READ;
    const moei_buffer b[] = {
        {d->a, R ? moei_extent(d->a_rows, d->a_stride, d->m, d->dtype) : 0, 16, read, MOE_FIELD_a},
        {d->b, R ? moei_extent(d->b_rows, d->b_stride, d->n, d->dtype) : 0, 16, read, MOE_FIELD_b},
        {d->a_index, R * 4, 4, MOEI_READ, MOE_FIELD_a_index},
        {d->b_index, R * 4, 4, MOEI_READ, MOE_FIELD_b_index},
        {d->c_table, E * 8, 8, MOEI_READ, MOE_FIELD_c},
        {d->expert_offset, E * 4 + 4, 4, E > 1 ? MOEI_REQUIRED : MOEI_READ,
         MOE_FIELD_expert_offset},
        {d->c, c, 16, d->c_table ? MOEI_WRITTEN : MOEI_REQUIRED | MOEI_WRITTEN, MOE_FIELD_c},
        {d->fault, 8, 8, MOEI_WRITTEN, MOE_FIELD_fault}};
    return moei_check_buffers(b, (int)(sizeof b / sizeof b[0]));
}

/* A product with all but its stream settled, for the device that was current. */
typedef struct moe_k_grouped_gemm_prepared {
    moe_k_grouped_gemm_desc args; /* with its defaults filled in */
    moe_gemm_plan plan;
    moei_launch launch;
} moe_k_grouped_gemm_prepared;

/* Fills in plan and launch for p->args, which has been checked. */
MOE_HOST moe_status moei_k_prepare(moe_k_grouped_gemm_prepared* p)
{
    const moe_k_grouped_gemm_desc* d = &p->args;
    moei_device dev;
    MOEI_TRY(moei_device_query(&dev));
    MOEI_REQUIRE(MOE_ON_HOST || d->dtype == MOE_FP16 || dev.major >= 8, MOE_ERR_DEVICE, dtype);
    MOEI_REQUIRE(moei_variant_find(moei_k_gemm_variants, MOE_TILE_64x64, d->dtype, MOE_MAJOR_MN,
                                   MOE_MAJOR_MN),
                 MOE_ERR_NOT_COMPILED, dtype);
    for (const moei_variant* v = moei_k_gemm_variants; v->kernel; ++v) {
        const int64_t each = (((int64_t)d->m + v->shape.tm - 1) / v->shape.tm) *
                             (((int64_t)d->n + v->shape.tn - 1) / v->shape.tn);
        const int64_t tiles = each * d->num_experts;
        const size_t smem = moei_k_smem(v->shape);
        int runs;
        int64_t per_sm;
        if (v->shape.dtype != d->dtype ||
            (d->tile ? v->tile != d->tile : v->tile != MOE_TILE_64x64 && tiles < dev.sms))
            continue;
        MOEI_TRY(moei_variant_runs(v, &runs));
        if (!runs || smem + sizeof(moei_k_shared) > (size_t)dev.smem_block) {
            MOEI_REQUIRE(!d->tile, MOE_ERR_DEVICE, tile);
            continue;
        }
        MOEI_REQUIRE(tiles <= 0x7fffffff, MOE_ERR_RANGE, m);
        per_sm = (int64_t)((size_t)dev.smem_sm / (smem + 1024));
        if (per_sm > v->blocks_sm) per_sm = v->blocks_sm;
        if (per_sm < 1) per_sm = 1;
        p->plan.path = MOE_ON_HOST ? MOE_GEMM_PATH_HOST : MOE_GEMM_PATH_WMMA;
        p->plan.tile = v->tile;
        p->plan.tile_m = v->shape.tm;
        p->plan.tile_n = v->shape.tn;
        p->plan.tile_k = v->shape.tk;
        p->plan.stages = v->shape.stages;
        p->plan.threads = v->shape.threads;
        p->plan.blocks = (int32_t)(tiles < per_sm * dev.sms ? tiles : per_sm * dev.sms);
        p->plan.smem = smem;
        return moei_variant_prepare(&p->launch, v, p->plan.blocks, smem);
    }
    return MOE_STATUS(MOE_ERR_DEVICE, dtype); /* built without -arch=sm_80 or later, most often */
}

/* Settles a product: moe_k_grouped_gemm_run queues it any number of times. Errors: every field as
   documented above, each with its own status. num_rows = 0 is no error. */
MOE_HOST moe_status moe_k_grouped_gemm_prepare(const moe_k_grouped_gemm_desc* desc,
                                               moe_k_grouped_gemm_prepared* p)
{
    MOEI_REQUIRE(desc && p, MOE_ERR_NULL, desc);
    p->args = *desc;
    memset(&p->launch, 0, sizeof p->launch);
    MOEI_TRY(moei_k_check_options(&p->args));
    MOEI_TRY(moei_k_check_buffers(&p->args));
    return moei_k_prepare(p);
}

/* Queues a prepared product on `stream`. */
MOE_HOST moe_status moe_k_grouped_gemm_run(const moe_k_grouped_gemm_prepared* p,
                                           cudaStream_t stream)
{
    MOEI_REQUIRE(p, MOE_ERR_NULL, desc);
    return MOE_RUN(&p->launch, p->args, stream);
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_k_grouped_gemm(const moe_k_grouped_gemm_desc* desc, cudaStream_t stream)
{
    moe_k_grouped_gemm_prepared p;
    MOEI_TRY(moe_k_grouped_gemm_prepare(desc, &p));
    return moe_k_grouped_gemm_run(&p, stream);
}

/* Loads this header's kernels now. */
MOE_HOST moe_status moe_k_grouped_gemm_preload(void)
{
    return moei_variant_preload(moei_k_gemm_variants);
}

#endif
