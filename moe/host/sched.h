/* sched.h: what waits for the CPU, and which thread runs next.

   A stream is a queue of operations, done in order. An operation is a function that is called until
   it returns true: complete. The operation of a grid starts its blocks while the device has room. A
   device has 4 multiprocessors of 2 blocks each, or of 1 where a block takes more than half of the
   shared memory.

   The host runs moeh_pump while it waits. A pump starts what can start and gives the CPU to every
   alive block in turn. Within its turn the fibers of a block switch to each other directly: a lane
   that waits looks for a ready lane of its warp, then of its block. Without one, or when the turn's
   budget of switches is used up, the host continues with the next block. Lanes in MOE_SPIN run in
   the block's next turn.

   Seed 0 takes lanes, warps and blocks in their natural order. Any other seed draws each choice,
   the length of each turn and the order in which blocks start.

   A run fails when
     - a block has live threads and none of them can run,
     - a thread calls moeh_fail (misuse of an intrinsic, a misaligned address),
     - a thread ends with asynchronous copies in flight,
     - a thread of a dependent launch ends without moe_pdl_wait,
     - a kernel is launched that should have been preloaded,
     - the polling has passed a limit.
   Then a report goes to stderr, every grid and every queue is discarded, and the error stays until
   moeh_reset. */
#ifndef MOE_HOST_SCHED_H
#define MOE_HOST_SCHED_H

#include <stdarg.h>
#include <stdio.h>

#include "state.h"

/* ---- fibers of one block ---- */

/* Calls f with the number of each bit of the mask. */
template <class Function> inline void moeh_each(uint32_t mask, Function f)
{
    for (; mask; mask &= mask - 1) f((unsigned)__builtin_ctz(mask));
}

/* Returns one bit of a nonzero mask: the lowest, or with a seed any. */
inline unsigned moeh_choose(moeh_sched& s, uint32_t mask)
{
    if (!s.seed) return (unsigned)__builtin_ctz(mask);
    const unsigned r = (unsigned)moeh_random(s) & 31u;
    const uint32_t rotated = (mask >> r) | (mask << ((32 - r) & 31));
    return ((unsigned)__builtin_ctz(rotated) + r) & 31u;
}

/* Marks lanes of a warp as ready to run. */
inline void moeh_make_ready(moeh_block* b, moeh_warp* w, uint32_t lanes)
{
    w->ready |= lanes;
    b->ready_warps |= 1u << w->index;
}

/* Returns the next thread to run: of block b, or the host. */
inline moeh_thread* moeh_pick(moeh_sched& s, moeh_block* b)
{
    moeh_warp* w = b->current;
    if (--s.budget < 0 || !b->ready_warps) return &s.host;
    if (!w->ready || (s.seed && !(moeh_random(s) & 7)))
        b->current = w = &b->warp[moeh_choose(s, b->ready_warps)];
    const unsigned lane = moeh_choose(s, w->ready);
    w->ready &= ~(1u << lane);
    if (!w->ready) b->ready_warps &= ~(1u << w->index);
    return b->thread[w->index * 32 + lane];
}

/* Gives the CPU away. The running thread has recorded what it waits for, or that it ended. */
__attribute__((noinline)) inline void moeh_leave(bool ends)
{
    moeh_sched& s = moeh_get();
    moeh_thread* const me = moeh_now();
    moeh_thread* const to = s.sticky ? &s.host : moeh_pick(s, me->block);
    if (to == me) return;
    moeh_now() = to;
    moeh_fiber_switch(&me->fiber, &to->fiber, ends);
}

