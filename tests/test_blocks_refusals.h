/* test_blocks_refusals.h: macros of the tests of refusals: of test_weights.h REFUSED, AT and
   DOWN_TO; and UP_TO. Included after test.h. */
#ifndef MOE_TESTS_TEST_BLOCKS_REFUSALS_H
#define MOE_TESTS_TEST_BLOCKS_REFUSALS_H

#include "test_weights.h"

/* The first multiple of `bytes` that is not below p. */
#define UP_TO(p, bytes) AT(p, -(uintptr_t)(p) % (bytes))

#endif
