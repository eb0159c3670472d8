/* swizzle.h: where the 16-bit elements of a stage lie in shared memory. Lines follow one another
   without padding. Included by mma.cuh and its CPU stand-in, host/mma.h.

   The line's number permutes the 16-byte vectors within each 128 bytes. ldmatrix reads an 8 x 8
   matrix as eight vectors, one in each of eight lines. The permuted vectors lie in different banks.
   Padded lines would avoid the bank conflicts too. But then a warp's cp.async of 128 bytes would
   write to two 128-byte rows of banks and be split in two. Traffic from L2 would grow by half. */
#ifndef MOE_GEMM_SWIZZLE_H
#define MOE_GEMM_SWIZZLE_H

#include "../base/types.h"

/* Returns the index in the stage of element e of a line. ld: elements a line, 32 or a multiple of
   64. */
MOE_HOST_DEVICE int moei_swizzled(int line, int e, int ld)
{
    return line * ld + (e ^ (ld >= 64 ? line & 7 : line >> 1 & 3) * 8);
}

#endif
