/* hopper.h: the CPU's stand-ins for barriers in shared memory (mbarrier), tensor copies (TMA) and
   products of a warpgroup (wgmma), behind the functions that gemm/wgmma/ptx.cuh defines on a GPU.
   Included by that file.

   A copy arrives when a thread waits for its barrier; until then its destination holds poison. So a
   stage that is read too early, or refilled too early, shows. Products run when their warp waits
   for their group: a stage that is released before shows too. Descriptors carry the address of the
   operand; the bits beside it are checked; the swizzle is applied to addresses, as on a GPU.

   The run fails where a kernel names a block of its cluster that has ended, a barrier that was not
   initialized, a destination or operand that is not 1024-byte aligned, or a descriptor of another
   layout; where a barrier gets more arrivals than it expects; where products or stores of boxes are
   in flight at the end. Not shown: the limit of registers, the limits of tensor maps, and the order
   that moei_wgmma_begin, moei_wgmma_settle and moei_wgmma_sees_copies make. */
#ifndef MOE_HOST_HOPPER_H
#define MOE_HOST_HOPPER_H

#include "../base/cuda.cuh"
#include "../base/numeric.cuh"
#include "../gemm/shape.h"
#include "../gemm/wgmma/args.h"
#include "../gemm/wgmma/map.cuh"

/* ---- barriers ---- */

/* What the 8 bytes of a barrier hold. */
struct moeh_mbarrier {
    uint32_t count : 12, pending : 12, phase : 1, made : 7; /* made: MOEH_MBARRIER */
    int32_t bytes;                                          /* expected minus arrived */
};
enum { MOEH_MBARRIER = 0x5a };

inline moeh_mbarrier* moeh_barrier_of(uint64_t* bar)
{
    moeh_mbarrier* const b = (moeh_mbarrier*)(void*)bar;
    moeh_check_aligned(bar, 8, "uses a misaligned barrier");
    if (b->made != MOEH_MBARRIER) moeh_fail("uses a barrier that is not initialized");
    return b;
}

/* Completes the phase where nothing is missing. */
inline void moeh_barrier_update(moeh_mbarrier* b)
{
    if (b->pending || b->bytes) return;
    b->phase ^= 1u;
    b->pending = b->count;
}

inline void moei_barrier_init(uint64_t* bar, int count)
{
    const moeh_mbarrier made = {(uint32_t)count, (uint32_t)count, 0, MOEH_MBARRIER, 0};
    moeh_check_aligned(bar, 8, "initializes a misaligned barrier");
    if (count < 1 || count > 4095) moeh_fail("initializes a barrier for a wrong number");
    memcpy((void*)bar, &made, sizeof made);
}
inline void moei_barrier_visible(void) {}

inline void moei_barrier_expect(uint64_t* bar, int bytes)
{
    moeh_mbarrier* const b = moeh_barrier_of(bar);
    if (!b->pending) moeh_fail("arrives at a barrier more often than it was initialized for");
    --b->pending;
    b->bytes += bytes;
    moeh_barrier_update(b);
}
inline void moei_barrier_arrive(uint64_t* bar) { moei_barrier_expect(bar, 0); }

/* Lets the copies arrive that a barrier of the calling thread's block waits for. */
inline void moeh_arrive(uint64_t* bar)
{
    std::vector<moeh_bulk>& all = moeh_now()->block->bulk;
    size_t kept = 0;
    for (size_t i = 0; i < all.size(); ++i) {
        if (all[i].bar != bar) {
            if (kept != i) all[kept] = std::move(all[i]);
            ++kept;
            continue;
        }
        all[i].move();
        moeh_mbarrier* const b = moeh_barrier_of(bar);
        b->bytes -= all[i].bytes;
        if (all[i].arrives) moei_barrier_arrive(bar);
        else moeh_barrier_update(b);
    }
    all.resize(kept);
}

inline void moei_barrier_wait(uint64_t* bar, int parity)
{
    moeh_wait_until([=] {
        if (moeh_barrier_of(bar)->phase != (uint32_t)parity) return true;
        moeh_arrive(bar);
        return moeh_barrier_of(bar)->phase != (uint32_t)parity;
    });
}

