/* test_route.cu: moe/route.cuh against its reference, and with counts of moe/gate.cuh.

     nvcc -I. -arch=sm_90a tests/unit/test_route.cu -o test_route
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_route.cu -o test_route

   route/case.h       a case, its buffers, how it is drawn and compared
   route/values.h     outputs against the reference, over drawn cases
   route/by_hand.h    routings written down number by number, moe_route_max_rows, moe_route_rank
   route/parts.h      tokens in parts, room for fewer rows
   route/faults.h     wrong ids and counts, the fault word
   route/refusals.h   descriptors that are refused
   route/replay.h     same bits, graphs, gate and route in one chain */
#include "tests/unit/route/values.h"
#include "tests/unit/route/by_hand.h"
#include "tests/unit/route/faults.h"
#include "tests/unit/route/parts.h"
#include "tests/unit/route/refusals.h"
#include "tests/unit/route/replay.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    route_values();
    route_by_hand();
    route_parts();
    route_faults();
    route_refusals();
    route_replay();
    return test_end();
}
