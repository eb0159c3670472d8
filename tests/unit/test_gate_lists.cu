/* test_gate_lists.cu: test_gate_rules.cu with lists of gates of the user's own: unusual entries that
   the sorting networks can do.

     nvcc -I. -arch=sm_90a tests/unit/test_gate_lists.cu -o test_gate_lists
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gate_lists.cu -o test_gate_lists

   gate_rules_sweeps      every score and rule over shapes of each form of the kernel
   gate_rules_draws       what is drawn, and what repeats
   gate_rules_refusals    bad descriptors
   gate_rules_own_kernel  moe_warp_top_k in a kernel of the test
   gate_rules_by_hand     rows written by hand: limits, offsets, edges
   gate_rules_large       large shapes, on a GPU */
#define MOE_GATE_LIST(X)                                                                           \
    X(8, 8, 1, 8) X(60, 16, 2, 32) X(256, 2, 32, 8) X(128, 8, 16, 8) X(1000, 16, 32, 32)
#define MOE_GATE_RULES_LIST(X)                                                                     \
    X(32, 8, 4, 8, 96) X(60, 16, 2, 32, 64) X(256, 4, 32, 8, 1024) X(1000, 16, 32, 32, 128)
#include "tests/unit/test_gate_rules.cu"
