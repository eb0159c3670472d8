/* 01_layer: a mixture-of-experts layer over a file. Every byte is a token.

     nvcc -I. -O2 -arch=sm_90a samples/01_layer/main.cu -o 01_layer && ./01_layer
     g++ -x c++ -std=c++14 -O2 -I. samples/01_layer/main.cu -o 01_layer && ./01_layer

   The first command builds for a GPU, the second for the CPU, without a CUDA toolkit.
   Copy device_new to free_layer. MOE() and CUDA() end the program where a call fails. */
#include "moe/layer.cuh"

#include "input.h"
#include "results.h"

/* Returns device memory full of NaN: the check then finds what no kernel has written. */
static void* device_new(int64_t bytes)
{
    void* p;
    if (cudaMalloc(&p, (size_t)bytes) != cudaSuccess)
        errx(WRONG_INPUT, "this shape needs more memory than the device has");
    CUDA(cudaMemset(p, 0xff, (size_t)bytes));
    return p;
}

/* Fills in the descriptor and allocates what it points to. */
static moe_layer_desc make_layer(const options* o)
{
    const int64_t T = o->tokens, H = o->hidden, I = o->intermediate, E = o->experts;
    moe_layer_desc d = {}; /* a field that stays 0 has its default */
    d.num_tokens = o->tokens;
    d.hidden = o->hidden;
    d.intermediate = o->intermediate;
    d.num_experts = o->experts;
    d.top_k = o->top_k;
    d.dtype = o->dtype;
    d.gate.score = o->score;
    d.gate.renormalize = o->renormalize;
    MOE(moe_layer_workspace(&d, &d.workspace_bytes)); /* refuses sizes out of range */
    d.router = device_new(E * H * 2);
    d.w1.base = device_new(E * 2 * I * H * 2); /* of each expert I rows of gate, I rows of up */
    d.w2.base = device_new(E * H * I * 2);
    d.x = device_new(T * H * 2);
    d.y = device_new(T * H * 2);
    d.workspace = device_new((int64_t)d.workspace_bytes);
    d.fault = (uint64_t*)device_new(8);
    CUDA(cudaMemset(d.fault, 0, 8)); /* no fault */
    return d;
}

/* Runs the layer once and waits for it. Returns what the fault word says. */
static moe_fault run_layer(const moe_layer_desc* d, moe_layer_prepared* layer, cudaStream_t stream)
{
    uint64_t word;
    MOE(moe_layer_preload());          /* loads the kernels, once in a program */
    MOE(moe_layer_prepare(d, layer));  /* checks the descriptor, once for a layer */
    MOE(moe_layer_run(layer, stream)); /* queues the kernels, as often as needed */
    CUDA(cudaMemcpyAsync(&word, d->fault, 8, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
    return moe_fault_decode(word);
}

static void free_layer(const moe_layer_desc* d)
{
    CUDA(cudaFree((void*)d->router));
    CUDA(cudaFree((void*)d->w1.base));
    CUDA(cudaFree((void*)d->w2.base));
    CUDA(cudaFree((void*)d->x));
    CUDA(cudaFree(d->y));
    CUDA(cudaFree(d->workspace));
    CUDA(cudaFree(d->fault));
}

int main(int argc, char** argv)
{
    options o = parse_options(argc, argv);
    const unsigned char* bytes = read_tokens(&o);
    struct cudaDeviceProp device;
    moe_layer_desc d, host;
    moe_layer_prepared layer;
    moe_layer_view view;
    moe_fault fault;
    int ok = 1;

    if (cudaGetDeviceProperties(&device, 0) != cudaSuccess)
        errx(NO_DEVICE, "no CUDA device; README.md has the command that builds for the CPU");
    d = make_layer(&o);
    host = fill_layer(&d, bytes, (uint64_t)o.seed);
    fault = run_layer(&d, &layer, 0);

    MOE(moe_layer_get_view(&d, &view)); /* where the workspace has logits and counts */
    show_setting(&o, &d, device.name);
    show_time(&o, &layer);
    show_experts(&view, o.experts);
    printf("fault word  %s\n", moe_fault_text(fault.code));
    if (!o.no_check) ok = check_layer(&host, &view, o.check);
    free_layer(&d);
    while (host_count) free(host_memory[--host_count]);
    return ok && fault.code == MOE_FAULT_NONE ? 0 : WRONG_RESULT;
}
