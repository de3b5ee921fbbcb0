// One step for some leaves of a bucket: load, call the rule, store.
//
// Parameters and state are flat; gradients are flat as well, or lie wherever the backward pass left
// them, each in a buffer of its own. A threadgroup works on one segment.
#include "blocks.h"

namespace flatstep {

// Brings arrays that lie apart into a flat one: a rule for which the source takes the gradient's
// place. It has no constants, and does not use p, so that no compiler loads it.
struct Copy {
  enum { NUM_STATES = 0 };
  struct Constants {};
  static Element<0> update(Constants, Element<0> e, float source) {
    e.p = source;
    return e;
  }
};

// ---- A threadgroup's part of a segment: of a rule, and of the storages of p and state. ----

#define FLATSTEP_LOAD_STATE(k)                        \
  if (R::NUM_STATES > k) {                            \
    state[k] = StateRun<S##k>::load(state##k, place); \
  }
#define FLATSTEP_STORE_STATE(k)                                             \
  if (R::NUM_STATES > k) {                                                  \
    StateRun<S##k>::store(state##k, place, state[k], key_of(1 + k, first)); \
  }

template <typename R, typename P, typename S0, typename S1, typename S2, typename S3>
struct Work {
  const device typename P::Stored* p_in;
  device typename P::Stored* p_out;
  device char* state0;
  device char* state1;
  device char* state2;
  device char* state3;
  const device char* source;
  constant SourceSegment* segment;
  constant SourceDimension* dimensions;
  typename R::Constants constants;
  uint step;
  uint starts[5];  // of the keys of p and of the state
  uint group;      // of threads, among those of the segment
  uint passes;
  uint thread_index;
  uint num_threads;

  // Of an element of p, number 0, or of a state.
  RoundingKey key_of(uint array, uint64_t element) const {
    return rounding_key(starts[array], step, element);
  }

  // What lies beside the parameters: the buffer after the rule's.
  device char* rests() const {
    return R::NUM_STATES == 0   ? state0
           : R::NUM_STATES == 1 ? state1
           : R::NUM_STATES == 2 ? state2
                                : state3;
  }

  void update_run(uint64_t first, uint count, bool has_block, Run g) const {
    Place place = {};
    place.p_at = segment->p_offset + first;
    place.state_at = segment->state_offset + first;
    place.count = count;
    place.is_whole = count == FLATSTEP_RUN && first % FLATSTEP_RUN == 0;
    place.has_block = has_block;
    uint lane = thread_index % FLATSTEP_SIMD_WIDTH;
    place.in_block = lane % FLATSTEP_BLOCK_LANES * FLATSTEP_RUN;
    place.first_lane = ushort(lane - lane % FLATSTEP_BLOCK_LANES);
    Run p = ParameterRun<P>::load(p_in, rests(), place);
    Run state[4] = {};
    FLATSTEP_LOAD_STATE(0)
    FLATSTEP_LOAD_STATE(1)
    FLATSTEP_LOAD_STATE(2)
    FLATSTEP_LOAD_STATE(3)
    FLATSTEP_UNROLL
    for (uint i = 0; i < FLATSTEP_RUN; ++i) {
      Element<R::NUM_STATES> e = {};
      e.p = p.at[i];
      FLATSTEP_UNROLL
      for (int k = 0; k < R::NUM_STATES; ++k) {
        e.state[k] = state[k].at[i];
      }
      e = R::update(constants, e, g.at[i]);
      p.at[i] = e.p;
      FLATSTEP_UNROLL
      for (int k = 0; k < R::NUM_STATES; ++k) {
        state[k].at[i] = e.state[k];
      }
    }
    if (count < FLATSTEP_RUN) {  // past the end of the leaf a block is zero, whatever the rule
      FLATSTEP_UNROLL
      for (uint i = 0; i < FLATSTEP_RUN; ++i) {
        p.at[i] = i < count ? p.at[i] : 0.0f;
        FLATSTEP_UNROLL
        for (int k = 0; k < R::NUM_STATES; ++k) {
          state[k].at[i] = i < count ? state[k].at[i] : 0.0f;
        }
      }
    }
    ParameterRun<P>::store(p_out, rests(), place, p, key_of(0, first));
    FLATSTEP_STORE_STATE(0)
    FLATSTEP_STORE_STATE(1)
    FLATSTEP_STORE_STATE(2)
    FLATSTEP_STORE_STATE(3)
  }

