// How an array's values are stored. The only place where a storage's codes are read and made; C++
// and Metal compile this same text.
//
// A storage is a struct: the type of what lies in memory, and a load and a store of one value. The
// table at the end lists them; the CPU's loops and the kernels' instances follow
// from it. Each array has one storage, and each storage one array.
#pragma once

#include "dialect.h"

namespace flatstep {

// What rounding by chance may depend on. A storage that uses it needs the step as an operand.
struct RoundingKey {
  Step element;  // its number in the flat array
  Step step;
  uint32_t seed;
};

// To nearest, ties to even, as the compiler's own conversions do.
template <typename T>
struct Converted {
  typedef T Stored;
  static float load(T stored) {
    return float(stored);
  }
  static T store(float x, RoundingKey) {
    return T(x);
  }
};

typedef Converted<float> Float32;

#ifdef __METAL_VERSION__

typedef Converted<half> Float16;
typedef Converted<bfloat> Bfloat16;

#else

// On the bits and without branches, so that conversions become part of vectorised loops.
struct Float16 {
  typedef uint16_t Stored;

  // Shifting the 15 bits into a float's place leaves an exponent that is 112 too small.
  static float load(uint16_t stored) {
    uint32_t bits = stored;
    uint32_t magnitude = (bits & 0x7fffu) << 13;
    float value = FLATSTEP_BITS(float, magnitude) * 0x1p112f;
    uint32_t infinite = 0x7f800000u | magnitude;
    uint32_t result = magnitude >= (0x7c00u << 13) ? infinite : FLATSTEP_BITS(uint32_t, value);
    return FLATSTEP_BITS(float, result | (bits & 0x8000u) << 16);
  }

  // To nearest, ties to even, as the processor's own conversion does.
  static uint16_t store(float x, RoundingKey) {
    uint32_t bits = FLATSTEP_BITS(uint32_t, x);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 lines a subnormal's bits up with the end of the significand, and rounds.
    float aligned = FLATSTEP_BITS(float, magnitude) + 0.5f;
    uint32_t subnormal = FLATSTEP_BITS(uint32_t, aligned) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return uint16_t(result | (bits >> 16 & 0x8000u));
  }
};

struct Bfloat16 {
  typedef uint16_t Stored;

  static float load(uint16_t stored) {
    return FLATSTEP_BITS(float, uint32_t(stored) << 16);
  }

  // To nearest, ties to even.
  static uint16_t store(float x, RoundingKey) {
    uint32_t bits = FLATSTEP_BITS(uint32_t, x);
    uint32_t rounded_up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t quiet_nan = bits >> 16 | 0x40u;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded_up);
  }
};

#endif

// Their names as MLX's dtypes.
#define FLATSTEP_STORAGES(STORAGE) \
  STORAGE(Float32, float32)        \
  STORAGE(Float16, float16)        \
  STORAGE(Bfloat16, bfloat16)

}  // namespace flatstep
