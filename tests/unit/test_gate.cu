/* test_gate.cu: moe/gate.cuh against its reference in double.

     nvcc -I. -arch=sm_90a tests/unit/test_gate.cu -o test_gate
     g++ -x c++ -std=c++14 -O2 -I. tests/unit/test_gate.cu -o test_gate

   test_gate_shapes        every E with every K, the rest drawn
   test_gate_big_chunks    more tokens in a chunk than its thread block has in flight
   test_gate_all_experts   K = E: all experts in order
   test_gate_many_choices  the sum of many chosen weights
   test_gate_patterns      every pattern of logits, dtype, score and form of the kernel
   test_gate_alignment     addresses and strides of every remainder
   test_gate_no_tokens     T = 0
   test_gate_faults        NaN rows, the first one kept; a stop fault
   test_gate_refusals      every field, with its status; nothing is written
   test_gate_same_bits     the same bits over runs
   test_gate_graph         a captured gate replayed over other logits
   test_gate_large         large shapes, on a GPU
   test_gate_past_2_31     rows of logits past 2^32 elements
   test_gate_many_tokens   T so large that dense logits pass 2^32 elements */
#include "tests/test_gate.h"

#include "moe/ref/gate.h"

/* What the logits look like. */
enum {
    NORMAL,   /* O(1) */
    FEW,      /* three values: nearly everything is a tie */
    EQUAL,    /* one value */
    ZEROS,    /* +0 and -0: equals */
    INFINITE, /* some +inf, some -inf, rows of -inf, rows of +inf */
    WITH_NAN, /* every third row holds one NaN, of either sign */
    ALL_NAN,
    SPREAD,  /* up to +-80: most weights underflow */
    DEEP,    /* around -100: every sigmoid underflows */
    ROUNDED, /* steps of 1/4: some equal in most rows */
    PATTERNS
};

/* One case; zero means default, as in the descriptor. */
typedef struct gate_case {
    int T, E, K, dtype, score, renormalize, pattern;
    int pad;      /* stride - E */
    int misalign; /* of the logits, elements */
    int bare;     /* 1: neither counts nor fault word */
    float scale;
} gate_case;

/* Device memory of a case and the descriptor over it. */
typedef struct gate_bufs {
    tbuf logits, ids, weights, count, chunk, fault;
    moe_gate_desc d;
} gate_bufs;

static void fill_logits(void* p, const gate_case* c, trand* r)
{
    const int64_t stride = c->E + c->pad;
    /* the gaps between the rows are NaN: a kernel that reads them shows it */
    for (int64_t i = 0; i < c->T * stride; ++i) moe_store(p, i, c->dtype, NAN);
    for (int t = 0; t < c->T; ++t)
        for (int e = 0; e < c->E; ++e) {
            float v = trand_normal(r);
            if (c->pattern == FEW) v = (float)trand_int(r, -1, 1);
            if (c->pattern == EQUAL) v = 0.75f;
            if (c->pattern == ZEROS) v = trand_int(r, 0, 1) ? 0.0f : -0.0f;
            if (c->pattern == SPREAD) v *= 25.0f;
            if (c->pattern == DEEP) v = v * 4.0f - 100.0f;
            if (c->pattern == ROUNDED) v = rintf(v * 4.0f) / 4.0f;
            if (c->pattern == ALL_NAN) v = NAN;
            if (c->pattern == INFINITE) {
                const int64_t u = trand_int(r, 0, 9);
                if (u < 3 || t % 4 == 1) v = -INFINITY;
                else if ((u < 5 && t % 4 != 2) || t % 8 == 3) v = INFINITY;
            }
            moe_store(p, t * stride + e, c->dtype, v);
        }
    if (c->pattern == WITH_NAN)
        for (int t = 1; t < c->T; t += 3) {
            const float nan = moe_f32_from_bits(t & 1 ? 0x7fffffffu : 0xffffffffu);
            const int64_t at = t * stride + trand_int(r, 0, c->E - 1);
            moe_store(p, at, c->dtype, nan);
            if (c->dtype != MOE_FP32 && !(t & 1)) ((uint16_t*)p)[at] = 0xffff;
        }
}

