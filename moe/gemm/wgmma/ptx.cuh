/* ptx.cuh: Hopper's asynchronous instructions behind plain functions: barriers in shared memory
   (mbarrier), tensor copies (TMA), products of a warpgroup (wgmma). Only this file contains these
   instructions; on the CPU the stand-in host/hopper.h has the same functions.

   A warpgroup is 4 warps that begin at a warp number divisible by 4. Only code of sm_90a has
   wgmma: bodies that call these functions stand under MOEI_WGMMA_HERE. */
#ifndef MOE_GEMM_WGMMA_PTX_CUH
#define MOE_GEMM_WGMMA_PTX_CUH

#include "../../base/copy.cuh"
#include "../../base/warp.cuh"
#include "../shape.h"
#include "args.h"
#include "map.cuh"

/* 1 where the code being compiled has wgmma and st.async, and in all host passes. CUDA 12.0 has no
   st.async: its binaries take the mma.sync path. */
#if MOE_ON_HOST || !defined(__CUDA_ARCH__)
#define MOEI_WGMMA_HERE 1
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL) &&                                                        \
    !(__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ == 0)
#define MOEI_WGMMA_HERE 1
#else
#define MOEI_WGMMA_HERE 0
#endif

#if MOE_ON_HOST

#include "../../host/hopper.h"

#elif MOEI_WGMMA_HERE

/* ---- barriers ---- */

MOE_DEVICE uint32_t moei_shared_address(const void* p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* Initializes a barrier: a phase is complete after `count` arrivals, and when all bytes that it
   expects have arrived. The first phase has parity 0. One thread calls it, then
   moei_barrier_visible; a barrier of the block must follow. */
MOE_DEVICE void moei_barrier_init(uint64_t* bar, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(moei_shared_address(bar)),
                 "r"(count)
                 : "memory");
}

/* Makes initialized barriers visible to tensor copies. */
MOE_DEVICE void moei_barrier_visible(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* Waits until the phase of this parity is complete. Parity 1 of a new barrier counts as complete. */
MOE_DEVICE void moei_barrier_wait(uint64_t* bar, int parity)
{
    asm volatile("{\n.reg .pred p;\n"
                 "AGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra DONE;\n"
                 "bra AGAIN;\n"
                 "DONE:\n}" ::"r"(moei_shared_address(bar)),
                 "r"(parity)
                 : "memory");
}

/* Arrives once. */
MOE_DEVICE void moei_barrier_arrive(uint64_t* bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(moei_shared_address(bar))
                 : "memory");
}

/* Arrives once; the phase then also waits for `bytes` more bytes of tensor copies. */
MOE_DEVICE void moei_barrier_expect(uint64_t* bar, int bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(moei_shared_address(bar)),
        "r"(bytes)
        : "memory");
}

/* Arrives once when all copies of moei_copy16_async that the thread has started are complete. */
MOE_DEVICE void moei_barrier_arrive_copies(uint64_t* bar)
{
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(moei_shared_address(bar))
        : "memory");
}

