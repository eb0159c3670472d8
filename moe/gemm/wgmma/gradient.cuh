/* gradient.cuh: the backward pass through an activation on Hopper: from a consumer's accumulators
   to C, act and dot (gemm/gradient.cuh). Called by consume.cuh.

   P of a tile waits in fp32: the tensor cores go on, and the next tile's steps compute and store a
   vector at a time. A vector is 8 neighbouring columns of one row of each lane: those of a 16-byte
   vector of pre and of C. A lane's 16 vectors, in the order of their turn:

     vector 4 p + 2 i + h    row r + 8 i, columns 64 p + 32 h + 8 (lane % 4) .. + 7 of the tile

   The first MOEI_WGMMA_SLOTS vectors wait in slots of shared memory, which take the place of a
   stage of the ring. The others wait in registers, and go to slots that have become free. A slot is
   the warp's own, 8 rows of 32 columns. Accumulators are pairs of columns (ptx.cuh): from a slot
   they are read as 8 neighbours of a row.

   Accumulators and P leave 29 registers. So a word of a vector is computed at a time, and what
   belongs to rows waits in shared memory too. pre of the next vector arrives in registers. */
#ifndef MOE_GEMM_WGMMA_GRADIENT_CUH
#define MOE_GEMM_WGMMA_GRADIENT_CUH

#include "../gradient.cuh"
#include "store.cuh"

#define MOEI_WGMMA_VECTORS 16 /* of a lane, in a tile */

#if MOEI_WGMMA_HERE

/* Returns what the warp of a consumer holds. A shuffle: registers of the warp have the address. */
MOE_DEVICE moei_wgmma_held* moei_wgmma_held_of(const moei_wgmma_ring* r)
{
    return (moei_wgmma_held*)(r->stages + r->count * MOEI_WGMMA_STAGE) +
           __shfl_sync(MOE_FULL_WARP, moe_warp() - 4, 0);
}

/* Returns the tile's row of the thread's first accumulator. */
MOE_DEVICE int moei_wgmma_line(void) { return (moe_warp() - 4) * 16 + (moei_lane_again() >> 2); }

/* Returns the address of columns 2 pair, 2 pair + 1 of the lane's row in a slot. The order of pairs
   avoids bank conflicts where a row's four lanes access neighbours, and every fourth pair. */
MOE_DEVICE float* moei_wgmma_pair(float slot[256], int lane, int pair)
{
    return slot + (lane >> 2) * 32 + (pair ^ (lane >> 2 & 3) * 5) * 2;
}

/* Writes the lane's accumulators of a vector to a slot: v[2 j] and v[2 j + 1] are columns
   8 j + 2 (lane % 4) and the next one. */
MOE_DEVICE void moei_wgmma_write_slot(float slot[256], const float v[8])
{
    const int lane = moei_lane_again();
    MOE_UNROLL
    for (int j = 0; j < 4; ++j)
        *(float2*)moei_wgmma_pair(slot, lane, 4 * j + (lane & 3)) =
            make_float2(v[2 * j], v[2 * j + 1]);
}

/* Moves the vector that waits for slot i from registers to it, where there is one. One branch is
   cheaper than to move the others up. */
MOE_DEVICE void moei_wgmma_refill(const moei_wgmma_pending* p, float slot[256], int i)
{
    switch (i) {
    case 0: moei_wgmma_write_slot(slot, p->waiting.p); break;
    case 1: moei_wgmma_write_slot(slot, p->waiting.p + 8); break;
    case 2: moei_wgmma_write_slot(slot, p->waiting.p + 16); break;
    case 3: moei_wgmma_write_slot(slot, p->waiting.p + 24); break;
    case 4: moei_wgmma_write_slot(slot, p->waiting.p + 32); break;
    case 5: moei_wgmma_write_slot(slot, p->waiting.p + 40); break;
    case 6: moei_wgmma_write_slot(slot, p->waiting.p + 48); break;
    }
}
static_assert(MOEI_WGMMA_VECTORS - MOEI_WGMMA_SLOTS == 7, "each vector in registers has a case");

