/* gradient.cuh: the backward pass through an activation, as the epilogue of a grouped GEMM: 4 or 8
   neighbouring elements of one row. Called by epilogue.cuh and wgmma/gradient.cuh.

     C[r, j]     = w P[r, j] dv      dv, du: derivatives of activation(v, u), v = pre[r, j]
     C[r, n + j] = w P[r, j] du      gated, u = pre[r, n + j]
     act[r, j]   = w activation(v, u)
     dot[r, p]   = sum of P[r, j] activation(v, u) over 64 columns

   P is in fp32, w the row's weight. gemm/desc.h describes the buffers. Each result is rounded once,
   where it is stored: (w P) dv, with w P in fp32. On wgmma P itself is rounded (wgmma/gradient.cuh).

   Each path adds up dot in one order, whatever the tile: first a lane's neighbours, ascending; then
   lanes. On WMMA these have 32 columns, and two such sums are added last; on wgmma 64. */
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
    const int index = there && d->row_index ? d->row_index[m] : m; /* in row_weight */
    moei_gradient_row r;
    r.row = m;
    r.there = there;
    r.read = there && (!d->row_index || (index >= 0 && index < d->a_rows * d->row_div));
    r.weight = r.read && weight ? weight[index] : 1.0f;
    return r;
}

/* Elements of pre, two a word: gates and ups, or numbers and zeros. Afterwards those of C, and the
   weighted activations. */
typedef struct moei_gradient_pre {
    uint32_t gate[4], up[4], act[4];
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
    if (words == 4) moei_store16_streaming(p, make_uint4(w[0], w[1], w[2], w[3]));
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

/* A resolved activation, and whether it is gated. */
typedef struct moei_gradient_activation {
    moei_activation a;
    bool gated;
} moei_gradient_activation;

/* Returns the resolved form of `activation`, that of *d or a literal of the same value. */
MOE_DEVICE moei_gradient_activation moei_gradient_activation_of(const moe_grouped_gemm_args* d,
                                                                int activation)
{
    moei_gradient_activation g;
    g.a = moei_activation_of(activation, d->c.alpha, d->c.limit);
    g.gated = moe_activation_is_gated(activation) != 0;
    return g;
}

/* Replaces `words` words, a literal, of *pre from j on by those of C and act, from p [2 * words],
   those of P / unit, which it overwrites. Returns sum + the sum of p activation(v, u), added in
   order. */
MOE_DEVICE float moei_gradient_words(moei_gradient_pre* pre, float* p, const int j, const int words,
                                     float unit, float weight, float sum,
                                     const moei_gradient_activation* g, const int dtype)
{
    const float scale = unit * weight;
    float v[8], u[8], s[8];
    MOE_UNROLL
    for (int i = 0; i < words; ++i) {
        const float2 gate = moe_unpack2(pre->gate[j + i], dtype);
        const float2 up = moe_unpack2(pre->up[j + i], dtype);
        v[2 * i] = gate.x, v[2 * i + 1] = gate.y;
        u[2 * i] = up.x, u[2 * i + 1] = up.y;
    }
    moei_activate_grad(v, u, s, 2 * words, &g->a, g->gated);
    MOE_UNROLL
    for (int i = 0; i < 2 * words; ++i) {
        sum = fmaf(p[i], v[i], sum);
        p[i] *= scale;
        u[i] *= p[i];
        s[i] *= p[i];
        v[i] *= weight;
    }
    MOE_UNROLL
    for (int i = 0; i < words; ++i) {
        pre->gate[j + i] = moe_pack2(s[2 * i], s[2 * i + 1], dtype);
        pre->up[j + i] = moe_pack2(u[2 * i], u[2 * i + 1], dtype);
        pre->act[j + i] = moe_pack2(v[2 * i], v[2 * i + 1], dtype);
    }
    return sum;
}

/* Stores 2 * words columns of C and act from `column` on. */
MOE_DEVICE void moei_gradient_store(const moe_grouped_gemm_args* d, const moei_gradient_row* r,
                                    int column, const moei_gradient_pre* pre, const int words)
{
    uint16_t* c = (uint16_t*)d->c.base + r->row * d->c.stride + column;
    uint16_t* act = (uint16_t*)d->gradient.act;
    if (!r->there || column >= d->n) return;
    moei_gradient_store_words(c, pre->gate, words);
    if (d->gradient.gated) moei_gradient_store_words(c + d->n, pre->up, words);
    if (act)
        moei_gradient_store_words(act + r->row * d->gradient.act_stride + column, pre->act, words);
}

/* Stores the part of dot of 64 columns from `column` on, a multiple of 64. */
MOE_DEVICE void moei_gradient_store_dot(const moe_grouped_gemm_args* d, int row, int column,
                                        float part)
{
    d->gradient.dot[(int64_t)row * ((d->n + 63) / 64) + column / 64] = part;
}

#endif
