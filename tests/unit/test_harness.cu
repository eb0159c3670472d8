/* test_harness.cu: what tests/test.h counts as passed and as skipped, and rows far apart.

     nvcc -I. -arch=sm_90a tests/unit/test_harness.cu -o test_harness
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_harness.cu -o test_harness

   tests/CMakeLists.txt also runs test_no_check alone: the program's exit code is then 77.

   test_no_check        no check: skipped
   test_no_memory       no memory: skipped
   test_skipped         the two above count as skipped
   test_arguments       arguments choose tests
   test_rows_far_apart  the last row begins past 2^32 elements */
#include "tests/test.h"

static void test_no_check(void) {}

static void test_no_memory(void)
{
    if (!test_has_memory((size_t)1 << 60)) return;
    CHECK(0, "as much as 2^60 bytes");
}

/* The tests above have not passed, and left no reason behind. */
static void test_skipped(void)
{
    const int rep = (int)(test_now.seed - test_now.base_seed);
    CHECK(test_now.passed == rep && test_now.failed == 0, "%d passed, %d failed", test_now.passed,
          test_now.failed);
    CHECK(test_now.left_out[0] == 0, "the reason of an earlier test: %s", test_now.left_out);
    test_leave_out("%s", "one reason");
    test_leave_out("another");
    CHECK(strcmp(test_now.left_out, "one reason") == 0, "%s", test_now.left_out);
    test_now.left_out[0] = 0;
}

/* Does a program with two arguments run the test of this name? "" is no argument. */
static int wanted(const char* first, const char* second, const char* name)
{
    const int argc = test_now.argc;
    char** argv = test_now.argv;
    const char* own[3] = {"program", first, second};
    int is;
    test_now.argc = second[0] ? 3 : first[0] ? 2 : 1;
    test_now.argv = (char**)own;
    is = test_selected(name);
    test_now.argc = argc;
    test_now.argv = argv;
    return is;
}

static void test_arguments(void)
{
    CHECK(wanted("", "", "test_sum") && wanted("sum", "", "test_sum"));
    CHECK(!wanted("sum", "", "test_product") && wanted("sum", "product", "test_product"));
    CHECK(!wanted("-sum", "", "test_sum") && wanted("-sum", "", "test_product"));
    CHECK(!wanted("test", "-sum", "test_sum") && wanted("test", "-sum", "test_product"));
    CHECK(!wanted("-sum", "test", "test_sum") && !wanted("-sum", "product", "test_layer"));
}

/* The last row begins past 2^32 elements. */
static void test_rows_far_apart(void)
{
    uint16_t dense[3 * 8];
    twide w;
    if (!twide_possible(2)) return;
    for (int i = 0; i < 3 * 8; ++i) dense[i] = (uint16_t)(i + 1);
    if (!twide_new(&w, "rows", 3, 8, MOE_BF16)) return;
    CHECK(2 * w.stride >= (int64_t)1 << 32, "%lld elements apart", (long long)w.stride);
    twide_put(&w, dense);
    CHECK(twide_holds(&w, dense), "what was put");
    twide_free(&w);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_no_check);
    RUN(test_no_memory);
    RUN(test_skipped);
    RUN(test_arguments);
    RUN(test_rows_far_apart);
    return test_end();
}
