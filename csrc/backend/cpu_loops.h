// The innermost loops, compiled once for each instruction set and chosen at run time: for each rule
// one over a block of float32 state and of parameters and gradients in one storage, and for each
// storage a load and a store of a block.
//
// All instruction sets give the same bits: the loops are the same text, without contraction of a *
// b + c.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "tables.h"

namespace flatstep {

// A block of each array. An output may be the very array of its input.
struct BlockArrays {
  const void* g;  // of the loop's storage, as are the next two
  const void* p_in;
  void* p_out;
  const float* state_in[kMaxStates];
  float* state_out[kMaxStates];
};

struct CpuLoops {
  const char* name;
  // `first` is the key of the first parameter that is stored; the others follow.
  using Update =
      void (*)(const Constants& constants, const BlockArrays& arrays, size_t n, RoundingKey first);
  std::array<Update, kNumStorages> update[kNumRules];
  void (*load[kNumStorages])(const void* in, float* out, size_t n);
  void (*store[kNumStorages])(const float* in, void* out, size_t n, RoundingKey first);
};

extern const CpuLoops baseline_loops;
#if defined(__x86_64__)
extern const CpuLoops avx2_loops;
extern const CpuLoops avx512_loops;
#endif

// The fastest that this processor has, unless `set_cpu_loops` chose another.
const CpuLoops& cpu_loops();

// Names of those that this processor can run, slowest first.
std::vector<std::string> available_cpu_loops();

// Throws std::invalid_argument for a name that is not available.
void set_cpu_loops(const std::string& name);

}  // namespace flatstep
