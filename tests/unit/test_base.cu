/* test_base.cu: moe/base: status texts, the fault word, conversions, warp and block primitives,
   asynchronous copies, random numbers, exp and silu.

     nvcc -I. -arch=sm_90a tests/unit/test_base.cu -o test_base
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_base.cu -o test_base */
#include "tests/test.h"

#include "moe/base/block.cuh"
#include "moe/base/check.h"
#include "moe/base/copy.cuh"
#include "moe/base/fault.cuh"
#include "moe/activation.cuh"
#include "moe/base/random.h"
#include "moe/base/warp.cuh"
#include "moe/layout.h"

/* ---- base/status.h, fields.h ---- */

static void test_status_texts(void)
{
    static const char* const kind_text[] = {
#define KIND(name, text) text,
        MOEI_STATUS_LIST(KIND)
#undef KIND
    };
    static const char* const field_name[] = {"",
#define FIELD(name) #name,
                                             MOEI_FIELD_LIST(FIELD)
#undef FIELD
    };
    for (int kind = 0; kind < MOE_STATUS_KINDS; ++kind) {
        CHECK(strcmp(moe_status_text(kind), kind_text[kind]) == 0, "kind %d", kind);
        CHECK(kind_text[kind][0] != 0, "kind %d has no text", kind);
        for (int other = 0; other < kind; ++other)
            CHECK(strcmp(kind_text[kind], kind_text[other]) != 0, "%d and %d", kind, other);
        for (int field = 0; field < MOE_NUM_FIELDS; ++field) {
            const moe_status s = (moe_status)(kind | (field << 8));
            char want[256], got[MOE_STATUS_TEXT + 16];
            CHECK(moe_status_kind(s) == kind && moe_status_detail(s) == field);
            memset(got, 0x7f, sizeof got);
            CHECK(moe_status_describe(s, got) == got);
            if (kind == MOE_ERR_CUDA) {
                CHECK(moe_status_field(s)[0] == 0, "a CUDA error names no field");
                snprintf(want, sizeof want, "%s %d", kind_text[kind], field);
            } else {
                CHECK(strcmp(moe_status_field(s), field_name[field]) == 0, "field %d", field);
                snprintf(want, sizeof want, "%s%s%s", field_name[field], field ? ": " : "",
                         kind_text[kind]);
            }
            CHECK(strcmp(got, want) == 0, "\"%s\", not \"%s\"", got, want);
            for (int i = MOE_STATUS_TEXT; i < MOE_STATUS_TEXT + 16; ++i) CHECK(got[i] == 0x7f);
        }
    }
    CHECK(MOE_STATUS(MOE_ERR_RANGE, top_k) == (MOE_ERR_RANGE | (MOE_FIELD_top_k << 8)));
    CHECK(strcmp(field_name[MOE_FIELD_top_k], "top_k") == 0);
    CHECK(strcmp(field_name[MOE_FIELD_fault], "fault") == 0);
    CHECK(moe_cuda_status(cudaSuccess) == MOE_OK);
    {
        char text[MOE_STATUS_TEXT];
        const moe_status s = moe_cuda_status(cudaErrorInvalidValue);
        CHECK(moe_status_kind(s) == MOE_ERR_CUDA);
        CHECK(moe_status_detail(s) == (int)cudaErrorInvalidValue);
        CHECK(strcmp(moe_status_describe(MOE_ERR_CUDA | (700 << 8), text), "CUDA error 700") == 0);
        CHECK(strcmp(moe_status_describe(MOE_STATUS(MOE_ERR_RANGE, top_k), text),
                     "top_k: out of range") == 0);
    }
}

