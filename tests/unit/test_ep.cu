/* test_ep.cu: moe/ep: groups, barriers, dispatch and combine between ranks, against a naive
   exchange.

     nvcc -I. -arch=sm_90a tests/unit/test_ep.cu -o test_ep
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_ep.cu -o test_ep

   ep/case.h       one exchange of all ranks
   ep/signals.h    owners of experts; put, get, signal, wait, barrier
   ep/faults.h     late ranks, small buffers, refusals
   ep/replay.h     many exchanges: in a row, late ranks, graphs
   ep/exchange.h   what every rank receives, and the sums that come home
   ep/message.h    the exchange in messages, which the host carries
   ep/hosts.h      exchanges over several hosts */
#include "tests/unit/ep/exchange.h"
#include "tests/unit/ep/faults.h"
#include "tests/unit/ep/hosts.h"
#include "tests/unit/ep/message.h"
#include "tests/unit/ep/replay.h"
#include "tests/unit/ep/signals.h"

int main(int argc, char** argv)
{
    tgroup_begin();
    test_begin(argc, argv);
    ep_signals();
    ep_exchange();
    ep_faults();
    ep_message();
    ep_hosts();
    ep_replay();
    return test_end();
}