/* The thread's copies arrive together, at a wait for the barrier. */
inline void moei_barrier_arrive_copies(uint64_t* bar)
{
    moeh_thread* const t = moeh_now();
    const std::vector<moeh_copy> copies = t->copies;
    t->copies.clear();
    moeh_barrier_of(bar);
    t->block->bulk.push_back(moeh_bulk{bar, 0, true, [copies] {
                                           for (const moeh_copy& c : copies) moeh_copy_arrive(c);
                                       }});
}

inline void moei_named_barrier(int id, int threads)
{
    moeh_named* const n = &moeh_now()->block->named[id];
    const uint64_t round = n->round;
    if (id < 1 || id > 15) moeh_fail("uses a barrier with a number outside 1 .. 15");
    if (++n->arrived == (unsigned)threads) {
        n->arrived = 0;
        ++n->round;
    }
    moeh_wait_until([=] { return n->round != round; });
}

/* ---- clusters ---- */

inline int moei_cluster_rank(void) { return (int)moeh_now()->block->rank; }
inline void moei_cluster_sync(void) { moeh_cluster_sync(); }

inline void moei_barrier_arrive_at(uint64_t* bar, int rank)
{
    moei_barrier_arrive((uint64_t*)moeh_cluster_address(bar, moeh_cluster_block((unsigned)rank)));
}

inline int moei_cluster_load(const int32_t* p, int rank)
{
    return *(const int32_t*)moeh_cluster_address(p, moeh_cluster_block((unsigned)rank));
}

/* The number arrives at a wait for the barrier. */
inline void moei_cluster_send(int32_t* to, int value, uint64_t* bar, int rank)
{
    moeh_block* const other = moeh_cluster_block((unsigned)rank);
    int32_t* const at = (int32_t*)moeh_cluster_address(to, other);
    uint64_t* const there = (uint64_t*)moeh_cluster_address(bar, other);
    moeh_barrier_of(there);
    moeh_poison(at, 4);
    other->bulk.push_back(moeh_bulk{there, 4, false, [=] { *at = value; }});
}

inline bool moei_elect(void)
{
    __syncwarp(0xffffffffu);
    return moeh_lane() == 31; /* a GPU may elect any lane */
}

/* ---- tensor copies ---- */

/* Returns the address in a stage at which the byte with address p of the line stands. */
inline unsigned char* moeh_swizzle(unsigned char* p)
{
    const uintptr_t a = (uintptr_t)p;
    return p + ((a ^ ((a >> 7 & 7) << 4)) - a);
}

/* Requires a map that copies can use. */
inline void moeh_check_map(const moei_tensor* t)
{
    moeh_check_aligned(t->base, 16, "copies by a map of a misaligned base");
    if (!t->base || t->box_rows < 1 || t->box_rows > 256)
        moeh_fail("copies by a map that is empty");
    if (t->row_stride % 8 || t->row_stride >> 39 || t->rows >> 32 || t->columns >> 32)
        moeh_fail("copies by a map of odd or large strides and sizes");
}

