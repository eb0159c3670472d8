/* kernels.inl: kernels of the grouped GEMM and their table. grouped.cuh and grouped_gradient.cuh
   each include it once. Before the #include a file defines

     MOEI_GEMM_TABLE       the name of the table
     MOEI_GEMM_PREFIX      the kernels' names begin with it
     MOEI_GEMM_GRADIENT    1: their epilogue is that of a gradient (gradient.cuh); 0: forward

   Each tile of MOEI_GEMM_TILE_LIST is stamped with every entry of MOE_GEMM_VARIANT_LIST
   (prepare.cuh). */

#define MOEI_GEMM_NAME(tile, variant) MOEI_JOIN(MOEI_GEMM_PREFIX, tile##_##variant)
#define MOEI_GEMM_TEXT(tile, variant) MOEI_QUOTE(MOEI_GEMM_NAME(tile, variant))

#define MOEI_GEMM_KERNEL(variant, dtype, a_major, b_major, name, tile_m, tile_n, tile_k, warps_m,  \
                         warps_n, stages, blocks)                                                  \
    MOE_KERNEL((warps_m) * (warps_n)*32, blocks)                                                   \
    MOEI_GEMM_NAME(name, variant)(MOE_ARG(moe_grouped_gemm_args) d)                                \
    {                                                                                              \
        MOE_SHARED(moei_gemm_shared, s);                                                           \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        if (MOEI_CODE_HERE(MOEI_GEMM_LEAST(dtype, tile_m, tile_n, a_major, b_major),               \
                           MOEI_GEMM_MOST(tile_m, tile_n)) &&                                      \
            !moe_fault_stopped(d.fault))                                                           \
            moei_gemm_block(&d, shared, &s, MOEI_GEMM_GRADIENT,                                    \
                            moe_gemm_shape_of(tile_m, tile_n, tile_k, warps_m, warps_n, stages,    \
                                              dtype, a_major, b_major));                           \
    }
#define MOEI_GEMM_TILE_KERNELS(...) MOE_GEMM_VARIANT_LIST(MOEI_GEMM_KERNEL, __VA_ARGS__)
MOEI_GEMM_TILE_LIST(MOEI_GEMM_TILE_KERNELS)
#undef MOEI_GEMM_TILE_KERNELS
#undef MOEI_GEMM_KERNEL

/* The kernels of the wgmma path, for k-major A: rows of A in order, or gathered. */
#define MOEI_GEMM_WGMMA_SHAPE(dtype, a_major, b_major)                                             \
    MOEI_WGMMA_SHAPE(MOEI_GEMM_WGMMA_THREADS, dtype, a_major, b_major)
#define MOEI_GEMM_WGMMA_THREADS                                                                    \
    (MOEI_GEMM_GRADIENT ? MOEI_WGMMA_GRADIENT_THREADS : MOEI_WGMMA_THREADS)
#if MOEI_WGMMA_HERE
#define MOEI_GEMM_WGMMA_BODY(dtype, a_major, b_major, gathered)                                    \
    MOE_SHARED(moei_wgmma_shared, s);                                                              \
    const moe_gemm_shape f = MOEI_GEMM_WGMMA_SHAPE(dtype, a_major, b_major);                       \
    if (MOEI_GEMM_WGMMA_LEAST(a_major, b_major) == 90)                                             \
        moei_wgmma_block(&p.a, shared, &s, gathered, MOEI_GEMM_GRADIENT, f);
#else
#define MOEI_GEMM_WGMMA_BODY(dtype, a_major, b_major, gathered) (void)shared;
#endif
#define MOEI_GEMM_WGMMA_KERNEL(variant, dtype, a_major, b_major, rows, gathered)                   \
    MOE_KERNEL(MOEI_GEMM_WGMMA_THREADS, 1)                                                         \
    MOEI_GEMM_NAME(rows, variant)(MOE_ARG(moei_wgmma_param) p)                                     \
    {                                                                                              \
        MOE_SHARED_DYNAMIC(shared);                                                                \
        moe_pdl_trigger();                                                                         \
        moe_pdl_wait();                                                                            \
        MOEI_GEMM_WGMMA_BODY(dtype, a_major, b_major, gathered)                                    \
    }
MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_KERNEL, wgmma, 0)
MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_KERNEL, wgmma_gather, 1)
#undef MOEI_GEMM_WGMMA_KERNEL
#undef MOEI_GEMM_WGMMA_BODY

/* The variants, in order of preference. */
static const moei_variant MOEI_GEMM_TABLE[] = {
#define MOEI_GEMM_WGMMA_ROW(variant, dtype, a_major, b_major, rows, gathered)                      \
    {(const void*)MOEI_GEMM_NAME(rows, variant),                                                   \
     MOEI_GEMM_TEXT(rows, variant),                                                                \
     MOE_GEMM_PATH_WGMMA,                                                                          \
     (gathered) ? MOEI_VARIANT_GATHERED : MOEI_VARIANT_IN_ORDER,                                   \
     2,                                                                                            \
     MOEI_GEMM_WGMMA_SHAPE(dtype, a_major, b_major),                                               \
     MOE_TILE_128x256,                                                                             \
     1,                                                                                            \
     MOEI_WGMMA_SMEM + (MOEI_GEMM_GRADIENT ? MOEI_WGMMA_PRE : 0),                                  \
     MOEI_GEMM_WGMMA_LEAST(a_major, b_major),                                                      \
     90},
    MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_ROW, wgmma, 0)
        MOE_GEMM_VARIANT_LIST(MOEI_GEMM_WGMMA_ROW, wgmma_gather, 1)
#undef MOEI_GEMM_WGMMA_ROW
#define MOEI_GEMM_ROW(variant, dtype, a_major, b_major, name, tile_m, tile_n, tile_k, warps_m,     \
                      warps_n, stages, blocks)                                                     \
    {(const void*)MOEI_GEMM_NAME(name, variant),                                                   \
     MOEI_GEMM_TEXT(name, variant),                                                                \
     MOE_GEMM_PATH_WMMA,                                                                           \
     MOEI_VARIANT_ANY_ROWS,                                                                        \
     1,                                                                                            \
     MOEI_SHAPE_INIT(tile_m, tile_n, tile_k, warps_m, warps_n, stages, dtype, a_major, b_major),   \
     MOE_TILE_##name,                                                                              \
     blocks,                                                                                       \
     MOEI_RING_BYTES(1, tile_m, tile_n, tile_k, warps_m, warps_n, stages) +                        \
         MOEI_STAGING_BYTES(tile_m, tile_n, tile_k, warps_m, warps_n, stages),                     \
     MOEI_GEMM_LEAST(dtype, tile_m, tile_n, a_major, b_major),                                     \
     MOEI_GEMM_MOST(tile_m, tile_n)},
#define MOEI_GEMM_ROWS(...) MOE_GEMM_VARIANT_LIST(MOEI_GEMM_ROW, __VA_ARGS__)
            MOEI_GEMM_TILE_LIST(MOEI_GEMM_ROWS)
#undef MOEI_GEMM_ROWS
#undef MOEI_GEMM_ROW
                MOEI_VARIANT_END};

#undef MOEI_GEMM_WGMMA_SHAPE
#undef MOEI_GEMM_WGMMA_THREADS
#undef MOEI_GEMM_TEXT
#undef MOEI_GEMM_NAME
#undef MOEI_GEMM_TABLE
#undef MOEI_GEMM_PREFIX
#undef MOEI_GEMM_GRADIENT
