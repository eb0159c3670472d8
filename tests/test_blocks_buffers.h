/* test_blocks_buffers.h: several buffers at once, for the tests of the block-sparse stations.
   Included after test.h.

     tbufs out = {{&b.y, &b.dx}};
     void* first[2];
     tbufs_copy(&out, first);          // new host copies
     tbufs_poison(&out);
     ...
     CHECK(tbufs_untouched(&out));
     tbufs_same(&out, first, "again"); // a check for each buffer
     tbufs_free_copies(&out, first);
     tbufs_free(&out); */
#ifndef MOE_TESTS_TEST_BLOCKS_BUFFERS_H
#define MOE_TESTS_TEST_BLOCKS_BUFFERS_H

#define TBUFS_MOST 16

/* Buffers up to the first null. */
typedef struct tbufs {
    tbuf* at[TBUFS_MOST + 1];
} tbufs;

MOEI_UNUSED static int tbufs_count(const tbufs* all)
{
    int n = 0;
    while (all->at[n]) ++n;
    return n;
}

MOEI_UNUSED static void tbufs_poison(const tbufs* all)
{
    for (int i = 0; all->at[i]; ++i) tbuf_poison(all->at[i]);
}

MOEI_UNUSED static void tbufs_free(const tbufs* all)
{
    for (int i = 0; all->at[i]; ++i) tbuf_free(all->at[i]);
}

/* Returns 1 where every buffer still holds its poison. */
MOEI_UNUSED static int tbufs_untouched(const tbufs* all)
{
    int untouched = 1;
    for (int i = 0; all->at[i]; ++i) untouched &= tbuf_holds(all->at[i], 0);
    return untouched;
}

/* Makes a host copy of each buffer. tbufs_free_copies frees them. */
MOEI_UNUSED static void tbufs_copy(const tbufs* all, void** host)
{
    for (int i = 0; all->at[i]; ++i) host[i] = tbuf_copy(all->at[i]);
}

MOEI_UNUSED static void tbufs_free_copies(const tbufs* all, void** host)
{
    for (int i = 0; all->at[i]; ++i) free(host[i]);
}

/* Checks that each buffer holds its host copy. */
MOEI_UNUSED static void tbufs_same(const tbufs* all, void* const* host, const char* what)
{
    for (int i = 0; all->at[i]; ++i)
        CHECK(tbuf_holds(all->at[i], host[i]), "%s of %s differs", all->at[i]->name, what);
}

/* Returns n zeros in host memory. */
MOEI_UNUSED static double* tzeros(int64_t n)
{
    double* p = (double*)test_host(n * 8);
    for (int64_t i = 0; i < n; ++i) p[i] = 0;
    return p;
}

#endif
