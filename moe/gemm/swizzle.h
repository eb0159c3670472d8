/* swizzle.h: the places of 16-bit elements in a stage of shared memory whose lines follow one
   another without padding.

   The 16-byte vectors of each 128 bytes change places with the line's number, so that eight vectors
   below one another, a matrix of ldmatrix, lie in different banks. Padding the lines does that too;
   but then a warp's cp.async of 128 bytes goes to two 128-byte lines of shared memory, is cut in
   two, and L2 is asked for half as much again. */
#ifndef MOE_GEMM_SWIZZLE_H
#define MOE_GEMM_SWIZZLE_H

#include "../base/types.h"

/* Where element e of a line lies; ld elements a line, 32 or a multiple of 64. */
MOE_HOST_DEVICE int moei_swizzled(int line, int e, int ld)
{
    return line * ld + (e ^ (ld >= 64 ? line & 7 : line >> 1 & 3) * 8);
}

#endif
