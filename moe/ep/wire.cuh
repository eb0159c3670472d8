/* wire.cuh: fp8 rows of a dispatch (MOE_EP_WIRE_FP8): the receiving half, and the sending one of copies.
   push.cuh and scatter.cuh encode what they store at peers. Called by dispatch.cuh.

   A row for another rank is stored in the `wire` of that rank's region, where its row of recv_x would
   be; one that stays is stored in recv_x as it is. When the rows of all ranks are there, moei_ep_decode
   decodes those of `wire` into recv_x.
   MOE_EP_ALL_GATHER_COPY: each rank encodes its tokens into its own part of its own wire, where no
   other rank stores; copy engines take them from there. */
#ifndef MOE_EP_WIRE_CUH
#define MOE_EP_WIRE_CUH

#include "push.cuh"

#define MOEI_EP_DECODE_THREADS 256

/* Decodes row `row` of this rank's wire into recv_x. The whole warp. */
MOE_DEVICE void moei_ep_decode_row(const moei_ep_args* a, int64_t row)
{
    const int hidden = (int)(a->row_bytes / 2),
              groups = (hidden + MOE_FP8_GROUP - 1) / MOE_FP8_GROUP;
    const char* from = a->peers.base + a->at.wire + row * hidden;
    const float* scales = (const float*)(a->peers.base + a->at.wire_scales) + row * groups;
    char* to = a->peers.base + a->at.recv_x + row * a->row_bytes;
    MOE_NO_UNROLL
    for (int h0 = moe_lane() * 8; h0 < hidden; h0 += 4 * MOE_WARP_SIZE * 8) {
        uint2 code[4];
        float scale[4];
        MOE_UNROLL
        for (int u = 0; u < 4; ++u) { /* all loads are in flight at a time */
            const int h = h0 + u * MOE_WARP_SIZE * 8;
            if (h >= hidden) continue;
            code[u] = *(const uint2*)(from + h);
            scale[u] = scales[h / MOE_FP8_GROUP];
        }
        MOE_UNROLL
        for (int u = 0; u < 4; ++u) {
            const int h = h0 + u * MOE_WARP_SIZE * 8;
            if (h < hidden)
                moei_store16(to + h * 2, moei_fp8_decode_8(code[u], scale[u], a->dtype));
        }
    }
}

/* Is row i of recv_x one that another rank has sent? */
MOE_DEVICE int moei_ep_came(const moei_ep_args* a, int64_t i)
{
    int from, slot;
    if (a->dispatch_form == MOE_EP_ALL_TO_ALL) {
        slot = a->row_slot[i];
        return slot >= 0 && slot / a->top_k / a->recv_tokens != a->peers.rank;
    }
    from = (int)(i / a->recv_tokens);
    return from != a->peers.rank && (int)(i - (int64_t)from * a->recv_tokens) <
                                        ((const int32_t*)(a->peers.base + a->at.recv_count))[from];
}

/* Decodes all rows that other ranks have sent, a row a warp at a time. */
MOE_KERNEL(MOEI_EP_DECODE_THREADS, 4) moei_ep_decode(MOE_ARG(moei_ep_args) a)
{
    const int64_t warps = (int64_t)gridDim.x * (MOEI_EP_DECODE_THREADS / MOE_WARP_SIZE);
    int64_t rows = (int64_t)a.peers.num_ranks * a.recv_tokens;
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    if (a.dispatch_form == MOE_EP_ALL_TO_ALL)
        rows = a.num_local ? min((int64_t)a.expert_offset[a.num_local], a.max_rows) : 0;
    for (int64_t i = (int64_t)blockIdx.x * (MOEI_EP_DECODE_THREADS / MOE_WARP_SIZE) + moe_warp();
         i < rows; i += warps)
        if (moei_ep_came(&a, i)) moei_ep_decode_row(&a, i);
}

/* MOE_EP_ALL_GATHER_COPY: encodes this rank's tokens into its own part of its wire, a piece of a row
   a warp at a time. */
MOE_KERNEL(MOEI_EP_DECODE_THREADS, 2) moei_ep_encode_own(MOE_ARG(moei_ep_args) a)
{
    const int64_t warps = (int64_t)gridDim.x * (MOEI_EP_DECODE_THREADS / MOE_WARP_SIZE);
    const int piece = MOE_WARP_SIZE * MOEI_EP_VECTORS * 16;
    const int64_t pieces = (a.row_bytes + piece - 1) / piece;
    const int tokens = min(a.num_tokens, a.recv_tokens);
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    for (int64_t j = (int64_t)blockIdx.x * (MOEI_EP_DECODE_THREADS / MOE_WARP_SIZE) + moe_warp();
         j < tokens * pieces; j += warps) {
        const int64_t from = j % pieces * piece;
        uint4 v[MOEI_EP_VECTORS];
        moei_ep_fp8 f;
        moei_ep_load(v, &a, (int)(j / pieces), from, 16);
        moei_ep_encode(&f, v, &a, from);
        moei_ep_store_fp8(&f, &a, a.peers.rank, a.at.first + j / pieces, from);
    }
}

#endif
