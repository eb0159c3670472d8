/* layer.inl: the layer for one type of number; layer.h includes it twice. */

/* Writes y [T, H]. ids and weights [T, K] get the gate's choice, or are null. Returns 0, or -1
   where memory ran out.

   1. Router and gate. 2. Route. 3. Experts. 4. Shared expert. 5. Combine. */
MOE_HOST int MOEI_REF(moe_ref_layer)(const moe_ref_layer_desc* d, MOEI_REAL* y, int32_t* ids,
                                     MOEI_REAL* weights)
{
    const size_t num_tokens = (size_t)d->num_tokens, num_experts = (size_t)d->num_experts,
                 hidden = (size_t)d->hidden;
    const size_t slots = num_tokens * (size_t)d->top_k;
    const size_t num_replicas = d->route.num_replicas ? (size_t)d->route.num_replicas : num_experts;
    const size_t num_rows = slots + num_replicas * (size_t)d->route.row_multiple; /* most rows */
    MOEI_REAL* logits = (MOEI_REAL*)malloc((num_tokens * num_experts + 1) * sizeof(MOEI_REAL));
    MOEI_REAL* weight = (MOEI_REAL*)malloc((slots + 1) * sizeof(MOEI_REAL));
    MOEI_REAL* rows = (MOEI_REAL*)malloc((num_rows * hidden + 1) * sizeof(MOEI_REAL));
    MOEI_REAL* shared = (MOEI_REAL*)malloc((num_tokens * hidden + 1) * sizeof(MOEI_REAL));
    float* single = (float*)malloc((slots + 1) * sizeof(float)); /* weights as float, for route */
    int32_t* id = (int32_t*)malloc((slots + 1) * sizeof(int32_t));
    int32_t* row_slot = (int32_t*)malloc((num_rows + 1) * sizeof(int32_t));
    int32_t* count = (int32_t*)malloc(num_replicas * sizeof(int32_t));
    int32_t* offset = (int32_t*)malloc((num_replicas + 1) * sizeof(int32_t));
    moe_place* place = (moe_place*)malloc((slots + 1) * sizeof(moe_place));
    int bad = !logits || !weight || !rows || !shared || !single || !id || !row_slot || !count ||
              !offset || !place;

    /* 1. router and gate */
    if (!bad) {
        moe_ref_gate_desc g;
        memset(&g, 0, sizeof g);
        g.logits = d->logits;
        g.logits_stride = d->logits_stride;
        g.logits_dtype = d->logits_dtype ? d->logits_dtype : MOE_FP32;
        if (!d->logits) {
            moe_ref_router_desc r;
            memset(&r, 0, sizeof r);
            r.x = d->x;
            r.w = d->router;
            r.x_stride = d->x_stride;
            r.w_stride = d->router_stride;
            r.x_dtype = d->x_dtype;
            r.w_dtype = d->router_dtype;
            r.num_tokens = d->num_tokens;
            r.num_experts = d->num_experts;
            r.hidden = d->hidden;
            MOEI_REF(moe_ref_router)(&r, logits);
            for (size_t i = 0; i < num_tokens * num_experts; ++i)
                logits[i] = MOEI_REF(moe_ref_round)(logits[i], d->logits_dtype);
            g.logits = logits;
            g.logits_stride = 0;
            g.logits_dtype = MOE_REF_REAL;
        }
        g.num_tokens = d->num_tokens;
        g.num_experts = d->num_experts;
        g.top_k = d->top_k;
        g.score = d->score;
        g.renormalize = d->renormalize;
        g.scale = d->scale;
        MOEI_REF(moe_ref_gate)(&g, id, weight, 0, 0);
    }
    /* 2. route */
    if (!bad) {
        moe_ref_route_desc r = d->route;
        for (size_t s = 0; s < slots; ++s) single[s] = (float)weight[s];
        r.ids = id;
        r.weights = single;
        r.max_rows = (int64_t)num_rows;
        r.num_tokens = d->num_tokens;
        r.num_experts = d->num_experts;
        r.top_k = d->top_k;
        r.expert_count = count;
        r.expert_offset = offset;
        r.row_slot = row_slot;
        r.place = place;
        bad = moe_ref_route(&r) == -2;
    }
    /* 3. experts */
    if (!bad) {
        moe_ref_experts_desc e;
        memset(&e, 0, sizeof e);
        e.x = d->x;
        e.row_slot = row_slot;
        e.expert_offset = offset;
        e.w1 = d->w1;
        e.w2 = d->w2;
        e.bias1 = d->bias1;
        e.bias2 = d->bias2;
        e.x_stride = d->x_stride;
        e.x_dtype = d->x_dtype;
        e.w_dtype = d->w_dtype;
        e.bias_dtype = d->bias_dtype;
        e.act_dtype = d->act_dtype;
        e.activation = d->activation;
        e.alpha = d->alpha;
        e.limit = d->limit;
        e.gate_up = d->gate_up;
        e.num_experts = (int)num_replicas;
        e.top_k = d->top_k;
        e.hidden = d->hidden;
        e.intermediate = d->intermediate;
        bad = MOEI_REF(moe_ref_experts)(&e, rows, 0, 0) != 0;
    }
    /* 4. shared expert */
    if (!bad && d->shared.intermediate) {
        const int32_t all[2] = {0, d->num_tokens}; /* one expert with one row a token */
        moe_ref_experts_desc e;
        memset(&e, 0, sizeof e);
        e.x = d->x;
        e.expert_offset = all;
        e.w1 = d->shared.w1;
        e.w2 = d->shared.w2;
        e.bias1 = d->shared.bias1;
        e.bias2 = d->shared.bias2;
        e.x_stride = d->x_stride;
        e.x_dtype = d->x_dtype;
        e.w_dtype = d->w_dtype;
        e.bias_dtype = d->bias_dtype;
        e.act_dtype = d->act_dtype;
        e.activation = d->shared.activation;
        e.alpha = d->shared.alpha;
        e.limit = d->shared.limit;
        e.gate_up = d->shared.gate_up;
        e.num_experts = 1;
        e.hidden = d->hidden;
        e.intermediate = d->shared.intermediate;
        bad = MOEI_REF(moe_ref_experts)(&e, shared, 0, 0) != 0;
    }
    /* 5. combine */
    if (!bad) {
        moe_ref_combine_desc c;
        memset(&c, 0, sizeof c);
        for (size_t i = 0; i < (size_t)offset[num_replicas] * hidden; ++i)
            rows[i] = MOEI_REF(moe_ref_round)(rows[i], d->rows_dtype);
        for (size_t i = 0; i < num_tokens * hidden && d->shared.intermediate; ++i)
            shared[i] = MOEI_REF(moe_ref_round)(shared[i], d->rows_dtype);
        if (d->shared.intermediate) c.shared = shared;
        c.shared_weight = d->shared.weight;
        c.rows = rows;
        c.rows_dtype = MOE_REF_REAL;
        c.place = place;
        c.weights = weight;
        c.weights_dtype = MOE_REF_REAL;
        c.residual = d->residual;
        c.residual_stride = d->residual_stride;
        c.residual_dtype = d->residual_dtype;
        c.num_tokens = d->num_tokens;
        c.hidden = d->hidden;
        c.top_k = d->top_k;
        MOEI_REF(moe_ref_combine)(&c, y, 0);
    }
    for (size_t s = 0; s < slots && !bad; ++s) {
        if (ids) ids[s] = id[s];
        if (weights) weights[s] = weight[s];
    }
    free(logits);
    free(weight);
    free(rows);
    free(shared);
    free(single);
    free(id);
    free(row_slot);
    free(count);
    free(offset);
    free(place);
    return bad ? -1 : 0;
}
