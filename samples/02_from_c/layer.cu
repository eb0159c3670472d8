/* layer.cu: the only CUDA file. Defines the functions of layer.h by calls of moe/layer.cuh. nvcc
   compiles the file for a GPU, g++ for the CPU: main.c has the commands. */
#include "moe/layer.cuh"

#include <stdlib.h>

#include "layer.h"

struct layer {
    moe_layer_desc d;       /* with device addresses; a field that stays 0 has its default */
    void *x, *y;            /* [max_tokens, H] */
    void *router, *w1, *w2; /* the same as in d, not const */
    int32_t max_tokens;
    moe_fault fault; /* of the last layer_run */
};

/* layer.h declares the extern "C" functions and documents them. */
extern "C" const char* layer_backend(void)
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 0;
    return MOE_ON_HOST ? "host" : "cuda";
}

/* Allocates `count` bf16 numbers on the device. Copies them from `from`, unless that is null. */
static moe_status device_new(void** p, const uint16_t* from, int64_t count)
{
    MOE_TRY_CUDA(cudaMalloc(p, (size_t)count * 2));
    if (from) MOE_TRY_CUDA(cudaMemcpy(*p, from, (size_t)count * 2, cudaMemcpyHostToDevice));
    return MOE_OK;
}

/* Fills in the descriptor and allocates. moe_layer_workspace refuses wrong sizes, so that call
   comes before the allocations. */
static moe_status create(layer* l, const layer_config* c)
{
    const int64_t h = c->hidden, i = c->intermediate, e = c->num_experts, t = c->max_tokens;
    moe_layer_desc* d = &l->d;
    d->num_tokens = l->max_tokens = c->max_tokens;
    d->hidden = c->hidden;
    d->intermediate = c->intermediate;
    d->num_experts = c->num_experts;
    d->top_k = c->top_k;
    MOE_REQUIRE(c->router, MOE_ERR_NULL, router);
    MOE_REQUIRE(c->w1, MOE_ERR_NULL, w1);
    MOE_REQUIRE(c->w2, MOE_ERR_NULL, w2);
    MOE_TRY(moe_layer_workspace(d, &d->workspace_bytes));
    MOE_TRY_CUDA(cudaMalloc(&d->workspace, d->workspace_bytes));
    MOE_TRY_CUDA(cudaMalloc((void**)&d->fault, sizeof *d->fault));
    MOE_TRY(device_new(&l->x, 0, t * h));
    MOE_TRY(device_new(&l->y, 0, t * h));
    MOE_TRY(device_new(&l->router, c->router, e * h));
    MOE_TRY(device_new(&l->w1, c->w1, e * 2 * i * h));
    MOE_TRY(device_new(&l->w2, c->w2, e * h * i));
    d->x = l->x, d->y = l->y;
    d->router = l->router;
    d->w1.base = l->w1, d->w2.base = l->w2;
    return moe_layer_preload(); /* loads the kernels before the first run */
}

extern "C" moe_status layer_create(const layer_config* config, layer** l)
{
    moe_status s;
    *l = (layer*)calloc(1, sizeof **l);
    MOE_REQUIRE(*l, MOE_ERR_NULL, desc);
    s = create(*l, config);
    if (s != MOE_OK) {
        layer_destroy(*l);
        *l = 0;
    }
    return s;
}

extern "C" moe_status layer_run(layer* l, const uint16_t* x, uint16_t* y, int32_t num_tokens)
{
    moe_layer_desc* d = &l->d;
    const size_t bytes = (size_t)num_tokens * (size_t)d->hidden * 2;
    uint64_t word = 0;
    MOE_REQUIRE(num_tokens >= 0 && num_tokens <= l->max_tokens, MOE_ERR_RANGE, num_tokens);
    d->num_tokens = num_tokens;
    /* The layer queues its kernels on stream 0. The copies to and from host memory wait. */
    MOE_TRY_CUDA(cudaMemset(d->fault, 0, sizeof word));
    MOE_TRY_CUDA(cudaMemcpy(l->x, x, bytes, cudaMemcpyHostToDevice));
    MOE_TRY(moe_layer_forward(d, 0));
    MOE_TRY_CUDA(cudaMemcpy(y, l->y, bytes, cudaMemcpyDeviceToHost));
    MOE_TRY_CUDA(cudaMemcpy(&word, d->fault, sizeof word, cudaMemcpyDeviceToHost));
    l->fault = moe_fault_decode(word);
    return MOE_OK;
}

extern "C" const char* layer_fault(const layer* l) { return moe_fault_text(l->fault.code); }

extern "C" void layer_destroy(layer* l)
{
    if (!l) return;
    cudaFree(l->x), cudaFree(l->y);
    cudaFree(l->router), cudaFree(l->w1), cudaFree(l->w2);
    cudaFree(l->d.workspace), cudaFree(l->d.fault);
    free(l);
}
