/* test_base.cu: moe/base.

     nvcc -I. -arch=sm_90a tests/unit/test_base.cu -o test_base
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_base.cu -o test_base

   base/status.h    base/status.h, fields.h, base/check.h
   base/fault.h     base/fault.h, base/fault.cuh, faults.h
   base/numeric.h   base/types.h, base/numeric.cuh: conversions
   base/threads.h   base/warp.cuh, base/block.cuh
   base/copy.h      base/copy.cuh
   base/random.h    base/random.h
   base/exp.h       base/numeric.cuh, activation.cuh: exp, silu, NaN
   base/launch.h    base/cuda.cuh */
#include "tests/unit/base/status.h"
#include "tests/unit/base/fault.h"
#include "tests/unit/base/numeric.h"
#include "tests/unit/base/threads.h"
#include "tests/unit/base/copy.h"
#include "tests/unit/base/random.h"
#include "tests/unit/base/exp.h"
#include "tests/unit/base/launch.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    base_status();
    base_fault();
    base_numeric();
    base_threads();
    base_copy();
    base_random();
    base_exp();
    base_launch();
    return test_end();
}
