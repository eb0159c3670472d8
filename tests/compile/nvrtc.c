/* nvrtc.c: nvrtc SOURCE PTX OPTION...: compiles SOURCE with the NVRTC it is linked with. NVRTC is a
   toolkit's compiler as a library: the same front end and optimiser that nvcc runs for the device.

     gcc -I<nvrtc>/include nvrtc.c <nvrtc>/lib/libnvrtc.so.12 -o nvrtc */
#include <nvrtc.h>
#include <stdio.h>
#include <stdlib.h>

static int check(nvrtcResult r, const char* what)
{
    if (r != NVRTC_SUCCESS) fprintf(stderr, "nvrtc: %s: %s\n", what, nvrtcGetErrorString(r));
    return r == NVRTC_SUCCESS;
}

int main(int argc, char** argv)
{
    static char source[1 << 16];
    nvrtcProgram program;
    FILE* f = argc > 2 ? fopen(argv[1], "rb") : 0;
    size_t n = f ? fread(source, 1, sizeof source - 1, f) : 0;
    char* text;
    int ok;
    if (n == 0) {
        fprintf(stderr, "nvrtc: nothing to compile\n");
        return 2;
    }
    fclose(f);
    if (!check(nvrtcCreateProgram(&program, source, argv[1], 0, 0, 0), argv[1])) return 2;
    ok = check(nvrtcCompileProgram(program, argc - 3, (const char* const*)argv + 3), argv[1]);
    if (nvrtcGetProgramLogSize(program, &n) == NVRTC_SUCCESS && n > 1) {
        text = malloc(n);
        if (text && nvrtcGetProgramLog(program, text) == NVRTC_SUCCESS) fputs(text, stdout);
        free(text);
    }
    if (!ok || !check(nvrtcGetPTXSize(program, &n), "ptx")) return 1;
    text = malloc(n);
    f = fopen(argv[2], "wb");
    ok = text && f && check(nvrtcGetPTX(program, text), "ptx") && fwrite(text, 1, n - 1, f) == n - 1;
    if (f && fclose(f) != 0) ok = 0;
    free(text);
    return ok ? 0 : 2;
}
