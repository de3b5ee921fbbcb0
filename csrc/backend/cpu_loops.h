// The innermost loops, compiled once for each instruction set and chosen at run time.
//
// They work on a block of float32 values at a time. All instruction sets give the same bits: the
// loops are the same text, without contraction of a * b + c.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rules.h"

namespace flatstep {

// A block of each array. An output may be the very array of its input.
struct BlockArrays {
  const float* g;
  const float* p_in;
  const float* m_in;
  const float* v_in;
  float* p_out;
  float* m_out;
  float* v_out;
};

struct CpuLoops {
  const char* name;
  void (*adam)(const AdamStep&, const BlockArrays&, size_t n);
  // Indexed by has_weight_decay + 2 has_momentum + 4 nesterov.
  void (*sgd[8])(const SgdStep&, const BlockArrays&, size_t n);
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
