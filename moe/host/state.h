/* state.h: all state of the CPU backend: threads, warps, blocks, grids, streams, devices, and the
   one scheduler of the program that holds them. sched.h runs it. */
#ifndef MOE_HOST_STATE_H
#define MOE_HOST_STATE_H

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
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
    MOEH_DEVICES = 8,         /* most virtual devices */
    MOEH_SMS = 4,             /* multiprocessors of a device */
    MOEH_BLOCKS_PER_SM = 2,   /* most blocks of a multiprocessor */
    MOEH_SMEM_BLOCK = 232448, /* most shared memory of a block, bytes */
    MOEH_SMEM_SM = 233472,    /* shared memory of a multiprocessor, bytes */
    MOEH_DYNAMIC = 128        /* dynamic shared memory begins so many bytes past a multiple of 1024,
                                 in every block */
};

struct moeh_copy { /* an asynchronous copy in flight */
    void* to;
    const void* from;
    size_t bytes, keep; /* bytes of the copy; bytes that are read, zeros follow */
    uint64_t group;     /* number of its group */
};

struct moeh_bulk { /* a copy in flight that arrives at a barrier in shared memory: hopper.h */
    const uint64_t* bar;
    int bytes;                  /* that the barrier counts */
    bool arrives;               /* counts as an arrival too */
    std::function<void()> move; /* does the copy */
};

struct moeh_named { /* a named barrier: hopper.h */
    unsigned arrived;
    uint64_t round;
};

struct moeh_wgmma { /* a product of a warp in flight: hopper.h */
    float* c[32];   /* accumulators of each lane */
    uint64_t a, b;  /* descriptors */
    int add, columns, a_major, b_major, dtype; /* add: 1: adds to c */
    uint64_t group; /* number of its group */
};

struct moeh_thread {
    moeh_fiber fiber;
    dim3 tid;
    unsigned lane;                 /* 0 .. 31 */
    struct moeh_block* block;      /* null: this is the host */
    struct moeh_warp* warp;        /* null: this is the host */
    bool waited;                   /* has called moe_pdl_wait */
    uint64_t groups;               /* groups of copies closed so far */
    std::vector<moeh_copy> copies; /* in flight, in order */
    std::vector<std::function<void()>> boxes; /* stores of boxes in flight: hopper.h */
};

/* What a lane brings to a warp intrinsic and takes from it: warp.h. */
typedef void (*moeh_meet_fn)(struct moeh_warp* warp, uint32_t mask);
struct moeh_meeting {
    uint32_t mask;          /* lanes that meet */
    unsigned from;          /* lane that a shuffle reads */
    uint64_t value, result; /* brought; taken */
    const char* name;       /* of the intrinsic */
    moeh_meet_fn finish;    /* computes the results of all lanes */
};

struct moeh_warp {
    unsigned index;
    uint32_t exist, live;                       /* lanes of the warp; those that have not ended */
    uint32_t ready, spinning, barrier, meeting; /* lanes by what they wait for; a running one:
                                                   none */
    moeh_meeting at[32];                        /* by lane */
    uint64_t wgmma_groups;                      /* groups of products closed so far */
    std::vector<moeh_wgmma> wgmma;              /* in flight, in order */
};

struct moeh_cluster { /* blocks that start together and see each other's shared memory */
    std::vector<struct moeh_block*> block; /* by rank; null: has ended */
    unsigned arrived;                      /* threads at the cluster's barrier */
    uint64_t round;                        /* of the barrier */
};

struct moeh_array { /* static shared memory of one declaration */
    const void* site;
    unsigned char* memory;
    size_t bytes;
};

struct moeh_block {
    struct moeh_grid* grid;
    std::shared_ptr<moeh_cluster> cluster;
    unsigned rank; /* in the cluster */
    dim3 index;
    unsigned live, arrived; /* threads: not ended, at the barrier */
    bool vote, voted;       /* of the barrier being gathered; of the one passed last */
    uint32_t ready_warps;   /* bit i: warp i has a ready lane */
    size_t shared_bytes;    /* static and dynamic */
    unsigned char* dynamic; /* dynamic shared memory */
    std::vector<moeh_array> shared;
    std::vector<moeh_thread*> thread;
    std::vector<moeh_warp> warp;
    moeh_warp* current;          /* the warp whose lanes run */
    std::vector<moeh_bulk> bulk; /* in flight */
    moeh_named named[16];
};