/* No value, however wrong, gets past the buffer or past the tables. */
static void test_status_garbage(void)
{
    trand r = trand_new(1);
    for (int i = 0; i < 20000; ++i) {
        const moe_status s = i == 0 ? INT32_MIN : i == 1 ? INT32_MAX : (moe_status)trand_bits(&r);
        char got[MOE_STATUS_TEXT + 16];
        int printable = 1, end = 0;
        memset(got, 0x7f, sizeof got);
        moe_status_describe(s, got);
        while (end < MOE_STATUS_TEXT && got[end]) {
            printable &= got[end] >= 32 && got[end] < 127;
            ++end;
        }
        CHECK(end < MOE_STATUS_TEXT && end > 0, "%08x is not terminated", (unsigned)s);
        CHECK(printable, "%08x gives \"%s\"", (unsigned)s, got);
        for (int j = MOE_STATUS_TEXT; j < MOE_STATUS_TEXT + 16; ++j) CHECK(got[j] == 0x7f);
        CHECK(moe_status_text(s)[0] != 0);
    }
    CHECK(strcmp(moe_status_text(200), "unknown status") == 0);
    CHECK(moe_status_field(MOE_ERR_RANGE | (MOE_NUM_FIELDS << 8))[0] == 0);
}

static moe_status require_positive(int v)
{
    MOE_REQUIRE(v > 0, MOE_ERR_RANGE, hidden);
    return MOE_OK;
}

static moe_status try_positive(int v)
{
    MOE_TRY(require_positive(v));
    return MOE_STATUS(MOE_ERR_OPTION, score);
}

/* Two buffers at any distance, read or written; what is named where several things are wrong. */
static void test_buffers(void)
{
    char m[64];
    CHECK_STATUS(require_positive(1), MOE_OK);
    CHECK_STATUS(try_positive(0), MOE_STATUS(MOE_ERR_RANGE, hidden));
    CHECK_STATUS(try_positive(1), MOE_STATUS(MOE_ERR_OPTION, score));
    for (int at = 0; at < 40; ++at)
        for (int bytes = 0; bytes < 12; ++bytes)
            for (int use = 0; use < 4; ++use) { /* bit 0: x is written, bit 1: y is */
                const moe_buffer b[] = {
                    {m + 16, 8, 1, use & 1 ? MOE_BUFFER_WRITTEN : MOE_BUFFER_READ, MOE_FIELD_x},
                    {m + at, (uint64_t)bytes, 1, use & 2 ? MOE_BUFFER_WRITTEN : MOE_BUFFER_READ,
                     MOE_FIELD_y}};
                const int overlap = use && bytes > 0 && at < 24 && at + bytes > 16;
                CHECK_STATUS(moe_check_buffers(b, 2), !overlap  ? MOE_OK
                                                      : use & 2 ? MOE_STATUS(MOE_ERR_OVERLAP, y)
                                                                : MOE_STATUS(MOE_ERR_OVERLAP, x));
            }
    {
        const moe_buffer b[] = {{0, 64, 1, MOE_BUFFER_WRITTEN, MOE_FIELD_x},
                                {0, 64, 16, MOE_BUFFER_WRITTEN, MOE_FIELD_y},
                                {0, 0, 1, MOE_BUFFER_REQUIRED, MOE_FIELD_w1}};
        CHECK_STATUS(moe_check_buffers(b, 3), MOE_OK); /* absent, or nothing in it */
    }
    {
        moe_buffer b[] = {{(void*)72, 64, 16, MOE_BUFFER_WRITTEN, MOE_FIELD_x},
                          {(void*)80, 64, 16, MOE_BUFFER_WRITTEN, MOE_FIELD_y},
                          {0, 1, 1, MOE_BUFFER_REQUIRED, MOE_FIELD_w1}};
        CHECK_STATUS(moe_check_buffers(b, 3), MOE_STATUS(MOE_ERR_NULL, w1));
        CHECK_STATUS(moe_check_buffers(b, 2), MOE_STATUS(MOE_ERR_ALIGN, x));
        b[0].p = (void*)64;
        CHECK_STATUS(moe_check_buffers(b, 2), MOE_STATUS(MOE_ERR_OVERLAP, y));
        CHECK_STATUS(moe_check_buffers(b, 1), MOE_OK);
    }
    CHECK(moei_aligned((void*)64, 16) && !moei_aligned((void*)72, 16) && moei_aligned(0, 16));
    CHECK(moe_extent(0, 8, 8, MOE_FP32) == 0 && moe_extent(3, 8, 0, MOE_FP32) == 0);
    CHECK(moe_extent(3, 10, 8, MOE_FP32) == 28 * 4 && moe_extent(3, 10, 8, MOE_BF16) == 28 * 2);
    CHECK(moe_extent(600000, 7168, 7168, MOE_BF16) == 600000ull * 7168 * 2, "past 2^32 bytes");
    CHECK(moe_num_chunks(0) == 0 && moe_num_chunks(1) == 1);
    CHECK(moe_num_chunks(16) == 1 && moe_num_chunks(17) == 2);
    CHECK(moe_chunk_tokens(2048) == 16 && moe_chunk_tokens(2049) == 32);
    for (int64_t t = 1; t < 1ll << 40; t += t / 3 + 1) {
        const int64_t each = moe_chunk_tokens(t), chunks = moe_num_chunks(t);
        CHECK(each % 16 == 0 && chunks <= MOE_MAX_CHUNKS && (chunks - 1) * each < t &&
                  t <= chunks * each,
              "%lld tokens", (long long)t);
    }
}

