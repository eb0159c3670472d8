/* numeric.h: base/types.h, base/numeric.cuh: conversions

   test_conversions  all 16-bit patterns; floats at every midpoint */
#ifndef MOE_TESTS_BASE_NUMERIC_H
#define MOE_TESTS_BASE_NUMERIC_H

#include "tests/test.h"

#include "moe/base/numeric.cuh"
#include "moe/layout.h"

/* fp16 or bf16 bits to a number by the definition of the format. */
static double slow_value(uint16_t bits, int dtype)
{
    const int man_bits = dtype == MOE_FP16 ? 10 : 7, bias = dtype == MOE_FP16 ? 15 : 127;
    const int exp = (bits & 0x7fff) >> man_bits, man = bits & ((1 << man_bits) - 1);
    const int most = dtype == MOE_FP16 ? 31 : 255;
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exp == most) return man ? NAN : sign * INFINITY;
    if (exp == 0) return sign * ldexp(man, 1 - bias - man_bits);
    return sign * ldexp((1 << man_bits) + man, exp - bias - man_bits);
}

/* Nearest of all finite numbers of the format, ties to the even code; infinity counts as the
   number that the next larger exponent would start with. */
static uint16_t slow_nearest(float v, int dtype)
{
    const int infinity = dtype == MOE_FP16 ? 0x7c00 : 0x7f80;
    const double top = dtype == MOE_FP16 ? 65536.0 : ldexp(1, 128);
    const double abs = fabs((double)v);
    const uint16_t sign = moe_f32_bits(v) >> 31 ? 0x8000 : 0;
    int lo = 0, hi = infinity;
    if (v != v) return 0x7fff;
    if (abs >= top) return (uint16_t)(sign | infinity);
    while (hi - lo > 1) { /* value(lo) <= abs < value(hi) */
        const int mid = (lo + hi) / 2;
        if (slow_value((uint16_t)mid, dtype) <= abs) lo = mid;
        else hi = mid;
    }
    {
        const double below = abs - slow_value((uint16_t)lo, dtype);
        const double above = (hi == infinity ? top : slow_value((uint16_t)hi, dtype)) - abs;
        const int code = below < above ? lo : below > above ? hi : lo & 1 ? hi : lo;
        return (uint16_t)(sign | code);
    }
}

typedef struct convert_args {
    const uint16_t* half; /* [n] */
    const float* single;  /* [m] */
    float* widened;       /* [n] */
    uint16_t* narrowed;   /* [m] */
    uint32_t* ordered;    /* [m] */
    float* unordered;     /* [m] */
    int32_t n, m, dtype, pairs;
} convert_args;

MOE_KERNEL(256, 1) convert_kernel(MOE_ARG(convert_args) d)
{
    const int step = (int)(gridDim.x * blockDim.x);
    const int first = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (d.pairs) {
        for (int i = first; i < d.n / 2; i += step) {
            const float2 f = moe_unpack2(((const uint32_t*)d.half)[i], d.dtype);
            d.widened[2 * i] = f.x;
            d.widened[2 * i + 1] = f.y;
        }
        for (int i = first; i < d.m / 2; i += step)
            ((uint32_t*)d.narrowed)[i] = moe_pack2(d.single[2 * i], d.single[2 * i + 1], d.dtype);
    } else {
        for (int i = first; i < d.n; i += step) d.widened[i] = moe_load_f32(d.half, i, d.dtype);
        for (int i = first; i < d.m; i += step) moe_store_f32(d.narrowed, i, d.dtype, d.single[i]);
    }
    for (int i = first; i < d.m; i += step) {
        d.ordered[i] = moei_ordered(d.single[i]);
        d.unordered[i] = moei_unordered(moei_ordered(d.single[i]));
    }
}

static int same_float(float a, float b)
{
    return (a != a && b != b) || moe_f32_bits(a) == moe_f32_bits(b);
}

/* All 65536 patterns; floats: every midpoint of two neighbours and what lies beside it, and
   random bits. Plain C against the slow way, the kernel against plain C. */
