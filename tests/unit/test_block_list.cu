/* test_block_list.cu: moe_block_sparse_list_build against the reference.

     nvcc -I. -arch=sm_90a tests/unit/test_block_list.cu -o test_block_list
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_block_list.cu -o test_block_list

   Its parts, in block_list/:
     case.h      a list's case: how it is drawn, run and compared
     values.h    every entry of every list, from all sources; bad sources; lists without room
     large.h     more than 2^31 possible sparse blocks, large masks and routings
     replay.h    same bits, graphs, calls after a fault
     refusals.h  descriptors that are refused */
#include "tests/test.h"

#include "tests/unit/block_list/values.h"
#include "tests/unit/block_list/large.h"
#include "tests/unit/block_list/replay.h"
#include "tests/unit/block_list/refusals.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    block_list_values();
    block_list_large();
    block_list_replay();
    block_list_refusals();
    return test_end();
}