/* A barrier of `threads` threads of the block, all of whole warps; id: 1 .. 15, a literal. */
MOE_DEVICE void moei_named_barrier(const int id, const int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- clusters ---- */

/* Returns the block's number in its cluster of two: 0 or 1. */
MOE_DEVICE int moei_cluster_rank(void)
{
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* A barrier of all threads of the cluster that have not ended. */
MOE_DEVICE void moei_cluster_sync(void)
{
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

/* Returns the address of p in block `rank` of the cluster. */
MOE_DEVICE uint32_t moei_cluster_address(const void* p, int rank)
{
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"(moei_shared_address(p)), "r"(rank));
    return at;
}

/* Returns *p of block `rank` of the cluster, which a barrier of the cluster made visible. */
MOE_DEVICE int moei_cluster_load(const int32_t* p, int rank)
{
    int v;
    asm volatile("ld.shared::cluster.s32 %0, [%1];"
                 : "=r"(v)
                 : "r"(moei_cluster_address(p, rank))
                 : "memory");
    return v;
}

/* Arrives once at the barrier of block `rank` of the cluster. */
MOE_DEVICE void moei_barrier_arrive_at(uint64_t* bar, int rank)
{
    asm volatile(
        "mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(moei_cluster_address(bar, rank))
        : "memory");
}

/* Stores `value` at *to in block `rank` of the cluster; `bar` there counts 4 bytes. */
MOE_DEVICE void moei_cluster_send(int* to, int value, uint64_t* bar, int rank)
{
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
            moei_cluster_address(to, rank)),
        "r"(value), "r"(moei_cluster_address(bar, rank))
        : "memory");
}

/* True in one lane of the warp, always the same one. Where it alone starts copies, the compiler knows
   that their operands have one value each. After a comparison of the lane it adds a loop over all
   lanes to each copy. The whole warp calls it. */
MOE_DEVICE bool moei_elect(void)
{
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(elected));
    return elected != 0;
}

/* ---- tensor copies ---- */

/* Return the coordinates of a matrix by its distance, bytes from the map's base modulo 2^64
   (map.cuh). */
MOE_DEVICE int moei_tensor_vector(uint64_t distance)
{
    return (int)(distance >> 4 & ((1u << MOEI_TENSOR_LOG2) - 1));
}

MOE_DEVICE int moei_tensor_group(uint64_t distance)
{
    return (int)(distance >> 4 >> MOEI_TENSOR_LOG2);
}

/* Copies the box at column x, row y of the matrix at a distance, a multiple of 16, to dst, 1024-byte
   aligned; bar counts its bytes, those outside the matrix, which are zeros, too. x and y may be
   negative. Lines of 128 bytes, swizzled: the 16-byte vector v of line r stands at v ^ (r & 7). One
   thread calls it. */
MOE_DEVICE void moei_tensor_load(void* dst, const moei_tensor_map* map, int x, int y,
                                 uint64_t distance, uint64_t* bar)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(moei_shared_address(dst)),
                 "l"(map), "r"(x), "r"(y), "r"(moei_tensor_vector(distance)),
                 "r"(moei_tensor_group(distance)), "r"(moei_shared_address(bar))
                 : "memory");
}

/* The same into both blocks of the cluster, at the same places of their shared memory. */
MOE_DEVICE void moei_tensor_load_both(void* dst, const moei_tensor_map* map, int x, int y,
                                      uint64_t distance, uint64_t* bar)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(
                     moei_shared_address(dst)),
                 "l"(map), "r"(x), "r"(y), "r"(moei_tensor_vector(distance)),
                 "r"(moei_tensor_group(distance)), "r"(moei_shared_address(bar)), "h"((uint16_t)3)
                 : "memory");
}

/* Copies the box at column x, row y of a map of halves (map.cuh) to dst, 128-byte aligned; bar counts
   its bytes, those of zeros too. It is read once: L2 evicts it first. One thread calls it. */
MOE_DEVICE void moei_tensor_load_halves(void* dst, const moei_tensor_map* map, int x, int y,
                                        uint64_t* bar)
{
    uint64_t once;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, 0, %3}], [%4], %5;" ::"r"(
                     moei_shared_address(dst)),
                 "l"(map), "r"(x), "r"(y), "r"(moei_shared_address(bar)), "l"(once)
                 : "memory");
}

/* Starts to store a box, in shared memory as moei_tensor_load leaves it, at column x, row y of the
   map's matrix; elements outside it are dropped. src must not change before the wait for it. One
   thread calls it, and the waits. */
MOE_DEVICE void moei_tensor_store(const void* src, const moei_tensor_map* map, int x, int y)
{
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, 0, 0}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(map),
        "r"(x), "r"(y), "r"(moei_shared_address(src))
        : "memory");
}

