// The innermost loops, compiled once for each instruction set and chosen at run time.
//
// They work on a block at a time, of float32 state and of parameters and gradients of one dtype.
// All instruction sets give the same bits: the loops are the same text, without contraction of a *
// b + c.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rules.h"

namespace flatstep {

// A block of each array. An output may be the very array of its input.
struct BlockArrays {
  const void* g;     // of the loops' dtype
  const void* p_in;  // of the loops' dtype
  const float* m_in;
  const float* v_in;
  void* p_out;  // of the loops' dtype
  float* m_out;
  float* v_out;
};

// The loops for parameters and gradients of one dtype.
struct UpdateLoops {
  void (*adam)(const AdamStep&, const BlockArrays&, size_t n);
  // Indexed by has_weight_decay + 2 (has_momentum + nesterov), the latter not without the former.
  void (*sgd[6])(const SgdStep&, const BlockArrays&, size_t n);
};

struct CpuLoops {
  const char* name;
  UpdateLoops float32;
  UpdateLoops half_in_float32;  // for half-precision parameters, all converted to float32
  UpdateLoops float16;
  UpdateLoops bfloat16;
  void (*load_float16)(const uint16_t* in, float* out, size_t n);
  void (*load_bfloat16)(const uint16_t* in, float* out, size_t n);
  void (*store_float16)(const float* in, uint16_t* out, size_t n);
  void (*store_bfloat16)(const float* in, uint16_t* out, size_t n);
};

extern const CpuLoops baseline_loops;
#if defined(__x86_64__)
extern const CpuLoops avx2_loops;
extern const CpuLoops avx512_loops;
#endif

}  // namespace flatstep
