/* split.cuh: the operands of the router's backward products on bf16 tensor cores: fp32 numbers as
   bf16 terms (router/bf16_split.cuh), and the sum of the products' parts. Called by
   router_backward.cuh.

   An fp32 number becomes the sum of two bf16 terms, which is within 2^-16 of it; a bf16 router's weight
   is one. dx sums over pairs of terms, one after another along the reduced dimension:

     pair    0  1  2  3      of dlogits' term and router's term; a bf16 router has the first two pairs
     dlogits 0  1  0  1
     router  0  0  1  1

   drouter sums over tokens: the terms of dlogits, the first two blocks of columns, are rows of its
   product, which are added up last. */
#ifndef MOE_ROUTER_BACKWARD_SPLIT_CUH
#define MOE_ROUTER_BACKWARD_SPLIT_CUH

#include "../base/copy.cuh"
#include "../base/fault.cuh"
#include "../base/warp.cuh"
#include "../router/bf16_split.cuh"

#define MOEI_ROUTER_BACKWARD_TERMS 2 /* of dlogits, and of an fp32 router; the table is of two */
#define MOEI_ROUTER_BACKWARD_MOST 16 /* most parts of the tokens, each with sums of its own */

/* The argument of the kernels. E8: E, rounded up to a multiple of 8. */
typedef struct moei_router_backward_args {
    const float* dlogits; /* [T, E] */
    const void* router;   /* [E, H] router_dtype */
    void* drouter;        /* [E, H] grad_dtype */
    uint16_t* a;          /* [T, pairs * E8] bf16 terms of dlogits */
    uint16_t* b;          /* [pairs * E8, H] bf16 terms of router; null without dx */
    int32_t* index;       /* [T] t, or -1 where all of a token's dlogits are 0 */
    int32_t* part;        /* [parts + 1] first token of each part */
    const float* sums;    /* [parts, TERMS * E8, H] */
    uint64_t* fault;      /* [1] fault word; or null */
    int64_t dlogits_stride, router_stride;   /* elements between rows */
    int32_t num_tokens, num_experts, hidden; /* T, E, H */
    int32_t padded;                          /* E8 */
    int32_t pairs;                           /* 2 or 4 */
    int32_t parts;                           /* 1 .. MOEI_ROUTER_BACKWARD_MOST */
    int32_t router_dtype, grad_dtype;        /* moe_dtype */
    int32_t accumulate;                      /* 1: adds to drouter */
    int32_t token_blocks;                    /* blocks of the split kernel that have tokens */
} moei_router_backward_args;

/* Returns the term of dlogits, and that of router, of a pair. */
MOE_DEVICE int moei_router_backward_a_term(int pair) { return pair & 1; }
MOE_DEVICE int moei_router_backward_b_term(int pair) { return pair >> 1; }

/* Splits one token's dlogits: a warp a token, 4 experts a lane at a time. Writes index[t]. */
MOE_DEVICE void moei_router_backward_token(const moei_router_backward_args* d, int64_t t)
{
    const float* from = d->dlogits + t * d->dlogits_stride;
    uint16_t* to = d->a + t * d->pairs * d->padded;
    bool any = false;
    for (int e = moe_lane() * 4; e < d->padded; e += MOE_WARP_SIZE * 4) {
        uint2 term[MOEI_ROUTER_BACKWARD_TERMS];
        uint32_t v[4];
        MOE_UNROLL
        for (int i = 0; i < 4; ++i) {
            v[i] = e + i < d->num_experts ? __float_as_uint(from[e + i]) : 0;
            any |= (v[i] & 0x7fffffffu) != 0;
        }
        moei_bf16_split4(term, make_uint4(v[0], v[1], v[2], v[3]), MOEI_ROUTER_BACKWARD_TERMS);
        for (int p = 0; p < d->pairs; ++p)
            *(uint2*)(to + p * d->padded + e) = moei_router_backward_a_term(p) ? term[1] : term[0];
    }
    any = __any_sync(MOE_FULL_WARP, any) != 0;
    if (moe_lane() == 0) d->index[t] = any ? (int32_t)t : -1;
}

