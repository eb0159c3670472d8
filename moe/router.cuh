/* router.cuh: the router's product: tokens to logits.

     logits[t, e] = sum over h of x[t, h] * router[e, h]

   In:   x [T, H], router [E, H] (a checkpoint's layout), fp32, fp16 or bf16 each
   Out:  logits [T, E] fp32

   Accumulates and stores in fp32: logits rounded to bf16 would choose other experts. Four paths,
   chosen by dtypes, shapes and device (moe_router_plan tells the choice). Each sums in a fixed
   order: equal inputs give equal bits; with batch_invariant a token's logits have the same bits in
   any batch.
     gemm        x and router of one 16-bit dtype, H and E multiples of 8, 16-byte aligned rows:
                 tensor cores (gemm/grouped.cuh)
     ragged      as gemm, but any E, and logits of any stride and alignment: tensor cores, the last
                 tile of experts padded in shared memory (router/ragged.cuh)
     bf16 split  16-bit x and an fp32 router, H a multiple of 8, any E, 16-byte aligned rows, sm_80
                 and later: tensor cores, each weight as three bf16 terms, with exact products
                 (router/bf16_split.cuh, also on infinities). The error is that of an fp32 sum
     scalar      anything else: fp32 multiply-adds, slower, h ascending
   Cost: 2 * T * H * E flops; bf16 split three times that, with fp16 x six times. One launch.
   Minimum architecture: sm_75 (tensor cores in bf16: sm_80).

     moe_router_desc r = {0};
     r.x = x;  r.router = router;  r.logits = logits;
     r.num_tokens = T;  r.hidden = H;  r.num_experts = E;
     moe_status s = moe_router_logits(&r, stream); */
#ifndef MOE_ROUTER_CUH
#define MOE_ROUTER_CUH

#include "base/check.h"
#include "fields.h"
#include "gemm/grouped.cuh"
#include "preload.cuh"
#include "router/args.h"
#include "router/large.cuh"
#include "router/ragged.cuh"
#include "router/small.cuh"

typedef struct moe_router_desc {
    /* in */
    const void* x;         /* [T, H] x_dtype; aligned to an element */
    const void* router;    /* [E, H] router_dtype; aligned to an element */
    int64_t x_stride;      /* elements between rows; 0 = H */
    int64_t router_stride; /* elements between rows; 0 = H */
    int32_t x_dtype;       /* fp32, fp16 or bf16; 0 = bf16 */
    int32_t router_dtype;  /* fp32, fp16 or bf16; 0 = x_dtype */
    /* out */
    float* logits;         /* [T, E] */
    int64_t logits_stride; /* elements between rows; 0 = E */
    uint64_t* fault;       /* [1] fault word; or null */
    /* sizes */
    int32_t num_tokens;  /* T >= 0 */
    int32_t hidden;      /* H, 1 .. 2^28 */
    int32_t num_experts; /* E, 1 .. 2^20 */
    int32_t batch_invariant; /* 1: the path is chosen as for many tokens; 0: by T too */
    int32_t rank;        /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
} moe_router_desc;

/* The code that multiplies. */
typedef enum moe_router_path {
    MOE_ROUTER_SCALAR = 0,
    MOE_ROUTER_GEMM,
    MOE_ROUTER_BF16_SPLIT_LARGE, /* tiles of 256 tokens (fp16: 128) x 128 experts */
    MOE_ROUTER_BF16_SPLIT_SMALL, /* tiles of 32 tokens (fp16: 16) x 16 experts, for few tokens */
    MOE_ROUTER_RAGGED_WIDE,      /* 16-bit dtypes, any E: tiles of 128 tokens x 128 experts */
    MOE_ROUTER_RAGGED_NARROW     /* tiles of 64 x 64, for few tokens or experts */
} moe_router_path;

