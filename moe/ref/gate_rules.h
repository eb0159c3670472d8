/* gate_rules.h: the reference of moe/gate.cuh with every rule and score. C11 and C++14; no CUDA.

   Reads the gate's own descriptor, with host addresses; zero means default there too. Computes one
   token after the other, as the top of gate.cuh describes. gate.h has the gate without rules.

   Functions: moe_ref_gate_rules_f32 and moe_ref_gate_rules_f64. */
#ifndef MOE_REF_GATE_RULES_H
#define MOE_REF_GATE_RULES_H

#include "../base/random.h"
#include "../gate/desc.h"
#include "real.h"

/* Returns the words drawn for token t and the experts from 4 c0 (noise) or 8 c0 (dropout) on. */
MOE_HOST moe_random4 moei_ref_words(const moe_gate_desc* d, int64_t t, int c0, int stream)
{
    const uint64_t seed = d->seed + (d->seed_offset ? *d->seed_offset : 0);
    return moe_random_words(seed, (uint32_t)c0, (uint32_t)t, (uint32_t)stream, 0);
}

/* Returns 1 where dropout hides expert e from token t. */
MOE_HOST int moei_ref_dropped(const moe_gate_desc* d, int64_t t, int e)
{
    const moe_random4 r = moei_ref_words(d, t, e / 8, MOE_GATE_STREAM_DROPOUT);
    const uint32_t words[4] = {r.x, r.y, r.z, r.w}, w = words[e % 8 / 2];
    return (int)(e % 2 ? w >> 16 : w & 0xffffu) < moe_gate_dropout_steps(d->dropout);
}

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "gate_rules.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "gate_rules.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
