/* router.cuh: the router's product, tokens to logits.

     logits[t, e] = sum over h of x[t, h] * router[e, h]

   In:   x [T, H], router [E, H] (a checkpoint's layout), fp32, fp16 or bf16 each
   Out:  logits [T, E] fp32

   Accumulated and stored in fp32: logits rounded to bf16 choose other experts. Two operands of
   one 16-bit dtype with H and E multiples of 8 and 16-byte aligned rows run on tensor cores
   (gemm/grouped.cuh); anything else runs as fp32 multiply-adds, slower, h ascending.
   One launch. Minimum architecture: sm_75.

     moe_router_desc r = {0};
     r.x = x;  r.router = router;  r.logits = logits;
     r.num_tokens = T;  r.hidden = H;  r.num_experts = E;
     moe_status s = moe_router_logits(&r, stream); */
#ifndef MOE_ROUTER_CUH
#define MOE_ROUTER_CUH

#include "gemm/grouped.cuh"

typedef struct moe_router_desc {
    /* in */
    const void* x;         /* [T, H] x_dtype */
    const void* router;    /* [E, H] router_dtype */
    int64_t x_stride;      /* elements between rows; 0 = H */
    int64_t router_stride; /* elements between rows; 0 = H */
    int32_t x_dtype;       /* moe_dtype; 0 = bf16 */
    int32_t router_dtype;  /* moe_dtype; 0 = x_dtype */
    /* out */
    float* logits;         /* [T, E] */
    int64_t logits_stride; /* elements between rows; 0 = E */
    uint64_t* fault;       /* [1] fault word; or null */
    /* sizes */
    int32_t num_tokens;  /* T >= 0 */
    int32_t hidden;      /* H, 1 .. 2^28 */
    int32_t num_experts; /* E, 1 .. 2^20 */
} moe_router_desc;

#define MOEI_ROUTER_TILE 64  /* tokens and experts of a block */
#define MOEI_ROUTER_DEPTH 16 /* of h held in shared memory */

typedef struct moei_router_shared {
    float x[MOEI_ROUTER_DEPTH][MOEI_ROUTER_TILE + 1];
    float w[MOEI_ROUTER_DEPTH][MOEI_ROUTER_TILE + 1];
} moei_router_shared;

/* Any shape and dtypes. A block makes 64 tokens x 64 experts; a thread every 16th of each. */
MOE_KERNEL(256, 2) moei_router_any(MOE_ARG(moe_router_desc) d)
{
    MOE_SHARED(moei_router_shared, s);
    const int tiles = (d.num_experts + MOEI_ROUTER_TILE - 1) / MOEI_ROUTER_TILE;
    const int64_t t0 = (int64_t)(blockIdx.x / tiles) * MOEI_ROUTER_TILE;
    const int e0 = (int)(blockIdx.x % tiles) * MOEI_ROUTER_TILE;
    const int tx = (int)threadIdx.x % 16, ty = (int)threadIdx.x / 16;
    float acc[4][4];

    moei_let_next_start();
    moei_wait_for_previous();
    if (moei_fault_stopped(d.fault)) return;
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i)
        MOEI_UNROLL
        for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    for (int h0 = 0; h0 < d.hidden; h0 += MOEI_ROUTER_DEPTH) {
        __syncthreads();
        for (int i = (int)threadIdx.x; i < MOEI_ROUTER_TILE * MOEI_ROUTER_DEPTH; i += 256) {
            const int r = i / MOEI_ROUTER_DEPTH, c = i % MOEI_ROUTER_DEPTH, h = h0 + c;
            const bool in = h < d.hidden;
            s.x[c][r] = in && t0 + r < d.num_tokens
                            ? moei_load_f32(d.x, (t0 + r) * d.x_stride + h, d.x_dtype)
                            : 0.0f;
            s.w[c][r] =
                in && e0 + r < d.num_experts
                    ? moei_load_f32(d.router, (e0 + r) * d.router_stride + h, d.router_dtype)
                    : 0.0f;
        }
        __syncthreads();
        MOEI_UNROLL
        for (int c = 0; c < MOEI_ROUTER_DEPTH; ++c) {
            float x[4], w[4];
            MOEI_UNROLL
            for (int i = 0; i < 4; ++i) {
                x[i] = s.x[c][ty + 16 * i];
                w[i] = s.w[c][tx + 16 * i];
            }
            MOEI_UNROLL
            for (int i = 0; i < 4; ++i)
                MOEI_UNROLL
                for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(x[i], w[j], acc[i][j]);
        }
    }
    MOEI_UNROLL
    for (int i = 0; i < 4; ++i)
        MOEI_UNROLL
        for (int j = 0; j < 4; ++j) {
        const int64_t t = t0 + ty + 16 * i;
        const int e = e0 + tx + 16 * j;
        if (t < d.num_tokens && e < d.num_experts) d.logits[t * d.logits_stride + e] = acc[i][j];
    }
}

MOE_HOST int64_t moei_router_blocks(const moe_router_desc* d)
{
    return (((int64_t)d->num_tokens + MOEI_ROUTER_TILE - 1) / MOEI_ROUTER_TILE) *
           ((d->num_experts + MOEI_ROUTER_TILE - 1) / MOEI_ROUTER_TILE);
}

