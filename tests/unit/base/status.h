/* status.h: base/status.h, fields.h, base/check.h

   test_status_texts    the text of every status and field
   test_status_garbage  no value passes the buffer or the tables
   test_buffers         two buffers at any distance, read or written */
#ifndef MOE_TESTS_BASE_STATUS_H
#define MOE_TESTS_BASE_STATUS_H

#include "tests/test.h"

#include "moe/base/check.h"
#include "moe/layout.h"

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

static void base_status(void)
{
    RUN(test_status_texts);
    RUN(test_status_garbage);
    RUN(test_buffers);
}

#endif
