// Eight bits a value: a code, and a float32 scale for each block of neighbours.
//
// x / scale is coded as the leading bits of 1 + |x / scale|: four after the point of a float, so
// steps are 1/16 of the scale near zero and 3 to 6 % of x further up, over four or five decades.
// No root, division or table is needed, and no subnormal. Codes are rounded as their keys say, so
// that what changes by less than a step adds up.
#pragma once

#include "rounding.h"

namespace flatstep {

#define FLATSTEP_BLOCK 64

// Of values of either sign, or of none below zero. Of the latter a value that is not zero never
// becomes 0, nor less than half of the scale (but for the least subnormals): others are divided by
// its root.
template <int HAS_SIGN>
struct Codes {
  enum : uint32_t { LAST = HAS_SIGN ? 127 : 255, LEAST = HAS_SIGN ? 0 : 8, SHIFT = 19 };
  // The largest number that is kept, as its bits: with a sign 2^63, less than the root of the
  // other, so that a gradient whose square overflows makes no large update afterwards.
  enum : uint32_t { MOST = HAS_SIGN ? 0x5f000000u : 0x7f7f0000u };

  struct Block {
    uint8_t codes[FLATSTEP_BLOCK];
    float scale;
  };

  // Of a block, from the bits of its largest magnitude. A NaN makes it NaN as a whole; below 2^-100
  // codes are fewer, and never subnormal.
  static float scale_of(uint32_t largest_bits) {
    uint32_t bits = largest_bits > 0x7f800000u   ? 0x7fc00000u
                    : largest_bits > MOST        ? MOST
                    : largest_bits < 0x0d800000u ? 0x0d800000u
                                                 : largest_bits;
    float scale = FLATSTEP_BITS(float, bits) * (1.0f / magnitude(LAST));
    return largest_bits == 0u ? 0.0f : scale;
  }

  static float inverse(float scale) {
    return scale == 0.0f ? 0.0f : 1.0f / scale;
  }

  static uint8_t encode(float x, float inverse, RoundingKey key) {
    uint32_t bits = FLATSTEP_BITS(uint32_t, x);
    uint32_t magnitude = bits & 0x7fffffffu;
    float distance = 1.0f + FLATSTEP_BITS(float, magnitude) * inverse;
    // Rounded up if what is cut off and the key's leading bits carry.
    uint32_t up = FLATSTEP_BITS(uint32_t, distance) + (key.number >> (32 - SHIFT));
    Narrow code = Narrow(Narrow(up >> SHIFT) - Narrow(0x3f800000u >> SHIFT));
    code = code > LAST ? Narrow(LAST) : code;
    if (HAS_SIGN) {
      return uint8_t(code | (Narrow(bits >> 16) >> 8 & 0x80));
    }
    Narrow least = magnitude > LEAST ? Narrow(LEAST) : Narrow(magnitude);
    return uint8_t(code < least ? least : code);
  }

  static float decode(uint8_t code, float scale) {
    uint32_t sign = HAS_SIGN ? uint32_t(code) << 24 & 0x80000000u : 0u;
    float x = magnitude(code & LAST) * scale;
    return FLATSTEP_BITS(float, FLATSTEP_BITS(uint32_t, x) | sign);
  }

 private:
  static float magnitude(uint32_t code) {
    return FLATSTEP_BITS(float, 0x3f800000u + (code << SHIFT)) - 1.0f;
  }
};

}  // namespace flatstep
