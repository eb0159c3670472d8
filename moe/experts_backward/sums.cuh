/* sums.cuh: sums over rows that the experts' backward pass needs beside its products: gradients of
   biases, and of the weights of slots. Called by experts_backward.cuh. */
#ifndef MOE_EXPERTS_BACKWARD_SUMS_CUH
#define MOE_EXPERTS_BACKWARD_SUMS_CUH

#include "../base/copy.cuh"
#include "../base/fault.cuh"
#include "../base/numeric.cuh"
#include "../base/warp.cuh"
#include "../layout.h"

#define MOEI_ROW_SUMS_THREADS 256
#define MOEI_ROW_SUMS_COLUMNS 256 /* of a block: 8 a lane, the same for all its warps */

/* out[e, j] = sum over rows r of expert e of weight(r) src[row(r), j]. */
typedef struct moei_row_sums_args {
    const void* src;              /* [src_rows, columns] dtype, 16-byte aligned rows */
    const int32_t* row_slot;      /* [num_rows] row(r) = row_slot[r] / top_k, -1: none; null: r */
    const float* weight;          /* [num_rows], with row_slot of each slot; null: 1 each */
    const int32_t* expert_offset; /* [E + 1]; null: one expert has all rows */
    void* out;                    /* [E, columns] out_dtype */
    uint64_t* fault;              /* [1] fault word; or null */
    int64_t stride;               /* elements between rows of src */
    int32_t src_rows, num_rows;   /* of src; upper bound of the rows */
    int32_t columns;              /* multiple of 8 */
    int32_t top_k;                /* K, >= 1 */
    int32_t dtype, out_dtype;     /* moe_dtype: fp16 or bf16; that or fp32 */
    int32_t pairs;                /* I: column j < I of src is 2 j of out, I + j is 2 j + 1; 0: j */
    int32_t accumulate;           /* 1: adds to out */
    int32_t skip_empty;           /* 1: out of experts without rows is left as it is */
} moei_row_sums_args;

/* Shared memory of a block: what each warp has summed. */
typedef struct moei_row_sums_shared {
    float sum[MOEI_ROW_SUMS_THREADS / MOE_WARP_SIZE][MOEI_ROW_SUMS_COLUMNS];
} moei_row_sums_shared;

/* Returns the row of src that row r reads, and its weight; -1: none. */
MOE_DEVICE int64_t moei_row_sums_row(const moei_row_sums_args* d, int r, float* weight)
{
    const int slot = d->row_slot ? d->row_slot[r] : r;
    const int64_t row = slot < 0 ? -1 : d->row_slot ? slot / d->top_k : slot;
    *weight = 0.0f;
    if (row < 0 || row >= d->src_rows) return -1;
    *weight = d->weight ? d->weight[slot] : 1.0f;
    return row;
}

/* Adds the rows first, first + 8, ... below end to sum [8], those of the lane's columns from `column`
   on; ascending, four loads in flight. */
MOE_DEVICE void moei_row_sums_add(float* sum, const moei_row_sums_args* d, int first, int end,
                                  int column)
{
    const int step = MOEI_ROW_SUMS_THREADS / MOE_WARP_SIZE;
    for (int64_t r0 = first; r0 < end; r0 += 4 * step) {
        uint4 raw[4];
        float weight[4], v[8];
        bool there[4];
        MOE_UNROLL
        for (int u = 0; u < 4; ++u) {
            const int64_t r = r0 + u * step;
            const int64_t row = r < end ? moei_row_sums_row(d, (int)r, weight + u) : -1;
            there[u] = row >= 0 && column < d->columns;
            if (there[u])
                raw[u] = moei_load16((const char*)d->src + (row * d->stride + column) * 2);
        }
        MOE_UNROLL
        for (int u = 0; u < 4; ++u) {
            if (!there[u]) continue;
            moei_unpack_8(v, raw[u], d->dtype);
            MOE_UNROLL
            for (int i = 0; i < 8; ++i) sum[i] = fmaf(weight[u], v[i], sum[i]);
        }
    }
}

/* Sums the rows of expert blockIdx.y: a block has 256 columns.
     1. Warp w adds rows w, w + 8, ... of the expert, a lane 8 columns.
     2. After a barrier a thread adds the warps' sums of one column, in order, and stores. */
MOE_KERNEL(MOEI_ROW_SUMS_THREADS, 2) moei_row_sums(MOE_ARG(moei_row_sums_args) d)
{
    MOE_SHARED(moei_row_sums_shared, s);
    const int e = (int)blockIdx.y, first = (int)blockIdx.x * MOEI_ROW_SUMS_COLUMNS;
    const int column = first + (int)threadIdx.x;
    float sum[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    int begin, end;

    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(d.fault)) return;
    begin = d.expert_offset ? d.expert_offset[e] : 0;
    end = d.expert_offset ? d.expert_offset[e + 1] : d.num_rows;
    if (begin < 0) begin = 0; /* offsets that are wrong: the products have raised the fault */
    if (end > d.num_rows) end = d.num_rows;
    moei_row_sums_add(sum, &d, begin + moe_warp(), end, first + moe_lane() * 8); /* 1. */
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) s.sum[moe_warp()][moe_lane() * 8 + i] = sum[i];
    __syncthreads();
    if (column < d.columns && (end > begin || !d.skip_empty)) { /* 2. */
        const int to = !d.pairs           ? column
                       : column < d.pairs ? 2 * column
                                          : 2 * (column - d.pairs) + 1;
        const int64_t at = (int64_t)e * d.columns + to;
        float all = 0.0f;
        MOE_UNROLL
        for (int w = 0; w < MOEI_ROW_SUMS_THREADS / MOE_WARP_SIZE; ++w)
            all += s.sum[w][threadIdx.x];
        if (d.accumulate) all += moe_load_f32(d.out, at, d.out_dtype);
        moe_store_f32(d.out, at, d.out_dtype, all);
    }
}

