/* peers.h: the ranks of one group and their symmetric regions. C11 and C++14. peers.cuh fills
   moe_peers in, signal.cuh uses it in kernels, barrier.cuh on streams.

   A rank is one participant: a GPU, or a share of one. Every rank has one region of device memory.
   All regions have the same size and layout: the object at offset n of one region is at offset n of
   every other. A region begins with moe_peers_header; the rest is the caller's, from
   MOE_PEERS_HEADER on.

   table[r] is the base of rank r's region as this rank's kernels address it. It stands in moe_peers
   on the host, in this rank's own header as a plain device array of W pointers, and in the argument
   of every kernel.

   A channel is a set of words by which ranks signal each other. Words only grow, modulo 2^32: none
   is reset, and a graph that signals and waits can be replayed. A channel serves barriers of all
   ranks (`sum`, `epoch`, `from`) or signals between pairs (`from`, `taken`), not both.

   Barrier number n of a channel, n = 1, 2, ...: every rank adds MOE_PEERS_UNIT to sum[n % 2] of
   every rank, at once or in shares of its thread blocks, and waits until its own sum[n % 2] is at
   least W MOE_PEERS_UNIT ((n + 1) / 2). One word is polled. Barriers use two words in turn: a rank
   that is one barrier ahead adds to the other one. One that is two ahead adds to the same word, but
   then all ranks have added what the wait is for. from[r] has what rank r has added so far: the
   ranks that are late are found there. epoch is the last barrier that this rank has passed. */
#ifndef MOE_EP_PEERS_H
#define MOE_EP_PEERS_H

#include <stdint.h>

#include "../base/fault.h"
#include "../faults.h"

#define MOE_PEERS_MAX_RANKS 128
#define MOE_PEERS_CHANNELS 11
#define MOE_PEERS_UNIT 65536u               /* of a barrier's sum: one rank */
#define MOE_PEERS_HEADER 16384              /* bytes before the caller's part of a region */
#define MOE_PEERS_TIMEOUT_NS 10000000000ull /* default budget of a wait: 10 s */

/* One channel, in every region. 128-byte lines: what peers write stands apart from what this rank
   writes. */
typedef struct moe_peers_channel {
    uint32_t sum[2];      /* arrivals at even and at odd barriers */
    uint32_t zeros[30];   /* never written */
    uint32_t epoch;       /* barriers that this rank has passed; own */
    uint32_t turns, left; /* of a grid that waits with several blocks: those that
                                            came so far, those that waited; own */
    uint32_t unused[29];
    uint32_t from[MOE_PEERS_MAX_RANKS];  /* [W] what each rank has added here */
    uint32_t taken[MOE_PEERS_MAX_RANKS]; /* [W] of these, waited for; own */
} moe_peers_channel;

/* The first MOE_PEERS_HEADER bytes of a region. Zeros but for the table before the first use. */
typedef struct moe_peers_header {
    char* table[MOE_PEERS_MAX_RANKS];     /* [W] base of every rank's region; own */
    uint64_t notice[MOE_PEERS_MAX_RANKS]; /* [W] fault word of each rank that stopped; 0: none */
    moe_peers_channel channel[MOE_PEERS_CHANNELS];
} moe_peers_header;

/* A compile error here: the header does not fit. */
typedef char moei_peers_header_fits[sizeof(moe_peers_header) <= MOE_PEERS_HEADER ? 1 : -1];

/* Where a rank runs. Ranks with equal `host` reach each other's memory. */
typedef struct moe_rank {
    int32_t host;  /* number of the host (of the NVLink domain), 0 .. */
    int32_t local; /* number among the host's ranks, 0 .. */
} moe_rank;

/* A group as one of its ranks sees it. Plain data: may be copied. */
typedef struct moe_peers {
    char* base;              /* this rank's region, a device address, 256-byte aligned */
    uint64_t bytes;          /* of each rank's region, header included */
    uint64_t timeout_ns;     /* budget of every wait; 0 = MOE_PEERS_TIMEOUT_NS */
    int32_t rank, num_ranks; /* this rank, 0 .. W - 1; W, 1 .. MOE_PEERS_MAX_RANKS */
    int32_t ranks_on_device; /* ranks whose kernels share this rank's GPU, this one included */
    moe_rank id[MOE_PEERS_MAX_RANKS]; /* [W] */
    char* table[MOE_PEERS_MAX_RANKS]; /* [W] base of every rank's region, device addresses */
} moe_peers;

/* What kernels take of it. */
typedef struct moe_peers_args {
    char* base;          /* this rank's region */
    uint64_t* fault;     /* [1] fault word of this rank, not null */
    uint64_t timeout_ns; /* more than 0 */
    int32_t rank, num_ranks;
    int32_t shared;                   /* 1: other ranks' kernels run on this rank's GPU too */
    char* table[MOE_PEERS_MAX_RANKS]; /* [W] */
} moe_peers_args;

/* What a rank does when it waits; reported with a fault. */
typedef enum moe_peers_phase {
    MOE_PHASE_USER,     /* a wait of the caller's */
    MOE_PHASE_DISPATCH, /* tokens from all ranks */
    MOE_PHASE_COMBINE,  /* results from all ranks */
    MOE_PHASE_REDUCE,   /* addends from all ranks: an all-reduce, gradients of gate weights */
    MOE_PEERS_PHASES
} moe_peers_phase;

/* The fault PEER_LATE: which rank waited for which. */
typedef struct moe_peers_late {
    int32_t late;  /* rank that did not come; -1: the word holds another fault or none */
    int32_t rank;  /* rank that waited */
    int32_t phase; /* moe_peers_phase */
    int32_t tag;   /* the caller's, 0 .. 2^24 - 1 */
} moe_peers_late;

/* The index of PEER_LATE, 44 bits: late 12, phase 8, tag 24. */
#define MOEI_PEERS_INDEX(late, phase, tag)                                                         \
    ((int64_t)(late) << 32 | (int64_t)((phase)&0xff) << 24 | (int64_t)((tag)&0xffffff))

/* Returns which rank was late, from a fault word that was copied to the host. */
MOE_HOST moe_peers_late moe_peers_late_decode(uint64_t word)
{
    const moe_fault f = moe_fault_decode(word);
    moe_peers_late l = {-1, 0, 0, 0};
    if (f.code == MOE_FAULT_PEER_LATE) {
        l.late = (int32_t)(f.index >> 32 & 0xfff);
        l.rank = f.rank;
        l.phase = (int32_t)(f.index >> 24 & 0xff);
        l.tag = (int32_t)(f.index & 0xffffff);
    }
    return l;
}

#endif
