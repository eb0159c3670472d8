/* state.h: all that the CPU backend keeps: threads, warps, blocks, operations, streams, events,
   devices, and the one scheduler of the program that they hang off. sched.h sets it going.

   A warp notes what its lanes do in masks; a lane in none of them waits in a meeting (warp.h). An
   operation stays where it is in its stream's queue while its blocks point to it. */
#ifndef MOE_HOST_STATE_H
#define MOE_HOST_STATE_H

#include <stdlib.h>
#include <string.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "types.h"

enum {
    MOEH_DEVICES = 8,
    MOEH_SMS = 4,
    MOEH_BLOCKS_PER_SM = 2,
    MOEH_SMEM_BLOCK = 232448, /* most shared memory of a block */
    MOEH_SMEM_SM = 233472,
    MOEH_WARP_WORDS = 32
};

struct moeh_copy { /* an asynchronous copy under way */
    void* to;
    const void* from;
    size_t bytes, keep;
    uint64_t group;
};

struct moeh_block;
struct moeh_warp;

struct moeh_thread {
    moeh_fiber fiber;
    uint3 tid;
    unsigned lane;
    moeh_block* block; /* null: this is the host */
    moeh_warp* warp;
    uint64_t groups; /* groups of copies closed so far */
    std::vector<moeh_copy> copies;
};

struct moeh_meeting { /* lanes of one mask coming together at a warp intrinsic */
    uint32_t mask, arrived;
    int kind; /* MOEH_MEET_*, warp.h */
    const char* name;
};

struct moeh_warp {
    unsigned index;
    uint32_t exist, live;               /* lanes that there are, that have not ended */
    uint32_t ready, spinning, barrier;  /* lanes by what they do; the others are in a meeting */
    uint32_t meetings;                  /* entries of meeting[] in use */
    moeh_meeting meeting[MOEH_WARP_WORDS];
    uint64_t value[MOEH_WARP_WORDS], result[MOEH_WARP_WORDS]; /* by lane */
    int arg[MOEH_WARP_WORDS];
};

struct moeh_op {
    /* exactly one of: a kernel (block.x > 0), a wait (event_done), an action */
    std::function<void()> act;
    std::function<bool()> event_done;
    dim3 grid, block = dim3(0);
    size_t smem = 0;
    const char* name = "";
    uint64_t sequence = 0; /* place in the order of calls */
    /* of a kernel under way */
    struct moeh_device* device = nullptr;
    uint64_t total = 0, next = 0, done = 0, step = 1, offset = 0;
    bool started = false;
};

struct moeh_shared_site {
    const void* site;
    void* memory;
};

struct moeh_block {
    moeh_op* op;
    uint3 index;
    unsigned live, arrived;                      /* threads: not ended, at the barrier */
    unsigned vote_or, vote_count;                /* of the barrier being gathered */
    unsigned voted_or, voted_count, voted_and;   /* of the one passed last */
    uint32_t ready_warps, spinning_warps;
    unsigned room; /* share of the device it takes */
    size_t shared_bytes;
    moeh_warp* current;
    unsigned char* dynamic;
    std::vector<moeh_shared_site> sites;
    std::vector<moeh_thread*> thread;
    moeh_warp warp[32];
};

struct moeh_event {
    uint64_t tickets = 0;       /* records queued so far */
    std::set<uint64_t> pending; /* those not reached yet */
    bool timing = true;
    double at_ms = 0;                          /* when the last one was reached */
    std::weak_ptr<struct moeh_capture> capture; /* where it was recorded last */
    bool captured = false;
};

struct moeh_capture { /* what the streams of one capture have recorded */
    std::vector<moeh_op> ops;
    bool invalid = false, relaxed = false;
};

struct moeh_stream {
    struct moeh_device* device;
    bool blocking, destroyed;
    std::deque<moeh_op> queue;
    std::shared_ptr<moeh_capture> capture;
    bool capture_origin;
};

struct moeh_device {
    int index;
    unsigned room; /* free places for blocks */
    size_t allocated;
    std::vector<std::unique_ptr<moeh_stream>> streams; /* [0] is the null stream */
};

struct moeh_sched {
    moeh_device device[MOEH_DEVICES];
    int devices = 1, current = 0;
    moeh_thread host = moeh_thread();
    std::vector<moeh_block*> alive, block_pool;
    std::vector<moeh_thread*> thread_pool;
    uint64_t seed = 0, random = 0, sequence = 0;
    int budget = 0;
    bool changed = false;                   /* something may start that could not before */
    uint64_t spins = 0, spins_unended = 0;  /* since anybody moved; since anybody ended */
    uint64_t spin_limit = 50000000;
    cudaError_t sticky = cudaSuccess, last = cudaSuccess;
    std::string report;
    std::map<uintptr_t, std::pair<size_t, int>> memory; /* ~address: leaks stay visible to LSan */
    std::map<moeh_event*, std::shared_ptr<moeh_event>> events;
};

/* The thread that runs; its address never changes while the thread lives. */
inline moeh_thread*& moeh_now()
{
    static moeh_thread* now;
    return now;
}

inline uint64_t moeh_random(moeh_sched& s)
{
    s.random ^= s.random << 13;
    s.random ^= s.random >> 7;
    s.random ^= s.random << 17;
    return s.random * 0x2545f4914f6cdd1dull >> 32;
}

inline void moeh_seed_with(moeh_sched& s, uint64_t seed)
{
    s.seed = seed;
    s.random = (seed + 1) * 0x9e3779b97f4a7c15ull;
    if (!s.random) s.random = 1;
    for (int i = 0; i < 4; ++i) moeh_random(s);
}

inline moeh_stream* moeh_new_stream(moeh_device& d, bool blocking)
{
    std::unique_ptr<moeh_stream> stream(new moeh_stream());
    stream->device = &d;
    stream->blocking = blocking;
    stream->destroyed = stream->capture_origin = false;
    d.streams.push_back(std::move(stream));
    return d.streams.back().get();
}

inline moeh_sched* moeh_new_sched()
{
    moeh_sched* s = new moeh_sched();
    const char* devices = getenv("MOE_HOST_DEVICES");
    const char* seed = getenv("MOE_HOST_SEED");
    const int n = devices ? atoi(devices) : 1;
    s->devices = n < 1 ? 1 : n > MOEH_DEVICES ? (int)MOEH_DEVICES : n;
    moeh_seed_with(*s, seed ? strtoull(seed, nullptr, 0) : 0);
    for (int i = 0; i < MOEH_DEVICES; ++i) {
        s->device[i].index = i;
        s->device[i].room = MOEH_SMS * MOEH_BLOCKS_PER_SM;
        s->device[i].allocated = 0;
        moeh_new_stream(s->device[i], true);
    }
    moeh_now() = &s->host;
    return s;
}

/* The program's scheduler. Never destroyed: static objects of the user may still free memory. */
inline moeh_sched& moeh_get()
{
    static moeh_sched* const s = moeh_new_sched();
    return *s;
}

#endif
