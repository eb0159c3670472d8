/* fields.h: the fields that a call can refuse, and the text of a status. C11 and C++14.

   Every field has one status for each way in which it can be wrong, and the text names the field:

     moe_status s = moe_gate(&desc, stream);
     if (s != MOE_OK) {
         char text[MOE_STATUS_TEXT];
         fprintf(stderr, "%s\n", moe_status_describe(s, text));
     }                      // "top_k: out of range" */
#ifndef MOE_FIELDS_H
#define MOE_FIELDS_H

#include <stddef.h>

#include "base/fault.h"
#include "base/status.h"

/* The fields of all descriptors, under the names that the descriptors use. */
#define MOEI_FIELD_LIST(X)                                                                         \
    X(desc)                                                                                        \
    X(num_tokens)                                                                                  \
    X(hidden) X(intermediate) X(num_experts) X(top_k) X(num_rows) X(x) X(x_dtype) X(x_stride) X(   \
        y) X(y_dtype) X(y_stride) X(dtype) X(logits) X(logits_dtype) X(logits_stride) X(router)    \
        X(router_dtype) X(router_stride) X(ids) X(weights) X(score) X(renormalize) X(scale) X(     \
            expert_count) X(expert_offset) X(chunk_count) X(slot_row) X(row_slot) X(row_weight)    \
            X(place) X(place_kind) X(table) X(num_buffers) X(rows) X(rows_dtype) X(row_stride) X(  \
                residual) X(residual_stride) X(w1) X(w2) X(bias1) X(bias2) X(gate_up) X(act)       \
                X(act_stride) X(a) X(a_stride) X(a_major) X(b) X(b_stride) X(b_major) X(bias) X(   \
                    c) X(c_dtype) X(c_stride) X(n) X(k) X(row_div) X(row_index) X(a_rows) X(tile)  \
                    X(activation) X(alpha) X(limit) X(temperature) X(noise) X(dropout) X(          \
                        seed_offset) X(threshold) X(expert_bias)                                   \
                        X(expert_disabled) X(token_disabled) X(num_groups) X(                      \
                            top_groups) X(prob_sum) X(whole_batch) X(row_multiple) X(capacity)     \
                            X(drop_rule) X(drop_count) X(replica_offset)                           \
                                X(replica_expert) X(num_replicas) X(absent_replicas) X(            \
                                    row_token) X(max_rows) X(shared)                               \
                                    X(shared_stride) X(shared_weight) X(gate) X(route) X(op) X(    \
                                        m) X(mask) X(bytes) X(bits) X(row_offset) X(column_index)  \
                                        X(column_offset) X(position) X(                            \
                                            columns) X(block_rows) X(block_columns) X(max_blocks)  \
                                            X(a_table) X(b_table) X(c_table) X(a_transposed) X(    \
                                                b_transposed) X(packed)                            \
                                                X(zero_masked) X(form) X(act_grad) X(dy) X(dx)     \
                                                    X(dw1) X(dw2) X(dweights) X(dy_stride)         \
                                                        X(dx_stride) X(max_experts) X(choice)      \
                                                            X(accumulate) X(a_index) X(b_index)    \
                                                                X(b_rows) X(a_div) X(b_div) X(     \
                                                                    c_expert_stride) X(workspace)  \
                                                                    X(workspace_bytes) X(fault)    \
                                                                        X(rank) X(part) X(path) X(block)\
                                                                            X(grad_dtype)          \
                                                                                X(grad_expert) X(  \
                                                                                    saved)         \
                                                                                    X(saved_bytes) \
                                                                                    X(batch_invariant) X(grid_limit) \
                                                                                    X(pre) X(pre_stride) \
                                                                                    X(group) X(ready) X(done) \
                                                                                    X(gradient) X(dot) X(stage) X(dy_dtype)                                                                                        \
    X(num_ranks) X(region) X(region_bytes) X(region_offset) X(peers) X(allgather) X(buffer) X(offset)  \
    X(peer) X(channel) X(tag) X(scales) X(num_scales) X(max_tokens) X(recv_tokens) X(part_count)       \
    X(num_parts) X(replica) X(wire_dtype) X(dispatch) X(num_local) X(buffers) X(dispatch_form)        \
    X(combine_form) X(side_stream) X(side_event) X(counters) X(num_mine) X(microbatch_tokens) X(agree) X(token) X(count) X(counts) X(kind) X(nccl)                                          \
    X(dlogits) X(dlogits_dtype) X(dlogits_stride) X(balance_grad) X(z_sum) X(loss)                     \
    X(aux_coefficient) X(variance_coefficient) X(z_coefficient) X(bias_step)                           \
    X(drows) X(drows_table) X(drows_stride) X(dshared) X(dshared_stride) X(dshared_weight)             \
    X(from) X(to) X(integers) X(grads) X(redispatch_x) X(gradient_offset) X(gradient_channel)          \
    X(count_rows) X(local_router) X(gradient_wire) X(overlap) X(overlap_blocks)                                                                        \
    X(drouter) X(dbias1) X(dbias2) X(dx_accumulate) X(empty_experts) X(x_rows) X(dy_rows) X(dpre)     \
    X(recompute) X(gather) X(rows_accumulate)\
    X(router_grad_dtype)