/* Splits 4 weights of the router: vector `at` of b's rows of pair 0, H / 4 a row. */
MOE_DEVICE void moei_router_backward_weights(const moei_router_backward_args* d, int64_t at)
{
    const int each = d->hidden / 4, e = (int)(at / each), h = (int)(at % each) * 4;
    uint2 term[MOEI_ROUTER_BACKWARD_TERMS];
    uint32_t v[4];
    MOE_UNROLL
    for (int i = 0; i < 4; ++i)
        v[i] = e < d->num_experts ? __float_as_uint(moe_load_f32(
                                        d->router, e * d->router_stride + h + i, d->router_dtype))
                                  : 0;
    moei_bf16_split4(term, make_uint4(v[0], v[1], v[2], v[3]), MOEI_ROUTER_BACKWARD_TERMS);
    for (int p = 0; p < d->pairs; ++p)
        *(uint2*)(d->b + ((int64_t)p * d->padded + e) * d->hidden + h) =
            moei_router_backward_b_term(p) ? term[1] : term[0];
}

#define MOEI_ROUTER_BACKWARD_THREADS 256

/* Writes both operands, the index and the parts. The first token_blocks blocks have 8 tokens each,
   the others 256 vectors of the router. */
MOE_KERNEL(MOEI_ROUTER_BACKWARD_THREADS, 4)
moei_router_backward_split(MOE_ARG(moei_router_backward_args) d)
{
    const int warps = MOEI_ROUTER_BACKWARD_THREADS / MOE_WARP_SIZE;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    if (blockIdx.x == 0 && (int)threadIdx.x <= d.parts)
        d.part[threadIdx.x] = (int32_t)((int64_t)d.num_tokens * threadIdx.x / d.parts);
    if ((int)blockIdx.x < d.token_blocks) {
        const int64_t t = (int64_t)blockIdx.x * warps + moe_warp();
        if (t < d.num_tokens) moei_router_backward_token(&d, t);
    } else {
        const int64_t at =
            (int64_t)((int)blockIdx.x - d.token_blocks) * MOEI_ROUTER_BACKWARD_THREADS +
            threadIdx.x;
        if (at < (int64_t)d.padded * (d.hidden / 4)) moei_router_backward_weights(&d, at);
    }
}

/* drouter: adds up the sums of all parts, in order, of each part those of the lowest term first. A
   thread has 4 columns. */
MOE_KERNEL(MOEI_ROUTER_BACKWARD_THREADS, 4)
moei_router_backward_sum(MOE_ARG(moei_router_backward_args) d)
{
    const int each = d.hidden / 4;
    const int64_t at = (int64_t)blockIdx.x * MOEI_ROUTER_BACKWARD_THREADS + threadIdx.x;
    const int64_t e = at / each, h = at % each * 4;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault) || e >= d.num_experts) return;
    for (int p = 0; p < d.parts; ++p) {
        float v[MOEI_ROUTER_BACKWARD_TERMS][4];
        MOE_UNROLL
        for (int i = 0; i < MOEI_ROUTER_BACKWARD_TERMS; ++i)
            moei_load_4(v[i], d.sums +
                                  (((int64_t)p * MOEI_ROUTER_BACKWARD_TERMS + i) * d.padded + e) *
                                      d.hidden +
                                  h);
        MOE_UNROLL
        for (int j = 0; j < 4; ++j) sum[j] += v[1][j] + v[0][j];
    }
    MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        const int64_t to = e * d.hidden + h + j;
        if (d.accumulate) sum[j] += moe_load_f32(d.drouter, to, d.grad_dtype);
        moe_store_f32(d.drouter, to, d.grad_dtype, sum[j]);
    }
}

#endif
