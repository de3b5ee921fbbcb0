// A thread's run of parameters and of state, in whatever storage. In blocks there is what all of a
// block make together, its scale or its checksum: the lanes that have its runs are neighbours in a
// SIMD-group. Each of them takes part, also one past the end of the leaf, whose elements are zeros.
#pragma once

#include "load.h"

namespace flatstep {

#define FLATSTEP_BLOCK_LANES (FLATSTEP_BLOCK / FLATSTEP_RUN)

FLATSTEP_FN uint largest_of_block(uint x) {
  FLATSTEP_UNROLL
  for (uint mask = 1; mask < FLATSTEP_BLOCK_LANES; mask *= 2) {
    x = max(x, simd_shuffle_xor(x, ushort(mask)));
  }
  return x;
}

FLATSTEP_FN uint sum_of_block(uint x) {
  FLATSTEP_UNROLL
  for (uint mask = 1; mask < FLATSTEP_BLOCK_LANES; mask *= 2) {
    x += simd_shuffle_xor(x, ushort(mask));
  }
  return x;
}

// Where a run lies in the flat arrays and, where these have blocks, in its block. The lane that has
// the block's first run alone reads and writes what the block has once.
struct Place {
  uint64_t p_at;
  uint64_t state_at;
  uint count;
  bool is_whole;
  bool has_block;  // or it lies past the last one of its leaf
  uint in_block;
  ushort first_lane;

  uint64_t block() const {
    return state_at / FLATSTEP_BLOCK;
  }
  bool is_first() const {
    return has_block && in_block == 0;
  }
};

// A run of a block's bytes, which start where a word may: no more is known of an odd block.
template <typename T>
struct Bytes {
  enum { IN_WORD = 4 / sizeof(T) };
  typedef vec<T, IN_WORD> Word;

  T at[FLATSTEP_RUN];

  void load(const device T* block, Place place) {
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; k += IN_WORD) {
      Word word = {};
      if (place.has_block) {
        word = *(const device Word*)(block + place.in_block + k);
      }
      FLATSTEP_UNROLL
      for (uint i = 0; i < IN_WORD; ++i) {
        at[k + i] = word[i];
      }
    }
  }

  void store(device T* block, Place place) const {
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; k += IN_WORD) {
      Word word;
      FLATSTEP_UNROLL
      for (uint i = 0; i < IN_WORD; ++i) {
        word[i] = at[k + i];
      }
      if (place.has_block) {
        *(device Word*)(block + place.in_block + k) = word;
      }
    }
  }
};

// ---- State: plain, and in codes. ----

template <typename S>
struct StateRun {
  static Run load(const device char* state, Place place) {
    const device typename S::Stored* from = (const device typename S::Stored*)state;
    return load_run<S>(from + place.state_at, place.count, place.is_whole);
  }

  static void store(device char* state, Place place, Run run, RoundingKey key) {
    device typename S::Stored* to = (device typename S::Stored*)state;
    store_run<S>(to + place.state_at, run, place.count, place.is_whole, key);
  }
};

template <int HAS_SIGN>
struct StateRun<Codes<HAS_SIGN>> {
  typedef Codes<HAS_SIGN> S;
  typedef typename S::Block Block;

  static Run load(const device char* state, Place place) {
    const device Block* block = (const device Block*)state + place.block();
    float scale = simd_shuffle(place.is_first() ? block->scale : 0.0f, place.first_lane);
    Bytes<uint8_t> codes;
    codes.load(block->codes, place);
    Run run;
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      run.at[k] = S::decode(codes.at[k], scale);
    }
    return run;
  }

  static void store(device char* state, Place place, Run run, RoundingKey key) {
    device Block* block = (device Block*)state + place.block();
    uint largest = 0;
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      largest = max(largest, FLATSTEP_BITS(uint, run.at[k]) & 0x7fffffffu);
    }
    float scale = S::scale_of(largest_of_block(largest));
    float inverse = S::inverse(scale);
    Bytes<uint8_t> codes;
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      codes.at[k] = S::encode(run.at[k], inverse, next(key, k));
    }
    codes.store(block->codes, place);
    if (place.is_first()) {
      block->scale = scale;
    }
  }
};

// ---- The average of the parameters, if there is one, and the sum of their gradients. ----

// In place of a storage.
struct Absent {};

template <typename E>
struct Average {
  static void update(device char* ema, Place place, Run p, PassConstants pass, RoundingKey key) {
    if (pass.ema_weight == 0.0f) {
      return;
    }
    Run average = StateRun<E>::load(ema, place);
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      average.at[k] = averaged(pass, average.at[k], p.at[k]);
    }
    StateRun<E>::store(ema, place, average, key);
  }
};

template <>
struct Average<Absent> {
  static void update(device char*, Place, Run, PassConstants, RoundingKey) {
  }
};

#define FLATSTEP_CLEAR_RUN(Type, dtype)                                    \
  case STORAGE_##Type: {                                                   \
    device Type::Stored* to = (device Type::Stored*)sum;                   \
    vec<Type::Stored, FLATSTEP_RUN> zeros = {};                            \
    store_values(to + place.state_at, zeros, place.count, place.is_whole); \
  } break;

FLATSTEP_FN void clear_run(device char* sum, uint storage, Place place) {
  switch (StorageNumber(storage)) { FLATSTEP_STORAGES(FLATSTEP_CLEAR_RUN) }
}

// ---- Parameters: in one part, and in two. ----

template <typename P>
struct ParameterRun {
  typedef typename P::Stored Stored;

  static Run load(const device Stored* p, const device char*, Place place) {
    return load_run<P>(p + place.p_at, place.count, place.is_whole);
  }

  static void store(device Stored* p, device char*, Place place, Run run, RoundingKey key) {
    store_run<P>(p + place.p_at, run, place.count, place.is_whole, key);
  }
};

template <typename Places, typename T>
struct ParameterRun<Split<Places, T>> {
  typedef Split<Places, T> P;
  typedef typename P::Block Block;
  typedef vec<uint16_t, FLATSTEP_RUN> Values;

  static Run load(const device uint16_t* p, const device char* rests, Place place) {
    Values stored = load_values(p + place.p_at, place.count, place.is_whole);
    const device Block* block = (const device Block*)rests + place.block();
    uint sum = simd_shuffle(place.is_first() ? block->checksum : 0u, place.first_lane);
    bool are_theirs = sum == checksum(stored, place);
    Bytes<T> kept;
    kept.load(block->rests, place);
    Run run;
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      run.at[k] = P::load(stored[k], are_theirs ? kept.at[k] : T(0));
    }
    return run;
  }

  static void store(device uint16_t* p, device char* rests, Place place, Run run, RoundingKey key) {
    device Block* block = (device Block*)rests + place.block();
    Values stored;
    Bytes<T> kept;
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      Parts<T> parts = P::store(run.at[k], next(key, k));
      stored[k] = parts.stored;
      kept.at[k] = parts.rest;
    }
    store_values(p + place.p_at, stored, place.count, place.is_whole);
    kept.store(block->rests, place);
    uint sum = checksum(stored, place);
    if (place.is_first()) {
      block->checksum = sum;
    }
  }

  // Of the block, from what each lane has of it.
  static uint checksum(Values stored, Place place) {
    uint sum = 0;
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      sum += P::checksum(stored[k], checksum_weight(place.in_block + k));
    }
    return sum_of_block(sum);
  }
};

}  // namespace flatstep
