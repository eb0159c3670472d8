/* desc.h: route's descriptor and its options. C11 and C++14. What they mean: route.cuh. */
#ifndef MOE_ROUTE_DESC_H
#define MOE_ROUTE_DESC_H

#include <stddef.h>

#include "../base/status.h"
#include "../layout.h"

/* Which slots stay where more than `capacity` chose an expert. */
typedef enum moe_drop_rule {
    MOE_DROP_DEFAULT = 0, /* MOE_DROP_BY_POSITION */
    MOE_DROP_BY_POSITION, /* the first ones in slot order */
    MOE_DROP_BY_WEIGHT    /* those with the largest weights; of equal weights the lower slot; a NaN
                             counts as less than any number */
} moe_drop_rule;

#define MOE_ROUTE_MAX_MULTIPLE 1024 /* row_multiple */

typedef struct moe_route_desc {
    /* in */
    const int32_t* ids;   /* [T, K] */
    const float* weights; /* [T, K]; read for row_weight and MOE_DROP_BY_WEIGHT alone */
    int32_t* chunk_count; /* [moe_num_chunks(T), E] as moe_gate left it for these very ids (if not,
                             BAD_COUNT); null: counted here, in the workspace; null with replicas */
    const int32_t* replica_offset; /* [E + 1] first replica of each expert; null: no replicas */
    const int32_t* replica_expert; /* [P] physical expert of each replica; null: its own number */
    /* out */
    int32_t* expert_count;  /* [P] rows of each expert that hold a slot */
    int32_t* expert_offset; /* [P + 1] first row of each expert; the last entry is the total */
    int32_t* drop_count;    /* [P] slots that each expert had no room for; or null */
    int32_t* slot_row;      /* [T, K]; or null */
    int32_t* row_slot;      /* [moe_route_max_rows]; or null */
    float* row_weight;      /* [moe_route_max_rows]; or null */
    moe_place* place;       /* [T, K]; or null */
    uint64_t* fault;        /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;   /* T >= 0 */
    int32_t num_experts;  /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;        /* K, 1 .. MOE_MAX_EXPERTS */
    int32_t place_kind;   /* moe_place_kind; 0 = one joined array */
    int32_t num_replicas; /* P, physical experts, 1 .. MOE_MAX_EXPERTS; 0 = E */
    int32_t row_multiple; /* each expert's rows are filled up to a multiple of it,
                             1 .. MOE_ROUTE_MAX_MULTIPLE; 0 = 1 */
    int32_t capacity;     /* most slots of an expert; 0 = no limit */
    int32_t drop_rule;    /* moe_drop_rule, with a capacity only; 0 = by position */
    int32_t absent_replicas; /* with replicas only. 1: an empty range, or a replica_expert of -1, is
                                an expert elsewhere: its slots are dropped, no fault.
                                0: BAD_REPLICA */
    int32_t rank;            /* reported with a fault, 0 .. MOE_FAULT_MAX_RANK */
    void* workspace;      /* 16-byte aligned; null if moe_route_workspace asks for 0 */
    size_t workspace_bytes;
} moe_route_desc;

#endif