/* Returns the name of a moe_router_path: static storage, never null. */
MOE_HOST const char* moe_router_path_name(int path)
{
    static const char* const name[] = {"scalar",
                                       "gemm",
                                       "bf16 split, large tile",
                                       "bf16 split, small tile",
                                       "ragged, wide tile",
                                       "ragged, narrow tile"};
    return path >= 0 && path <= MOE_ROUTER_RAGGED_NARROW ? name[path] : "?";
}

#define MOEI_ROUTER_TILE 64   /* tokens and experts of a tile */
#define MOEI_ROUTER_TILE_K 16 /* depths of a step */

/* Shared memory of the scalar path. The padding avoids bank conflicts. */
typedef struct moei_router_shared {
    float x[MOEI_ROUTER_TILE_K][MOEI_ROUTER_TILE + 1]; /* [depth][token], 0 past the edges */
    float w[MOEI_ROUTER_TILE_K][MOEI_ROUTER_TILE + 1]; /* [depth][expert], 0 past the edges */
} moei_router_shared;

/* The scalar path, for any shape and dtypes. A block computes a tile of 64 tokens x 64 experts; a
   thread owns 4 x 4 logits, 16 tokens and 16 experts apart. For each 16 depths of H:

   1. Load x and the weights to shared memory as fp32, zeros past the edges. First a barrier: all
      threads have read the previous 16 depths. Then a barrier: the new ones are visible to all.
   2. Multiply and add, h ascending.

   3. At the end store the thread's logits. */
MOE_KERNEL(256, 2) moei_router_any(MOE_ARG(moei_router_args) d)
{
    MOE_SHARED(moei_router_shared, s);
    const int tiles = (d.num_experts + MOEI_ROUTER_TILE - 1) / MOEI_ROUTER_TILE;
    const int64_t t0 = (int64_t)(blockIdx.x / tiles) * MOEI_ROUTER_TILE;
    const int e0 = (int)(blockIdx.x % tiles) * MOEI_ROUTER_TILE;
    const int tx = (int)threadIdx.x % 16, ty = (int)threadIdx.x / 16;
    float acc[4][4];

    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) MOE_UNROLL
    for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    for (int h0 = 0; h0 < d.hidden; h0 += MOEI_ROUTER_TILE_K) {
        __syncthreads(); /* 1. load */
        for (int i = (int)threadIdx.x; i < MOEI_ROUTER_TILE * MOEI_ROUTER_TILE_K; i += 256) {
            const int r = i / MOEI_ROUTER_TILE_K, c = i % MOEI_ROUTER_TILE_K, h = h0 + c;
            const bool in = h < d.hidden;
            s.x[c][r] = in && t0 + r < d.num_tokens
                            ? moe_load_f32(d.x, (t0 + r) * d.x_stride + h, d.x_dtype)
                            : 0.0f;
            s.w[c][r] = in && e0 + r < d.num_experts
                            ? moe_load_f32(d.w, (e0 + r) * d.w_stride + h, d.w_dtype)
                            : 0.0f;
        }
        __syncthreads();
        MOE_UNROLL /* 2. multiply */
        for (int c = 0; c < MOEI_ROUTER_TILE_K; ++c) {
            float x[4], w[4];
            MOE_UNROLL
            for (int i = 0; i < 4; ++i) {
                x[i] = s.x[c][ty + 16 * i];
                w[i] = s.w[c][tx + 16 * i];
            }
            MOE_UNROLL
            for (int i = 0; i < 4; ++i) MOE_UNROLL
            for (int j = 0; j < 4; ++j) acc[i][j] = fmaf(x[i], w[j], acc[i][j]);
        }
    }
    MOE_UNROLL /* 3. store */
    for (int i = 0; i < 4; ++i) MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        const int64_t t = t0 + ty + 16 * i;
        const int e = e0 + tx + 16 * j;
        if (t < d.num_tokens && e < d.num_experts) d.logits[t * d.logits_stride + e] = acc[i][j];
    }
}

