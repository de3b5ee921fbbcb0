// What decides whether a value is rounded up or down where a storage has too few bits for it: a
// number for each element and step, the same on every backend.
#pragma once

#include "dialect.h"

namespace flatstep {

// Element after element and step after step these numbers fill 32 bits evenly, in both directions
// at once (M. Roberts' R2 sequence). If a value is rounded up as often as its element's number
// says, what is smaller than a last place adds up as it should, and sooner than with random
// numbers.
struct RoundingKey {
  uint32_t number;
};

#define FLATSTEP_NEXT_ELEMENT 0xc13fa9a9u
#define FLATSTEP_NEXT_STEP 0x91e10da5u

// A permutation of 32 bits in which each output bit hangs on every input bit (C. Wellons, "Hash
// Prospector", lowbias32).
FLATSTEP_FN uint32_t scrambled(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// Where the numbers of an array start: of a leaf, by the hash of its name, 0 for the parameter and
// 1 + k for state number k.
FLATSTEP_FN uint32_t start_of(uint32_t seed, uint32_t leaf, uint32_t array) {
  return scrambled(scrambled(scrambled(seed + 1u) ^ leaf) + array);
}

FLATSTEP_FN RoundingKey rounding_key(uint32_t start, Step step, Step element) {
  RoundingKey key = {
      start + uint32_t(step) * FLATSTEP_NEXT_STEP + uint32_t(element) * FLATSTEP_NEXT_ELEMENT};
  return key;
}

// That of the element i further on.
FLATSTEP_FN RoundingKey next(RoundingKey key, uint32_t i) {
  RoundingKey result = {key.number + i * FLATSTEP_NEXT_ELEMENT};
  return result;
}

// A number that tells nothing of those of other elements and steps.
FLATSTEP_FN uint32_t random_bits(RoundingKey key) {
  return scrambled(key.number);
}

}  // namespace flatstep
