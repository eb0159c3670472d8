/* large.cuh: the bf16 split for many tokens: a block computes 256 rows of x times 128 experts.
   Called by router.cuh.

   The steps are those of every tile (gemm/mainloop.cuh, gemm/steps.inl). This loader copies a bf16
   x directly to a stage. The weights, and an fp16 x, are first copied unsplit to shared memory of
   the thread's own, two steps before the thread splits them into a stage. A thread reads only its
   own copies there: waiting for them needs no barrier.

   A block takes 152 KB of shared memory, with an fp16 x 168 KB. sm_80 has less than 168 KB and runs
   the small tile for fp16. */
#ifndef MOE_ROUTER_LARGE_CUH
#define MOE_ROUTER_LARGE_CUH

#include "../gemm/mainloop.cuh"
#include "bf16_split.cuh"
#include "store.cuh"

/* As MOE_GEMM_SHAPE_*: rows of x, experts, tile_k, warps along rows and experts, stages. */
#define MOEI_BF16_SPLIT_LARGE 256, 128, 32, 4, 2, 3

#define MOEI_BF16_SPLIT_STAGES_(tile_m, tile_n, tile_k, warps_m, warps_n, stages) stages
#define MOEI_BF16_SPLIT_STAGES(...) MOEI_BF16_SPLIT_STAGES_(__VA_ARGS__)
static_assert(
    MOEI_BF16_SPLIT_STAGES(MOEI_BF16_SPLIT_LARGE) == 3,
    "what comes unsplit has arrived when the copies of two steps later have been waited for");

/* 16-byte vectors of the weights that a thread splits in a step. The thread copies as many of a
   bf16 x. */
#define MOEI_BF16_SPLIT_VECTORS 4

/* 16-byte vectors of an fp16 x that a thread splits in a step: half as many, since each becomes
   two. */
#define MOEI_BF16_SPLIT_X_VECTORS(x_dtype) ((x_dtype) == MOE_FP16 ? MOEI_BF16_SPLIT_VECTORS / 2 : 0)

/* Shared memory of a block, bytes: the ring, then the unsplit vectors of two steps, of 256 threads.
   The staging of the warps reuses the ring. */
#define MOEI_BF16_SPLIT_SMEM_large(x_dtype)                                                        \
    (MOEI_RING_BYTES(MOE_ROUTER_BF16_TERMS, MOEI_BF16_SPLIT_LARGE) +                               \
     2 * 16 * 256 * (MOEI_BF16_SPLIT_VECTORS + MOEI_BF16_SPLIT_X_VECTORS(x_dtype)))

/* What a thread copies next, in 16-byte vectors. Of x one vector of each of the rows r, r + 64, r +
   128 and r + 192 (fp16: r, r + 64). Of the weights one vector of two rows in each half of a step:
   vector i is of row i % 2, half i / 2. The rows of a warp are chosen so that the stores of the
   terms use all banks. */
typedef struct moei_bf16_split_loader {
    const char* x[4];       /* address of each row's vector of x, at the depth to copy next */
    const float* w[2];      /* address of each row's vector of the weights, likewise */
    uint4* own;             /* the thread's unsplit vectors: [2 steps][vectors], f.threads apart */
    int32_t own_at;         /* first of the vectors in `own` of the step to split: 0 or vectors */
    int32_t x_at, w_at;     /* index of the thread's first element in a stage's tile of x, of w */
    int32_t x_left;         /* depths of H from the vector of x on; <= 0: copies zeros */
    int32_t w_left;         /* depths of H from the vector of w on */
    int32_t x_rows, w_rows; /* bit i: row i of x, of w exists */
    int32_t x_dtype;        /* a literal */
} moei_bf16_split_loader;

/* Returns the row of A in a stage for a thread's vector i of x; r: its first row. For fp16 this
   is the upper part's row; the lower part's is 32 rows further. A warp's 64 rows are both parts of
   32 tokens. */
MOE_DEVICE int moei_bf16_split_x_row(int r, int i, int x_dtype)
{
    return x_dtype == MOE_FP16 ? r / 32 * 64 + r % 32 + i * 128 : r + i * 64;
}

/* Starts the copy of vector i of the weights to the thread's own vectors. */
MOE_DEVICE void moei_bf16_split_copy_w(const moei_bf16_split_loader* p, const int i,
                                       const moe_gemm_shape f)
{
    moei_copy16_async(p->own + (p->own_at + i) * f.threads, p->w[i & 1] + i / 2 * 16,
                      i / 2 * 16 < p->w_left && (p->w_rows >> (i & 1) & 1) ? 16 : 0);
}

