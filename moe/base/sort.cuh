/* sort.cuh: the largest of some numbers in descending order, by sorting networks in registers.

   Lengths are literals at every call. Each loop runs over the comparisons of one layer of the
   network, with a bound that is literal once the call is inlined: the compiler unrolls exactly the
   network, and the arrays stay in registers. Where a number is NaN the result is undefined.

   Cost, in fp32 minima and maxima: 248 for the 8 largest of 32 numbers, 32 to merge two such
   lists. */
#ifndef MOE_BASE_SORT_CUH
#define MOE_BASE_SORT_CUH

#include "warp.cuh"

/* Puts a[i] and a[j] into descending order. */
MOE_DEVICE void moei_sort_two(float* a, const int i, const int j)
{
    const float hi = fmaxf(a[i], a[j]), lo = fminf(a[i], a[j]);
    a[i] = hi;
    a[j] = lo;
}

/* Compares s[i] with s[i + h], in every group of 2h of the first n. */
MOE_DEVICE void moei_sort_halves(float* s, const int n, const int h)
{
    MOE_UNROLL
    for (int c = 0; c < n / 2; ++c) {
        const int i = c / h * 2 * h + c % h;
        moei_sort_two(s, i, i + h);
    }
}

/* Compares s[i] with s[i + k] in every group of 2p of the first n; i begins at k and skips every
   other run of k. k < p. */
MOE_DEVICE void moei_sort_between(float* s, const int n, const int p, const int k)
{
    const int each = p - k; /* comparisons in a group */
    MOE_UNROLL
    for (int c = 0; c < n / 2 / p * each; ++c) {
        const int i = c / each * 2 * p + k + c % each / k * 2 * k + c % each % k;
        moei_sort_two(s, i, i + k);
    }
}

/* Puts n numbers (a literal power of two up to 32) into descending order. Batcher's odd-even merge
   sort: merges runs of 1, 2, 4 ... numbers; 19 comparisons for n = 8. */
MOE_DEVICE void moei_sort(float* s, const int n)
{
    if (n >= 2) moei_sort_halves(s, n, 1);
    if (n >= 4) {
        moei_sort_halves(s, n, 2);
        moei_sort_between(s, n, 2, 1);
    }
    if (n >= 8) {
        moei_sort_halves(s, n, 4);
        moei_sort_between(s, n, 4, 2);
        moei_sort_between(s, n, 4, 1);
    }
    if (n >= 16) {
        moei_sort_halves(s, n, 8);
        moei_sort_between(s, n, 8, 4);
        moei_sort_between(s, n, 8, 2);
        moei_sort_between(s, n, 8, 1);
    }
    if (n >= 32) {
        moei_sort_halves(s, n, 16);
        moei_sort_between(s, n, 16, 8);
        moei_sort_between(s, n, 16, 4);
        moei_sort_between(s, n, 16, 2);
        moei_sort_between(s, n, 16, 1);
    }
}

/* Puts n numbers that first fall and then rise into descending order: a bitonic merge. */
MOE_DEVICE void moei_sort_bitonic(float* s, const int n)
{
    if (n >= 32) moei_sort_halves(s, n, 16);
    if (n >= 16) moei_sort_halves(s, n, 8);
    if (n >= 8) moei_sort_halves(s, n, 4);
    if (n >= 4) moei_sort_halves(s, n, 2);
    if (n >= 2) moei_sort_halves(s, n, 1);
}

/* Replaces top[0 .. n), in descending order, by the n largest of top and v[0 .. n). */
MOE_DEVICE void moei_sort_in(float* top, const float* v, const int n)
{
    float next[32];
    MOE_UNROLL
    for (int j = 0; j < n; ++j) next[j] = v[j];
    moei_sort(next, n);
    MOE_UNROLL
    for (int j = 0; j < n; ++j) top[j] = fmaxf(top[j], next[n - 1 - j]); /* the larger half */
    moei_sort_bitonic(top, n);
}

/* Writes the `keep` largest of v[0 .. n) to top, in descending order. n and keep are literal powers
   of two, keep <= n <= 32, n <= 4 keep. */
MOE_DEVICE void moei_sort_largest(float* top, const float* v, const int n, const int keep)
{
    MOE_UNROLL
    for (int j = 0; j < keep; ++j) top[j] = v[j];
    moei_sort(top, keep);
    if (n >= 2 * keep) moei_sort_in(top, v + keep, keep);
    if (n >= 4 * keep) {
        moei_sort_in(top, v + 2 * keep, keep);
        moei_sort_in(top, v + 3 * keep, keep);
    }
}

/* Merges the list of lane ^ w into the calling lane's. Both lists hold `have` numbers; a full list
   holds `num_largest`. have and num_largest are powers of two, up to 32. */
MOE_DEVICE void moei_group_merge(float* top, const int w, const int have, const int num_largest)
{
    float other[32];
    MOE_UNROLL
    for (int j = 0; j < have; ++j) other[j] = __shfl_xor_sync(MOE_FULL_WARP, top[j], w);
    if (have < num_largest) { /* all of both lists */
        MOE_UNROLL
        for (int j = 0; j < have; ++j) top[2 * have - 1 - j] = other[j];
        moei_sort_bitonic(top, 2 * have);
    } else { /* the larger half */
        MOE_UNROLL
        for (int j = 0; j < have; ++j) top[j] = fmaxf(top[j], other[have - 1 - j]);
        moei_sort_bitonic(top, have);
    }
}

/* Writes the num_largest largest numbers of an aligned group of `lanes` lanes (a literal) to every
   lane's top. Each lane has per_lane numbers in v and sorts its largest. Then the lists are merged
   pairwise. Called by the whole warp. */
MOE_DEVICE void moei_group_sort_largest(float* top, const float* v, const int lanes,
                                        const int per_lane, const int num_largest)
{
    const int keep = per_lane < num_largest ? per_lane : num_largest;
    moei_sort_largest(top, v, per_lane, keep);
    if (lanes >= 2) moei_group_merge(top, 1, keep, num_largest);
    if (lanes >= 4)
        moei_group_merge(top, 2, keep * 2 < num_largest ? keep * 2 : num_largest, num_largest);
    if (lanes >= 8)
        moei_group_merge(top, 4, keep * 4 < num_largest ? keep * 4 : num_largest, num_largest);
    if (lanes >= 16)
        moei_group_merge(top, 8, keep * 8 < num_largest ? keep * 8 : num_largest, num_largest);
    if (lanes >= 32)
        moei_group_merge(top, 16, keep * 16 < num_largest ? keep * 16 : num_largest, num_largest);
}

#endif