static void bufs_new(gate_bufs* b, const gate_case* c, const void* logits)
{
    const size_t bytes = (size_t)moe_dtype_bytes(c->dtype), slots = (size_t)c->T * (size_t)c->K;
    const size_t extent = moe_extent(c->T, c->E + c->pad, c->E, c->dtype);
    memset(&b->d, 0, sizeof b->d);
    b->logits = tbuf_from("logits", logits, extent, (size_t)c->misalign * bytes);
    b->ids = tbuf_new("ids", slots * 4, 4);
    b->weights = tbuf_new("weights", slots * 4, 12);
    b->count = tbuf_new("expert_count", (size_t)c->E * 4, 4);
    b->chunk = tbuf_new("chunk_count", (size_t)(c->E * moe_num_chunks(c->T)) * 4, 8);
    b->fault = tfault_new(0);
    b->d.logits = b->logits.p;
    b->d.logits_dtype = c->dtype == MOE_FP32 ? MOE_DTYPE_DEFAULT : c->dtype;
    b->d.logits_stride = c->pad ? c->E + c->pad : 0;
    b->d.ids = (int32_t*)b->ids.p;
    b->d.weights = (float*)b->weights.p;
    if (!c->bare) {
        b->d.expert_count = (int32_t*)b->count.p;
        b->d.chunk_count = (int32_t*)b->chunk.p;
        b->d.fault = (uint64_t*)b->fault.p;
        b->d.rank = TEST_RANK;
    }
    b->d.num_tokens = c->T;
    b->d.num_experts = c->E;
    b->d.top_k = c->K;
    b->d.score = c->score;
    b->d.renormalize = c->renormalize;
    b->d.scale = c->scale;
}

static void bufs_free(gate_bufs* b)
{
    tbuf_free(&b->logits);
    tbuf_free(&b->ids);
    tbuf_free(&b->weights);
    tbuf_free(&b->count);
    tbuf_free(&b->chunk);
    tbuf_free(&b->fault);
}

static const char* case_text(const gate_case* c)
{
    static char text[160];
    snprintf(
        text, sizeof text,
        "T=%d E=%d K=%d %s score=%d renormalize=%d scale=%g pattern=%d pad=%d misalign=%d bare=%d",
        c->T, c->E, c->K, moe_dtype_name(c->dtype), c->score, c->renormalize, (double)c->scale,
        c->pattern, c->pad, c->misalign, c->bare);
    return text;
}

/* What the descriptor's outputs must be, given the logits, and that they are. */
static void compare(const gate_bufs* b, const gate_case* c, const void* logits)
{
    const int64_t slots = (int64_t)c->T * c->K, chunks = moe_num_chunks(c->T);
    int32_t* ids = (int32_t*)test_host(slots * 4);
    int32_t* count = (int32_t*)test_host(c->E * 4);
    int32_t* chunk = (int32_t*)test_host(c->E * chunks * 4);
    double* weights = (double*)test_host(slots * 8);
    const int before = test_now.failures;
    moe_ref_gate_desc r;
    int64_t first_nan;
    int32_t* got_ids = (int32_t*)tbuf_copy(&b->ids);
    float* got = (float*)tbuf_copy(&b->weights);
    memset(&r, 0, sizeof r);
    r.logits = logits;
    r.logits_stride = c->E + c->pad;
    r.logits_dtype = c->dtype;
    r.num_tokens = c->T;
    r.num_experts = c->E;
    r.top_k = c->K;
    r.score = c->score;
    r.renormalize = c->renormalize;
    r.scale = c->scale;
    first_nan = moe_ref_gate_f64(&r, ids, weights, count, chunk);

    CHECK_INTS("ids", got_ids, ids, slots);
    if (slots > 0 && c->pattern != ALL_NAN && (c->pattern != DEEP || c->renormalize))
        CHECK_CLOSE("weights", got, MOE_FP32, c->K, weights, (const double*)0, c->T, c->K);
    for (int64_t i = 0; i < slots; ++i) {
        /* nothing cancels, so each weight is right relatively as well; very small ones may
           underflow, and the zeros of -inf and of NaN rows are exact */
        const double error = fabs(got[i] - weights[i]);
        const double scale = c->scale == 0 ? 1 : fabs((double)c->scale);
        /* with the distance to the maximum; a sigmoid, with the logit */
        const double grows = c->pattern == SPREAD || c->pattern == DEEP ? 4 : 1;
        CHECK(error <= 4e-6 * grows * fabs(weights[i]) + scale * 1e-37,
              "weight of slot %lld: %.9g, not %.9g", (long long)i, (double)got[i], weights[i]);
    }
    if (c->bare) {
        CHECK(tbuf_holds(&b->count, 0) && tbuf_holds(&b->chunk, 0), "outputs that were not given");
        CHECK_FAULT(&b->fault, MOE_FAULT_NONE, 0);
    } else {
        int32_t* got_count = (int32_t*)tbuf_copy(&b->count);
        int32_t* got_chunk = (int32_t*)tbuf_copy(&b->chunk);
        CHECK_INTS("expert_count", got_count, count, c->E);
        CHECK_INTS("chunk_count", got_chunk, chunk, c->E * chunks);
        CHECK_FAULT(&b->fault, first_nan < 0 ? MOE_FAULT_NONE : MOE_FAULT_NAN_LOGIT,
                    first_nan < 0 ? 0 : first_nan);
        free(got_count);
        free(got_chunk);
    }
    if (test_now.failures > before) printf("  in: %s\n", case_text(c));
    free(ids);
    free(count);
    free(chunk);
    free(weights);
    free(got_ids);
    free(got);
}

