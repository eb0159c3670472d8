/* survive.h: how a group goes on when it has lost a rank: which ranks are left, their numbers in a
   smaller group, and who has which expert there. C11 and C++14; plain C on the host.

   After the stop fault PEER_LATE, on every rank that is left, when its streams are idle:

     1. moe_peers_survive     the ranks agree, through a callback of the caller's, on who is left
     2. a new region, of new memory, and a group of the ranks that are left (peers.cuh): the lost
        rank may only have been asleep, and knows the old region alone. Free that one when the lost
        rank's process has ended, or has closed its mapping
     3. moe_ep_shrink         the table of replicas of the smaller group, and the experts that no
                              rank has any more
     4. moe_ep_incomplete     (incomplete.cuh) the tokens of the call that stopped which had chosen
                              such an expert
     5. the fault word = 0; prepare anew, with gate.expert_disabled, replica tables and num_local
        of 3., and run the call again: the call that stopped may have written some rows of y

     moe_peers_survivors s;
     moe_status e = moe_peers_survive(&peers, fault_word, agree, context, &s);
     if (e == MOE_OK) {                               // else this rank is out, or alone
         // new memory; moe_peers_create_ipc(&next, s.rank, s.num_ranks, ...) among the ranks left
         moe_ep_shrink(&s, W, 0, 0, E, offset, replica, disabled);
         moe_ep_choose(next.id, s.num_ranks, s.rank, offset, replica, E, choice_offset, choice);
     }

   A rank that was asleep finds the others' notice at its next wait, and stops. To take it back, or
   a new process in its place, all ranks end what they have queued and make a group of all again, of
   new memory, with the tables that they had before. */
#ifndef MOE_EP_SURVIVE_H
#define MOE_EP_SURVIVE_H

#include <string.h>

#include "owner.h"

#define MOE_PEERS_SET_WORDS (MOE_PEERS_MAX_RANKS / 32)

/* A set of ranks: bit r % 32 of word r / 32 is rank r. */
typedef struct moe_peers_set {
    uint32_t bits[MOE_PEERS_SET_WORDS];
} moe_peers_set;

/* The caller's agreement: a collective among the ranks that are left, over whatever reaches them: a
   store, sockets, MPI. moe_peers_survive calls it once on each of them. context: the caller's.
   alive: the ranks that this one knows nothing against. Sets *agreed to the ranks that go on, the
   same on all of them: those of all `alive` sets that were brought, less ranks that brought none in
   a time of the callback's own. Returns 0; another value: no agreement, or this rank is too late
   for it. */
typedef int (*moe_peers_agree)(void* context, const moe_peers_set* alive, moe_peers_set* agreed);

/* The ranks that are left. */
typedef struct moe_peers_survivors {
    int32_t num_ranks;                     /* of the smaller group */
    int32_t rank;                          /* this rank's number there */
    int32_t old_rank[MOE_PEERS_MAX_RANKS]; /* [num_ranks] numbers in the old group, ascending */
    int32_t new_rank[MOE_PEERS_MAX_RANKS]; /* [old W] number in the smaller group; -1: lost */
} moe_peers_survivors;

/* Returns 1 where rank r is in the set. r: 0 .. MOE_PEERS_MAX_RANKS - 1. */
MOE_HOST int moe_peers_set_has(const moe_peers_set* set, int r)
{
    return (int)(set->bits[r / 32] >> (r % 32) & 1u);
}

/* Puts rank r into the set (in: 1), or takes it out (in: 0). */
MOE_HOST void moe_peers_set_put(moe_peers_set* set, int r, int in)
{
    const uint32_t bit = 1u << (r % 32);
    set->bits[r / 32] = in ? set->bits[r / 32] | bit : set->bits[r / 32] & ~bit;
}

/* Fills in *s for the ranks of `agreed`. Errors: as of moe_peers_survive. */
MOE_HOST moe_status moei_peers_number(const moe_peers* old, const moe_peers_set* agreed,
                                      moe_peers_survivors* s)
{
    s->rank = -1;
    for (int r = 0; r < MOE_PEERS_MAX_RANKS; ++r) s->new_rank[r] = s->old_rank[r] = -1;
    for (int r = 0; r < old->num_ranks; ++r) {
        if (!moe_peers_set_has(agreed, r)) continue;
        if (r == old->rank) s->rank = s->num_ranks;
        s->new_rank[r] = s->num_ranks;
        s->old_rank[s->num_ranks++] = r;
    }
    MOE_REQUIRE(s->rank >= 0, MOE_ERR_CONFLICT, rank);
    return MOE_OK;
}

