/* test_ep_layer.cu: moe/ep/layer.cuh: the layer over ranks beside the layer on one GPU.

     nvcc -I. -arch=sm_90a tests/unit/test_ep_layer.cu -o test_ep_layer
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_ep_layer.cu -o test_ep_layer

   ep/layer.h     shapes, refusals, graphs
   ep/profile.h   the choice of forms: as text, and measured
   ep/survive.h   a group that loses a rank and takes it back */
#include "tests/unit/ep/layer.h"
#include "tests/unit/ep/profile.h"
#include "tests/unit/ep/survive.h"

int main(int argc, char** argv)
{
    tgroup_begin();
    test_begin(argc, argv);
    ep_layer();
    ep_profile();
    ep_survive();
    return test_end();
}
