/* test_ep_backward.cu: moe/ep/layer_backward.cuh: gradients of the layer over ranks beside those of
   one GPU that has the tokens of all ranks; moe/ep/all_reduce.cuh.

     nvcc -I. -arch=sm_90a tests/unit/test_ep_backward.cu -o test_ep_backward
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_ep_backward.cu -o test_ep_backward

   ep/backward_case.h  both layers, and how their gradients are compared
   ep/backward.h       shapes, forms, options, graphs, steps in a row
   ep/backward_faults.h  refusals, a rank that stops before each stage
   ep/all_reduce.h     sums over ranks */
#include "tests/unit/ep/all_reduce.h"
#include "tests/unit/ep/backward.h"
#include "tests/unit/ep/backward_faults.h"

int main(int argc, char** argv)
{
    tgroup_begin();
    test_begin(argc, argv);
    ep_all_reduce();
    ep_backward();
    ep_backward_faults();
    return test_end();
}
