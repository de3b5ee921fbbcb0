// The innermost loops, compiled once for each instruction set and chosen at run time: for each rule
// one over float32 state, parameters in one storage and gradients of the same dtype, and for each
// storage a load and a store.
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

// How many gradients' squares are added up at most by one call, in rows side by side.
inline constexpr size_t kSquares = 4096;
inline constexpr size_t kSquareRows = 4;

// A part of each array. An output may be the very array of its input.
struct BlockArrays {
  const void* g;
  const void* p_in;
  void* p_out;
  const void* rests_in;  // of parameters in a split storage
  void* rests_out;
  const float* state_in[kMaxStates];
  float* state_out[kMaxStates];
};

struct CpuLoops {
  const char* name;
  // `constants` are a group's. `first` is the key of the first parameter that is stored; the others
  // follow.
  using Update =
      void (*)(const uint32_t* constants, const BlockArrays& arrays, size_t n, RoundingKey first);
  std::array<Update, kNumParameterStorages> update[kNumRules];
  // `rest` is what a split storage has besides, or null. What lies in blocks starts with one; where
  // the last is ragged, `out` has room for all of it, and what is stored there beyond n is zero.
  void (*load[kNumStorages])(const void* in, const void* rest, float* out, size_t n);
  void (*store[kNumStorages])(const float* in, void* out, void* rest, size_t n, RoundingKey first);
  // An average of parameters, which are to be stored yet.
  void (*average)(
      const PassConstants& constants, const float* p, const float* in, float* out, size_t n);
  // Of at most kSquares gradients as they are scaled and clipped by value. `largest` becomes the
  // bits of the largest magnitude among them before, if that is larger.
  using SumOfSquares =
      float (*)(const void* g, size_t n, float scale, float clip_value, uint32_t& largest);
  SumOfSquares sum_of_squares[kNumPlainStorages];
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
