/* grouped_gradient.cuh: the backward pass through an activation, as the epilogue of a grouped GEMM
   on tensor cores. One product per expert over that expert's rows, as grouped.cuh:

     P[r, :]     = A[row(r), :] * B_e^T,  r in expert e      not stored
     C[r, j]     = w P[r, j] dv                              v = pre[r, j]
     C[r, n + j] = w P[r, j] du                              gated, u = pre[r, n + j]
     act[r, j]   = w activation(v, u)                        or null
     dot[r, p]   = sum of P[r, j] activation(v, u) over 64 columns     or null

   dv, du: derivatives of the activation. w: row_weight of the row, or 1. For experts
   y = w act(x W1) W2, A is the gradient of y, gathered by row_slot, and B is W2, mn-major: C is then
   the gradient by x W1, act what the gradient of W2 needs, and a row of dot adds up to the gradient
   of w.

   In:   A [a_rows, k]; B_e [n, k] or mn-major [k, n]; pre [R, n], gated [R, 2n]; fp16 or bf16
         expert_offset or a list of groups, row_index, row_weight: as in gemm/desc.h
   Out:  C [R, n], gated [R, 2n], which may be pre itself; act [R, n]; dot [R, ceil(n / 64)] fp32
   Options, paths, ready and done, order of sums, bits: as grouped.cuh. Without bias and accumulate.
   dot has one order of addition for each path. P is in fp32. On wgmma it is rounded to 11 bits on its
   way to the activation; where it is below 2^-28 of its row's largest number (of 256 columns), with an
   error of at most 2^-39 of that. There w P has an error of at most 2^-134 beside. Where w times that
   largest number is 2^142 or more, the row's zeros may become NaN. More than 1792 experts or groups
   take the WMMA path.

   Cost: 2 * R * n * k flops; reads pre and writes C and act once. On wgmma P passes through act
   before, or through C without act; with C over pre it needs act. One launch, and a memset of 4
   bytes with a workspace. Minimum architecture: sm_75 (fp16), sm_80 (bf16).

     moe_grouped_gemm_desc g = {0};
     g.gradient = 1;  g.activation = MOE_ACTIVATION_SWIGLU;
     g.a = dy;  g.row_index = row_slot;  g.row_div = K;  g.a_rows = T;
     g.b.base = w2;  g.b.major = MOE_MAJOR_MN;  g.expert_offset = offset;
     g.pre = pre;  g.row_weight = weight;               // of each slot
     g.c = dpre;  g.act = act;  g.dot = dot;
     g.num_experts = E;  g.num_rows = T * K;  g.n = I;  g.k = H;
     g.workspace = ws;  g.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;     // may be left out
     moe_status s = moe_grouped_gemm_gradient(&g, stream); */
#ifndef MOE_GEMM_GROUPED_GRADIENT_CUH
#define MOE_GEMM_GROUPED_GRADIENT_CUH

#include "../preload.cuh"
#include "prepare.cuh"

#define MOEI_GEMM_TABLE moei_gemm_gradient_variants
#define MOEI_GEMM_PREFIX moei_gemm_gradient_
#define MOEI_GEMM_GRADIENT 1
#include "kernels.inl"

/* Prepares a product with gradient 1; moe_grouped_gemm_run queues it any number of times. Errors as
   of moe_grouped_gemm_prepare. On an error *p is empty. */
MOE_HOST moe_status moe_grouped_gemm_gradient_prepare(const moe_grouped_gemm_desc* desc,
                                                      moe_grouped_gemm_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_gemm_check_prepare(moei_gemm_gradient_variants, desc, 1, p));
}

/* Sets *plan to the kernel and grid of moe_grouped_gemm_gradient for this descriptor on the current
   device. Errors as of moe_grouped_gemm_gradient_prepare. */
MOE_HOST moe_status moe_grouped_gemm_gradient_plan(const moe_grouped_gemm_desc* desc,
                                                   moe_gemm_plan* plan)
{
    moe_grouped_gemm_prepared p;
    MOE_REQUIRE(desc && plan, MOE_ERR_NULL, desc);
    MOE_TRY(moe_grouped_gemm_gradient_prepare(desc, &p));
    *plan = p.plan;
    return MOE_OK;
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_grouped_gemm_gradient(const moe_grouped_gemm_desc* desc,
                                              cudaStream_t stream)
{
    moe_grouped_gemm_prepared p;
    MOE_TRY(moe_grouped_gemm_gradient_prepare(desc, &p));
    return moe_grouped_gemm_run(&p, stream);
}

/* Loads this header's kernels, before their first launch. */
MOE_HOST moe_status moe_grouped_gemm_gradient_preload(void)
{
    return moei_variant_preload(moei_gemm_gradient_variants);
}

MOEI_PRELOAD_INCLUDED(grouped_gemm_gradient)

#endif
