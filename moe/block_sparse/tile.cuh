/* tile.cuh: computes one tile of a block-sparse product, for all of sdd, dsd and dds. Called by the
   kernels of block_sparse.cuh.

   The host resolves each operation into one normal form, C = X * Y with X [m, k] and Y [k, n]
   (prepare.cuh). dsd: X is the sparse A. dds: X is the sparse B transposed, and C is stored
   transposed. sdd: X and Y are the dense operands. The sparse matrix is then a list of entries for
   each strip of m. Its block rows run along m, its block columns along k (sdd: n):

     dsd, dds   the strip's sparse blocks of X: the depths k that are multiplied
     sdd        the strip's sparse blocks of C: the columns n that follow one another in the tile

   A thread block owns tile_m rows and tile_n columns of C: computes their addresses (address.cuh),
   multiplies (multiply.cuh, load.cuh) and stores (store.cuh).

   Several block rows of fewer than tile_m rows share a tile. An entry that one of them has and
   another lacks is not copied for the latter, and its products are skipped. */
#ifndef MOE_BLOCK_SPARSE_TILE_CUH
#define MOE_BLOCK_SPARSE_TILE_CUH

#include "multiply.cuh"
#include "store.cuh"

/* Computes the thread block's tile of this round; returns true where another round may follow.
   Called by the whole thread block. `shared` has the ring of f, moei_ring_bytes. The majors of f
   are ignored: those of d are used.
     1. Find the tile, in one thread. Barrier: all threads read s->tile.
     2. Compute the address parts of its slices. Barrier: all threads read s->rows.
     3. Make the first 64 slices of depth, in two warps. Barrier: all threads copy by them.
     4. Multiply all steps, with majors that are literals where the tile is not predicated. Wait for
        all copies. Barrier: neither a warp nor a copy uses the ring any more.
     5. Replace the address parts by those of C. Barrier: all warps store by them.
     6. Store through the stagings, which use the ring's memory: less than the ring in every shape
        of the list. */
MOE_DEVICE_BODY bool moei_sparse_tile(const moei_sparse_args* d, unsigned char* shared,
                                      moei_sparse_shared* s, int round, const moe_gemm_shape f)
{
    const int x_along = d->x.major == MOE_MAJOR_K, y_along = d->y.major == MOE_MAJOR_K;
    const moei_sparse_position* t = &s->tile; /* in shared memory: takes no registers */
    uint16_t* ring = (uint16_t*)shared;
    int steps;
    moei_mma_c acc[4][4];

    /* 1. tile */
    if (threadIdx.x == 0) {
        s->tile = moei_sparse_find(d, (int)blockIdx.x, round, f.tile_m, f.tile_n);
        s->rows = s->columns = 0;
    }
    __syncthreads();
    if (t->columns <= 0) return false;
    /* 2. addresses */
    moei_sparse_address(d, t, s, f.tile_m, f.tile_n);
    __syncthreads();
    if (s->rows == 0) return false;
    /* 3. slices of depth */
    steps = d->sparse_c ? d->k : (t->end - t->begin) << d->block_other;
    steps = (steps + f.tile_k - 1) / f.tile_k;
    if (moe_warp() < 2) moei_sparse_slices(d, t, s, moe_warp() * MOE_WARP_SIZE, 1, f.tile_m);
    __syncthreads();
    /* 4. products */
    moei_tile_zero(acc, f);
    if (steps == 0) { /* a strip without entries: zeros are stored */
    } else if (moei_sparse_needs_predicates(d, t, s))
        moei_sparse_multiply_predicated(d, s, ring, acc, steps,
                                        moei_shape_with(f, d->x.major, d->y.major));
    else if (x_along && y_along)
        moei_sparse_multiply(d, s, ring, acc, steps, moei_shape_with(f, MOE_MAJOR_K, MOE_MAJOR_K));
    else if (x_along)
        moei_sparse_multiply(d, s, ring, acc, steps, moei_shape_with(f, MOE_MAJOR_K, MOE_MAJOR_MN));
    else if (y_along)
        moei_sparse_multiply(d, s, ring, acc, steps, moei_shape_with(f, MOE_MAJOR_MN, MOE_MAJOR_K));
    else
        moei_sparse_multiply(d, s, ring, acc, steps,
                             moei_shape_with(f, MOE_MAJOR_MN, MOE_MAJOR_MN));
    moei_copy_wait(0);
    __syncthreads();
    /* 5. addresses of C */
    moei_sparse_address_c(d, t, s, f.tile_m, f.tile_n);
    __syncthreads();
    {
        /* 6. store */
        const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
        float* staging = (float*)shared + moe_warp() * 16 * ((f.wm > f.wn ? f.wm : f.wn) + 8);
        if (d->c.major == MOE_MAJOR_MN)
            moei_sparse_store(d, s, acc, staging, warp_m, warp_n, f.wm, f.wn, 1, f.dtype);
        else moei_sparse_store(d, s, acc, staging, warp_m, warp_n, f.wm, f.wn, 0, f.dtype);
    }
    return d->sparse_c != 0;
}

#endif