/* Returns the grid size of the scalar path. */
MOE_HOST int64_t moei_router_blocks(const moe_router_desc* d)
{
    return (((int64_t)d->num_tokens + MOEI_ROUTER_TILE - 1) / MOEI_ROUTER_TILE) *
           ((d->num_experts + MOEI_ROUTER_TILE - 1) / MOEI_ROUTER_TILE);
}

/* ---- the bf16 split of an fp32 router: router/bf16_split.cuh ---- */

/* tile, its shape; suffix and dtype of x */
#define MOEI_BF16_SPLIT_LIST(X)                                                                    \
    X(large, MOEI_BF16_SPLIT_LARGE, f16, MOE_FP16)                                                 \
    X(large, MOEI_BF16_SPLIT_LARGE, bf16, MOE_BF16)                                                \
    X(small, MOEI_BF16_SPLIT_SMALL, f16, MOE_FP16)                                                 \
    X(small, MOEI_BF16_SPLIT_SMALL, bf16, MOE_BF16)
#define MOEI_BF16_SPLIT_LEAST 80    /* code of sm_80 and later has a body */
#define MOEI_BF16_SPLIT_THREADS 256 /* threads of a block, with either tile */

/* The shape of a tile of the bf16 split: the operands are bf16, also where x is fp16. */
#define MOEI_BF16_SPLIT_SHAPE(...)                                                                 \
    moei_shape_terms(moe_gemm_shape_of(__VA_ARGS__, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K),           \
                     MOE_ROUTER_BF16_TERMS)

#define MOEI_BF16_SPLIT_KERNEL(name, shape, half, dtype)                                           \
    MOE_KERNEL(MOEI_BF16_SPLIT_THREADS, 1)                                                         \
    moei_router_bf16_split_##name##_##half(MOE_ARG(moei_router_args) d)                            \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (MOEI_CODE_HERE(MOEI_BF16_SPLIT_LEAST, MOEI_CODE_ANY) && !moe_fault_stopped(d.fault))   \
            moei_bf16_split_##name(&d, shared, dtype, MOEI_BF16_SPLIT_SHAPE(shape));               \
    }
MOEI_BF16_SPLIT_LIST(MOEI_BF16_SPLIT_KERNEL)
#undef MOEI_BF16_SPLIT_KERNEL

/* moei_variant.tile of the bf16 split variants. */
enum {
    MOEI_BF16_SPLIT_TILE_large_f16,
    MOEI_BF16_SPLIT_TILE_large_bf16,
    MOEI_BF16_SPLIT_TILE_small_f16,
    MOEI_BF16_SPLIT_TILE_small_bf16
};

static const moei_variant moei_bf16_split_variants[] = {
#define MOEI_BF16_SPLIT_ROW(name, shape, half, dtype)                                              \
    {(const void*)moei_router_bf16_split_##name##_##half,                                          \
     "moei_router_bf16_split_" #name "_" #half,                                                    \
     MOE_GEMM_PATH_WMMA,                                                                           \
     MOEI_VARIANT_ANY_ROWS,                                                                        \
     1,                                                                                            \
     MOEI_SHAPE_INIT_TERMS(MOE_ROUTER_BF16_TERMS, shape, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K),      \
     MOEI_BF16_SPLIT_TILE_##name##_##half,                                                         \
     1,                                                                                            \
     MOEI_BF16_SPLIT_SMEM_##name(dtype),                                                           \
     MOEI_BF16_SPLIT_LEAST,                                                                        \
     MOEI_CODE_ANY},
    MOEI_BF16_SPLIT_LIST(MOEI_BF16_SPLIT_ROW)
#undef MOEI_BF16_SPLIT_ROW
        MOEI_VARIANT_END};

/* Returns the variant of the small or the large tile. */
MOE_HOST const moei_variant* moei_bf16_split_variant(int small, int x_dtype)
{
    const int f16 = small ? MOEI_BF16_SPLIT_TILE_small_f16 : MOEI_BF16_SPLIT_TILE_large_f16;
    return moei_variant_find(moei_bf16_split_variants, x_dtype == MOE_FP16 ? f16 : f16 + 1,
                             MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K);
}