enum {
    MOE_FIELD_NONE,
#define MOEI_FIELD_ENUM(name) MOE_FIELD_##name,
    MOEI_FIELD_LIST(MOEI_FIELD_ENUM)
#undef MOEI_FIELD_ENUM
        MOE_NUM_FIELDS
};

/* The status of one kind for one field: what a call returns when it refuses the field. */
#define MOE_STATUS(kind, field) ((moe_status)((kind) | (MOE_FIELD_##field << 8)))

/* Returns the name of the refused field, "" where the status names none: static storage. */
MOE_HOST const char* moe_status_field(moe_status s)
{
    static const char* const name[] = {"",
#define MOEI_FIELD_STR(f) #f,
                                       MOEI_FIELD_LIST(MOEI_FIELD_STR)
#undef MOEI_FIELD_STR
    };
    const int field = moe_status_detail(s);
    if (moe_status_kind(s) == MOE_ERR_CUDA || field < 0 || field >= MOE_NUM_FIELDS) return "";
    return name[field];
}

#define MOE_STATUS_TEXT 96 /* most bytes that moe_status_describe writes */

/* Writes the text of a status to `text`, at most MOE_STATUS_TEXT bytes, and returns `text`: "top_k:
   out of range", "CUDA error 700". */
MOE_HOST const char* moe_status_describe(moe_status s, char* text)
{
    const char* part[3];
    char number[12];
    size_t at = 0;
    int i;
    part[0] = moe_status_field(s);
    part[1] = part[0][0] ? ": " : "";
    part[2] = moe_status_text(s);
    for (i = 0; i < 3; ++i) {
        const char* p = part[i];
        while (*p && at + 1 < MOE_STATUS_TEXT) text[at++] = *p++;
    }
    if (moe_status_kind(s) == MOE_ERR_CUDA) {
        int n = 0, v = moe_status_detail(s);
        do {
            number[n++] = (char)('0' + v % 10);
            v /= 10;
        } while (v > 0 && n < 11);
        if (at + 1 < MOE_STATUS_TEXT) text[at++] = ' ';
        while (n > 0 && at + 1 < MOE_STATUS_TEXT) text[at++] = number[--n];
    }
    text[at] = 0;
    return text;
}

/* Refuses, from a launch helper, a rank that a fault word cannot hold. */
#define MOEI_REQUIRE_RANK(d)                                                                       \
    MOE_REQUIRE((d)->rank >= 0 && (d)->rank <= MOE_FAULT_MAX_RANK, MOE_ERR_RANGE, rank)

/* Returns MOE_STATUS(kind, field) from a launch helper unless the condition holds. */
#define MOE_REQUIRE(cond, kind, field)                                                             \
    do {                                                                                           \
        if (!(cond)) return MOE_STATUS(kind, field);                                               \
    } while (0)

#endif
