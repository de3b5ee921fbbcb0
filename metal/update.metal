// One step for some leaves of a bucket: load, call the rule, store. Or their gradients are added to
// those before, by the rule that does so.
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

// ---- A threadgroup's part of a segment: of a rule, and of the storages of p, state, average. ----

// Whether gradients are used otherwise than as they are. By the bits of 1 and of infinity: a
// compiler that knows of no NaN would lose one where it is clipped by what it takes to be finite.
FLATSTEP_FN bool changes_gradients(constant PassConstants* pass) {
  return *(constant uint*)&pass->grad_scale != 0x3f800000u ||
         *(constant uint*)&pass->clip_value != 0x7f800000u ||
         *(constant uint*)&pass->clip_factor != 0x3f800000u;
}

#define FLATSTEP_LOAD_STATE(k)                        \
  if (R::NUM_STATES > k) {                            \
    state[k] = StateRun<S##k>::load(state##k, place); \
  }
#define FLATSTEP_STORE_STATE(k)                                             \
  if (R::NUM_STATES > k) {                                                  \
    StateRun<S##k>::store(state##k, place, state[k], key_of(1 + k, first)); \
  }

template <typename R, typename P, typename S0, typename S1, typename S2, typename E>
struct Work {
  const device typename P::Stored* p_in;
  device typename P::Stored* p_out;
  device char* state0;
  device char* state1;
  device char* state2;
  device char* rests;  // what lies beside the parameters
  device char* ema;
  device char* accumulated;
  const device char* source;
  constant SourceSegment* segment;
  constant SourceDimension* dimensions;
  typename R::Constants constants;
  PassConstants pass;
  bool is_in_place;  // as parameters are
  bool changes_gradients;
  bool clears_sums;  // the gradients' own, which are the source
  uint starts[FLATSTEP_NUM_KEYS];
  uint group;  // of threads, among those of the segment
  uint passes;
  uint thread_index;
  uint num_threads;

  // Of an element of p, number 0, of a state or of the average.
  RoundingKey key_of(uint array, uint64_t element) const {
    return rounding_key(starts[array], pass.tick, element);
  }

  Place place_of(uint64_t first, uint count, bool has_block) const {
    Place place = {};
    place.p_at = segment->p_offset + first;
    place.state_at = segment->state_offset + first;
    place.count = count;
    place.is_whole = count == FLATSTEP_RUN && first % FLATSTEP_RUN == 0;
    place.has_block = has_block;
    uint lane = thread_index % FLATSTEP_SIMD_WIDTH;
    place.in_block = lane % FLATSTEP_BLOCK_LANES * FLATSTEP_RUN;
    place.first_lane = ushort(lane - lane % FLATSTEP_BLOCK_LANES);
    return place;
  }

  void update_run(uint64_t first, uint count, bool has_block, Run g) const {
    Place place = place_of(first, count, has_block);
    if (changes_gradients) {
      FLATSTEP_UNROLL
      for (uint i = 0; i < FLATSTEP_RUN; ++i) {
        g.at[i] = used_gradient(pass, g.at[i]);
      }
    }
    Run p = ParameterRun<P>::load(p_in, rests, place);
    Run state[3] = {};
    FLATSTEP_LOAD_STATE(0)
    FLATSTEP_LOAD_STATE(1)
    FLATSTEP_LOAD_STATE(2)
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
    Average<E>::update(ema, place, p, pass, key_of(FLATSTEP_EMA_KEY, first));
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
    ParameterRun<P>::store(p_out, rests, place, p, key_of(0, first));
    FLATSTEP_STORE_STATE(0)
    FLATSTEP_STORE_STATE(1)
    FLATSTEP_STORE_STATE(2)
    if (clears_sums) {
      clear_run(accumulated, segment->storage, place);
    }
  }

