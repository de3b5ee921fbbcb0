// Kernels to try the simulator on, in the ways that a project's own use MSL: segments of flat
// buffers, threadgroup memory with barriers, SIMD-group functions, instantiations with a host name.
#include <metal_stdlib>
using namespace metal;

struct Segment {
  ulong begin;   // of this leaf in the flat buffers, in elements
  ulong length;
  float learning_rate;
};

struct Settings {
  float beta1;
  float beta2;
  float eps;
  uint num_segments;
};

constant float kLargestStep = 10.0;

// ---- An update of the elements that some segments of flat buffers hold ----

static uint find_segment(constant Segment* segments, uint count, ulong thread_index) {
  ulong before = 0;
  for (uint i = 0; i < count; ++i) {
    before += segments[i].length;
    if (thread_index < before) {
      return i;
    }
  }
  return count;
}

template <typename T, bool HAS_CLIPPING>
[[kernel]] void adam(
    device T* p [[buffer(0)]],
    device float* m [[buffer(1)]],
    device float* v [[buffer(2)]],
    const device T* g [[buffer(3)]],
    constant Segment* segments [[buffer(4)]],
    constant Settings& settings [[buffer(5)]],
    uint index [[thread_position_in_grid]]) {
  uint s = find_segment(segments, settings.num_segments, index);
  if (s == settings.num_segments) {
    return;
  }
  ulong at = index;
  for (uint i = 0; i < s; ++i) {
    at -= segments[i].length;
  }
  at += segments[s].begin;
  float gradient = float(g[at]);
  float new_m = fma(settings.beta1, m[at], (1.0f - settings.beta1) * gradient);
  float new_v = fma(settings.beta2, v[at], (1.0f - settings.beta2) * gradient * gradient);
  float change = new_m / (precise::sqrt(new_v) + settings.eps);
  if (HAS_CLIPPING) {
    change = clamp(change, -kLargestStep, kLargestStep);
  }
  p[at] = T(float(p[at]) - segments[s].learning_rate * change);
  m[at] = new_m;
  v[at] = new_v;
}

#define instantiate_adam(name, T, clipping) \
  template [[host_name("adam_" name)]] [[kernel]] decltype(adam<T, clipping>) adam<T, clipping>;

instantiate_adam("float", float, false)
instantiate_adam("float_clipped", float, true)
instantiate_adam("half", half, false)
instantiate_adam("bfloat", bfloat, true)

// ---- A transpose by tiles of 32 x 32 ----

[[kernel]] void transpose(
    const device float* from [[buffer(0)]],
    device float* to [[buffer(1)]],
    constant uint2& shape [[buffer(2)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 inside [[thread_position_in_threadgroup]]) {
  threadgroup float tile[32][33];
  uint column = group.x * 32 + inside.x;
  for (uint y = inside.y; y < 32; y += 8) {
    uint row = group.y * 32 + y;
    if (row < shape.y && column < shape.x) {
      tile[y][inside.x] = from[row * shape.x + column];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint row = group.y * 32 + inside.x;
  for (uint y = inside.y; y < 32; y += 8) {
    column = group.x * 32 + y;
    if (row < shape.y && column < shape.x) {
      to[column * shape.y + row] = tile[inside.x][y];
    }
  }
}

// ---- A sum of squares: SIMD-groups first, then the threadgroup ----

template <typename T>
[[kernel]] void sum_of_squares(
    const device T* x [[buffer(0)]],
    device float* partial [[buffer(1)]],
    constant uint& count [[buffer(2)]],
    uint group [[threadgroup_position_in_grid]],
    uint num_groups [[threadgroups_per_grid]],
    uint inside [[thread_position_in_threadgroup]],
    uint num_threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float sums[32];
  float sum = 0.0f;
  for (uint i = group * num_threads + inside; i < count; i += num_groups * num_threads) {
    float value = float(x[i]);
    sum += value * value;
  }
  sum = simd_sum(sum);
  if (lane == 0) {
    sums[simdgroup] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    sum = lane < (num_threads + 31) / 32 ? sums[lane] : 0.0f;
    sum = simd_sum(sum);
    if (lane == 0) {
      partial[group] = sum;
    }
  }
}

template [[host_name("sum_of_squares_float")]] [[kernel]] void sum_of_squares<float>(
    const device float*, device float*, constant uint&, uint, uint, uint, uint, uint, uint);
template [[host_name("sum_of_squares_bfloat")]] [[kernel]] void sum_of_squares<bfloat>(
    const device bfloat*, device float*, constant uint&, uint, uint, uint, uint, uint, uint);
