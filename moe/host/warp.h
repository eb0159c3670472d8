/* warp.h: warp intrinsics. A warp is 32 consecutive threads of a block.

   Every intrinsic is a meeting of the lanes that its mask names, and of no others: meetings of
   different masks of one warp go on side by side. Each lane leaves a value; the last to come
   computes everybody's result, so a lane may hurry on to its next meeting.

   Fails the run (cudaErrorLaunchFailure, see moeh_report): a mask without the calling lane or
   with a lane that has ended, and lanes of one mask at different intrinsics. Lanes that the
   block never had are taken out of a mask. A lane outside the mask shuffles out 0xFF bytes. */
#ifndef MOE_HOST_WARP_H
#define MOE_HOST_WARP_H

#include "sched.h"

enum {
    MOEH_MEET_SYNC, MOEH_MEET_SHUFFLE, MOEH_MEET_BALLOT, MOEH_MEET_MATCH,
    MOEH_MEET_ADD, MOEH_MEET_MIN, MOEH_MEET_MAX, MOEH_MEET_UMIN, MOEH_MEET_UMAX,
    MOEH_MEET_AND, MOEH_MEET_OR, MOEH_MEET_XOR, MOEH_MEET_CALL
};

inline const char* moeh_meet_name(int kind)
{
    static const char* const name[] = {"__syncwarp", "shuffle", "vote", "match", "reduce add",
                                       "reduce min", "reduce max", "reduce min", "reduce max",
                                       "reduce and", "reduce or", "reduce xor", "tensor core"};
    return name[kind];
}

/* What a meeting may compute beyond the kinds above: called once, by the last lane to come, with
   the values (pointers, say) that the lanes left. */
typedef void (*moeh_meet_fn)(const uint64_t* value_of_lane, uint32_t mask);

inline uint64_t moeh_fold(int kind, uint64_t a, uint64_t b)
{
    switch (kind) {
    case MOEH_MEET_ADD: return (uint32_t)(a + b);
    case MOEH_MEET_MIN: return (int32_t)b < (int32_t)a ? b : a;
    case MOEH_MEET_MAX: return (int32_t)b > (int32_t)a ? b : a;
    case MOEH_MEET_UMIN: return b < a ? b : a;
    case MOEH_MEET_UMAX: return b > a ? b : a;
    case MOEH_MEET_AND: return a & b;
    case MOEH_MEET_OR: return a | b;
    default: return a ^ b;
    }
}

inline void moeh_meet_results(moeh_warp* w, uint32_t mask, int kind, moeh_meet_fn call)
{
    const unsigned first = (unsigned)__builtin_ctz(mask);
    uint64_t all = w->value[first];
    uint32_t m;
    switch (kind) {
    case MOEH_MEET_SYNC: return;
    case MOEH_MEET_CALL: call(w->value, mask); return;
    case MOEH_MEET_SHUFFLE:
        for (m = mask; m; m &= m - 1) {
            const unsigned lane = (unsigned)__builtin_ctz(m), from = (unsigned)w->arg[lane] & 31u;
            w->result[lane] = mask >> from & 1u ? w->value[from] : ~(uint64_t)0;
        }
        return;
    case MOEH_MEET_MATCH:
        for (m = mask; m; m &= m - 1) {
            const unsigned lane = (unsigned)__builtin_ctz(m);
            uint64_t same = 0;
            for (uint32_t n = mask; n; n &= n - 1)
                if (w->value[__builtin_ctz(n)] == w->value[lane]) same |= n & -n;
            w->result[lane] = same;
        }
        return;
    case MOEH_MEET_BALLOT:
        for (all = 0, m = mask; m; m &= m - 1)
            all |= w->value[__builtin_ctz(m)] << __builtin_ctz(m);
        break;
    default:
        for (m = mask & (mask - 1); m; m &= m - 1)
            all = moeh_fold(kind, all, w->value[__builtin_ctz(m)]);
    }
    for (m = mask; m; m &= m - 1) w->result[__builtin_ctz(m)] = all;
}

/* The calling lane comes to the meeting of `mask` and leaves with its result. */
__attribute__((noinline)) inline uint64_t moeh_meet(uint32_t mask, int kind, uint64_t value,
                                                    int arg, moeh_meet_fn call)
{
    moeh_sched& s = moeh_get();
    moeh_thread* const t = moeh_now();
    moeh_block* const b = t->block;
    moeh_warp* const w = t->warp;
    const unsigned lane = t->lane;
    moeh_meeting* meeting = nullptr;
    mask &= w->exist;
    if (!(mask >> lane & 1u)) moeh_fail("calls a warp intrinsic with a mask that leaves it out");
    if (mask & ~w->live) moeh_fail("calls a warp intrinsic with a mask that names an ended lane");
    for (uint32_t m = w->meetings; m && !meeting; m &= m - 1)
        if (w->meeting[__builtin_ctz(m)].mask == mask) meeting = &w->meeting[__builtin_ctz(m)];
    if (!meeting) {
        const int at = __builtin_ctz(~w->meetings); /* at most 31 others wait: one is free */
        w->meetings |= 1u << at;
        meeting = &w->meeting[at];
        meeting->mask = mask;
        meeting->arrived = 0;
        meeting->kind = kind;
        meeting->name = moeh_meet_name(kind);
    }
    if (meeting->kind != kind) moeh_fail("meets lanes of its mask at another warp intrinsic");
    w->value[lane] = value;
    w->arg[lane] = arg;
    meeting->arrived |= 1u << lane;
    if (meeting->arrived == mask) {
        w->meetings &= ~(1u << (meeting - w->meeting));
        moeh_meet_results(w, mask, kind, call);
        moeh_moved(s);
        if (!s.seed) { /* the others wait for their turn; this lane goes on */
            if (mask & (mask - 1)) moeh_make_ready(b, w, mask & ~(1u << lane));
            return w->result[lane];
        }
        moeh_make_ready(b, w, mask);
    }
    moeh_leave(false);
    return w->result[lane];
}

