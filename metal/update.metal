// One step for up to twenty leaves of a bucket: load, call the rule, store.
//
// Parameters and state are flat; gradients lie wherever the backward pass left them, so each has a
// buffer of its own. A threadgroup works on one segment, and prepares the rule's constants once.
#include "../csrc/backend/metal_arguments.h"
#include "load.h"

namespace flatstep {

// ---- What a rule is to the kernel: its constants, all floats, and the update of an element, whose
// ---- parameter may be stored in half precision. ----

struct Adam {
  typedef AdamStep Constants;
  static Constants prepare(constant Hyperparameters& h, float learning_rate, Step steps) {
    return prepare_adam(h, learning_rate, steps);
  }
  template <bool HALF_PARAMETER>
  static Element update(Constants s, Element e, float g) {
    return adam<HALF_PARAMETER>(s, e, g);
  }
  enum { READS_P = 1, HAS_M = 1, HAS_V = 1 };
};

template <bool HAS_WEIGHT_DECAY, bool HAS_MOMENTUM, bool NESTEROV>
struct Sgd {
  typedef SgdStep Constants;
  static Constants prepare(constant Hyperparameters& h, float learning_rate, Step) {
    return prepare_sgd(h, learning_rate);
  }
  template <bool HALF_PARAMETER>
  static Element update(Constants s, Element e, float g) {
    return sgd<HAS_WEIGHT_DECAY, HAS_MOMENTUM, NESTEROV>(s, e, g);
  }
  enum { READS_P = 1, HAS_M = 0, HAS_V = HAS_MOMENTUM };
};

// Brings arrays that lie apart into a flat one: the source takes the gradient's place.
struct Copy {
  typedef Pair Constants;
  static Constants prepare(constant Hyperparameters&, float, Step) {
    return pair(0.0f);
  }
  template <bool HALF_PARAMETER>
  static Element update(Constants, Element e, float source) {
    e.p = source;
    return e;
  }
  enum { READS_P = 0, HAS_M = 0, HAS_V = 0 };
};

// ---- The update of a run of elements, and of one. ----

// Flat parameters and state, as they are stored.
template <typename P, typename M, typename V>
struct FlatArrays {
  const device P* p_in;
  device P* p_out;
  device M* m;
  device V* v;
};

template <typename R, typename P, typename M, typename V>
FLATSTEP_FN void update_run(
    thread const FlatArrays<P, M, V>& arrays,
    thread const typename R::Constants& constants,
    constant SourceSegment& segment,
    uint64_t first,
    uint count,
    Run g) {
  uint64_t p_at = segment.p_offset + first;
  uint64_t state_at = segment.state_offset + first;
  Run p = {};
  Run m = {};
  Run v = {};
  if (R::READS_P) {
    p = load_aligned(arrays.p_in + p_at, count);
  }
  if (R::HAS_M) {
    m = load_aligned(arrays.m + state_at, count);
  }
  if (R::HAS_V) {
    v = load_aligned(arrays.v + state_at, count);
  }
  FLATSTEP_UNROLL
  for (uint k = 0; k < FLATSTEP_RUN; ++k) {
    Element e;
    e.p = p.at[k];
    e.m = m.at[k];
    e.v = v.at[k];
    e = R::template update<sizeof(P) == 2>(constants, e, g.at[k]);
    p.at[k] = e.p;
    m.at[k] = e.m;
    v.at[k] = e.v;
  }
  store_aligned(arrays.p_out + p_at, p, count);
  if (R::HAS_M) {
    store_aligned(arrays.m + state_at, m, count);
  }
  if (R::HAS_V) {
    store_aligned(arrays.v + state_at, v, count);
  }
}

template <typename R, typename P, typename M, typename V>
FLATSTEP_FN void update_one(
    thread const FlatArrays<P, M, V>& arrays,
    thread const typename R::Constants& constants,
    constant SourceSegment& segment,
    uint64_t index,
    float g) {
  uint64_t p_at = segment.p_offset + index;
  uint64_t state_at = segment.state_offset + index;
  Element e;
  e.p = R::READS_P ? float(arrays.p_in[p_at]) : 0.0f;
  e.m = R::HAS_M ? float(arrays.m[state_at]) : 0.0f;
  e.v = R::HAS_V ? float(arrays.v[state_at]) : 0.0f;
  e = R::template update<sizeof(P) == 2>(constants, e, g);
  arrays.p_out[p_at] = P(e.p);
  if (R::HAS_M) {
    arrays.m[state_at] = M(e.m);
  }
  if (R::HAS_V) {
    arrays.v[state_at] = V(e.v);
  }
}

// ---- A threadgroup's part of a segment. ----

struct Work {
  uint group;  // among those of the segment
  uint passes;
  uint thread_index;
  uint num_threads;
};

// A pass takes FLATSTEP_THREADS runs, neighbouring threads neighbouring ones.
template <typename R, typename P, typename M, typename V>
FLATSTEP_FN void update_runs(
    thread const FlatArrays<P, M, V>& arrays,
    thread const typename R::Constants& constants,
    constant SourceSegment& segment,
    constant SourceDimension* dimensions,
    const device char* source,
    Work work) {
  uint64_t first_run = uint64_t(work.group) * work.passes * FLATSTEP_THREADS;
  uint num_runs = work.passes * FLATSTEP_THREADS;
  // A GPU may run fewer threads than asked for in a threadgroup.
  for (uint run = work.thread_index; run < num_runs; run += work.num_threads) {
    uint64_t first = (first_run + run) * FLATSTEP_RUN;
    if (first >= segment.size) {
      return;
    }
    uint64_t left = segment.size - first;
    uint count = left < FLATSTEP_RUN ? uint(left) : FLATSTEP_RUN;
    Run g = load_source(source, segment, dimensions, first, count);
    update_run<R>(arrays, constants, segment, first, count, g);
  }
}

// The gradient of a linear layer's weight arrives transposed: a walk along its rows would read a
// cache line for every element. So a tile is read along the columns, where neighbouring threads
// find neighbouring elements, and updated along the rows.
template <typename R, typename P, typename M, typename V>
FLATSTEP_FN void update_tiles(
    thread const FlatArrays<P, M, V>& arrays,
    thread const typename R::Constants& constants,
    constant SourceSegment& segment,
    constant SourceDimension* dimensions,
    const device char* source,
    threadgroup float* tile,
    Work work) {
  const uint pitch = FLATSTEP_TILE + 1;  // so that a tile's column lies in different banks
  uint num_outer = segment.num_dimensions - 2;
  uint64_t num_rows = dimensions[num_outer].extent;
  uint64_t num_columns = dimensions[num_outer + 1].extent;
  int64_t column_stride = dimensions[num_outer + 1].stride;
  uint tiles_down = uint((num_rows + FLATSTEP_TILE - 1) / FLATSTEP_TILE);
  uint tiles_across = uint((num_columns + FLATSTEP_TILE - 1) / FLATSTEP_TILE);
  uint num_matrices = uint(segment.size / (num_rows * num_columns));
  uint num_tiles = num_matrices * tiles_down * tiles_across;

  for (uint pass = 0; pass < work.passes; ++pass) {
    uint number = work.group * work.passes + pass;
    if (number >= num_tiles) {
      return;
    }
    uint matrix = number / (tiles_down * tiles_across);
    uint64_t row = number / tiles_across % tiles_down * FLATSTEP_TILE;
    uint64_t column = number % tiles_across * FLATSTEP_TILE;
    uint height = uint(min(num_rows - row, uint64_t(FLATSTEP_TILE)));
    uint width = uint(min(num_columns - column, uint64_t(FLATSTEP_TILE)));
    // The rows lie side by side.
    int64_t corner = strided_offset(dimensions, num_outer, matrix) + int64_t(row) +
                     int64_t(column) * column_stride;

    for (uint i = work.thread_index; i < FLATSTEP_TILE * FLATSTEP_TILE; i += work.num_threads) {
      uint r = i % FLATSTEP_TILE;
      uint c = i / FLATSTEP_TILE;
      if (r < height && c < width) {
        int64_t offset = corner + r + c * column_stride;
        tile[r * pitch + c] = load_one(source, segment.source_type, offset);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint64_t first = (uint64_t(matrix) * num_rows + row) * num_columns + column;
    for (uint i = work.thread_index; i < FLATSTEP_TILE * FLATSTEP_TILE; i += work.num_threads) {
      uint r = i / FLATSTEP_TILE;
      uint c = i % FLATSTEP_TILE;
      if (r < height && c < width) {
        uint64_t index = first + r * num_columns + c;
        update_one<R>(arrays, constants, segment, index, tile[r * pitch + c]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// ---- The kernel. ----

// Each threadgroup finds its segment; the last whose first group is not beyond this one.
FLATSTEP_FN uint find_segment(constant SourceSegment* segments, uint num_segments, uint group) {
  uint found = 0;
  for (uint s = 1; s < num_segments; ++s) {
    if (segments[s].first_group <= group) {
      found = s;
    }
  }
  return found;
}

}  // namespace flatstep

using namespace flatstep;

#define FLATSTEP_SOURCE(k) const device char* source##k [[buffer(FLATSTEP_FIRST_SOURCE + k)]]
#define FLATSTEP_CASE(k) \
  case k:                \
    source = source##k;  \
    break;

template <typename R, typename P, typename M, typename V, bool HAS_TILES>
[[kernel]] void update(
    const device P* p_in [[buffer(FLATSTEP_P_IN)]],
    device P* p_out [[buffer(FLATSTEP_P_OUT)]],
    device M* m [[buffer(FLATSTEP_M)]],
    device V* v [[buffer(FLATSTEP_V)]],
    const device Step* step [[buffer(FLATSTEP_STEP)]],
    const device float* learning_rate [[buffer(FLATSTEP_LEARNING_RATE)]],
    constant StepArguments& arguments [[buffer(FLATSTEP_CONSTANTS)]],
    constant DispatchArguments& dispatch [[buffer(FLATSTEP_DISPATCH)]],
    constant SourceSegment* segments [[buffer(FLATSTEP_SEGMENTS)]],
    constant SourceDimension* dimensions [[buffer(FLATSTEP_DIMENSIONS)]],
    FLATSTEP_SOURCE(0),
    FLATSTEP_SOURCE(1),
    FLATSTEP_SOURCE(2),
    FLATSTEP_SOURCE(3),
    FLATSTEP_SOURCE(4),
    FLATSTEP_SOURCE(5),
    FLATSTEP_SOURCE(6),
    FLATSTEP_SOURCE(7),
    FLATSTEP_SOURCE(8),
    FLATSTEP_SOURCE(9),
    FLATSTEP_SOURCE(10),
    FLATSTEP_SOURCE(11),
    FLATSTEP_SOURCE(12),
    FLATSTEP_SOURCE(13),
    FLATSTEP_SOURCE(14),
    FLATSTEP_SOURCE(15),
    FLATSTEP_SOURCE(16),
    FLATSTEP_SOURCE(17),
    FLATSTEP_SOURCE(18),
    FLATSTEP_SOURCE(19),
    uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  typedef typename R::Constants Constants;
  threadgroup float shared_constants[sizeof(Constants) / sizeof(float)];
  threadgroup float tile[HAS_TILES ? FLATSTEP_TILE * (FLATSTEP_TILE + 1) : 1];

  if (thread_index == 0) {
    Step now = arguments.reads_step ? step[0] : 0;
    float rate = arguments.schedule.num_pieces > 0 ? schedule_value(arguments.schedule, now)
                                                   : learning_rate[0];
    Constants prepared = R::prepare(arguments.hyperparameters, rate, now);
    thread const float* from = (thread const float*)&prepared;
    for (uint k = 0; k < sizeof(Constants) / sizeof(float); ++k) {
      shared_constants[k] = from[k];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Constants constants;
  thread float* to = (thread float*)&constants;
  for (uint k = 0; k < sizeof(Constants) / sizeof(float); ++k) {
    to[k] = shared_constants[k];
  }

  uint number = find_segment(segments, dispatch.num_segments, group);
  const device char* source = source0;
  switch (number) {
    FLATSTEP_CASE(1)
    FLATSTEP_CASE(2)
    FLATSTEP_CASE(3)
    FLATSTEP_CASE(4)
    FLATSTEP_CASE(5)
    FLATSTEP_CASE(6)
    FLATSTEP_CASE(7)
    FLATSTEP_CASE(8)
    FLATSTEP_CASE(9)
    FLATSTEP_CASE(10)
    FLATSTEP_CASE(11)
    FLATSTEP_CASE(12)
    FLATSTEP_CASE(13)
    FLATSTEP_CASE(14)
    FLATSTEP_CASE(15)
    FLATSTEP_CASE(16)
    FLATSTEP_CASE(17)
    FLATSTEP_CASE(18)
    FLATSTEP_CASE(19)
  }
  constant SourceSegment& segment = segments[number];
  constant SourceDimension* own_dimensions = dimensions + segment.first_dimension;
  FlatArrays<P, M, V> arrays;
  arrays.p_in = arguments.p_in_place ? p_out : p_in;
  arrays.p_out = p_out;
  arrays.m = m;
  arrays.v = v;
  Work work;
  work.group = group - segment.first_group;
  work.passes = dispatch.passes;
  work.thread_index = thread_index;
  work.num_threads = num_threads;
  if (HAS_TILES && segment.source_layout == SOURCE_TILED) {
    update_tiles<R>(arrays, constants, segment, own_dimensions, source, tile, work);
  } else {
    update_runs<R>(arrays, constants, segment, own_dimensions, source, work);
  }
}

// The host appends the instances that it needs: a rule, the dtypes of p, m and v, and whether a
// source is read in tiles.
#define FLATSTEP_INSTANTIATE(name, ...) \
  template [[host_name(name)]] [[kernel]] decltype(update<__VA_ARGS__>) update<__VA_ARGS__>;
