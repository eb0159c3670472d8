/* test_buffer.h: device memory with poison and canaries, several buffers at once, rows further
   apart than 32 bits count, runs that must give the same bits, and captured graphs. Included by
   test.h. */
#ifndef MOE_TESTS_TEST_BUFFER_H
#define MOE_TESTS_TEST_BUFFER_H

#define TBUF_GUARD 512

#if MOE_ON_HOST && MOEH_ASAN /* the canaries are also out of bounds for AddressSanitizer */
#define TBUF_FENCE(p, bytes) __asan_poison_memory_region(p, bytes)
#define TBUF_UNFENCE(p, bytes) __asan_unpoison_memory_region(p, bytes)
#else
#define TBUF_FENCE(p, bytes) ((void)0)
#define TBUF_UNFENCE(p, bytes) ((void)0)
#endif

typedef struct tbuf {
    void* p;      /* device address that the kernel gets */
    size_t bytes; /* from p on */
    char* base;   /* the allocation */
    size_t before, after; /* canaries */
    const char* name;
} tbuf;

/* NaN and a negative number, as the poison is, but another one. */
MOEI_UNUSED static unsigned char tbuf_canary(size_t i) { return (i & 1) ? 0xff : 0xc5; }

/* Fills device memory with poison: some bytes from the host, then twice as many each time. */
MOEI_UNUSED static void test_poison_device(void* p, size_t bytes)
{
    unsigned char first[4096];
    size_t done = bytes < sizeof first ? bytes : sizeof first;
    test_poison(first, done);
    TEST_CUDA(cudaDeviceSynchronize());
    if (bytes) TEST_CUDA(cudaMemcpy(p, first, done, cudaMemcpyHostToDevice));
    for (; done < bytes; done *= 2)
        TEST_CUDA(cudaMemcpy((char*)p + done, p, done < bytes - done ? done : bytes - done,
                             cudaMemcpyDeviceToDevice));
    TEST_CUDA(cudaDeviceSynchronize());
}

MOEI_UNUSED static void tbuf_poison(tbuf* b) { test_poison_device(b->p, b->bytes); }

/* `misalign` bytes past an address that is a multiple of 256. */
MOEI_UNUSED static tbuf tbuf_new(const char* name, size_t bytes, size_t misalign)
{
    tbuf b;
    unsigned char edge[2 * TBUF_GUARD];
    size_t i;
    b.name = name;
    b.bytes = bytes;
    b.before = TBUF_GUARD + misalign;
    b.after = TBUF_GUARD;
    TEST_CUDA(cudaMalloc((void**)&b.base, b.before + bytes + b.after));
    b.p = b.base + b.before;
    for (i = 0; i < sizeof edge; ++i) edge[i] = tbuf_canary(i);
    TEST_CUDA(cudaMemcpy(b.base, edge, b.before, cudaMemcpyHostToDevice));
    TEST_CUDA(cudaMemcpy((char*)b.p + bytes, edge, b.after, cudaMemcpyHostToDevice));
    tbuf_poison(&b);
    TBUF_FENCE(b.base, b.before);
    TBUF_FENCE((char*)b.p + bytes, b.after);
    return b;
}

MOEI_UNUSED static void tbuf_put(tbuf* b, const void* host)
{
    TEST_CUDA(cudaDeviceSynchronize());
    if (b->bytes) TEST_CUDA(cudaMemcpy(b->p, host, b->bytes, cudaMemcpyHostToDevice));
    TEST_CUDA(cudaDeviceSynchronize());
}

MOEI_UNUSED static void tbuf_get(const tbuf* b, void* host)
{
    TEST_CUDA(cudaDeviceSynchronize());
    if (b->bytes) TEST_CUDA(cudaMemcpy(host, b->p, b->bytes, cudaMemcpyDeviceToHost));
}

/* A buffer that holds a copy of `host`. */
MOEI_UNUSED static tbuf tbuf_from(const char* name, const void* host, size_t bytes, size_t misalign)
{
    tbuf b = tbuf_new(name, bytes, misalign);
    tbuf_put(&b, host);
    return b;
}

/* A new host copy of the buffer; the caller frees it. */
MOEI_UNUSED static void* tbuf_copy(const tbuf* b)
{
    void* host = test_host((int64_t)b->bytes);
    tbuf_get(b, host);
    return host;
}