/* Returns the row of a lane's vector i. */
MOE_DEVICE moei_gradient_row* moei_wgmma_held_row(moei_wgmma_held* h, int i, int lane)
{
    return h->row + (i >> 1 & 1) * 8 + (lane >> 2);
}

/* Returns the first column of a lane's vector i. */
MOE_DEVICE int moei_wgmma_held_column(const moei_wgmma_held* h, int i, int lane)
{
    return h->first + (i >> 2) * 64 + (i & 1) * 32 + (lane & 3) * 8;
}

/* Loads pre of the next vector. */
MOE_DEVICE void moei_wgmma_load_pre(moei_wgmma_pending* p, const moe_grouped_gemm_args* d,
                                    moei_wgmma_held* h)
{
    const int i = p->next, lane = moei_lane_again();
    if (i < MOEI_WGMMA_VECTORS) {
        const moei_gradient_row r = *moei_wgmma_held_row(h, i, lane);
        p->waiting.pre = moei_gradient_load(d, &r, moei_wgmma_held_column(h, i, lane), 4);
    }
}

/* Stores C and act of the next vector. dot: adds up 32 columns, of which `sum` are the lane's, by
   shuffles; stores the sum of 64. */
MOE_DEVICE void moei_wgmma_store_vector(const moei_wgmma_pending* p, const moe_grouped_gemm_args* d,
                                        moei_wgmma_held* h, float sum)
{
    const int i = p->next, lane = moei_lane_again();
    const int column = moei_wgmma_held_column(h, i, lane);
    const moei_gradient_row r = *moei_wgmma_held_row(h, i, lane);
    moei_gradient_store(d, &r, column, &p->waiting.pre, 4);
    if (!d->gradient.dot) return;
    sum = moe_warp_sum(column < d->n ? sum : 0.0f, 4);
    if ((lane & 3) == 0) {
        float* first = h->dot + (i >> 1 & 1) * 8 + (lane >> 2);
        if ((i & 1) == 0) *first = sum;
        else if (r.there && column - 32 < d->n)
            moei_gradient_store_dot(d, r.row, column - 32, *first + sum);
    }
}

/* Begins to load the row_weight indices of the thread's rows of the tile at which *p is aimed. */
MOE_DEVICE void moei_wgmma_gradient_aim(moei_wgmma_pending* p, const moe_grouped_gemm_args* d,
                                        const moei_wgmma_tile* t)
{
    const int row = t->row + moei_wgmma_line();
    p->waiting.index[0] = moei_gradient_index(d, row, p->rows > 0);
    p->waiting.index[1] = moei_gradient_index(d, row + 8, p->rows > 8);
}

/* Resolves the rows at which *p is aimed, and loads pre of their first vector, while the tile's
   last products run. Nothing else is pending. */
MOE_DEVICE void moei_wgmma_gradient_rows(moei_wgmma_pending* p, const moe_grouped_gemm_args* d,
                                         moei_wgmma_held* h, const moei_wgmma_tile* t)
{
    const int row = t->row + moei_wgmma_line(), lane = moei_lane_again();
    MOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const moei_gradient_row r =
            moei_gradient_row_at(d, row + 8 * i, p->rows > 8 * i, p->waiting.index[i]);
        if ((lane & 3) == 0) h->row[8 * i + (lane >> 2)] = r;
    }
    if (lane == 0) {
        h->first = d->n - p->columns;
        h->rows = p->rows;
        h->boxed = p->boxed;
    }
    __syncwarp(MOE_FULL_WARP);
    p->next = 0;
    moei_wgmma_load_pre(p, d, h);
}

