/* warp.h: warp intrinsics. A warp is 32 consecutive threads of a block.

   Every intrinsic is a meeting of the lanes in its mask, and of no others. Meetings of different
   masks of one warp are independent. Each lane brings a value; the last lane to arrive computes the
   results of all, so each may continue to its next meeting at once.

   Fails the run (cudaErrorLaunchFailure, see moeh_report): a mask without the calling lane or with
   a lane that has ended, and lanes of one mask at different intrinsics. Lanes that the block never
   had are removed from a mask. A shuffle from a lane outside the mask returns 0xFF bytes. */
#ifndef MOE_HOST_WARP_H
#define MOE_HOST_WARP_H

#include "sched.h"

inline unsigned moeh_lane() { return moeh_now()->lane; }

/* Brings `value` to the meeting of `mask` and returns the calling lane's result. The last lane to
   arrive calls `finish`, which computes the results in warp->at[] from what the lanes brought. */
__attribute__((noinline)) inline uint64_t moeh_meet(uint32_t mask, const char* name,
                                                    moeh_meet_fn finish, uint64_t value,
                                                    unsigned from = 0)
{
    moeh_sched& s = moeh_get();
    moeh_thread* const t = moeh_now();
    moeh_warp* const w = t->warp;
    moeh_meeting* const mine = &w->at[t->lane];
    const uint32_t me = 1u << t->lane;
    mask &= w->exist;
    if (!(mask & me)) moeh_fail("calls a warp intrinsic with a mask that leaves it out");
    if (mask & ~w->live) moeh_fail("calls a warp intrinsic with a mask that names an ended lane");
    mine->mask = mask;
    mine->from = from;
    mine->value = value;
    mine->name = name;
    mine->finish = finish;
    w->meeting |= me;
    bool all = (w->meeting & mask) == mask, alike = true;
    if (all)
        moeh_each(mask, [&](unsigned lane) {
            all &= w->at[lane].mask == mask;
            alike &= w->at[lane].finish == finish;
        });
    if (all) {
        if (!alike) moeh_fail("meets lanes of its mask at another warp intrinsic");
        w->meeting &= ~mask;
        finish(w, mask);
        if (!s.seed) { /* the others become ready; this lane continues */
            if (mask != me) moeh_make_ready(t->block, w, mask & ~me);
            return mine->result;
        }
        moeh_make_ready(t->block, w, mask);
    }
    moeh_leave(false);
    return mine->result;
}

inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    moeh_meet(mask, "__syncwarp", [](moeh_warp*, uint32_t) {}, 0);
}

/* ---- shuffles: `from` is the lane read; the own lane where `from` would leave the group ---- */

inline void moeh_finish_shuffle(moeh_warp* w, uint32_t mask)
{
    moeh_each(mask, [&](unsigned lane) {
        const unsigned from = w->at[lane].from;
        w->at[lane].result = mask >> from & 1u ? w->at[from].value : ~(uint64_t)0;
    });
}

template <class Type> inline uint64_t moeh_bits(Type v)
{
    static_assert(sizeof v == 4 || sizeof v == 8, "warp intrinsics take 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    return bits;
}

template <class Type> inline Type moeh_shuffle(unsigned mask, Type v, unsigned from)
{
    const uint64_t bits = moeh_meet(mask, "a shuffle", moeh_finish_shuffle, moeh_bits(v), from);
    memcpy(&v, &bits, sizeof v);
    return v;
}

template <class Type> inline Type __shfl_sync(unsigned mask, Type v, int lane, int width = 32)
{
    const unsigned in = (unsigned)width - 1;
    return moeh_shuffle(mask, v, (moeh_lane() & ~in) | ((unsigned)lane & in));
}
template <class Type>
inline Type __shfl_up_sync(unsigned mask, Type v, unsigned delta, int width = 32)
{
    const unsigned me = moeh_lane(), in = me & ((unsigned)width - 1);
    return moeh_shuffle(mask, v, delta <= in ? me - delta : me);
}
template <class Type>
inline Type __shfl_down_sync(unsigned mask, Type v, unsigned delta, int width = 32)
{
    const unsigned me = moeh_lane(), in = me & ((unsigned)width - 1);
    return moeh_shuffle(mask, v, delta < (unsigned)width - in ? me + delta : me);
}
template <class Type>
inline Type __shfl_xor_sync(unsigned mask, Type v, int lane_mask, int width = 32)
{
    const unsigned me = moeh_lane(), from = me ^ ((unsigned)lane_mask & 31u);
    return moeh_shuffle(mask, v, from <= (me | ((unsigned)width - 1)) ? from : me);
}

/* ---- votes, match, reductions ---- */

inline unsigned __ballot_sync(unsigned mask, int v)
{
    const moeh_meet_fn finish = [](moeh_warp* w, uint32_t lanes) {
        uint64_t all = 0;
        moeh_each(lanes, [&](unsigned lane) { all |= w->at[lane].value << lane; });
        moeh_each(lanes, [&](unsigned lane) { w->at[lane].result = all; });
    };
    return (unsigned)moeh_meet(mask, "a vote", finish, v != 0);
}
inline int __any_sync(unsigned mask, int v) { return __ballot_sync(mask, v) != 0; }
inline int __all_sync(unsigned mask, int v) { return __ballot_sync(mask, !v) == 0; }

template <class Type> inline unsigned __match_any_sync(unsigned mask, Type v)
{
    const moeh_meet_fn finish = [](moeh_warp* w, uint32_t lanes) {
        moeh_each(lanes, [&](unsigned lane) {
            w->at[lane].result = 0;
            moeh_each(lanes, [&](unsigned other) {
                if (w->at[other].value == w->at[lane].value) w->at[lane].result |= 1u << other;
            });
        });
    };
    return (unsigned)moeh_meet(mask, "__match_any_sync", finish, moeh_bits(v));
}

/* expression: of a and b, the values of two lanes or partial results */
#define MOEH_REDUCE(name, Type, expression)                                                        \
    inline Type name(unsigned mask, Type v)                                                        \
    {                                                                                              \
        const moeh_meet_fn finish = [](moeh_warp* w, uint32_t lanes) {                             \
            Type a = (Type)w->at[__builtin_ctz(lanes)].value;                                      \
            moeh_each(lanes&(lanes - 1), [&](unsigned lane) {                                      \
                const Type b = (Type)w->at[lane].value;                                            \
                a = (Type)(expression);                                                            \
            });                                                                                    \
            moeh_each(lanes, [&](unsigned lane) { w->at[lane].result = (unsigned)a; });            \
        };                                                                                         \
        return (Type)moeh_meet(mask, #name, finish, (unsigned)v);                                  \
    }
MOEH_REDUCE(__reduce_add_sync, int, (unsigned)a + (unsigned)b)
MOEH_REDUCE(__reduce_add_sync, unsigned, a + b)
MOEH_REDUCE(__reduce_min_sync, int, b < a ? b : a)
MOEH_REDUCE(__reduce_min_sync, unsigned, b < a ? b : a)
MOEH_REDUCE(__reduce_max_sync, int, b > a ? b : a)
MOEH_REDUCE(__reduce_max_sync, unsigned, b > a ? b : a)
MOEH_REDUCE(__reduce_and_sync, unsigned, a & b)
MOEH_REDUCE(__reduce_or_sync, unsigned, a | b)
MOEH_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef MOEH_REDUCE

#endif