/* ---- base/fault.h, faults.h ---- */

static void test_fault_order(void)
{
    static const int64_t index[] = {0, 1, 2, 1000, 0x7fffffff, 0x80000000ll, 0xfffffffffffll};
    static const int rank[] = {0, 1, 7, 4095};
    uint64_t before = ~(uint64_t)0;
    static const int codes[] = {
#define CODE(name, code, text) code,
        MOEI_FAULT_LIST(CODE)
#undef CODE
    };
    const int num_codes = (int)(sizeof codes / sizeof codes[0]);
    for (int c = 1; c < num_codes; ++c)
        for (int r = 0; r < 4; ++r)
            for (int i = 0; i < 7; ++i) {
                const int code = codes[c];
                const uint64_t word = MOEI_FAULT_KEY(code, rank[r], index[i]);
                const moe_fault f = moe_fault_decode(word);
                CHECK(word != 0 && word < before, "code, rank, index is the order");
                CHECK(f.code == code && f.rank == rank[r] && f.index == index[i]);
                CHECK(MOEI_FAULT_STOPS(word) == (code <= MOE_FAULT_LAST_STOP), "code %d", code);
                before = word;
            }
    CHECK(moe_fault_decode(0).code == MOE_FAULT_NONE && !MOEI_FAULT_STOPS((uint64_t)0));
    CHECK((int)MOE_FAULT_NO_ROOM <= (int)MOE_FAULT_LAST_STOP &&
          (int)MOE_FAULT_LAST_STOP < (int)MOE_FAULT_NAN_LOGIT);
    for (int c = 0; c < num_codes; ++c) {
        CHECK(moe_fault_text(codes[c])[0] != 0);
        CHECK(strcmp(moe_fault_text(codes[c]), "unknown fault") != 0, "code %d", codes[c]);
        for (int other = 0; other < c; ++other)
            CHECK(codes[other] < codes[c] &&
                  strcmp(moe_fault_text(codes[c]), moe_fault_text(codes[other])) != 0);
    }
    CHECK(strcmp(moe_fault_text(-1), "unknown fault") == 0);
    CHECK(strcmp(moe_fault_text(MOE_FAULT_LAST_STOP), "unknown fault") == 0);
}

typedef struct fault_args {
    uint64_t* word;
    int32_t* stopped; /* [threads of the grid] */
    int64_t index;
    int32_t code, rank;
    int32_t n; /* threads that raise, each with another index; the last of them has `index` */
} fault_args;

MOE_KERNEL(256, 1) fault_kernel(MOE_ARG(fault_args) d)
{
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    d.stopped[i] = moe_fault_stopped(d.word);
    if (i < d.n) moe_fault_raise(d.word, d.code, d.rank, d.index + (d.n - 1 - i));
}

