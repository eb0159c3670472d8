/* names.h: everyday names that a file may have when it includes the headers: dynamic shared memory,
   globals and macros. check.sh compiles everything after it. */
#if defined(__CUDACC__)
#include <cuda_bf16.h> /* CUDA's own headers use one-letter names: a file has them before its macros */
#include <cuda_fp16.h>
extern __shared__ float shared[];
extern __shared__ float smem[];
extern __shared__ double memory[];
#else
static float shared[1], smem[1];
static double memory[1];
#endif
static int count, source, buffer, data, scratch, bytes, lane, warp, tile, stage, rows, table,
    offset;
static int names_sum(void)
{
    return count + source + buffer + data + scratch + bytes + lane + warp + tile + stage + rows +
           table + offset;
}

#define N 1024
#define M 512
#define K 512
#define T 4096
#define H 2048
#define E 64
#define I 768
#define R 32768
#define C 8
#define B 16
#define D 128
#define L 24
#define P 2
#define W 4
#define WARP_SIZE 32
#define BLOCK_SIZE 256
#define TILE_SIZE 16
#define CHECK(call) (call)
#define CEIL_DIV(a, b) (((a) + (b)-1) / (b))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