static void test_conversions(void)
{
    const int n = 65536, m = 65536 * 4 + (MOE_ON_HOST ? 1 << 18 : 1 << 21);
    uint16_t* half = (uint16_t*)test_host(n * 2);
    uint16_t* narrow = (uint16_t*)test_host(m * 2);
    float* single = (float*)test_host((int64_t)m * 4);
    trand r = trand_new(2);
    for (int i = 0; i < n; ++i) half[i] = (uint16_t)i;
    for (int dtype = MOE_FP16; dtype <= MOE_BF16; ++dtype) {
        int64_t bad_wide = 0, bad_narrow = 0;
        for (int i = 0; i < n; ++i) {
            const float wide = moe_load(half, i, dtype);
            const double want = slow_value((uint16_t)i, dtype);
            const uint16_t back = dtype == MOE_FP16 ? moe_f32_to_fp16(wide) : moe_f32_to_bf16(wide);
            bad_wide += want == want ? (double)wide != want ||
                                           (moe_f32_bits(wide) >> 31) != (unsigned)i >> 15
                                     : wide == wide;
            bad_narrow += back != (want == want ? i : 0x7fff);
        }
        CHECK(bad_wide == 0, "%s: %lld patterns widen wrongly", moe_dtype_name(dtype),
              (long long)bad_wide);
        CHECK(bad_narrow == 0, "%s: %lld patterns do not come back", moe_dtype_name(dtype),
              (long long)bad_narrow);
        for (int i = 0; i < n; ++i) { /* half way to the next, below, above, and itself + 1 ulp */
            const uint32_t a = moe_f32_bits(moe_load(half, i, dtype));
            const uint32_t b =
                moe_f32_bits(moe_load(half, (i & 0x7fff) == 0x7fff ? i : i + 1, dtype));
            const double mid = ((double)moe_f32_from_bits(a) + (double)moe_f32_from_bits(b)) / 2;
            const uint32_t u = mid == mid ? moe_f32_bits((float)mid) : a;
            single[4 * i] = moe_f32_from_bits(u);
            single[4 * i + 1] = moe_f32_from_bits(u - 1);
            single[4 * i + 2] = moe_f32_from_bits(u + 1);
            single[4 * i + 3] = moe_f32_from_bits(a + 1);
        }
        for (int i = 4 * n; i < m; ++i) {
            const uint32_t bits = (uint32_t)trand_bits(&r);
            single[i] = i & 1 ? moe_f32_from_bits(bits) : trand_normal(&r) * 100.0f;
        }
        bad_narrow = 0;
        for (int i = 0; i < m; ++i) {
            moe_store(narrow, i, dtype, single[i]);
            if (narrow[i] != slow_nearest(single[i], dtype) && bad_narrow++ == 0)
                CHECK(0, "%s: %a gives %04x, not %04x", moe_dtype_name(dtype), (double)single[i],
                      narrow[i], slow_nearest(single[i], dtype));
        }
        CHECK(bad_narrow == 0, "%s: %lld floats", moe_dtype_name(dtype), (long long)bad_narrow);

        for (int pairs = 0; pairs < 2; ++pairs) {
            tbuf h = tbuf_from("half", half, (size_t)n * 2, 0);
            tbuf s = tbuf_from("single", single, (size_t)m * 4, 0);
            tbuf w = tbuf_new("widened", (size_t)n * 4, 0);
            tbuf v = tbuf_new("narrowed", (size_t)m * 2, 0);
            tbuf o = tbuf_new("ordered", (size_t)m * 4, 0);
            tbuf q = tbuf_new("unordered", (size_t)m * 4, 0);
            moe_launch_config c = moe_grid(8, 256, 0, test_now.stream);
            convert_args a;
            int64_t bad[4] = {0, 0, 0, 0};
            a.half = (const uint16_t*)h.p;
            a.single = (const float*)s.p;
            a.widened = (float*)w.p;
            a.narrowed = (uint16_t*)v.p;
            a.ordered = (uint32_t*)o.p;
            a.unordered = (float*)q.p;
            a.n = n;
            a.m = m;
            a.dtype = dtype;
            a.pairs = pairs;
            CHECK_STATUS(MOE_LAUNCH(convert_kernel, c, a), MOE_OK);
            {
                float* wide = (float*)tbuf_copy(&w);
                uint16_t* thin = (uint16_t*)tbuf_copy(&v);
                uint32_t* order = (uint32_t*)tbuf_copy(&o);
                float* back = (float*)tbuf_copy(&q);
                for (int i = 0; i < n; ++i)
                    bad[0] += !same_float(wide[i], moe_load(half, i, dtype));
                for (int i = 0; i < m; ++i) {
                    const int j = i ? i - 1 : 0;
                    const float x = single[i], y = single[j];
                    bad[1] += thin[i] != narrow[i];
                    if (x == x)
                        bad[2] += x == 0 ? back[i] != 0 || order[i] == 0 : !same_float(back[i], x);
                    if (x == x && y == y)
                        bad[3] +=
                            (order[i] < order[j]) != (x < y) || (order[i] == order[j]) != (x == y);
                }
                free(wide);
                free(thin);
                free(order);
                free(back);
            }
            CHECK(bad[0] == 0, "%s widens %lld patterns otherwise than C", moe_dtype_name(dtype),
                  (long long)bad[0]);
            CHECK(bad[1] == 0, "%s narrows %lld floats otherwise than C", moe_dtype_name(dtype),
                  (long long)bad[1]);
            CHECK(bad[2] == 0 && bad[3] == 0, "order of floats: %lld, %lld", (long long)bad[2],
                  (long long)bad[3]);
            tbuf_free(&h);
            tbuf_free(&s);
            tbuf_free(&w);
            tbuf_free(&v);
            tbuf_free(&o);
            tbuf_free(&q);
        }
    }
    free(half);
    free(narrow);
    free(single);
}

static void base_numeric(void)
{
    RUN(test_conversions);
}

#endif
