/* refusals.h: what the layer refuses.

     test_layer_refusals  refuses each wrong field with its own status, and queues nothing
     test_layer_overlaps  refuses y, the fault word, the workspace and optional outputs that overlap
                          anything else, and names them */
#ifndef MOE_TESTS_LAYER_REFUSALS_H
#define MOE_TESTS_LAYER_REFUSALS_H

#include "tests/unit/layer/compare.h"

TEST_REFUSED(calls_refuse, moe_layer_forward, moe_layer_prepare, moe_layer)
TEST_REFUSED_PLAN(refused, moe_layer_plan, calls_refuse, moe_layer)

/* Returns a case that uses every buffer which the layer may refuse, but the optional outputs. */
static layer_case refusal_case(int T, int H, int I, int E, int K, int from)
{
    layer_case c = normal_case(T, H, I, E, K);
    c.from = from;
    c.bias = c.shared_weighted = c.shared_bias = 1;
    c.residual = RESIDUAL;
    c.shared = 24;
    return c;
}

static void test_layer_refusals(void)
{
    char* const far = TEST_FAR;
    trand r = trand_new(14);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        enum { T = 20, H = 64, I = 40, E = 4, K = 2 };
        layer_case c = refusal_case(T, H, I, E, K, from);
        layer_bufs b;
        moe_layer_desc good, d;
        bufs_new(&b, &c, &r);
        good = b.d;
        CHECK_STATUS(moe_layer_forward(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
        REFUSED_MLP();
        REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
        REFUSED((d.num_tokens = INT32_MAX), MOE_ERR_RANGE, num_tokens);
        REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, -1, MOE_COMBINE_MAX_TOP_K + 1);
        if (from != FROM_IDS) {
            REFUSED(d.top_k = E + 1, MOE_ERR_RANGE, top_k);
            REFUSED_EACH(gate.score, MOE_ERR_OPTION, score, 99, -1);
        } else {
            REFUSED(d.gate.score = MOE_SCORE_SIGMOID, MOE_ERR_CONFLICT, gate); /* none runs */
            REFUSED(d.gate.renormalize = 1, MOE_ERR_CONFLICT, gate);
            REFUSED(d.gate.scale = 2.5f, MOE_ERR_CONFLICT, gate);
            REFUSED(d.gate.whole_batch = 1, MOE_ERR_CONFLICT, gate);
            REFUSED(d.gate.expert_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, gate);
        }
        if (from != FROM_IDS) {
            REFUSED_EACH(gate.renormalize, MOE_ERR_OPTION, renormalize, 2, -1);
            REFUSED_EACH(gate.scale, MOE_ERR_RANGE, scale, INFINITY, NAN);
            REFUSED(d.weights = (const float*)b.weights.p, MOE_ERR_CONFLICT, weights);
        }
        /* fields that the layer fills in itself */
        REFUSED(d.gate.logits = b.logits.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.logits_stride = E, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.logits_dtype = MOE_FP32, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.ids = (int32_t*)b.ids.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.weights = (float*)b.weights.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.chunk_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.rank = 1, MOE_ERR_CONFLICT, gate);
        REFUSED(d.route.rank = 1, MOE_ERR_CONFLICT, route);
        REFUSED(d.gate.fault = d.fault, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.num_tokens = T, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.num_experts = E, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.top_k = K, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.workspace = b.y.p, MOE_ERR_CONFLICT, gate);
        REFUSED(d.gate.workspace_bytes = 4, MOE_ERR_CONFLICT, gate);
        REFUSED(d.route.ids = (const int32_t*)b.ids.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.weights = (const float*)b.weights.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.chunk_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.expert_count = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.expert_offset = (int32_t*)b.gate_count.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.row_slot = (int32_t*)b.slot_row.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.place = (moe_place*)b.y.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.fault = d.fault, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.num_tokens = T, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.num_experts = E, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.top_k = K, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.place_kind = MOE_PLACE_BY_EXPERT, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.workspace = b.y.p, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.workspace_bytes = 4, MOE_ERR_CONFLICT, route);
        REFUSED(d.route.row_multiple = -1, MOE_ERR_RANGE, row_multiple);
        REFUSED(d.route.capacity = -1, MOE_ERR_RANGE, capacity);
        REFUSED(d.route.drop_rule = MOE_DROP_BY_WEIGHT, MOE_ERR_CONFLICT, drop_rule);
        REFUSED(d.route.num_replicas = E + 1, MOE_ERR_CONFLICT, num_replicas);
        REFUSED(d.route.slot_row = (int32_t*)AT(b.slot_row.p, 2), MOE_ERR_ALIGN, slot_row);
        /* the shared expert, named as one field */
        REFUSED(d.shared.intermediate = -8, MOE_ERR_RANGE, shared);
        REFUSED(d.shared.intermediate = 12, MOE_ERR_MULTIPLE, shared);
        REFUSED(d.shared.intermediate = 0, MOE_ERR_CONFLICT, shared);
        REFUSED(d.shared.w1.base = 0, MOE_ERR_NULL, shared);
        REFUSED(d.shared.w2.base = 0, MOE_ERR_NULL, shared);
        REFUSED(d.shared.w1.base = AT(d.shared.w1.base, 8), MOE_ERR_ALIGN, shared);
        REFUSED(d.shared.w2.row_stride = 8, MOE_ERR_STRIDE, shared);
        REFUSED(d.shared.bias1 = AT(b.shared.bias1.p, 1), MOE_ERR_ALIGN, shared);
        REFUSED(d.shared.activation = -1, MOE_ERR_OPTION, shared);
        REFUSED(d.shared.gate_up = 9, MOE_ERR_OPTION, shared);
        REFUSED(d.shared.alpha = 1, MOE_ERR_CONFLICT, shared);
        REFUSED(d.shared.limit = 1, MOE_ERR_CONFLICT, shared);
        REFUSED(d.shared.weight = (const float*)AT(b.shared_weight.p, 2), MOE_ERR_ALIGN,
                shared_weight);
        /* found where a kernel is chosen: earlier stations have been prepared */
        REFUSED((d.tile = MOE_TILE_128x256, d.w1.major = MOE_MAJOR_MN,
                 d.gate_up = MOE_GATE_UP_INTERLEAVED),
                MOE_ERR_CONFLICT, tile);
        REFUSED_EACH(y_stride, MOE_ERR_STRIDE, y_stride, 63, -64);
        REFUSED_EACH(residual_stride, MOE_ERR_STRIDE, residual_stride, 63, -64);
        REFUSED(d.gate_up = MOE_GATE_UP_SEPARATE, MOE_ERR_NULL, w1);
        REFUSED((d.gate_up = MOE_GATE_UP_SEPARATE, d.w1.up = AT(d.w1.base, 8)), MOE_ERR_ALIGN, w1);
        REFUSED((d.gate_up = MOE_GATE_UP_SEPARATE, d.w1.up_table = (const void* const*)AT(far, 4)),
                MOE_ERR_ALIGN, w1);
        REFUSED((d.shared.w1.base = 0, d.shared.w1.table = (const void* const*)AT(far, 4)),
                MOE_ERR_ALIGN, shared);
        REFUSED((d.shared.w2.base = 0, d.shared.w2.table = (const void* const*)AT(far, 4)),
                MOE_ERR_ALIGN, shared);
        REFUSED(d.shared.gate_up = MOE_GATE_UP_SEPARATE, MOE_ERR_NULL, shared);
        REFUSED(d.shared.bias2 = AT(d.shared.bias2, 1), MOE_ERR_ALIGN, shared);
        REFUSED(d.route.replica_offset = (const int32_t*)AT(far, 2), MOE_ERR_ALIGN, replica_offset);
        REFUSED((d.route.replica_offset = (const int32_t*)far,
                 d.route.replica_expert = (const int32_t*)AT(far, 2)),
                MOE_ERR_ALIGN, replica_expert);
        REFUSED(d.route.drop_count = (int32_t*)AT(far, 2), MOE_ERR_ALIGN, drop_count);
        REFUSED(d.route.row_weight = (float*)AT(far, 2), MOE_ERR_ALIGN, row_weight);
        if (from != FROM_IDS) {
            REFUSED(d.gate.expert_bias = (const float*)AT(far, 2), MOE_ERR_ALIGN, expert_bias);
            REFUSED((d.gate.seed_offset = (const uint64_t*)AT(far, 4), d.gate.noise = 1),
                    MOE_ERR_ALIGN, seed_offset);
            REFUSED(d.gate.expert_count = (int32_t*)AT(far, 2), MOE_ERR_ALIGN, expert_count);
        }
        REFUSED(d.x = AT(d.x, 1), MOE_ERR_ALIGN, x);
        REFUSED(d.y = 0, MOE_ERR_NULL, y);
        REFUSED(d.y = AT(d.y, 1), MOE_ERR_ALIGN, y);
        REFUSED(d.residual = AT(d.residual, 1), MOE_ERR_ALIGN, residual);
        REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
        REFUSED(d.workspace = AT(d.workspace, 128), MOE_ERR_ALIGN, workspace);
        REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED(d.workspace_bytes = 0, MOE_ERR_WORKSPACE, workspace_bytes);
        REFUSED((d.workspace_bytes -= 256, d.fault = (uint64_t*)AT(d.workspace, d.workspace_bytes)),
                MOE_ERR_WORKSPACE, workspace_bytes); /* the fault word where the workspace ends */
        REFUSED((d.num_tokens = 0, d.workspace = 0), MOE_ERR_NULL, workspace);
        REFUSED((d.num_tokens = 0, d.workspace = AT(d.workspace, 128)), MOE_ERR_ALIGN, workspace);
        if (from == FROM_ROUTER) {
            REFUSED(d.router = 0, MOE_ERR_NULL, router);
            REFUSED(d.router = AT(d.router, 1), MOE_ERR_ALIGN, router);
            REFUSED_EACH(router_dtype, MOE_ERR_DTYPE, router_dtype, 4, -1);
            REFUSED(d.logits = (const float*)b.logits.p, MOE_ERR_CONFLICT, router);
            REFUSED((d.ids = (const int32_t*)b.ids.p, d.weights = (const float*)b.weights.p),
                    MOE_ERR_CONFLICT, router);
        } else if (from == FROM_LOGITS) {
            REFUSED(d.logits = (const float*)AT(d.logits, 2), MOE_ERR_ALIGN, logits);
            REFUSED((d.ids = (const int32_t*)b.ids.p, d.weights = (const float*)b.weights.p),
                    MOE_ERR_CONFLICT, logits);
        } else {
            REFUSED(d.weights = 0, MOE_ERR_NULL, weights);
            REFUSED(d.ids = (const int32_t*)AT(d.ids, 2), MOE_ERR_ALIGN, ids);
            REFUSED(d.weights = (const float*)AT(d.weights, 2), MOE_ERR_ALIGN, weights);
        }
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0), "a refused call wrote an output");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        run_bufs(&b, &c);
    }
}