/* Ends a tile: P becomes pending. */
MOE_DEVICE void moei_wgmma_gradient_hold(moei_wgmma_pending* p, const float acc[128],
                                         moei_wgmma_held* h)
{
    MOE_UNROLL
    for (int i = 0; i < MOEI_WGMMA_VECTORS; ++i) {
        const float* from = acc + i / 4 * 32 + i % 2 * 16 + i / 2 % 2 * 2;
        float v[8];
        MOE_UNROLL
        for (int j = 0; j < 8; ++j) v[j] = from[j / 2 * 4 + j % 2];
        if (i < MOEI_WGMMA_SLOTS) {
            moei_wgmma_write_slot(h->slot[i], v);
        } else {
            MOE_UNROLL
            for (int j = 0; j < 8; ++j) p->waiting.p[(i - MOEI_WGMMA_SLOTS) * 8 + j] = v[j];
        }
    }
    __syncwarp(MOE_FULL_WARP);
}

/* Replaces a vector of pre by those of C and act, from P in its slot, a word at a time. Returns the
   sum of P activation(v, u). */
MOE_DEVICE float moei_wgmma_words(moei_gradient_pre* pre, const moe_grouped_gemm_args* d,
                                  float slot[256], float weight, int activation, const int dtype)
{
    const moei_gradient_activation g = moei_gradient_activation_of(d, activation);
    const int lane = moei_lane_again(), first = 4 * (lane & 3);
    float sum = 0.0f;
    MOE_UNROLL
    for (int j = 0; j < 4; ++j) {
        const float2 two = *(const float2*)moei_wgmma_pair(slot, lane, first + j);
        float v[2] = {two.x, two.y};
        sum = moei_gradient_words(pre, v, j, 1, weight, sum, &g, dtype);
    }
    return sum;
}

/* Computes and stores the next pending vector:
     1. compute: P from its slot, pre from registers
     2. store
     3. fill the slot from registers; load pre of the next vector, which arrives meanwhile
   SwiGLU has code of its own, without branches. */
MOE_DEVICE void moei_wgmma_gradient_next(moei_wgmma_pending* p, const moe_grouped_gemm_args* d,
                                         moei_wgmma_held* h, const int dtype)
{
    const int i = p->next, lane = moei_lane_again();
    float* slot = h->slot[i < MOEI_WGMMA_SLOTS ? i : i - MOEI_WGMMA_SLOTS];
    const float weight = moei_wgmma_held_row(h, i, lane)->weight;
    float sum;
    if (d->c.activation == MOE_ACTIVATION_SWIGLU) /* 1. */
        sum = moei_wgmma_words(&p->waiting.pre, d, slot, weight, MOE_ACTIVATION_SWIGLU, dtype);
    else sum = moei_wgmma_words(&p->waiting.pre, d, slot, weight, d->c.activation, dtype);
    moei_wgmma_store_vector(p, d, h, sum); /* 2. */
    __syncwarp(MOE_FULL_WARP); /* all lanes have read the slot; before its next use comes another */
    moei_wgmma_refill(p, slot, i); /* 3. */
    ++p->next;
    moei_wgmma_load_pre(p, d, h);
}

/* Computes and stores the pending vectors that are due in the step of depths i, ... of the next
   tile. Vectors are spread over its steps, so that their loads and stores are too. The consumers
   take turns: one has products in flight while the other computes. The first step has no vector,
   since pre still arrives; in the last one all are due. */
MOE_DEVICE void moei_wgmma_gradient_part(moei_wgmma_pending* p, const moe_grouped_gemm_args* d,
                                         moei_wgmma_held* h, int consumer, int i, int depths,
                                         const int dtype)
{
    const int step = i / 64, steps = (depths + 63) / 64;
    MOE_NO_UNROLL
    while (p->next < MOEI_WGMMA_VECTORS &&
           (step + 1 >= steps ||
            (2 * p->next + consumer) * (steps - 2) < step * 2 * MOEI_WGMMA_VECTORS))
        moei_wgmma_gradient_next(p, d, h, dtype);
}

#endif
#endif
