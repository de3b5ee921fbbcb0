// How an array's values are stored. The only place where a storage's codes are read and made; C++
// and Metal compile this same text.
//
// A storage is a struct: what lies in memory, and a load and a store of one value, here; of a value
// in a block with a scale, in codes.h; of a value in two parts, in split.h. The tables at the end
// list them; the CPU's loops and the kernels' instances follow from them.
#pragma once

#include "codes.h"
#include "split.h"

namespace flatstep {

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

typedef Stochastic<Float16Places> StochasticFloat16;
typedef Stochastic<Bfloat16Places> StochasticBfloat16;
typedef Split<Float16Places, int8_t> Float16And8;
typedef Split<Float16Places, int16_t> Float16And16;
typedef Split<Bfloat16Places, int8_t> Bfloat16And8;
typedef Split<Bfloat16Places, int16_t> Bfloat16And16;
typedef Codes<1> SignedCodes;
typedef Codes<0> UnsignedCodes;

// Of any array, with the names of MLX's dtypes.
#define FLATSTEP_STORAGES(STORAGE) \
  STORAGE(Float32, float32)        \
  STORAGE(Float16, float16)        \
  STORAGE(Bfloat16, bfloat16)

// Of parameters, if their optimizer asks for it.
#define FLATSTEP_STOCHASTIC_STORAGES(STORAGE) \
  STORAGE(StochasticFloat16, float16)         \
  STORAGE(StochasticBfloat16, bfloat16)
#define FLATSTEP_SPLIT_STORAGES(STORAGE) \
  STORAGE(Float16And8, float16)          \
  STORAGE(Float16And16, float16)         \
  STORAGE(Bfloat16And8, bfloat16)        \
  STORAGE(Bfloat16And16, bfloat16)

// Of state: blocks of bytes.
#define FLATSTEP_CODE_STORAGES(STORAGE) \
  STORAGE(SignedCodes, uint8)           \
  STORAGE(UnsignedCodes, uint8)

}  // namespace flatstep
