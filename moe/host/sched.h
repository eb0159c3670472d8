/* sched.h: what waits for the CPU, and who gets it next.

   A device holds streams; a stream is a queue of operations, done in order. An operation is a
   grid, a wait for an event, or anything else, as a function that runs in one go. A grid's
   blocks become alive as the device has room: 4 multiprocessors of 2 blocks each, or of 1 when
   the block takes more than half of their shared memory. A queued operation of the null stream
   waits for all that the device's blocking streams queued before it, and holds back what they
   queue after it, as CUDA's legacy null stream does; a stream made with cudaStreamNonBlocking
   has no part in that.

   The host runs moeh_pump while it waits. A pump starts what can start and gives every alive
   block a slice. Within a slice the fibers of a block hand over to each other directly: a lane
   that waits looks for a ready lane of its warp, then of its block; when there is none, or the
   slice's budget of switches is used up, the host goes on with the next block. Lanes in MOE_SPIN
   get their turn in the block's next slice.

   Seed 0 takes lanes, warps and blocks in their natural order. Any other seed draws each choice,
   the length of each slice and the order in which blocks start.

   A run fails when a block has live threads and none can go on, when a thread calls moeh_fail
   (misuse of an intrinsic), or when the polling has passed a limit. Then every grid and every
   queue is thrown away, and the error stays until moeh_reset. */
#ifndef MOE_HOST_SCHED_H
#define MOE_HOST_SCHED_H

#include <stdarg.h>
#include <stdio.h>

#include "state.h"

/* ---- fibers of one block ---- */

/* One bit of a mask that has some: the lowest, or with a seed any. */
inline unsigned moeh_choose(moeh_sched& s, uint32_t mask)
{
    if (!s.seed) return (unsigned)__builtin_ctz(mask);
    const unsigned r = (unsigned)moeh_random(s) & 31u;
    const uint32_t turned = (mask >> r) | (mask << ((32 - r) & 31));
    return ((unsigned)__builtin_ctz(turned) + r) & 31u;
}

inline void moeh_make_ready(moeh_block* b, moeh_warp* w, uint32_t lanes)
{
    w->ready |= lanes;
    b->ready_warps |= 1u << w->index;
}

inline moeh_thread* moeh_pick(moeh_sched& s, moeh_block* b)
{
    moeh_warp* w = b->current;
    if (--s.budget < 0 || !b->ready_warps) return &s.host;
    if (!w->ready || (s.seed && !(moeh_random(s) & 7)))
        b->current = w = b->warp + moeh_choose(s, b->ready_warps);
    const unsigned lane = moeh_choose(s, w->ready);
    w->ready &= ~(1u << lane);
    if (!w->ready) b->ready_warps &= ~(1u << w->index);
    return b->thread[w->index * 32 + lane];
}

/* The running thread has noted what it waits for (or that it ended) and gives the CPU away. */
__attribute__((noinline)) inline void moeh_leave(bool ends)
{
    moeh_sched& s = moeh_get();
    moeh_thread* const me = moeh_now();
    moeh_thread* const to = s.sticky ? &s.host : moeh_pick(s, me->block);
    if (to == me) return;
    moeh_now() = to;
    moeh_fiber_switch(&me->fiber, &to->fiber, ends);
}

