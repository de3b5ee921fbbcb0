// Half-precision parameters that learn: rounded by chance, or with the bits below them kept beside.
//
// Both begin with a float32 as a float16 or bfloat16 that has 16 bits more, its places. With the
// first 8 or all 16 of those kept as a signed rest a parameter is the master weight rounded to
// nearest, and both together are a weight of 24 bits, rounded as its key says, or of 32. The rests
// of a block carry a checksum of its parameters: where others have taken their place the rests are
// not theirs, and count as zero.
#pragma once

#include "codes.h"

namespace flatstep {

struct Bfloat16Places {
  enum : uint32_t { INFINITE = 0x7f80 };

  static uint32_t from_float(float x) {
    uint32_t bits = FLATSTEP_BITS(uint32_t, x);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits;
  }
  static float to_float(uint32_t places) {
    return FLATSTEP_BITS(float, places);
  }
};

// With 16 bits more, 13 of which a float32 has, but below 2^-14, where all have one last place.
struct Float16Places {
  enum : uint32_t { INFINITE = 0x7c00 };

  static uint32_t from_float(float x) {
    uint32_t bits = FLATSTEP_BITS(uint32_t, x);
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t limited = magnitude < 0x38800000u ? magnitude : 0x38800000u;
    // From 2^22 on a float has no more than half places.
    float small = FLATSTEP_BITS(float, limited) * 1099511627776.0f;
    uint32_t rounded = uint32_t(int32_t(small + (small < 4194304.0f ? 0.5f : 0.0f)));
    uint32_t result = magnitude < 0x38800000u ? rounded : (magnitude - (112u << 23)) << 3;
    result = magnitude >= 0x477ff000u ? 0x7c000000u : result;
    result = magnitude > 0x7f800000u ? 0x7e000000u : result;
    return result | (bits & 0x80000000u);
  }
  static float to_float(uint32_t places) {
    uint32_t magnitude = places & 0x7fffffffu;
    float small = float(int32_t(magnitude)) * (1.0f / 1099511627776.0f);
    uint32_t normal = (magnitude >> 3) + (112u << 23);
    uint32_t result = magnitude < 0x04000000u ? FLATSTEP_BITS(uint32_t, small) : normal;
    result = magnitude >= 0x7c000000u ? 0x7f800000u : result;
    result = magnitude > 0x7c000000u ? 0x7fc00000u : result;
    return FLATSTEP_BITS(float, result | (places & 0x80000000u));
  }
};

// Up as often as a value is far from the number below: what is smaller than a last place is not
// lost, but added in the mean.
template <typename Places>
struct Stochastic {
  typedef uint16_t Stored;

  static float load(uint16_t stored) {
    return Places::to_float(uint32_t(stored) << 16);
  }
  static uint16_t store(float x, RoundingKey key) {
    uint32_t places = Places::from_float(x);
    uint32_t rounded = (places + (random_bits(key) >> 16)) >> 16;
    // What is finite stays so.
    return uint16_t((rounded & 0x7fffu) == Places::INFINITE ? places >> 16 : rounded);
  }
};

// By which parameter i of a block counts in its checksum, as a signed number: neither a change of
// one nor a swap of two leaves the sum as it is.
constexpr int16_t checksum_weight(uint32_t i) {
  return int16_t((2 * i + 1) * (2 * i + 1));
}

template <typename T>
struct Parts {
  uint16_t stored;
  T rest;
};

template <typename Places, typename T>
struct Split {
  typedef uint16_t Stored;
  typedef T Rest;
  enum { BITS = 8 * sizeof(T), CUT = 16 - BITS };

  // Of a block of parameters.
  struct Block {
    T rests[FLATSTEP_BLOCK];
    uint32_t checksum;
  };

  static float load(uint16_t stored, T rest) {
    return Places::to_float((uint32_t(stored) << 16) + (uint32_t(int32_t(rest)) << CUT));
  }
  static Parts<T> store(float x, RoundingKey key) {
    // As many bits as are cut off; where that is none, a shift by 32 would be undefined.
    uint32_t up = key.number >> (31 - CUT) >> 1;
    uint32_t places = (Places::from_float(x) + up) >> CUT;
    uint32_t stored = (places + (1u << (BITS - 1))) >> BITS;
    Parts<T> parts = {uint16_t(stored), T(places - (stored << BITS))};
    return parts;
  }

  static uint32_t checksum(uint16_t stored, int16_t weight) {
    return uint32_t(int32_t(int16_t(stored)) * int32_t(weight));
  }
};

}  // namespace flatstep