/* Does the buffer still hold these bytes (null: the poison)? */
MOEI_UNUSED static int tbuf_holds(const tbuf* b, const void* want)
{
    unsigned char* got = (unsigned char*)tbuf_copy(b);
    int same = 1;
    for (size_t i = 0; i < b->bytes && same; ++i)
        same = got[i] == (want ? ((const unsigned char*)want)[i] : test_poison_byte(i));
    free(got);
    return same;
}

/* Frees the buffer; a canary that changed is a failure of the test. */
MOEI_UNUSED static void tbuf_free(tbuf* b)
{
    unsigned char edge[2 * TBUF_GUARD];
    size_t i, bad = 0;
    TBUF_UNFENCE(b->base, b->before);
    TBUF_UNFENCE((char*)b->p + b->bytes, b->after);
    TEST_CUDA(cudaDeviceSynchronize());
    TEST_CUDA(cudaMemcpy(edge, b->base, b->before, cudaMemcpyDeviceToHost));
    for (i = 0; i < b->before; ++i) bad += edge[i] != tbuf_canary(i);
    CHECK(bad == 0, "%s: %zu bytes before the buffer were written", b->name, bad);
    TEST_CUDA(cudaMemcpy(edge, (char*)b->p + b->bytes, b->after, cudaMemcpyDeviceToHost));
    for (i = 0, bad = 0; i < b->after; ++i) bad += edge[i] != tbuf_canary(i);
    CHECK(bad == 0, "%s: %zu bytes behind the buffer were written", b->name, bad);
    TEST_CUDA(cudaFree(b->base));
    b->p = b->base = 0;
}

/* Several buffers, up to the first null: tbufs_free(TBUFS(&x, &y)). */
#define TBUFS_MOST 20
typedef struct tbufs {
    tbuf* at[TBUFS_MOST + 1];
} tbufs;
#define TBUFS(...) (tbufs{{__VA_ARGS__, 0}})

MOEI_UNUSED static void tbufs_poison(tbufs all)
{
    for (int i = 0; all.at[i]; ++i) tbuf_poison(all.at[i]);
}

/* Frees buffers and checks their canaries. Skips a buffer that is all zero. */
MOEI_UNUSED static void tbufs_free(tbufs all)
{
    for (int i = 0; all.at[i]; ++i)
        if (all.at[i]->p) tbuf_free(all.at[i]);
}

/* Returns 1 where every buffer still holds its poison. */
MOEI_UNUSED static int tbufs_untouched(tbufs all)
{
    int untouched = 1;
    for (int i = 0; all.at[i] && untouched; ++i) untouched = tbuf_holds(all.at[i], 0);
    return untouched;
}

/* Makes a host copy of each buffer. tbufs_free_copies frees them. */
MOEI_UNUSED static void tbufs_copy(tbufs all, void** host)
{
    for (int i = 0; all.at[i]; ++i) host[i] = tbuf_copy(all.at[i]);
}

MOEI_UNUSED static void tbufs_free_copies(tbufs all, void** host)
{
    for (int i = 0; all.at[i]; ++i) free(host[i]);
}

/* Checks that each buffer holds its host copy. */
MOEI_UNUSED static void tbufs_same(tbufs all, void* const* host, const char* what)
{
    for (int i = 0; all.at[i]; ++i)
        CHECK(tbuf_holds(all.at[i], host[i]), "%s: %s differs", what, all.at[i]->name);
}

/* Bytes of p, a host copy of rows `stride` elements apart, that belong to none of the `cols`
   elements of the rows begin .. end and are no poison. */
MOEI_UNUSED static int64_t test_strays(const void* p, int64_t bytes, int elem, int64_t stride,
                                       int64_t cols, int64_t begin, int64_t end)
{
    const int64_t pitch = stride * elem;
    int64_t n = 0;
    for (int64_t row = 0; row * pitch < bytes; ++row) {
        const int64_t from = row * pitch + (row >= begin && row < end ? cols * elem : 0);
        const int64_t to = (row + 1) * pitch < bytes ? (row + 1) * pitch : bytes;
        for (int64_t i = from; i < to; ++i)
            n += ((const unsigned char*)p)[i] != test_poison_byte((size_t)i);
    }
    return n;
}