static void test_fault_raise(void)
{
    tbuf word = tfault_new(0), stopped = tbuf_new("stopped", 4 * 256 * 4, 0);
    int32_t* got = 0;
    moe_launch_config c = moe_grid(4, 256, 0, test_now.stream);
    fault_args a;
    a.word = (uint64_t*)word.p;
    a.stopped = (int32_t*)stopped.p;
    a.code = MOE_FAULT_BAD_ID;
    a.rank = 3;
    a.index = 5;
    a.n = 1000;
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(tfault_word(&word) == MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, 3, 5), "the smallest index wins");
    a.code = MOE_FAULT_BAD_PLACE; /* a later code does not replace it */
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(tfault_word(&word) == MOEI_FAULT_KEY(MOE_FAULT_BAD_ID, 3, 5), "sticky");
    got = (int32_t*)tbuf_copy(&stopped);
    for (int i = 0; i < 4 * 256; ++i) CHECK(got[i] == 0, "a data fault stops nothing");
    free(got);
    a.code = MOE_FAULT_BAD_OFFSET;
    a.n = 1;
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(tfault_word(&word) == MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, 3, 5), "an earlier code does");
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    got = (int32_t*)tbuf_copy(&stopped);
    for (int i = 0; i < 4 * 256; ++i) CHECK(got[i] == 1, "thread %d did not see the stop", i);
    free(got);
    for (int i = 0; i < 2 * 4 * 6; ++i) { /* every part of the key */
        static const int32_t ranks[] = {0, 1, 3000, MOE_FAULT_MAX_RANK};
        static const int64_t indices[] = {0, 1, 0xffffffff, 0x100000000, 0xfffffffffff, -1};
        const uint64_t none = 0;
        tbuf_put(&word, &none);
        a.code = i % 2 ? MOE_FAULT_NAN_LOGIT : MOE_FAULT_NO_ROOM;
        a.rank = ranks[i / 2 % 4];
        a.index = indices[i / 8];
        CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
        CHECK(tfault_word(&word) == MOEI_FAULT_KEY(a.code, a.rank, a.index),
              "code %d rank %d index %lld", a.code, a.rank, (long long)a.index);
    }
    a.word = 0; /* no word: nothing is raised, nothing stops */
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    got = (int32_t*)tbuf_copy(&stopped);
    for (int i = 0; i < 4 * 256; ++i) CHECK(got[i] == 0);
    free(got);
    tbuf_free(&word);
    tbuf_free(&stopped);
}

/* ---- types.h and numeric.cuh: conversions ---- */

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

/* ---- warp.cuh and block.cuh ---- */

typedef struct scan_args {
    const int32_t* in; /* [blockDim] */
    int32_t* out;      /* [3, blockDim]: two scans with one scratch, and the total */
    int32_t* warp;     /* [blockDim] inclusive scan of each warp */
    float* sum;        /* [6, blockDim] groups of 2, 4, 8, 16, 32 lanes, and the block */
    float* max;        /* [5, blockDim] */
} scan_args;

MOE_KERNEL(1024, 1) scan_kernel(MOE_ARG(scan_args) d)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    const int i = (int)threadIdx.x, n = (int)blockDim.x, v = d.in[i];
    int total, total2;
    const int first = moe_block_exclusive_scan(v, &scratch, &total);
    d.out[i] = first;
    d.out[n + i] = moe_block_exclusive_scan(first, &scratch, &total2);
    d.out[2 * n + i] = total;
    d.warp[i] = moe_warp_inclusive_scan(v);
    for (int w = 0; w < 5; ++w) {
        d.sum[w * n + i] = moe_warp_sum((float)v, 2 << w);
        d.max[w * n + i] = moe_warp_max((float)v, 2 << w);
    }
    d.sum[5 * n + i] = moe_block_sum((float)v, &scratch);
}

