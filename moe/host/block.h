/* block.h: what a thread does with its block: barrier, polling, shared memory, and asynchronous
   copies into shared memory, which arrive when the thread waits for them. */
#ifndef MOE_HOST_BLOCK_H
#define MOE_HOST_BLOCK_H

#include "sched.h"

/* Fails the run where p is not a multiple of `bytes`, as a GPU would. */
inline void moeh_check_aligned(const void* p, size_t bytes, const char* why)
{
    if ((uintptr_t)p % bytes) moeh_fail(why);
}

/* Waits for the threads of the block that have not ended. Returns true where any of them brought a
   vote. */
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

/* MOE_SPIN: lets all other threads run first, of this block, other grids and other devices. */
__attribute__((noinline)) inline void moeh_spin()
{
    moeh_thread* const t = moeh_now();
    t->warp->spinning |= 1u << t->lane;
    ++moeh_get().spins;
    moeh_leave(false);
}

/* Waits until ready() returns true: the primitive for a stand-in of an mbarrier. */
template <class Function> inline void moeh_wait_until(Function ready)
{
    while (!ready()) moeh_spin();
}

/* Returns the shared memory of one MOE_SHARED, identified by `site`, its declaration. The first
   thread of the block to arrive allocates and poisons the memory. */
inline void* moeh_shared(const void* site, size_t bytes)
{
    moeh_block* const b = moeh_now()->block;
    for (const moeh_array& known : b->shared)
        if (known.site == site) return known.memory;
    b->shared_bytes += bytes;
    if (b->shared_bytes > MOEH_SMEM_BLOCK) moeh_fail("uses more shared memory than a block may");
    void* const made = moeh_poisoned(bytes, 128);
    if (!made) moeh_fail("out of memory for shared memory");
    b->shared.push_back(moeh_array{site, (unsigned char*)made, bytes});
    return made;
}

/* Returns the block of the calling thread's cluster with this rank. */
inline moeh_block* moeh_cluster_block(unsigned rank)
{
    const moeh_cluster* const c = moeh_now()->block->cluster.get();
    if (rank >= c->block.size()) moeh_fail("names a block that its cluster does not have");
    if (!c->block[rank]) moeh_fail("names a block of its cluster that has ended");
    return c->block[rank];
}

/* Returns the place in `other`'s shared memory that has the address p in the calling thread's. */
inline void* moeh_cluster_address(const void* p, moeh_block* other)
{
    const moeh_block* const b = moeh_now()->block;
    const uintptr_t at = (uintptr_t)p;
    if (at - (uintptr_t)b->dynamic < b->grid->smem)
        return other->dynamic + (at - (uintptr_t)b->dynamic);
    for (const moeh_array& mine : b->shared)
        for (const moeh_array& array : other->shared)
            if (mine.site == array.site && at - (uintptr_t)mine.memory < mine.bytes)
                return array.memory + (at - (uintptr_t)mine.memory);
    moeh_fail("names shared memory that the other block of its cluster has not");
    return nullptr;
}

/* A barrier of the threads of the cluster that have not ended. */
inline void moeh_cluster_sync()
{
    moeh_cluster* const c = moeh_now()->block->cluster.get();
    const uint64_t round = c->round;
    ++c->arrived;
    moeh_wait_until([=] {
        unsigned live = 0;
        if (c->round != round) return true;
        for (const moeh_block* b : c->block) live += b ? b->live : 0;
        if (c->arrived < live) return false;
        c->arrived = 0;
        ++c->round;
        return true;
    });
}

/* Begins a copy of `bytes` (4, 8 or 16) bytes; those past `keep` become zeros. Both addresses are
   aligned to `bytes`, `from` only where it is read. Until the wait that covers the copy's group the
   destination holds poison. Too early a read therefore shows, and so does a copy that begins while
   another thread still reads the destination. */
inline void moeh_copy_async(void* to, const void* from, size_t bytes, size_t keep)
{
    moeh_thread* const t = moeh_now();
    moeh_check_aligned(to, bytes, "copies to a misaligned address");
    if (keep) moeh_check_aligned(from, bytes, "copies from a misaligned address");
    moeh_poison(to, bytes);
    t->copies.push_back(moeh_copy{to, from, bytes, keep, t->groups});
}

/* Lets a copy arrive. */
inline void moeh_copy_arrive(const moeh_copy& c)
{
    if (c.keep) memcpy(c.to, c.from, c.keep);
    memset((char*)c.to + c.keep, 0, c.bytes - c.keep);
}

/* Closes the calling thread's group of copies. */
inline void moeh_copy_commit() { ++moeh_now()->groups; }

/* Completes all closed groups of the calling thread but the last `pending`. */
inline void moeh_copy_wait(int pending)
{
    moeh_thread* const t = moeh_now();
    size_t n = 0;
    for (; n < t->copies.size() && t->copies[n].group + (uint64_t)pending < t->groups; ++n)
        moeh_copy_arrive(t->copies[n]);
    t->copies.erase(t->copies.begin(), t->copies.begin() + (long)n);
}

#endif
