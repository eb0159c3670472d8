/* owner.h: which rank has which expert. C11 and C++14; kernels call the same functions.

   Without a table expert e belongs to rank floor(e W / E), for any E and W: a rank owns
   neighbouring experts, or none where E < W. Its first one is number 0 of its weights.

   With a table an expert has replicas on any ranks, any number of them. A token takes a replica on
   its own rank where one exists, else one on its own host, else any. Among n of equal distance
   token t takes number t % n. moe_ep_choose picks these candidates for one rank, on the host; the
   dispatch takes the result as device arrays:

     moe_rank id[W];                        // where each rank runs: peers.id
     int32_t offset[E + 1];                 // expert e has replicas offset[e] .. offset[e + 1] - 1
     moe_ep_expert replica[offset[E]];      // rank, and number among the experts of that rank
     int32_t choice_offset[E + 1];  moe_ep_expert choice[offset[E]];
     moe_status s = moe_ep_choose(id, W, rank, offset, replica, E, choice_offset, choice); */
#ifndef MOE_EP_OWNER_H
#define MOE_EP_OWNER_H

#include "../fields.h"
#include "peers.h"

/* An expert of a rank: 8 bytes. */
typedef struct moe_ep_expert {
    int32_t rank;   /* 0 .. W - 1; -1: none */
    int32_t expert; /* number among the rank's experts, in the order of its weights */
} moe_ep_expert;

/* Returns the rank that owns an expert. num_experts * num_ranks is below 2^31, here and below. */
MOE_HOST_DEVICE int moe_ep_owner(int expert, int num_experts, int num_ranks)
{
    return (int)((uint32_t)expert * (uint32_t)num_ranks / (uint32_t)num_experts);
}

/* Returns the first expert of a rank; of rank W, E. */
MOE_HOST_DEVICE int moe_ep_first(int rank, int num_experts, int num_ranks)
{
    return (int)(((uint32_t)rank * (uint32_t)num_experts + (uint32_t)num_ranks - 1) /
                 (uint32_t)num_ranks);
}

/* Returns the number of experts of a rank. */
MOE_HOST_DEVICE int moe_ep_owned(int rank, int num_experts, int num_ranks)
{
    return moe_ep_first(rank + 1, num_experts, num_ranks) -
           moe_ep_first(rank, num_experts, num_ranks);
}

/* Returns how far a replica is: 0: on this rank, 1: on its host, 2: elsewhere. */
MOE_HOST int moei_ep_distance(const moe_rank* id, int rank, int to)
{
    return to == rank ? 0 : id[to].host == id[rank].host ? 1 : 2;
}

/* Picks the replicas that tokens of `rank` take; see above. choice: room for offset[E] entries.
   Errors: null pointers; num_experts, num_ranks, rank out of range; replica (MOE_ERR_RANGE):
   offsets that decrease, or a rank out of range. An expert without replicas has no candidates. */
MOE_HOST moe_status moe_ep_choose(const moe_rank* id, int num_ranks, int rank,
                                  const int32_t* offset, const moe_ep_expert* replica,
                                  int num_experts, int32_t* choice_offset, moe_ep_expert* choice)
{
    int32_t n = 0;
    MOE_REQUIRE(id, MOE_ERR_NULL, peers);
    MOE_REQUIRE(offset && choice_offset, MOE_ERR_NULL, replica);
    MOE_REQUIRE(num_experts >= 1, MOE_ERR_RANGE, num_experts);
    MOE_REQUIRE(num_ranks >= 1 && num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE, num_ranks);
    MOE_REQUIRE(rank >= 0 && rank < num_ranks, MOE_ERR_RANGE, rank);
    MOE_REQUIRE(offset[0] == 0, MOE_ERR_RANGE, replica);
    for (int e = 0; e < num_experts; ++e)
        MOE_REQUIRE(offset[e] <= offset[e + 1], MOE_ERR_RANGE, replica);
    MOE_REQUIRE(!offset[num_experts] || (replica && choice), MOE_ERR_NULL, replica);
    for (int i = 0; i < offset[num_experts]; ++i)
        MOE_REQUIRE(replica[i].rank >= 0 && replica[i].rank < num_ranks && replica[i].expert >= 0,
                    MOE_ERR_RANGE, replica);
    for (int e = 0; e < num_experts; ++e) {
        int nearest = 3;
        choice_offset[e] = n;
        for (int i = offset[e]; i < offset[e + 1]; ++i) {
            const int d = moei_ep_distance(id, rank, replica[i].rank);
            if (d < nearest) nearest = d;
        }
        for (int i = offset[e]; i < offset[e + 1]; ++i)
            if (moei_ep_distance(id, rank, replica[i].rank) == nearest) choice[n++] = replica[i];
    }
    choice_offset[num_experts] = n;
    return MOE_OK;
}

#endif
