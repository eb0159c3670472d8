/* block.h: what a thread does with its block: barrier, polling, shared memory, and copies into
   shared memory that arrive only when waited for. */
#ifndef MOE_HOST_BLOCK_H
#define MOE_HOST_BLOCK_H

#include "sched.h"

/* A GPU refuses an address that is no multiple of the bytes moved there. */
inline void moeh_check_aligned(const void* p, size_t bytes, const char* why)
{
    if ((uintptr_t)p % bytes) moeh_fail(why);
}

/* Waits for the live threads of the block; those that have ended are not waited for. Returns
   whether any of them brought a vote. */
__attribute__((noinline)) inline bool moeh_barrier(bool vote)
{
    moeh_thread* const t = moeh_now();
    moeh_block* const b = t->block;
    b->vote |= vote;
    t->warp->barrier |= 1u << t->lane;
    if (++b->arrived == b->live) moeh_release_barrier(b);
    moeh_leave(false);
    return b->voted;
}

inline void __syncthreads() { moeh_barrier(false); }
inline int __syncthreads_or(int v) { return moeh_barrier(v != 0); }

/* MOE_SPIN: everybody else may run first, in this block, other grids and other devices. */
__attribute__((noinline)) inline void moeh_spin()
{
    moeh_thread* const t = moeh_now();
    t->warp->spinning |= 1u << t->lane;
    ++moeh_get().spins;
    moeh_leave(false);
}

/* Waits until `ready()` is true: the primitive that a stand-in for an mbarrier is built on. */
template <class Function> inline void moeh_wait_until(Function ready)
{
    while (!ready()) moeh_spin();
}

/* Shared memory that one MOE_SHARED declares: found by the declaration's place in the source,
   made and poisoned by the first thread of the block to come. */
inline void* moeh_shared(const void* site, size_t bytes)
{
    moeh_block* const b = moeh_now()->block;
    for (const auto& known : b->shared)
        if (known.first == site) return known.second;
    b->shared_bytes += bytes;
    if (b->shared_bytes > MOEH_SMEM_BLOCK) moeh_fail("uses more shared memory than a block may");
    void* const made = moeh_poisoned(bytes, 128);
    if (!made) moeh_fail("out of memory for shared memory");
    b->shared.emplace_back(site, made);
    return made;
}

/* Begins a copy of `bytes` (4, 8 or 16; the addresses aligned to them, `from` only where it is
   read), of which those past `keep` become zeros. Until the wait that covers its group, the
   destination holds poison: reading it too early shows, and so does beginning the copy while
   another thread still reads what was there. */
inline void moeh_copy_async(void* to, const void* from, size_t bytes, size_t keep)
{
    moeh_thread* const t = moeh_now();
    moeh_check_aligned(to, bytes, "copies to a misaligned address");
    if (keep) moeh_check_aligned(from, bytes, "copies from a misaligned address");
    moeh_poison(to, bytes);
    t->copies.push_back(moeh_copy{to, from, bytes, keep, t->groups});
}

inline void moeh_copy_commit() { ++moeh_now()->groups; }

/* Completes all closed groups of this thread but the last `pending`. */
inline void moeh_copy_wait(int pending)
{
    moeh_thread* const t = moeh_now();
    size_t n = 0;
    for (; n < t->copies.size() && t->copies[n].group + (uint64_t)pending < t->groups; ++n) {
        const moeh_copy& c = t->copies[n];
        if (c.keep) memcpy(c.to, c.from, c.keep);
        memset((char*)c.to + c.keep, 0, c.bytes - c.keep);
    }
    t->copies.erase(t->copies.begin(), t->copies.begin() + (long)n);
}

#endif