/* Fills in the defaults, refuses what is wrong, and says in *gemm whether the tensor-core path
   takes it; then *g is its descriptor. */
MOE_HOST moe_status moei_router_check(moe_router_desc* d, moe_grouped_gemm_desc* g, int* gemm)
{
    MOEI_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOEI_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOEI_REQUIRE(d->num_experts >= 1 && d->num_experts <= (1 << 20), MOE_ERR_RANGE, num_experts);
    if (d->x_dtype == 0) d->x_dtype = MOE_BF16;
    MOEI_REQUIRE(moe_dtype_bytes(d->x_dtype), MOE_ERR_DTYPE, x_dtype);
    if (d->router_dtype == 0) d->router_dtype = d->x_dtype;
    MOEI_REQUIRE(moe_dtype_bytes(d->router_dtype), MOE_ERR_DTYPE, router_dtype);
    if (d->x_stride == 0) d->x_stride = d->hidden;
    MOEI_REQUIRE(moei_stride_fits(d->x_stride, d->hidden, d->num_tokens), MOE_ERR_STRIDE, x_stride);
    if (d->router_stride == 0) d->router_stride = d->hidden;
    MOEI_REQUIRE(moei_stride_fits(d->router_stride, d->hidden, d->num_experts), MOE_ERR_STRIDE,
                 router_stride);
    if (d->logits_stride == 0) d->logits_stride = d->num_experts;
    MOEI_REQUIRE(moei_stride_fits(d->logits_stride, d->num_experts, d->num_tokens), MOE_ERR_STRIDE,
                 logits_stride);
    MOEI_REQUIRE(moei_aligned(d->fault, 8), MOE_ERR_ALIGN, fault);
    *gemm = 0;
    if (d->num_tokens == 0) return MOE_OK;
    MOEI_REQUIRE(d->x, MOE_ERR_NULL, x);
    MOEI_REQUIRE(d->router, MOE_ERR_NULL, router);
    MOEI_REQUIRE(d->logits, MOE_ERR_NULL, logits);
    MOEI_REQUIRE(moei_aligned(d->x, (uintptr_t)moe_dtype_bytes(d->x_dtype)), MOE_ERR_ALIGN, x);
    MOEI_REQUIRE(moei_aligned(d->router, (uintptr_t)moe_dtype_bytes(d->router_dtype)),
                 MOE_ERR_ALIGN, router);
    MOEI_REQUIRE(moei_aligned(d->logits, 4), MOE_ERR_ALIGN, logits);
    {
        const moei_range r[] = {
            {d->x, moei_extent(d->num_tokens, d->x_stride, d->hidden, d->x_dtype), MOE_FIELD_x},
            {d->router, moei_extent(d->num_experts, d->router_stride, d->hidden, d->router_dtype),
             MOE_FIELD_router},
            {d->logits, moei_extent(d->num_tokens, d->logits_stride, d->num_experts, MOE_FP32),
             MOE_FIELD_logits},
            {d->fault, 8, MOE_FIELD_fault}};
        MOEI_TRY(moei_disjoint(r, 2, 4));
    }
    memset(g, 0, sizeof *g);
    g->a = d->x;
    g->a_stride = d->x_stride;
    g->b.base = d->router;
    g->b.row_stride = d->router_stride;
    g->c = d->logits;
    g->c_stride = d->logits_stride;
    g->c_dtype = MOE_FP32;
    g->fault = d->fault;
    g->num_experts = 1;
    g->num_rows = d->num_tokens;
    g->n = d->num_experts;
    g->k = d->hidden;
    g->dtype = d->x_dtype;
    if (d->x_dtype == d->router_dtype && d->x_dtype != MOE_FP32 && moei_gemm_check(g) == MOE_OK) {
        moe_gemm_plan p;
        const moe_status s = moei_gemm_plan(g, &p);
        if (moe_status_kind(s) == MOE_ERR_CUDA) return s;
        *gemm = s == MOE_OK;
    }
    MOEI_REQUIRE(*gemm || moei_router_blocks(d) <= 0x7fffffff, MOE_ERR_RANGE, num_tokens);
    return MOE_OK;
}

/* Queues the product on `stream`. Errors: every field as documented above, each with its own
   status; nothing is queued then. T = 0 is no error. */
MOE_HOST moe_status moe_router_logits(const moe_router_desc* desc, cudaStream_t stream)
{
    moe_router_desc d;
    moe_grouped_gemm_desc g;
    moei_launch_config c;
    int gemm;
    MOEI_REQUIRE(desc, MOE_ERR_NULL, desc);
    d = *desc;
    MOEI_TRY(moei_router_check(&d, &g, &gemm));
    if (d.num_tokens == 0) return MOE_OK;
    if (gemm) return moe_grouped_gemm(&g, stream);
    c = moei_grid(moei_router_blocks(&d), 256, 0, stream);
    c.dependent = 1;
    return MOE_LAUNCH(moei_router_any, c, d);
}

/* Loads this header's own kernel now; moe_grouped_gemm_preload loads the tensor-core ones. */
MOE_HOST moe_status moe_router_preload(void) { return moei_preload((const void*)moei_router_any); }

#endif
