/* test_gate.h: what the tests of the gate share: the call, and a descriptor that is refused. */
#ifndef MOE_TESTS_TEST_GATE_H
#define MOE_TESTS_TEST_GATE_H

#include "tests/test.h"

#include "moe/gate.cuh"

#include "tests/test_rows.h"

TEST_CALL(call_gate, moe_gate, moe_gate_desc)

/* Requires that the gate and its prepare refuse d with this status; REFUSED calls it. */
static void refused(const moe_gate_desc* d, moe_status want, int line)
{
    CHECK_STATUS_AT(line, moe_gate(d, test_now.stream), want);
    CHECK_REFUSED(moe_gate_prepared, moe_gate_prepare, d, want);
}

#endif
