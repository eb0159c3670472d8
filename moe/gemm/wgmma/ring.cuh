/* ring.cuh: what the producer and the consumers of the Hopper grouped GEMM share: the tile, the
   ring of stages with its barriers, and the order of tiles.

   A tile is 128 rows of A by 256 rows of B. A stage holds 64 depths of both:

     A  [128 lines][64]   rows of the tile; a consumer has 64 of them
     B  [256 lines][64]   not gated: 256 neighbouring rows of B
                          gated: 128 rows of gates, then the same 128 rows of ups

   Barriers of a stage: `full` completes when all of the stage has arrived; `empty` when the warps
   of both consumers have read the stage. */
#ifndef MOE_GEMM_WGMMA_RING_CUH
#define MOE_GEMM_WGMMA_RING_CUH

#include "../schedule.cuh"
#include "ptx.cuh"

#define MOEI_WGMMA_THREADS 384     /* a producer and two consumers, a warpgroup each */
#define MOEI_WGMMA_STAGES 4        /* of the ring */
#define MOEI_WGMMA_HALF (64 * 128) /* bytes: a consumer's rows of A */
#define MOEI_WGMMA_B (128 * 128)   /* bytes: half of B */
#define MOEI_WGMMA_STAGE (2 * MOEI_WGMMA_HALF + 2 * MOEI_WGMMA_B) /* bytes */

/* Bytes of dynamic shared memory without tile_start: the ring, and room to align it. */
#define MOEI_WGMMA_SMEM (1024 + MOEI_WGMMA_STAGES * MOEI_WGMMA_STAGE)

/* Static shared memory of a block. More than 512 bytes: kernels without a body have none, which
   tells whether the binary has code of sm_90a (variant.cuh). */
typedef struct moei_wgmma_shared {
    uint64_t full[MOEI_WGMMA_STAGES], empty[MOEI_WGMMA_STAGES];
    moe_block_scan_scratch scan;
    moe_tile_position position[8]; /* of the block's tile number i at i % 8; expert -1: the block
                                      has no more. The producer is at most MOEI_WGMMA_STAGES tiles
                                      ahead of the consumers */
    uint32_t mark[128];
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

/* The tiles of the launch. */
typedef struct moei_wgmma_tiles {
    moei_schedule schedule;
    int count;   /* of all blocks */
    int steps;   /* of a tile: stages */
    int columns; /* of C in a tile */
} moei_wgmma_tiles;

/* Returns the rows of a tile that exist, 1 .. 128. */
MOE_DEVICE int moei_wgmma_rows(const moe_tile_position* t)
{
    return t->end - t->row < 128 ? t->end - t->row : 128;
}

#endif
#endif
