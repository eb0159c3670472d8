/* test_variants.h: the grouped GEMM's kernels that the tests of experts and layer compile. Included
   before all headers of moe/ that have kernels.

   Lacks fp16 with mn-major weights: test_experts_not_compiled needs a missing variant. */
#ifndef MOE_TESTS_TEST_VARIANTS_H
#define MOE_TESTS_TEST_VARIANTS_H

#define MOE_GEMM_VARIANT_LIST(X, ...)                                                              \
    X(f16_kk, MOE_FP16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                     \
    X(bf16_kk, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_K, __VA_ARGS__)                                    \
    X(bf16_kn, MOE_BF16, MOE_MAJOR_K, MOE_MAJOR_MN, __VA_ARGS__)

#endif
