/* status.h: the status that a call returns. C11 and C++14.

   A moe_status is 0 (MOE_OK), or a kind with a detail: the refused field (fields.h) or the
   cudaError_t. fields.h writes a status as text.

   A refused call has queued nothing and written nothing. */
#ifndef MOE_BASE_STATUS_H
#define MOE_BASE_STATUS_H

#include <stdint.h>

#include "config.h"

/* kind, text. The one list of what can be wrong. */
#define MOEI_STATUS_LIST(X)                                                                       \
    X(OK, "ok")                                                                                   \
    X(ERR_NULL, "required pointer is null")                                                       \
    X(ERR_RANGE, "out of range")                                                                  \
    X(ERR_DTYPE, "dtype not offered here")                                                        \
    X(ERR_OPTION, "unknown option value")                                                         \
    X(ERR_STRIDE, "stride too small or too large")                                                \
    X(ERR_ALIGN, "not aligned")                                                                   \
    X(ERR_OVERLAP, "overlaps a buffer it must not overlap")                                       \
    X(ERR_WORKSPACE, "workspace too small")                                                       \
    X(ERR_CONFLICT, "contradicts another field")                                                  \
    X(ERR_DEVICE, "this device cannot run it")                                                    \
    X(ERR_CUDA, "CUDA error")                                                                     \
    X(ERR_MULTIPLE, "not a multiple of 8 (or of the block)")                                      \
    X(ERR_NOT_COMPILED, "not in the list of kernels that this file was compiled with")

enum {
#define MOEI_STATUS_ENUM(name, text) MOE_##name,
    MOEI_STATUS_LIST(MOEI_STATUS_ENUM)
#undef MOEI_STATUS_ENUM
        MOE_STATUS_KINDS
};

typedef int32_t moe_status; /* kind in bits 0 .. 7, detail above them */

/* Returns the kind of a status: MOE_OK or MOE_ERR_*. */
MOE_HOST int moe_status_kind(moe_status s) { return (int)(s & 0xff); }

/* Returns the refused field (MOE_FIELD_* of fields.h, 0: none), or the cudaError_t where the kind
   is MOE_ERR_CUDA. */
MOE_HOST int moe_status_detail(moe_status s) { return (int)(s >> 8); }

/* Returns the text of the kind alone: static storage, never null. */
MOE_HOST const char* moe_status_text(moe_status s)
{
    static const char* const text[] = {
#define MOEI_STATUS_STR(name, str) str,
        MOEI_STATUS_LIST(MOEI_STATUS_STR)
#undef MOEI_STATUS_STR
    };
    const int kind = moe_status_kind(s);
    return kind < MOE_STATUS_KINDS ? text[kind] : "unknown status";
}

/* Returns from a launch helper with the status of a call that was refused. */
#define MOE_TRY(call)                                                                              \
    do {                                                                                           \
        const moe_status moei_try_status = (call);                                                 \
        if (moei_try_status != MOE_OK) return moei_try_status;                                     \
    } while (0)

#endif
