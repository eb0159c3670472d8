/* grouped.cuh: grouped GEMM on tensor cores: one product per expert over that expert's rows.

     C[r, :] = activation( A[row(r), :] * B_e^T + bias_e ),  r in expert e,
     row(r)  = row_index[r] / row_div

   In:   A [a_rows, k], or mn-major [k, a_rows]; B_e [n, k], gated [2n, k]; fp16 or bf16
         expert_offset [E + 1] or a list of groups of rows, row_index [R]
   Out:  C [R, n] in expert order, in the same dtype or fp32
   Any number of rows per expert; n and k are multiples of 8. Layouts and options: gemm/desc.h.

   Rows of A are gathered by index while they are loaded: no permuted copy is made. Weights are read
   from the caller's layout (moe_weights). Kernels read the row counts from expert_offset or the
   list on the device: no copy to the host, and a captured graph replays with other routing.

   Rows of A may come, and rows of C be used, while the product runs: counters in memory (`ready`,
   `done`) tell which. Each may be another device's.

   Accumulates in fp32. Each element of C is one sum in ascending k: equal inputs give equal bits
   for one path and tile shape, which depend on shapes, device, driver and binary alone. With
   batch_invariant they do not depend on num_rows: a row has the same bits in any batch.

   Cost: 2 * R * n * k flops (twice that with a gated activation). One launch; with a workspace, on
   the wgmma path, a memset of 4 bytes before it. Minimum architecture: sm_75 (fp16), sm_80 (bf16).

     moe_grouped_gemm_desc g = {0};
     g.a = x;  g.row_index = row_slot;  g.row_div = K;  g.a_rows = T;
     g.b.base = w;  g.expert_offset = offset;  g.c = c;
     g.num_experts = E;  g.num_rows = T * K;  g.n = I;  g.k = H;
     g.workspace = ws;  g.workspace_bytes = MOE_GROUPED_GEMM_WORKSPACE;     // may be left out
     moe_status s = moe_grouped_gemm(&g, stream);

   Two paths: WMMA on every architecture (tile.cuh), wgmma on Hopper (wgmma/tile.cuh). wgmma runs
   where the device and the binary have it (sm_90a), with A k-major and no row_div without
   row_index; mn-major weights must not interleave gates and ups. WMMA runs everything else, and
   where B has 128 rows or less or there are few tiles (moei_gemm_suits).
   moe_grouped_gemm_plan tells which. A further path is added here: a kernel, an entry in
   moe_gemm_path, an entry in kernels.inl. */
#ifndef MOE_GEMM_GROUPED_CUH
#define MOE_GEMM_GROUPED_CUH

#include "../preload.cuh"
#include "prepare.cuh"

#define MOEI_GEMM_TABLE moei_gemm_variants
#define MOEI_GEMM_PREFIX moei_gemm_
#define MOEI_GEMM_GRADIENT 0
#include "kernels.inl"

/* Prepares a product; moe_grouped_gemm_run queues it any number of times. *p keeps the addresses of
   tables, not their entries. Errors: each field that is not as documented in desc.h, with its own
   status; MOE_ERR_DEVICE where the device or this binary has no kernel for it; MOE_ERR_NOT_COMPILED
   where MOE_GEMM_VARIANT_LIST has none. num_rows = 0 is no error. On an error *p is empty. */
MOE_HOST moe_status moe_grouped_gemm_prepare(const moe_grouped_gemm_desc* desc,
                                             moe_grouped_gemm_prepared* p)
{
    MOE_RETURN_PREPARED(desc, p, moei_gemm_check_prepare(moei_gemm_variants, desc, 0, p));
}

/* Sets *plan to the kernel and grid of moe_grouped_gemm for this descriptor on the current device.
   Errors as of moe_grouped_gemm_prepare. */
MOE_HOST moe_status moe_grouped_gemm_plan(const moe_grouped_gemm_desc* desc, moe_gemm_plan* plan)
{
    moe_grouped_gemm_prepared p;
    MOE_REQUIRE(desc && plan, MOE_ERR_NULL, desc);
    MOE_TRY(moe_grouped_gemm_prepare(desc, &p));
    *plan = p.plan;
    return MOE_OK;
}

/* Prepares and runs. Nothing is queued where a field is refused. */
MOE_HOST moe_status moe_grouped_gemm(const moe_grouped_gemm_desc* desc, cudaStream_t stream)
{
    moe_grouped_gemm_prepared p;
    MOE_TRY(moe_grouped_gemm_prepare(desc, &p));
    return moe_grouped_gemm_run(&p, stream);
}

/* Loads this header's kernels, before their first launch. */
MOE_HOST moe_status moe_grouped_gemm_preload(void)
{
    return moei_variant_preload(moei_gemm_variants);
}

MOEI_PRELOAD_INCLUDED(grouped_gemm)

#endif
