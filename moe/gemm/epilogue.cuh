/* epilogue.cuh: bias, activation, rounding and store of a warp's accumulators. Called by tile.cuh
   and k_tile.cuh; block_sparse/store.cuh uses moei_epilogue_store8.

   A warp writes its warp tile, 16 rows at a time, to a staging of its own in shared memory. Then
   the warp reads the staging in row order and stores 16 bytes a lane. The epilogue has no block
   barrier: each warp stores as soon as its sums are complete. Three versions; the first two serve
   tiles of 128 x 128 and more on sm_80 and later:

     plain   no bias, no pre, C 16-bit and overwritten; no activation, or SwiGLU with gate and up not
             interleaved. Applies the activation to the accumulators; the staging has C's dtype
     fp32    no bias, no activation, C fp32: overwritten or added to
     any     the staging is fp32 [16][wn + 8]; applies bias and activation after the staging, and
             stores what the activation is applied to (pre). A lane reads 8 columns as 4 and 4; half
             of the lanes read the second 4 first, against bank conflicts

   Beside them stands the backward pass through an activation (gradient.cuh), with the staging of
   `any`. Its sums over 64 columns need a block barrier where a warp tile has 32.

   Gate and up of a gated activation: interleaved, columns 2j and 2j + 1 of the warp tile; otherwise
   columns j and wn / 2 + j, since the loader copies both halves into the columns of one warp. */
#ifndef MOE_GEMM_EPILOGUE_CUH
#define MOE_GEMM_EPILOGUE_CUH

#include "../activation.cuh"
#include "../base/warp.cuh"
#include "args.h"
#include "gradient.cuh"
#include "mma.cuh"
#include "schedule.cuh"
#include "shape.h"
#include "variant.cuh"

/* Stores 8 neighbours at p, 16-byte aligned, as dtype. v[0 .. 3] are elements first .. first + 3,
   where first is 0 or 4; v[4 .. 7] are the other four. */
MOE_DEVICE void moei_epilogue_store8(void* p, const float* v, int first, int dtype)
{
    if (dtype == MOE_FP32) {
        moei_store_4((float*)p + first, v);
        moei_store_4((float*)p + 4 - first, v + 4);
    } else {
        const uint4 w = moei_pack_8(v, dtype);
        *(uint4*)p = first ? make_uint4(w.z, w.w, w.x, w.y) : w;
    }
}

/* Adds 8 neighbours at p, 16-byte aligned, to v [8]; `first` as in moei_epilogue_store8. */
MOE_DEVICE void moei_epilogue_add8(float* v, const void* p, int first, int dtype)
{
    float w[8];
    moei_load_some(w, p, dtype, 8);
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) v[i] += first ? w[i ^ 4] : w[i];
}

/* Adds bias[at + i * step] to v[i], i < 4. */
MOE_DEVICE void moei_epilogue_bias(float* v, const uint16_t* bias, int64_t at, int step, int dtype)
{
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) v[i] += moe_half_to_f32(bias[at + i * step], dtype);
}

/* Adds the bias of 8 columns to v [8]. n: index of the first column's bias; step: elements between
   columns; `first` as in moei_epilogue_store8. */
MOE_DEVICE void moei_epilogue_bias8(float* v, const uint16_t* bias, int64_t n, int first, int step,
                                    int dtype)
{
    moei_epilogue_bias(v, bias, n + first * step, step, dtype);
    moei_epilogue_bias(v + 4, bias, n + (4 - first) * step, step, dtype);
}

/* The three versions. All lanes of a warp call together; f is a literal. Each stores the warp's
   accumulators to rows from `row` on and columns from `column` on of C, which has n columns. Rows
   outside the expert's t->begin .. t->end and columns from n on are not stored. */

