/* test_rows.h: what the tests of router, gate, route and combine share beyond test.h: test
   calls of launch helpers, draws. Included after test.h. */
#ifndef MOE_TESTS_TEST_ROWS_H
#define MOE_TESTS_TEST_ROWS_H

#include "tests/test_case.h"
#include "tests/test_weights.h"

/* The buffer must hold these 32-bit integers: one check, named like the buffer. */
MOEI_UNUSED static void tbuf_compare(const tbuf* b, const void* want)
{
    void* got = tbuf_copy(b);
    CHECK_INTS(b->name, (const int32_t*)got, (const int32_t*)want, (int64_t)(b->bytes / 4));
    free(got);
}

/* ------------------------------------------------------------------ calls */

/* Two calls, one after the other. */
typedef struct test_chain {
    test_call call[2];
    void* context[2];
} test_chain;

/* A test_call whose context is a test_chain. */
MOEI_UNUSED static moe_status test_call_chain(void* context, cudaStream_t stream)
{
    const test_chain* c = (const test_chain*)context;
    MOE_TRY(c->call[0](c->context[0], stream));
    return c->call[1](c->context[1], stream);
}

/* ------------------------------------------------------------------ draws */

/* lo .. hi in one case of `of`, else 0. */
MOEI_UNUSED static int trand_some(trand* r, int of, int lo, int hi)
{
    return trand_int(r, 0, of - 1) ? 0 : (int)trand_int(r, lo, hi);
}

/* One of the three dtypes. */
MOEI_UNUSED static int trand_dtype(trand* r) { return (int)trand_int(r, MOE_FP32, MOE_BF16); }

/* 1 in one case of `of`, else 0. */
MOEI_UNUSED static int trand_one_in(trand* r, int of) { return trand_int(r, 0, of - 1) == 0; }

#endif
