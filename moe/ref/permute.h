/* permute.h: the reference of moe/permute.cuh. C11 and C++14; no CUDA. Bytes are copied, so one
   function serves all types.

     y[i, :] = x[index[i] / div, :]     zeros where index[i] is not in 0 .. limit - 1

   Permute: index = row_slot, div = K, limit = T * K.
   Unpermute: index = slot_row, div = 1, limit = num_rows. */
#ifndef MOE_REF_PERMUTE_H
#define MOE_REF_PERMUTE_H

#include "real.h"

typedef struct moe_ref_permute_desc {
    const void* x;             /* [ceil(limit / div), row_bytes] bytes */
    const int32_t* index;      /* [count], -1 = zeros */
    void* y;                   /* [count, row_bytes] bytes */
    int64_t count, limit, div; /* rows of y; bound of an index; divisor, >= 1 */
    int64_t row_bytes;         /* bytes of a row */
    int64_t x_bytes;           /* bytes between rows of x; 0 = row_bytes */
    int64_t y_bytes;           /* bytes between rows of y; 0 = row_bytes */
} moe_ref_permute_desc;

/* Copies the rows. Returns the first i whose index is neither -1 nor in range, or -1. */
MOE_HOST int64_t moe_ref_permute(const moe_ref_permute_desc* d)
{
    const int64_t x_bytes = moei_ref_or(d->x_bytes, d->row_bytes);
    const int64_t y_bytes = moei_ref_or(d->y_bytes, d->row_bytes);
    int64_t first_bad = -1;
    for (int64_t i = 0; i < d->count; ++i) {
        const int64_t at = d->index[i];
        char* y = (char*)d->y + i * y_bytes;
        if (at >= 0 && at < d->limit)
            memcpy(y, (const char*)d->x + at / d->div * x_bytes, (size_t)d->row_bytes);
        else memset(y, 0, (size_t)d->row_bytes);
        if (first_bad < 0 && (at < -1 || at >= d->limit)) first_bad = i;
    }
    return first_bad;
}

#endif
