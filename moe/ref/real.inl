/* real.inl: loading and rounding for one type of number; real.h includes it twice. */

/* Returns element i of a buffer. */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_load)(const void* p, int64_t i, int dtype)
{
    if (dtype == MOE_REF_REAL) return ((const MOEI_REAL*)p)[i];
    return moe_load(p, i, dtype);
}

/* Returns v rounded to the dtype; dtype 0 and MOE_REF_REAL do not round. */
MOE_HOST MOEI_REAL MOEI_REF(moe_ref_round)(MOEI_REAL v, int dtype)
{
    if (dtype == MOE_FP32) return (float)v;
    if (dtype == MOE_FP16) return moe_fp16_to_f32(moe_f32_to_fp16((float)v));
    if (dtype == MOE_BF16) return moe_bf16_to_f32(moe_f32_to_bf16((float)v));
    return v;
}