static void run_case(const gate_case* c, trand* r)
{
    const int64_t stride = c->E + c->pad;
    void* logits = test_host(c->T * stride * 4);
    gate_bufs b;
    fill_logits(logits, c, r);
    bufs_new(&b, c, logits);
    CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
    compare(&b, c, logits);
    CHECK(tbuf_holds(&b.logits, logits), "the logits were written");
    bufs_free(&b);
    free(logits);
}

static gate_case random_case(trand* r, int T, int E, int K)
{
    gate_case c;
    memset(&c, 0, sizeof c);
    c.T = T;
    c.E = E;
    c.K = K;
    c.dtype = (int)trand_int(r, MOE_FP32, MOE_BF16);
    c.score = (int)trand_int(r, 0, 3);
    c.renormalize = (int)trand_int(r, 0, 1);
    c.scale = trand_int(r, 0, 3) ? 0.0f : 2.5f;
    c.pad = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 24);
    c.misalign = trand_int(r, 0, 1) ? 0 : (int)trand_int(r, 1, 9);
    c.bare = trand_int(r, 0, 5) == 0;
    return c;
}

/* Every E of the list with every K of the list, the rest drawn. */
static void test_gate_shapes(void)
{
    static const int Es[] = {1,   2,   3,   7,   8,   31,  32,  33,  63,   64,   65,   100, 128,
                             129, 200, 256, 257, 384, 512, 513, 1000, 1024, 1025, 1500};
    static const int Ks[] = {1, 2, 4, 6, 8, 9, 16, 17, 31, 32, 33, 64};
    static const int Ts[] = {1, 2, 5, 31, 32, 33, 64, 77};
    trand r = trand_new(1);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (size_t j = 0; j < sizeof Ks / sizeof *Ks; ++j) {
            gate_case c;
            if (Ks[j] > Es[i]) continue;
            c = random_case(&r, Ts[trand_int(&r, 0, MOE_ON_HOST && Ks[j] > 32 ? 2 : 7)], Es[i],
                            Ks[j]);
            run_case(&c, &r);
        }
}

/* More tokens in a chunk than its block has under way together. */
static void test_gate_big_chunks(void)
{
    static const int shape[][3] = {{2060, 600, 9}, {2060, 1030, 1}};
    trand r = trand_new(12);
    for (int i = 0; i < 2; ++i) {
        gate_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
        c.bare = 0;
        run_case(&c, &r);
    }
}