/* Appends to the report. */
inline void moeh_say(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline void moeh_say(const char* format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    moeh_get().report += text;
}

/* Reports a block: "kernel foo: block (3,0,0): 31 of 32 live threads wait at __syncthreads; ..." */
inline void moeh_describe(const moeh_block* b)
{
    unsigned shown = 0;
    int spinning = 0;
    moeh_say("kernel %s: block (%u,%u,%u): %u of %u live threads wait at __syncthreads",
             b->grid->name, b->index.x, b->index.y, b->index.z, b->arrived, b->live);
    for (const moeh_warp& w : b->warp) {
        spinning += __builtin_popcount(w.spinning);
        moeh_each(w.meeting, [&](unsigned lane) {
            if (++shown <= 8)
                moeh_say("; thread %u waits in %s with mask 0x%08x", w.index * 32 + lane,
                         w.at[lane].name, w.at[lane].mask);
        });
    }
    moeh_say("%s; %d poll in MOE_SPIN\n", shown > 8 ? "; and so on" : "", spinning);
}

/* Marks the run as failed; reports the reason and the state of `first` and the other blocks. */
inline void moeh_set_failed(const char* why, const moeh_block* first)
{
    moeh_sched& s = moeh_get();
    s.sticky = cudaErrorLaunchFailure;
    moeh_say("%s\n", why);
    if (first) moeh_describe(first);
    for (size_t i = 0; i < s.alive.size() && i < 8; ++i)
        if (s.alive[i] && s.alive[i] != first) moeh_describe(s.alive[i]);
    fprintf(stderr, "%s%zu blocks were alive\n", s.report.c_str(), s.alive.size());
}

/* Records that the calling thread has waited for the kernels before its own. */
inline void moeh_pdl_wait() { moeh_now()->waited = true; }

/* For stand-ins of intrinsics: the calling thread met misuse. Fails the run, does not return. */
inline void moeh_fail(const char* why)
{
    const moeh_thread* const t = moeh_now();
    moeh_say("thread (%u,%u,%u) of the first block below ", t->tid.x, t->tid.y, t->tid.z);
    moeh_set_failed(why, t->block);
    for (;;) moeh_leave(false);
}

/* Lets the threads at the barrier run, and ends the vote. */
inline void moeh_release_barrier(moeh_block* b)
{
    for (moeh_warp& w : b->warp) {
        if (w.barrier) moeh_make_ready(b, &w, w.barrier);
        w.barrier = 0;
    }
    b->voted = b->vote;
    b->vote = false;
    b->arrived = 0;
}

/* Runs in every fiber: its thread of the kernel, once. */
inline void moeh_thread_main()
{
    moeh_fiber_arrived();
    moeh_thread* const t = moeh_now();
    moeh_block* const b = t->block;
    moeh_warp* const w = t->warp;
    const uint32_t me = 1u << t->lane;
    b->grid->kernel();
    moeh_each(w->meeting, [&](unsigned lane) {
        if (w->at[lane].mask & me)
            moeh_fail("ends while lanes of its warp wait for it in a warp intrinsic");
    });
    if (b->grid->dependent && !t->waited)
        moeh_fail("ends without moe_pdl_wait, in a dependent launch");
    if (!t->copies.empty()) moeh_fail("ends with asynchronous copies that it has not waited for");
    if (!t->boxes.empty()) moeh_fail("ends with stores of boxes that it has not waited for");
    w->live &= ~me;
    --b->live;
    if (!w->live && !w->wgmma.empty()) moeh_fail("ends with products that it has not waited for");
    if (!b->live && !b->bulk.empty()) moeh_fail("ends with copies that no thread has waited for");
    moeh_get().spins = 0;
    if (b->arrived && b->arrived == b->live) moeh_release_barrier(b);
    moeh_leave(true);
    abort(); /* not reached: no switch returns to a thread that ended */
}

/* ---- blocks ---- */

/* Byte i of memory before it is written. The pattern is NaN in every dtype; as an integer it is
   negative and not the -1 of kernels. `p` is even. */
inline unsigned char moeh_poison_byte(size_t i) { return (i & 1) ? 0xff : 0xda; }

inline void moeh_poison(void* p, size_t bytes)
{
    for (size_t i = 0; i < bytes; ++i) ((unsigned char*)p)[i] = moeh_poison_byte(i);
}

/* Returns memory full of poison; null where memory ran out. */
inline void* moeh_poisoned(size_t bytes, size_t align)
{
    void* p = nullptr;
    if (posix_memalign(&p, align, bytes ? bytes : 1)) return nullptr;
    moeh_poison(p, bytes);
    return p;
}

/* Frees a block's memory and returns its threads to the pool. */
inline void moeh_end_block(moeh_sched& s, moeh_block* b)
{
    s.pool.insert(s.pool.end(), b->thread.rbegin(), b->thread.rend());
    for (const moeh_array& a : b->shared) free(a.memory);
    free(b->dynamic - MOEH_DYNAMIC);
    b->cluster->block[b->rank] = nullptr;
    s.room[b->grid->device] += b->grid->room;
    delete b;
}

/* Starts block number `number` of a grid, the one with this rank in its cluster. */
inline void moeh_start_block(moeh_sched& s, moeh_grid* g, uint64_t number,
                             const std::shared_ptr<moeh_cluster>& cluster, unsigned rank)
{
    const dim3 dim = g->block;
    const unsigned n = dim.x * dim.y * dim.z;
    moeh_block* const b = new moeh_block();
    s.alive.push_back(b);
    b->grid = g;
    b->cluster = cluster;
    b->rank = rank;
    cluster->block[rank] = b;
    b->index.x = (unsigned)(number % g->grid.x);
    b->index.y = (unsigned)(number / g->grid.x % g->grid.y);
    b->index.z = (unsigned)(number / g->grid.x / g->grid.y);
    ++g->started;
    s.room[g->device] -= g->room;
    b->live = n;
    b->shared_bytes = g->smem;
    b->dynamic = (unsigned char*)moeh_poisoned(MOEH_DYNAMIC + g->smem, 1024) + MOEH_DYNAMIC;
    b->warp.resize((n + 31) / 32);
    b->current = &b->warp[0];
    b->thread.reserve(n);
    for (unsigned i = 0; i < n; ++i) {
        if (s.pool.empty()) {
            s.pool.push_back(new moeh_thread());
            moeh_fiber_alloc(&s.pool.back()->fiber);
        }
        moeh_thread* const t = s.pool.back();
        moeh_warp* const w = &b->warp[i / 32];
        s.pool.pop_back();
        b->thread.push_back(t);
        moeh_fiber_start(&t->fiber, moeh_thread_main);
        t->tid = dim3{i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
        t->lane = i % 32;
        t->block = b;
        t->warp = w;
        t->waited = false;
        t->groups = 0;
        t->copies.clear(); /* of a failed run */
        w->index = i / 32;
        w->exist = w->live |= 1u << t->lane;
        moeh_make_ready(b, w, 1u << t->lane);
    }
}

/* Starts the blocks of the next cluster of a grid, or the next block where there are none. */
inline void moeh_start_cluster(moeh_sched& s, moeh_grid* g)
{
    const std::shared_ptr<moeh_cluster> cluster(new moeh_cluster());
    cluster->block.resize(g->cluster);
    for (unsigned rank = 0; rank < g->cluster; ++rank)
        moeh_start_block(s, g, g->next * g->cluster + rank, cluster, rank);
    g->next = (g->next + g->step) % (g->total / g->cluster);
}

/* Discards every grid and every queue. */
inline void moeh_discard_all(moeh_sched& s)
{
    for (moeh_block* b : s.alive)
        if (b) moeh_end_block(s, b);
    s.alive.clear();
    for (moeh_stream* stream : s.streams) stream->queue.clear();
    s.spins = 0;
    s.changed = true;
}

/* Gives one block its turn on the CPU. Returns true when the block has ended. */
inline bool moeh_slice(moeh_sched& s, moeh_block* b)
{
    for (moeh_warp& w : b->warp) {
        if (w.spinning) moeh_make_ready(b, &w, w.spinning);
        w.spinning = 0;
    }
    if (!b->ready_warps) {
        moeh_set_failed("deadlock: no thread of the first block below can go on", b);
        return false;
    }
    /* the next warp in order: one whose lanes meet for ever must not starve the others */
    const uint32_t later = b->ready_warps & ~((2u << b->current->index) - 1);
    b->current = &b->warp[moeh_choose(s, later ? later : b->ready_warps)];
    s.budget = 8192;
    if (s.seed) s.budget = 1 + (int)(moeh_random(s) & ((2u << (moeh_random(s) % 13)) - 1));
    moeh_now() = moeh_pick(s, b);
    moeh_fiber_switch(&s.host.fiber, &moeh_now()->fiber, false);
    return !s.sticky && !b->live;
}

/* ---- streams ---- */

/* Returns true where the first operation of the stream may begin. On each device the null stream
   and the blocking ones keep the order of the calls, as with CUDA's legacy null stream. */
inline bool moeh_turn_of(const moeh_sched& s, const moeh_stream* a)
{
    for (const moeh_stream* b : s.streams)
        if (b->device == a->device && (a->null || b->null) && a->blocking && b->blocking &&
            !b->queue.empty() && b->queue.front().first < a->queue.front().first)
            return false;
    return true;
}

inline uint64_t moeh_gcd(uint64_t a, uint64_t b) { return b ? moeh_gcd(b, a % b) : a; }

/* Starts as many blocks of a grid as have room. Returns true when the grid has ended. */
inline bool moeh_advance_grid(moeh_grid* g)
{
    moeh_sched& s = moeh_get();
    if (s.seed && !g->started) {
        const uint64_t clusters = g->total / g->cluster;
        g->next = moeh_random(s) % clusters;
        do g->step = 1 + moeh_random(s) % clusters; /* visits every cluster once where it has */
        while (moeh_gcd(g->step, clusters) != 1);   /* no factor in common with their number */
    }
    while (g->started < g->total && s.room[g->device] >= g->room * g->cluster)
        moeh_start_cluster(s, g);
    return g->done == g->total;
}

/* Advances every stream as far as possible without running a thread. */
inline void moeh_advance_all(moeh_sched& s)
{
    for (bool any = true; any;) { /* what one stream completes another may wait for */
        any = false;
        for (size_t i = 0; i < s.streams.size(); ++i) {
            moeh_stream* const stream = s.streams[i];
            auto& queue = stream->queue;
            for (; !queue.empty() && moeh_turn_of(s, stream) && queue.front().second(); any = true)
                queue.pop_front();
            if (!stream->destroyed || !queue.empty()) continue;
            s.streams.erase(s.streams.begin() + (long)i--);
            delete stream;
        }
        if (any) s.spins = 0;
    }
    s.changed = false;
}

/* Lets everything that can run do so for one turn. Returns false where nothing can. */
inline bool moeh_pump(moeh_sched& s)
{
    const bool changed = s.changed;
    if (changed) moeh_advance_all(s);
    const size_t n = s.alive.size();
    for (size_t i = n; s.seed && i > 1; --i) std::swap(s.alive[i - 1], s.alive[moeh_random(s) % i]);
    size_t kept = 0;
    for (size_t i = 0; i < n; ++i) {
        moeh_block* const b = s.alive[i];
        s.alive[i] = nullptr;
        s.alive[kept++] = b;
        if (s.sticky || !moeh_slice(s, b)) continue;
        s.alive[--kept] = nullptr;
        ++b->grid->done;
        moeh_end_block(s, b);
        s.changed = true;
    }
    s.alive.resize(kept);
    if (s.spins > s.spin_limit && !s.sticky)
        moeh_set_failed("threads poll in MOE_SPIN and nothing else happens", nullptr);
    if (s.sticky) moeh_discard_all(s);
    return changed || n;
}

/* Makes the host wait until done() returns true. A wait that can never end fails the run. */
template <class Function> inline cudaError_t moeh_host_wait(Function done)
{
    moeh_sched& s = moeh_get();
    if (moeh_now()->block) return cudaErrorNotPermitted; /* a kernel called it */
    while (!s.sticky && !done())
        if (!moeh_pump(s)) {
            moeh_set_failed("the host waits for what no queue holds", nullptr);
            moeh_discard_all(s);
        }
    return s.sticky;
}

/* ---- controls ---- */

inline void moeh_set_seed(uint64_t seed) { moeh_seed(moeh_get(), seed); }

/* 1: from here on, the launch of a kernel that moe_preload_kernel was not given fails the run. The
   environment's MOE_HOST_PRELOAD=1 sets it from the start. */
inline void moeh_require_preload(int on) { moeh_get().preload_only = on; }

/* Returns what failed; "" where nothing did. */
inline const char* moeh_report() { return moeh_get().report.c_str(); }

/* Discards all queued and running work and clears the error. Memory and streams stay; events must
   be recorded anew. */
inline void moeh_reset()
{
    moeh_sched& s = moeh_get();
    moeh_discard_all(s);
    s.sticky = cudaSuccess;
    s.report.clear();
}

#endif
