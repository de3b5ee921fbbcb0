// Loads and stores of a few neighbouring elements, of flat arrays and of arrays of any layout, and
// of structs as words; blocks.h has those of blocks.
#pragma once

#include "../csrc/backend/metal_arguments.h"

// The host appends the instances of the kernels that it needs.
#define FLATSTEP_INSTANTIATE(name, function, ...) \
  template [[host_name(name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;

namespace flatstep {

// ---- Structs: not every compiler copies one from one address space to another. ----

template <typename T>
union Words {
  T value;
  uint at[(sizeof(T) + 3) / 4];
};

template <typename T>
FLATSTEP_FN T from_words(constant uint* from) {
  Words<T> words;
  for (uint k = 0; k < sizeof(T) / 4; ++k) {
    words.at[k] = from[k];
  }
  return words.value;
}

// ---- A run of elements: `count` of them, at most FLATSTEP_RUN. ----

// An array whose index the compiler does not know would lie in memory instead of registers. So
// every loop over a run goes to its end, and past `count` there are zeros that nobody stores.
#define FLATSTEP_UNROLL _Pragma("clang loop unroll(full)")

struct Run {
  float at[FLATSTEP_RUN];
};

// Where a run starts, of those that a threadgroup has of a segment.
FLATSTEP_FN uint64_t start_of_run(uint group, uint num_runs, uint run) {
  return (uint64_t(group) * num_runs + run) * FLATSTEP_RUN;
}

// All of a run at once, where `is_whole`: it has all its elements, and starts where a vector may.
template <typename T>
FLATSTEP_FN vec<T, FLATSTEP_RUN> load_values(const device T* from, uint count, bool is_whole) {
  typedef vec<T, FLATSTEP_RUN> Vector;
  Vector values = {};
  if (is_whole) {
    values = *(const device Vector*)(from);
  } else {
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      if (k < count) {
        values[k] = from[k];
      }
    }
  }
  return values;
}

template <typename T>
FLATSTEP_FN void store_values(
    device T* to, vec<T, FLATSTEP_RUN> values, uint count, bool is_whole) {
  typedef vec<T, FLATSTEP_RUN> Vector;
  if (is_whole) {
    *(device Vector*)(to) = values;
  } else {
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      if (k < count) {
        to[k] = values[k];
      }
    }
  }
}

template <typename S>
FLATSTEP_FN Run load_run(const device typename S::Stored* from, uint count, bool is_whole) {
  vec<typename S::Stored, FLATSTEP_RUN> values = load_values(from, count, is_whole);
  Run run;
  FLATSTEP_UNROLL
  for (uint k = 0; k < FLATSTEP_RUN; ++k) {
    run.at[k] = S::load(values[k]);
  }
  return run;
}

// `key` is that of the first element.
template <typename S>
FLATSTEP_FN void store_run(
    device typename S::Stored* to, Run run, uint count, bool is_whole, RoundingKey key) {
  vec<typename S::Stored, FLATSTEP_RUN> values;
  FLATSTEP_UNROLL
  for (uint k = 0; k < FLATSTEP_RUN; ++k) {
    values[k] = S::store(run.at[k], next(key, k));
  }
  store_values(to, values, count, is_whole);
}

// ---- The source: any storage, any layout. ----

// clang-format off
#define FLATSTEP_SOURCES(SOURCE)                                            \
  SOURCE(0) SOURCE(1) SOURCE(2) SOURCE(3) SOURCE(4) SOURCE(5) SOURCE(6)     \
  SOURCE(7) SOURCE(8) SOURCE(9) SOURCE(10) SOURCE(11) SOURCE(12) SOURCE(13) \
  SOURCE(14) SOURCE(15) SOURCE(16) SOURCE(17) SOURCE(18)
#define FLATSTEP_SOURCE(k) const device char* source##k [[buffer(FLATSTEP_FIRST_SOURCE + k)]],
#define FLATSTEP_CHOOSE(k) case k: source = source##k; break;
// clang-format on

// The last segment whose first group is not beyond this one.
FLATSTEP_FN constant SourceSegment& segment_of(
    constant SourceSegment* segments, uint num_segments, uint group) {
  uint number = 0;
  for (uint s = 1; s < num_segments; ++s) {
    number = segments[s].first_group <= group ? s : number;
  }
  return segments[number];
}

#define FLATSTEP_NUMBER(Type, dtype) STORAGE_##Type,
enum StorageNumber { FLATSTEP_STORAGES(FLATSTEP_NUMBER) };

#define FLATSTEP_LOAD(Type, dtype)                                    \
  case STORAGE_##Type:                                                \
    value = Type::load(((const device Type::Stored*)source)[offset]); \
    break;

FLATSTEP_FN float load_one(const device char* source, uint storage, int64_t offset) {
  float value = 0.0f;
  switch (StorageNumber(storage)) { FLATSTEP_STORAGES(FLATSTEP_LOAD) }
  return value;
}

#define FLATSTEP_LOAD_RUN(Type, dtype)                                                            \
  case STORAGE_##Type:                                                                            \
    run =                                                                                         \
        load_run<Type>((const device Type::Stored*)source + first, count, count == FLATSTEP_RUN); \
    break;

// Where element `index` lies, counted in row-major order over these dimensions.
FLATSTEP_FN int64_t
strided_offset(constant SourceDimension* dimensions, uint num_dimensions, uint64_t index) {
  int64_t offset = 0;
  for (uint d = num_dimensions; d > 0; --d) {
    uint64_t extent = dimensions[d - 1].extent;
    // A GPU divides 32 bits much faster than 64.
    bool is_small = (index | extent) >> 32 == 0;
    uint64_t next = is_small ? uint64_t(uint(index) / uint(extent)) : index / extent;
    offset += int64_t(index - next * extent) * dimensions[d - 1].stride;
    index = next;
  }
  return offset;
}

// Elements of a segment from its `first` on.
FLATSTEP_FN Run load_source(
    const device char* source,
    constant SourceSegment& segment,
    constant SourceDimension* dimensions,
    uint64_t first,
    uint count) {
  Run run = {};
  if (segment.source_layout == SOURCE_ALIGNED) {
    switch (StorageNumber(segment.storage)) { FLATSTEP_STORAGES(FLATSTEP_LOAD_RUN) }
    return run;
  }
  FLATSTEP_UNROLL
  for (uint k = 0; k < FLATSTEP_RUN; ++k) {
    if (k < count) {
      int64_t offset = int64_t(first + k);
      if (segment.source_layout != SOURCE_UNALIGNED) {
        offset = strided_offset(dimensions, segment.num_dimensions, first + k);
      }
      run.at[k] = load_one(source, segment.storage, offset);
    }
  }
  return run;
}

}  // namespace flatstep