/* K = E: every expert is chosen, in order. */
static void test_gate_all_experts(void)
{
    static const int Es[] = {1, 3, 7, 8, 31, 32, 33, 64, 100, 257, 600};
    trand r = trand_new(2);
    for (size_t i = 0; i < sizeof Es / sizeof *Es; ++i)
        for (int pattern = 0; pattern < PATTERNS; ++pattern) {
            gate_case c = random_case(&r, Es[i] > 100 ? 3 : 35, Es[i], Es[i]);
            if (MOE_ON_HOST && Es[i] > 300 && pattern > FEW) continue;
            c.pattern = pattern;
            run_case(&c, &r);
        }
}

/* The sum of many chosen weights must be as exact as the weights are. */
static void test_gate_many_choices(void)
{
    trand r = trand_new(11);
    for (int score = 1; score <= 3; ++score) {
        gate_case c = random_case(&r, 2, 600, 600);
        c.dtype = MOE_FP32;
        c.score = score;
        c.renormalize = 1;
        c.pattern = FEW;
        run_case(&c, &r);
    }
}

/* Every pattern of logits in every dtype, score and form of the kernel. */
static void test_gate_patterns(void)
{
    static const int EK[][2] = {{8, 2},   {64, 8},    {100, 6}, {200, 8},
                                {384, 8}, {1000, 32}, {40, 33}};
    trand r = trand_new(3);
    for (size_t i = 0; i < sizeof EK / sizeof *EK; ++i)
        for (int pattern = 0; pattern < PATTERNS; ++pattern)
            for (int score = 1; score <= 3; ++score)
                for (int renormalize = 0; renormalize < 2; ++renormalize) {
                    gate_case c = random_case(&r, (int)trand_int(&r, 30, 40), EK[i][0], EK[i][1]);
                    if (MOE_ON_HOST && c.E >= 384 && renormalize) c.T = 9;
                    c.pattern = pattern;
                    c.score = score;
                    c.renormalize = renormalize;
                    c.bare = 0;
                    run_case(&c, &r);
                }
}

/* Base pointers and strides of every remainder, in every dtype. */
static void test_gate_alignment(void)
{
    static const int Es[] = {8, 60, 128, 256};
    trand r = trand_new(4);
    for (int dtype = MOE_FP32; dtype <= MOE_BF16; ++dtype)
        for (int misalign = 0; misalign < 9; ++misalign)
            for (int pad = 0; pad < 9; ++pad) {
                gate_case c = random_case(&r, 3, Es[(misalign + pad) % 4], 4);
                c.dtype = dtype;
                c.misalign = misalign;
                c.pad = pad;
                run_case(&c, &r);
            }
}

static void test_gate_no_tokens(void)
{
    trand r = trand_new(5);
    gate_case c = random_case(&r, 0, 17, 3);
    gate_bufs b;
    int32_t zeros[17];
    memset(zeros, 0, sizeof zeros);
    c.bare = 0;
    bufs_new(&b, &c, zeros);
    b.d.logits = 0; /* with no tokens nothing else is needed */
    b.d.ids = 0;
    b.d.weights = 0;
    CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.count, zeros), "expert_count is cleared");
    b.d.expert_count = 0;
    CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    bufs_free(&b);
}

/* The fault word: the first NaN row of many; kept over calls; a stop fault stops the gate. */
static void test_gate_faults(void)
{
    gate_case c;
    gate_bufs b;
    float* logits;
    uint64_t word;
    trand r = trand_new(6);
    memset(&c, 0, sizeof c);
    c.T = 200;
    c.E = 20;
    c.K = 3;
    c.dtype = MOE_FP32;
    logits = (float*)test_host(c.T * c.E * 4);
    fill_logits(logits, &c, &r);
    logits[37 * 20 + 19] = logits[38 * 20] = logits[36 * 20 + 5] = logits[199 * 20 + 7] = NAN;
    bufs_new(&b, &c, logits);
    for (int i = 0; i < 3; ++i) {
        CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
        CHECK_FAULT(&b.fault, MOE_FAULT_NAN_LOGIT, 36);
    }
    word = MOEI_FAULT_KEY(MOE_FAULT_NAN_LOGIT, TEST_RANK, 12); /* an earlier fault stays */
    tbuf_put(&b.fault, &word);
    CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NAN_LOGIT, 12);
    word = MOEI_FAULT_KEY(MOE_FAULT_BAD_PLACE, TEST_RANK, 0); /* one with a later code does not */
    tbuf_put(&b.fault, &word);
    CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
    CHECK_FAULT(&b.fault, MOE_FAULT_NAN_LOGIT, 36);
    word = MOEI_FAULT_KEY(MOE_FAULT_BAD_OFFSET, TEST_RANK, 4);
    tbuf_put(&b.fault, &word);
    tbuf_poison(&b.ids);
    tbuf_poison(&b.weights);
    tbuf_poison(&b.chunk);
    CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
    CHECK(tbuf_holds(&b.ids, 0) && tbuf_holds(&b.weights, 0) && tbuf_holds(&b.chunk, 0),
          "the gate ran on after a stop fault");
    CHECK_FAULT(&b.fault, MOE_FAULT_BAD_OFFSET, 4);
    bufs_free(&b);
    free(logits);
}

