/* test_gate_backward.cu: moe/gate_backward.cuh and moe/balance_loss.cuh against their references in
   double, and these against finite differences.

     nvcc -I. -arch=sm_90a tests/unit/test_gate_backward.cu -o test_gate_backward
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gate_backward.cu -o test_gate_backward

   The reference takes the choices that moe_gate made, so tokens near a tie are compared too.

   gate_backward/case.h         a case, its buffers, how it is drawn, run and compared
   gate_backward/values.h       every score and rule over shapes of each form of the kernel
   gate_backward/differences.h  finite differences of the whole gate and its losses
   gate_backward/limits.h       NaN, infinities, ids out of range, other tokens, repeated runs,
   graphs
   gate_backward/refusals.h     bad descriptors
   gate_backward/balance.h      balance losses and the update of the bias */
#include "tests/unit/gate_backward/values.h"
#include "tests/unit/gate_backward/differences.h"
#include "tests/unit/gate_backward/limits.h"
#include "tests/unit/gate_backward/refusals.h"
#include "tests/unit/gate_backward/balance.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    (void)refused, (void)check_rows, (void)run_case, (void)call_loss;
    gate_backward_values();
    gate_backward_differences();
    gate_backward_limits();
    gate_backward_refusals();
    gate_backward_balance();
    if (test_now.verbose) printf("largest error: %.2f of its bound\n", back_worst);
    return test_end();
}
