/* sleep.h: a kernel that holds a stream up: a late rank. */
#ifndef MOE_TESTS_EP_SLEEP_H
#define MOE_TESTS_EP_SLEEP_H

#include "moe/ep/signal.cuh"
#include "tests/test.h"

/* Holds a stream up for some time. */
typedef struct ep_sleep_args {
    uint64_t ns;
} ep_sleep_args;

MOE_KERNEL(32, 1) ep_sleep(MOE_ARG(ep_sleep_args) a)
{
    const uint64_t begun = moei_nanoseconds();
    moe_pdl_wait();
    while (moei_nanoseconds() - begun < a.ns) MOE_SPIN();
}

/* Holds `stream` of the current device up for `ns` nanoseconds. */
static void ep_sleep_on(cudaStream_t stream, uint64_t ns)
{
    const moe_launch_config one = moe_grid(1, 32, 0, stream);
    const ep_sleep_args a = {ns};
    CHECK_STATUS(MOE_LAUNCH(ep_sleep, one, a), MOE_OK);
}

#endif
