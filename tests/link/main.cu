/* main.cu: two files of one program include everything; each runs a layer with its own kernels,
   and both must give the same bits. everything.h has the commands that build it. */
#include "everything.h"

moe_status link_run_main(float* y) { return link_layer(y); }

int main(void)
{
    static float a[LINK_T * LINK_H], b[LINK_T * LINK_H];
    const link_run run[2] = {link_run_main, link_run_other};
    float* const y[2] = {a, b};
    float largest = 0;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no CUDA device\n");
        return 77;
    }
    for (int i = 0; i < 2; ++i) {
        char text[MOE_STATUS_TEXT];
        const moe_status s = run[i](y[i]);
        if (s != MOE_OK) {
            printf("FAILED file %d: %s\n", i, moe_status_describe(s, text));
            return 1;
        }
    }
    for (int i = 0; i < LINK_T * LINK_H; ++i) largest = a[i] > largest ? a[i] : largest;
    if (memcmp(a, b, sizeof a) != 0 || !(largest > 0.01f)) {
        printf("FAILED: the files differ, or nothing was computed (largest %g)\n", largest);
        return 1;
    }
    printf("passed: two files, the same bits; largest %g\n", largest);
    return 0;
}
