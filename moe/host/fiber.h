/* fiber.h: a stack for every CUDA thread, and the switch between two stacks.

   On x86-64 the switch is 15 instructions. Other machines, and -DMOEH_UCONTEXT, use ucontext, which
   is right and some hundred times slower (it makes a system call). Rounding modes are not saved:
   all fibers share them. AddressSanitizer is told of every switch.

   A stack has 64 KiB (256 KiB under AddressSanitizer), with a guard page below where the system
   grants one. The scheduler pools the stacks and never frees them. */
#ifndef MOE_HOST_FIBER_H
#define MOE_HOST_FIBER_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#if !defined(__x86_64__) && !defined(MOEH_UCONTEXT)
#define MOEH_UCONTEXT
#endif
#ifdef MOEH_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define MOEH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOEH_ASAN 1
#endif
#endif
#ifndef MOEH_ASAN
#define MOEH_ASAN 0
#endif
#if MOEH_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

enum {
    MOEH_STACK = (MOEH_ASAN ? 256 : 64) * 1024,
    MOEH_GUARD = 4096,
    MOEH_GUARDED = 16384 /* stacks with a guard page: each is a mapping more, of which Linux allows
                            a process 65530 */
};

struct moeh_fiber {
    void* sp;             /* stack pointer where the fiber stopped */
    unsigned char* stack; /* lowest usable byte; of the host's own stack: as ASan reports it */
    size_t size;          /* usable bytes */
    void* fake;           /* fake stack of ASan */
#ifdef MOEH_UCONTEXT
    ucontext_t context;
#endif
};

#ifndef MOEH_UCONTEXT
/* Saves the registers that a call preserves, stores sp to *from, continues at `to`. This one
   function does all switches and returns to few callers, so the final ret is mostly predicted. */
__attribute__((naked, noinline)) inline void moeh_switch(void** /* from */, void* /* to */)
{
    __asm__("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
            "movq %rsp, (%rdi); movq %rsi, %rsp\n\t"
            "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

/* Returns the fiber that ran last: the next one learns from ASan where the stack of that fiber
   is. */
inline moeh_fiber*& moeh_fiber_left()
{
    static moeh_fiber* left;
    return left;
}

/* Switches from `from` to `to`; returns when `from` is switched to again. A fiber that `ends` never
   is. */
inline void moeh_fiber_switch(moeh_fiber* from, moeh_fiber* to, bool ends)
{
    (void)ends;
#if MOEH_ASAN
    moeh_fiber_left() = from;
    __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake, to->stack, to->size);
#endif
    __asm__ volatile("" ::: "memory"); /* other fibers change shared memory meanwhile */
#ifdef MOEH_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    moeh_switch(&from->sp, to->sp);
#endif
    __asm__ volatile("" ::: "memory");
#if MOEH_ASAN
    __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}

/* First statement of a fiber. */
inline void moeh_fiber_arrived()
{
#if MOEH_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    moeh_fiber_left()->stack = (unsigned char*)bottom;
    moeh_fiber_left()->size = size;
#endif
}

/* Gives the fiber a stack. */
inline void moeh_fiber_alloc(moeh_fiber* f)
{
    static int count = 0;
    void* p = mmap(nullptr, MOEH_STACK + MOEH_GUARD, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    if (count++ < MOEH_GUARDED) (void)mprotect(p, MOEH_GUARD, PROT_NONE);
    f->stack = (unsigned char*)p + MOEH_GUARD;
    f->size = MOEH_STACK;
}

/* Makes the fiber begin at `entry`, whatever it did before. The tops of the stacks have different
   offsets in a page: with one offset all would share one set of the cache. */
inline void moeh_fiber_start(moeh_fiber* f, void (*entry)())
{
    const uintptr_t color = ((uintptr_t)f->stack >> 16) * 5 % 61;
    const uintptr_t top = ((uintptr_t)f->stack + f->size - 64 * color) & ~(uintptr_t)63;
#if MOEH_ASAN
    /* poison of frames that did not return: none lies below the place where the fiber stopped */
    unsigned char* const low = f->sp ? (unsigned char*)f->sp : f->stack;
    __asan_unpoison_memory_region(low, (size_t)(f->stack + f->size - low));
#endif
#ifdef MOEH_UCONTEXT
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = top - (uintptr_t)f->stack;
    f->context.uc_link = nullptr;
    makecontext(&f->context, entry, 0);
#else
    void** sp = (void**)top;
    *--sp = nullptr; /* no caller; the entry finds the stack aligned as after a call */
    *--sp = (void*)entry;
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    f->sp = sp;
#endif
}

#endif
