/* router_backward.cuh: gradients of the router's product.

     dx[t, h]      = sum over e of dlogits[t, e] * router[e, h]
     drouter[e, h] = sum over t of dlogits[t, e] * x[t, h]

   In:   dlogits [T, E] fp32 (gate_backward.cuh), x [T, H], router [E, H]: fp32, fp16 or bf16 each
   Out:  dx [T, H] of x's dtype; drouter [E, H] in fp32 or the router's dtype; each overwritten or
         added to, each may be null
   A token whose dlogits are all 0 adds nothing to drouter, whatever its x: a padding token of NaN
   changes nothing.

   Sums in fp32 in a fixed order: equal inputs give equal bits. Two paths:
     split    x bf16, router bf16 or fp32, H a multiple of 8, 16-byte aligned rows, sm_80 and later:
              tensor cores. dlogits, and an fp32 router, are split into two bf16 terms with exact
              products: beside the error of an fp32 sum, 2^-16 of each product, 2^-15 with an fp32
              router in dx
     scalar   anything else: fp32 multiply-adds, slower
   Cost: 4 T H E flops; split twice that, dx with an fp32 router four times. At most four
   launches. Minimum architecture: sm_75 (split: sm_80).

     moe_router_backward_desc r = {0};
     r.x = x;  r.router = router;  r.dlogits = dlogits;  r.dx = dx;  r.drouter = drouter;
     r.num_tokens = T;  r.hidden = H;  r.num_experts = E;  r.grad_dtype = MOE_FP32;
     moe_router_backward_workspace(&r, &r.workspace_bytes);  r.workspace = ...;
     moe_status s = moe_router_backward(&r, stream); */
#ifndef MOE_ROUTER_BACKWARD_CUH
#define MOE_ROUTER_BACKWARD_CUH

#include "base/check.h"
#include "fields.h"
#include "gemm/grouped.cuh"
#include "gemm/k_grouped.cuh"
#include "preload.cuh"
#include "router_backward/scalar.cuh"
#include "router_backward/split.cuh"

typedef struct moe_router_backward_desc {
    /* in */
    const void* x;          /* [T, H] x_dtype; read for drouter */
    const void* router;     /* [E, H] router_dtype; read for dx */
    const float* dlogits;   /* [T, E] gradient by the logits */
    int64_t x_stride;       /* elements between rows; 0 = H */
    int64_t router_stride;  /* elements between rows; 0 = H */
    int64_t dlogits_stride; /* elements between rows; 0 = E */
    int32_t x_dtype;        /* fp32, fp16 or bf16, of x and dx; 0 = bf16 */
    int32_t router_dtype;   /* fp32, fp16 or bf16; 0 = x_dtype */
    /* out */
    void* dx;           /* [T, H] x_dtype; or null */
    int64_t dx_stride;  /* elements between rows; 0 = H */
    void* drouter;      /* [E, H] grad_dtype; or null */
    int32_t grad_dtype; /* fp32 or router_dtype; 0 = router_dtype */
    uint64_t* fault;    /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;    /* T >= 0 */
    int32_t hidden;        /* H, 1 .. 2^28 */
    int32_t num_experts;   /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t dx_accumulate; /* 1: adds to dx; 0: overwrites */
    int32_t accumulate;    /* 1: adds to drouter; 0: overwrites */
    int32_t rank;          /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    /* workspace */
    void* workspace;        /* 256-byte aligned; null: the scalar path runs, slower */
    size_t workspace_bytes; /* at least what moe_router_backward_workspace returns */
} moe_router_backward_desc;

/* Buffers of the workspace of the split path. */
typedef struct moei_router_backward_view {
    uint16_t *a, *b; /* as in moei_router_backward_args */
    int32_t *index, *part;
    float* sums;
    void* tickets; /* of both products, 16 bytes each */
    int32_t padded, pairs, parts;
} moei_router_backward_view;

