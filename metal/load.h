// Loads and stores of a few neighbouring elements, of flat arrays and of arrays of any layout.
#pragma once

#include "../csrc/backend/metal_arguments.h"

namespace flatstep {

// ---- Loads and stores of a run of elements: `count` of them, at most FLATSTEP_RUN. ----

// An array whose index the compiler does not know would lie in memory instead of registers. So
// every loop over a run goes to its end, and past `count` there are zeros that nobody stores.
#define FLATSTEP_UNROLL _Pragma("clang loop unroll(full)")

struct Run {
  float at[FLATSTEP_RUN];
};

template <typename T>
FLATSTEP_FN Run load_aligned(const device T* from, uint count) {
  Run run = {};
  if (count == FLATSTEP_RUN) {
    vec<T, FLATSTEP_RUN> values = *(const device vec<T, FLATSTEP_RUN>*)(from);
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      run.at[k] = float(values[k]);
    }
  } else {
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      if (k < count) {
        run.at[k] = float(from[k]);
      }
    }
  }
  return run;
}

template <typename T>
FLATSTEP_FN void store_aligned(device T* to, Run run, uint count) {
  if (count == FLATSTEP_RUN) {
    vec<T, FLATSTEP_RUN> values;
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      values[k] = T(run.at[k]);
    }
    *(device vec<T, FLATSTEP_RUN>*)(to) = values;
  } else {
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      if (k < count) {
        to[k] = T(run.at[k]);
      }
    }
  }
}

// ---- The source: any dtype, any layout. ----

template <typename T>
FLATSTEP_FN float load_one(const device char* source, int64_t offset) {
  return float(((const device T*)source)[offset]);
}

FLATSTEP_FN float load_one(const device char* source, uint type, int64_t offset) {
  switch (type) {
    case SOURCE_FLOAT16:
      return load_one<half>(source, offset);
    case SOURCE_BFLOAT16:
      return load_one<bfloat>(source, offset);
    default:
      return load_one<float>(source, offset);
  }
}

FLATSTEP_FN Run load_aligned(const device char* source, uint type, uint64_t first, uint count) {
  switch (type) {
    case SOURCE_FLOAT16:
      return load_aligned((const device half*)source + first, count);
    case SOURCE_BFLOAT16:
      return load_aligned((const device bfloat*)source + first, count);
    default:
      return load_aligned((const device float*)source + first, count);
  }
}

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

FLATSTEP_FN Run load_source(
    const device char* source,
    constant SourceSegment& segment,
    constant SourceDimension* dimensions,
    uint64_t first,
    uint count) {
  if (segment.source_layout == SOURCE_ALIGNED) {
    return load_aligned(source, segment.source_type, first, count);
  }
  Run run = {};
  FLATSTEP_UNROLL
  for (uint k = 0; k < FLATSTEP_RUN; ++k) {
    if (k < count) {
      int64_t offset = int64_t(first + k);
      if (segment.source_layout != SOURCE_UNALIGNED) {
        offset = strided_offset(dimensions, segment.num_dimensions, first + k);
      }
      run.at[k] = load_one(source, segment.source_type, offset);
    }
  }
  return run;
}

}  // namespace flatstep
