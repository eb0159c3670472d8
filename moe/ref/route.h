/* route.h: the reference of moe/route.cuh. C11 and C++14; no CUDA. Computes places and counts
   alone, so one function serves all types.

   Rows are the slots of expert 0 in ascending order, then those of expert 1, and so on. A slot
   whose id is outside 0 .. E-1 is dropped. With replicas, "expert" means a physical expert from
   there on. With a capacity, the slots of an expert past it are dropped. With row_multiple, the
   rows of an expert are filled up to a multiple. */
#ifndef MOE_REF_ROUTE_H
#define MOE_REF_ROUTE_H

#include "../route/desc.h"
#include "real.h"

typedef struct moe_ref_route_desc {
    const int32_t* ids;            /* [T, K] */
    const float* weights;          /* [T, K]; for row_weight and the drop by weight; else null */
    const int32_t* replica_offset; /* [E + 1] replicas of each expert; or null */
    const int32_t* replica_expert; /* [P] their physical experts; null: in order */
    int32_t* expert_count;         /* [P] slots that an expert keeps */
    int32_t* expert_offset;        /* [P + 1] first row of each expert */
    int32_t* drop_count;           /* [P] slots that capacity dropped; or null */
    int32_t* slot_row;             /* [T, K], -1: dropped; or null */
    int32_t* row_slot;             /* [max_rows], -1: unused; or null */
    float* row_weight;             /* [max_rows], 0: unused; or null */
    moe_place* place;              /* [T, K]; or null */
    int64_t* bad_replica; /* [1] first slot whose expert has no replica in range, or -1; or null */
    int32_t num_tokens, num_experts, top_k; /* T, E, K */
    int32_t place_kind;      /* moe_place_kind; 0 = joined */
    int32_t num_replicas;    /* P; 0 = E */
    int32_t row_multiple;    /* rows of an expert are a multiple of this; 0 = 1 */
    int32_t capacity;        /* most slots of an expert; 0 = no limit */
    int32_t drop_rule;       /* moe_drop_rule; 0 = by position */
    int32_t absent_replicas; /* 1: an expert without a replica, or with a replica of -1, is no bad
                                replica */
    int64_t max_rows;        /* length of the row maps; 0 = T * K */
} moe_ref_route_desc;

/* One slot of an expert. */
typedef struct moei_ref_choice {
    int64_t slot;
    float weight;
} moei_ref_choice;

/* Orders by descending weight, NaN last, then by ascending slot. */
MOE_HOST int moei_ref_choice_order(const void* a, const void* b)
{
    const moei_ref_choice *x = (const moei_ref_choice*)a, *y = (const moei_ref_choice*)b;
    const int x_nan = x->weight != x->weight, y_nan = y->weight != y->weight;
    if (x_nan != y_nan) return x_nan - y_nan;
    if (!x_nan && x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return x->slot < y->slot ? -1 : 1;
}

/* Returns the physical expert of a slot; -1: unused, out of range or absent, -2: no replica in
   range. */
MOE_HOST int32_t moei_ref_expert(const moe_ref_route_desc* d, int64_t slot, int32_t num_replicas)
{
    const int32_t id = d->ids[slot];
    int32_t from, upto, e;
    if (id < 0 || id >= d->num_experts) return -1;
    if (!d->replica_offset) return id;
    from = d->replica_offset[id];
    upto = d->replica_offset[id + 1];
    if (from < 0 || upto < from || upto > num_replicas) return -2;
    if (upto == from) return d->absent_replicas ? -1 : -2;
    e = from + (int32_t)(slot / d->top_k % (upto - from));
    if (d->replica_expert) e = d->replica_expert[e];
    if (e == -1 && d->absent_replicas) return -1;
    return e < 0 || e >= num_replicas ? -2 : e;
}

/* Returns the first slot whose id is neither -1 nor an expert, or -1. Returns -2 where the rows do
   not fit into max_rows; the maps are then incomplete. */
MOE_HOST int64_t moe_ref_route(const moe_ref_route_desc* d)
{
    const int64_t slots = (int64_t)d->num_tokens * d->top_k;
    const int64_t max_rows = d->max_rows ? d->max_rows : slots;
    const int32_t num_replicas = d->num_replicas ? d->num_replicas : d->num_experts;
    const int64_t multiple = d->row_multiple ? d->row_multiple : 1;
    int32_t* expert = (int32_t*)malloc((size_t)slots * sizeof *expert + 1);
    moei_ref_choice* list = (moei_ref_choice*)malloc((size_t)slots * sizeof *list + 1);
    int64_t first_bad = -1, row = 0;
    if (d->bad_replica) *d->bad_replica = -1;
    for (int64_t s = 0; s < slots; ++s) {
        const moe_place nowhere = {-1, -1};
        if (d->slot_row) d->slot_row[s] = -1;
        if (d->place) d->place[s] = nowhere;
        expert[s] = moei_ref_expert(d, s, num_replicas);
        if (first_bad < 0 && (d->ids[s] < -1 || d->ids[s] >= d->num_experts)) first_bad = s;
        if (d->bad_replica && *d->bad_replica < 0 && expert[s] == -2) *d->bad_replica = s;
    }
    for (int64_t r = 0; r < max_rows; ++r) {
        if (d->row_slot) d->row_slot[r] = -1;
        if (d->row_weight) d->row_weight[r] = 0;
    }
    for (int32_t e = 0; e < num_replicas; ++e) {
        int64_t n = 0, kept;
        d->expert_offset[e] = (int32_t)row;
        for (int64_t s = 0; s < slots; ++s)
            if (expert[s] == e) {
                list[n].slot = s;
                list[n++].weight = d->weights ? d->weights[s] : 0;
            }
        kept = d->capacity && n > d->capacity ? d->capacity : n;
        if (d->drop_count) d->drop_count[e] = (int32_t)(n - kept);
        d->expert_count[e] = (int32_t)kept;
        if (kept < n) { /* drops the slots past the capacity */
            if (d->drop_rule == MOE_DROP_BY_WEIGHT)
                qsort(list, (size_t)n, sizeof *list, moei_ref_choice_order);
            for (int64_t i = kept; i < n; ++i) expert[list[i].slot] = -1;
        }
        if (row + kept > max_rows) {
            first_bad = -2;
            break;
        }
        for (int64_t s = 0; s < slots; ++s) {
            if (expert[s] != e) continue;
            if (d->slot_row) d->slot_row[s] = (int32_t)row;
            if (d->row_slot) d->row_slot[row] = (int32_t)s;
            if (d->row_weight) d->row_weight[row] = d->weights[s];
            if (d->place) {
                const int by_expert = d->place_kind == MOE_PLACE_BY_EXPERT;
                d->place[s].buffer = by_expert ? e : 0;
                d->place[s].row = (int32_t)(by_expert ? row - d->expert_offset[e] : row);
            }
            ++row;
        }
        row = (row + multiple - 1) / multiple * multiple;
    }
    if (row > max_rows) first_bad = -2;
    d->expert_offset[num_replicas] = (int32_t)row;
    free(expert);
    free(list);
    return first_bad;
}

#endif