/* dweights[slot] = sum over p of dot[r, p] + sum over h of dy[slot / K, h] bias2[e, h]; r: the slot's
   row, of expert e. A slot without a row has 0. */
typedef struct moei_dweights_args {
    const float* dot;             /* [num_rows, parts] */
    const void* bias2;            /* [E, H] dtype; or null */
    const void* dy;               /* [T, H] dtype */
    const int32_t* expert_offset; /* [E + 1]; null: one expert has all rows */
    const int32_t* slot_row; /* [num_slots] row of each slot, -1: none; null: slot r has row r */
    float* dweights;         /* [num_slots] */
    uint64_t* fault;         /* [1] fault word; or null */
    int64_t dy_stride;       /* elements between rows */
    int64_t num_slots;       /* T * K; without slot_row the rows */
    int32_t num_rows, parts; /* upper bound of the rows; numbers of dot in a row */
    int32_t num_experts, hidden, top_k, dtype;
} moei_dweights_args;

#define MOEI_DWEIGHTS_THREADS 256

/* Returns the expert of row r: the last one that begins at or before the row. */
MOE_DEVICE int moei_expert_of_row(const int32_t* expert_offset, int num_experts, int64_t r)
{
    int lo = 0, hi = num_experts; /* expert_offset[lo] <= r < expert_offset[hi] */
    while (expert_offset && hi - lo > 1) {
        const int mid = (lo + hi) / 2;
        if (expert_offset[mid] <= r) lo = mid;
        else hi = mid;
    }
    return lo;
}

/* Returns the row of a slot; -1: none. */
MOE_DEVICE int64_t moei_dweights_row(const moei_dweights_args* d, int64_t slot)
{
    const int rows = d->expert_offset ? d->expert_offset[d->num_experts] : d->num_rows;
    int64_t r;
    if (slot >= d->num_slots) return -1;
    r = d->slot_row ? d->slot_row[slot] : slot;
    return r >= 0 && r < rows && r < d->num_rows ? r : -1;
}

/* Returns the gradient of the weight of row r, whose token has row `from` of dy, to each of `lanes`
   neighbouring lanes, a literal: 4, or 32 with bias2. `rank`: the lane among them. Each lane adds
   every lanes-th number in ascending order; shuffles add the lanes. r < 0: returns 0. */
MOE_DEVICE float moei_dweights_sum(const moei_dweights_args* d, int64_t r, int64_t from, int rank,
                                   const int lanes)
{
    float sum = 0.0f;
    if (r >= 0) {
        for (int p = rank; p < d->parts; p += lanes) sum += d->dot[r * d->parts + p];
        if (lanes == 32 && d->bias2) {
            const int e = moei_expert_of_row(d->expert_offset, d->num_experts, r);
            const int64_t bias = (int64_t)e * d->hidden, dy = from * d->dy_stride;
            float own = 0.0f;
            for (int h = rank; h < d->hidden; h += lanes)
                own = fmaf(moe_load_f32(d->dy, dy + h, d->dtype),
                           moe_load_f32(d->bias2, bias + h, d->dtype), own);
            sum += own;
        }
    }
    return moe_warp_sum(sum, lanes);
}

/* One slot by `lanes` neighbouring lanes, as above. */
MOE_DEVICE void moei_dweights_slot(const moei_dweights_args* d, const int lanes)
{
    const int64_t slot = ((int64_t)blockIdx.x * MOEI_DWEIGHTS_THREADS + threadIdx.x) / lanes;
    const int rank = (int)threadIdx.x % lanes;
    const float sum =
        moei_dweights_sum(d, moei_dweights_row(d, slot), slot / d->top_k, rank, lanes);
    if (slot < d->num_slots && rank == 0) d->dweights[slot] = sum;
}

MOE_KERNEL(MOEI_DWEIGHTS_THREADS, 4) moei_dweights(MOE_ARG(moei_dweights_args) d)
{
    moe_pdl_trigger();
    moe_pdl_wait();
    if (!moe_fault_stopped(d.fault)) moei_dweights_slot(&d, 4);
}

MOE_KERNEL(MOEI_DWEIGHTS_THREADS, 4) moei_dweights_bias(MOE_ARG(moei_dweights_args) d)
{
    moe_pdl_trigger();
    moe_pdl_wait();
    if (!moe_fault_stopped(d.fault)) moei_dweights_slot(&d, 32);
}

#endif
