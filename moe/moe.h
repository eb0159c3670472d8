/* moe.h: everything that is plain C, C11 and C++14: version, statuses, faults, types, shapes, the
   grouped GEMM's descriptor. */
#ifndef MOE_MOE_H
#define MOE_MOE_H

#include "base/config.h"
#include "base/fault.h"
#include "base/status.h"
#include "base/types.h"
#include "gemm/desc.h"
#include "layout.h"

#endif
