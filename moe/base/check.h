/* check.h: the one check of a descriptor's buffers. C11 and C++14.

   A launch helper lists its buffers in a table, inputs and outputs in any order, and checks them in
   one call:

     const moe_buffer b[] = {
         {d->x, moe_extent(T, d->x_stride, H, d->x_dtype), 16, MOE_BUFFER_REQUIRED, MOE_FIELD_x},
         {d->fault, 8, 8, MOE_BUFFER_WRITTEN, MOE_FIELD_fault}};
     return moe_check_buffers(b, 2);

   Sizes and options are checked first: the table's extents are computed from them. */
#ifndef MOE_BASE_CHECK_H
#define MOE_BASE_CHECK_H

#include "status.h"

enum {
    MOE_BUFFER_READ = 0,     /* read by the device, may be null */
    MOE_BUFFER_REQUIRED = 1, /* must not be null, unless it has 0 bytes */
    MOE_BUFFER_WRITTEN = 2   /* written by the device: shares no byte with any other buffer of the
                                table */
};

typedef struct moe_buffer {
    const void* p;  /* address; null: absent */
    uint64_t bytes; /* extent that is read or written, bytes; 0: none */
    uint32_t align; /* alignment of the address, bytes, a power of two */
    int32_t use;    /* MOE_BUFFER_READ, or a sum of MOE_BUFFER_REQUIRED and MOE_BUFFER_WRITTEN */
    int32_t field;  /* MOE_FIELD_* that a refusal names */
} moe_buffer;

/* Returns 1 where p is a multiple of `bytes`, a power of two. */
MOE_HOST int moei_aligned(const void* p, uintptr_t bytes)
{
    return ((uintptr_t)p & (bytes - 1)) == 0;
}

/* Checks `count` buffers. Refuses, in this order: a required buffer that is null (MOE_ERR_NULL), an
   address that is not aligned (MOE_ERR_ALIGN), a written buffer that overlaps another
   (MOE_ERR_OVERLAP). The status names the field: of an overlap the written one, of two written ones
   the later. */
MOE_HOST moe_status moe_check_buffers(const moe_buffer* b, int count)
{
    int i, j;
    for (i = 0; i < count; ++i)
        if (!b[i].p && b[i].bytes && (b[i].use & MOE_BUFFER_REQUIRED))
            return (moe_status)(MOE_ERR_NULL | (b[i].field << 8));
    for (i = 0; i < count; ++i)
        if (!moei_aligned(b[i].p, b[i].align))
            return (moe_status)(MOE_ERR_ALIGN | (b[i].field << 8));
    for (i = 0; i < count; ++i)
        for (j = 0; j < i; ++j) {
            const uintptr_t p = (uintptr_t)b[i].p, q = (uintptr_t)b[j].p;
            const int written = (b[i].use & MOE_BUFFER_WRITTEN) ? i : j;
            if (p && q && b[i].bytes && b[j].bytes && (b[written].use & MOE_BUFFER_WRITTEN) &&
                p < q + b[j].bytes && q < p + b[i].bytes)
                return (moe_status)(MOE_ERR_OVERLAP | (b[written].field << 8));
        }
    return MOE_OK;
}

#endif
