/* weight_grads.cuh: gradients of the gate's weights: from the ranks that computed the slots to the
   homes of their tokens. Called by layer_backward.cuh.

     dweights[t, k] at home = sum over p of dot[row, p] + <dy[row], bias2>,  row: of slot (t, k)

   The rank of the slot's expert stores each number in the home's region, and the home waits once for
   those of all ranks: a barrier on a channel of its own, so that other work comes between. The sums
   are those of experts_backward/sums.cuh, bit for bit. A slot without a row keeps the zeros that the
   home has written before it sent its rows of dy. */
#ifndef MOE_EP_WEIGHT_GRADS_CUH
#define MOE_EP_WEIGHT_GRADS_CUH

#include "../experts_backward/sums.cuh"
#include "push.cuh"

/* The argument of these kernels. */
typedef struct moei_ep_weight_grads_args {
    moe_peers_args peers;
    moei_dweights_args sum;    /* but for slot_row, dweights and num_slots */
    const int32_t* row_slot;   /* [num_rows] received slot of each row, -1: none */
    const int32_t* recv_token; /* [W C] */
    uint64_t at;               /* offset in every region of dweights [max_tokens, K] */
    float* dweights;           /* [T, K] the caller's */
    int64_t num_slots;         /* T K */
    int32_t num_local;         /* P */
    int32_t recv_tokens, max_tokens, in_order, channel, tag;
} moei_ep_weight_grads_args;

/* Returns where the gradient of received slot `slot` belongs; null where the slot has no home. */
MOE_DEVICE float* moei_ep_weight_grad_home(const moei_ep_weight_grads_args* a, int slot)
{
    const int top_k = a->sum.top_k, i = slot / top_k, from = i / a->recv_tokens;
    int token;
    if (from >= a->peers.num_ranks) return 0;
    token = a->recv_token[i];
    if (token < 0 || token >= a->max_tokens) return 0;
    return (float*)moe_peer_address(&a->peers, from, a->at) + (int64_t)token * top_k + slot % top_k;
}

/* Sends the gradients of all rows, a row by `lanes` neighbouring lanes at a time, and arrives. */
MOE_DEVICE_BODY void moei_ep_weight_grads_send(const moei_ep_weight_grads_args* a, const int lanes)
{
    const int rank = (int)threadIdx.x % lanes;
    const int64_t step = (int64_t)gridDim.x * blockDim.x / lanes;
    int64_t rows = 0, first = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    uint32_t n;
    bool stopped;
    moei_peer_pdl_trigger(&a->peers, 0);
    moe_pdl_wait();
    n = moei_peer_next(&a->peers, a->channel);
    stopped = moe_fault_stopped(a->peers.fault);
    if (!stopped && a->num_local) rows = min(a->sum.expert_offset[a->num_local], a->sum.num_rows);
    MOE_NO_UNROLL
    for (int64_t base = first - (int)(threadIdx.x % MOE_WARP_SIZE) / lanes; base < rows;
         base += step, first += step) { /* the whole warp, as long as its first row is one */
        const int slot = first < rows ? a->row_slot[first] : -1;
        const float sum = moei_dweights_sum(&a->sum, slot < 0 ? -1 : first,
                                            a->in_order ? first : slot / a->sum.top_k, rank, lanes);
        float* home = slot < 0 ? 0 : moei_ep_weight_grad_home(a, slot);
        if (home && rank == 0) *home = sum;
    }
    moei_ep_arrive(&a->peers, a->channel, n, stopped);
}

MOE_KERNEL(MOEI_DWEIGHTS_THREADS, 4)
moei_ep_weight_grads(MOE_ARG(moei_ep_weight_grads_args) a) { moei_ep_weight_grads_send(&a, 4); }

MOE_KERNEL(MOEI_DWEIGHTS_THREADS, 4)
moei_ep_weight_grads_bias(MOE_ARG(moei_ep_weight_grads_args) a)
{
    moei_ep_weight_grads_send(&a, 32);
}

/* Waits for the gradients of all ranks. One warp. */
MOE_KERNEL(32, 1) moei_ep_weight_grads_wait(MOE_ARG(moei_ep_weight_grads_args) a)
{
    moei_peer_pdl_trigger(&a.peers, 1);
    moe_pdl_wait();
    (void)moei_peer_reach_pass(&a.peers, a.channel, moei_peer_next(&a.peers, a.channel),
                               MOE_PHASE_REDUCE, a.tag, 0);
}

/* Copies them from the region to the caller's dweights. A thread has a slot at a time. */
MOE_KERNEL(MOEI_DWEIGHTS_THREADS, 4) moei_ep_weight_grads_copy(MOE_ARG(moei_ep_weight_grads_args) a)
{
    moe_pdl_trigger();
    moe_pdl_wait();
    if (moe_fault_stopped(a.peers.fault)) return;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.num_slots;
         i += (int64_t)gridDim.x * blockDim.x)
        a.dweights[i] = ((const float*)(a.peers.base + a.at))[i];
}

/* What layer_backward.cuh launches. */
typedef struct moei_ep_weight_grads_prepared {
    moei_ep_weight_grads_args args;
    moe_launch send, wait, copy; /* copy: empty without dweights of the caller's */
} moei_ep_weight_grads_prepared;

/* Returns a grid for `items` threads that loops where they are many. */
MOE_HOST moe_launch_config moei_ep_weight_grads_grid(const moe_device* device, int64_t items)
{
    const int64_t most = device->sms * 4, blocks = (items - 1) / MOEI_DWEIGHTS_THREADS + 1;
    moe_launch_config c = moe_grid(items < 1       ? 1
                                   : blocks < most ? blocks
                                                   : most,
                                   MOEI_DWEIGHTS_THREADS, 0, 0);
    c.dependent = 1;
    return c;
}

/* Prepares the launches of filled-in args. */
MOE_HOST moe_status moei_ep_weight_grads_prepare(moei_ep_weight_grads_prepared* p)
{
    const moei_ep_weight_grads_args* a = &p->args;
    const int lanes = a->sum.bias2 ? 32 : 4;
    moe_launch_config one = moe_grid(1, 32, 0, 0);
    moe_launch_config send, copy;
    moe_device device;
    MOE_TRY(moe_device_query(&device));
    send = moei_ep_weight_grads_grid(&device, (int64_t)a->sum.num_rows * lanes);
    copy = moei_ep_weight_grads_grid(&device, a->num_slots);
    one.dependent = 1;
    if (a->sum.bias2) MOE_TRY(MOE_PREPARE(&p->send, moei_ep_weight_grads_bias, send));
    else MOE_TRY(MOE_PREPARE(&p->send, moei_ep_weight_grads, send));
    MOE_TRY(MOE_PREPARE(&p->wait, moei_ep_weight_grads_wait, one));
    if (!a->dweights || a->num_slots == 0) return MOE_OK;
    return MOE_PREPARE(&p->copy, moei_ep_weight_grads_copy, copy);
}

#endif
