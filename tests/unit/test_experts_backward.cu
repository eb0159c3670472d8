/* test_experts_backward.cu: moe/experts_backward.cuh against its reference, in double.

     nvcc -I. -arch=sm_90a tests/unit/test_experts_backward.cu -o test_experts_backward
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_experts_backward.cu -o test_experts_backward

   Its parts, in tests/unit/experts_backward:
     case.h      a case: sizes, options, buffers, how they are drawn and compared
     values.h    results: random cases, activations, numbers of rows, edges
     replay.h    stages, same bits, graphs, faults
     refusals.h  bad descriptors */
#include "tests/test.h"

#include "tests/unit/experts_backward/values.h"
#include "tests/unit/experts_backward/replay.h"
#include "tests/unit/experts_backward/refusals.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    experts_backward_values();
    experts_backward_replay();
    experts_backward_refusals();
    return test_end();
}
