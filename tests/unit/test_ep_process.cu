/* test_ep_process.cu: moe/ep between processes with CUDA IPC: one process a rank, spread over the
   GPUs that there are. Also ranks that are killed or stopped: the others end in time, name them, and
   go on as a smaller group; the rank that was stopped, or a new process in place of the killed one,
   joins again. On a GPU only.

     nvcc -I. -arch=sm_90a tests/unit/test_ep_process.cu -o test_ep_process

   The program starts itself once a rank: test_ep_process --child RANK RANKS FILE WHEN HOW. The
   ranks meet in a file in shared memory. */
#include "moe/ep/survive.h"
#include "tests/test.h"

#if MOE_ON_HOST

static void test_processes(void) { test_leave_out("CUDA IPC, on a GPU only"); }

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_processes);
    return test_end();
}

#else

#include "tests/unit/ep/process.h"

enum { NEVER, BEFORE_DISPATCH, BEFORE_COMBINE, IN_DISPATCH, IN_COMBINE }; /* when rank 1 goes */
enum { KILLED, STOPPED, JOINS }; /* JOINS: a new process in place of rank 1 */

/* moe_peers_agree: each rank that is left votes, and waits until all that it believes alive have. The
   rank that is lost does not call it. */
static int agree(void* context, const moe_peers_set* alive, moe_peers_set* agreed)
{
    member* me = (member*)context;
    const time_t begun = time(0);
    __sync_fetch_and_or(&me->m->votes, 1u << me->rank);
    while ((__sync_fetch_and_or(&me->m->votes, 0u) & alive->bits[0]) != alive->bits[0]) {
        if (time(0) - begun > 10) return 1;
        usleep(50);
    }
    *agreed = *alive;
    return 0;
}

