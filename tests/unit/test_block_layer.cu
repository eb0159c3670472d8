/* test_block_layer.cu: moe/block_layer.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_block_layer.cu -o test_block_layer
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_block_layer.cu -o test_block_layer

   Its parts, in block_layer/:
     case.h         a case: sizes and options, inputs, buffers, calls
     reference.h    exact numbers, rounded ones, and a bound of each element's error
     compare.h      outputs against the reference
     values.h       forms, sizes, dtypes, ids
     activations.h  activations and their gradients
     faults.h       bad inputs that only the device sees
     isolation.h    infinities and NaN stay with the tokens that have them
     agree.h        the forms against one another
     replay.h       same bits, outputs in part, graphs
     plan.h         memory, active experts, no tokens
     refusals.h     descriptors that are refused
     large.h        elements past 2^31 and 2^32 */
#include "tests/test.h"

#include "tests/unit/block_layer/values.h"
#include "tests/unit/block_layer/activations.h"
#include "tests/unit/block_layer/faults.h"
#include "tests/unit/block_layer/isolation.h"
#include "tests/unit/block_layer/agree.h"
#include "tests/unit/block_layer/replay.h"
#include "tests/unit/block_layer/plan.h"
#include "tests/unit/block_layer/refusals.h"
#include "tests/unit/block_layer/large.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    block_layer_values();
    block_layer_activations();
    block_layer_faults();
    block_layer_isolation();
    block_layer_agree();
    block_layer_replay();
    block_layer_plan();
    block_layer_refusals();
    block_layer_large();
    return test_end();
}
