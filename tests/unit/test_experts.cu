/* test_experts.cu: moe/experts.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_experts.cu -o test_experts
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_experts.cu -o test_experts

   Its parts, in tests/unit/experts:
     case.h      a case: how it is drawn, run and compared
     values.h    results: layouts, activations, shapes, tiles
     refusals.h  faults, plan, bad descriptors
     replay.h    same bits, graphs, large sizes, rows far apart */
#include "tests/test.h"
#include "tests/test_variants.h"

#include "tests/unit/experts/values.h"
#include "tests/unit/experts/refusals.h"
#include "tests/unit/experts/replay.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    experts_values();
    experts_refusals();
    experts_replay();
    return test_end();
}
