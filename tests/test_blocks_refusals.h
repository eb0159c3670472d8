/* test_blocks_refusals.h: macros of the tests of refusals: REFUSED, AT and DOWN_TO, which
   test_weights.h has, and some more. Included after test.h. */
#ifndef MOE_TESTS_TEST_BLOCKS_REFUSALS_H
#define MOE_TESTS_TEST_BLOCKS_REFUSALS_H

#include "test_weights.h"

/* REFUSED, for cases of which not all refuse. */
#define REFUSED_IF(condition, change, kind, field)                                                 \
    do {                                                                                           \
        if (condition) { REFUSED(change, kind, field); }                                           \
    } while (0)

/* The first multiple of `bytes` that is not below p. */
#define UP_TO(p, bytes) AT(p, -(uintptr_t)(p) % (bytes))

#endif
