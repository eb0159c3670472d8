/* intrinsics.h: atomics, bit and float intrinsics, and the min and max of device code.

   One OS thread runs every fiber, and a fiber keeps the CPU between waits, so an atomic is plain
   arithmetic and a fence is nothing. Sums are taken in unsigned arithmetic: they wrap on a GPU. */
#ifndef MOE_HOST_INTRINSICS_H
#define MOE_HOST_INTRINSICS_H

#include <math.h>

#include <chrono>

#include "block.h"

#define MOEH_ATOMIC(name, T, expression)                                                          \
    inline T name(T* p, T v)                                                                      \
    {                                                                                             \
        const T old = *(volatile T*)p;                                                            \
        *(volatile T*)p = (T)(expression);                                                        \
        return old;                                                                               \
    }
#define MOEH_ATOMIC_EACH(T)                                                                       \
    MOEH_ATOMIC(atomicMin, T, v < old ? v : old)                                                  \
    MOEH_ATOMIC(atomicMax, T, v > old ? v : old)                                                  \
    MOEH_ATOMIC(atomicExch, T, v)                                                                 \
    MOEH_ATOMIC(atomicOr, T, old | v)                                                             \
    MOEH_ATOMIC(atomicAnd, T, old& v)                                                             \
    MOEH_ATOMIC(atomicXor, T, old ^ v)                                                            \
    inline T atomicCAS(T* p, T expected, T v)                                                     \
    {                                                                                             \
        const T old = *(volatile T*)p;                                                            \
        if (old == expected) *(volatile T*)p = v;                                                 \
        return old;                                                                               \
    }
MOEH_ATOMIC_EACH(int)
MOEH_ATOMIC_EACH(unsigned)
MOEH_ATOMIC_EACH(unsigned long long)
MOEH_ATOMIC(atomicMin, long long, v < old ? v : old)
MOEH_ATOMIC(atomicMax, long long, v > old ? v : old)
MOEH_ATOMIC(atomicAdd, int, (unsigned)old + (unsigned)v)
MOEH_ATOMIC(atomicAdd, unsigned, old + v)
MOEH_ATOMIC(atomicAdd, unsigned long long, old + v)
MOEH_ATOMIC(atomicAdd, float, old + v)
MOEH_ATOMIC(atomicAdd, double, old + v)
MOEH_ATOMIC(atomicSub, int, (unsigned)old - (unsigned)v)
MOEH_ATOMIC(atomicSub, unsigned, old - v)
MOEH_ATOMIC(atomicExch, float, v)
#undef MOEH_ATOMIC_EACH
#undef MOEH_ATOMIC

/* The compiler too must neither move nor keep anything across these. */
inline void __threadfence_block() { __asm__ volatile("" ::: "memory"); }
inline void __threadfence() { __asm__ volatile("" ::: "memory"); }
inline void __threadfence_system() { __asm__ volatile("" ::: "memory"); }

inline void __trap() { moeh_fail("calls __trap"); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift)
{
    return (unsigned)(((uint64_t)hi << 32 | lo) << (shift & 31) >> 32);
}
inline unsigned __brev(unsigned v)
{
    v = (v >> 1 & 0x55555555u) | (v & 0x55555555u) << 1;
    v = (v >> 2 & 0x33333333u) | (v & 0x33333333u) << 2;
    v = (v >> 4 & 0x0f0f0f0fu) | (v & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(v);
}

#define MOEH_BITS(name, to, from)                                                                 \
    inline to name(from v)                                                                        \
    {                                                                                             \
        to bits;                                                                                  \
        memcpy(&bits, &v, sizeof bits);                                                           \
        return bits;                                                                              \
    }
MOEH_BITS(__float_as_uint, unsigned, float)
MOEH_BITS(__uint_as_float, float, unsigned)
MOEH_BITS(__float_as_int, int, float)
MOEH_BITS(__int_as_float, float, int)
MOEH_BITS(__double_as_longlong, long long, double)
MOEH_BITS(__longlong_as_double, double, long long)
#undef MOEH_BITS

/* Exact here; the approximate ones of a GPU may differ in their last bits. */
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return 1.0f / sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline int __float2int_rn(float v) { return (int)lrintf(v); }
inline int __float2int_rz(float v) { return (int)v; }
inline float __int2float_rn(int v) { return (float)v; }
inline float __uint2float_rn(unsigned v) { return (float)v; }

/* Cache hints mean nothing here. */
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldcv(const T* p) { return *(const volatile T*)p; }
template <class T> inline void __stcg(T* p, T v) { *p = v; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
template <class T> inline void __stwt(T* p, T v) { *p = v; }

/* Nanoseconds stand for clock cycles. */
inline long long clock64()
{
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch()).count();
}

/* min and max for the pairs of types that CUDA has; where one is unsigned, so is the result. */
#define MOEH_MIN_MAX(R, A, B)                                                                     \
    inline R min(A a, B b) { return (R)a < (R)b ? (R)a : (R)b; }                                  \
    inline R max(A a, B b) { return (R)a > (R)b ? (R)a : (R)b; }
#define MOEH_MIN_MAX_EACH(S, U)                                                                   \
    MOEH_MIN_MAX(S, S, S) MOEH_MIN_MAX(U, U, U) MOEH_MIN_MAX(U, S, U) MOEH_MIN_MAX(U, U, S)
MOEH_MIN_MAX_EACH(int, unsigned)
MOEH_MIN_MAX_EACH(long, unsigned long)
MOEH_MIN_MAX_EACH(long long, unsigned long long)
#undef MOEH_MIN_MAX_EACH
#undef MOEH_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

#endif
