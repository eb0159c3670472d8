/* Host time of a layer call, of a prepared run, and of the bare runtime calls that the run makes.
   nvcc -O3 -std=c++14 -I. -arch=sm_90a bench/bench_host.cu -o bench_host

   Floor: cudaLaunchKernelExC with the same kernels, grids, shared memory and attributes. The three
   are queued in turn, 16 of each after a pause on the GPU, so that no call waits for the device;
   medians. */
#include "bench.h"

enum { T = 64, H = 512, I = 256, E = 16, K = 2, CALLS = 16, ROUNDS = 200, MOST = 8 };

/* The prepared launches of one run. */
typedef struct bare {
    const moe_launch* launch[MOST];
    void* arg[MOST];
    cudaLaunchConfig_t config[MOST];
    cudaLaunchAttribute attribute[MOST];
    int count;
} bare;

static void bare_add(bare* b, const moe_launch* l, const void* arg, cudaStream_t stream)
{
    cudaLaunchConfig_t* c = &b->config[b->count];
    cudaLaunchAttribute* a = &b->attribute[b->count];
    if (!l->kernel) return;
    *c = cudaLaunchConfig_t();
    c->gridDim = moei_launch_dim(l->grid);
    c->blockDim = moei_launch_dim(l->block);
    c->dynamicSmemBytes = l->smem;
    c->stream = stream;
    a->id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a->val.programmaticStreamSerializationAllowed = 1;
    c->attrs = a;
    c->numAttrs = l->dependent ? 1 : 0;
    b->launch[b->count] = l;
    b->arg[b->count++] = (void*)arg;
}

static void bare_run(bare* b)
{
    for (int i = 0; i < b->count; ++i) {
        void* args[1];
        args[0] = b->arg[i];
        BENCH_CUDA(cudaLaunchKernelExC(&b->config[i], b->launch[i]->kernel, args));
    }
}

int main(int argc, char** argv)
{
    bench_state s = bench_open(argc, argv, "host time of a layer");
    moe_layer_desc l;
    moe_layer_prepared p;
    bare b;
    float us[3][ROUNDS];
    char *want = (char*)malloc(T * H * 2), *got = (char*)malloc(T * H * 2);
    int failures = 0;
    memset(&l, 0, sizeof l);
    b.count = 0;
    l.x = bench_random(T * H, MOE_BF16, 1.0f, 1);
    l.router = bench_random(E * H, MOE_BF16, 1.0f / sqrtf((float)H), 2);
    l.w1.base = bench_random(E * 2 * I * H, MOE_BF16, 1.0f / sqrtf((float)H), 3);
    l.w2.base = bench_random(E * H * I, MOE_BF16, 1.0f / sqrtf((float)I), 4);
    l.y = bench_alloc(T * H * 2);
    l.num_tokens = T, l.hidden = H, l.intermediate = I, l.num_experts = E, l.top_k = K;
    BENCH_MOE(moe_layer_workspace(&l, &l.workspace_bytes));
    l.workspace = bench_alloc(l.workspace_bytes);
    BENCH_MOE(moe_layer_prepare(&l, &p));
    bare_add(&b, &p.router.gemm.launch, &p.router.gemm.args, s.stream); /* both bf16: a GEMM */
    bare_add(&b, &p.gate.choose, &p.gate.args, s.stream);
    bare_add(&b, &p.route.count, &p.route.args, s.stream);
    bare_add(&b, &p.route.place, &p.route.args, s.stream);
    bare_add(&b, &p.experts.up.launch, &p.experts.up.args, s.stream);
    bare_add(&b, &p.experts.down.launch, &p.experts.down.args, s.stream);
    bare_add(&b, &p.combine.launch, &p.combine.args, s.stream);
    for (int way = 0; way < 3; ++way) { /* all three write the same y */
        BENCH_CUDA(cudaMemset(l.y, 0xff, T * H * 2));
        if (way == 0) BENCH_MOE(moe_layer_forward(&l, s.stream));
        if (way == 1) BENCH_MOE(moe_layer_run(&p, s.stream));
        if (way == 2) bare_run(&b);
        BENCH_CUDA(cudaStreamSynchronize(s.stream));
        BENCH_CUDA(cudaMemcpy(way ? got : want, l.y, T * H * 2, cudaMemcpyDeviceToHost));
        failures += way && memcmp(got, want, T * H * 2) != 0;
    }
    for (int round = -10; round < ROUNDS; ++round)
        for (int way = 0; way < 3; ++way) {
            double begin;
            bench_pause(2.0, s.stream);
            begin = bench_host_ms();
            for (int i = 0; i < CALLS; ++i) {
                if (way == 0) BENCH_MOE(moe_layer_forward(&l, s.stream));
                if (way == 1) BENCH_MOE(moe_layer_run(&p, s.stream));
                if (way == 2) bare_run(&b);
            }
            if (round >= 0) us[way][round] = (float)((bench_host_ms() - begin) * 1e3 / CALLS);
            BENCH_CUDA(cudaStreamSynchronize(s.stream));
        }
    for (int way = 0; way < 3; ++way)
        qsort(us[way], ROUNDS, sizeof us[way][0], bench_compare_float);
    {
        static const char* const name[] = {"moe_layer_forward: checked and prepared each time",
                                           "moe_layer_run: prepared once",
                                           "the bare runtime calls"};
        const float bottom = us[2][ROUNDS / 2];
        for (int way = 0; way < 3; ++way) {
            const float median = us[way][ROUNDS / 2];
            bench_row(&s, name[way], median * 1e-3, (median - bottom) / (float)b.count, "us more",
                      bottom / median, "the bare calls' rate");
        }
        printf("  us more: a launch, over the bare call; %d launches\n", b.count);
    }
    free(want), free(got);
    return bench_close(&s, failures);
}