static void test_scans(void)
{
    trand r = trand_new(3);
    for (int n = 32; n <= 1024; n += 32) {
        int32_t *in = (int32_t*)test_host(n * 4), *out, *warp;
        float *sum, *max;
        int at = 0, at2 = 0, total = 0;
        scan_args a;
        moe_launch_config c = moe_grid(1, n, 0, test_now.stream);
        tbuf bi, bo = tbuf_new("out", (size_t)n * 12, 0), bw = tbuf_new("warp", (size_t)n * 4, 0);
        tbuf bs = tbuf_new("sum", (size_t)n * 24, 0), bm = tbuf_new("max", (size_t)n * 20, 0);
        for (int i = 0; i < n; ++i) total += in[i] = (int32_t)trand_int(&r, -1000, 1000);
        bi = tbuf_from("in", in, (size_t)n * 4, 0);
        a.in = (const int32_t*)bi.p;
        a.out = (int32_t*)bo.p;
        a.warp = (int32_t*)bw.p;
        a.sum = (float*)bs.p;
        a.max = (float*)bm.p;
        CHECK_STATUS(MOE_LAUNCH(scan_kernel, c, a), MOE_OK);
        out = (int32_t*)tbuf_copy(&bo);
        warp = (int32_t*)tbuf_copy(&bw);
        sum = (float*)tbuf_copy(&bs);
        max = (float*)tbuf_copy(&bm);
        for (int i = 0; i < n; ++i) {
            int in_warp = 0;
            for (int j = i & ~31; j <= i; ++j) in_warp += in[j];
            CHECK(out[i] == at, "n=%d thread %d: %d, not %d", n, i, out[i], at);
            CHECK(out[n + i] == at2, "n=%d thread %d, second scan", n, i);
            CHECK(out[2 * n + i] == total, "n=%d thread %d: total", n, i);
            CHECK(warp[i] == in_warp, "n=%d thread %d: scan of the warp", n, i);
            CHECK(sum[5 * n + i] == (float)total, "n=%d thread %d: sum of the block", n, i);
            at2 += at;
            at += in[i];
            for (int w = 0; w < 5; ++w) {
                const int width = 2 << w, begin = i / width * width;
                float s = 0, m = (float)in[begin];
                for (int j = begin; j < begin + width; ++j) {
                    s += (float)in[j];
                    m = (float)in[j] > m ? (float)in[j] : m;
                }
                CHECK(sum[w * n + i] == s, "n=%d thread %d: sum of %d", n, i, width);
                CHECK(max[w * n + i] == m, "n=%d thread %d: maximum of %d", n, i, width);
            }
        }
        free(in);
        free(out);
        free(warp);
        free(sum);
        free(max);
        tbuf_free(&bi);
        tbuf_free(&bo);
        tbuf_free(&bw);
        tbuf_free(&bs);
        tbuf_free(&bm);
    }
}

/* ---- copy.cuh ---- */

#define COPY_THREADS 64
#define COPY_STAGES 3

typedef struct copy_args {
    const uint4* in; /* [steps, threads] */
    uint4* out;      /* [steps, threads] through shared memory, shifted by one thread */
    uint4* once;     /* [steps, threads] through registers */
    int32_t steps;
} copy_args;

typedef struct copy_stages {
    uint4 at[COPY_STAGES][COPY_THREADS];
} copy_stages;

/* A ring of stages: step s + 2 is under way while step s is read. A piece copies 0, 2, ... 16
   bytes and has zeros behind them. */
MOE_KERNEL(COPY_THREADS, 1) copy_kernel(MOE_ARG(copy_args) d)
{
    MOE_SHARED(copy_stages, stage);
    const int i = (int)threadIdx.x, next = (i + 1) % COPY_THREADS;
    for (int s = 0; s < COPY_STAGES - 1; ++s) {
        const int at = s * COPY_THREADS + i;
        if (s < d.steps) moei_copy16_async(&stage.at[s][i], d.in + at, at % 9 * 2);
        moei_copy_commit();
    }
    for (int s = 0; s < d.steps; ++s) {
        const int ahead = s + COPY_STAGES - 1, at = ahead * COPY_THREADS + i;
        moei_copy_wait(COPY_STAGES - 2);
        __syncthreads();
        if (ahead < d.steps)
            moei_copy16_async(&stage.at[ahead % COPY_STAGES][i], d.in + at, at % 9 * 2);
        moei_copy_commit();
        moei_store16(d.out + s * COPY_THREADS + i, stage.at[s % COPY_STAGES][next]);
        moei_store16(d.once + s * COPY_THREADS + i, moei_load16(d.in + s * COPY_THREADS + i));
    }
}