inline void moeh_format(std::string* to, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
inline void moeh_format(std::string* to, const char* format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    *to += text;
}

/* "kernel foo: block (3,0,0): 31 of 32 live threads wait at __syncthreads; ..." */
inline void moeh_describe(std::string* to, const moeh_block* b)
{
    unsigned shown = 0, spinning = 0;
    moeh_format(to, "kernel %s: block (%u,%u,%u): %u of %u live threads wait at __syncthreads",
                b->op->name, b->index.x, b->index.y, b->index.z, b->arrived, b->live);
    for (unsigned i = 0; i < (b->thread.size() + 31) / 32; ++i) {
        const moeh_warp* w = &b->warp[i];
        spinning += (unsigned)__builtin_popcount(w->spinning);
        for (uint32_t m = w->meetings; m; m &= m - 1) {
            const moeh_meeting* meeting = &w->meeting[__builtin_ctz(m)];
            for (uint32_t lanes = meeting->arrived; lanes; lanes &= lanes - 1)
                if (++shown <= 8)
                    moeh_format(to, "; thread %u waits in a warp rendezvous (%s) with mask 0x%08x",
                                i * 32 + (unsigned)__builtin_ctz(lanes),
                                meeting->name, meeting->mask);
        }
    }
    if (shown > 8) moeh_format(to, "; %u more in warp rendezvous", shown - 8);
    if (spinning) moeh_format(to, "; %u threads poll in MOE_SPIN", spinning);
    *to += "\n";
}

/* Marks the run as failed with a report of what `why` says and where every block stands. */
inline void moeh_set_failed(const char* why)
{
    moeh_sched& s = moeh_get();
    if (s.sticky) return;
    const moeh_thread* t = moeh_now();
    s.sticky = cudaErrorLaunchFailure;
    if (t->block)
        moeh_format(&s.report, "kernel %s: block (%u,%u,%u): thread (%u,%u,%u): ",
                    t->block->op->name, t->block->index.x, t->block->index.y, t->block->index.z,
                    t->tid.x, t->tid.y, t->tid.z);
    s.report += why;
    s.report += "\n";
    for (size_t i = 0; i < s.alive.size() && i < 8; ++i)
        if (s.alive[i]) moeh_describe(&s.report, s.alive[i]);
    if (s.alive.size() > 8) moeh_format(&s.report, "and %zu more blocks\n", s.alive.size() - 8);
}

/* For stand-ins of intrinsics: the calling thread met misuse. Fails the run, does not return. */
inline void moeh_fail(const char* why)
{
    moeh_set_failed(why);
    for (;;) moeh_leave(false);
}

/* Somebody got past a wait: what polls may yet see what it polls for. */
inline void moeh_moved(moeh_sched& s) { s.spins = 0; }

inline void moeh_release_barrier(moeh_sched& s, moeh_block* b)
{
    for (unsigned i = 0; i < (b->thread.size() + 31) / 32; ++i) {
        moeh_warp* w = &b->warp[i];
        if (w->barrier) moeh_make_ready(b, w, w->barrier);
        w->barrier = 0;
    }
    b->voted_or = b->vote_or;
    b->voted_count = b->vote_count;
    b->voted_and = b->vote_count == b->arrived;
    b->arrived = b->vote_or = b->vote_count = 0;
    moeh_moved(s);
}

/* What every fiber runs: its thread of the kernel, once. */
inline void moeh_thread_main()
{
    moeh_fiber_arrived();
    moeh_sched& s = moeh_get();
    moeh_thread* const t = moeh_now();
    moeh_block* const b = t->block;
    moeh_warp* const w = t->warp;
    b->op->act();
    t->copies.clear(); /* what was not waited for never arrives */
    for (uint32_t m = w->meetings; m; m &= m - 1)
        if (w->meeting[__builtin_ctz(m)].mask & (1u << t->lane))
            moeh_fail("ends while lanes of its warp wait for it in a warp intrinsic");
    w->live &= ~(1u << t->lane);
    --b->live;
    s.spins_unended = 0;
    moeh_moved(s);
    if (b->arrived && b->arrived == b->live) moeh_release_barrier(s, b);
    moeh_leave(true);
    abort(); /* not reached: nobody returns to a thread that ended */
}

/* ---- blocks ---- */

inline void* moeh_poisoned(size_t bytes, size_t align)
{
    void* p = nullptr;
    if (posix_memalign(&p, align, bytes ? bytes : 1)) return nullptr;
    memset(p, 0xff, bytes);
    return p;
}

inline moeh_thread* moeh_new_thread(moeh_sched& s)
{
    moeh_thread* t;
    if (!s.thread_pool.empty()) {
        t = s.thread_pool.back();
        s.thread_pool.pop_back();
        return t;
    }
    t = new moeh_thread();
    if (!moeh_fiber_alloc(&t->fiber)) {
        delete t;
        return nullptr;
    }
    return t;
}

inline void moeh_end_block(moeh_sched& s, moeh_block* b)
{
    for (moeh_thread* t : b->thread) {
        t->copies.clear();
        s.thread_pool.push_back(t);
    }
    for (const moeh_shared_site& site : b->sites) free(site.memory);
    free(b->dynamic);
    b->thread.clear();
    b->sites.clear();
    b->op->device->room += b->room;
    s.block_pool.push_back(b);
}

inline unsigned moeh_room(const moeh_op& op)
{
    return 2 * (op.smem + 1024) > MOEH_SMEM_SM ? MOEH_BLOCKS_PER_SM : 1;
}

/* Makes the block number `number` of a grid alive; false: no memory. */
inline bool moeh_start_block(moeh_sched& s, moeh_op* op, uint64_t number)
{
    moeh_block* b;
    if (s.block_pool.empty()) b = new moeh_block();
    else {
        b = s.block_pool.back();
        s.block_pool.pop_back();
    }
    const dim3 dim = op->block;
    const unsigned n = dim.x * dim.y * dim.z;
    b->op = op;
    b->index.x = (unsigned)(number % op->grid.x);
    b->index.y = (unsigned)(number / op->grid.x % op->grid.y);
    b->index.z = (unsigned)(number / op->grid.x / op->grid.y);
    b->live = n;
    b->arrived = b->vote_or = b->vote_count = 0;
    b->voted_or = b->voted_count = b->voted_and = 0;
    b->ready_warps = b->spinning_warps = 0;
    b->room = moeh_room(*op);
    b->current = b->warp;
    b->shared_bytes = op->smem;
    b->dynamic = (unsigned char*)moeh_poisoned(op->smem, 128);
    op->device->room -= b->room;
    for (unsigned i = 0; i < n; ++i) {
        moeh_thread* t = moeh_new_thread(s);
        if (!t || !b->dynamic) {
            if (t) s.thread_pool.push_back(t);
            moeh_end_block(s, b);
            return false;
        }
        b->thread.push_back(t);
        moeh_fiber_start(&t->fiber, moeh_thread_main,
                         (unsigned)((uintptr_t)t->fiber.stack >> 16) * 5);
        t->tid.x = i % dim.x;
        t->tid.y = i / dim.x % dim.y;
        t->tid.z = i / dim.x / dim.y;
        t->block = b;
        t->lane = i & 31;
        t->warp = &b->warp[i >> 5];
        t->groups = 0;
        if (t->lane == 0) {
            moeh_warp* w = t->warp;
            w->index = i >> 5;
            w->exist = w->live = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;
            w->ready = w->spinning = w->barrier = w->meetings = 0;
            moeh_make_ready(b, w, w->live);
        }
    }
    s.alive.push_back(b);
    return true;
}

/* Throws away every grid and every queue. */
inline void moeh_discard_all(moeh_sched& s)
{
    for (moeh_block* b : s.alive)
        if (b) moeh_end_block(s, b);
    s.alive.clear();
    for (moeh_device& d : s.device)
        for (auto& stream : d.streams) stream->queue.clear();
    for (auto& event : s.events) event.second->pending.clear();
    s.spins = s.spins_unended = 0;
    s.changed = true;
}

/* Gives one block the CPU; true: it has ended. */
inline bool moeh_slice(moeh_sched& s, moeh_block* b)
{
    for (uint32_t m = b->spinning_warps; m; m &= m - 1) {
        moeh_warp* w = &b->warp[__builtin_ctz(m)];
        moeh_make_ready(b, w, w->spinning);
        w->spinning = 0;
    }
    b->spinning_warps = 0;
    { /* the next warp in turn: one that meets itself for ever must not keep out the others */
        const uint32_t later = b->ready_warps & ~((2u << b->current->index) - 1);
        b->current = b->warp + moeh_choose(s, later ? later : b->ready_warps);
    }
    s.budget = 8192;
    if (s.seed) s.budget = 1 + (int)(moeh_random(s) & ((2u << (moeh_random(s) % 13)) - 1));
    moeh_thread* const to = moeh_pick(s, b);
    if (to != &s.host) {
        moeh_now() = to;
        moeh_fiber_switch(&s.host.fiber, &to->fiber, false);
    }
    if (s.sticky) return false;
    if (!b->live) return true;
    if (!b->ready_warps && !b->spinning_warps) {
        std::string why;
        moeh_describe(&why, b);
        why.pop_back();
        why = "deadlock, no thread of a block can go on: " + why;
        moeh_set_failed(why.c_str());
    }
    return false;
}

/* ---- streams ---- */

/* May the first operation of the stream begin, by the rule of the legacy null stream? */
inline bool moeh_turn_of(const moeh_stream& stream)
{
    const moeh_device& d = *stream.device;
    const uint64_t sequence = stream.queue.front().sequence;
    if (!stream.blocking) return true;
    if (&stream != d.streams[0].get())
        return d.streams[0]->queue.empty() || d.streams[0]->queue.front().sequence > sequence;
    for (const auto& other : d.streams)
        if (other->blocking && !other->queue.empty() && other->queue.front().sequence < sequence)
            return false;
    return true;
}

inline void moeh_begin_kernel(moeh_sched& s, moeh_op* op, moeh_device* d)
{
    op->started = true;
    op->device = d;
    op->total = (uint64_t)op->grid.x * op->grid.y * op->grid.z;
    if (s.seed && op->total > 1) { /* i -> i * step + offset mod total visits every block once */
        op->offset = moeh_random(s) % op->total;
        for (;;) {
            uint64_t a = op->step = 1 + moeh_random(s) % (op->total - 1), b = op->total;
            while (b) { const uint64_t r = a % b; a = b; b = r; }
            if (a == 1) break;
        }
    }
}

/* Carries one stream on as far as it goes at once; true: something happened. */
inline bool moeh_advance(moeh_sched& s, moeh_stream& stream)
{
    bool any = false;
    while (!stream.queue.empty() && moeh_turn_of(stream)) {
        moeh_op* op = &stream.queue.front();
        if (op->block.x) {
            if (!op->started) moeh_begin_kernel(s, op, stream.device);
            while (op->next < op->total && stream.device->room >= moeh_room(*op)) {
                const unsigned __int128 at = (unsigned __int128)op->next * op->step + op->offset;
                ++op->next;
                any = true;
                if (!moeh_start_block(s, op, (uint64_t)(at % op->total))) {
                    moeh_set_failed("out of memory for the stacks or shared memory of a block");
                    return any;
                }
            }
            if (op->done < op->total) break;
        } else if (op->event_done) {
            if (!op->event_done()) break;
        } else op->act();
        stream.queue.pop_front();
        s.spins_unended = 0;
        moeh_moved(s);
        any = true;
    }
    return any;
}

inline void moeh_advance_all(moeh_sched& s)
{
    bool any = true;
    while (any && !s.sticky) {
        any = false;
        for (int d = 0; d < MOEH_DEVICES; ++d) {
            std::vector<std::unique_ptr<moeh_stream>>& streams = s.device[d].streams;
            for (size_t i = 0; i < streams.size() && !s.sticky; ++i) {
                any |= moeh_advance(s, *streams[i]);
                if (streams[i]->destroyed && streams[i]->queue.empty())
                    streams.erase(streams.begin() + (long)i--);
            }
        }
    }
    s.changed = false;
}

/* Lets everything that can run do so for a while; false: nothing can. */
inline bool moeh_pump(moeh_sched& s)
{
    const bool changed = s.changed;
    if (changed) moeh_advance_all(s);
    const size_t n = s.alive.size();
    for (size_t i = n; s.seed && i > 1; --i) std::swap(s.alive[i - 1], s.alive[moeh_random(s) % i]);
    for (size_t i = 0; i < n && !s.sticky; ++i) {
        moeh_block* b = s.alive[i];
        if (!moeh_slice(s, b)) continue;
        s.alive[i] = nullptr;
        ++b->op->done;
        moeh_end_block(s, b);
        s.changed = true;
    }
    size_t kept = 0;
    for (moeh_block* b : s.alive)
        if (b) s.alive[kept++] = b;
    s.alive.resize(kept);
    if (!s.sticky && (s.spins > s.spin_limit || s.spins_unended / 40 > s.spin_limit))
        moeh_set_failed("threads poll in MOE_SPIN and nothing else happens");
    if (s.sticky) moeh_discard_all(s);
    return changed || n;
}

/* The host waits until `done` says true, or for ever: that is a failure too. */
template <class F>
inline cudaError_t moeh_host_wait(F done)
{
    moeh_sched& s = moeh_get();
    if (moeh_now()->block) return cudaErrorNotPermitted; /* a kernel called it */
    while (!s.sticky && !done())
        if (!moeh_pump(s)) {
            moeh_set_failed("the host waits for what no queue holds");
            moeh_discard_all(s);
        }
    return s.sticky;
}

/* ---- controls ---- */

/* How many virtual devices there are: 1 to 8. */
inline void moeh_set_device_count(int n)
{
    moeh_get().devices = n < 1 ? 1 : n > MOEH_DEVICES ? (int)MOEH_DEVICES : n;
}

/* Order of threads, warps and blocks from here on; 0 is the natural one. */
inline void moeh_set_seed(uint64_t seed) { moeh_seed_with(moeh_get(), seed); }
inline uint64_t moeh_seed() { return moeh_get().seed; }

/* How many MOE_SPIN calls without any other progress end a run (and 40 times as many during
   which threads meet but none ends). */
inline void moeh_set_spin_limit(uint64_t n) { moeh_get().spin_limit = n; }

/* What went wrong; "" where nothing did. */
inline const char* moeh_report() { return moeh_get().report.c_str(); }

/* Forgets all queued and running work and the error; memory, streams and events stay. */
inline void moeh_reset()
{
    moeh_sched& s = moeh_get();
    if (moeh_now()->block) return;
    moeh_discard_all(s);
    s.sticky = s.last = cudaSuccess;
    s.report.clear();
}

#endif
