/* test_combine.cu: moe/combine.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_combine.cu -o test_combine
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_combine.cu -o test_combine

   combine/case.h         a case, its buffers, how it is drawn and compared
   combine/values.h       y against the reference
   combine/own_kernel.h   the public device functions in kernels of the test
   combine/refusals.h     bad places and tables, the fault word, descriptors that are refused
   combine/replay.h       same bits, graphs, route and combine in one chain
   combine/sizes.h        no tokens, many slots, rows past 2^32 elements */
#include "tests/unit/combine/values.h"
#include "tests/unit/combine/own_kernel.h"
#include "tests/unit/combine/refusals.h"
#include "tests/unit/combine/replay.h"
#include "tests/unit/combine/sizes.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    combine_values();
    combine_own_kernel();
    combine_refusals();
    combine_replay();
    combine_sizes();
    return test_end();
}
