/* fp8.cuh: rows of 8-bit floats (e4m3) with a scale for each 128 elements: half of the bytes of 16-bit
   rows, and 4 bytes for each 128 elements.

     scale = largest |x| of the 128 / 448      code = e4m3(x 448 / largest)      x' = code scale

   e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa: 2^-9 to 448, NaN, no infinity. Rounds to
   nearest, ties to even: x' is within 2^-4 |x| of x, or 2^-10 scale where that is more. Elements
   whose 128 are all below 1e-30 become 0. A NaN stays one; an infinity makes its 128 elements NaN.
   Equal inputs give equal bits on every architecture; from sm_90 on the GPU has the conversions.

   Source: the format is OCP's FP8 specification; scales for 128 elements as DeepSeek-V3 has them,
   arXiv 2412.19437. */
#ifndef MOE_BASE_FP8_CUH
#define MOE_BASE_FP8_CUH

#include "numeric.cuh"
#include "warp.cuh"

#define MOE_FP8_GROUP 128 /* elements that share a scale */

/* Returns the e4m3 code nearest to v, at most 448; of NaN 0x7f. */
MOE_HOST_DEVICE uint8_t moe_f32_to_e4m3(float v)
{
    union {
        float f;
        uint32_t u;
    } x, s;
    uint32_t sign, magnitude;
    x.f = v;
    sign = x.u >> 24 & 0x80u;
    magnitude = x.u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    if (magnitude < 0x3c800000u) { /* below 2^-6: multiples of 2^-9 */
        x.u = magnitude;
        s.f = x.f * 512.0f + 8388608.0f; /* 2^23: rounds to a whole number */
        return (uint8_t)(sign | (s.u & 0xfu));
    }
    magnitude = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20; /* 3 bits of mantissa */
    magnitude -= 120u << 3;                                            /* bias 127 to bias 7 */
    return (uint8_t)(sign | (magnitude > 0x7eu ? 0x7eu : magnitude));
}

/* Returns what an e4m3 code is. */
MOE_HOST_DEVICE float moe_e4m3_to_f32(uint8_t code)
{
    union {
        uint32_t u;
        float f;
    } x;
    const uint32_t c = code & 0x7fu;
    if (c == 0x7fu) {
        x.u = 0x7fffffffu;
        return x.f;
    }
    if (c < 8) x.f = (float)c * 0.001953125f; /* 2^-9 */
    else x.u = (c << 20) + (120u << 23);
    x.u |= (uint32_t)(code & 0x80u) << 24;
    return x.f;
}

/* Returns two codes, of lo in the lower 8 bits. */
MOE_DEVICE uint32_t moei_e4m3_pack2(float lo, float hi)
{
#if !MOE_ON_HOST && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint16_t r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
    return r;
#else
    return (uint32_t)moe_f32_to_e4m3(lo) | (uint32_t)moe_f32_to_e4m3(hi) << 8;
#endif
}

/* Unpacks the two codes of the lower 16 bits. */
MOE_DEVICE float2 moei_e4m3_unpack2(uint32_t codes)
{
#if !MOE_ON_HOST && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t halves; /* fp16 has every e4m3 number */
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((uint16_t)codes));
    return moe_unpack2(halves, MOE_FP16);
#else
    return make_float2(moe_e4m3_to_f32((uint8_t)codes), moe_e4m3_to_f32((uint8_t)(codes >> 8)));
#endif
}

/* Returns the codes of 8 elements of a lane, 16 bits each in `raw`; 16 neighbouring lanes have a
   group. Sets *scale, the same for all of them. The whole warp. */
MOE_DEVICE uint2 moei_fp8_encode_8(uint4 raw, float* scale, int dtype)
{
    float v[8], largest = 0.0f, by;
    moei_unpack_8(v, raw, dtype);
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(v[i]));
    largest = moe_warp_max(largest, MOE_FP8_GROUP / 8);
    by = largest < 1e-30f ? 0.0f : __fdiv_rn(448.0f, largest);
    *scale = largest < 1e-30f ? 0.0f : __fdiv_rn(largest, 448.0f);
    return make_uint2(
        moei_e4m3_pack2(v[0] * by, v[1] * by) | moei_e4m3_pack2(v[2] * by, v[3] * by) << 16,
        moei_e4m3_pack2(v[4] * by, v[5] * by) | moei_e4m3_pack2(v[6] * by, v[7] * by) << 16);
}

/* Returns 8 elements of dtype, 16 bits each, of 8 codes. */
MOE_DEVICE uint4 moei_fp8_decode_8(uint2 codes, float scale, int dtype)
{
    const uint32_t pair[4] = {codes.x, codes.x >> 16, codes.y, codes.y >> 16};
    float v[8];
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float2 f = moei_e4m3_unpack2(pair[i] & 0xffffu);
        v[2 * i] = f.x * scale;
        v[2 * i + 1] = f.y * scale;
    }
    return moei_pack_8(v, dtype);
}

#endif