/* Every field, wrong in every way: its own status, and nothing is written. */
static void test_gate_refusals(void)
{
    gate_case c;
    gate_bufs b;
    moe_gate_desc good, d;
    void* logits;
    trand r = trand_new(7);
    memset(&c, 0, sizeof c);
    c.T = 33;
    c.E = 20;
    c.K = 3;
    c.dtype = MOE_FP32;
    c.pad = 20; /* a last row that dense strides would not reach */
    logits = test_host(c.T * (c.E + c.pad) * 4);
    fill_logits(logits, &c, &r);
    bufs_new(&b, &c, logits);
    good = b.d;
    CHECK_STATUS(moe_gate(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED_EACH(num_tokens, MOE_ERR_RANGE, num_tokens, -1, INT32_MIN);
    REFUSED_EACH(num_experts, MOE_ERR_RANGE, num_experts, 0, -8, MOE_MAX_EXPERTS + 1);
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, -1, 21);
    REFUSED_EACH(logits_dtype, MOE_ERR_DTYPE, logits_dtype, 4, -1);
    REFUSED_EACH(logits_stride, MOE_ERR_STRIDE, logits_stride, 19, -20, (int64_t)1 << 60);
    REFUSED(
        (d.num_tokens = 0, d.fault = (uint64_t*)((uintptr_t)(d.expert_count + 8) & ~(uintptr_t)7)),
        MOE_ERR_OVERLAP, fault);
    REFUSED_EACH(score, MOE_ERR_OPTION, score, MOE_SCORE_PIONEER + 1, -1);
    REFUSED_EACH(renormalize, MOE_ERR_OPTION, renormalize, 2, -1);
    REFUSED_EACH(scale, MOE_ERR_RANGE, scale, INFINITY, -INFINITY, NAN);
    REFUSED(d.logits = 0, MOE_ERR_NULL, logits);
    REFUSED(d.ids = 0, MOE_ERR_NULL, ids);
    REFUSED(d.weights = 0, MOE_ERR_NULL, weights);
    REFUSED(d.logits = (char*)d.logits + 2, MOE_ERR_ALIGN, logits);
    REFUSED((d.logits = (char*)d.logits + 1, d.logits_dtype = MOE_BF16), MOE_ERR_ALIGN, logits);
    REFUSED(d.ids = (int32_t*)((char*)d.ids + 1), MOE_ERR_ALIGN, ids);
    REFUSED(d.weights = (float*)((char*)d.weights + 2), MOE_ERR_ALIGN, weights);
    REFUSED(d.expert_count = (int32_t*)((char*)d.expert_count + 2), MOE_ERR_ALIGN, expert_count);
    REFUSED(d.chunk_count = (int32_t*)((char*)d.chunk_count + 3), MOE_ERR_ALIGN, chunk_count);
    REFUSED_RANK_AND_FAULT();
    REFUSED(d.ids = (int32_t*)d.logits, MOE_ERR_OVERLAP, ids);
    REFUSED(d.ids = (int32_t*)d.logits + 32 * 40 + 19, MOE_ERR_OVERLAP, ids);
    REFUSED(d.weights = (float*)d.logits + 32 * 40 + 19, MOE_ERR_OVERLAP, weights);
    REFUSED(d.expert_count = (int32_t*)d.logits + 32 * 40, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.chunk_count = (int32_t*)d.logits + 32 * 40 + 1, MOE_ERR_OVERLAP, chunk_count);
    REFUSED(d.fault = (uint64_t*)d.logits + 16 * 40 + 9, MOE_ERR_OVERLAP, fault);
    REFUSED(d.weights = (float*)d.logits, MOE_ERR_OVERLAP, weights);
    REFUSED(d.weights = (float*)d.ids + 98, MOE_ERR_OVERLAP, weights);
    REFUSED(d.expert_count = (int32_t*)d.logits + 5, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.expert_count = d.ids, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.expert_count = (int32_t*)d.weights - 19, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.chunk_count = d.expert_count, MOE_ERR_OVERLAP, chunk_count);
    REFUSED(d.chunk_count = (int32_t*)d.logits, MOE_ERR_OVERLAP, chunk_count);
    REFUSED(d.weights = (float*)d.chunk_count + 59, MOE_ERR_OVERLAP, chunk_count); /* 3 chunks */
    REFUSED(d.fault = (uint64_t*)d.logits, MOE_ERR_OVERLAP, fault);
    REFUSED(d.fault = (uint64_t*)((uintptr_t)(d.ids + 8) & ~(uintptr_t)7), MOE_ERR_OVERLAP, fault);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbuf_holds(&b.logits, logits), "logits");
    CHECK(tbuf_holds(&b.ids, 0) && tbuf_holds(&b.weights, 0), "ids, weights");
    CHECK(tbuf_holds(&b.count, 0) && tbuf_holds(&b.chunk, 0), "counts");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    CHECK_STATUS(moe_gate(&good, test_now.stream), MOE_OK);
    compare(&b, &c, logits);
    bufs_free(&b);
    free(logits);
}