/* Begins the copy of a box into block b. */
inline void moeh_tensor_load(moeh_block* b, void* dst, const moei_tensor_map* map, int x, int y,
                             uint64_t distance, uint64_t* bar)
{
    moei_tensor t;
    memcpy(&t, map, sizeof t);
    moeh_check_aligned(dst, 1024, "copies a box to a misaligned address");
    const uint64_t vector = distance >> 4 & ((1u << MOEI_TENSOR_LOG2) - 1); /* as a GPU has it */
    const uint64_t group = distance >> 4 >> MOEI_TENSOR_LOG2;
    const void* const matrix =
        (const char*)(uintptr_t)((uint64_t)t.base + vector * 16 + (group << MOEI_TENSOR_LOG2) * 16);
    moeh_check_aligned((const void*)(uintptr_t)distance, 16, "copies from a misaligned matrix");
    moeh_check_map(&t);
    const int bytes = t.box_rows * 128;
    moeh_poison(dst, (size_t)bytes);
    moeh_barrier_of(bar);
    b->bulk.push_back(
        moeh_bulk{bar, bytes, false, [=] {
                      for (int r = 0; r < t.box_rows; ++r)
                          for (int c = 0; c < 64; ++c) {
                              const int64_t row = (int64_t)y + r, column = (int64_t)x + c;
                              uint16_t v = 0;
                              if (row >= 0 && row < t.rows && column >= 0 && column < t.columns)
                                  v = ((const uint16_t*)matrix)[row * t.row_stride + column];
                              memcpy(moeh_swizzle((unsigned char*)dst + r * 128 + c * 2), &v, 2);
                          }
                  }});
}
inline void moei_tensor_load(void* dst, const moei_tensor_map* map, int x, int y, uint64_t distance,
                             uint64_t* bar)
{
    moeh_tensor_load(moeh_now()->block, dst, map, x, y, distance, bar);
}
inline void moei_tensor_load_both(void* dst, const moei_tensor_map* map, int x, int y,
                                  uint64_t distance, uint64_t* bar)
{
    for (unsigned rank = 0; rank < 2; ++rank) {
        moeh_block* const b = moeh_cluster_block(rank);
        moeh_tensor_load(b, moeh_cluster_address(dst, b), map, x, y, distance,
                         (uint64_t*)moeh_cluster_address(bar, b));
    }
}

/* Begins the copy of a box of halves. */
inline void moei_tensor_load_halves(void* dst, const moei_tensor_map* map, int x, int y,
                                    uint64_t* bar)
{
    moei_tensor t;
    memcpy(&t, map, sizeof t);
    moeh_check_aligned(dst, 128, "copies a box to a misaligned address");
    moeh_check_map(&t);
    if (t.halves < 1 || t.halves > 2) moeh_fail("copies halves by a map of a matrix");
    if (t.columns % 8) moeh_fail("copies by a map of odd strides");
    const int bytes = t.box_rows * 1024;
    moeh_poison(dst, (size_t)bytes);
    moeh_barrier_of(bar);
    moeh_now()->block->bulk.push_back(
        moeh_bulk{bar, bytes, false, [=] {
                      for (int i = 0; i < t.box_rows * 512; ++i) {
                          const int half = i / 256 % 2;
                          const int64_t row = (int64_t)y + i / 512, column = (int64_t)x + i % 256;
                          uint16_t v = 0;
                          if (row >= 0 && row < t.rows && column >= 0 && column < t.columns &&
                              half < t.halves)
                              v = ((const uint16_t*)t.base)[row * t.row_stride +
                                                            half * t.columns + column];
                          memcpy((unsigned char*)dst + i * 2, &v, 2);
                      }
                  }});
}

/* Begins to store a box. It reads src when the thread waits for it: who writes there before,
   shows. */
inline void moei_tensor_store(const void* src, const moei_tensor_map* map, int x, int y)
{
    moei_tensor t;
    memcpy(&t, map, sizeof t);
    moeh_check_aligned(src, 1024, "stores a box from a misaligned address");
    moeh_check_map(&t);
    moeh_now()->boxes.push_back([=] {
        for (int r = 0; r < t.box_rows; ++r)
            for (int c = 0; c < 64; ++c) {
                const int64_t row = (int64_t)y + r, column = (int64_t)x + c;
                if (row >= 0 && row < t.rows && column >= 0 && column < t.columns)
                    memcpy((char*)(uintptr_t)t.base + (row * t.row_stride + column) * 2,
                           moeh_swizzle((unsigned char*)(uintptr_t)src + r * 128 + c * 2), 2);
            }
    });
}
inline void moei_tensor_store_wait(void)
{
    for (const std::function<void()>& store : moeh_now()->boxes) store();
    moeh_now()->boxes.clear();
}
inline void moei_tensor_store_wait_read(void) { moei_tensor_store_wait(); }

