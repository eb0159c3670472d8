/* desc.h: route's descriptor and its options. C11 and C++14. route.cuh explains them. */
#ifndef MOE_ROUTE_DESC_H
#define MOE_ROUTE_DESC_H

#include <stddef.h>

#include "../base/status.h"
#include "../layout.h"

/* Which slots an expert keeps where more than `capacity` chose it. */
typedef enum moe_drop_rule {
    MOE_DROP_DEFAULT = 0, /* MOE_DROP_BY_POSITION */
    MOE_DROP_BY_POSITION, /* the first in slot order */
    MOE_DROP_BY_WEIGHT    /* those of the largest weights; equal weights: the lower slot; a NaN
                             counts as less than any number */
} moe_drop_rule;

#define MOE_ROUTE_MAX_MULTIPLE 1024 /* most row_multiple */

/* What moe_route takes. Pointers are device addresses, aligned to their elements. */
typedef struct moe_route_desc {
    /* in */
    const int32_t* ids;            /* [T, K] expert 0 .. E-1 of each slot, -1 = none */
    const float* weights;          /* [T, K] for row_weight and MOE_DROP_BY_WEIGHT, else not read */
    int32_t* chunk_count;          /* [moe_num_chunks(T), E] moe_gate's, of these very ids (else
                                      BAD_COUNT); null: counted here. Must be null with replicas */
    const int32_t* part_count;     /* [num_parts] tokens of each part; null: all exist. Not with
                                      chunk_count */
    const int32_t* replica_offset; /* [E + 1] first replica of each expert; null: no replicas */
    const int32_t* replica_expert; /* [P] physical expert of each replica; null: its own number */
    /* out */
    int32_t* expert_count;  /* [P] rows of each expert that hold a slot */
    int32_t* expert_offset; /* [P + 1] first row of each expert; the last entry is the total */
    int32_t* drop_count;    /* [P] slots that each expert dropped for lack of capacity; or null */
    int32_t* slot_row;      /* [T, K] row of each slot, -1 = none; or null */
    int32_t* row_slot;      /* [moe_route_max_rows] slot of each row, -1 = none; or null */
    float* row_weight;      /* [moe_route_max_rows] weight of each row, 0 = no slot; or null */
    moe_place* place;       /* [T, K] place of each slot, {-1, -1} = none; or null */
    uint64_t* fault;        /* [1] fault word; or null */
    /* sizes and options */
    int32_t num_tokens;      /* T >= 0; T * K below 2^31 */
    int32_t num_experts;     /* E, 1 .. MOE_MAX_EXPERTS */
    int32_t top_k;           /* K, 1 .. MOE_MAX_EXPERTS */
    int32_t place_kind;      /* moe_place_kind; 0 = one joined array */
    int32_t num_replicas;    /* P, physical experts, 1 .. MOE_MAX_EXPERTS; 0 = E. Without
                                replicas 0 or E */
    int32_t row_multiple;    /* each expert's rows are padded to a multiple of this,
                                1 .. MOE_ROUTE_MAX_MULTIPLE; 0 = 1 */
    int32_t capacity;        /* most slots of an expert, >= 0; 0 = no limit */
    int32_t drop_rule;       /* moe_drop_rule; 0 = by position. Without a capacity 0 */
    int32_t absent_replicas; /* 1, with replicas only: drops the slots of an empty range, or of
                                a replica_expert of -1, without a fault; 0: BAD_REPLICA */
    int32_t num_parts;       /* parts of the tokens, T a multiple; 0 without part_count */
    int64_t max_rows;        /* rows that the buffers have room for; more stop the chain (ROWS_FULL);
                                0 = as many as there can be */
    int32_t rank;            /* rank that a fault reports, 0 .. MOE_FAULT_MAX_RANK */
    void* workspace;         /* 16-byte aligned; may be null where moe_route_workspace gives 0 */
    size_t workspace_bytes;  /* bytes at workspace, at least what moe_route_workspace gives */
} moe_route_desc;

#endif