  // A pass takes FLATSTEP_THREADS runs, neighbouring threads neighbouring ones, to the end of the
  // last block.
  void update_runs() const {
    uint64_t first_run = uint64_t(group) * passes * FLATSTEP_THREADS;
    uint num_runs = passes * FLATSTEP_THREADS;
    // A GPU may run fewer threads than asked for in a threadgroup.
    for (uint run = thread_index; run < num_runs; run += num_threads) {
      uint64_t first = (first_run + run) * FLATSTEP_RUN;
      if (first - first % FLATSTEP_BLOCK >= segment->size) {
        return;
      }
      uint64_t left = segment->size - min(segment->size, first);
      uint count = uint(min(left, uint64_t(FLATSTEP_RUN)));
      update_run(first, count, true, load_source(source, *segment, dimensions, first, count));
    }
  }

  // The gradient of a linear layer's weight arrives transposed: a walk along its rows would read a
  // cache line for every element. So a tile is read along the columns, where neighbouring threads
  // find neighbouring elements, and updated along the rows.
  void update_tiles(threadgroup float* tile) const {
    const uint pitch = FLATSTEP_TILE_PITCH;
    const uint runs_across = FLATSTEP_TILE_COLUMNS / FLATSTEP_RUN;
    uint num_outer = segment->num_dimensions - 2;
    uint64_t num_rows = dimensions[num_outer].extent;
    uint64_t num_columns = dimensions[num_outer + 1].extent;
    int64_t column_stride = dimensions[num_outer + 1].stride;
    uint tiles_down = uint((num_rows + FLATSTEP_TILE_ROWS - 1) / FLATSTEP_TILE_ROWS);
    uint tiles_across = uint((num_columns + FLATSTEP_TILE_COLUMNS - 1) / FLATSTEP_TILE_COLUMNS);
    uint num_matrices = uint(segment->size / (num_rows * num_columns));
    uint num_tiles = num_matrices * tiles_down * tiles_across;

    for (uint pass = 0; pass < passes; ++pass) {
      uint number = group * passes + pass;
      if (number >= num_tiles) {
        return;
      }
      uint matrix = number / (tiles_down * tiles_across);
      uint64_t row = number / tiles_across % tiles_down * FLATSTEP_TILE_ROWS;
      uint64_t column = number % tiles_across * FLATSTEP_TILE_COLUMNS;
      uint height = uint(min(num_rows - row, uint64_t(FLATSTEP_TILE_ROWS)));
      uint width = uint(min(num_columns - column, uint64_t(FLATSTEP_TILE_COLUMNS)));
      // The rows lie side by side.
      int64_t corner = strided_offset(dimensions, num_outer, matrix) + int64_t(row) +
                       int64_t(column) * column_stride;

      const uint tile_size = FLATSTEP_TILE_ROWS * FLATSTEP_TILE_COLUMNS;
      for (uint i = thread_index; i < tile_size; i += num_threads) {
        uint r = i % FLATSTEP_TILE_ROWS;
        uint c = i / FLATSTEP_TILE_ROWS;
        if (r < height && c < width) {
          int64_t offset = corner + r + c * column_stride;
          tile[r * pitch + c] = load_one(source, segment->storage, offset);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint64_t first = (uint64_t(matrix) * num_rows + row) * num_columns + column;
      // Where there are blocks, a row of a tile is one.
      for (uint i = thread_index; i < FLATSTEP_TILE_ROWS * runs_across; i += num_threads) {
        uint r = i / runs_across;
        uint c = i % runs_across * FLATSTEP_RUN;
        uint count = r < height && c < width ? min(width - c, uint(FLATSTEP_RUN)) : 0;
        Run g = {};
        FLATSTEP_UNROLL
        for (uint k = 0; k < FLATSTEP_RUN; ++k) {
          if (k < count) {
            g.at[k] = tile[r * pitch + c + k];
          }
        }
        update_run(first + r * num_columns + c, count, r < height, g);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
};

}  // namespace flatstep

using namespace flatstep;

// clang-format off
#define FLATSTEP_SOURCES(SOURCE)                                            \
  SOURCE(0) SOURCE(1) SOURCE(2) SOURCE(3) SOURCE(4) SOURCE(5) SOURCE(6)     \
  SOURCE(7) SOURCE(8) SOURCE(9) SOURCE(10) SOURCE(11) SOURCE(12) SOURCE(13) \
  SOURCE(14) SOURCE(15) SOURCE(16) SOURCE(17) SOURCE(18) SOURCE(19)
#define FLATSTEP_SOURCE(k) const device char* source##k [[buffer(FLATSTEP_FIRST_SOURCE + k)]],
#define FLATSTEP_CHOOSE(k) case k: work.source = source##k; break;
// clang-format on

template <typename R, bool TILED, typename P, typename S0, typename S1, typename S2, typename S3>
[[kernel]] void update(
    const device typename P::Stored* p_in [[buffer(FLATSTEP_P_IN)]],
    device typename P::Stored* p_out [[buffer(FLATSTEP_P_OUT)]],
    device char* state0 [[buffer(FLATSTEP_STATE)]],
    device char* state1 [[buffer(FLATSTEP_STATE + 1)]],
    device char* state2 [[buffer(FLATSTEP_STATE + 2)]],
    device char* state3 [[buffer(FLATSTEP_STATE + 3)]],
    constant uint* constants [[buffer(FLATSTEP_CONSTANTS)]],
    constant DispatchArguments& dispatch [[buffer(FLATSTEP_DISPATCH)]],
    constant SourceSegment* segments [[buffer(FLATSTEP_SEGMENTS)]],
    constant SourceDimension* dimensions [[buffer(FLATSTEP_DIMENSIONS)]],
    FLATSTEP_SOURCES(FLATSTEP_SOURCE) uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  threadgroup float tile[TILED ? FLATSTEP_TILE_ROWS * FLATSTEP_TILE_PITCH : 1];
  // The last segment whose first group is not beyond this one.
  uint number = 0;
  for (uint s = 1; s < dispatch.num_segments; ++s) {
    number = segments[s].first_group <= group ? s : number;
  }
  constant SourceSegment& segment = segments[number];
  Work<R, P, S0, S1, S2, S3> work = {};
  work.p_in = dispatch.p_in_place ? p_out : p_in;
  work.p_out = p_out;
  work.state0 = state0;
  work.state1 = state1;
  work.state2 = state2;
  work.state3 = state3;
  switch (segment.source) { FLATSTEP_SOURCES(FLATSTEP_CHOOSE) }
  work.source += segment.source_offset;
  work.segment = &segment;
  work.dimensions = dimensions + segment.first_dimension;
  if (!is_same<R, Copy>::value) {
    constant uint* own = constants + segment.group * FLATSTEP_GROUP_WORDS;
    work.constants = from_words<typename R::Constants>(own + FLATSTEP_KEY_WORDS);
    work.step = own[0];
    for (uint k = 0; k < 5; ++k) {
      work.starts[k] = start_of(own[1], segment.name, k);
    }
  }
  work.group = group - segment.first_group;
  work.passes = dispatch.passes;
  work.thread_index = thread_index;
  work.num_threads = num_threads;
  if (TILED && segment.source_layout == SOURCE_TILED) {
    work.update_tiles(tile);
  } else {
    work.update_runs();
  }
}
