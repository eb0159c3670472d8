/* test_gate_rules.cu: the rules and scores of moe/gate.cuh against their reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_gate_rules.cu -o test_gate_rules
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gate_rules.cu -o test_gate_rules

   A token whose choices depend on a difference below the rounding of fp32 may choose otherwise: the
   reference tells how near it was, and such tokens are compared by their sums alone.

   gate_rules/case.h         a case, its buffers, how it is drawn, run and compared; rows written by hand
   gate_rules/sweeps.h       every score and rule over shapes of each form of the kernel
   gate_rules/draws.h        what is drawn, and what repeats
   gate_rules/refusals.h     bad descriptors
   gate_rules/own_kernel.h   moe_warp_top_k in a kernel of the test
   gate_rules/by_hand.h      rows written by hand: limits, offsets, edges
   gate_rules/large.h        large shapes, on a GPU */
#include "tests/unit/gate_rules/sweeps.h"
#include "tests/unit/gate_rules/draws.h"
#include "tests/unit/gate_rules/refusals.h"
#include "tests/unit/gate_rules/own_kernel.h"
#include "tests/unit/gate_rules/by_hand.h"
#include "tests/unit/gate_rules/large.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    gate_rules_sweeps();
    gate_rules_draws();
    gate_rules_refusals();
    gate_rules_own_kernel();
    gate_rules_by_hand();
    gate_rules_large();
    return test_end();
}