/* plain: gated, a literal, means SwiGLU. staging: 16-bit [16][columns + 8]. */
MOE_DEVICE void moei_epilogue_plain(const moe_gemm_output* d, int n, const moe_tile_position* t,
                                    moei_mma_c acc[4][4], uint16_t* staging, int row, int column,
                                    const int gated, const moe_gemm_shape f)
{
    const int columns = gated ? f.wn / 2 : f.wn, ld = columns + 8;
    const int groups = columns / 8,
              each = MOE_WARP_SIZE / groups; /* lanes a row; rows a pass */
    const int r = moe_lane() / groups, j = moe_lane() % groups * 8;
    const bool in = column + j < n;
    uint16_t* c = d->table ? (uint16_t*)d->table[t->expert] - (int64_t)t->begin * d->stride
                             : (uint16_t*)d->base;
    row += r;
    c += row * d->stride + column + j;
    MOE_UNROLL
    for (int m = 0; m < f.wm / 16; ++m) {
        uint4 v[4];
        if (gated) {
            MOE_UNROLL
            for (int i = 0; i < columns / 16; ++i) MOE_UNROLL
            for (int x = 0; x < MOEI_MMA_C_ELEMS; ++x)
                acc[m][i].x[x] = moei_sigmoid_unit(acc[m][i].x[x], MOEI_MINUS_LOG2E) *
                                 acc[m][i + columns / 16].x[x];
        }
        MOE_UNROLL
        for (int i = 0; i < columns / 16; ++i)
            moei_mma_store_half(staging + i * 16, &acc[m][i], ld, f.dtype);
        __syncwarp(MOE_FULL_WARP);
        MOE_UNROLL
        for (int p = 0; p < 16 / each; ++p)
            v[p] = *(const uint4*)(staging + (p * each + r) * ld + j);
        MOE_UNROLL
        for (int p = 0; p < 16 / each; ++p) {
            if (in && row >= t->begin && row < t->end) *(uint4*)c = v[p];
            row += each;
            c += each * d->stride;
        }
        __syncwarp(MOE_FULL_WARP);
    }
}

/* fp32. staging: fp32 [16][wn + 8]. */
MOE_DEVICE void moei_epilogue_fp32(const moe_gemm_output* d, int n, const moe_tile_position* t,
                                   moei_mma_c acc[4][4], float* staging, int row, int column,
                                   const moe_gemm_shape f)
{
    const int ld = moei_staging_pitch(f.wn), groups = f.wn / 4, each = MOE_WARP_SIZE / groups;
    const int r = moe_lane() / groups, j = moe_lane() % groups * 4;
    const bool in = column + j < n;
    float* c =
        d->table ? (float*)d->table[t->expert] - (int64_t)t->begin * d->stride : (float*)d->base;
    row += r;
    c += row * d->stride + column + j;
    MOE_UNROLL
    for (int m = 0; m < f.wm / 16; ++m) {
        MOE_UNROLL
        for (int i = 0; i < f.wn / 16; ++i) moei_mma_store(staging + i * 16, &acc[m][i], ld);
        __syncwarp(MOE_FULL_WARP);
        MOE_NO_UNROLL
        for (int p = 0; p < 16 / each; p += 2) { /* two rows at a time: their latencies overlap */
            float v[2][4], was[2][4];
            bool there[2];
            MOE_UNROLL
            for (int i = 0; i < 2; ++i) {
                there[i] = in && row + i * each >= t->begin && row + i * each < t->end;
                moei_load_4(v[i], staging + ((p + i) * each + r) * ld + j);
                if (d->accumulate && there[i]) moei_load_4(was[i], c + i * each * d->stride);
            }
            MOE_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (d->accumulate && there[i]) {
                    MOE_UNROLL
                    for (int x = 0; x < 4; ++x) v[i][x] += was[i][x];
                }
                if (there[i]) moei_store_4(c, v[i]);
                row += each;
                c += each * d->stride;
            }
        }
        __syncwarp(MOE_FULL_WARP);
    }
}

/* Stores the fragments of rows 16 i .. 16 i + 15 of the warp tile to the staging, visible to all
   lanes. i is no literal: a loop over rows has one body, and the literal m indexes acc. */
MOE_DEVICE void moei_epilogue_stage(float* staging, moei_mma_c acc[4][4], int i,
                                    const moe_gemm_shape f)
{
    MOE_UNROLL
    for (int m = 0; m < f.wm / 16; ++m)
        if (m == i) {
            MOE_UNROLL
            for (int j = 0; j < f.wn / 16; ++j)
                moei_mma_store(staging + j * 16, &acc[m][j], moei_staging_pitch(f.wn));
        }
    __syncwarp(MOE_FULL_WARP);
}

/* any. staging: fp32 [16][wn + 8]. For each 16 rows of the warp tile:

   1. Store the fragments of these rows to the staging; __syncwarp makes them visible to all lanes.
   2. Each lane takes 8 columns of C in one row after another: reads v, and w, the up, where gated.
   3. Add the bias. Store the results so far to pre, where given.
   4. Apply the activation.
   5. Add the 8 elements of C where accumulate is set; store 8 elements to C.
   __syncwarp: all lanes have read the staging before the next rows overwrite the staging. */
