/* ring.cuh: what the producers and the consumers of the Hopper grouped GEMM share: the ring of
   stages with its barriers, and the tiles of the launch.

   A tile is 128 rows of A by 256 rows of B. A stage holds 64 depths of both:

     A  [128 lines][64]   rows of the tile; a consumer has 64 of them
     B  [256 lines][64]   not gated: 256 neighbouring rows of B
                          gated: 128 rows of gates, then the same 128 rows of ups

   Of an mn-major operand each 64 lines are the 64 depths instead, of 64 rows each.

   Two blocks of a cluster have rings of their own that run in step: half of a stage's B may arrive
   from the other block. Barriers of a stage: `full` completes when all of the stage has arrived;
   `empty` when the warps of all consumers of both blocks have read their stage of this number. */
#ifndef MOE_GEMM_WGMMA_RING_CUH
#define MOE_GEMM_WGMMA_RING_CUH

#include "order.cuh"

#define MOEI_WGMMA_A_HALF (64 * 128)  /* bytes: a consumer's rows of A */
#define MOEI_WGMMA_B_HALF (128 * 128) /* bytes: half of B */
#define MOEI_WGMMA_STAGE (2 * MOEI_WGMMA_A_HALF + 2 * MOEI_WGMMA_B_HALF) /* bytes */
#define MOEI_WGMMA_RING (MOEI_WGMMA_STAGES * MOEI_WGMMA_STAGE)           /* bytes */
#define MOEI_WGMMA_BOX (64 * 128) /* bytes: a consumer's box of results (store.cuh) */

/* What is found about a block's tile number i stands in entry i % MOEI_WGMMA_ENTRIES. The next tile
   is found while a consumer may still read the entry of a tile STAGES + 2 before it: short tiles
   have one stage each. */
#define MOEI_WGMMA_ENTRIES 8
static_assert(MOEI_WGMMA_ENTRIES >= MOEI_WGMMA_STAGES + 3, "an entry is written while it is read");

/* What a consumer hands over of a gradient's tile beside P (gradient.cuh). */
typedef struct moei_wgmma_handed {
    float unit[64];           /* P of a row is what is handed over times unit */
    int32_t row, rows, first; /* first row of C; rows from it on, 0: no more tiles; first column */
} moei_wgmma_handed;

/* Bytes of dynamic shared memory without boxes and tile_start: the ring, and room to align it. */
#define MOEI_WGMMA_SMEM (1024 + MOEI_WGMMA_RING)

/* Static shared memory of a block. More than 512 bytes: kernels without a body have none, which
   tells whether the binary has code of sm_90a (variant.cuh). */
typedef struct moei_wgmma_shared {
    uint64_t full[MOEI_WGMMA_STAGES], empty[MOEI_WGMMA_STAGES];
    uint64_t posted, taken;            /* a tile's position stands in its entry; has been read */
    uint64_t sent[MOEI_WGMMA_ENTRIES]; /* block 1: number[i] has arrived from block 0 */
    uint64_t handed[2], stored[2];     /* of a gradient: a consumer has handed its rows over; their
                                          results are stored */
    int32_t number[MOEI_WGMMA_ENTRIES];
    int32_t stopped; /* block 0: an earlier kernel met a stop fault */
    int32_t waits;   /* of the thread that waits for rows: as in moei_ready_wait */
    moei_wgmma_tile position[MOEI_WGMMA_ENTRIES];
    union {
        int32_t row[2]
                   [MOEI_WGMMA_ROWS]; /* gathered: row of A of each line of tile i, in [i % 2]; -1:
                                            zeros */
        uint32_t depth[2][128];       /* k-grouped: where the rows of two steps lie, in turn
                                   (k_gather.cuh) */
    };
    uint32_t lacks[2][4]; /* k-grouped: not 0: one of so many 32 depths has no row */
    moe_block_scan_scratch scan;
    moei_wgmma_handed hand[2]; /* of a gradient: by consumer */
    uint64_t arrived[4][2];    /* of a gradient: a warp's box of pre has arrived */
} moei_wgmma_shared;

#if MOEI_WGMMA_HERE

/* A role's position in the ring. */
typedef struct moei_wgmma_ring {
    unsigned char* stages; /* [MOEI_WGMMA_STAGES][MOEI_WGMMA_STAGE], 1024-byte aligned */
    moei_wgmma_shared* s;
    int stage, parity; /* the stage, and the parity of its phase */
} moei_wgmma_ring;

MOE_DEVICE void moei_wgmma_next(moei_wgmma_ring* r)
{
    if (++r->stage == MOEI_WGMMA_STAGES) r->stage = 0, r->parity ^= 1;
}

/* Returns the stage before this one. */
MOE_DEVICE int moei_wgmma_before(const moei_wgmma_ring* r)
{
    return (r->stage + MOEI_WGMMA_STAGES - 1) % MOEI_WGMMA_STAGES;
}

/* Tells both blocks that a consumer's warp has read a stage. The whole warp calls it. */
MOE_DEVICE void moei_wgmma_release(const moei_wgmma_ring* r, int stage)
{
    if (moe_lane() < 2) moei_barrier_arrive_at(r->s->empty + stage, moe_lane());
}

/* The tiles of the launch. */
typedef struct moei_wgmma_tiles {
    moei_schedule schedule;
    int pairs;        /* of all clusters */
    int steps;        /* of each tile: stages; k-grouped: 0 */
    int m;            /* k-grouped: rows of each expert's C; otherwise 0 */
    int columns;      /* of C in a tile */
    int cluster_rank; /* the block's number in its cluster: 0 or 1 */
} moei_wgmma_tiles;

#endif
#endif
