/* 09_backward: trains a mixture-of-experts layer: forward, loss, backward and AdamW, in one CUDA graph.

     nvcc -I. -O2 -arch=sm_90a samples/09_backward/main.cu -o 09_backward && ./09_backward
     g++ -x c++ -std=c++14 -O2 -I. samples/09_backward/main.cu -o 09_backward && ./09_backward

   The model is y = x + layer(x), the loss the mean square of y - target. The targets come from another
   layer, so they can be learned. Weights are bf16 with fp32 masters, gradients fp32.
   Copy make_layer, make_step and queue_step; trainer.h has what a trainer has anyway. */
#include "moe/balance_loss.cuh"
#include "moe/layer_backward.cuh"

#include "trainer.h"

enum { T = 256, H = 128, I = 64, E = 8, K = 2, MOST_STEPS = 10000 };

/* The descriptor of the forward pass, with `saved` and the sums that the balance loss takes. */
static moe_layer_desc make_layer(const uint16_t* x, const uint16_t* router, const uint16_t* w1,
                                 const uint16_t* w2)
{
    moe_layer_desc l = {};
    moe_layer_saved_list kept;
    l.num_tokens = T, l.hidden = H, l.intermediate = I, l.num_experts = E, l.top_k = K;
    l.x = x, l.router = router, l.w1.base = w1, l.w2.base = w2;
    l.residual = x; /* y = x + layer(x) */
    l.y = device_new(T * H * 2);
    l.gate.renormalize = 1;
    l.gate.expert_count = (int32_t*)device_new(E * 4);
    l.gate.prob_sum = (float*)device_new(E * 4);
    l.fault = (uint64_t*)device_new(8);
    MOE(moe_layer_saved(&l, &kept)); /* what backward needs of forward */
    l.saved = device_new(kept.bytes), l.saved_bytes = kept.bytes;
    return l;
}

/* All that a step queues. */
typedef struct step {
    moe_layer_prepared forward;
    moe_layer_backward_prepared backward;
    moe_balance_loss_desc balance;
    loss_args loss;
    weights_args weights[3];
} step;

/* Prepares a step: its descriptors, gradients and one workspace for both passes. */
static step make_step(moe_layer_desc l, const uint16_t* target, const weights_args* w)
{
    moe_layer_backward_desc b = {};
    step s = {};
    size_t bytes;
    for (int i = 0; i < 3; ++i) s.weights[i] = w[i];
    s.balance.expert_count = l.gate.expert_count, s.balance.prob_sum = l.gate.prob_sum;
    s.balance.num_experts = E, s.balance.aux_coefficient = 1e-3f;
    s.balance.loss = (float*)device_new(4 * 4);
    s.balance.balance_grad = (float*)device_new((E + 1) * 4);
    s.loss.y = (uint16_t*)l.y, s.loss.target = target;
    s.loss.dy = (uint16_t*)device_new(T * H * 2);
    s.loss.n = T * H;
    s.loss.loss = (float*)device_new(4), s.loss.bias = (float*)w[0].bias;
    b.layer = l;
    b.dy = s.loss.dy, b.balance_grad = s.balance.balance_grad;
    b.drouter = w[0].grad, b.dw1.base = w[1].grad, b.dw2.base = w[2].grad;
    b.grad_dtype = b.router_grad_dtype = MOE_FP32; /* no dx: nothing is below this layer */
    MOE(moe_layer_workspace(&l, &l.workspace_bytes));
    MOE(moe_layer_backward_workspace(&b, &bytes));
    if (bytes > l.workspace_bytes) l.workspace_bytes = bytes;
    l.workspace = device_new(l.workspace_bytes);
    b.layer = l;
    MOE(moe_layer_prepare(&l, &s.forward));
    MOE(moe_layer_backward_prepare(&b, &s.backward));
    return s;
}

/* Queues one step of training. */
static void queue_step(const step* s, cudaStream_t stream)
{
    const moe_launch_config one = moe_grid(1, 256, 0, stream);
    MOE(moe_layer_run(&s->forward, stream));
    MOE(MOE_LAUNCH(square_loss, one, s->loss));
    MOE(moe_balance_loss(&s->balance, stream));
    MOE(moe_layer_backward_run(&s->backward, stream));
    for (int i = 0; i < 3; ++i) {
        const moe_launch_config c = moe_grid((s->weights[i].n + 255) / 256, 256, 0, stream);
        MOE(MOE_LAUNCH(adamw, c, s->weights[i]));
    }
}

int main(int argc, char** argv)
{
    const int steps = argc > 1 ? atoi(argv[1]) : 40;
    struct cudaDeviceProp device;
    uint32_t state = 7;
    float first = 0, last = 0, balance[4], *bias;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    uint64_t word;

    if (steps < 2 || steps > MOST_STEPS) {
        fprintf(stderr, "09_backward: the argument is the number of steps, 2 to %d\n", MOST_STEPS);
        return 2;
    }
    if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
        fprintf(stderr, "09_backward: no CUDA device; README.md builds for the CPU\n");
        return 77;
    }
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    bias = (float*)device_new(2 * 4);
    const uint16_t* x = random_new(T * H, 1.7f, &state, 0);
    moe_layer_desc teacher = make_layer(x, random_new(E * H, 0.2f, &state, 0),
                                        random_new(E * 2 * I * H, 0.2f, &state, 0),
                                        random_new(E * H * I, 0.3f, &state, 0));
    weights_args w[3] = {weights_new(E * H, 0.05f, &state, bias),
                         weights_new(E * 2 * I * H, 0.15f, &state, bias),
                         weights_new(E * H * I, 0.15f, &state, bias)};
    const moe_layer_desc layer = make_layer(x, w[0].value, w[1].value, w[2].value);
    step s = make_step(layer, (uint16_t*)teacher.y, w);
    MOE(moe_layer_workspace(&teacher, &teacher.workspace_bytes));
    teacher.workspace = device_new(teacher.workspace_bytes);
    MOE(moe_layer_backward_preload());
    MOE(moe_balance_loss_preload());
    MOE(moe_layer_forward(&teacher, stream));
    CUDA(cudaStreamSynchronize(stream));

    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    queue_step(&s, stream);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    printf("moe %s, %s\n", MOE_VERSION_STRING, device.name);
    for (int i = 0; i < steps; ++i) {
        CUDA(cudaGraphLaunch(exec, stream));
        CUDA(cudaMemcpyAsync(&last, s.loss.loss, 4, cudaMemcpyDeviceToHost, stream));
        CUDA(cudaMemcpyAsync(balance, s.balance.loss, 16, cudaMemcpyDeviceToHost, stream));
        CUDA(cudaStreamSynchronize(stream));
        if (i == 0) first = last;
        if (i % 10 == 0 || i == steps - 1)
            printf("step %3d  loss %.5f  balance %.5f\n", i, (double)last, (double)balance[3]);
    }
    CUDA(cudaMemcpy(&word, layer.fault, 8, cudaMemcpyDeviceToHost));
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    device_free_all();
    printf("%s: the loss went from %.5f to %.5f\n", last < first && word == 0 ? "PASSED" : "FAILED",
           (double)first, (double)last);
    return last < first && word == 0 ? 0 : 1;
}