/* Wait until the sources of all of the thread's boxes are read, or the boxes are stored. */
MOE_DEVICE void moei_tensor_store_wait_read(void)
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
MOE_DEVICE void moei_tensor_store_wait(void)
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* Returns the lane's part of the transpose of a matrix of 8 x 8 elements of 16 bits: x of lane
   4 r + j has columns 2 j, 2 j + 1 of row r. The whole warp calls it. */
MOE_DEVICE uint32_t moei_transpose_matrix(uint32_t x)
{
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* Stores four matrices of 8 x 8 elements of 16 bits: x[i] of lane 4 r + j has columns 2 j, 2 j + 1
   of row r of matrix i. at, of lane 8 i + r: 16-byte aligned address of the row's 16 bytes. The whole
   warp calls it. */
MOE_DEVICE void moei_store_matrices(void* at, const uint32_t x[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     moei_shared_address(at)),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

/* Orders stores to global memory that the thread has seen before its tensor copies that follow. */
MOE_DEVICE void moei_tensor_sees_global(void)
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* Orders stores to shared memory before the products and the tensor copies that read them: the
   thread's own stores, and others' moei_copy16_async, seen through a barrier. Slow: a memory
   barrier. */
MOE_DEVICE void moei_wgmma_sees_copies(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- products ---- */

/* Lower and raise the registers of each thread of a warpgroup to n, a literal. Each role of a
   kernel calls one of them first. */
#define moei_registers_lower(n) asm volatile("setmaxnreg.dec.sync.aligned.u32 " #n ";")
#define moei_registers_raise(n) asm volatile("setmaxnreg.inc.sync.aligned.u32 " #n ";")

/* Returns the descriptor of an operand at p, 1024-byte aligned, in the layout of tensor copies:
   lines are 64 depths of a row; mn-major: 64 rows at one depth, 64 lines a box, boxes of the next
   rows follow. major: a literal. */
MOE_DEVICE uint64_t moei_wgmma_operand(const void* p, const int major)
{
    return (uint64_t)((moei_shared_address(p) & 0x3ffff) >> 4) | moei_wgmma_layout(major);
}

/* Called by the warpgroup before the products of a stage. */
MOE_DEVICE void moei_wgmma_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/* Closes a group of products. */
MOE_DEVICE void moei_wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until all but the newest n groups, a literal, are complete: they have read their stages. */
#define moei_wgmma_wait(n) asm volatile("wgmma.wait_group.sync.aligned " #n ";" ::: "memory")

/* Called after moei_wgmma_wait(0), before other code reads the accumulators: the compiler moves no
   such code before it. */
MOE_DEVICE void moei_wgmma_settle(float c[128])
{
    MOE_UNROLL
    for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

/* Start c = a b + (add ? c : 0) with a [64, 16], b [16, 256], or of the second one b [16, 128], c
   [64]; dtype and majors are those of f, a literal. All threads of a warpgroup call them. Thread i has
   in c[4 j .. 4 j + 3] rows r, r, r + 8, r + 8 of columns x, x + 1, x, x + 1, where r = i / 32 * 16 +
   i % 32 / 4, x = 8 j + i % 4 * 2. */
#define MOEI_WGMMA_256(type, majors)                                                               \
    asm volatile(                                                                                  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                              \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                          \
        "%0, %1, %2, %3, %4, %5, %6, %7, "                                                         \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                   \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                 \
        "%24, %25, %26, %27, %28, %29, %30, %31, "                                                 \
        "%32, %33, %34, %35, %36, %37, %38, %39, "                                                 \
        "%40, %41, %42, %43, %44, %45, %46, %47, "                                                 \
        "%48, %49, %50, %51, %52, %53, %54, %55, "                                                 \
        "%56, %57, %58, %59, %60, %61, %62, %63, "                                                 \
        "%64, %65, %66, %67, %68, %69, %70, %71, "                                                 \
        "%72, %73, %74, %75, %76, %77, %78, %79, "                                                 \
        "%80, %81, %82, %83, %84, %85, %86, %87, "                                                 \
        "%88, %89, %90, %91, %92, %93, %94, %95, "                                                 \
        "%96, %97, %98, %99, %100, %101, %102, %103, "                                             \
        "%104, %105, %106, %107, %108, %109, %110, %111, "                                         \
        "%112, %113, %114, %115, %116, %117, %118, %119, "                                         \
        "%120, %121, %122, %123, %124, %125, %126, %127"                                           \
        "}, %128, %129, p, 1, 1, " majors ";\n}"                                                   \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),      \
          "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]),               \
          "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]),            \
          "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),            \
          "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]),            \
          "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]),            \
          "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]),            \
          "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]),            \
          "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]),            \
          "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]),            \
          "+f"(c[61]), "+f"(c[62]), "+f"(c[63]), "+f"(c[64]), "+f"(c[65]), "+f"(c[66]),            \
          "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]), "+f"(c[72]),            \
          "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]),            \
          "+f"(c[79]), "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]),            \
          "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), "+f"(c[88]), "+f"(c[89]), "+f"(c[90]),            \
          "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]), "+f"(c[96]),            \
          "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]),         \
          "+f"(c[103]), "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]),      \
          "+f"(c[109]), "+f"(c[110]), "+f"(c[111]), "+f"(c[112]), "+f"(c[113]), "+f"(c[114]),      \
          "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]), "+f"(c[120]),      \
          "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]),      \
          "+f"(c[127])                                                                             \
        : "l"(a), "l"(b), "r"(add))
