/* exchange.h: the reference of moe/ep/dispatch.cuh: what each rank receives. C11 and C++14; no
   CUDA. All ranks at once, token by token.

   A token goes once to every rank that has an expert of it; in an all-gather to every rank. What a
   rank receives from one sender is in the sender's token order. */
#ifndef MOE_REF_EXCHANGE_H
#define MOE_REF_EXCHANGE_H

#include "../ep/owner.h"

/* One rank's tokens, and what it receives. */
typedef struct moe_ref_exchange_rank {
    const int32_t* ids;   /* [T, K] */
    const float* weights; /* [T, K]; or null: 1 each */
    const int32_t*
        replica_offset; /* [E + 1] this rank's choices (moe_ep_choose); null: owner = e W / E */
    const moe_ep_expert* replica;
    int32_t num_tokens;  /* T */
    int32_t* recv_count; /* [W] */
    int32_t* recv_token; /* [W C], -1: no row */
    int32_t* recv_ids;   /* [W C, K], -1 */
    float* recv_weights; /* [W C, K], 0 where there is no row */
} moe_ref_exchange_rank;

/* Returns the rank and expert of a slot; rank -1: none. */
MOE_HOST moe_ep_expert moe_ref_target(const moe_ref_exchange_rank* r, int64_t slot, int32_t top_k,
                                      int32_t num_experts, int32_t num_ranks)
{
    const int32_t id = r->ids[slot];
    moe_ep_expert e = {-1, -1};
    if (id < 0 || id >= num_experts) return e;
    if (r->replica_offset) {
        const int32_t from = r->replica_offset[id], n = r->replica_offset[id + 1] - from;
        if (n > 0) e = r->replica[from + (int32_t)(slot / top_k) % n];
        return e;
    }
    while (e.rank < 0 || (int64_t)id * num_ranks / num_experts != e.rank) ++e.rank;
    e.expert = 0;
    for (int32_t before = 0; before < id; ++before)
        if ((int64_t)before * num_ranks / num_experts == e.rank) ++e.expert;
    return e;
}

/* Fills in what all ranks receive; to_all: 1 for an all-gather. Returns the most rows that one rank sends to one other: past
   C = recv_tokens the rows are missing. */
MOE_HOST int32_t moe_ref_exchange(moe_ref_exchange_rank* rank, int32_t num_ranks,
                                  int32_t num_experts, int32_t top_k, int32_t recv_tokens,
                                  int32_t to_all)
{
    int32_t most = 0;
    for (int32_t to = 0; to < num_ranks; ++to)
        for (int32_t from = 0; from < num_ranks; ++from) {
            const moe_ref_exchange_rank* s = rank + from;
            moe_ref_exchange_rank* r = rank + to;
            int32_t n = 0;
            for (int32_t t = 0; t < s->num_tokens; ++t) {
                const int64_t row = (int64_t)from * recv_tokens + n, slot = (int64_t)t * top_k;
                int32_t goes = to_all;
                for (int32_t k = 0; k < top_k; ++k)
                    goes |= moe_ref_target(s, slot + k, top_k, num_experts, num_ranks).rank == to;
                if (!goes) continue;
                if (n++ >= recv_tokens) continue;
                r->recv_token[row] = t;
                for (int32_t k = 0; k < top_k; ++k) {
                    const moe_ep_expert e =
                        moe_ref_target(s, slot + k, top_k, num_experts, num_ranks);
                    r->recv_ids[row * top_k + k] = e.rank == to ? e.expert : -1;
                    r->recv_weights[row * top_k + k] = s->weights ? s->weights[slot + k] : 1.0f;
                }
            }
            r->recv_count[from] = n < recv_tokens ? n : recv_tokens;
            if (n > most) most = n;
            for (int64_t row = (int64_t)from * recv_tokens + r->recv_count[from];
                 row < (int64_t)(from + 1) * recv_tokens; ++row) {
                r->recv_token[row] = -1;
                for (int32_t k = 0; k < top_k; ++k) {
                    r->recv_ids[row * top_k + k] = -1;
                    r->recv_weights[row * top_k + k] = 0.0f;
                }
            }
        }
    return most;
}

#endif
