/* test_case.h: what the cases of many tests repeat: comparisons with two bounds, faults, indices
   that are out of range, numbers to add to. */
#ifndef MOE_TESTS_TEST_CASE_H
#define MOE_TESTS_TEST_CASE_H

#include "tests/test.h"

/* Frees host memory: TFREE(p, q). Null is allowed. */
#define TFREE(...)                                                                                 \
    do {                                                                                           \
        void* const all_[] = {__VA_ARGS__};                                                        \
        for (size_t i_ = 0; i_ < sizeof all_ / sizeof *all_; ++i_) free(all_[i_]);                 \
    } while (0)

/* An address far from all buffers, for descriptors that are refused: nothing is launched. */
#define TEST_FAR ((char*)((uintptr_t)1 << 44))

/* Returns an index outside 0 .. end - 1, and not -1: one of four, by `how`. */
MOEI_UNUSED static int32_t test_out_of_range(int64_t how, int64_t end)
{
    return how % 4 == 0 ? (int32_t)end : how % 4 == 1 ? INT32_MAX : how % 4 == 2 ? -2 : INT32_MIN;
}

/* Fills every number of a buffer with 2, for results that are added to. */
MOEI_UNUSED static void put_twos(tbuf* b, int dtype)
{
    const int64_t n = (int64_t)b->bytes / moe_dtype_bytes(dtype);
    void* p = test_host(n * 4);
    for (int64_t i = 0; i < n; ++i) moe_store(p, i, dtype, 2.0f);
    tbuf_put(b, p);
    free(p);
}

/* Puts a fault of TEST_RANK into a fault word, or none where the code is MOE_FAULT_NONE. */
MOEI_UNUSED static void tfault_put(tbuf* b, int code, int64_t index)
{
    const uint64_t word = code == MOE_FAULT_NONE ? 0 : MOEI_FAULT_KEY(code, TEST_RANK, index);
    tbuf_put(b, &word);
}

/* Requires this fault at index `at`, or none where `at` is negative. */
#define CHECK_FAULT_AT(buffer, code, at)                                                           \
    CHECK_FAULT(buffer, (at) < 0 ? MOE_FAULT_NONE : (code), (at) < 0 ? 0 : (at))

/* Rounds n numbers to what a buffer of this dtype keeps of them. `to` may be `from`. */
MOEI_UNUSED static void test_round_all(double* to, const double* from, int64_t n, int dtype)
{
    for (int64_t i = 0; i < n; ++i) to[i] = test_rounded(from[i], dtype);
}

/* Compares dense fp32 results twice: within the house bound of CHECK_CLOSE and, each element by
   itself, within bound[i]. */
#define CHECK_CLOSE_BOTH(what, got, exact, ideal, bound, rows, cols)                               \
    test_close_both((what), (got), (exact), (ideal), (bound), (rows), (cols), __FILE__, __LINE__)
MOEI_UNUSED static int test_close_both(const char* what, const float* got, const double* exact,
                                       const double* ideal, const double* bound, int64_t rows,
                                       int64_t cols, const char* file, int line)
{
    const int ok = test_close(what, got, MOE_FP32, cols, exact, ideal, rows, cols, file, line);
    return test_within(what, got, MOE_FP32, cols, exact, bound, 1, rows, cols, file, line) && ok;
}

#endif
