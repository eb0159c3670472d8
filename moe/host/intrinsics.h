/* intrinsics.h: atomics, fences, and the bit and arithmetic intrinsics that the kernels use.

   One OS thread runs every fiber, and a fiber keeps the CPU between waits. So an atomic is plain
   arithmetic and a fence does nothing. Sums wrap, as on a GPU. A misaligned address fails the
   run. */
#ifndef MOE_HOST_INTRINSICS_H
#define MOE_HOST_INTRINSICS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "block.h"

template <class Type> inline Type moeh_sum(Type a, Type b) { return a + b; }
inline int moeh_sum(int a, int b) { return (int)((unsigned)a + (unsigned)b); }

/* The value has the type that p points to, whatever is passed: common_type<Type> is not deduced. */
#define MOEH_ATOMIC(name, expression)                                                              \
    template <class Type> inline Type name(Type* p, typename std::common_type<Type>::type v)       \
    {                                                                                              \
        moeh_check_aligned(p, sizeof *p, #name " of a misaligned address");                        \
        const Type old = *(volatile Type*)p;                                                       \
        *(volatile Type*)p = (expression);                                                         \
        return old;                                                                                \
    }
MOEH_ATOMIC(atomicAdd, moeh_sum(old, v))
MOEH_ATOMIC(atomicMin, v < old ? v : old)
MOEH_ATOMIC(atomicMax, v > old ? v : old)
MOEH_ATOMIC(atomicExch, v)
MOEH_ATOMIC(atomicAnd, old & v)
MOEH_ATOMIC(atomicOr, old | v)
MOEH_ATOMIC(atomicXor, old ^ v)
#undef MOEH_ATOMIC

template <class Type>
inline Type atomicCAS(Type* p, typename std::common_type<Type>::type expected,
                      typename std::common_type<Type>::type v)
{
    moeh_check_aligned(p, sizeof *p, "atomicCAS of a misaligned address");
    const Type old = *(volatile Type*)p;
    if (old == expected) *(volatile Type*)p = v;
    return old;
}

/* The compiler must neither move a memory access past these nor keep values over them. */
inline void __threadfence_block() { __asm__ volatile("" ::: "memory"); }
inline void __threadfence() { __asm__ volatile("" ::: "memory"); }
inline void __threadfence_system() { __asm__ volatile("" ::: "memory"); }

/* Reads the device's clock, nanoseconds, more than 0. It advances by 1 us at each reading and not
   between readings: how long a wait may last does not depend on the speed of the host. */
inline uint64_t moeh_clock() { return moeh_get().clock += 1000; }
inline void __nanosleep(unsigned) {}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift)
{
    return (unsigned)(((uint64_t)hi << 32 | lo) << (shift & 31) >> 32);
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
#undef MOEH_BITS

/* Both are exact; __fdividef of a GPU may differ in its last bits. */
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }

/* min and max of integers; unsigned where one argument is. */
#define MOEH_MIN_MAX(name, op)                                                                     \
    template <class Arg, class Other>                                                              \
    inline typename std::common_type<Arg, Other>::type name(Arg a, Other b)                        \
    {                                                                                              \
        typedef typename std::common_type<Arg, Other>::type Common;                                \
        static_assert(std::is_integral<Common>::value, "fminf and fmaxf are for floats");          \
        return (Common)a op(Common) b ? (Common)a : (Common)b;                                     \
    }
MOEH_MIN_MAX(min, <)
MOEH_MIN_MAX(max, >)
#undef MOEH_MIN_MAX

#endif
