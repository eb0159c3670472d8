/* bf16_split.cuh: the bf16 split of the router's product: fp32 weights on bf16 tensor cores. The
   weights are split, not rounded. The two tiles, large.cuh and small.cuh, call these functions.

     w = hi + mid + lo          three bf16 terms: the upper, middle and lower 8 of fp32's 24 bits
     x * w = x * hi + x * mid + x * lo       each product exact, summed in fp32

   Each term is truncated, not rounded: the split is exact for |w| >= 2^-100, and no term overflows.
   For smaller |w|, bits under 2^-126 may be lost. A bf16 x is multiplied unchanged. An fp16 x has
   11 bits: its upper 8 bits and its lower 3 become two bf16 rows of a tile; the sums of both are
   added at the end. So fp16 costs twice as much.

   An infinite or NaN weight is in hi alone: with bf16 x, its expert's logits are those of fp32.
   The logit is NaN instead of infinite where an infinity in x meets a term that is 0. With fp16 x
   the logit is NaN too where an infinite weight meets such a term.

   Both tiles sum in a fixed order: equal inputs give equal bits. Requires sm_80; H a multiple of 8;
   x, the weights and the rows of both 16-byte aligned. */
#ifndef MOE_ROUTER_BF16_SPLIT_CUH
#define MOE_ROUTER_BF16_SPLIT_CUH

#include "../base/numeric.cuh"
#include "args.h"

/* Terms of a weight. Predefine it as 2 to omit lo: weights are rounded to 2^-16, for a third less
   work. */
#ifndef MOE_ROUTER_BF16_TERMS
#define MOE_ROUTER_BF16_TERMS 3
#endif
#if MOE_ROUTER_BF16_TERMS != 2 && MOE_ROUTER_BF16_TERMS != 3
#error "moe: MOE_ROUTER_BF16_TERMS is 2 or 3"
#endif

/* Returns the tokens of `rows` rows of a tile: an fp16 token has two rows. */
MOE_HOST_DEVICE int moei_bf16_split_tokens(int rows, int x_dtype)
{
    return x_dtype == MOE_FP16 ? rows / 2 : rows;
}

/* Returns the upper halves of two words, a's in the lower half. */
MOE_DEVICE uint32_t moei_bf16_split_upper(uint32_t a, uint32_t b)
{
#if MOE_ON_HOST
    return a >> 16 | (b & 0xffff0000u);
#else
    return __byte_perm(a, b, 0x7632);
#endif
}

/* Splits 4 fp32 numbers into `terms` (2 or 3, a literal) bf16 terms each; term[i] holds the i-th
   term of all four. With 2 the second term is rounded. An infinity or NaN is in the first term
   alone; the others are 0. */
MOE_DEVICE void moei_bf16_split4(uint2* term, uint4 v, const int terms)
{
    uint32_t u[4] = {v.x, v.y, v.z, v.w};
    float r[4];
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t size = u[i] & 0x7fffffffu;
        r[i] = __uint_as_float(u[i]) - __uint_as_float(u[i] & 0xffff0000u);
        if (size >= 0x7f800000u) r[i] = 0.0f;
        if (size > 0x7f800000u) u[i] |= 0x00400000u; /* a NaN stays NaN when truncated */
    }
    term[0] = make_uint2(moei_bf16_split_upper(u[0], u[1]), moei_bf16_split_upper(u[2], u[3]));
    if (terms == 2) {
        term[1] = make_uint2(moe_pack2(r[0], r[1], MOE_BF16), moe_pack2(r[2], r[3], MOE_BF16));
    } else {
        MOE_UNROLL
        for (int i = 0; i < 4; ++i) {
            u[i] = __float_as_uint(r[i]);
            r[i] = r[i] - __uint_as_float(u[i] & 0xffff0000u);
        }
        term[1] = make_uint2(moei_bf16_split_upper(u[0], u[1]), moei_bf16_split_upper(u[2], u[3]));
        term[2] = make_uint2(moei_bf16_split_upper(__float_as_uint(r[0]), __float_as_uint(r[1])),
                             moei_bf16_split_upper(__float_as_uint(r[2]), __float_as_uint(r[3])));
    }
}

/* Splits 8 fp16 numbers into bf16: the upper 8 bits of each and the lower 3, both exact. */
MOE_DEVICE void moei_bf16_split_x(uint4* hi, uint4* lo, uint4 v)
{
    uint2 a[2], b[2];
    float f[8];
    moei_unpack_8(f, v, MOE_FP16);
    moei_bf16_split4(a,
                     make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]),
                                __float_as_uint(f[3])),
                     2);
    moei_bf16_split4(b,
                     make_uint4(__float_as_uint(f[4]), __float_as_uint(f[5]), __float_as_uint(f[6]),
                                __float_as_uint(f[7])),
                     2);
    *hi = make_uint4(a[0].x, a[0].y, b[0].x, b[0].y);
    *lo = make_uint4(a[1].x, a[1].y, b[1].x, b[1].y);
}

#endif