/* Is there room for so many bytes? What has none is left out of the test. */
MOEI_UNUSED static int test_has_memory(size_t bytes)
{
    size_t free_bytes, total;
    TEST_CUDA(cudaMemGetInfo(&free_bytes, &total));
    if (free_bytes >= bytes + ((size_t)1 << 28)) return 1;
    test_leave_out("%.1f GiB are free, %.1f needed", (double)free_bytes / (1 << 30),
                   (double)bytes / (1 << 30));
    return 0;
}

/* Rows so far apart that the last one begins past 2^32 elements: an offset in 32 bits, signed or
   not, misses it. All that is no row is poison; on the CPU only the zone behind each row is, so
   that the pages between are never touched. There these tests run in the preset `full` alone. */
#define TWIDE_SPAN (test_long() ? (int64_t)1 << 32 : (int64_t)0) /* to the last row, elements */
#define TWIDE_ZONE 64 /* elements behind each row that must stay poison */

typedef struct twide {
    char* p;
    int64_t rows, cols, stride;
    int elem; /* bytes of an element */
    const char* name;
} twide;

MOEI_UNUSED static void twide_poison(const twide* w)
{
#if MOE_ON_HOST
    for (int64_t i = 0; i < w->rows; ++i)
        test_poison_device(w->p + i * w->stride * w->elem,
                           (size_t)((w->cols + TWIDE_ZONE) * w->elem));
#else
    const int64_t elems = (w->rows - 1) * w->stride + w->cols + TWIDE_ZONE;
    test_poison_device(w->p, (size_t)(elems * w->elem));
#endif
}

MOEI_UNUSED static size_t twide_bytes(const twide* w)
{
    return (size_t)(((w->rows - 1) * w->stride + w->cols + TWIDE_ZONE) * w->elem);
}

/* Can there be wide rows of elements of so many bytes? First statement of a test that makes other
   checks too, so that it is skipped as a whole. */
MOEI_UNUSED static int twide_possible(int elem)
{
    if (TWIDE_SPAN == 0) {
        test_leave_out("rows far apart, on the CPU: preset full");
        return 0;
    }
    return MOE_ON_HOST || test_has_memory((size_t)TWIDE_SPAN * (size_t)elem);
}

