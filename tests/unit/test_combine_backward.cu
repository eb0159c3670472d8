/* test_combine_backward.cu: moe/combine_backward.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_combine_backward.cu -o test_combine_backward
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_combine_backward.cu -o test_combine_backward

   combine_backward/case.h       a case, its buffers, how it is drawn and compared
   combine_backward/values.h     gradients against the reference
   combine_backward/refusals.h   bad places and tables, the fault word, refused descriptors
   combine_backward/replay.h     same bits, graphs
   combine_backward/sizes.h      no tokens, many slots, rows past 2^32 elements */
#include "tests/unit/combine_backward/values.h"
#include "tests/unit/combine_backward/refusals.h"
#include "tests/unit/combine_backward/replay.h"
#include "tests/unit/combine_backward/sizes.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    combine_backward_values();
    combine_backward_refusals();
    combine_backward_replay();
    combine_backward_sizes();
    return test_end();
}
