/* check.h: compares C with a plain product in double. */
#ifndef MOE_SAMPLE_CHECK_H
#define MOE_SAMPLE_CHECK_H

#include <math.h>

#include "picture.h"

/* Returns the elements between two rows of a matrix: a multiple of 8. */
static int64_t stride_of(int columns) { return (columns + 7) / 8 * 8; }

/* Compares o->check elements of C. Returns 1 where all are right. In a sparse block of C that is
   masked out, an element must still be NaN. */
static int check(const options* o, const uint16_t* a, const uint16_t* b, const uint16_t* c,
                 const unsigned char* mask, int CB)
{
    const int64_t all = (int64_t)o->m * o->n, lda = stride_of(o->k), ldb = stride_of(o->n);
    const int64_t count = o->check < 0 || o->check > all ? all : o->check;
    const int br = o->block_rows, bc = o->block_columns;
    int64_t wrong = 0, masked_out = 0;
    double worst = 0, largest = 0;
    for (int64_t e = 0; e < count; ++e) {
        const int64_t at =
            count == all ? e : (int64_t)(mix(o->seed + 99 + (uint64_t)e) % (uint64_t)all);
        const int64_t i = at / o->n, j = at % o->n;
        const double got = moe_load(c, i * ldb + j, o->dtype);
        double want = 0, sum = 0, bound;
        if (o->op == MOE_BLOCK_SPARSE_SDD && !mask[i / br * CB + j / bc]) {
            wrong += !isnan(got);
            ++masked_out;
            continue;
        }
        for (int64_t l = 0; l < o->k; ++l) {
            double v;
            if (o->op == MOE_BLOCK_SPARSE_DSD && !mask[i / br * CB + l / bc]) continue;
            if (o->op == MOE_BLOCK_SPARSE_DDS && !mask[l / br * CB + j / bc]) continue;
            v = (double)moe_load(a, i * lda + l, o->dtype) * moe_load(b, l * ldb + j, o->dtype);
            want += v;
            sum += fabs(v);
        }
        bound = (o->k / 16.0 + 2) * ldexp(sum, -23); /* of sums in fp32; next, of rounding C */
        bound += ldexp(fabs(want) + bound, o->dtype == MOE_BF16 ? -8 : -11) + ldexp(1, -25);
        wrong += !(fabs(got - want) <= bound);
        if (!(fabs(got - want) <= worst)) worst = fabs(got - want);
        if (fabs(want) > largest) largest = fabs(want);
    }
    printf("check     %lld of %lld elements of C against a naive product: %lld wrong, largest "
           "error %.2g,\n"
           "          values up to %.3g; %lld of them in masked-out sparse blocks, which must be "
           "untouched\n",
           (long long)count, (long long)all, (long long)wrong, worst, largest,
           (long long)masked_out);
    return wrong == 0;
}

#endif
