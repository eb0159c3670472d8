/* types.h: element types. C11 and C++14.

   A buffer is passed as void* and a moe_dtype. 16-bit elements are read and written as their bits,
   so one struct serves C, CUDA and the CPU. Conversions in plain C round to nearest, ties to even,
   as the GPU does. */
#ifndef MOE_BASE_TYPES_H
#define MOE_BASE_TYPES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "config.h"

typedef enum moe_dtype {
    MOE_DTYPE_DEFAULT = 0, /* each field's comment names its default */
    MOE_FP32,
    MOE_FP16,
    MOE_BF16
} moe_dtype;

/* Returns the bytes of one element; 0 for a value that is no dtype. */
MOE_HOST int moe_dtype_bytes(int dtype)
{
    return dtype == MOE_FP32 ? 4 : (dtype == MOE_FP16 || dtype == MOE_BF16) ? 2 : 0;
}

/* Returns the bytes from the first to the last element of `rows` rows of `columns` elements, which
   begin `stride` elements apart. */
MOE_HOST uint64_t moe_extent(int64_t rows, int64_t stride, int64_t columns, int dtype)
{
    if (rows <= 0 || columns <= 0) return 0;
    return ((uint64_t)(rows - 1) * (uint64_t)stride + (uint64_t)columns) *
           (uint64_t)moe_dtype_bytes(dtype);
}

/* Returns 1 where `rows` rows of `columns` elements may begin `stride` elements apart: they do not
   overlap, and their extent does not exceed 2^62 bytes. */
MOE_HOST int moei_stride_fits(int64_t stride, int64_t columns, int64_t rows)
{
    return stride >= columns && stride <= ((int64_t)1 << 60) / (rows > 0 ? rows : 1);
}

/* Returns the buffer at byte *at of the workspace at `base` and advances *at by `bytes`, rounded up
   to a multiple of 256. With a null base returns null and only counts. */
MOE_HOST void* moei_carve(char* base, size_t* at, uint64_t bytes)
{
    void* p = base ? base + *at : (char*)0;
    *at += (size_t)((bytes + 255) / 256 * 256);
    return p;
}

/* Returns "fp32", "fp16", "bf16", or "?" for a value that is no dtype. */
MOE_HOST const char* moe_dtype_name(int dtype)
{
    return dtype == MOE_FP32   ? "fp32"
           : dtype == MOE_FP16 ? "fp16"
           : dtype == MOE_BF16 ? "bf16"
                               : "?";
}

/* Return the bits of a float, the float of such bits, and 1 where it is neither infinite nor NaN. */
MOE_HOST uint32_t moe_f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
MOE_HOST float moe_f32_from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}
MOE_HOST int moei_f32_is_finite(float f) { return (moe_f32_bits(f) & 0x7f800000u) != 0x7f800000u; }

/* Convert bits of bf16 or fp16 to fp32, exactly, and fp32 to such bits, rounded. */
MOE_HOST float moe_bf16_to_f32(uint16_t h) { return moe_f32_from_bits((uint32_t)h << 16); }

MOE_HOST uint16_t moe_f32_to_bf16(float f)
{
    const uint32_t u = moe_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff; /* NaN: the GPU's canonical one */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

MOE_HOST float moe_fp16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 0x3ffu;
    if (exp == 31) return moe_f32_from_bits(sign | 0x7f800000u | (man << 13));
    if (exp) return moe_f32_from_bits(sign | ((exp + 112u) << 23) | (man << 13));
    { /* subnormal: man * 2^-24, exact in fp32 */
        const float v = (float)man * moe_f32_from_bits(0x33800000u);
        return sign ? -v : v;
    }
}

MOE_HOST uint16_t moe_f32_to_fp16(float f)
{
    const uint32_t u = moe_f32_bits(f), sign = (u >> 16) & 0x8000u, abs = u & 0x7fffffffu;
    if (abs > 0x7f800000u) return 0x7fff;
    if (abs >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds past 65504 */
    if (abs < 0x38800000u) { /* below 2^-14: adding 0.5 rounds at 2^-24, as fp16 subnormals do */
        const float r = moe_f32_from_bits(abs) + 0.5f;
        return (uint16_t)(sign | (moe_f32_bits(r) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((abs - 0x38000000u + 0xfffu + ((abs >> 13) & 1u)) >> 13));
}

/* Returns element i of a buffer, widened to fp32. */
MOE_HOST float moe_load(const void* p, int64_t i, int dtype)
{
    if (dtype == MOE_FP32) return ((const float*)p)[i];
    if (dtype == MOE_FP16) return moe_fp16_to_f32(((const uint16_t*)p)[i]);
    return moe_bf16_to_f32(((const uint16_t*)p)[i]);
}

/* Writes v to element i of a buffer, rounded from fp32. */
MOE_HOST void moe_store(void* p, int64_t i, int dtype, float v)
{
    if (dtype == MOE_FP32) ((float*)p)[i] = v;
    else if (dtype == MOE_FP16) ((uint16_t*)p)[i] = moe_f32_to_fp16(v);
    else ((uint16_t*)p)[i] = moe_f32_to_bf16(v);
}

#endif
