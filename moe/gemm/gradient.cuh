/* gradient.cuh: the backward pass through an activation, as the epilogue of a grouped GEMM: 4 or 8
   neighbouring elements of one row. Called by epilogue.cuh and wgmma/gradient.cuh.

     C[r, j]     = w P[r, j] dv      dv, du: derivatives of activation(v, u), v = pre[r, j]
     C[r, n + j] = w P[r, j] du      gated, u = pre[r, n + j]
     act[r, j]   = w activation(v, u)
     dot[r, p]   = sum of P[r, j] activation(v, u) over 64 columns

   P is in fp32, w the row's weight. gemm/desc.h describes the buffers. Each result is rounded once,
   where it is stored: (w P) dv, with w P in fp32.

   Each path adds up dot in one order, whatever the tile: first a lane's neighbours, ascending; then
   lanes, 32 columns; then two of these sums. */
#ifndef MOE_GEMM_GRADIENT_CUH
#define MOE_GEMM_GRADIENT_CUH

#include "../activation.cuh"
#include "../base/copy.cuh"
#include "args.h"

/* A row of C. */
typedef struct moei_gradient_row {
    int32_t row;  /* of C */
    float weight; /* w; without a row of A any finite number: P, v and u are 0 */
    bool there;   /* the row is the expert's: results are stored */
    bool read;    /* the row is the expert's and has a row of A: pre and row_weight are read */
} moei_gradient_row;

/* Returns row m of C. there: the row is the expert's; otherwise m is any number. */
MOE_DEVICE moei_gradient_row moei_gradient_row_of(const moe_grouped_gemm_args* d, int m, bool there)
{
    const float* weight = d->gradient.row_weight;
    int64_t index = m;
    moei_gradient_row r;
    r.row = m;
    r.there = r.read = there;
    r.weight = 1.0f;
    if (there && d->row_index) {
        index = d->row_index[m];
        r.read = index >= 0 && index < d->a_rows * d->row_div;
    }
    if (r.read && weight) r.weight = weight[index];
    return r;
}

/* Elements of pre, two a word: gates and ups, or numbers and zeros. Afterwards those of C. */
typedef struct moei_gradient_pre {
    uint32_t gate[4], up[4];
} moei_gradient_pre;

/* Load and store 2 * words neighbours at p, 4 * words-byte aligned; words, a literal, is 2 or 4. */
MOE_DEVICE void moei_gradient_load_words(uint32_t* w, const uint16_t* p, const int words)
{
    if (words == 4) {
        const uint4 v = moei_load16(p);
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
        const uint2 v = *(const uint2*)p;
        w[0] = v.x, w[1] = v.y;
    }
}

MOE_DEVICE void moei_gradient_store_words(uint16_t* p, const uint32_t* w, const int words)
{
    if (words == 4) moei_store16(p, make_uint4(w[0], w[1], w[2], w[3]));
    else *(uint2*)p = make_uint2(w[0], w[1]);
}

/* Loads 2 * words columns of pre from `column` on: zeros in rows not read and from column n on. */
MOE_DEVICE moei_gradient_pre moei_gradient_load(const moe_grouped_gemm_args* d,
                                                const moei_gradient_row* r, int column,
                                                const int words)
{
    const uint16_t* at = (const uint16_t*)d->c.pre + r->row * d->c.pre_stride + column;
    moei_gradient_pre p;
    MOE_UNROLL
    for (int i = 0; i < words; ++i) p.gate[i] = p.up[i] = 0;
    if (r->read && column < d->n) {
        moei_gradient_load_words(p.gate, at, words);
        if (d->gradient.gated) moei_gradient_load_words(p.up, at + d->n, words);
    }
    return p;
}

/* Replaces 4 elements of pre, two words each of gates and ups, by those of C, and act by the
   activations, from p [4], those of P, which it overwrites. Returns sum + the sum of P
   activation(v, u), added in order. */
MOE_DEVICE float moei_gradient_4(uint32_t* gate, uint32_t* up, uint32_t* act, float* p,
                                 const moei_gradient_row* r, float sum,
                                 const moe_grouped_gemm_args* d, const int dtype)
{
    const moei_activation a = moei_activation_of(d->c.activation, d->c.alpha, d->c.limit);
    float v[4], u[4], s[4];
    MOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        const float2 g = moe_unpack2(gate[i], dtype), h = moe_unpack2(up[i], dtype);
        v[2 * i] = g.x, v[2 * i + 1] = g.y;
        u[2 * i] = h.x, u[2 * i + 1] = h.y;
    }
    sum = moei_activate_backward_4(v, u, s, p, r->weight, sum, &a, d->gradient.gated != 0);
    MOE_UNROLL
    for (int i = 0; i < 2; ++i) {
        gate[i] = moe_pack2(s[2 * i], s[2 * i + 1], dtype);
        up[i] = moe_pack2(u[2 * i], u[2 * i + 1], dtype);
        act[i] = moe_pack2(v[2 * i], v[2 * i + 1], dtype);
    }
    return sum;
}

/* Computes and stores 2 * words columns of C and act from `column` on, from p, those of P, and pre;
   overwrites both. Returns the sum of P activation(v, u), added in order; 0 where nothing is
   stored. */
MOE_DEVICE float moei_gradient_vector(const moe_grouped_gemm_args* d, const moei_gradient_row* r,
                                      int column, moei_gradient_pre* pre, float* p, const int words,
                                      const int dtype)
{
    uint32_t act[4];
    float sum = 0.0f;
    MOE_UNROLL
    for (int i = 0; i < words; i += 2)
        sum = moei_gradient_4(pre->gate + i, pre->up + i, act + i, p + 2 * i, r, sum, d, dtype);
    if (!r->there || column >= d->n) return 0.0f;
    {
        uint16_t* c = (uint16_t*)d->c.base + r->row * d->c.stride + column;
        uint16_t* to = (uint16_t*)d->gradient.act;
        moei_gradient_store_words(c, pre->gate, words);
        if (d->gradient.gated) moei_gradient_store_words(c + d->n, pre->up, words);
        if (to)
            moei_gradient_store_words(to + r->row * d->gradient.act_stride + column, act, words);
    }
    return sum;
}

/* Stores the part of dot of 64 columns from `column` on, a multiple of 64. */
MOE_DEVICE void moei_gradient_store_dot(const moe_grouped_gemm_args* d, int row, int column,
                                        float part)
{
    d->gradient.dot[(int64_t)row * ((d->n + 63) / 64) + column / 64] = part;
}

#endif
