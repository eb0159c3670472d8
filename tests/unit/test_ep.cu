/* test_ep.cu: moe/ep: groups, barriers, dispatch and combine between ranks, against a naive exchange.

     nvcc -I. -arch=sm_90a tests/unit/test_ep.cu -o test_ep
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_ep.cu -o test_ep

   ep/case.h       one exchange of all ranks
   ep/exchange.h   what every rank receives, and the sums that come home */
#include "tests/unit/ep/exchange.h"

int main(int argc, char** argv)
{
    tgroup_begin();
    test_begin(argc, argv);
    ep_exchange();
    return test_end();
}
