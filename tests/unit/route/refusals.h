/* refusals.h: descriptors that route refuses.

   test_route_refusals   every field, wrong in every way: its own status, and nothing is written */
#ifndef MOE_TESTS_ROUTE_REFUSALS_H
#define MOE_TESTS_ROUTE_REFUSALS_H

#include "tests/unit/route/case.h"

TEST_REFUSED(refused, moe_route, moe_route_prepare, moe_route)

/* Workspaces: capacity by weight needs a larger one, and weights. */
static void refuse_workspaces(const moe_route_desc* complete)
{
    const moe_route_desc good = *complete;
    tbuf large = tbuf_new("large workspace", 1 << 16, 16);
    size_t bytes = 0;
    moe_route_desc d;
    REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT, d.workspace = large.p,
             d.workspace_bytes = large.bytes, d.weights = 0, d.row_weight = 0),
            MOE_ERR_NULL, weights);
    CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_OK);
    REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT, d.workspace = large.p,
             d.workspace_bytes = bytes - 1),
            MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT, d.workspace = large.p,
             d.workspace_bytes = bytes, d.place = (moe_place*)AT(large.p, bytes / 8 * 8 - 8)),
            MOE_ERR_OVERLAP, place);
    /* one that is too small, right before another buffer, overlaps nothing */
    REFUSED((d.workspace = large.p, d.workspace_bytes = 16, d.fault = (uint64_t*)AT(large.p, 16)),
            MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED((d.workspace = large.p, d.fault = (uint64_t*)AT(large.p, 16)), MOE_ERR_OVERLAP, fault);
    REFUSED((d.workspace = 0, d.workspace_bytes = 0), MOE_ERR_NULL, workspace);
    CHECK(tbuf_holds(&large, 0), "a refused call wrote to its workspace");
    tbuf_free(&large);
}

/* moe_route_max_rows and moe_route_workspace: a refused call returns no answer. */
static void refuse_questions(const moe_route_desc* good)
{
    int64_t rows = 777;
    size_t bytes = 12345;
    moe_route_desc d = *good;
    CHECK_STATUS(moe_route_max_rows(0, &rows), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_route_max_rows(good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    d.top_k = 0;
    CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_STATUS(MOE_ERR_RANGE, top_k));
    d = *good;
    d.place_kind = 3;
    CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_STATUS(MOE_ERR_OPTION, place_kind));
    CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_OPTION, place_kind));
    d = *good;
    d.num_tokens = INT32_MAX;
    d.top_k = 1;
    d.row_multiple = 2;
    CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_STATUS(MOE_ERR_RANGE, row_multiple));
    CHECK(rows == 777, "a refused call returned rows");
    CHECK_STATUS(moe_route_workspace(0, &bytes), MOE_STATUS(MOE_ERR_NULL, desc));
    CHECK_STATUS(moe_route_workspace(good, 0), MOE_STATUS(MOE_ERR_NULL, desc));
    d = *good;
    d.num_experts = 0;
    CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_RANGE, num_experts));
    d = *good;
    d.num_tokens = -5;
    CHECK_STATUS(moe_route_workspace(&d, &bytes), MOE_STATUS(MOE_ERR_RANGE, num_tokens));
    CHECK(bytes == 12345, "a refused call returned bytes");
}

