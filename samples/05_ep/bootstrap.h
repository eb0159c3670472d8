/* bootstrap.h: how the processes of a launcher find each other: rank and size from the environment
   of torchrun, mpirun (Open MPI) or srun, and an all-gather over TCP for moe_peers_create_ipc. Rank
   0 listens on MASTER_ADDR (127.0.0.1 by default), MASTER_PORT + 1 (29501 by default).

   Where a program has MPI or torch already, its own all-gather takes the place of this file. */
#ifndef MOE_SAMPLE_BOOTSTRAP_H
#define MOE_SAMPLE_BOOTSTRAP_H

#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define BOOTSTRAP_MOST 128

typedef struct bootstrap {
    int rank, ranks, local; /* local: number on this host */
    int fd[BOOTSTRAP_MOST]; /* of rank 0: to each rank; of others: [0] to rank 0 */
} bootstrap;

/* Returns the number in the first of these variables that is set, else -1. */
static int bootstrap_number(const char* a, const char* b, const char* c)
{
    const char* v = getenv(a);
    if (!v) v = getenv(b);
    if (!v) v = getenv(c);
    return v ? atoi(v) : -1;
}

/* Sends or receives all bytes; returns 0 on success. */
static int bootstrap_move(int fd, void* p, size_t bytes, int sending)
{
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = sending ? send(fd, (char*)p + done, bytes - done, MSG_NOSIGNAL)
                                  : recv(fd, (char*)p + done, bytes - done, 0);
        if (n <= 0) return 1;
        done += (size_t)n;
    }
    return 0;
}

/* moe_peers_allgather: every rank sends to rank 0, which sends all to every rank. */
static int bootstrap_allgather(void* context, const void* from, void* to, size_t bytes)
{
    bootstrap* b = (bootstrap*)context;
    const size_t all = bytes * (size_t)b->ranks;
    if (b->rank)
        return bootstrap_move(b->fd[0], (void*)from, bytes, 1) ||
               bootstrap_move(b->fd[0], to, all, 0);
    memcpy(to, from, bytes);
    for (int r = 1; r < b->ranks; ++r)
        if (bootstrap_move(b->fd[r], (char*)to + (size_t)r * bytes, bytes, 0)) return 1;
    for (int r = 1; r < b->ranks; ++r)
        if (bootstrap_move(b->fd[r], to, all, 1)) return 1;
    return 0;
}

/* Rank 0: accepts a connection of every rank. Returns 0 on success. */
static int bootstrap_listen(bootstrap* b, const struct addrinfo* at)
{
    const int yes = 1, s = socket(at->ai_family, SOCK_STREAM, 0);
    const struct timeval most = {60, 0}; /* that a rank may be late */
    if (s < 0) return 1;
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof most);
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(s, at->ai_addr, at->ai_addrlen) || listen(s, b->ranks)) return 1;
    for (int i = 1; i < b->ranks; ++i) {
        const int fd = accept(s, 0, 0);
        int rank;
        if (fd < 0 || bootstrap_move(fd, &rank, sizeof rank, 0)) return 1;
        if (rank < 1 || rank >= b->ranks) return 1;
        b->fd[rank] = fd;
    }
    close(s);
    return 0;
}

/* Another rank: connects to rank 0, for at most 30 s. */
static int bootstrap_connect(bootstrap* b, const struct addrinfo* at)
{
    for (int i = 0; i < 300; ++i) {
        const int s = socket(at->ai_family, SOCK_STREAM, 0);
        if (s >= 0 && !connect(s, at->ai_addr, at->ai_addrlen)) {
            b->fd[0] = s;
            return bootstrap_move(s, &b->rank, sizeof b->rank, 1);
        }
        if (s >= 0) close(s);
        usleep(100000);
    }
    return 1;
}

/* Fills in *b. Returns 1 where a launcher started this process, 0 where none did, -1 where the
   ranks do not find each other. */
static int bootstrap_begin(bootstrap* b)
{
    const char* host = getenv("MASTER_ADDR");
    const char* port = getenv("MASTER_PORT");
    struct addrinfo want, *at;
    char number[16];
    int failed;
    memset(b, 0, sizeof *b);
    b->rank = bootstrap_number("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID");
    b->ranks = bootstrap_number("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS");
    b->local = bootstrap_number("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID");
    if (b->rank < 0 || b->ranks < 1) return 0;
    if (b->local < 0) b->local = b->rank;
    if (b->rank >= b->ranks || b->ranks > BOOTSTRAP_MOST) return -1;
    if (b->ranks == 1) return 1;
    memset(&want, 0, sizeof want);
    want.ai_family = AF_INET;
    want.ai_socktype = SOCK_STREAM;
    snprintf(number, sizeof number, "%d", (port ? atoi(port) : 29500) + 1);
    if (getaddrinfo(host ? host : "127.0.0.1", number, &want, &at)) return -1;
    failed = b->rank ? bootstrap_connect(b, at) : bootstrap_listen(b, at);
    freeaddrinfo(at);
    return failed ? -1 : 1;
}

#endif
