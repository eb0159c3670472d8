/* tile.cuh: the grouped GEMM on Hopper (sm_90a): tensor cores through wgmma, fed by tensor copies.

   Computes what gemm/tile.cuh computes, in tiles of 128 rows by 256 rows of B (128 columns of C
   with gate and up). A cluster of two blocks has a pair of tiles at a time, mostly of one column:
   each block then loads half of the column's B for both. The cluster takes the next pair when it is
   ready for one, so clusters that met short tiles go on, and the tiles in flight stay neighbours,
   which L2 needs (order.cuh).

   Three warpgroups: a producer (produce.cuh) fills the ring of stages (ring.cuh), two consumers
   (consume.cuh) multiply. A gradient has a fourth one, which computes and stores (gradient.cuh).
   Called by kernels.inl and k_grouped.cuh. */
#ifndef MOE_GEMM_WGMMA_TILE_CUH
#define MOE_GEMM_WGMMA_TILE_CUH

#include "consume.cuh"
#include "k_gather.cuh"
#include "produce.cuh"

#if MOEI_WGMMA_HERE

/* Computes this block's share of all tiles. All threads of the block call it; blocks 2 i and 2 i + 1
   are a cluster. dynamic holds the ring, boxes of results or of pre, then tile_start.
   Literals: gathered: rows of A are gathered; gradient: the epilogue is that of a gradient.
     1. Initialize the barriers. Build the schedule.
     2. Each warpgroup takes its role, where nothing is bad and no earlier kernel met a stop fault.
        Block 0 has read the fault word for both: they must agree.
     3. Wait for the other block, which may still arrive at barriers of this one. */
MOE_DEVICE_BODY void moei_wgmma_block(const moei_wgmma_args* a, unsigned char* dynamic,
                                      moei_wgmma_shared* s, const int gathered, const int gradient,
                                      const moe_gemm_shape f)
{
    const moe_grouped_gemm_args* d = &a->d;
    const int warp = __shfl_sync(MOE_FULL_WARP, moe_warp(), 0); /* uniform to the compiler */
    moei_wgmma_ring r;
    moei_wgmma_tiles w;
    r.stages = dynamic + (1024 - ((uintptr_t)dynamic & 1023)) % 1024;
    r.s = s;
    r.stage = r.parity = 0;
    w.columns = f.a_major == MOE_MAJOR_K && d->c.gated ? 128 : 256;
    w.m = f.a_major == MOE_MAJOR_MN ? a->m : 0;
    w.steps = w.m ? 0 : (d->k + 63) / 64;
    w.cluster_rank = moei_cluster_rank();
    w.schedule.groups = moei_groups_of(d);
    if (f.a_major == MOE_MAJOR_MN) w.schedule.groups.list = 0; /* k-grouped products have none */
    w.schedule.column_tiles = (d->n + w.columns - 1) / w.columns;
    w.schedule.row_align = 1;
    w.schedule.skip_empty = a->skip_empty;
    w.schedule.tile_start = (int*)(r.stages + MOEI_WGMMA_RING +
                                   (gradient   ? MOEI_WGMMA_PRE
                                    : a->boxes ? 2 * MOEI_WGMMA_BOX
                                               : 0));
    if (threadIdx.x == 0) { /* 1. */
        for (int i = 0; i < MOEI_WGMMA_STAGES; ++i) {
            moei_barrier_init(s->full + i, gathered ? 129 : 1);
            moei_barrier_init(s->empty + i, 16); /* warps of both blocks' consumers */
        }
        for (int i = 0; i < MOEI_WGMMA_ENTRIES; ++i) moei_barrier_init(s->sent + i, 1);
        for (int i = 0; i < 2; ++i) {
            moei_barrier_init(s->handed + i, 128); /* the consumer's threads */
            moei_barrier_init(s->stored + i, 64);  /* those of the two warps that compute */
        }
        for (int i = 0; i < 4; ++i) {
            moei_barrier_init(s->arrived[i], 1);
            moei_barrier_init(s->arrived[i] + 1, 1);
        }
        moei_barrier_init(&s->posted, 1);
        moei_barrier_init(&s->taken, 1);
        moei_barrier_visible();
        s->stopped = moe_fault_stops(d->fault);
        s->waits = 1;
    }
    w.pairs =
        moei_schedule_build(&w.schedule, &s->scan, d->fault, d->rank, MOEI_WGMMA_ROWS, 1, w.m);
    moei_cluster_sync();
    if ((int)blockIdx.x / 2 < w.pairs && !moei_cluster_load(&s->stopped, 0) &&
        moei_gemm_tables_good(d, &w.schedule.groups, f.a_major == MOE_MAJOR_MN)) { /* 2. */
        if (warp < 4) {
            if (gradient && !gathered) moei_registers_lower(56);
            else if (gradient) moei_registers_lower(80);
            else moei_registers_lower(72);
            if (gathered && f.a_major == MOE_MAJOR_MN) moei_wgmma_produce_depths(a, r, &w, f);
            else if (gathered) moei_wgmma_produce_gathered(a, r, &w, f);
            else if (warp == 0) moei_wgmma_produce(a, r, &w, f);
            else if (warp == 1) moei_wgmma_find_tiles(a, s, &w);
        } else if (warp < 12) {
            if (gradient && gathered) moei_registers_raise(160);
            else if (gradient) moei_registers_raise(168);
            else moei_registers_raise(216);
            moei_wgmma_consume(a, r, __shfl_sync(MOE_FULL_WARP, (int)threadIdx.x / 128 - 1, 0),
                               gathered, gradient, f);
        } else if (gradient) {
            if (gathered) moei_registers_lower(112); /* what the producer leaves */
            else moei_registers_lower(120);
            moei_wgmma_compute(a, s, r.stages + MOEI_WGMMA_RING, f.dtype);
        }
    }
    moei_cluster_sync(); /* 3. */
}

#endif
#endif
