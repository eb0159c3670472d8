/* test_gate.h: what the tests of the gate share: the call, and a descriptor that is refused. */
#ifndef MOE_TESTS_TEST_GATE_H
#define MOE_TESTS_TEST_GATE_H

#include "tests/test.h"

#include "moe/gate.cuh"

#include "tests/test_rows.h"

TEST_CALL(call_gate, moe_gate, moe_gate_desc)

TEST_REFUSED(refused, moe_gate, moe_gate_prepare, moe_gate)

#endif