/* Returns the grid size of the small or the large tile. */
MOE_HOST int64_t moei_bf16_split_blocks(const moei_router_args* d, int small)
{
    const moe_gemm_shape f = moei_bf16_split_variant(small, d->x_dtype)->shape;
    const int64_t tokens = moei_bf16_split_tokens(f.tile_m, d->x_dtype);
    return ((d->num_tokens + tokens - 1) / tokens) * ((d->num_experts + f.tile_n - 1) / f.tile_n);
}

/* The number of small tiles that take a multiprocessor about as long as one large tile. */
#define MOEI_BF16_SPLIT_WORTH 20

/* Sets *path to a bf16 split path where the operands fit and the current device and this binary can
   run it; otherwise leaves *path unchanged. many: 1: as for so many tokens that the choice no longer
   depends on them. */
MOE_HOST moe_status moei_bf16_split_plan(const moei_router_args* d, int many, int* path)
{
    moei_router_args of = *d; /* of which the tile is chosen */
    moe_device dev;
    int64_t waves, small_waves;
    int small, runs;
    if (many) of.num_tokens = 1 << 24;
    if (d->hidden % 8 != 0 || d->x_stride % 8 != 0 || d->w_stride % 4 != 0 ||
        !moei_aligned(d->x, 16) || !moei_aligned(d->w, 16))
        return MOE_OK;
    MOE_TRY(moe_device_query(&dev));
    MOE_TRY(moei_variant_runs(moei_bf16_split_variant(1, d->x_dtype), &dev, 0, &runs));
    if (!runs) return MOE_OK;
    MOE_TRY(moei_variant_runs(moei_bf16_split_variant(0, d->x_dtype), &dev, 0, &runs));
    waves = (moei_bf16_split_blocks(&of, 0) + dev.sms - 1) / dev.sms;
    small_waves = (moei_bf16_split_blocks(&of, 1) + dev.sms - 1) / dev.sms;
    small = small_waves <= waves * MOEI_BF16_SPLIT_WORTH || !runs;
    if (moei_bf16_split_blocks(d, small) <= 0x7fffffff)
        *path = small ? MOE_ROUTER_BF16_SPLIT_SMALL : MOE_ROUTER_BF16_SPLIT_LARGE;
    return MOE_OK;
}

/* Prepares the launch of the small or the large tile. */
MOE_HOST moe_status moei_bf16_split_prepare(moe_launch* l, const moei_router_args* d, int small)
{
    MOE_TRY(moei_variant_prepare(l, moei_bf16_split_variant(small, d->x_dtype),
                                 moei_bf16_split_blocks(d, small), 0));
    l->block[0] = MOEI_BF16_SPLIT_THREADS; /* the small tile's shape has one warp's threads */
    return MOE_OK;
}

/* Returns the args of the router's own kernels for a checked descriptor. */
MOE_HOST moei_router_args moei_router_args_of(const moe_router_desc* d)
{
    moei_router_args a;
    memset(&a, 0, sizeof a);
    a.x = d->x;
    a.w = d->router;
    a.logits = d->logits;
    a.fault = d->fault;
    a.x_stride = d->x_stride;
    a.w_stride = d->router_stride;
    a.logits_stride = d->logits_stride;
    a.x_dtype = d->x_dtype;
    a.w_dtype = d->router_dtype;
    a.num_tokens = d->num_tokens;
    a.hidden = d->hidden;
    a.num_experts = d->num_experts;
    return a;
}

/* ---- the station ---- */

/* Describes the product as a grouped GEMM of one expert. Requires that d has its defaults. */
MOE_HOST void moei_router_gemm_desc(const moe_router_desc* d, moe_grouped_gemm_desc* g)
{
    memset(g, 0, sizeof *g);
    g->a = d->x;
    g->a_stride = d->x_stride;
    g->b.base = d->router;
    g->b.row_stride = d->router_stride;
    g->c = d->logits;
    g->c_stride = d->logits_stride;
    g->c_dtype = MOE_FP32;
    g->fault = d->fault;
    g->rank = d->rank;
    g->batch_invariant = d->batch_invariant;
    g->num_experts = 1;
    g->num_rows = d->num_tokens;
    g->n = d->num_experts;
    g->k = d->hidden;
    g->dtype = d->x_dtype;
}