/* Starts the copy of vector i of x: to the stage, for fp16 to the thread's own vectors. */
MOE_DEVICE void moei_bf16_split_copy_x(const moei_bf16_split_loader* p, uint16_t* stage,
                                       const int i, const moe_gemm_shape f)
{
    void* to = p->x_dtype == MOE_FP16
                   ? (void*)(p->own + (p->own_at + MOEI_BF16_SPLIT_VECTORS + i) * f.threads)
                   : (void*)(stage + p->x_at + i * 64 * f.tile_k);
    moei_copy16_async(to, p->x[i], p->x_left > 0 && (p->x_rows >> i & 1) ? 16 : 0);
}

/* Splits vector i of the weights, which has arrived, into the terms of a stage. */
MOE_DEVICE void moei_bf16_split_store_w(const moei_bf16_split_loader* p, uint16_t* stage,
                                        const int i, const moe_gemm_shape f)
{
    uint2 term[3];
    moei_bf16_split4(term, p->own[(p->own_at + i) * f.threads], f.terms);
    MOE_UNROLL
    for (int j = 0; j < f.terms; ++j)
        *(uint2*)(stage + (j * f.tile_n + (i & 1) * 8) * f.tile_k + (p->w_at ^ i / 2 * 16)) =
            term[j];
}

/* Splits vector i of an fp16 x, which has arrived, into its two rows of a stage. */
MOE_DEVICE void moei_bf16_split_store_x(const moei_bf16_split_loader* p, uint16_t* stage,
                                        const int i, const moe_gemm_shape f)
{
    uint16_t* to = stage + p->x_at + i * 128 * f.tile_k;
    uint4 hi, lo;
    moei_bf16_split_x(&hi, &lo, p->own[(p->own_at + MOEI_BF16_SPLIT_VECTORS + i) * f.threads]);
    moei_store16(to, hi);
    moei_store16(to + 32 * f.tile_k, lo);
}

/* Move the addresses of x, and of the weights, to the next step. Copies in flight keep theirs. */
MOE_DEVICE void moei_bf16_split_next_x(moei_bf16_split_loader* p, const moe_gemm_shape f)
{
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) p->x[i] += f.tile_k * 2;
    p->x_left -= f.tile_k;
}

MOE_DEVICE void moei_bf16_split_next_w(moei_bf16_split_loader* p, const moe_gemm_shape f)
{
    p->w[0] += f.tile_k;
    p->w[1] += f.tile_k;
    p->w_left -= f.tile_k;
}

/* Points the loader at the tile's first token t0 and expert e0. Copies the unsplit vectors of the
   first two steps and waits for them. own: shared memory after the ring, for two steps.
     1. Resolve the thread's 4 rows of x and 2 rows of weights; rows past the end read row 0.
     2. Resolve the thread's places in a stage.
     3. Copy two steps to `own` and wait. */
MOE_DEVICE void moei_bf16_split_begin(moei_bf16_split_loader* p, const moei_router_args* d,
                                      uint4* own, int64_t t0, int e0, const int x_dtype,
                                      const moe_gemm_shape f)
{
    const int lane = moe_lane(), warp = moe_warp(), tid = (int)threadIdx.x;
    const int xr = tid / 4, xk = tid % 4 * 8;
    const int wr = warp * 16 + (lane >> 1 & 7), wk = (lane >> 4) * 8 + (lane & 1) * 4;
    const int x_vectors = MOEI_BF16_SPLIT_X_VECTORS(x_dtype);
    p->x_dtype = x_dtype;
    p->own = own + tid;
    p->x_rows = p->w_rows = 0;
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const bool in = t0 + xr + 64 * i < d->num_tokens;
        p->x_rows |= (in ? 1 : 0) << i;
        p->x[i] = (const char*)d->x + ((in ? t0 + xr + 64 * i : 0) * d->x_stride + xk) * 2;
    }
    MOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const bool in = e0 + wr + 8 * i < d->num_experts;
        p->w_rows |= (in ? 1 : 0) << i;
        p->w[i] = (const float*)d->w + (in ? e0 + wr + 8 * i : 0) * d->w_stride + wk;
    }
    p->x_at = moei_swizzled(moei_bf16_split_x_row(xr, 0, x_dtype), xk, f.tile_k);
    p->w_at = moei_swizzled(wr, wk, f.tile_k);
    p->x_left = d->hidden - xk;
    p->w_left = d->hidden - wk;
    MOE_UNROLL
    for (int s = 0; s < 2; ++s) {
        p->own_at = s * (MOEI_BF16_SPLIT_VECTORS + x_vectors);
        MOE_UNROLL
        for (int i = 0; i < MOEI_BF16_SPLIT_VECTORS; ++i) moei_bf16_split_copy_w(p, i, f);
        MOE_UNROLL
        for (int i = 0; i < x_vectors; ++i) moei_bf16_split_copy_x(p, 0, i, f);
        moei_bf16_split_next_w(p, f);
        if (x_vectors) moei_bf16_split_next_x(p, f);
    }
    p->own_at = 0;
    moei_copy_commit();
    moei_copy_wait(0);
}

