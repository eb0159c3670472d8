/* tile.cuh: one tile of a block-sparse product, for all of sdd, dsd and dds.

   The host turns each of them into one form, C = X * Y with X [M, K] and Y [K, N] (prepare.cuh): X is
   the sparse operand of dsd, of dds the transpose of it (and C is stored transposed); of sdd, X and Y
   are the dense operands. What is sparse is then a list of blocks for each strip of M:

     dsd, dds   the blocks of X in a strip of M: which depths k are multiplied
     sdd        the blocks of C in a strip of M: which columns n stand side by side in the tile

   A block owns tile_m rows and tile_n columns of C: it finds where they lie (address.cuh), multiplies
   (multiply.cuh, load.cuh) and stores (store.cuh).

   Several strips of blocks lower than tile_m share a tile. A block that one strip has and another has
   not, is not copied for the latter, and its products are left out. */
#ifndef MOE_BLOCK_SPARSE_TILE_CUH
#define MOE_BLOCK_SPARSE_TILE_CUH

#include "multiply.cuh"
#include "store.cuh"

/* Computes a block's tile of this round. Yes: there may be another round. `shared` has the ring of f,
   moei_ring_bytes, which C goes through at the end (a strip of store.cuh for each warp: less than the
   ring in every shape of the list). The majors of f do not count: the arguments tell. */
MOE_DEVICE_BODY bool moei_sparse_tile(const moei_sparse_args* d, unsigned char* shared,
                                      moei_sparse_shared* s, int round, const moe_gemm_shape f)
{
    const int x_along = d->x.major == MOE_MAJOR_K, y_along = d->y.major == MOE_MAJOR_K;
    const moei_sparse_position* t = &s->tile; /* there, so that it takes no registers */
    uint16_t* ring = (uint16_t*)shared;
    int steps;
    moei_mma_c acc[4][4];

    if (threadIdx.x == 0) {
        s->tile = moei_sparse_find(d, (int)blockIdx.x, round, f.tile_m, f.tile_n);
        s->rows = s->columns = 0;
    }
    __syncthreads();
    if (t->columns <= 0) return false;
    moei_sparse_address(d, t, s, f.tile_m, f.tile_n);
    __syncthreads();
    if (s->rows == 0) return false;
    steps = d->sparse_c ? d->k : (t->end - t->begin) << d->block_other;
    steps = (steps + f.tile_k - 1) / f.tile_k;
    if (moe_warp() < 2) moei_sparse_slices(d, t, s, moe_warp() * MOE_WARP_SIZE, 1, f.tile_m);
    __syncthreads();
    moei_tile_zero(acc, f);
    if (steps == 0) { /* zeros are stored */
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
    moei_sparse_address_c(d, t, s, f.tile_m, f.tile_n);
    __syncthreads();
    {
        const int warp_m = moe_warp() % f.warps_m, warp_n = moe_warp() / f.warps_m;
        float* strip = (float*)shared + moe_warp() * 16 * ((f.wm > f.wn ? f.wm : f.wn) + 8);
        if (d->c.major == MOE_MAJOR_MN)
            moei_sparse_store(d, s, acc, strip, warp_m, warp_n, f.wm, f.wn, 1, f.dtype);
        else moei_sparse_store(d, s, acc, strip, warp_m, warp_n, f.wm, f.wn, 0, f.dtype);
    }
    return d->sparse_c != 0;
}

#endif