  // A step that is not taken: parameters stay as they are, bit for bit, and so does the state. Runs
  // are dealt out as those of whole tiles, where the segment has tiles.
  void keep_runs() const {
    bool has_tiles = segment->source_layout == SOURCE_TILED;
    uint pass_size =
        has_tiles ? FLATSTEP_TILE_ROWS * FLATSTEP_TILE_COLUMNS / FLATSTEP_RUN : FLATSTEP_THREADS;
    bool drops_sums = clears_sums && pass.action == ACTION_DROP;
    uint num_runs = passes * pass_size;
    for (uint run = thread_index; run < num_runs; run += num_threads) {
      uint64_t first = start_of_run(group, num_runs, run);
      if (first >= segment->size) {
        return;
      }
      uint count = uint(min(segment->size - first, uint64_t(FLATSTEP_RUN)));
      Place place = place_of(first, count, true);
      if (!is_in_place) {
        auto stored = load_values(p_in + place.p_at, count, place.is_whole);
        store_values(p_out + place.p_at, stored, count, place.is_whole);
      }
      if (drops_sums) {
        clear_run(accumulated, segment->storage, place);
      }
    }
  }

  // A pass takes FLATSTEP_THREADS runs, neighbouring threads neighbouring ones, to the end of the
  // last block.
  void update_runs() const {
    uint num_runs = passes * FLATSTEP_THREADS;
    // A GPU may run fewer threads than asked for in a threadgroup.
    for (uint run = thread_index; run < num_runs; run += num_threads) {
      uint64_t first = start_of_run(group, num_runs, run);
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

template <typename R, bool TILED, typename P, typename S0, typename S1, typename S2, typename E>
[[kernel]] void update(
    const device typename P::Stored* p_in [[buffer(FLATSTEP_P_IN)]],
    device typename P::Stored* p_out [[buffer(FLATSTEP_P_OUT)]],
    device char* state0 [[buffer(FLATSTEP_STATE)]],
    device char* state1 [[buffer(FLATSTEP_STATE + 1)]],
    device char* state2 [[buffer(FLATSTEP_STATE + 2)]],
    device char* rests [[buffer(FLATSTEP_RESTS)]],
    device char* ema [[buffer(FLATSTEP_EMA)]],
    device char* accumulated [[buffer(FLATSTEP_ACCUMULATED)]],
    constant uint* constants [[buffer(FLATSTEP_CONSTANTS)]],
    constant DispatchArguments& dispatch [[buffer(FLATSTEP_DISPATCH)]],
    constant SourceSegment* segments [[buffer(FLATSTEP_SEGMENTS)]],
    constant SourceDimension* dimensions [[buffer(FLATSTEP_DIMENSIONS)]],
    FLATSTEP_SOURCES(FLATSTEP_SOURCE) uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  threadgroup float tile[TILED ? FLATSTEP_TILE_ROWS * FLATSTEP_TILE_PITCH : 1];
  constant SourceSegment& segment = segment_of(segments, dispatch.num_segments, group);
  const device char* source = nullptr;
  switch (segment.source) {
    FLATSTEP_SOURCES(FLATSTEP_CHOOSE)
    // Through the pointer that clears it, since compilers take it that no two buffers overlap.
    case FLATSTEP_SUM_AS_SOURCE:
      source = accumulated;
      break;
  }
  Work<R, P, S0, S1, S2, E> work = {};
  work.p_in = dispatch.p_in_place ? p_out : p_in;
  work.p_out = p_out;
  work.state0 = state0;
  work.state1 = state1;
  work.state2 = state2;
  work.rests = rests;
  work.ema = ema;
  work.accumulated = accumulated;
  work.source = source + segment.source_offset;
  work.segment = &segment;
  work.dimensions = dimensions + segment.first_dimension;
  work.is_in_place = dispatch.p_in_place;
  work.clears_sums = segment.source == FLATSTEP_SUM_AS_SOURCE;
  if (!is_same<R, Copy>::value) {
    constant uint* own = constants + segment.group * FLATSTEP_GROUP_WORDS;
    work.pass = from_words<PassConstants>(own);
    work.constants = from_words<typename R::Constants>(own + FLATSTEP_PASS_WORDS);
    for (uint k = 0; k < FLATSTEP_NUM_KEYS; ++k) {
      work.starts[k] = start_of(work.pass.seed, segment.name, k);
    }
    work.changes_gradients = changes_gradients((constant PassConstants*)own);
  }
  work.group = group - segment.first_group;
  work.passes = dispatch.passes;
  work.thread_index = thread_index;
  work.num_threads = num_threads;
  if (work.pass.action != ACTION_UPDATE) {
    work.keep_runs();
  } else if (TILED && segment.source_layout == SOURCE_TILED) {
    work.update_tiles(tile);
  } else {
    work.update_runs();
  }
}
