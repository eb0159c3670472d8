/* route.h: the reference of moe/route.cuh. C11 and C++14; no CUDA. Only integers, so there is
   one function.

   The slots of expert 0 in ascending order, then those of expert 1, and so on. An id outside
   0 .. E-1 is dropped. */
#ifndef MOE_REF_ROUTE_H
#define MOE_REF_ROUTE_H

#include "real.h"

typedef struct moe_ref_route_desc {
    const int32_t* ids;     /* [T, K] */
    const float* weights;   /* [T, K]; null unless row_weight is wanted */
    int32_t* expert_count;  /* [E] */
    int32_t* expert_offset; /* [E + 1] */
    int32_t* slot_row;      /* [T, K]; or null */
    int32_t* row_slot;      /* [T * K]; or null */
    float* row_weight;      /* [T * K]; or null */
    moe_place* place;       /* [T, K]; or null */
    int32_t num_tokens, num_experts, top_k;
    int32_t place_kind; /* moe_place_kind; 0 = joined */
} moe_ref_route_desc;

/* Returns the first slot whose id is neither -1 nor an expert, or -1. */
MOE_HOST int64_t moe_ref_route(const moe_ref_route_desc* d)
{
    const int64_t slots = (int64_t)d->num_tokens * d->top_k;
    int64_t first_bad = -1;
    int32_t row = 0;
    for (int64_t s = 0; s < slots; ++s) {
        const moe_place nowhere = {-1, -1};
        if (d->slot_row) d->slot_row[s] = -1;
        if (d->row_slot) d->row_slot[s] = -1;
        if (d->row_weight) d->row_weight[s] = 0;
        if (d->place) d->place[s] = nowhere;
        if (first_bad < 0 && (d->ids[s] < -1 || d->ids[s] >= d->num_experts)) first_bad = s;
    }
    for (int e = 0; e < d->num_experts; ++e) {
        d->expert_offset[e] = row;
        for (int64_t s = 0; s < slots; ++s) {
            if (d->ids[s] != e) continue;
            if (d->slot_row) d->slot_row[s] = row;
            if (d->row_slot) d->row_slot[row] = (int32_t)s;
            if (d->row_weight) d->row_weight[row] = d->weights[s];
            if (d->place) {
                const int split = d->place_kind == MOE_PLACE_BY_EXPERT;
                d->place[s].buffer = split ? e : 0;
                d->place[s].row = split ? row - d->expert_offset[e] : row;
            }
            ++row;
        }
        d->expert_count[e] = row - d->expert_offset[e];
    }
    d->expert_offset[d->num_experts] = row;
    return first_bad;
}

#endif