MOE_DEVICE void moei_epilogue_any(const moe_gemm_output* d, int n, const moe_tile_position* t,
                                  moei_mma_c acc[4][4], float* staging, int row, int column,
                                  const moe_gemm_shape f)
{
    const int wm = f.wm, wn = f.wn;
    const bool gated = d->gated != 0;
    const bool pairs = d->gated == MOE_GATE_UP_INTERLEAVED;
    const int ld = moei_staging_pitch(wn);
    const int groups = (gated ? wn / 2 : wn) / 8; /* groups of 8 columns of C in a staging row */
    const int c_bytes = d->dtype == MOE_FP32 ? 4 : 2;
    char* c = d->table ? (char*)d->table[t->expert] - (int64_t)t->begin * d->stride * c_bytes
                         : (char*)d->base;

    MOE_NO_UNROLL /* a quarter of the code */
    for (int i = 0; i < wm / 16; ++i) {
        moei_epilogue_stage(staging, acc, i, f); /* 1. */
        for (int u = moe_lane(); u < 16 * groups; u += MOE_WARP_SIZE) {
            const int r = u / groups, j = u % groups * 8;
            const int first = pairs ? 0 : u & 4;
            const int64_t m = row + i * 16 + r;
            const int to = column + j;
            const float* p = staging + r * ld + (pairs ? 2 * j : j + first);
            float v[8], w[8];
            /* computed here, so that it holds no register while the accumulators are live */
            const uint16_t* bias = (const uint16_t*)d->bias;
            if (m < t->begin || m >= t->end || to >= n) continue;
            if (bias) bias += (int64_t)t->expert * n * (gated ? 2 : 1);
            /* 2. from the staging */
            if (pairs) {
                MOE_UNROLL
                for (int x = 0; x < 4; ++x) {
                    const float4 four = *(const float4*)(p + 4 * x);
                    v[2 * x] = four.x, w[2 * x] = four.y, v[2 * x + 1] = four.z,
                          w[2 * x + 1] = four.w;
                }
            } else {
                moei_load_4(v, p);
                moei_load_4(v + 4, p + 4 - 2 * first);
            }
            if (gated && !pairs) {
                moei_load_4(w, p + wn / 2);
                moei_load_4(w + 4, p + wn / 2 + 4 - 2 * first);
            }
            /* 3. bias */
            if (bias) {
                moei_epilogue_bias8(v, bias, pairs ? 2 * to : to, first, pairs ? 2 : 1,
                                    d->bias_dtype);
                if (gated)
                    moei_epilogue_bias8(w, bias, pairs ? 2 * to + 1 : n + to, first,
                                        pairs ? 2 : 1, d->bias_dtype);
            }
            if (d->pre) {
                uint16_t* at = (uint16_t*)d->pre + m * d->pre_stride + to;
                moei_epilogue_store8(at, v, first, d->bias_dtype);
                if (gated) moei_epilogue_store8(at + n, w, first, d->bias_dtype);
            }
            /* 4. activation */
            if (d->activation != MOE_ACTIVATION_NONE) {
                const moei_activation a = moei_activation_of(d->activation, d->alpha, d->limit);
                moei_activate(v, w, 8, &a, gated);
            }
            { /* 5. to C */
                void* at = c + (m * d->stride + to) * c_bytes;
                if (d->accumulate) moei_epilogue_add8(v, at, first, d->dtype);
                moei_epilogue_store8(at, v, first, d->dtype);
            }
        }
        __syncwarp(MOE_FULL_WARP);
    }
}

/* Adds up the sums that moei_epilogue_gradient left behind the columns of the staging: for rows
   from `row` on that are the expert's, and for 64 columns from `column` on, a multiple of 64. Each
   sum is that of 32 columns. Where a warp tile has but 32, the next warp along n has the second. */
MOE_DEVICE void moei_epilogue_dot(const moe_grouped_gemm_args* d, const moe_tile_position* t,
                                  const float* staging, int row, int column, const moe_gemm_shape f)
{
    const int ld = moei_staging_pitch(f.wn), parts = f.wn / 32;
    const float* second =
        parts == 2 ? staging + 1 : staging + f.warps_m * moei_staging_floats(f.wn);
    if (column % 64 != 0 || column >= d->n) return;
    for (int r = moe_lane(); r < f.wm; r += MOE_WARP_SIZE) {
        const int at = r % 16 * ld + f.wn + r / 16 * parts, m = row + r;
        if (m >= t->begin && m < t->end)
            moei_gradient_store_dot(d, m, column, staging[at] + second[at]);
    }
}