/* Refuses sizes, dtypes and strides that the header does not offer, and fills in the defaults. */
MOE_HOST moe_status moei_router_backward_check_options(moe_router_backward_desc* d)
{
    MOE_REQUIRE(d->num_tokens >= 0, MOE_ERR_RANGE, num_tokens);
    MOE_REQUIRE(d->hidden >= 1 && d->hidden <= 1 << 28, MOE_ERR_RANGE, hidden);
    MOE_REQUIRE(d->num_experts >= 1 && d->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE((d->dx_accumulate | 1) == 1, MOE_ERR_OPTION, dx_accumulate);
    MOE_REQUIRE((d->accumulate | 1) == 1, MOE_ERR_OPTION, accumulate);
    MOEI_REQUIRE_RANK(d);
    if (d->x_dtype == 0) d->x_dtype = MOE_BF16;
    MOE_REQUIRE(moe_dtype_bytes(d->x_dtype), MOE_ERR_DTYPE, x_dtype);
    if (d->router_dtype == 0) d->router_dtype = d->x_dtype;
    MOE_REQUIRE(moe_dtype_bytes(d->router_dtype), MOE_ERR_DTYPE, router_dtype);
    if (d->grad_dtype == 0) d->grad_dtype = d->router_dtype;
    MOE_REQUIRE(d->grad_dtype == d->router_dtype || d->grad_dtype == MOE_FP32, MOE_ERR_DTYPE,
                grad_dtype);
    if (d->x_stride == 0) d->x_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->x_stride, d->hidden, d->num_tokens), MOE_ERR_STRIDE, x_stride);
    if (d->router_stride == 0) d->router_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->router_stride, d->hidden, d->num_experts), MOE_ERR_STRIDE,
                router_stride);
    if (d->dlogits_stride == 0) d->dlogits_stride = d->num_experts;
    MOE_REQUIRE(moei_stride_fits(d->dlogits_stride, d->num_experts, d->num_tokens), MOE_ERR_STRIDE,
                dlogits_stride);
    if (d->dx_stride == 0) d->dx_stride = d->hidden;
    MOE_REQUIRE(moei_stride_fits(d->dx_stride, d->hidden, d->num_tokens), MOE_ERR_STRIDE,
                dx_stride);
    return MOE_OK;
}

/* Returns 1 where dtypes and H fit the split path. Requires checked options. */
MOE_HOST int moei_router_backward_splits(const moe_router_backward_desc* d)
{
    return d->x_dtype == MOE_BF16 && d->router_dtype != MOE_FP16 && d->hidden % 8 == 0;
}

/* Fills in the view of the workspace at `base`, and *bytes; a null base only counts. Requires
   checked options. The tokens are cut into parts, so that drouter has enough tiles: about 256. */
MOE_HOST void moei_router_backward_carve(const moe_router_backward_desc* d, void* base,
                                         moei_router_backward_view* v, size_t* bytes)
{
    char* const p = (char*)base;
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden;
    int64_t tiles, parts, most;
    *bytes = 0;
    memset(v, 0, sizeof *v);
    if (!moei_router_backward_splits(d) || num_tokens == 0) return;
    v->padded = (d->num_experts + 7) / 8 * 8;
    v->pairs = d->router_dtype == MOE_FP32 ? 4 : 2;
    tiles = (MOEI_ROUTER_BACKWARD_TERMS * (int64_t)v->padded + 127) / 128 * ((hidden + 255) / 256);
    parts = 256 / tiles;
    most = num_tokens / 512;
    if (parts > most) parts = most;
    if (parts > MOEI_ROUTER_BACKWARD_MOST) parts = MOEI_ROUTER_BACKWARD_MOST;
    v->parts = parts > 1 ? (int32_t)parts : 1;
    v->tickets = moei_carve(p, bytes, 2 * MOE_GROUPED_GEMM_WORKSPACE);
    v->part = (int32_t*)moei_carve(p, bytes, (MOEI_ROUTER_BACKWARD_MOST + 1) * 4);
    v->index = (int32_t*)moei_carve(p, bytes, (uint64_t)num_tokens * 4);
    v->a = (uint16_t*)moei_carve(p, bytes, (uint64_t)(num_tokens * v->pairs * v->padded) * 2);
    if (d->dx)
        v->b = (uint16_t*)moei_carve(p, bytes, (uint64_t)(v->pairs * v->padded * hidden) * 2);
    if (d->drouter)
        v->sums = (float*)moei_carve(
            p, bytes, (uint64_t)(v->parts * MOEI_ROUTER_BACKWARD_TERMS * v->padded * hidden) * 4);
}

