/* gate_backward.h: the reference of moe/gate_backward.cuh. C11 and C++14; no CUDA.

   Reads the gate's own descriptor, with host addresses, as gate_rules.h does: logits, rules, sizes.
   Computes the scores itself and takes the choices as given. gate_backward.cuh has the formulas;
   here the gradients by scores are written out, and multiplied by the derivative of each score.

   Functions: moe_ref_gate_backward_f32 and moe_ref_gate_backward_f64. */
#ifndef MOE_REF_GATE_BACKWARD_H
#define MOE_REF_GATE_BACKWARD_H

#include "gate_rules.h"

#define MOEI_REAL float
#define MOEI_REF(name) MOEI_JOIN(name, _f32)
#include "gate_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#define MOEI_REAL double
#define MOEI_REF(name) MOEI_JOIN(name, _f64)
#include "gate_backward.inl"
#undef MOEI_REAL
#undef MOEI_REF

#endif