/* The backward pass through the activation. staging: fp32 [16][wn + 8]. All warps of the block call
   it. For each 16 rows of the warp tile:

   1. Store the fragments of these rows to the staging.
   2. Each lane takes 4 columns of one row after another: reads P and pre; computes and stores.
   3. dot: add up each 32 columns; keep the sums in the row's padding.
   Last, add up pairs of these sums: where warps have 32 columns, after a barrier. The next tile's
   steps have barriers before the staging is overwritten. */
MOE_DEVICE void moei_epilogue_gradient(const moe_grouped_gemm_args* d, const moe_tile_position* t,
                                       moei_mma_c acc[4][4], float* staging, int row, int column,
                                       const moe_gemm_shape f)
{
    const int wm = f.wm, wn = f.wn, ld = moei_staging_pitch(wn), groups = wn / 4;
    const moei_gradient_activation kind = moei_gradient_activation_of(d, d->c.activation);

    MOE_NO_UNROLL
    for (int i = 0; i < wm / 16; ++i) {
        moei_epilogue_stage(staging, acc, i, f); /* 1. */
        MOE_NO_UNROLL
        for (int u = moe_lane(); u < 16 * groups; u += MOE_WARP_SIZE) { /* all lanes as often */
            const int r = u / groups, j = u % groups * 4, m = row + i * 16 + r;
            const moei_gradient_row at = moei_gradient_row_of(d, m, m >= t->begin && m < t->end);
            moei_gradient_pre pre = moei_gradient_load(d, &at, column + j, 2); /* 2. */
            float p[4], sum;
            moei_load_4(p, staging + r * ld + j);
            sum = moei_gradient_words(&pre, p, 0, 2, 1.0f, at.weight, 0.0f, &kind, f.dtype);
            moei_gradient_store(d, &at, column + j, &pre, 2);
            /* over a number that this lane alone reads */
            staging[r * ld + j] = at.there && column + j < d->n ? sum : 0.0f;
        }
        __syncwarp(MOE_FULL_WARP);
        for (int u = moe_lane(); u < wn / 2 && d->gradient.dot; u += MOE_WARP_SIZE) { /* 3. */
            const float* from = staging + u % 16 * ld + u / 16 * 32;
            float sum = 0.0f;
            MOE_UNROLL
            for (int j = 0; j < 32; j += 4) sum += from[j];
            staging[u % 16 * ld + wn + i * (wn / 32) + u / 16] = sum;
        }
        __syncwarp(MOE_FULL_WARP);
    }
    if (!d->gradient.dot) return;
    if (wn < 64) __syncthreads();
    moei_epilogue_dot(d, t, staging, row, column, f);
}

/* Stores one warp's accumulators by the version that fits *d; arguments as above. All lanes of the
   warp call it. staging: moei_staging_floats(wn) floats of the warp's own. */
MOE_DEVICE void moei_epilogue_warp(const moe_gemm_output* d, int n, const moe_tile_position* t,
                                   moei_mma_c acc[4][4], float* staging, int row, int column,
                                   const moe_gemm_shape f)
{
    const bool none = d->activation == MOE_ACTIVATION_NONE;
    /* large tiles only: in others the gain is not worth the code; on sm_75 they would spill */
    const bool bare = MOEI_CODE_HERE(80, MOEI_CODE_ANY) && f.tile_m * f.tile_n >= 128 * 128 &&
                      !d->bias && d->gated != MOE_GATE_UP_INTERLEAVED;
    const bool plain = bare && !d->pre && !d->accumulate && d->dtype == f.dtype;
    if (bare && none && d->dtype == MOE_FP32)
        moei_epilogue_fp32(d, n, t, acc, staging, row, column, f);
    else if (plain && none)
        moei_epilogue_plain(d, n, t, acc, (uint16_t*)staging, row, column, 0, f);
    else if (plain && d->activation == MOE_ACTIVATION_SWIGLU)
        moei_epilogue_plain(d, n, t, acc, (uint16_t*)staging, row, column, 1, f);
    else moei_epilogue_any(d, n, t, acc, staging, row, column, f);
}

#endif
