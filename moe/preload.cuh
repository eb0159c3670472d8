/* preload.cuh: moe_preload() loads the kernels of every station included before the call.

   Under lazy loading the first launch of a kernel synchronises the device, and can hang while
   another kernel spins. Call moe_preload once for each device before such a kernel runs. Returns a
   moe_status: the first error of the runtime. Costs one runtime call a kernel.

     moe_status s = moe_preload(); // gate.cuh and route.cuh are included: loads their kernels

   moe_gate_preload, moe_layer_preload, ... load the kernels of one station; those of the experts are
   the grouped GEMM's, moe_grouped_gemm_preload. */
#ifndef MOE_PRELOAD_CUH
#define MOE_PRELOAD_CUH

#include "base/cuda.cuh"

/* The stations with kernels. */
#define MOEI_PRELOAD_LIST(X)                                                                       \
    X(router)                                                                                      \
    X(gate)                                                                                        \
    X(route)                                                                                       \
    X(grouped_gemm)                                                                                \
    X(grouped_gemm_gradient)                                                                       \
    X(k_grouped_gemm)                                                                              \
    X(combine)                                                                                     \
    X(combine_backward)                                                                            \
    X(gate_backward)                                                                               \
    X(balance_loss)                                                                                \
    X(router_backward)                                                                             \
    X(experts_backward)                                                                            \
    X(layer_backward)                                                                              \
    X(combine_scatter)                                                                             \
    X(permute)                                                                                     \
    X(block_sparse_list)                                                                           \
    X(block_sparse)                                                                                \
    X(block_layer)                                                                                 \
    X(peers)                                                                                       \
    X(ep_dispatch)                                                                                 \
    X(ep_combine)                                                                                  \
    X(ep_all_reduce)                                                                               \
    X(ep_layer_backward)                                                                           \
    X(ep_incomplete)                                                                               \
    X(ep_message)

/* A station that the file does not include: nothing to load. */
#define MOEI_PRELOAD_ABSENT(station)                                                               \
    MOE_HOST moe_status moei_preload_##station(...) { return MOE_OK; }
MOEI_PRELOAD_LIST(MOEI_PRELOAD_ABSENT)
#undef MOEI_PRELOAD_ABSENT

/* Stands at the end of a station's header: an overload that is preferred to the one above. */
#define MOEI_PRELOAD_INCLUDED(station)                                                             \
    MOE_HOST moe_status moei_preload_##station(int unused)                                         \
    {                                                                                              \
        (void)unused;                                                                              \
        return moe_##station##_preload();                                                          \
    }

/* A macro, so that it sees every header included before the call, in any order. */
#define MOEI_PRELOAD_TRY(station) MOE_TRY(moei_preload_##station(0));
#define moe_preload()                                                                              \
    ([]() -> moe_status {                                                                          \
        MOEI_PRELOAD_LIST(MOEI_PRELOAD_TRY)                                                        \
        return MOE_OK;                                                                             \
    }())

#endif