static void test_async_copy(void)
{
    static const int steps[] = {1, 2, 3, 4, 17};
    trand r = trand_new(4);
    for (int v = 0; v < 5; ++v) {
        const int n = steps[v] * COPY_THREADS;
        uint32_t *in = (uint32_t*)test_host(n * 16), *out, *once;
        moe_launch_config c = moe_grid(1, COPY_THREADS, 0, test_now.stream);
        copy_args a;
        tbuf bi, bo = tbuf_new("out", (size_t)n * 16, 0), bp = tbuf_new("once", (size_t)n * 16, 0);
        for (int i = 0; i < n * 4; ++i) in[i] = (uint32_t)trand_bits(&r) | 1u;
        bi = tbuf_from("in", in, (size_t)n * 16, 0);
        a.in = (const uint4*)bi.p;
        a.out = (uint4*)bo.p;
        a.once = (uint4*)bp.p;
        a.steps = steps[v];
        CHECK_STATUS(MOE_LAUNCH(copy_kernel, c, a), MOE_OK);
        out = (uint32_t*)tbuf_copy(&bo);
        once = (uint32_t*)tbuf_copy(&bp);
        for (int i = 0; i < n; ++i) {
            const int from = i / COPY_THREADS * COPY_THREADS + (i + 1) % COPY_THREADS;
            const int bytes = from % 9 * 2;
            unsigned char want[16];
            memset(want, 0, 16);
            memcpy(want, in + 4 * from, (size_t)bytes);
            CHECK(memcmp(want, out + 4 * i, 16) == 0, "steps=%d piece %d, %d bytes", steps[v], i,
                  bytes);
        }
        CHECK(memcmp(once, in, (size_t)n * 16) == 0, "steps=%d: plain copies", steps[v]);
        free(in);
        free(out);
        free(once);
        tbuf_free(&bi);
        tbuf_free(&bo);
        tbuf_free(&bp);
    }
}

/* ---- random.h ---- */

typedef struct random_args {
    uint32_t* words; /* [3][4] */
} random_args;

/* Counter and key of a known answer. */
MOE_HOST_DEVICE moe_random4 random_known(int i)
{
    const uint32_t ones = 0xffffffffu;
    if (i == 0) return moe_random_words(0, 0, 0, 0, 0);
    if (i == 1) return moe_random_words(~(uint64_t)0, ones, ones, ones, ones);
    return moe_random_words(0x299f31d0a4093822u, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u);
}

MOE_KERNEL(32, 1) random_kernel(MOE_ARG(random_args) d)
{
    for (int i = (int)threadIdx.x; i < 3; i += 32) {
        const moe_random4 r = random_known(i);
        d.words[i * 4] = r.x, d.words[i * 4 + 1] = r.y;
        d.words[i * 4 + 2] = r.z, d.words[i * 4 + 3] = r.w;
    }
}

/* The answers that the authors of Philox4x32-10 publish, on the host and on the device. */
static void test_random_known(void)
{
    static const uint32_t want[] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u,
                                    0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu,
                                    0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u};
    moe_launch_config c = moe_grid(1, 32, 0, test_now.stream);
    tbuf words = tbuf_new("words", sizeof want, 0);
    random_args a;
    for (int i = 0; i < 3; ++i) {
        const moe_random4 r = random_known(i);
        CHECK(r.x == want[i * 4] && r.y == want[i * 4 + 1] && r.z == want[i * 4 + 2] &&
                  r.w == want[i * 4 + 3],
              "answer %d: %08x %08x %08x %08x", i, r.x, r.y, r.z, r.w);
    }
    a.words = (uint32_t*)words.p;
    CHECK_STATUS(MOE_LAUNCH(random_kernel, c, a), MOE_OK);
    CHECK(tbuf_holds(&words, want), "on the device");
    tbuf_free(&words);
}

