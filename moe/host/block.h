/* block.h: what a thread does with its block: barrier, polling, shared memory, and copies into
   shared memory that arrive only when waited for. */
#ifndef MOE_HOST_BLOCK_H
#define MOE_HOST_BLOCK_H

#include "sched.h"

/* Waits for the live threads of the block; those that have ended are not waited for. Gathers a
   vote on the way: the block's voted_* hold it until the next barrier. */
__attribute__((noinline)) inline moeh_block* moeh_barrier(bool vote)
{
    moeh_sched& s = moeh_get();
    moeh_thread* const t = moeh_now();
    moeh_block* const b = t->block;
    b->vote_or |= vote;
    b->vote_count += vote;
    t->warp->barrier |= 1u << t->lane;
    if (++b->arrived == b->live) moeh_release_barrier(s, b);
    moeh_leave(false);
    return b;
}

inline void __syncthreads() { moeh_barrier(false); }
inline int __syncthreads_or(int v) { return (int)moeh_barrier(v != 0)->voted_or; }
inline int __syncthreads_and(int v) { return (int)moeh_barrier(v != 0)->voted_and; }
inline int __syncthreads_count(int v) { return (int)moeh_barrier(v != 0)->voted_count; }

/* MOE_SPIN: everybody else may run first, in this block, other grids and other devices. */
__attribute__((noinline)) inline void moeh_spin()
{
    moeh_sched& s = moeh_get();
    moeh_thread* const t = moeh_now();
    if (!t->block) return;
    t->warp->spinning |= 1u << t->lane;
    t->block->spinning_warps |= 1u << t->warp->index;
    ++s.spins;
    ++s.spins_unended;
    moeh_leave(false);
}

/* Waits until `ready()` is true: the primitive that a stand-in for an mbarrier is built on. */
template <class F>
inline void moeh_wait_until(F ready)
{
    while (!ready()) moeh_spin();
}

inline void __nanosleep(unsigned) { moeh_spin(); }

/* Shared memory that one MOE_SHARED declares: found by the declaration's place in the source,
   made and poisoned by the first thread of the block to come. */
inline void* moeh_shared(const void* site, size_t bytes)
{
    moeh_block* const b = moeh_now()->block;
    for (const moeh_shared_site& known : b->sites)
        if (known.site == site) return known.memory;
    b->shared_bytes += bytes;
    if (b->shared_bytes > MOEH_SMEM_BLOCK) moeh_fail("uses more shared memory than a block may");
    const moeh_shared_site made = {site, moeh_poisoned(bytes, 128)};
    if (!made.memory) moeh_fail("out of memory for shared memory");
    b->sites.push_back(made);
    return made.memory;
}

/* Begins a copy of `bytes`, of which those past `keep` become zeros. Until the wait that covers
   its group, the destination holds poison: reading it too early shows, and so does beginning the
   copy while another thread still reads what was there. */
inline void moeh_copy_async(void* to, const void* from, size_t bytes, size_t keep)
{
    moeh_thread* const t = moeh_now();
    const moeh_copy copy = {to, from, bytes, keep, t->groups};
    if (bytes == 16) memset(to, 0xff, 16); /* the usual size, in one store */
    else memset(to, 0xff, bytes);
    t->copies.push_back(copy);
}

inline void moeh_copy_commit() { ++moeh_now()->groups; }

/* Completes all closed groups of this thread but the last `pending`. */
inline void moeh_copy_wait(int pending)
{
    moeh_thread* const t = moeh_now();
    const uint64_t end = t->groups > (uint64_t)pending ? t->groups - (uint64_t)pending : 0;
    size_t n = 0;
    for (; n < t->copies.size() && t->copies[n].group < end; ++n) {
        const moeh_copy& c = t->copies[n];
        if (c.keep == 16) memcpy(c.to, c.from, 16);
        else if (c.keep) memcpy(c.to, c.from, c.keep);
        if (c.keep < c.bytes) memset((char*)c.to + c.keep, 0, c.bytes - c.keep);
    }
    t->copies.erase(t->copies.begin(), t->copies.begin() + (long)n);
}

#endif