#define MOEI_WGMMA_128(type, majors)                                                               \
    asm volatile(                                                                                  \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                               \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {"                          \
        "%0, %1, %2, %3, %4, %5, %6, %7, "                                                         \
        "%8, %9, %10, %11, %12, %13, %14, %15, "                                                   \
        "%16, %17, %18, %19, %20, %21, %22, %23, "                                                 \
        "%24, %25, %26, %27, %28, %29, %30, %31, "                                                 \
        "%32, %33, %34, %35, %36, %37, %38, %39, "                                                 \
        "%40, %41, %42, %43, %44, %45, %46, %47, "                                                 \
        "%48, %49, %50, %51, %52, %53, %54, %55, "                                                 \
        "%56, %57, %58, %59, %60, %61, %62, %63"                                                   \
        "}, %64, %65, p, 1, 1, " majors ";\n}"                                                     \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),      \
          "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]),               \
          "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]),            \
          "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]),            \
          "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]),            \
          "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]),            \
          "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]),            \
          "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]),            \
          "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]),            \
          "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]),            \
          "+f"(c[61]), "+f"(c[62]), "+f"(c[63])                                                    \
        : "l"(a), "l"(b), "r"(add))
#define MOEI_WGMMA_OF(columns)                                                                     \
    const int a_mn = f.a_major == MOE_MAJOR_MN, b_mn = f.b_major == MOE_MAJOR_MN;                  \
    if (a_mn && f.dtype == MOE_FP16) MOEI_WGMMA_##columns("f16", "1, 1");                          \
    else if (a_mn) MOEI_WGMMA_##columns("bf16", "1, 1");                                           \
    else if (b_mn && f.dtype == MOE_FP16) MOEI_WGMMA_##columns("f16", "0, 1");                     \
    else if (b_mn) MOEI_WGMMA_##columns("bf16", "0, 1");                                           \
    else if (f.dtype == MOE_FP16) MOEI_WGMMA_##columns("f16", "0, 0");                             \
    else MOEI_WGMMA_##columns("bf16", "0, 0")
MOE_DEVICE void moei_wgmma(float c[128], uint64_t a, uint64_t b, int add, const moe_gemm_shape f)
{
    MOEI_WGMMA_OF(256);
}
MOE_DEVICE void moei_wgmma_128(float c[64], uint64_t a, uint64_t b, int add,
                               const moe_gemm_shape f)
{
    MOEI_WGMMA_OF(128);
}
#undef MOEI_WGMMA_OF
#undef MOEI_WGMMA_256
#undef MOEI_WGMMA_128

#endif
#endif
