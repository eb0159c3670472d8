/* test_host.h: what the two files of the host backend's test share. */
#ifndef TEST_HOST_H
#define TEST_HOST_H

#include "../../../moe/base/block.cuh"
#include "../../../moe/base/copy.cuh"
#include "../../../moe/base/fault.cuh"
#include "../../../moe/base/numeric.cuh"
#include "../../../moe/layout.h"

#include "../../../moe/host/mma.h"

void* tu2_scheduler();
void tu2_launch(int* out, cudaStream_t stream); /* queues: out[i] = 2 * i, i < 64 */

#endif
