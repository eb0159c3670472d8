/* test_host.cpp: the CPU backend itself, feature by feature.

     g++ -std=c++14 -O2 -Wall -Wextra test_host.cpp test_host_tu2.cpp -o test_host && ./test_host

   Also to be run with -fsanitize=address,undefined, with clang++, with -DMOEH_UCONTEXT, and with
   MOE_HOST_SEED set. Prints a line for each failure; returns how many there were.

   case.h     checks and the argument struct
   threads.h  barriers and warps
   shared.h   shared memory, asynchronous copies, misuse
   grids.h    several grids at one time
   clusters.h blocks that see each other's shared memory
   streams.h  streams, events, graphs, memory
   mma.h      intrinsics and fragments */
#include "threads.h"
#include "shared.h"
#include "grids.h"
#include "clusters.h"
#include "streams.h"
#include "mma.h"

int main()
{
    const uint64_t seeds[] = {moeh_get().seed, 1, 77, 123456789012345ull};
    for (uint64_t seed : seeds) {
        moeh_set_seed(seed);
        test_barriers();
        test_warps();
        test_shared();
        test_misuse();
        test_grids();
        test_clusters();
        test_streams();
        test_memory();
        test_mma();
    }
    OK(cudaDeviceSynchronize());
    printf(failures ? "%d failures\n" : "host: all passed\n", failures);
    return failures != 0;
}
