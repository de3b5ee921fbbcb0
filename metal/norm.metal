// The sum of the squares of all gradients: of each threadgroup's part, then of all parts.
//
// Squares are added in pairs of floats, but for trees over four elements, a SIMD-group and a
// threadgroup's: from an element to the result there are a dozen roundings, however many there are.
#include "load.h"

namespace flatstep {

// A threadgroup's total of each of its threads' own. Thread 0 has it.
FLATSTEP_FN Pair
sum_of_threads(float own, threadgroup float* sums, uint thread_index, uint num_threads) {
  FLATSTEP_UNROLL
  for (uint mask = 1; mask < FLATSTEP_SIMD_WIDTH; mask *= 2) {
    own += simd_shuffle_xor(own, ushort(mask));
  }
  if (thread_index % FLATSTEP_SIMD_WIDTH == 0) {
    sums[thread_index / FLATSTEP_SIMD_WIDTH] = own;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Pair total = {};
  if (thread_index == 0) {
    for (uint k = 0; k < num_threads / FLATSTEP_SIMD_WIDTH; ++k) {
      total = with_value(total, sums[k]);
    }
  }
  return total;
}

FLATSTEP_FN StepScalars scalars_of(
    constant NormArguments& arguments,
    const device float* grad_scale,
    const device Step* accumulated) {
  StepScalars now = {};
  now.grad_scale = arguments.has_grad_scale != 0 ? grad_scale[0] : 1.0f;
  now.accumulated = arguments.has_accumulated != 0 ? accumulated[0] : 0;
  return now;
}

}  // namespace flatstep

using namespace flatstep;

// A threadgroup works on one segment, and on whole SIMD-groups of at most THREADS threads.
template <uint THREADS>
[[kernel]] void sum_squares(
    const device float* grad_scale [[buffer(FLATSTEP_NORM_GRAD_SCALE)]],
    const device Step* accumulated [[buffer(FLATSTEP_NORM_ACCUMULATED)]],
    device float* sums [[buffer(FLATSTEP_NORM_SUMS)]],
    constant NormArguments& arguments [[buffer(FLATSTEP_NORM_ARGUMENTS)]],
    constant DispatchArguments& dispatch [[buffer(FLATSTEP_DISPATCH)]],
    constant SourceSegment* segments [[buffer(FLATSTEP_SEGMENTS)]],
    constant SourceDimension* dimensions [[buffer(FLATSTEP_DIMENSIONS)]],
    FLATSTEP_SOURCES(FLATSTEP_SOURCE) uint group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  threadgroup float of_simdgroups[THREADS / FLATSTEP_SIMD_WIDTH];
  PassSettings settings = from_words<PassSettings>((constant uint*)&arguments.settings);
  StepScalars now = scalars_of(arguments, grad_scale, accumulated);
  if (holds(settings, now)) {
    return;
  }
  float scale = scale_of(settings, now);
  constant SourceSegment& segment = segment_of(segments, dispatch.num_segments, group);
  const device char* source = nullptr;
  switch (segment.source) { FLATSTEP_SOURCES(FLATSTEP_CHOOSE) }
  source += segment.source_offset;
  constant SourceDimension* own_dimensions = dimensions + segment.first_dimension;

  uint num_runs = dispatch.passes * FLATSTEP_THREADS;
  Pair total = {};
  uint largest = 0;
  for (uint run = thread_index; run < num_runs; run += num_threads) {
    uint64_t first = start_of_run(group - segment.first_group, num_runs, run);
    if (first >= segment.size) {
      break;
    }
    uint count = uint(min(segment.size - first, uint64_t(FLATSTEP_RUN)));
    Run g = load_source(source, segment, own_dimensions, segment.p_offset + first, count);
    FLATSTEP_UNROLL
    for (uint k = 0; k < FLATSTEP_RUN; ++k) {
      largest = max(largest, FLATSTEP_BITS(uint, g.at[k]) & 0x7fffffffu);
      float used = scaled_gradient(scale, settings.clip_value, g.at[k]);
      g.at[k] = used * used;
    }
    total = with_value(total, (g.at[0] + g.at[1]) + (g.at[2] + g.at[3]));
  }
  bool is_nan = settings.skips_nonfinite != 0 && largest >= 0x7f800000u;
  float own = is_nan ? FLATSTEP_BITS(float, 0x7fc00000u) : total.hi;
  Pair of_group = sum_of_threads(own, of_simdgroups, thread_index, num_threads);
  if (thread_index == 0) {
    sums[group] = of_group.hi;
  }
}

// One threadgroup.
template <uint THREADS>
[[kernel]] void add_sums(
    const device float* grad_scale [[buffer(FLATSTEP_NORM_GRAD_SCALE)]],
    const device Step* accumulated [[buffer(FLATSTEP_NORM_ACCUMULATED)]],
    const device float* sums [[buffer(FLATSTEP_NORM_SUMS)]],
    device float* result [[buffer(FLATSTEP_NORM_RESULT)]],
    constant NormArguments& arguments [[buffer(FLATSTEP_NORM_ARGUMENTS)]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]]) {
  threadgroup float of_simdgroups[THREADS / FLATSTEP_SIMD_WIDTH];
  PassSettings settings = from_words<PassSettings>((constant uint*)&arguments.settings);
  bool has_sums = !holds(settings, scalars_of(arguments, grad_scale, accumulated));
  Pair total = {};
  for (uint k = thread_index; has_sums && k < arguments.num_sums; k += num_threads) {
    total = with_value(total, sums[k]);
  }
  Pair of_all = sum_of_threads(total.hi, of_simdgroups, thread_index, num_threads);
  if (thread_index == 0) {
    result[0] = of_all.hi;
  }
}