static double now_ms(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void go(int how)
{
    if (how == KILLED) raise(SIGKILL);
    raise(SIGSTOP); /* until the parent wakes this process */
}

/* Connects `ranks` ranks, of which this one is number me->rank, in new memory. offset, replica: of
   moe_ep_shrink, or null; P: this rank's experts then. */
static void connect(state* s, party* p, int ranks, const int32_t* offset,
                    const moe_ep_expert* replica, int P)
{
    const int rank = s->rank;
    moe_peers_pair pair;
    moe_status e;
    char text[MOE_STATUS_TEXT];
    const uint64_t bytes = size_party(s, p, ranks);
    TEST_CUDA(cudaMalloc(&p->region, bytes));
    e = moe_peers_create_ipc(&p->peers, s->me.rank, ranks, 0, p->region, bytes, gather, &s->me,
                             &pair);
    CHILD_CHECK(e == MOE_OK, "%s: rank %d, rank %d", moe_status_describe(e, text), pair.from,
                pair.to);
    if (offset) {
        int32_t choice_offset[EXPERTS + 1], *d_offset;
        moe_ep_expert choice[EXPERTS], *d_choice;
        CHILD_CHECK(moe_ep_choose(p->peers.id, ranks, s->me.rank, offset, replica, EXPERTS,
                                  choice_offset, choice) == MOE_OK,
                    "replicas");
        TEST_CUDA(cudaMalloc((void**)&d_offset, sizeof choice_offset));
        TEST_CUDA(cudaMalloc((void**)&d_choice, sizeof choice));
        TEST_CUDA(
            cudaMemcpy(d_offset, choice_offset, sizeof choice_offset, cudaMemcpyHostToDevice));
        TEST_CUDA(cudaMemcpy(d_choice, choice, sizeof choice, cudaMemcpyHostToDevice));
        p->d.replica_offset = d_offset, p->d.replica = d_choice, p->d.num_local = P;
    }
    furnish(s, p);
}

/* One exchange in a group, and its check. Ids are those of `round`, but no expert of `without`, as
   from a gate that has it disabled. goes: when this rank goes, NEVER or how. Returns the fault
   word; the milliseconds from the call on to *ms. */
static uint64_t exchange(state* s, party* p, int round, const uint8_t* without, int goes, int how,
                         double* ms)
{
    const int rank = s->rank;
    int32_t list[TOKENS * TOP_K];
    scale_args a = {(const uint16_t*)p->v.recv_x,
                    p->v.row_slot,
                    p->v.expert_offset,
                    p->rows,
                    s->fault,
                    HIDDEN,
                    moe_ep_first(s->rank, EXPERTS, s->me.ranks),
                    p->v.num_local};
    moe_launch_config l = moe_grid(8, HIDDEN, 0, s->stream);
    uint64_t word;
    double begun;
    put_ids(s, round, without, list);
    if (goes == BEFORE_DISPATCH) go(how);
    begun = now_ms();
    CHILD_CHECK(moe_ep_dispatch(&p->d, s->stream) == MOE_OK, "dispatch");
    if (goes == IN_DISPATCH) go(how); /* its kernels may be running */
    CHILD_CHECK(MOE_LAUNCH(scale_rows, l, a) == MOE_OK, "rows");
    if (goes == BEFORE_COMBINE) {
        TEST_CUDA(cudaStreamSynchronize(s->stream));
        go(how);
    }
    CHILD_CHECK(moe_ep_combine(&p->c, s->stream) == MOE_OK, "combine");
    if (goes == IN_COMBINE) go(how);
    TEST_CUDA(cudaStreamSynchronize(s->stream));
    *ms = now_ms() - begun;
    TEST_CUDA(cudaMemcpy(&word, s->fault, 8, cudaMemcpyDeviceToHost));
    if (!word) check_y(s, round, list);
    return word;
}

/* Goes on without the late rank: agreement, a new group, an exchange. Returns the milliseconds. */
static double go_on(state* s, const party* old, party* p, uint64_t word)
{
    const int rank = s->rank, all = s->me.ranks;
    const double begun = now_ms();
    moe_peers_survivors left;
    int32_t offset[EXPERTS + 1];
    moe_ep_expert replica[EXPERTS];
    uint8_t disabled[EXPERTS];
    double ms;
    CHILD_CHECK(moe_peers_survive(&old->peers, word, agree, &s->me, &left) == MOE_OK, "survive");
    CHILD_CHECK(left.num_ranks == all - 1 && left.new_rank[1] == -1, "%d left", left.num_ranks);
    CHILD_CHECK(moe_ep_shrink(&left, all, 0, 0, EXPERTS, offset, replica, disabled) == MOE_OK,
                "shrink");
    TEST_CUDA(cudaMemset(s->fault, 0, 8));
    s->me.rank = left.rank, s->me.ranks = left.num_ranks, s->me.round = 4;
    connect(s, p, left.num_ranks, offset, replica, moe_ep_owned(rank, EXPERTS, all));
    s->me.ranks = all; /* experts are numbered as before */
    word = exchange(s, p, 7, disabled, NEVER, 0, &ms);
    CHILD_CHECK(word == 0, "a fault in the smaller group, %llx", (unsigned long long)word);
    ms = now_ms() - begun;
    s->me.rank = rank;
    __sync_fetch_and_add(&s->me.m->went, 1u);
    return ms;
}

/* One rank: exchanges in a row; in round 2 rank 1 goes; the others go on, then all together again.
   Returns 0 where all was as it should be. */
static int child(int rank, int ranks, const char* path, int when, int how)
{
    static state s;
    static party all, few, again;
    int devices = 0;
    double ms, after = 0;
    begin(&s, rank, ranks, path);
    TEST_CUDA(cudaGetDeviceCount(&devices));
    if (how != JOINS) {
        uint64_t word = 0;
        connect(&s, &all, ranks, 0, 0, 0);
        CHILD_CHECK(all.peers.ranks_on_device == (ranks + devices - 1) / devices || ranks % devices,
                    "%d ranks on this device", all.peers.ranks_on_device);
        for (int round = 0; round < ROUNDS && !word; ++round) {
            const int goes = rank == 1 && round == 2 ? when : NEVER;
            word = exchange(&s, &all, round, 0, goes, how, &ms);
            CHILD_CHECK(!word || (when != NEVER && round >= 2), "round %d: a fault, %llx", round,
                        (unsigned long long)word);
        }
        CHILD_CHECK(!word == (when == NEVER), "rank 1 went and nothing showed");
        if (word) { /* the rank that is gone, in time; this process and its memory still work */
            const moe_peers_late late = moe_peers_late_decode(word);
            CHILD_CHECK(late.late == 1 && late.tag == 3, "late %d, phase %d, tag %d", late.late,
                        late.phase, late.tag);
            CHILD_CHECK(rank == 1 || when > BEFORE_COMBINE ||
                            late.phase ==
                                (when == BEFORE_DISPATCH ? MOE_PHASE_DISPATCH : MOE_PHASE_COMBINE),
                        "phase %d", late.phase);
            CHILD_CHECK(rank == 1 || ms < 300 + 700, "%.0f ms", ms);
            if (rank != 1) after = go_on(&s, &all, &few, word);
        }
    }
    if (when != NEVER) { /* all ranks again */
        uint64_t word;
        TEST_CUDA(cudaMemset(s.fault, 0, 8));
        s.me.round = 8;
        connect(&s, &again, ranks, 0, 0, 0);
        for (int round = 0; round < 3; ++round) {
            word = exchange(&s, &again, round, 0, NEVER, 0, &ms);
            CHILD_CHECK(word == 0, "joined again: a fault, %llx", (unsigned long long)word);
        }
        if (rank == 0)
            printf("  %d ranks: goes on %.0f ms after the wait was over\n", ranks - 1, after);
    }
    s.me.round = 12;
    CHILD_CHECK(!gather(&s.me, &rank, s.host, 4), "the last meeting"); /* nobody frees too early */
    if (all.region) CHILD_CHECK(moe_peers_close_ipc(&all.peers) == MOE_OK, "close");
    if (few.region) CHILD_CHECK(moe_peers_close_ipc(&few.peers) == MOE_OK, "close");
    if (again.region) CHILD_CHECK(moe_peers_close_ipc(&again.peers) == MOE_OK, "close");
    CHILD_CHECK(!gather(&s.me, &rank, s.host, 4), "closed");
    TEST_CUDA(cudaFree(all.region));
    TEST_CUDA(cudaFree(few.region));
    TEST_CUDA(cudaFree(again.region));
    return 0;
}

/* Starts `ranks` children and waits; rank 1 goes at `when`, and comes back when the others have gone
   on. */
static void processes(int ranks, int when, int how)
{
    char path[] = "/dev/shm/moe_ep_XXXXXX";
    const int fd = mkstemp(path);
    const meeting* m;
    pid_t pid[MOST];
    if (!CHECK(fd >= 0 && ftruncate(fd, sizeof(meeting)) == 0, "no shared memory")) return;
    m = (const meeting*)mmap(0, sizeof(meeting), PROT_READ, MAP_SHARED, fd, 0);
    if (!CHECK(m != (const meeting*)MAP_FAILED, "no shared memory")) return;
    fflush(stdout);
    for (int r = 0; r < ranks; ++r) pid[r] = start(r, ranks, path, when, how);
    if (when != NEVER) {
        for (int i = 0; i < 60000 && *(const volatile uint32_t*)&m->went < (uint32_t)ranks - 1; ++i)
            usleep(1000);
        CHECK(m->went == (uint32_t)ranks - 1, "%u ranks went on", m->went);
        if (how == STOPPED) {
            kill(pid[1], SIGCONT);
        } else {
            int status = 0;
            waitpid(pid[1], &status, 0);
            CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %x", status);
            pid[1] = start(1, ranks, path, when, JOINS);
        }
    }
    for (int r = ranks - 1; r >= 0; --r) {
        int status = 0;
        waitpid(pid[r], &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0,
              "%d ranks, rank 1 goes at %d (%d): rank %d: status %x", ranks, when, how, r, status);
    }
    munmap((void*)m, sizeof(meeting));
    close(fd);
    unlink(path);
}

static void test_processes(void)
{
    processes(2, NEVER, 0);
    processes(4, NEVER, 0);
}

static void test_killed(void)
{
    for (int when = BEFORE_DISPATCH; when <= IN_COMBINE; ++when) processes(4, when, KILLED);
}

static void test_stopped(void)
{
    for (int when = BEFORE_DISPATCH; when <= BEFORE_COMBINE; ++when) processes(4, when, STOPPED);
}

int main(int argc, char** argv)
{
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    if (argc == 7 && !strcmp(argv[1], "--child"))
        return child(atoi(argv[2]), atoi(argv[3]), argv[4], atoi(argv[5]), atoi(argv[6]));
    test_begin(argc, argv);
    RUN(test_processes);
    RUN(test_killed);
    RUN(test_stopped);
    return test_end();
}

#endif