/* Every field, wrong in every way: its own status, and nothing is written. */
static void test_route_refusals(void)
{
    trand r = trand_new(7);
    route_case c = full_case(&r, 40, 10, 4);
    int32_t ids[160], *extra;
    float weights[160];
    route_bufs b;
    tbuf b_extra;
    moe_route_desc good, d;
    c.pattern = DROPPED;
    draw_slots(ids, weights, &c, &r);
    bufs_new(&b, &c, ids, weights);
    b_extra = tbuf_new("extra", 64 * 4, 0);
    extra = (int32_t*)b_extra.p;
    good = b.d;
    CHECK_STATUS(moe_route(0, test_now.stream), MOE_STATUS(MOE_ERR_NULL, desc));
    REFUSED(d.num_tokens = -1, MOE_ERR_RANGE, num_tokens);
    REFUSED((d.num_tokens = 1 << 29, d.chunk_count = (int32_t*)b.chunk.p), MOE_ERR_RANGE,
            num_tokens);
    REFUSED_NUM_EXPERTS();
    REFUSED_EACH(top_k, MOE_ERR_RANGE, top_k, 0, -4);
    REFUSED_EACH(place_kind, MOE_ERR_OPTION, place_kind, 3, -1);
    REFUSED(d.ids = 0, MOE_ERR_NULL, ids);
    REFUSED(d.weights = 0, MOE_ERR_NULL, weights);
    REFUSED(d.expert_count = 0, MOE_ERR_NULL, expert_count);
    REFUSED(d.expert_offset = 0, MOE_ERR_NULL, expert_offset);
    REFUSED(d.workspace = 0, MOE_ERR_NULL, workspace);
    REFUSED(d.workspace_bytes = 0, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.workspace_bytes -= 1, MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.ids = (int32_t*)AT(d.ids, 2), MOE_ERR_ALIGN, ids);
    REFUSED(d.weights = (float*)AT(d.weights, 1), MOE_ERR_ALIGN, weights);
    REFUSED(d.chunk_count = (int32_t*)AT(b.chunk.p, 2), MOE_ERR_ALIGN, chunk_count);
    REFUSED(d.expert_count = (int32_t*)AT(d.expert_count, 2), MOE_ERR_ALIGN, expert_count);
    REFUSED(d.expert_offset = (int32_t*)AT(d.expert_offset, 3), MOE_ERR_ALIGN, expert_offset);
    REFUSED(d.slot_row = (int32_t*)AT(d.slot_row, 2), MOE_ERR_ALIGN, slot_row);
    REFUSED(d.row_slot = (int32_t*)AT(d.row_slot, 2), MOE_ERR_ALIGN, row_slot);
    REFUSED(d.row_weight = (float*)AT(d.row_weight, 2), MOE_ERR_ALIGN, row_weight);
    REFUSED(d.place = (moe_place*)AT(d.place, 4), MOE_ERR_ALIGN, place);
    REFUSED(d.workspace = AT(d.workspace, 8), MOE_ERR_ALIGN, workspace);
    REFUSED_RANK_AND_FAULT();
    REFUSED(d.workspace = DOWN_TO((char*)b.ids.p + 16, 16), MOE_ERR_OVERLAP, workspace);
    REFUSED(d.chunk_count = (int32_t*)b.ids.p, MOE_ERR_OVERLAP, chunk_count);
    REFUSED((d.chunk_count = (int32_t*)b.chunk.p, d.slot_row = d.chunk_count), MOE_ERR_OVERLAP,
            slot_row);
    REFUSED(d.expert_count = (int32_t*)b.ids.p, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.expert_count = (int32_t*)d.workspace, MOE_ERR_OVERLAP, expert_count);
    REFUSED(d.expert_offset = d.expert_count + 9, MOE_ERR_OVERLAP, expert_offset);
    REFUSED(d.expert_offset = d.expert_count - 10, MOE_ERR_OVERLAP, expert_offset);
    REFUSED(d.slot_row = (int32_t*)b.ids.p, MOE_ERR_OVERLAP, slot_row);
    REFUSED(d.row_slot = d.slot_row, MOE_ERR_OVERLAP, row_slot);
    REFUSED(d.row_weight = (float*)b.weights.p, MOE_ERR_OVERLAP, row_weight);
    REFUSED(d.row_weight = (float*)d.row_slot + 159, MOE_ERR_OVERLAP, row_weight);
    REFUSED(d.place = (moe_place*)b.weights.p, MOE_ERR_OVERLAP, place);
    REFUSED(d.fault = (uint64_t*)b.place.p, MOE_ERR_OVERLAP, fault);
    REFUSED_EACH(row_multiple, MOE_ERR_RANGE, row_multiple, -1, MOE_ROUTE_MAX_MULTIPLE + 1);
    REFUSED((d.num_tokens = INT32_MAX, d.top_k = 1, d.row_multiple = 2), MOE_ERR_RANGE,
            row_multiple);
    REFUSED(d.capacity = -1, MOE_ERR_RANGE, capacity);
    REFUSED((d.capacity = 5, d.drop_rule = 3), MOE_ERR_OPTION, drop_rule);
    REFUSED((d.capacity = 5, d.drop_rule = -1), MOE_ERR_OPTION, drop_rule);
    REFUSED(d.drop_rule = MOE_DROP_BY_POSITION, MOE_ERR_CONFLICT, drop_rule);
    REFUSED(d.drop_rule = MOE_DROP_BY_WEIGHT, MOE_ERR_CONFLICT, drop_rule);
    REFUSED((d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT), MOE_ERR_WORKSPACE, workspace_bytes);
    REFUSED(d.num_replicas = 11, MOE_ERR_CONFLICT, num_replicas);
    REFUSED(d.replica_expert = extra, MOE_ERR_CONFLICT, replica_expert);
    REFUSED((d.replica_offset = extra, d.num_replicas = -1), MOE_ERR_RANGE, num_replicas);
    REFUSED((d.replica_offset = extra, d.absent_replicas = 2), MOE_ERR_OPTION, absent_replicas);
    REFUSED((d.replica_offset = extra, d.absent_replicas = -1), MOE_ERR_OPTION, absent_replicas);
    REFUSED(d.absent_replicas = 1, MOE_ERR_CONFLICT, absent_replicas);
    REFUSED((d.replica_offset = extra, d.num_replicas = MOE_MAX_EXPERTS + 1), MOE_ERR_RANGE,
            num_replicas);
    REFUSED((d.replica_offset = extra, d.chunk_count = (int32_t*)b.chunk.p), MOE_ERR_CONFLICT,
            chunk_count);
    REFUSED(d.replica_offset = (int32_t*)AT(extra, 2), MOE_ERR_ALIGN, replica_offset);
    REFUSED((d.replica_offset = extra, d.replica_expert = (int32_t*)AT(extra, 1)), MOE_ERR_ALIGN,
            replica_expert);
    REFUSED((d.part_count = extra, d.num_parts = 0), MOE_ERR_RANGE, num_parts);
    REFUSED((d.part_count = extra, d.num_parts = d.num_tokens + 1), MOE_ERR_RANGE, num_parts);
    REFUSED(d.num_parts = 1, MOE_ERR_RANGE, num_parts);
    REFUSED((d.part_count = extra, d.num_parts = 1, d.chunk_count = (int32_t*)b.chunk.p),
            MOE_ERR_CONFLICT, part_count);
    REFUSED((d.part_count = (int32_t*)AT(extra, 2), d.num_parts = 1), MOE_ERR_ALIGN, part_count);
    REFUSED(d.max_rows = -1, MOE_ERR_RANGE, max_rows);
    REFUSED((d.max_rows = 3, d.capacity = 5, d.drop_rule = MOE_DROP_BY_WEIGHT), MOE_ERR_CONFLICT,
            max_rows);
    REFUSED(d.drop_count = (int32_t*)AT(b.drops.p, 2), MOE_ERR_ALIGN, drop_count);
    REFUSED(d.drop_count = d.expert_count, MOE_ERR_OVERLAP, drop_count);
    REFUSED(d.drop_count = (int32_t*)d.workspace, MOE_ERR_OVERLAP, drop_count);
    REFUSED((d.replica_offset = extra, d.drop_count = extra + 10), MOE_ERR_OVERLAP, drop_count);
    REFUSED((d.replica_offset = extra, d.replica_expert = extra + 16, d.slot_row = extra + 25),
            MOE_ERR_OVERLAP, slot_row);
    REFUSED((d.row_multiple = 4, d.row_weight = (float*)d.row_slot + 160), MOE_ERR_OVERLAP,
            row_weight);
    refuse_workspaces(&good);
    refuse_questions(&good);
    TEST_CUDA(cudaDeviceSynchronize());
    CHECK(tbufs_untouched(TBUFS(OUTPUTS(&b), &b.chunk)), "a refused call wrote something");
    CHECK(tbuf_holds(&b.ids, ids) && tbuf_holds(&b.weights, weights), "or to an input");
    CHECK_FAULT(&b.fault, MOE_FAULT_NONE, 0);
    CHECK(tbuf_holds(&b_extra, 0), "a refused call wrote something");
    launch(&b, &c);
    bufs_free(&b);
    tbuf_free(&b_extra);
}

static void route_refusals(void) { RUN(test_route_refusals); }

#endif