static void test_gate_same_bits(void)
{
    static const int EK[][2] = {{128, 8}, {256, 8}, {1500, 4}, {60, 40}};
    trand r = trand_new(8);
    for (int i = 0; i < 4; ++i) {
        gate_case c = random_case(&r, 70, EK[i][0], EK[i][1]);
        void* logits = test_host(c.T * (c.E + c.pad) * 4);
        gate_bufs b;
        c.bare = 0;
        c.pattern = i & 1 ? FEW : NORMAL;
        fill_logits(logits, &c, &r);
        bufs_new(&b, &c, logits);
        test_same_bits("gate", call_gate, &b.d, TBUFS(&b.ids, &b.weights, &b.count, &b.chunk),
                       MOE_ON_HOST ? 4 : 100);
        compare(&b, &c, logits);
        bufs_free(&b);
        free(logits);
    }
}

/* A captured gate, launched again over other logits. */
static void test_gate_graph(void)
{
    trand r = trand_new(9);
    gate_case c = random_case(&r, 50, 128, 8);
    void* logits = test_host(c.T * (c.E + c.pad) * 4);
    const uint64_t no_fault = 0;
    gate_bufs b;
    tgraph g;
    c.bare = 0;
    fill_logits(logits, &c, &r);
    bufs_new(&b, &c, logits);
    CHECK_STATUS(moe_gate_preload(), MOE_OK);
    if (tgraph_capture(&g, call_gate, &b.d)) {
        CHECK(tbuf_holds(&b.ids, 0), "capture itself runs nothing");
        for (int i = 0; i < 5; ++i) {
            c.pattern = i == 2 ? FEW : i == 3 ? WITH_NAN : NORMAL;
            fill_logits(logits, &c, &r);
            tbuf_put(&b.logits, logits);
            tbuf_put(&b.fault, &no_fault);
            tbuf_poison(&b.ids);
            tbuf_poison(&b.weights);
            tgraph_launch(&g);
            compare(&b, &c, logits);
        }
        tgraph_free(&g);
    }
    bufs_free(&b);
    free(logits);
}

static void test_gate_large(void)
{
#if !MOE_ON_HOST
    static const int shape[][3] = {
        {32768, 128, 8}, {8192, 256, 8},  {4097, 384, 6},  {2000, 4096, 4}, {100003, 8, 2},
        {40001, 128, 8}, {70000, 64, 12}, {9001, 1024, 8}, {33333, 256, 20}};
    trand r = trand_new(10);
    for (int i = 0; i < 9; ++i) {
        gate_case c = random_case(&r, shape[i][0], shape[i][1], shape[i][2]);
        c.bare = 0;
        run_case(&c, &r);
    }
#endif
}

