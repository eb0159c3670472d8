/* test_layer.cu: moe/layer.cuh against the references of its stations, in double.

     nvcc -I. -arch=sm_90a tests/unit/test_layer.cu -o test_layer
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_layer.cu -o test_layer

   Its parts, in tests/unit/layer:
     case.h      a case: sizes, options, buffers, how they are drawn
     compare.h   how a case is run, and compared station after station
     values.h    results: gates, activations, shared experts, shapes, ids, residuals
     options.h   options of route and of the gate
     faults.h    NaN, stop faults, no tokens
     plan.h      the workspace, the plan, old binaries
     replay.h    parts, prepared, same bits, graphs, rows far apart
     refusals.h  bad descriptors, overlaps
     models.h    the settings of the models in README.md */
#include "tests/test.h"
#include "tests/test_variants.h"

#include "tests/unit/layer/values.h"
#include "tests/unit/layer/options.h"
#include "tests/unit/layer/faults.h"
#include "tests/unit/layer/plan.h"
#include "tests/unit/layer/replay.h"
#include "tests/unit/layer/refusals.h"
#include "tests/unit/layer/models.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    layer_values();
    layer_options();
    layer_faults();
    layer_plan();
    layer_replay();
    layer_refusals();
    layer_models();
    return test_end();
}