/* Refuses sizes, dtypes and strides that the header does not offer, and fills in the defaults. */
MOE_HOST moe_status moei_router_check_options(moe_router_desc* d)
{
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= (1 << 20), MOE_ERR_RANGE, num_experts);
    MOE_REQUIRE((d->batch_invariant | 1) == 1, MOE_ERR_OPTION, batch_invariant);
    MOEI_REQUIRE_RANK(d);
    if (d->x_dtype == 0) d->x_dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(d->x_dtype), MOE_ERR_DTYPE, x_dtype);
    if (d->router_dtype == 0) d->router_dtype = d->x_dtype;
    MOE_REQUIRE(moe_dtype_bytes(d->router_dtype), MOE_ERR_DTYPE, router_dtype);
    if (d->x_stride == 0) d->x_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->x_stride, d->hidden, d->num_tokens), MOE_ERR_STRIDE, x_stride);
    if (d->router_stride == 0) d->router_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->router_stride, d->hidden, d->num_experts), MOE_ERR_STRIDE,
                router_stride);
    if (d->logits_stride == 0) d->logits_stride = d->num_experts;
    MOE_REQUIRE(moei_stride_fits(d->logits_stride, d->num_experts, d->num_tokens), MOE_ERR_STRIDE,
                logits_stride);
    return MOE_OK;
}

/* Refuses buffers that are absent, misaligned or overlap. Requires checked options. */
MOE_HOST moe_status moei_router_check_buffers(const moe_router_desc* d)
{
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden, num_experts = d->num_experts;
    const uint32_t x_align = (uint32_t)moe_dtype_bytes(d->x_dtype);
    const uint32_t router_align = (uint32_t)moe_dtype_bytes(d->router_dtype);
    const moe_buffer b[] = {
        {d->x, moe_extent(num_tokens, d->x_stride, hidden, d->x_dtype), x_align,
         MOE_BUFFER_REQUIRED, MOE_FIELD_x},
        {d->router, moe_extent(num_experts, d->router_stride, hidden, d->router_dtype),
         router_align, MOE_BUFFER_REQUIRED, MOE_FIELD_router},
        {d->logits, moe_extent(num_tokens, d->logits_stride, num_experts, MOE_FP32), 4,
         MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_logits},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    if (num_tokens == 0) return moe_check_buffers(b + count - 1, 1); /* the fault word alone */
    return moe_check_buffers(b, count);
}

/* Checks options and buffers, and fills in the defaults. */
MOE_HOST moe_status moei_router_check(moe_router_desc* d)
{
    MOE_TRY(moei_router_check_options(d));
    return moei_router_check_buffers(d);
}

/* A prepared product: all but its stream is resolved, for the device that was current. */
typedef struct moe_router_prepared {
    int32_t path;                   /* moe_router_path */
    moei_router_args args;          /* of the scalar and bf16 split kernels */
    moe_grouped_gemm_prepared gemm; /* .launch: of every path's kernel, kernel null: run queues
                                       nothing; .args: on the gemm and ragged paths */
} moe_router_prepared;

/* Prepares a product of two operands of one 16-bit dtype. p->path stays scalar where tensor cores
   cannot compute the product. */
MOE_HOST moe_status moei_router_prepare_gemm(const moe_router_desc* d, moe_router_prepared* p)
{
    moe_grouped_gemm_desc g;
    const moei_variant* v;
    moe_status s;
    moei_router_gemm_desc(d, &g);
    s = moei_gemm_check(&g, 0);
    if (s == MOE_OK) s = moei_gemm_prepare(moei_gemm_variants, &g, &p->gemm);
    if (moe_status_kind(s) == MOE_ERR_CUDA) return s;
    if (s == MOE_OK) {
        p->path = MOE_ROUTER_GEMM;
        return MOE_OK;
    }
    moei_router_gemm_desc(d, &g);
    MOE_TRY(moei_ragged_choose(&g, &v));
    if (!v) return MOE_OK;
    p->path =
        v->tile == MOEI_RAGGED_TILE_narrow ? MOE_ROUTER_RAGGED_NARROW : MOE_ROUTER_RAGGED_WIDE;
    p->gemm.args.d = moei_gemm_args_of(&g);
    return moei_ragged_prepare(&p->gemm.launch, &g, v);
}

/* Prepares *p, which is empty, for an unchecked descriptor. An empty *p has the scalar path. */
MOE_HOST moe_status moei_router_prepare(const moe_router_desc* desc, moe_router_prepared* p)
{
    moe_router_desc d = *desc;
    MOE_TRY(moei_router_check(&d));
    p->args = moei_router_args_of(&d);
    if (d.num_tokens == 0) return MOE_OK;
    if (d.x_dtype == d.router_dtype && d.x_dtype != MOE_FP32) {
        MOE_TRY(moei_router_prepare_gemm(&d, p));
    } else if (d.x_dtype != MOE_FP32 && d.router_dtype == MOE_FP32) {
        MOE_TRY(moei_bf16_split_plan(&p->args, d.batch_invariant, &p->path));
        if (p->path != MOE_ROUTER_SCALAR)
            return moei_bf16_split_prepare(&p->gemm.launch, &p->args,
                                           p->path == MOE_ROUTER_BF16_SPLIT_SMALL);
    }
    if (p->path != MOE_ROUTER_SCALAR) return MOE_OK;
    MOE_REQUIRE(moei_router_blocks(&d) <= 0x7fffffff, MOE_ERR_RANGE, num_tokens);
    {
        moe_launch_config c = moe_grid(moei_router_blocks(&d), 256, 0, 0);
        c.dependent = 1;
        return MOE_PREPARE(&p->gemm.launch, moei_router_any, c);
    }
}

/* Prepares a product; moe_router_run queues it any number of times. Errors: each field that is not
   as documented above, with its own status. T = 0 is no error. On an error *p is empty. */
MOE_HOST moe_status moe_router_prepare(const moe_router_desc* desc, moe_router_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_router_prepare(desc, p));
}

