/* numeric.cuh: conversions and elementary functions on the device. Their results are the same under
   the user's --use_fast_math: NaN and infinity are tested by bits, and divisions that matter are
   exact. */
#ifndef MOE_BASE_NUMERIC_CUH
#define MOE_BASE_NUMERIC_CUH

#include "cuda.cuh"

/* Returns true for a NaN. */
MOE_DEVICE bool moei_is_nan(float v) { return (__float_as_uint(v) & 0x7fffffffu) > 0x7f800000u; }

/* Returns the bits of v as an unsigned number in the order of the floats; -0 counts as +0. */
MOE_DEVICE uint32_t moei_ordered(float v)
{
    const uint32_t u = __float_as_uint(v);
    if (u == 0x80000000u) return 0x80000000u;
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* Returns the float of which k is moei_ordered. */
MOE_DEVICE float moei_unordered(uint32_t k)
{
    return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k);
}

/* Returns fp16 or bf16 bits as fp32. dtype is a literal, or uniform. */
MOE_DEVICE float moe_half_to_f32(uint16_t bits, int dtype)
{
#if MOE_ON_HOST
    return dtype == MOE_FP16 ? moe_fp16_to_f32(bits) : moe_bf16_to_f32(bits);
#else
    return dtype == MOE_FP16 ? __half2float(__ushort_as_half(bits))
                             : __uint_as_float((uint32_t)bits << 16);
#endif
}

/* Returns v rounded to fp16 or bf16, as bits. */
MOE_DEVICE uint16_t moe_f32_to_half(float v, int dtype)
{
#if MOE_ON_HOST
    return dtype == MOE_FP16 ? moe_f32_to_fp16(v) : moe_f32_to_bf16(v);
#else
    return dtype == MOE_FP16 ? __half_as_ushort(__float2half_rn(v))
                             : __bfloat16_as_ushort(__float2bfloat16_rn(v));
#endif
}

/* Returns two neighbours as one 32-bit word, `lo` in the lower 16 bits. */
MOE_DEVICE uint32_t moe_pack2(float lo, float hi, int dtype)
{
#if MOE_ON_HOST
    return (uint32_t)moe_f32_to_half(lo, dtype) | ((uint32_t)moe_f32_to_half(hi, dtype) << 16);
#else
    if (dtype == MOE_FP16) {
        const __half2 h = __floats2half2_rn(lo, hi);
        return *(const uint32_t*)&h;
    } else {
        const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
        return *(const uint32_t*)&h;
    }
#endif
}

/* Returns the two elements of such a word as fp32. */
MOE_DEVICE float2 moe_unpack2(uint32_t w, int dtype)
{
    return make_float2(moe_half_to_f32((uint16_t)(w & 0xffffu), dtype),
                       moe_half_to_f32((uint16_t)(w >> 16), dtype));
}

/* Unpack and pack a 16-byte vector of 8 elements of fp16 or bf16. */
MOE_DEVICE void moei_unpack_8(float* v, uint4 raw, int dtype)
{
    const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float2 f = moe_unpack2(w[i], dtype);
        v[2 * i] = f.x;
        v[2 * i + 1] = f.y;
    }
}

MOE_DEVICE uint4 moei_pack_8(const float* v, int dtype)
{
    return make_uint4(moe_pack2(v[0], v[1], dtype), moe_pack2(v[2], v[3], dtype),
                      moe_pack2(v[4], v[5], dtype), moe_pack2(v[6], v[7], dtype));
}

/* Unpacks a 16-byte vector: 4 elements of fp32, 8 otherwise. dtype is a literal. */
MOE_DEVICE void moei_unpack_16(float* v, uint4 raw, const int dtype)
{
    if (dtype == MOE_FP32) {
        v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
        v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
    } else {
        moei_unpack_8(v, raw, dtype);
    }
}

/* Load and store 4 neighbours of fp32; p is 16-byte aligned. */
MOE_DEVICE void moei_load_4(float* v, const float* p)
{
    MOEI_ALIGNED(p, 16);
    const float4 f = *(const float4*)p;
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}

MOE_DEVICE void moei_store_4(float* p, const float* v)
{
    MOEI_ALIGNED(p, 16);
    *(float4*)p = make_float4(v[0], v[1], v[2], v[3]);
}

/* Load and store `count` (4 or 8, a literal) neighbours of any dtype as fp32. p is aligned to their
   size; for fp32 to 16 bytes. */
MOE_DEVICE void moei_load_some(float* v, const void* p, int dtype, const int count)
{
    if (dtype == MOE_FP32) {
        MOE_UNROLL
        for (int i = 0; i < count; i += 4) moei_load_4(v + i, (const float*)p + i);
    } else if (count == 8) {
        MOEI_ALIGNED(p, 16);
        moei_unpack_8(v, *(const uint4*)p, dtype);
    } else {
        MOEI_ALIGNED(p, 8);
        const uint2 u = *(const uint2*)p;
        const float2 a = moe_unpack2(u.x, dtype), b = moe_unpack2(u.y, dtype);
        v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
    }
}

MOE_DEVICE void moei_store_some(void* p, const float* v, int dtype, const int count)
{
    if (dtype == MOE_FP32) {
        MOE_UNROLL
        for (int i = 0; i < count; i += 4) moei_store_4((float*)p + i, v + i);
    } else if (count == 8) {
        MOEI_ALIGNED(p, 16);
        *(uint4*)p = moei_pack_8(v, dtype);
    } else {
        MOEI_ALIGNED(p, 8);
        *(uint2*)p = make_uint2(moe_pack2(v[0], v[1], dtype), moe_pack2(v[2], v[3], dtype));
    }
}

/* Load and store element i of a buffer of any dtype, as fp32. */
MOE_DEVICE float moe_load_f32(const void* p, int64_t i, int dtype)
{
    if (dtype == MOE_FP32) return ((const float*)p)[i];
    return moe_half_to_f32(((const uint16_t*)p)[i], dtype);
}

MOE_DEVICE void moe_store_f32(void* p, int64_t i, int dtype, float v)
{
    if (dtype == MOE_FP32) ((float*)p)[i] = v;
    else ((uint16_t*)p)[i] = moe_f32_to_half(v, dtype);
}

/* Returns e^x to 3 ulp; 0 for NaN. The product x * log2(e) is kept as a sum of two floats: one
   float would lose |x| ulp of the result. */
MOE_DEVICE float moe_exp(float x)
{
    const float log2e = 1.44269502f, log2e_lo = 1.92596299e-8f, ln2 = 0.693147182f;
    const float hi = x * log2e;
    float lo, e;
    if (!(hi > -150.0f)) return 0.0f; /* also -infinity and NaN */
    if (hi > 128.0f) return __uint_as_float(0x7f800000u);
    lo = fmaf(x, log2e, -hi) + x * log2e_lo;
    e = exp2f(hi);
    return fmaf(e, lo * ln2, e);
}

/* Returns 2^x by one instruction, to about 2 ulp; 0 below 2^-126. */
MOE_DEVICE float moei_exp2_fast(float x)
{
#if MOE_ON_HOST
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

/* Returns 1 / x by one instruction, to 1 ulp; numbers below 2^-126 count as 0. */
MOE_DEVICE float moei_reciprocal_fast(float x)
{
#if MOE_ON_HOST
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

#endif
