/* incomplete.cuh: lists the tokens that chose an expert which no rank has any more: after a rank is
   lost (survive.h), what is computed for them lacks a part.

     token[0 .. count - 1] = the t in ascending order with disabled[ids[t, k]] != 0 for some k

   In:   ids [T, K] of the call that stopped, disabled [E] of moe_ep_shrink
   Out:  token [T], count [1]
   Runs whatever the fault word says. Equal inputs give equal lists.
   Cost: one launch of one thread block; reads T K ids. Minimum architecture: sm_75.

     moe_ep_incomplete_desc d = {0};
     d.ids = ids;  d.disabled = disabled;  d.token = token;  d.count = count;
     d.num_tokens = T;  d.num_experts = E;  d.top_k = K;
     moe_status s = moe_ep_incomplete(&d, stream); */
#ifndef MOE_EP_INCOMPLETE_CUH
#define MOE_EP_INCOMPLETE_CUH

#include "../base/block.cuh"
#include "../base/check.h"
#include "../fields.h"
#include "../layout.h"
#include "../preload.cuh"

/* What moe_ep_incomplete takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_ep_incomplete_desc {
    const int32_t* ids;      /* [T, K] expert of each slot; what is not 0 .. E - 1 is none */
    const uint8_t* disabled; /* [E] not 0: no rank has the expert */
    int32_t* token;          /* [T] out: the tokens; entries from count on stay as they were */
    int32_t* count;          /* [1] out */
    int32_t num_tokens;      /* T >= 0; T * K below 2^31 */
    int32_t num_experts;     /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;           /* K >= 1 */
} moe_ep_incomplete_desc;

#define MOEI_EP_INCOMPLETE_THREADS 1024

/* A round of tokens at a time, one a thread; a prefix sum gives each its place in the list. */
MOE_KERNEL(MOEI_EP_INCOMPLETE_THREADS, 1) moei_ep_incomplete(MOE_ARG(moe_ep_incomplete_desc) d)
{
    MOE_SHARED(moe_block_scan_scratch, scratch);
    int listed = 0;
    MOE_NO_UNROLL
    for (int t0 = 0; t0 < d.num_tokens; t0 += (int)blockDim.x) {
        const int t = t0 + (int)threadIdx.x;
        int lacks = 0, all, at;
        MOE_NO_UNROLL
        for (int k = 0; k < d.top_k && t < d.num_tokens && !lacks; ++k) {
            const int id = d.ids[(int64_t)t * d.top_k + k];
            lacks = id >= 0 && id < d.num_experts && d.disabled[id] != 0;
        }
        at = listed + moe_block_exclusive_scan(lacks, &scratch, &all);
        if (lacks) d.token[at] = t;
        listed += all;
    }
    if (threadIdx.x == 0) d.count[0] = listed;
}

/* Queues the listing on `stream`. Errors: a status for each field that is not as documented. */
MOE_HOST moe_status moe_ep_incomplete(const moe_ep_incomplete_desc* desc, cudaStream_t stream)
{
    const moe_launch_config c = moe_grid(1, MOEI_EP_INCOMPLETE_THREADS, 0, stream);
    MOE_REQUIRE(desc, MOE_ERR_NULL, desc);
    MOE_REQUIRE(desc->num_experts >= 1 && desc->num_experts <= MOE_MAX_EXPERTS, MOE_ERR_RANGE,
                num_experts);
    MOE_REQUIRE(desc->top_k >= 1, MOE_ERR_RANGE, top_k);
    MOE_REQUIRE(desc->num_tokens >= 0 && (int64_t)desc->num_tokens * desc->top_k <= 0x7fffffff,
                MOE_ERR_RANGE, num_tokens);
    {
        const uint64_t tokens = (uint64_t)desc->num_tokens;
        const moe_buffer list[] = {
            {desc->ids, tokens * (uint64_t)desc->top_k * 4, 4, MOE_BUFFER_REQUIRED, MOE_FIELD_ids},
            {desc->disabled, (uint64_t)desc->num_experts, 1, MOE_BUFFER_REQUIRED,
             MOE_FIELD_expert_disabled},
            {desc->token, tokens * 4, 4, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_token},
            {desc->count, 4, 4, MOE_BUFFER_REQUIRED | MOE_BUFFER_WRITTEN, MOE_FIELD_count}};
        MOE_TRY(moe_check_buffers(list, (int)(sizeof list / sizeof list[0])));
    }
    return MOE_LAUNCH(moei_ep_incomplete, c, *desc);
}

/* Loads this header's kernel now rather than at its first launch. */
MOE_HOST moe_status moe_ep_incomplete_preload(void)
{
    return moe_preload_kernel((const void*)moei_ep_incomplete);
}

MOEI_PRELOAD_INCLUDED(ep_incomplete)

#endif