/* Writes the bytes of workspace to *bytes. Reads sizes, dtypes, and which outputs are given. Errors:
   those of sizes and options. */
MOE_HOST moe_status moe_router_backward_workspace(const moe_router_backward_desc* desc,
                                                  size_t* bytes)
{
    moe_router_backward_desc d;
    moei_router_backward_view v;
    MOE_REQUIRE(desc && bytes, MOE_ERR_NULL, desc);
    d = *desc;
    *bytes = 0;
    MOE_TRY(moei_router_backward_check_options(&d));
    moei_router_backward_carve(&d, 0, &v, bytes);
    return MOE_OK;
}

/* Refuses buffers that are absent, misaligned or overlap. Requires checked options. */
MOE_HOST moe_status moei_router_backward_check_buffers(const moe_router_backward_desc* d,
                                                       size_t workspace)
{
    const int64_t num_tokens = d->num_tokens, hidden = d->hidden, num_experts = d->num_experts;
    const uint32_t x_align = (uint32_t)moe_dtype_bytes(d->x_dtype);
    const uint32_t router_align = (uint32_t)moe_dtype_bytes(d->router_dtype);
    const uint32_t grad_align = (uint32_t)moe_dtype_bytes(d->grad_dtype);
    const moe_buffer b[] = {
        {d->x, moe_extent(num_tokens, d->x_stride, hidden, d->x_dtype), x_align,
         d->drouter ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_x},
        {d->router, moe_extent(num_experts, d->router_stride, hidden, d->router_dtype),
         router_align, d->dx ? MOE_BUFFER_REQUIRED : MOE_BUFFER_READ, MOE_FIELD_router},
        {d->dlogits, moe_extent(num_tokens, d->dlogits_stride, num_experts, MOE_FP32), 4,
         MOE_BUFFER_REQUIRED, MOE_FIELD_dlogits},
        {d->dx, moe_extent(num_tokens, d->dx_stride, hidden, d->x_dtype), x_align,
         MOE_BUFFER_WRITTEN, MOE_FIELD_dx},
        {d->workspace, d->workspace ? workspace : 0, 256, MOE_BUFFER_WRITTEN, MOE_FIELD_workspace},
        {d->drouter, (uint64_t)(num_experts * hidden) * grad_align, grad_align, MOE_BUFFER_WRITTEN,
         MOE_FIELD_drouter},
        {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
    const int count = (int)(sizeof b / sizeof b[0]);
    MOE_REQUIRE(!d->workspace || d->workspace_bytes >= workspace, MOE_ERR_WORKSPACE,
                workspace_bytes);
    if (num_tokens == 0) return moe_check_buffers(b + count - 2, 2); /* drouter and fault word */
    return moe_check_buffers(b, count);
}

/* Both prepared products: all but the stream is resolved, for the device that was current. Empty
   launches queue nothing. */
typedef struct moe_router_backward_prepared {
    moei_router_backward_args split_args;
    moei_router_product_args dx_args, drouter_args; /* of the scalar path */
    moe_launch split, sum, dx_scalar, drouter_scalar;
    moe_grouped_gemm_prepared dx;
    moe_k_grouped_gemm_prepared drouter;
    int32_t splits; /* 1: the split path */
} moe_router_backward_prepared;

/* Sets the args of the kernels of the split path. */
MOE_HOST void moei_router_backward_split_args(const moe_router_backward_desc* d,
                                              const moei_router_backward_view* v,
                                              moei_router_backward_args* a)
{
    const int tokens = MOEI_ROUTER_BACKWARD_THREADS / MOE_WARP_SIZE; /* of a block */
    memset(a, 0, sizeof *a);
    a->dlogits = d->dlogits;
    a->router = d->router;
    a->drouter = d->drouter;
    a->a = v->a;
    a->b = v->b;
    a->index = v->index;
    a->part = v->part;
    a->sums = v->sums;
    a->fault = d->fault;
    a->dlogits_stride = d->dlogits_stride;
    a->router_stride = d->router_stride;
    a->num_tokens = d->num_tokens;
    a->num_experts = d->num_experts;
    a->hidden = d->hidden;
    a->padded = v->padded;
    a->pairs = v->pairs;
    a->parts = v->parts;
    a->router_dtype = d->router_dtype;
    a->grad_dtype = d->grad_dtype;
    a->accumulate = d->accumulate;
    a->token_blocks = (d->num_tokens + tokens - 1) / tokens;
}

/* Prepares the product of the split path that computes dx. */
MOE_HOST moe_status moei_router_backward_prepare_dx(const moe_router_backward_desc* d,
                                                    const moei_router_backward_view* v,
                                                    moe_grouped_gemm_prepared* p)
{
    moe_grouped_gemm_desc g;
    memset(&g, 0, sizeof g);
    g.a = v->a;
    g.b.base = v->b;
    g.b.major = MOE_MAJOR_MN;
    g.c = d->dx;
    g.c_stride = d->dx_stride;
    g.accumulate = d->dx_accumulate;
    g.fault = d->fault;
    g.num_experts = 1;
    g.num_rows = d->num_tokens;
    g.n = d->hidden;
    g.k = v->pairs * v->padded;
    g.rank = d->rank;
    g.workspace = v->tickets;
    g.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    return moe_grouped_gemm_prepare(&g, p);
}

/* Prepares the product of the split path that sums over tokens. */
MOE_HOST moe_status moei_router_backward_prepare_drouter(const moe_router_backward_desc* d,
                                                         const moei_router_backward_view* v,
                                                         moe_k_grouped_gemm_prepared* p)
{
    moe_k_grouped_gemm_desc g;
    memset(&g, 0, sizeof g);
    g.a = v->a;
    g.a_stride = (int64_t)v->pairs * v->padded;
    g.b = d->x;
    g.b_stride = d->x_stride;
    g.b_rows = d->num_tokens;
    g.b_index = v->index;
    g.expert_offset = v->part;
    g.c = v->sums;
    g.c_dtype = MOE_FP32;
    g.fault = d->fault;
    g.num_experts = v->parts;
    g.num_rows = d->num_tokens;
    g.m = MOEI_ROUTER_BACKWARD_TERMS * v->padded;
    g.n = d->hidden;
    g.rank = d->rank;
    g.workspace = (char*)v->tickets + MOE_GROUPED_GEMM_WORKSPACE;
    g.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;
    return moe_k_grouped_gemm_prepare(&g, p);
}

/* Prepares the split path. p->splits stays 0 where tensor cores cannot compute a product. */
MOE_HOST moe_status moei_router_backward_prepare_split(const moe_router_backward_desc* d,
                                                       const moei_router_backward_view* v,
                                                       moe_router_backward_prepared* p)
{
    const int64_t threads = MOEI_ROUTER_BACKWARD_THREADS, hidden = d->hidden;
    const int64_t vectors = d->dx ? (int64_t)v->padded * (hidden / 4) : 0;
    moe_launch_config c = moe_grid(1, (int)threads, 0, 0);
    moe_status s = MOE_OK;
    c.dependent = 1;
    if (d->dx) s = moei_router_backward_prepare_dx(d, v, &p->dx);
    if (s == MOE_OK && d->drouter) s = moei_router_backward_prepare_drouter(d, v, &p->drouter);
    if (moe_status_kind(s) == MOE_ERR_CUDA) return s;
    if (s != MOE_OK) { /* an address, a stride or the device does not allow tensor cores */
        memset(&p->dx, 0, sizeof p->dx);
        memset(&p->drouter, 0, sizeof p->drouter);
        return MOE_OK;
    }
    p->splits = 1;
    moei_router_backward_split_args(d, v, &p->split_args);
    c.grid.x = (unsigned)(p->split_args.token_blocks + (vectors + threads - 1) / threads);
    MOE_TRY(MOE_PREPARE(&p->split, moei_router_backward_split, c));
    if (!d->drouter) return MOE_OK;
    c.grid.x = (unsigned)((d->num_experts * (hidden / 4) + threads - 1) / threads);
    return MOE_PREPARE(&p->sum, moei_router_backward_sum, c);
}

/* Prepares the scalar path. */
MOE_HOST moe_status moei_router_backward_prepare_scalar(const moe_router_backward_desc* d,
                                                        moe_router_backward_prepared* p)
{
    moei_router_product_args a;
    memset(&a, 0, sizeof a);
    a.a = d->dlogits;
    a.n = d->hidden;
    a.fault = d->fault;
    if (d->dx) { /* tokens x hidden, summed over experts */
        a.b = d->router;
        a.c = d->dx;
        a.m = d->num_tokens;
        a.k = d->num_experts;
        a.a_row = d->dlogits_stride;
        a.a_depth = 1;
        a.b_stride = d->router_stride;
        a.c_stride = d->dx_stride;
        a.b_dtype = d->router_dtype;
        a.c_dtype = d->x_dtype;
        a.accumulate = d->dx_accumulate;
        p->dx_args = a;
        MOE_TRY(moei_router_product_prepare(&p->dx_args, &p->dx_scalar));
    }
    if (d->drouter) { /* experts x hidden, summed over tokens */
        a.b = d->x;
        a.c = d->drouter;
        a.m = d->num_experts;
        a.k = d->num_tokens;
        a.a_row = 1;
        a.a_depth = d->dlogits_stride;
        a.b_stride = d->x_stride;
        a.c_stride = d->hidden;
        a.b_dtype = d->x_dtype;
        a.c_dtype = d->grad_dtype;
        a.accumulate = d->accumulate;
        p->drouter_args = a;
        MOE_TRY(moei_router_product_prepare(&p->drouter_args, &p->drouter_scalar));
    }
    return MOE_OK;
}

/* Prepares *p, which is empty, for an unchecked descriptor. */
MOE_HOST moe_status moei_router_backward_prepare(const moe_router_backward_desc* desc,
                                                 moe_router_backward_prepared* p)
{
    moe_router_backward_desc d = *desc;
    moei_router_backward_view v;
    size_t bytes;
    MOE_TRY(moei_router_backward_check_options(&d));
    moei_router_backward_carve(&d, d.workspace, &v, &bytes);
    MOE_TRY(moei_router_backward_check_buffers(&d, bytes));
    if (d.num_tokens > 0 && d.workspace && moei_router_backward_splits(&d))
        MOE_TRY(moei_router_backward_prepare_split(&d, &v, p));
    return p->splits ? MOE_OK : moei_router_backward_prepare_scalar(&d, p);
}

/* Prepares both products; moe_router_backward_run queues them any number of times. Errors: each
   field that is not as documented, with its own status. With T = 0 drouter is zeros, or unchanged
   with `accumulate`. On an error *p is empty. */
MOE_HOST moe_status moe_router_backward_prepare(const moe_router_backward_desc* desc,
                                                moe_router_backward_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_router_backward_prepare(desc, p));
}

/* Queues the prepared products on `stream`. Refuses a null p. */
MOE_HOST moe_status moe_router_backward_run(const moe_router_backward_prepared* p,
                                            cudaStream_t stream)
{
    MOE_REQUIRE(p, MOE_ERR_NULL, desc);
    if (!p->splits) {
        MOE_TRY(MOE_RUN(&p->dx_scalar, p->dx_args, stream));
        return MOE_RUN(&p->drouter_scalar, p->drouter_args, stream);
    }
    MOE_TRY(MOE_RUN(&p->split, p->split_args, stream));
    MOE_TRY(moe_grouped_gemm_run(&p->dx, stream));
    MOE_TRY(moe_k_grouped_gemm_run(&p->drouter, stream));
    return MOE_RUN(&p->sum, p->split_args, stream);
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_router_backward(const moe_router_backward_desc* desc, cudaStream_t stream)
{
    moe_router_backward_prepared p;
    MOE_TRY(moe_router_backward_prepare(desc, &p));
    return moe_router_backward_run(&p, stream);
}

/* Loads the kernels that this header adds to those of its products, before their first launch. */
MOE_HOST moe_status moe_router_backward_preload(void)
{
    MOE_TRY(moe_preload_kernel((const void*)moei_router_backward_split));
    MOE_TRY(moe_preload_kernel((const void*)moei_router_backward_sum));
    return moe_preload_kernel((const void*)moei_router_product);
}

MOEI_PRELOAD_INCLUDED(router_backward)

#endif