struct moeh_grid {
    std::function<void()> kernel; /* with its argument */
    const char* name;
    int device;
    dim3 grid, block;
    size_t smem;                   /* dynamic shared memory, bytes */
    bool dependent;                /* every thread must call moe_pdl_wait */
    unsigned room;                 /* units of the device that a block takes */
    unsigned cluster;              /* blocks of a cluster, along x; 1: none */
    uint64_t total, started, done; /* numbers of blocks */
    uint64_t next, step;           /* next cluster to start; moves by `step`, modulo their number */
};

typedef std::function<bool()> moeh_op; /* advances; returns true when complete */

struct moeh_graph { /* the operations that the streams of one capture have recorded */
    std::vector<moeh_op> ops;
    struct moeh_stream* origin; /* the stream on which the capture began */
    bool open;                  /* neither ended nor invalidated */
};

struct moeh_stream {
    int device;
    bool null, blocking, destroyed;                 /* null: the null stream of its device */
    std::deque<std::pair<uint64_t, moeh_op>> queue; /* number in the order of calls, operation */
    std::shared_ptr<moeh_graph> capture;            /* null: not capturing */
};

struct moeh_sched {
    int devices = 1, current = 0;  /* devices (a test may set it); that of cudaSetDevice */
    unsigned room[MOEH_DEVICES];   /* free units of each device */
    moeh_thread host = moeh_thread();
    std::vector<moeh_stream*> streams; /* [i], i < MOEH_DEVICES: null stream of device i */
    std::vector<moeh_block*> alive;    /* blocks that have started and not ended */
    std::vector<moeh_thread*> pool;    /* unused threads */
    uint64_t seed = 0, random = 0;     /* 0: natural order; state of the generator */
    uint64_t calls = 0;                /* operations queued so far */
    int budget = 0;                    /* switches left in this turn */
    bool changed = false;              /* an operation may start that could not before */
    uint64_t clock = 0;                /* nanoseconds: moeh_clock */
    uint64_t spins = 0;                /* polls since a thread or an operation ended */
    uint64_t spin_limit = 100000000;   /* polls that fail a run */
    cudaError_t sticky = cudaSuccess;  /* error of a failed run */
    std::string report;
    std::map<void*, size_t> memory;  /* bytes of each cudaMalloc that is not freed */
    size_t taken = 0;                /* all of them */
    std::set<const void*> preloaded; /* kernels that moe_preload_kernel was given */
    bool preload_only = false;       /* 1: a launch of others fails the run */
    std::set<const void*> launched;  /* kernels launched while preload_only was 1 */
};

/* Returns the running thread; its address never changes while the thread exists. */
inline moeh_thread*& moeh_now()
{
    static moeh_thread* now;
    return now;
}

/* Returns 32 random bits: xorshift64*. */
inline uint64_t moeh_random(moeh_sched& s)
{
    s.random ^= s.random << 13;
    s.random ^= s.random >> 7;
    s.random ^= s.random << 17;
    return s.random * 0x2545f4914f6cdd1dull >> 32;
}

/* Sets the order of threads, warps and blocks from here on; 0 is the natural one. */
inline void moeh_seed(moeh_sched& s, uint64_t seed)
{
    s.seed = seed;
    s.random = (seed * 0x9e3779b97f4a7c15ull) | 1;
    for (int i = 0; i < 4; ++i) moeh_random(s);
}

/* Returns a scheduler with the settings of the environment. */
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

/* Returns the program's scheduler. Never destroyed: static objects of the user may still free
   memory. */
inline moeh_sched& moeh_get()
{
    static moeh_sched* const s = moeh_new_sched();
    return *s;
}

#endif
