/* parts.h: tokens in parts of which only the first exist, and room for fewer rows. */
#ifndef MOE_TESTS_ROUTE_PARTS_H
#define MOE_TESTS_ROUTE_PARTS_H

#include "tests/test_case.h"
#include "tests/unit/route/case.h"

/* Routes T tokens in parts whose counts are drawn; ids of tokens that do not exist are no experts.
   All outputs are those of the reference with -1 there, and no fault is raised. */
static void parts_case(int parts, int each, int E, int K, int multiple, int capacity, uint64_t salt)
{
    trand q = trand_new(salt);
    const int T = parts * each;
    const int64_t slots = (int64_t)T * K;
    int32_t* ids = (int32_t*)test_host(slots * 4);
    int32_t* clean = (int32_t*)test_host(slots * 4);
    float* weights = (float*)test_host(slots * 4);
    int32_t* count = (int32_t*)test_host(parts * 4);
    moe_route_desc d;
    moe_ref_route_desc ref;
    int64_t rows = 0;
    memset(&d, 0, sizeof d);
    memset(&ref, 0, sizeof ref);
    for (int p = 0; p < parts; ++p) count[p] = p == 1 ? 0 : (int32_t)trand_int(&q, 0, each);
    for (int64_t s = 0; s < slots; ++s) {
        const int t = (int)(s / K);
        const int exists = t % each < count[t / each];
        weights[s] = trand_normal(&q);
        clean[s] = exists ? (int32_t)trand_int(&q, -1, E - 1) : -1;
        ids[s] = exists ? clean[s] : (int32_t)trand_int(&q, E, E + 5);
    }
    d.num_tokens = T, d.num_experts = E, d.top_k = K;
    d.num_parts = parts, d.part_count = (const int32_t*)TEST_FAR;
    d.row_multiple = multiple, d.capacity = capacity;
    CHECK_STATUS(moe_route_max_rows(&d, &rows), MOE_OK);
    CHECK_STATUS(moe_route_workspace(&d, &d.workspace_bytes), MOE_OK);
    {
        tbuf b_ids = tbuf_from("ids", ids, (size_t)slots * 4, 0);
        tbuf b_weights = tbuf_from("weights", weights, (size_t)slots * 4, 0);
        tbuf b_parts = tbuf_from("part_count", count, (size_t)parts * 4, 0);
        tbuf b_count = tbuf_new("expert_count", (size_t)E * 4, 0);
        tbuf b_offset = tbuf_new("expert_offset", (size_t)(E + 1) * 4, 0);
        tbuf b_slot_row = tbuf_new("slot_row", (size_t)slots * 4, 0);
        tbuf b_row_slot = tbuf_new("row_slot", (size_t)rows * 4, 0);
        tbuf b_row_weight = tbuf_new("row_weight", (size_t)rows * 4, 0);
        tbuf b_place = tbuf_new("place", (size_t)slots * 8, 0);
        tbuf b_work = tbuf_new("workspace", d.workspace_bytes, 0);
        uint64_t word = 0;
        tbuf b_fault = tbuf_from("fault", &word, 8, 0);
        int32_t* want_count = (int32_t*)test_host(E * 4);
        int32_t* want_offset = (int32_t*)test_host((E + 1) * 4);
        int32_t* want_slot_row = (int32_t*)test_host(slots * 4);
        int32_t* want_row_slot = (int32_t*)test_host(rows * 4);
        float* want_row_weight = (float*)test_host(rows * 4);
        moe_place* want_place = (moe_place*)test_host(slots * 8);
        d.ids = (const int32_t*)b_ids.p, d.weights = (const float*)b_weights.p;
        d.part_count = (const int32_t*)b_parts.p;
        d.expert_count = (int32_t*)b_count.p, d.expert_offset = (int32_t*)b_offset.p;
        d.slot_row = (int32_t*)b_slot_row.p, d.row_slot = (int32_t*)b_row_slot.p;
        d.row_weight = (float*)b_row_weight.p, d.place = (moe_place*)b_place.p;
        d.fault = (uint64_t*)b_fault.p, d.workspace = b_work.p;
        ref.ids = clean, ref.weights = weights;
        ref.expert_count = want_count, ref.expert_offset = want_offset;
        ref.slot_row = want_slot_row, ref.row_slot = want_row_slot;
        ref.row_weight = want_row_weight, ref.place = want_place;
        ref.num_tokens = T, ref.num_experts = E, ref.top_k = K;
        ref.row_multiple = multiple, ref.capacity = capacity, ref.max_rows = rows;
        CHECK(moe_ref_route(&ref) == -1, "the reference has rows for all");
        CHECK_STATUS(moe_route(&d, test_now.stream), MOE_OK);
        CHECK(tbuf_holds(&b_count, want_count), "expert_count");
        CHECK(tbuf_holds(&b_offset, want_offset), "expert_offset");
        CHECK(tbuf_holds(&b_slot_row, want_slot_row), "slot_row");
        CHECK(tbuf_holds(&b_row_slot, want_row_slot), "row_slot");
        CHECK(tbuf_holds(&b_row_weight, want_row_weight), "row_weight");
        CHECK(tbuf_holds(&b_place, want_place), "place");
        CHECK(tbuf_holds(&b_fault, &word), "no fault");
        if (want_offset[E] > 8) { /* room for fewer rows than there are */
            moe_fault f;
            d.max_rows = want_offset[E] - 5;
            b_row_slot.bytes = b_row_weight.bytes = (size_t)d.max_rows * 4;
            CHECK_STATUS(moe_route(&d, test_now.stream), MOE_OK);
            tbuf_get(&b_fault, &word);
            f = moe_fault_decode(word);
            CHECK(f.code == MOE_FAULT_ROWS_FULL && f.index == want_offset[E], "%s at %lld, not %d",
                  moe_fault_text(f.code), (long long)f.index, want_offset[E]);
            {
                int32_t past[5];
                TEST_CUDA(cudaMemcpy(past, (int32_t*)b_row_slot.p + d.max_rows, sizeof past,
                                     cudaMemcpyDeviceToHost));
                CHECK(memcmp(past, want_row_slot + d.max_rows, sizeof past) == 0,
                      "rows past the room were written");
            }
            b_row_slot.bytes = b_row_weight.bytes = (size_t)rows * 4;
        }
        tbufs_free(TBUFS(&b_ids, &b_weights, &b_parts, &b_count, &b_offset, &b_slot_row,
                         &b_row_slot, &b_row_weight, &b_place, &b_work, &b_fault));
        free(want_count), free(want_offset), free(want_slot_row);
        free(want_row_slot), free(want_row_weight), free(want_place);
    }
    free(ids), free(clean), free(weights), free(count);
}

static void test_route_parts(void)
{
    parts_case(2, 30, 7, 3, 0, 0, 1);
    parts_case(4, 16, 16, 2, 8, 0, 2);
    parts_case(3, 500, 9, 4, 0, 0, 3); /* past one launch */
    parts_case(8, 700, 150, 2, 16, 40, 4);
    parts_case(1, 100, 5, 1, 0, 11, 5);
    parts_case(5, 1, 3, 2, 0, 0, 6);
}

static void route_parts(void) { RUN(test_route_parts); }

#endif