/* Queues a prepared product on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_router_run(const moe_router_prepared* p, cudaStream_t stream)
{
    const moe_launch* l;
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    l = &p->gemm.launch;
    switch (p->path) {
    case MOE_ROUTER_SCALAR:
    case MOE_ROUTER_BF16_SPLIT_LARGE:
    case MOE_ROUTER_BF16_SPLIT_SMALL: return MOE_RUN(l, p->args, stream);
    default: return moe_grouped_gemm_run(&p->gemm, stream);
    }
}

/* Sets *path to the moe_router_path of moe_router_logits for this descriptor on the current device.
   Errors as of moe_router_prepare. */
MOE_HOST moe_status moe_router_plan(const moe_router_desc* desc, int* path)
{
    moe_router_prepared p;
    MOE_REQUIRE(desc && path, MOE_ERR_NULL, desc);
    MOE_TRY(moe_router_prepare(desc, &p));
    *path = p.path;
    return MOE_OK;
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_router_logits(const moe_router_desc* desc, cudaStream_t stream)
{
    moe_router_prepared p;
    MOE_TRY(moe_router_prepare(desc, &p));
    return moe_router_run(&p, stream);
}

/* Loads this header's own kernels, before their first launch. moe_grouped_gemm_preload loads those
   of the gemm path. */
MOE_HOST moe_status moe_router_preload(void)
{
    MOE_TRY(moei_variant_preload(moei_bf16_split_variants));
    MOE_TRY(moei_variant_preload(moei_ragged_variants));
    return moe_preload_kernel((const void*)moei_router_any);
}

MOEI_PRELOAD_INCLUDED(router)

#endif