/* 0 where they cannot be: 8 GiB for elements of 2 bytes, 16 GiB for those of 4. */
MOEI_UNUSED static int twide_new(twide* w, const char* name, int64_t rows, int64_t cols, int dtype)
{
    const int64_t least = cols + TWIDE_ZONE, apart = TWIDE_SPAN / (rows - 1);
    w->name = name;
    w->rows = rows;
    w->cols = cols;
    w->stride = ((least > apart ? least : apart) + 15) / 8 * 8;
    w->elem = moe_dtype_bytes(dtype);
    if (!twide_possible(w->elem)) return 0;
#if MOE_ON_HOST /* cudaMalloc would fill it all */
    w->p = (char*)mmap(0, twide_bytes(w), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (w->p == (char*)MAP_FAILED) {
        test_leave_out("no %.1f GiB of addresses", (double)twide_bytes(w) / (1 << 30));
        return 0;
    }
#else
    if (!test_has_memory(twide_bytes(w))) return 0;
    TEST_CUDA(cudaMalloc((void**)&w->p, twide_bytes(w)));
#endif
    twide_poison(w);
    return 1;
}

/* Fills the rows from dense ones. */
MOEI_UNUSED static void twide_put(const twide* w, const void* dense)
{
    const int64_t row = w->cols * w->elem;
    TEST_CUDA(cudaDeviceSynchronize());
    for (int64_t i = 0; i < w->rows; ++i)
        TEST_CUDA(cudaMemcpy(w->p + i * w->stride * w->elem, (const char*)dense + i * row,
                             (size_t)row, cudaMemcpyHostToDevice));
    TEST_CUDA(cudaDeviceSynchronize());
}

/* Do the rows hold these dense ones, bit for bit, and the zones behind them the poison? */
MOEI_UNUSED static int twide_holds(const twide* w, const void* dense)
{
    const int64_t row = w->cols * w->elem, both = row + TWIDE_ZONE * w->elem;
    unsigned char* got = (unsigned char*)test_host(both);
    int same = 1;
    TEST_CUDA(cudaDeviceSynchronize());
    for (int64_t i = 0; i < w->rows; ++i) {
        TEST_CUDA(cudaMemcpy(got, w->p + i * w->stride * w->elem, (size_t)both,
                             cudaMemcpyDeviceToHost));
        same &= CHECK(memcmp(got, (const char*)dense + i * row, (size_t)row) == 0,
                      "row %lld of %s, %lld elements apart", (long long)i, w->name,
                      (long long)w->stride);
        same &= CHECK(test_strays(got + row, both - row, 1, both, 0, 0, 0) == 0,
                      "what follows row %lld of %s was written", (long long)i, w->name);
    }
    free(got);
    return same;
}

MOEI_UNUSED static void twide_free(twide* w)
{
#if MOE_ON_HOST
    TEST_CUDA(cudaDeviceSynchronize());
    munmap(w->p, twide_bytes(w));
#else
    TEST_CUDA(cudaFree(w->p));
#endif
    w->p = 0;
}

/* A fault word on the device, holding `word`, and what it holds later. */
MOEI_UNUSED static tbuf tfault_new(uint64_t word) { return tbuf_from("fault", &word, 8, 0); }

MOEI_UNUSED static uint64_t tfault_word(const tbuf* b)
{
    uint64_t word;
    tbuf_get(b, &word);
    return word;
}

/* The rank that the tests' descriptors report. */
#define TEST_RANK 7

/* The word must hold exactly this fault, of that rank; code 0: none. */
#define CHECK_FAULT(buffer, code, index)                                                          \
    test_fault(tfault_word(buffer), (code), (index), __FILE__, __LINE__)
MOEI_UNUSED static int test_fault(uint64_t word, int code, int64_t index, const char* file,
                                  int line)
{
    const moe_fault f = moe_fault_decode(word);
    return test_check(f.code == code && f.rank == (code ? TEST_RANK : 0) && f.index == index, file,
                      line, "fault word", ": got \"%s\" at %lld, rank %d, expected \"%s\" at %lld",
                      moe_fault_text(f.code), (long long)f.index, f.rank, moe_fault_text(code),
                      (long long)index);
}

/* Something that queues work on a stream: one launch helper, or a chain of them. */
typedef moe_status (*test_call)(void* context, cudaStream_t stream);

/* Defines `name`, a test_call of the launch helper `function`; its context is a `desc`. */
#define TEST_CALL(name, function, desc)                                                            \
    static moe_status name(void* context, cudaStream_t stream)                                     \
    {                                                                                              \
        return function((const desc*)context, stream);                                             \
    }

/* Calls it `runs` times, with poisoned outputs each time; the outputs must hold the same bits
   every time. */
MOEI_UNUSED static void test_same_bits(const char* what, test_call call, void* context, tbufs out,
                                       int runs)
{
    void* first[TBUFS_MOST];
    for (int run = 0; run < runs; ++run) {
        char text[80];
        snprintf(text, sizeof text, "%s, run %d", what, run);
        tbufs_poison(out);
        CHECK_STATUS(call(context, test_now.stream), MOE_OK);
        if (run == 0) tbufs_copy(out, first);
        else tbufs_same(out, first, text);
    }
    tbufs_free_copies(out, first);
}

/* A captured graph. Capture in global mode refuses allocations and synchronising calls, so a
   helper that captures makes none. */
typedef struct tgraph {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
} tgraph;

MOEI_UNUSED static int tgraph_capture(tgraph* g, test_call call, void* context)
{
    moe_status s;
    TEST_CUDA(cudaDeviceSynchronize());
    TEST_CUDA(cudaStreamBeginCapture(test_now.stream, cudaStreamCaptureModeGlobal));
    s = call(context, test_now.stream);
    TEST_CUDA(cudaStreamEndCapture(test_now.stream, &g->graph));
    if (!CHECK_STATUS(s, MOE_OK)) return 0;
    TEST_CUDA(cudaGraphInstantiate(&g->exec, g->graph, 0));
    return 1;
}

MOEI_UNUSED static void tgraph_launch(tgraph* g)
{
    TEST_CUDA(cudaGraphLaunch(g->exec, test_now.stream));
}

MOEI_UNUSED static void tgraph_free(tgraph* g)
{
    TEST_CUDA(cudaDeviceSynchronize());
    TEST_CUDA(cudaGraphExecDestroy(g->exec));
    TEST_CUDA(cudaGraphDestroy(g->graph));
}

#endif
