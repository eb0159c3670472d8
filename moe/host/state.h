/* state.h: all that the CPU backend keeps: threads, warps, blocks, grids, streams, devices, and
   the one scheduler of the program that they hang off. sched.h sets it going. */
#ifndef MOE_HOST_STATE_H
#define MOE_HOST_STATE_H

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
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
    MOEH_SMEM_SM = 233472
};

struct moeh_copy { /* an asynchronous copy under way */
    void* to;
    const void* from;
    size_t bytes, keep;
    uint64_t group;
};

struct moeh_thread {
    moeh_fiber fiber;
    dim3 tid;
    unsigned lane;
    struct moeh_block* block; /* null: this is the host */
    struct moeh_warp* warp;
    bool waited;     /* was in moe_pdl_wait */
    uint64_t groups; /* groups of copies closed so far */
    std::vector<moeh_copy> copies;
};

/* What a lane brings to a warp intrinsic and takes from it; warp.h. */
typedef void (*moeh_meet_fn)(struct moeh_warp* warp, uint32_t mask);
struct moeh_meeting {
    uint32_t mask;
    unsigned from;
    uint64_t value, result;
    const char* name;
    moeh_meet_fn finish;
};

struct moeh_warp {
    unsigned index;
    uint32_t exist, live; /* lanes that there are, that have not ended */
    uint32_t ready, spinning, barrier, meeting; /* by what they wait for; a running one: none */
    moeh_meeting at[32];
};

struct moeh_block {
    struct moeh_grid* grid;
    dim3 index;
    unsigned live, arrived; /* threads: not ended, at the barrier */
    bool vote, voted;       /* of the barrier being gathered, of the one passed last */
    uint32_t ready_warps;
    size_t shared_bytes;
    unsigned char* dynamic;
    std::vector<std::pair<const void*, void*>> shared; /* place of a declaration, its memory */
    std::vector<moeh_thread*> thread;
    std::vector<moeh_warp> warp;
    moeh_warp* current;
};

struct moeh_grid {
    std::function<void()> kernel; /* with its argument */
    const char* name;
    int device;
    dim3 grid, block;
    size_t smem;
    bool dependent;                /* every thread must call moe_pdl_wait */
    unsigned room;                 /* share of the device that a block takes */
    uint64_t total, started, done; /* blocks */
    uint64_t next, step;           /* which one starts next; `next` moves by `step`, in a circle */
};

typedef std::function<bool()> moeh_op; /* does what it can; true: it is complete */

struct moeh_graph { /* what the streams of one capture have recorded */
    std::vector<moeh_op> ops;
    struct moeh_stream* origin;
    bool open; /* neither ended nor spoiled */
};

struct moeh_stream {
    int device;
    bool null, blocking, destroyed;
    std::deque<std::pair<uint64_t, moeh_op>> queue; /* place in the order of calls, operation */
    std::shared_ptr<moeh_graph> capture;
};

struct moeh_sched {
    int devices = 1, current = 0;  /* how many there are (a test may set it), cudaSetDevice's */
    unsigned room[MOEH_DEVICES];   /* free places for blocks */
    moeh_thread host = moeh_thread();
    std::vector<moeh_stream*> streams; /* [i], i < MOEH_DEVICES: null stream of device i */
    std::vector<moeh_block*> alive;
    std::vector<moeh_thread*> pool;
    uint64_t seed = 0, random = 0;
    uint64_t calls = 0;               /* operations queued so far */
    int budget = 0;                   /* switches left in this slice */
    bool changed = false;             /* something may start that could not before */
    uint64_t spins = 0;               /* since a thread or an operation ended */
    uint64_t spin_limit = 100000000;  /* as many end a run */
    cudaError_t sticky = cudaSuccess; /* of a failed run */
    std::string report;
    std::set<const void*> preloaded; /* kernels that moe_preload_kernel was given */
    bool preload_only = false;       /* others fail the run */
    std::set<const void*> launched;  /* kernels, while others fail the run */
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

/* Order of threads, warps and blocks from here on; 0 is the natural one. */
inline void moeh_seed(moeh_sched& s, uint64_t seed)
{
    s.seed = seed;
    s.random = (seed * 0x9e3779b97f4a7c15ull) | 1;
    for (int i = 0; i < 4; ++i) moeh_random(s);
}

inline moeh_sched* moeh_new_sched()
{
    moeh_sched* const s = new moeh_sched();
    const char* const devices = getenv("MOE_HOST_DEVICES");
    const char* const seed = getenv("MOE_HOST_SEED");
    const char* const preload = getenv("MOE_HOST_PRELOAD");
    if (devices) s->devices = std::min(std::max(atoi(devices), 1), (int)MOEH_DEVICES);
    moeh_seed(*s, seed ? strtoull(seed, nullptr, 0) : 0);
    s->preload_only = preload && atoi(preload);
    for (int i = 0; i < MOEH_DEVICES; ++i) {
        s->room[i] = MOEH_SMS * MOEH_BLOCKS_PER_SM;
        s->streams.push_back(new moeh_stream{i, true, true, false, {}, nullptr});
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