static void test_layer_overlaps(void)
{
    trand r = trand_new(15);
    for (int from = FROM_ROUTER; from <= FROM_IDS; ++from) {
        enum { T = 20, H = 64, I = 40, E = 4, K = 2 };
        layer_case c = refusal_case(T, H, I, E, K, from);
        layer_bufs b;
        moe_layer_desc good, d;
        tbuf table, arena, prob = tbuf_new("prob_sum", E * 4, 4);
        void* address[E];
        c.router_dtype = MOE_FP32;
        c.outputs = 1;
        c.replicas = E;
        bufs_new(&b, &c, &r);
        if (from != FROM_IDS) { /* prob_sum takes workspace */
            b.d.gate.prob_sum = (float*)prob.p;
            fit_workspace(&b, &c);
        }
        arena = tbuf_new("arena", b.workspace.bytes + 65536, 0); /* a workspace and any input */
        for (int e = 0; e < E; ++e) address[e] = b.mlp.w1.part[0][0].p;
        table = tbuf_from("table", address, sizeof address, 0);
        good = b.d;
        good.fault = 0; /* y may end behind what it overlaps */
        REFUSED(d.y = AT(d.x, 16), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = (void*)d.x, d.y_stride = 72), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.residual, 16), MOE_ERR_OVERLAP, y);
        REFUSED((d.y = (void*)d.residual, d.y_stride = 72), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.w1.base, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.w1.base, E * 2 * I * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.w2.base, E * I * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.bias1, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.bias2, MOE_ERR_OVERLAP, y);
        REFUSED((d.w2.base = 0, d.w2.table = (const void* const*)table.p, d.y = table.p),
                MOE_ERR_OVERLAP, y);
        if (from == FROM_ROUTER) {
            REFUSED(d.y = (void*)d.router, MOE_ERR_OVERLAP, y);
            REFUSED(d.y = AT(d.router, E * H * 4 - 16), MOE_ERR_OVERLAP, y);
        } else if (from == FROM_LOGITS) {
            REFUSED(d.y = (void*)d.logits, MOE_ERR_OVERLAP, y);
        } else {
            REFUSED(d.y = (void*)d.ids, MOE_ERR_OVERLAP, y);
            REFUSED(d.y = (void*)d.weights, MOE_ERR_OVERLAP, y);
        }
        REFUSED(d.y = (void*)d.shared.w1.base, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.shared.w1.base, 2 * 24 * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = AT(d.shared.w2.base, 24 * H * 2 - 16), MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.shared.bias1, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.shared.bias2, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.shared.weight, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.route.replica_offset, MOE_ERR_OVERLAP, y);
        REFUSED(d.y = (void*)d.route.replica_expert, MOE_ERR_OVERLAP, y);
        REFUSED(d.route.slot_row = (int32_t*)DOWN_TO(AT(d.y, 64), 4), MOE_ERR_OVERLAP, slot_row);
        REFUSED(d.route.row_weight = (float*)d.x, MOE_ERR_OVERLAP, row_weight);
        REFUSED(d.route.row_weight = (float*)AT(d.workspace, 512), MOE_ERR_OVERLAP, row_weight);
        REFUSED(d.route.drop_count = (int32_t*)d.w1.base, MOE_ERR_OVERLAP, drop_count);
        if (from != FROM_IDS) {
            REFUSED(d.gate.expert_bias = (const float*)DOWN_TO(AT(d.y, 8), 4), MOE_ERR_OVERLAP, y);
            REFUSED(d.gate.expert_disabled = (const uint8_t*)d.y, MOE_ERR_OVERLAP, y);
            REFUSED(d.gate.token_disabled = (const uint8_t*)d.y, MOE_ERR_OVERLAP, y);
            REFUSED(d.gate.expert_count = (int32_t*)d.shared.w1.base, MOE_ERR_OVERLAP,
                    expert_count);
#define OVER(p) REFUSED(d.gate.prob_sum = (float*)DOWN_TO(p, 4), MOE_ERR_OVERLAP, prob_sum)
            OVER(d.x);
            OVER(d.y);
            OVER(AT(d.y, 64));
            OVER(d.residual);
            OVER(from == FROM_ROUTER ? d.router : d.logits);
            OVER(d.w1.base);
            OVER(d.w2.base);
            OVER(d.bias1);
            OVER(AT(d.bias1, E * I * 2)); /* a bias of an up */
            OVER(d.bias2);
            OVER(d.shared.w1.base);
            OVER(d.shared.w2.base);
            OVER(d.shared.bias1);
            OVER(d.shared.bias2);
            OVER(d.shared.weight);
            OVER(d.route.replica_offset);
            OVER(d.route.replica_expert);
            OVER(d.workspace);
            OVER(AT(d.workspace, d.workspace_bytes - 4));
            REFUSED((d.fault = b.d.fault, d.gate.prob_sum = (float*)b.d.fault), MOE_ERR_OVERLAP,
                    prob_sum);
            OVER(d.gate.expert_count);
#undef OVER
            REFUSED(d.gate.z_sum = (float*)DOWN_TO(d.y, 4), MOE_ERR_OVERLAP, z_sum);
            REFUSED(d.gate.z_sum = (float*)AT(d.gate.prob_sum, 4 * E - 4), MOE_ERR_OVERLAP, z_sum);
            REFUSED(d.route.drop_count = (int32_t*)d.gate.prob_sum, MOE_ERR_OVERLAP, drop_count);
            REFUSED((d.num_tokens = 0, d.fault = (uint64_t*)d.workspace), MOE_ERR_OVERLAP, fault);
            REFUSED(d.route.slot_row = (int32_t*)d.gate.prob_sum, MOE_ERR_OVERLAP, slot_row);
            REFUSED(d.route.row_weight = (float*)AT(d.gate.prob_sum, 4 * E - 4), MOE_ERR_OVERLAP,
                    row_weight);
            REFUSED(d.gate.expert_bias = d.gate.prob_sum, MOE_ERR_OVERLAP, prob_sum);
            REFUSED(d.gate.expert_disabled = (const uint8_t*)AT(d.gate.prob_sum, 4 * E - 1),
                    MOE_ERR_OVERLAP, prob_sum);
        }
        {
            char* const far = TEST_FAR;
            REFUSED((d.y = far, d.bias1 = far - E * 2 * I * 2 + 2), MOE_ERR_OVERLAP, y);
            REFUSED((d.y = far, d.shared.bias1 = far - 2 * 24 * 2 + 2), MOE_ERR_OVERLAP, y);
            REFUSED((d.x = far, d.x_stride = 72, d.y = far + (T - 1) * 72 * 2 + 126),
                    MOE_ERR_OVERLAP, y);
            REFUSED((d.residual = far, d.residual_stride = 71, d.y = far + (T - 1) * 71 * 2 + 126),
                    MOE_ERR_OVERLAP, y);
            REFUSED((d.residual = far, d.residual_stride = 71,
                     d.route.drop_count = (int32_t*)(far + (T - 1) * 71 * 2 + 126)),
                    MOE_ERR_OVERLAP, drop_count);
            REFUSED((d.y = far, d.y_stride = 71,
                     d.route.drop_count = (int32_t*)(far + (T - 1) * 71 * 2 + 126)),
                    MOE_ERR_OVERLAP, drop_count);
        }
        good.fault = b.d.fault;
        REFUSED(d.fault = (uint64_t*)d.x, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.shared.w1.base, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.y, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.residual, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.w1.base, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.w2.base, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.bias1, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.bias2, 8), 8), MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)d.workspace, MOE_ERR_OVERLAP, fault);
        REFUSED(d.fault = (uint64_t*)AT(d.workspace, d.workspace_bytes - 8), MOE_ERR_OVERLAP,
                fault);
        if (from == FROM_ROUTER) {
            REFUSED(d.fault = (uint64_t*)d.router, MOE_ERR_OVERLAP, fault);
        } else if (from == FROM_LOGITS) {
            REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.logits, 8), 8), MOE_ERR_OVERLAP, fault);
        } else {
            REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.ids, 8), 8), MOE_ERR_OVERLAP, fault);
            REFUSED(d.fault = (uint64_t*)DOWN_TO(AT(d.weights, 8), 8), MOE_ERR_OVERLAP, fault);
        }
        for (int end = 0; end < 2; ++end) { /* an input over its first or last bytes */
            void* const at = AT(arena.p, end ? good.workspace_bytes - 256 : 0);
            good.workspace = arena.p;
            REFUSED(d.x = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.y = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.residual = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.w1.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.w2.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.bias1 = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.bias2 = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.shared.w1.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.shared.w2.base = at, MOE_ERR_OVERLAP, workspace);
            REFUSED(d.shared.weight = (const float*)at, MOE_ERR_OVERLAP, workspace);
            if (from == FROM_ROUTER) {
                REFUSED(d.router = at, MOE_ERR_OVERLAP, workspace);
            } else if (from == FROM_LOGITS) {
                REFUSED(d.logits = (const float*)at, MOE_ERR_OVERLAP, workspace);
            } else {
                REFUSED(d.ids = (const int32_t*)at, MOE_ERR_OVERLAP, workspace);
                REFUSED(d.weights = (const float*)at, MOE_ERR_OVERLAP, workspace);
            }
            good.workspace = b.workspace.p;
        }
        TEST_CUDA(cudaDeviceSynchronize());
        CHECK(tbuf_holds(&b.y, 0) && tbuf_holds(&b.workspace, 0), "a refused call wrote an output");
        CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
        run_bufs(&b, &c);
        CHECK(tbuf_holds(&arena, 0), "the arena was written");
        tbufs_free(TBUFS(&arena, &prob, &table));
    }
}

static void layer_refusals(void)
{
    RUN(test_layer_refusals);
    RUN(test_layer_overlaps);
}

#endif