/* Finds out who is left of a group. fault_word: this rank's, copied to the host; the rank that it
   names late is not alive for this rank. Fills in *s. Errors: null pointers; peers (MOE_ERR_RANGE):
   no group; agree (MOE_ERR_DEVICE): the callback failed; rank (MOE_ERR_CONFLICT): the others go on
   without this rank. */
MOE_HOST moe_status moe_peers_survive(const moe_peers* old, uint64_t fault_word,
                                      moe_peers_agree agree, void* context, moe_peers_survivors* s)
{
    const moe_peers_late late = moe_peers_late_decode(fault_word);
    moe_peers_set alive, agreed;
    MOE_REQUIRE(old && s, MOE_ERR_NULL, peers);
    memset(s, 0, sizeof *s);
    MOE_REQUIRE(agree, MOE_ERR_NULL, agree);
    MOE_REQUIRE(old->num_ranks >= 1 && old->num_ranks <= MOE_PEERS_MAX_RANKS && old->rank >= 0 &&
                    old->rank < old->num_ranks,
                MOE_ERR_RANGE, peers);
    memset(&alive, 0, sizeof alive);
    memset(&agreed, 0, sizeof agreed);
    for (int r = 0; r < old->num_ranks; ++r)
        moe_peers_set_put(&alive, r, r != late.late || r == old->rank);
    MOE_REQUIRE(!agree(context, &alive, &agreed), MOE_ERR_DEVICE, agree);
    return moei_peers_number(old, &agreed, s);
}

/* Makes the table of replicas of the smaller group from that of the old one: replicas of lost ranks
   are left out, ranks have their new numbers; numbers among a rank's experts stay, and so does
   num_local. offset [E + 1], replica [offset[E]]: the old group's; null: floor(e W / E) of its
   old_num_ranks. new_offset [E + 1]; new_replica: room for offset[E] entries, or E; disabled [E]: 1
   where no rank has the expert any more, for the gate. Errors: null pointers; num_ranks,
   num_experts; replica (MOE_ERR_RANGE): offsets that decrease, or a rank out of range. */
MOE_HOST moe_status moe_ep_shrink(const moe_peers_survivors* s, int old_num_ranks,
                                  const int32_t* offset, const moe_ep_expert* replica,
                                  int num_experts, int32_t* new_offset, moe_ep_expert* new_replica,
                                  uint8_t* disabled)
{
    int32_t n = 0;
    MOE_REQUIRE(s, MOE_ERR_NULL, peers);
    MOE_REQUIRE(new_offset && new_replica && disabled, MOE_ERR_NULL, replica);
    MOE_REQUIRE(!offset == !replica, MOE_ERR_CONFLICT, replica);
    MOE_REQUIRE(num_experts >= 1, MOE_ERR_RANGE, num_experts);
    MOE_REQUIRE(old_num_ranks >= 1 && old_num_ranks <= MOE_PEERS_MAX_RANKS, MOE_ERR_RANGE,
                num_ranks);
    for (int e = 0; offset && e < num_experts; ++e)
        MOE_REQUIRE(offset[e] >= 0 && offset[e] <= offset[e + 1], MOE_ERR_RANGE, replica);
    for (int i = 0; offset && i < offset[num_experts]; ++i)
        MOE_REQUIRE(replica[i].rank >= 0 && replica[i].rank < old_num_ranks, MOE_ERR_RANGE,
                    replica);
    for (int e = 0; e < num_experts; ++e) {
        const int32_t from = offset ? offset[e] : 0, upto = offset ? offset[e + 1] : 1;
        new_offset[e] = n;
        for (int32_t i = from; i < upto; ++i) {
            moe_ep_expert x;
            if (offset) {
                x = replica[i];
            } else {
                x.rank = moe_ep_owner(e, num_experts, old_num_ranks);
                x.expert = e - moe_ep_first(x.rank, num_experts, old_num_ranks);
            }
            x.rank = s->new_rank[x.rank];
            if (x.rank >= 0) new_replica[n++] = x;
        }
        disabled[e] = (uint8_t)(n == new_offset[e]);
    }
    new_offset[num_experts] = n;
    return MOE_OK;
}

#endif
