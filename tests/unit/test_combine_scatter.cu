/* test_combine_scatter.cu: moe/combine_scatter.cuh against a naive sum in double. The additions
   come in any order, so bounds, not bits, are compared; sums of small whole numbers are exact.

     nvcc -I. -arch=sm_90a tests/unit/test_combine_scatter.cu -o test_combine_scatter
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_combine_scatter.cu -o test_combine_scatter

   combine_scatter/case.h         a case, its buffers, how it is drawn, run and compared
   combine_scatter/values.h       y against the naive sum
   combine_scatter/faults.h       wrong offsets, tables and numbers that are not finite
   combine_scatter/replay.h       a graph, and route before the scatter
   combine_scatter/own_kernel.h   moe_add_row_atomic in a kernel of the test
   combine_scatter/refusals.h     bad descriptors
   combine_scatter/large.h        many rows, and rows past 2^32 elements */
#include "tests/unit/combine_scatter/values.h"
#include "tests/unit/combine_scatter/faults.h"
#include "tests/unit/combine_scatter/replay.h"
#include "tests/unit/combine_scatter/own_kernel.h"
#include "tests/unit/combine_scatter/refusals.h"
#include "tests/unit/combine_scatter/large.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    combine_scatter_values();
    combine_scatter_faults();
    combine_scatter_replay();
    combine_scatter_own_kernel();
    combine_scatter_refusals();
    combine_scatter_large();
    return test_end();
}