/* Rows of logits that lie past 2^32 elements: each way to read them, ties included. */
static void test_gate_past_2_31(void)
{
    static const int cases[][4] = {{MOE_BF16, 128, 8, NORMAL},  /* read eight at a time */
                                   {MOE_FP16, 100, 6, FEW},     /* singly; ties are done again */
                                   {MOE_BF16, 1500, 4, NORMAL}, /* more than the fast path has */
                                   {MOE_FP32, 64, 8, NORMAL}};
    trand r = trand_new(13);
    for (int i = 0; i < 4; ++i) {
        gate_case c = random_case(&r, 5, cases[i][1], cases[i][2]);
        gate_bufs b;
        twide wide;
        void* logits = test_host(c.T * c.E * 4);
        c.dtype = cases[i][0];
        c.pattern = cases[i][3];
        c.pad = c.misalign = c.bare = 0;
        fill_logits(logits, &c, &r);
        if (twide_new(&wide, "logits", c.T, c.E, c.dtype)) {
            twide_put(&wide, logits);
            bufs_new(&b, &c, logits);
            b.d.logits = wide.p;
            b.d.logits_stride = wide.stride;
            CHECK_STATUS(moe_gate(&b.d, test_now.stream), MOE_OK);
            compare(&b, &c, logits);
            CHECK(twide_holds(&wide, logits), "the logits were written");
            bufs_free(&b);
            twide_free(&wide);
        }
        free(logits);
    }
}

/* Logit e of token t, as its bits in bf16: the 1024 of a token are all different, in an order of
   the token's own, from -1 to 1. */
#define DISTINCT_E 1024
MOE_HOST_DEVICE uint16_t distinct_logit(int64_t t, int e)
{
    uint32_t h = (uint32_t)t * 0x9e3779b1u, i;
    h = (h ^ (h >> 15)) * 0x85ebca6bu;
    h ^= h >> 13;
    i = ((((uint32_t)e ^ h) & 1023) * (h >> 9 | 1) + (h >> 20)) & 1023; /* one to one in e */
    return (uint16_t)((i & 512) << 6 | (0x3d80 + (i & 511)));
}

typedef struct distinct_args {
    uint16_t* logits; /* [T, DISTINCT_E] */
    int64_t num_tokens;
} distinct_args;

MOE_KERNEL(256, 1) distinct_kernel(MOE_ARG(distinct_args) d)
{
    const int64_t pairs = d.num_tokens * (DISTINCT_E / 2), step = (int64_t)gridDim.x * 256;
    for (int64_t i = blockIdx.x * (int64_t)256 + threadIdx.x; i < pairs; i += step) {
        const int64_t t = i / (DISTINCT_E / 2);
        const int e = (int)(i % (DISTINCT_E / 2)) * 2;
        ((uint32_t*)d.logits)[i] =
            distinct_logit(t, e) | (uint32_t)distinct_logit(t, e + 1) << 16;
    }
}

/* So many tokens that dense logits pass 2^32 elements. Tokens around 2^31 and 2^32, the last ones
   and some of the rest against the reference; the counts in sum. */