inline uint32_t moei_transpose_matrix(uint32_t x)
{
    const int row = (int)moeh_lane() / 4, column = (int)moeh_lane() % 4 * 2;
    const uint32_t low = __shfl_sync(0xffffffffu, x, 4 * column + row / 2);
    const uint32_t high = __shfl_sync(0xffffffffu, x, 4 * (column + 1) + row / 2);
    return (low >> row % 2 * 16 & 0xffff) | (high >> row % 2 * 16 & 0xffff) << 16;
}

inline void moei_store_matrices(void* at, const uint32_t* x)
{
    const int lane = (int)moeh_lane();
    moeh_check_aligned(at, 16, "stores a matrix at a misaligned address");
    for (int i = 0; i < 4; ++i) {
        const uint64_t row = __shfl_sync(0xffffffffu, (uint64_t)(uintptr_t)at, 8 * i + lane / 4);
        memcpy((char*)(uintptr_t)row + lane % 4 * 4, x + i, 4);
    }
    __syncwarp(0xffffffffu);
}

/* ---- products ---- */

inline void moei_wgmma_sees_copies(void) {}
inline void moei_tensor_sees_global(void) {}
inline void moei_registers_lower(int) {}
inline void moei_registers_raise(int) {}
inline void moei_wgmma_begin(void) {}
inline void moei_wgmma_settle(float*) {}

/* The layouts of operands that kernels have made descriptors of; of these a descriptor has the
   number in its upper bits, the address in the lower ones. */
enum : uint64_t {
    MOEH_WGMMA_K = (uint64_t)1 << 60,
    MOEH_WGMMA_MN = (uint64_t)2 << 60,
    MOEH_WGMMA_MARK = (uint64_t)15 << 60
};

/* Requires the strides and the swizzle that moeh_wgmma_line has, in the bits that a GPU reads. */
inline void moeh_wgmma_check_layout(int major)
{
    const uint64_t bits = moei_wgmma_layout(major), step = moei_wgmma_advance(major) * 16;
    const uint64_t rows = (bits >> 16 & 0x3fff) * 16, lines = (bits >> 32 & 0x3fff) * 16;
    const bool mn = major == MOE_MAJOR_MN;
    if (bits >> 62 != 1 || lines != 1024 || (mn && rows != 8192) || step != (mn ? 2048u : 32u))
        moeh_fail("multiplies by a descriptor of another layout");
}

inline uint64_t moei_wgmma_operand(const void* p, int major)
{
    moeh_wgmma_check_layout(major);
    moeh_check_aligned(p, 1024, "multiplies from a misaligned address");
    return (uint64_t)(uintptr_t)p >> 4 | (major == MOE_MAJOR_MN ? MOEH_WGMMA_MN : MOEH_WGMMA_K);
}

/* Returns the address of 16 depths of a descriptor's first line. */
inline unsigned char* moeh_wgmma_address(uint64_t operand, int major)
{
    const uint64_t at = (operand & ~MOEH_WGMMA_MARK) << 4;
    const bool mn = major == MOE_MAJOR_MN;
    if ((operand & MOEH_WGMMA_MARK) != (mn ? MOEH_WGMMA_MN : MOEH_WGMMA_K) ||
        (mn ? at % 1024 != 0 : at % 1024 > 96 || at % 32 != 0))
        moeh_fail("multiplies by a descriptor of another layout");
    return (unsigned char*)(uintptr_t)at;
}

/* Writes 16 depths of row `row` of an operand as floats to v. */
inline void moeh_wgmma_line(float v[16], unsigned char* first, int row, int major, int dtype)
{
    for (int k = 0; k < 16; ++k) {
        uint16_t h;
        unsigned char* const at = major == MOE_MAJOR_MN
                                      ? first + row / 64 * 8192 + k * 128 + row % 64 * 2
                                      : first + row * 128 + k * 2;
        memcpy(&h, moeh_swizzle(at), 2);
        v[k] = moe_half_to_f32(h, dtype);
    }
}

