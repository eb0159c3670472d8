/* test_block_sparse.cu: the block-sparse product against its reference in double. What it refuses:
   test_block_sparse_args.cu.

     nvcc -I. -arch=sm_90a tests/unit/test_block_sparse.cu -o test_block_sparse
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_block_sparse.cu -o test_block_sparse

   Its parts, in block_sparse/; tests/test_product.h has the case:
     values.h     what the product computes, and what it leaves as it was
     tiles.h      the same bits on every tile
     gradients.h  gradients are products with the same mask
     replay.h     same bits, graphs, tuning
     large.h      many tiles, elements past 2^31 and 2^32 */
#include "tests/test.h"

#include "tests/unit/block_sparse/values.h"
#include "tests/unit/block_sparse/tiles.h"
#include "tests/unit/block_sparse/gradients.h"
#include "tests/unit/block_sparse/replay.h"
#include "tests/unit/block_sparse/large.h"

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    block_sparse_values();
    block_sparse_tiles();
    block_sparse_gradients();
    block_sparse_replay();
    block_sparse_large();
    return test_end();
}