static void test_gate_many_tokens(void)
{
    enum { E = DISTINCT_E, K = 8, SOME = MOE_ON_HOST ? 40 : 400 };
    const int64_t T = MOE_ON_HOST ? 150 : ((int64_t)1 << 22) + 4099;
    const int64_t chunks = moe_num_chunks(T);
    const size_t bytes = (size_t)T * E * 2;
    const int64_t special[] = {0, 1, (1 << 21) - 1, 1 << 21, (1 << 22) - 1, 1 << 22, T - 2, T - 1};
    uint16_t* logits = (uint16_t*)test_host(SOME * E * 2); /* of the tokens that are looked at */
    int32_t ids[SOME * K], want_ids[SOME * K];
    float weights[SOME * K];
    double want[SOME * K];
    int32_t *count, *chunk;
    int64_t total = 0, wrong = 0;
    void* d_logits;
    tbuf bi, bw, bc, bk, bf;
    distinct_args a;
    moe_gate_desc d;
    moe_ref_gate_desc ref;
    moe_launch_config c = moe_grid(MOE_ON_HOST ? 4 : 2048, 256, 0, test_now.stream);
    trand r = trand_new(14);
    if (!test_has_memory(bytes + (size_t)T * K * 8)) {
        free(logits);
        return;
    }
    TEST_CUDA(cudaMalloc(&d_logits, bytes));
    bi = tbuf_new("ids", (size_t)T * K * 4, 0);
    bw = tbuf_new("weights", (size_t)T * K * 4, 0);
    bc = tbuf_new("expert_count", E * 4, 0);
    bk = tbuf_new("chunk_count", (size_t)(E * chunks) * 4, 0);
    bf = tfault_new(0);
    a.logits = (uint16_t*)d_logits;
    a.num_tokens = T;
    CHECK_STATUS(MOE_LAUNCH(distinct_kernel, c, a), MOE_OK);
    memset(&d, 0, sizeof d);
    d.logits = d_logits;
    d.logits_dtype = MOE_BF16;
    d.ids = (int32_t*)bi.p;
    d.weights = (float*)bw.p;
    d.expert_count = (int32_t*)bc.p;
    d.chunk_count = (int32_t*)bk.p;
    d.fault = (uint64_t*)bf.p;
    d.rank = TEST_RANK;
    d.num_tokens = (int32_t)T;
    d.num_experts = E;
    d.top_k = K;
    CHECK_STATUS(moe_gate(&d, test_now.stream), MOE_OK);
    TEST_CUDA(cudaDeviceSynchronize());
    for (int i = 0; i < SOME; ++i) {
        const int64_t t = i < 8 && special[i] < T ? special[i] : trand_int(&r, 0, T - 1);
        for (int e = 0; e < E; ++e) logits[i * E + e] = distinct_logit(t, e);
        TEST_CUDA(cudaMemcpy(ids + i * K, d.ids + t * K, K * 4, cudaMemcpyDeviceToHost));
        TEST_CUDA(cudaMemcpy(weights + i * K, d.weights + t * K, K * 4, cudaMemcpyDeviceToHost));
    }
    memset(&ref, 0, sizeof ref);
    ref.logits = logits;
    ref.logits_dtype = MOE_BF16;
    ref.num_tokens = SOME;
    ref.num_experts = E;
    ref.top_k = K;
    ref.score = MOE_SCORE_SOFTMAX;
    moe_ref_gate_f64(&ref, want_ids, want, 0, 0);
    CHECK_INTS("ids", ids, want_ids, SOME * K);
    CHECK_CLOSE_RELATIVE("weights", weights, MOE_FP32, K, want, 4e-6, SOME, K);
    count = (int32_t*)tbuf_copy(&bc);
    chunk = (int32_t*)tbuf_copy(&bk);
    for (int e = 0; e < E; ++e) {
        int64_t sum = 0;
        for (int64_t k = 0; k < chunks; ++k) sum += chunk[k * E + e];
        wrong += sum != count[e];
        total += count[e];
    }
    CHECK(wrong == 0 && total == T * K, "%lld of %lld choices counted", (long long)total,
          (long long)(T * K));
    CHECK_FAULT(&bf, MOE_FAULT_NONE, 0);
    TEST_CUDA(cudaFree(d_logits));
    tbuf_free(&bi);
    tbuf_free(&bw);
    tbuf_free(&bc);
    tbuf_free(&bk);
    tbuf_free(&bf);
    free(logits);
    free(count);
    free(chunk);
}

int main(int argc, char** argv)
{
    test_begin(argc, argv);
    RUN(test_gate_shapes);
    RUN(test_gate_big_chunks);
    RUN(test_gate_all_experts);
    RUN(test_gate_many_choices);
    RUN(test_gate_patterns);
    RUN(test_gate_alignment);
    RUN(test_gate_no_tokens);
    RUN(test_gate_faults);
    RUN(test_gate_refusals);
    RUN(test_gate_same_bits);
    RUN(test_gate_graph);
    RUN(test_gate_large);
    RUN(test_gate_past_2_31);
    RUN(test_gate_many_tokens);
    return test_end();
}
