/* sort.cuh: the largest of some numbers in order, by sorting networks in registers.

   Lengths are literals and loops have constant bounds with their conditions inside: only so are
   they unrolled before the arrays are given registers. NaN may come out anywhere. Cost, by fp32
   minimum or maximum: the 8 largest of 32 numbers 248, merging two such lists 32. */
#ifndef MOE_BASE_SORT_CUH
#define MOE_BASE_SORT_CUH

#include "warp.cuh"

/* a[i] and a[j] in descending order. */
MOE_DEVICE void moei_sort_two(float* a, const int i, const int j)
{
    const float hi = fmaxf(a[i], a[j]), lo = fminf(a[i], a[j]);
    a[i] = hi;
    a[j] = lo;
}

/* Puts n numbers (a literal power of two up to 32) into descending order: Batcher's odd-even merge
   sort, 19 comparisons for 8. */
MOE_DEVICE void moei_sort(float* s, const int n)
{
    MOEI_UNROLL
    for (int lp = 0; lp < 5; ++lp) { /* merges runs of p */
        MOEI_UNROLL
        for (int lk = 4; lk >= 0; --lk) {
            const int p = 1 << lp, k = 1 << lk, from = k < p ? k : 0;
            MOEI_UNROLL
            for (int i = 0; i < 32; ++i)
                if (p < n && k <= p && i >= from && ((i - from) & k) == 0 && i + k < n &&
                    i / (2 * p) == (i + k) / (2 * p))
                    moei_sort_two(s, i, i + k);
        }
    }
}

/* The same for n numbers that first fall and then rise: a bitonic merge. */
MOE_DEVICE void moei_sort_bitonic(float* s, const int n)
{
    MOEI_UNROLL
    for (int lh = 4; lh >= 0; --lh) {
        const int h = 1 << lh;
        MOEI_UNROLL
        for (int j = 0; j < 32; ++j)
            if (j < n && h < n && (j & h) == 0) moei_sort_two(s, j, j + h);
    }
}

/* top[0 .. keep) becomes the largest of v[0 .. n), in descending order. n and keep are literal
   powers of two, keep <= n <= 32, n <= 4 keep. */
MOE_DEVICE void moei_sort_largest(float* top, const float* v, const int n, const int keep)
{
    MOEI_UNROLL
    for (int j = 0; j < 32; ++j)
        if (j < keep) top[j] = v[j];
    moei_sort(top, keep);
    MOEI_UNROLL
    for (int r = 1; r < 4; ++r)
        if (r * keep < n) {
            float next[32];
            MOEI_UNROLL
            for (int j = 0; j < 32; ++j)
                if (j < keep) next[j] = v[r * keep + j];
            moei_sort(next, keep);
            MOEI_UNROLL
            for (int j = 0; j < 32; ++j)
                if (j < keep) top[j] = fmaxf(top[j], next[keep - 1 - j]); /* the larger half */
            moei_sort_bitonic(top, keep);
        }
}

/* The same over an aligned group of `lanes` lanes (a literal) with per_lane numbers each: every
   lane gets the group's `depth` largest. Each lane sorts the largest of its own; the lists are
   merged pairwise. The whole warp takes part. */
MOE_DEVICE void moei_group_sort_largest(float* top, const float* v, const int lanes,
                                        const int per_lane, const int depth)
{
    const int keep = per_lane < depth ? per_lane : depth;
    moei_sort_largest(top, v, per_lane, keep);
    MOEI_UNROLL
    for (int lw = 0; lw < 5; ++lw) {
        const int w = 1 << lw, have = keep << lw < depth ? keep << lw : depth;
        float other[32];
        if (w < lanes) {
            MOEI_UNROLL
            for (int j = 0; j < depth; ++j)
                if (j < have) other[j] = __shfl_xor_sync(MOEI_FULL, top[j], w);
            MOEI_UNROLL
            for (int j = 0; j < depth; ++j)
                if (j < have) {
                    if (have < depth) top[2 * have - 1 - j] = other[j]; /* all of both lists */
                    else top[j] = fmaxf(top[j], other[have - 1 - j]);   /* the larger half */
                }
            moei_sort_bitonic(top, have < depth ? 2 * have : depth);
        }
    }
}

#endif