/* Does nothing: steps.inl requires the function, but a block has only one tile. */
MOE_DEVICE void moei_bf16_split_loader_advance(moei_bf16_split_loader* p, const moei_router_args* d,
                                               const void* tiles, int step, const moe_gemm_shape f)
{
    (void)p, (void)d, (void)tiles, (void)step, (void)f;
}

/* Fills part `part` of `parts` of a step: splits the thread's own vectors into the stage, and
   starts the copies of a bf16 x to the stage. Also starts the copies of the unsplit vectors of two
   steps later, which overwrite the vectors just split. */
MOE_DEVICE void moei_bf16_split_loader_copy(moei_bf16_split_loader* p, const moei_router_args* d,
                                            uint16_t* sa, uint16_t* sb, const int part,
                                            const int parts, const moe_gemm_shape f)
{
    const int x_vectors = MOEI_BF16_SPLIT_X_VECTORS(p->x_dtype);
    (void)d;
    MOE_UNROLL
    for (int i = part; i < MOEI_BF16_SPLIT_VECTORS; i += parts) {
        if (i < x_vectors || p->x_dtype != MOE_FP16) {
            if (i < x_vectors) moei_bf16_split_store_x(p, sa, i, f);
            moei_bf16_split_copy_x(p, sa, i, f);
        }
        moei_bf16_split_store_w(p, sb, i, f);
        moei_bf16_split_copy_w(p, i, f);
    }
    if (part < parts - 1) return;
    moei_bf16_split_next_x(p, f);
    moei_bf16_split_next_w(p, f);
    p->own_at = MOEI_BF16_SPLIT_VECTORS + x_vectors - p->own_at;
}

#define MOEI_LOADER moei_bf16_split_loader
#define MOEI_LOADER_ARGS moei_router_args
#define MOEI_LOADER_TILES const void
#define MOEI_TILE_START moei_bf16_split_start
#define MOEI_TILE_STEPS moei_bf16_split_steps
#include "../gemm/steps.inl"
#undef MOEI_LOADER
#undef MOEI_LOADER_ARGS
#undef MOEI_LOADER_TILES
#undef MOEI_TILE_START
#undef MOEI_TILE_STEPS

/* Computes one tile by one block; each warp owns 64 rows and 64 experts. All threads of the block
   call it. shared: MOEI_BF16_SPLIT_SMEM_large bytes. x_dtype and f are literals. */
MOE_DEVICE_BODY void moei_bf16_split_large(const moei_router_args* d, unsigned char* shared,
                                           const int x_dtype, const moe_gemm_shape f)
{
    const int tiles = (d->num_experts + f.tile_n - 1) / f.tile_n;
    const int64_t t0 =
        (int64_t)(blockIdx.x / (unsigned)tiles) * moei_bf16_split_tokens(f.tile_m, x_dtype);
    const int e0 = (int)(blockIdx.x % (unsigned)tiles) * f.tile_n;
    const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
    const moei_logits to = {d->logits, d->logits_stride, d->num_tokens, d->num_experts};
    const int wm = moei_bf16_split_tokens(f.wm, x_dtype);
    moei_bf16_split_loader load;
    moei_ring r = moei_ring_of((uint16_t*)shared, f);
    moei_mma_c acc[4][4];

    moei_bf16_split_begin(&load, d, (uint4*)(shared + moei_ring_bytes(f)), t0, e0, x_dtype, f);
    moei_bf16_split_start(&load, &r, d, 0, f);
    moei_tile_zero(acc, f);
    moei_bf16_split_steps(acc, &load, &r, d, 0, (d->hidden + f.tile_k - 1) / f.tile_k, f);
    moei_copy_wait(0);
    __syncthreads();           /* every warp has read the ring: the staging may overwrite it */
    if (x_dtype == MOE_FP16) { /* the lower part of x is 32 rows after the upper part */
        MOE_UNROLL
        for (int i = 0; i < 2; ++i) MOE_UNROLL
        for (int j = 0; j < 4; ++j) MOE_UNROLL
        for (int u = 0; u < MOEI_MMA_C_ELEMS; ++u) acc[i][j].x[u] += acc[i + 2][j].x[u];
    }
    moei_router_store(to, acc, (float*)shared + moe_warp() * moei_staging_floats(f.wn),
                      t0 + warp_m * wm, e0 + warp_n * f.wn, wm, f.wn);
}

#endif