inline void __syncwarp(unsigned mask = 0xffffffffu)
{
    moeh_meet(mask, MOEH_MEET_SYNC, 0, 0, nullptr);
}

template <class T>
inline T moeh_shuffle(unsigned mask, T v, int from)
{
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = moeh_meet(mask, MOEH_MEET_SHUFFLE, bits, from, nullptr);
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* The lane that each variant reads: its own where it would leave its group of `width` lanes
   (xor may read a lower group). */
inline int moeh_lane() { return (int)moeh_now()->lane; }
inline int moeh_from(int lane, int width)
{
    return (moeh_lane() & ~(width - 1)) | (lane & (width - 1));
}
inline int moeh_from_up(unsigned d, int width)
{
    return d <= (unsigned)(moeh_lane() & (width - 1)) ? moeh_lane() - (int)d : moeh_lane();
}
inline int moeh_from_down(unsigned d, int width)
{
    return d < (unsigned)(width - (moeh_lane() & (width - 1))) ? moeh_lane() + (int)d : moeh_lane();
}
inline int moeh_from_xor(int x, int width)
{
    const int from = moeh_lane() ^ (x & 31);
    return from <= (moeh_lane() | (width - 1)) ? from : moeh_lane();
}

#define MOEH_SHUFFLES(T)                                                                          \
    inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32)                            \
    {                                                                                             \
        return moeh_shuffle(mask, v, moeh_from(lane, width));                                     \
    }                                                                                             \
    inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32)                   \
    {                                                                                             \
        return moeh_shuffle(mask, v, moeh_from_up(delta, width));                                 \
    }                                                                                             \
    inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32)                 \
    {                                                                                             \
        return moeh_shuffle(mask, v, moeh_from_down(delta, width));                               \
    }                                                                                             \
    inline T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32)                   \
    {                                                                                             \
        return moeh_shuffle(mask, v, moeh_from_xor(lane_mask, width));                            \
    }
MOEH_SHUFFLES(int)
MOEH_SHUFFLES(unsigned)
MOEH_SHUFFLES(long)
MOEH_SHUFFLES(unsigned long)
MOEH_SHUFFLES(long long)
MOEH_SHUFFLES(unsigned long long)
MOEH_SHUFFLES(float)
MOEH_SHUFFLES(double)
#undef MOEH_SHUFFLES

inline unsigned __ballot_sync(unsigned mask, int v)
{
    return (unsigned)moeh_meet(mask, MOEH_MEET_BALLOT, v != 0, 0, nullptr);
}
inline int __any_sync(unsigned mask, int v) { return __ballot_sync(mask, v) != 0; }
inline int __all_sync(unsigned mask, int v) { return __ballot_sync(mask, !v) == 0; }

#define MOEH_MATCH(T)                                                                             \
    inline unsigned __match_any_sync(unsigned mask, T v)                                          \
    {                                                                                             \
        uint64_t bits = 0;                                                                        \
        memcpy(&bits, &v, sizeof v);                                                              \
        return (unsigned)moeh_meet(mask, MOEH_MEET_MATCH, bits, 0, nullptr);                      \
    }
MOEH_MATCH(int)
MOEH_MATCH(unsigned)
MOEH_MATCH(long)
MOEH_MATCH(unsigned long)
MOEH_MATCH(long long)
MOEH_MATCH(unsigned long long)
MOEH_MATCH(float)
MOEH_MATCH(double)
#undef MOEH_MATCH

#define MOEH_REDUCE(T, name, kind)                                                                \
    inline T __reduce_##name##_sync(unsigned mask, T v)                                           \
    {                                                                                             \
        return (T)(uint32_t)moeh_meet(mask, MOEH_MEET_##kind, (uint32_t)v, 0, nullptr);           \
    }
MOEH_REDUCE(int, add, ADD)
MOEH_REDUCE(int, min, MIN)
MOEH_REDUCE(int, max, MAX)
MOEH_REDUCE(unsigned, add, ADD)
MOEH_REDUCE(unsigned, min, UMIN)
MOEH_REDUCE(unsigned, max, UMAX)
MOEH_REDUCE(unsigned, and, AND)
MOEH_REDUCE(unsigned, or, OR)
MOEH_REDUCE(unsigned, xor, XOR)
#undef MOEH_REDUCE

#endif
