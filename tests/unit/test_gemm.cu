/* test_gemm.cu: the grouped GEMM of moe/gemm against its reference in double, and its schedule and
   its fragments by themselves.

     nvcc -I. -arch=sm_90a tests/unit/test_gemm.cu -o test_gemm
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gemm.cu -o test_gemm

   Its parts, in tests/unit/gemm:
     case.h         a case: its buffers and what they hold
     run.h          how a case is drawn, run and compared
     schedule.h     the order of the tiles
     mma.h          fragments
     activations.h  activations, by themselves and in the epilogue
     values.h       results: tiles, rows, tails, gathered rows, majors
     wgmma.h        results of the wgmma path
     faults.h       bad offsets and tables, stop faults, no rows
     plan.h         the plan, the table of variants, a kernel of one's own
     refusals.h     bad descriptors
     replay.h       same bits, graphs, rows far apart
     seams.h        lists of groups; counters of rows that come and of rows that are stored */
#include "tests/test.h"

/* Has all variants that grouped.cuh compiles by default, and those with mn-major A. */
#define MOE_GEMM_VARIANT_LIST(X, ...)                                                              \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                     \
    X(f16_kn, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)                                    \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(bf16_kn, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)                                   \
    X(f16_nk, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(f16_nn, MOE_FP16, MOE_MAJOR_MN, MOE_MAJOR_MN, __VA_ARGS__)                                   \
    X(bf16_nk, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_K, __VA_ARGS__)                                   \
    X(bf16_nn, MOE_BF16, MOE_MAJOR_MN, MOE_MAJOR_MN, __VA_ARGS__)
#include "tests/unit/gemm/schedule.h"
#include "tests/unit/gemm/mma.h"
#include "tests/unit/gemm/activations.h"
#include "tests/unit/gemm/values.h"
#include "tests/unit/gemm/wgmma.h"
#include "tests/unit/gemm/faults.h"
#include "tests/unit/gemm/plan.h"
#include "tests/unit/gemm/refusals.h"
#include "tests/unit/gemm/replay.h"
#include "tests/unit/gemm/seams.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    gemm_schedule();
    gemm_mma();
    gemm_activations();
    gemm_values();
    gemm_wgmma();
    gemm_faults();
    gemm_plan();
    gemm_refusals();
    gemm_replay();
    gemm_seams();
    return test_end();
}
