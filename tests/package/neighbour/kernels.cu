/* kernels.cu: a station in a CUDA program; of its kernels one, to save time. */
#define MOE_GATE_LIST(X) X(32, 8, 4, 8)
#include <moe/gate.cuh>

#include <stdio.h>

#if MOE_ON_HOST
#error "nvcc compiles the CUDA backend"
#endif

enum { T = 4, E = 8, K = 2 };

int main()
{
    static float logits[T * E];
    int32_t ids[T * K];
    moe_gate_desc g = {};
    char text[MOE_STATUS_TEXT];
    moe_status s;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("compiled and linked; no GPU, so not run\n");
        return 0;
    }
    for (int i = 0; i < T * E; ++i) logits[i] = (float)(i * 5 % E);
    cudaMalloc((void**)&g.logits, sizeof logits), cudaMalloc((void**)&g.ids, sizeof ids);
    cudaMalloc((void**)&g.weights, T * K * 4);
    cudaMemcpy((void*)g.logits, logits, sizeof logits, cudaMemcpyHostToDevice);
    g.num_tokens = T, g.num_experts = E, g.top_k = K;
    s = moe_gate(&g, 0);
    if (s != MOE_OK || cudaMemcpy(ids, g.ids, sizeof ids, cudaMemcpyDeviceToHost) != cudaSuccess) {
        printf("FAILED: %s\n", moe_status_describe(s, text));
        return 1;
    }
    for (int t = 0; t < T; ++t) /* 5 * 3 % 8 is 7, 5 * 6 % 8 is 6 */
        if (ids[t * K] != 3 || ids[t * K + 1] != 6) {
            printf("FAILED: token %d chose %d and %d\n", t, ids[t * K], ids[t * K + 1]);
            return 1;
        }
    printf("PASSED: %d tokens chose experts 3 and 6\n", T);
    return 0;
}