/* ---- numeric.cuh: exp, silu, NaN ---- */

typedef struct exp_args {
    const float* x; /* [n] */
    float* exp;     /* [n] */
    float* silu;    /* [n] */
    int32_t* nan;   /* [n] */
    int32_t n;
} exp_args;

MOE_KERNEL(256, 1) exp_kernel(MOE_ARG(exp_args) d)
{
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < d.n;
         i += (int)(gridDim.x * blockDim.x)) {
        d.exp[i] = moe_exp(d.x[i]);
        d.silu[i] = moei_sigmoid_unit(d.x[i], -1.44269504f);
        d.nan[i] = moei_is_nan(d.x[i]);
    }
}

/* Distance of the floats around `v`. */
static double ulp_of(double v)
{
    int e;
    frexp(v, &e);
    return ldexp(1, e - 24 < -149 ? -149 : e - 24);
}

static void test_exp(void)
{
    const int n = MOE_ON_HOST ? 200000 : 4000000;
    float *x = (float*)test_host((int64_t)n * 4), *e, *s;
    int32_t* nan;
    double worst = 0, worst_at = 0, worst_silu = 0, worst_silu_at = 0;
    moe_launch_config c = moe_grid(MOE_ON_HOST ? 4 : 256, 256, 0, test_now.stream);
    exp_args a;
    tbuf bx, be = tbuf_new("exp", (size_t)n * 4, 0), bs = tbuf_new("silu", (size_t)n * 4, 0);
    tbuf bn = tbuf_new("nan", (size_t)n * 4, 0);
    trand r = trand_new(5);
    static const float special[] = {0.0f,    -0.0f,     INFINITY, -INFINITY, NAN,    1.0f,
                                    -1.0f,   88.72283f, 88.8f,    1e30f,     -1e30f, -87.33f,
                                    -104.5f, -200.0f,   1e-40f,   -1e-40f};
    for (int i = 0; i < n; ++i) /* the whole range, and more of what softmax sees */
        x[i] = i & 1 ? -104.0f + 193.0f * (float)((double)i / n) : trand_normal(&r) * 5.0f;
    memcpy(x, special, sizeof special);
    bx = tbuf_from("x", x, (size_t)n * 4, 0);
    a.x = (const float*)bx.p;
    a.exp = (float*)be.p;
    a.silu = (float*)bs.p;
    a.nan = (int32_t*)bn.p;
    a.n = n;
    CHECK_STATUS(MOE_LAUNCH(exp_kernel, c, a), MOE_OK);
    e = (float*)tbuf_copy(&be);
    s = (float*)tbuf_copy(&bs);
    nan = (int32_t*)tbuf_copy(&bn);
    CHECK(e[0] == 1.0f && e[1] == 1.0f, "exp(0) is %g, exp(-0) %g", e[0], e[1]);
    CHECK(moe_f32_bits(e[2]) == 0x7f800000u && moe_f32_bits(e[3]) == 0, "exp of the infinities");
    CHECK(moe_f32_bits(e[9]) == 0x7f800000u && moe_f32_bits(e[10]) == 0, "exp far outside");
    CHECK(moe_f32_bits(e[8]) == 0x7f800000u && moe_f32_bits(e[13]) == 0, "exp just outside");
    CHECK(s[0] == 0.0f && s[1] == 0.0f && s[9] == 1e30f && s[10] == 0.0f, "silu at the ends");
    for (int i = 0; i < n; ++i) {
        const double v = x[i], want = exp(v), silu = v / (1 + exp(-v));
        CHECK(nan[i] == (x[i] != x[i]));
        if (!(fabs(v) < 1000)) continue;
        if (want < ldexp(1, 128)) {
            /* --use_fast_math may flush what is below 2^-126 */
            const double floor = want < ldexp(1, -126) ? ldexp(1, -126) : 0;
            const double error = fabs(e[i] - want) / ulp_of(want);
            const double slack = floor > 0 ? floor / ulp_of(want) : 0;
            CHECK(error <= 3 || (slack > 0 && fabs(e[i] - want) <= floor), "exp(%.9g): %.2f ulp", v,
                  error);
            if (slack == 0 && error > worst) {
                worst = error;
                worst_at = v;
            }
        }
        { /* |silu| is tiny below -80: the absolute error counts there */
            const double error = fabs(s[i] - silu) / (fabs(silu) + 1e-30);
            CHECK(fabs(s[i] - silu) <= 2e-6 * fabs(silu) * (1 + fabs(v) / 8) + 1e-30,
                  "silu(%.9g): %.9g, not %.9g", v, (double)s[i], silu);
            if (fabs(v) < 20 && error > worst_silu) {
                worst_silu = error;
                worst_silu_at = v;
            }
        }
    }
    if (test_now.verbose)
        printf("  exp: at most %.2f ulp (at %g); silu: %.3g relative (at %g, |x| < 20)\n", worst,
               worst_at, worst_silu, worst_silu_at);
    free(x);
    free(e);
    free(s);
    free(nan);
    tbuf_free(&bx);
    tbuf_free(&be);
    tbuf_free(&bs);
    tbuf_free(&bn);
}

