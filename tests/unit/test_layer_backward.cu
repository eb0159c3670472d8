/* test_layer_backward.cu: moe/layer_backward.cuh against the references of its stations, in double.

     nvcc -I. -arch=sm_90a tests/unit/test_layer_backward.cu -o test_layer_backward
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_layer_backward.cu -o test_layer_backward

   Its parts, in tests/unit/layer_backward:
     case.h      a case: a case of the layer, its gradients, how they are compared
     values.h    results: sources of the routing, random cases
     rules.h     rules of the gate, tables of gradients, experts without rows
     differences.h   the whole layer, against finite differences
     memory.h    what is kept between the passes, and the workspace
     replay.h    stages, same bits, graphs, NaN, stop faults, no tokens
     refusals.h  bad descriptors */
#include "tests/test.h"

#include "tests/unit/layer_backward/values.h"
#include "tests/unit/layer_backward/rules.h"
#include "tests/unit/layer_backward/differences.h"
#include "tests/unit/layer_backward/memory.h"
#include "tests/unit/layer_backward/replay.h"
#include "tests/unit/layer_backward/refusals.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    layer_backward_values();
    layer_backward_rules();
    layer_backward_differences();
    layer_backward_memory();
    layer_backward_replay();
    layer_backward_refusals();
    return test_end();
}