/* Runs one product of a warp: its 16 rows by its columns. */
inline void moeh_wgmma_run(const moeh_wgmma* p, unsigned warp)
{
    static float b[16][256];
    const int columns = p->columns;
    float column[16];
    for (int n = 0; n < columns; ++n) {
        moeh_wgmma_line(column, moeh_wgmma_address(p->b, p->b_major), n, p->b_major, p->dtype);
        for (int k = 0; k < 16; ++k) b[k][n] = column[k];
    }
    for (int m = 0; m < 16; ++m) {
        float a[16], sum[256] = {0};
        moeh_wgmma_line(a, moeh_wgmma_address(p->a, p->a_major), (int)warp % 4 * 16 + m, p->a_major,
                        p->dtype);
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < columns; ++n) sum[n] += a[k] * b[k][n];
        for (int n = 0; n < columns; ++n) {
            float* const c = p->c[m % 8 * 4 + n % 8 / 2] + n / 8 * 4 + m / 8 * 2 + n % 2;
            *c = p->add ? *c + sum[n] : sum[n];
        }
    }
}

/* What a lane brings to a meeting about a product. */
struct moeh_wgmma_lane {
    float* c;
    uint64_t a, b;
    int add, columns, a_major, b_major, dtype;
};

inline void moeh_wgmma_start(float* c, uint64_t a, uint64_t b, int add, const moe_gemm_shape f,
                             int columns)
{
    const moeh_wgmma_lane mine = {c, a, b, add, columns, f.a_major, f.b_major, f.dtype};
    if (!add) /* whoever reads them before the wait finds NaN */
        for (int i = 0; i < columns / 2; ++i) c[i] = NAN;
    moeh_meet(
        0xffffffffu, "moei_wgmma",
        [](moeh_warp* w, uint32_t mask) {
            const moeh_wgmma_lane* const first = (const moeh_wgmma_lane*)(uintptr_t)w->at[0].value;
            moeh_wgmma p;
            if (mask != 0xffffffffu) moeh_fail("calls moei_wgmma in a warp that is not whole");
            p.a = first->a, p.b = first->b, p.add = first->add, p.columns = first->columns;
            p.a_major = first->a_major, p.b_major = first->b_major, p.dtype = first->dtype;
            p.group = w->wgmma_groups;
            for (int i = 0; i < 32; ++i) {
                const moeh_wgmma_lane* const l = (const moeh_wgmma_lane*)(uintptr_t)w->at[i].value;
                if (l->a != p.a || l->b != p.b || l->add != p.add)
                    moeh_fail("calls moei_wgmma with operands that differ between lanes");
                p.c[i] = l->c;
            }
            moeh_wgmma_address(p.a, p.a_major), moeh_wgmma_address(p.b, p.b_major);
            w->wgmma.push_back(p);
        },
        (uint64_t)(uintptr_t)&mine);
}
inline void moei_wgmma(float* c, uint64_t a, uint64_t b, int add, const moe_gemm_shape f)
{
    moeh_wgmma_start(c, a, b, add, f, 256);
}
inline void moei_wgmma_128(float* c, uint64_t a, uint64_t b, int add, const moe_gemm_shape f)
{
    moeh_wgmma_start(c, a, b, add, f, 128);
}

inline void moei_wgmma_commit(void)
{
    moeh_meet(
        0xffffffffu, "moei_wgmma_commit", [](moeh_warp* w, uint32_t) { ++w->wgmma_groups; }, 0);
}

inline void moei_wgmma_wait(int n)
{
    moeh_meet(
        0xffffffffu, "moei_wgmma_wait",
        [](moeh_warp* w, uint32_t) {
            const uint64_t pending = w->at[0].value;
            size_t done = 0;
            for (; done < w->wgmma.size() && w->wgmma[done].group + pending < w->wgmma_groups;
                 ++done)
                moeh_wgmma_run(&w->wgmma[done], w->index);
            w->wgmma.erase(w->wgmma.begin(), w->wgmma.begin() + (long)done);
        },
        (uint64_t)n);
}

#endif