/* ---- cuda.cuh ---- */

static void test_device(void)
{
    moe_device d;
    moe_launch_config c = moe_grid(3, 64, 128, test_now.stream);
    memset(&d, 0, sizeof d);
    CHECK_STATUS(moe_device_query(&d), MOE_OK);
    CHECK(d.sms > 0 && d.smem_block >= 48 * 1024 && d.smem_sm >= d.smem_block && d.major >= 7,
          "%d SMs, %d and %d bytes, major %d", d.sms, d.smem_block, d.smem_sm, d.major);
    CHECK(c.grid.x == 3 && c.grid.y == 1 && c.grid.z == 1 && c.block.x == 64 && c.smem == 128);
    CHECK(c.dependent == 0 && c.cluster == 0 && c.stream == test_now.stream);
    CHECK_STATUS(moe_preload_kernel((const void*)scan_kernel), MOE_OK);
}

/* A launch that cannot be made comes back as a status and leaves the outputs alone; a pending
   error of the caller's own is not swallowed by a launch that works. */
static void test_launch_errors(void)
{
#if !MOE_ON_HOST
    tbuf word = tfault_new(0), stopped = tbuf_new("stopped", 2048 * 4, 0);
    moe_launch_config c = moe_grid(1, 2048, 0, test_now.stream);
    fault_args a;
    a.word = (uint64_t*)word.p;
    a.stopped = (int32_t*)stopped.p;
    a.code = MOE_FAULT_BAD_ID;
    a.n = 1;
    CHECK(moe_status_kind(MOE_LAUNCH(fault_kernel, c, a)) == MOE_ERR_CUDA, "2048 threads");
    (void)cudaGetLastError();
    CHECK(tbuf_holds(&stopped, 0), "outputs untouched");
    (void)cudaMemcpy(a.stopped, a.stopped, 4, (cudaMemcpyKind)99);
    CHECK(cudaPeekAtLastError() != cudaSuccess);
    c = moe_grid(1, 256, 0, test_now.stream);
    CHECK_STATUS(MOE_LAUNCH(fault_kernel, c, a), MOE_OK);
    CHECK(cudaGetLastError() != cudaSuccess, "the caller's pending error is still there");
    CHECK(tfault_word(&word) != 0);
    tbuf_free(&word);
    tbuf_free(&stopped);
#endif
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_status_texts);
    RUN(test_status_garbage);
    RUN(test_buffers);
    RUN(test_fault_order);
    RUN(test_fault_raise);
    RUN(test_conversions);
    RUN(test_scans);
    RUN(test_async_copy);
    RUN(test_random_known);
    RUN(test_exp);
    RUN(test_device);
    RUN(test_launch_errors);
    return test_end();
}
