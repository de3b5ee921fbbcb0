// What threads do together: barriers and SIMD-group functions. The runtime makes them meet.
//
// Stricter than a GPU: all threads of a SIMD-group that have not returned must come to the same
// SIMD-group function, so that one under a divergent branch is an error.
#pragma once

extern "C" {
void simulator_barrier(int scope, int flags, int line) __attribute__((convergent));
ulong simulator_exchange(ulong value, uint size, ulong lanes, int line) __attribute__((convergent));
ulong simulator_threadgroup_variable(int which, uint size, uint alignment);
void simulator_inactive_lane(int line);
}

namespace metal {

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
SIMULATOR_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}

SIMULATOR_FN void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  simulator_barrier(0, static_cast<int>(flags), line);
}
SIMULATOR_FN void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  simulator_barrier(1, static_cast<int>(flags), line);
}

// What all lanes of a SIMD-group came with, as one lane sees it.
template <typename T>
struct simulator_lanes {
  T value[32];
  uint active;
  uint self;
  SIMULATOR_FN bool is_active(uint lane) const {
    return lane < 32 && (active >> lane & 1u) != 0;
  }
  SIMULATOR_FN T from(uint lane, int line) const {
    if (!is_active(lane)) {
      simulator_inactive_lane(line);
    }
    return value[lane & 31u];
  }
};

template <typename T>
SIMULATOR_FN simulator_lanes<T> simulator_meet(T x, int line) {
  using Element = typename simulator_shape<T>::element;
  static_assert(
      sizeof(Element) <= 4 && !is_same_v<Element, bfloat>,
      "SIMD-group functions take no bfloat and no 64-bit type");
  simulator_lanes<T> lanes;
  T mine = x;
  ulong met = simulator_exchange(
      (ulong)(uintptr_t)&mine, sizeof(T), (ulong)(uintptr_t)&lanes.value[0], line);
  lanes.active = static_cast<uint>(met);
  lanes.self = static_cast<uint>(met >> 32);
  return lanes;
}

// Halves the lanes until one is left, as the hardware may; which order it takes is not specified.
template <typename T, typename Operation>
SIMULATOR_FN T simulator_reduce(T x, Operation operation, int line) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  uint active = lanes.active;
  for (uint half_width = 16; half_width > 0; half_width /= 2) {
    for (uint i = 0; i < half_width; ++i) {
      bool low = (active >> i & 1u) != 0;
      bool high = (active >> (i + half_width) & 1u) != 0;
      if (low && high) {
        lanes.value[i] = operation.apply(lanes.value[i], lanes.value[i + half_width]);
      } else if (high) {
        lanes.value[i] = lanes.value[i + half_width];
        active |= 1u << i;
      }
    }
  }
  return lanes.value[0];
}

#define SIMULATOR_REDUCTION(NAME, EXPRESSION)                    \
  struct simulator_##NAME {                                      \
    template <typename T>                                        \
    SIMULATOR_FN T apply(T a, T b) const {                       \
      return static_cast<T>(EXPRESSION);                         \
    }                                                            \
  };                                                             \
  template <typename T>                                          \
  SIMULATOR_FN T simd_##NAME(T x, int line = __builtin_LINE()) { \
    return simulator_reduce(x, simulator_##NAME(), line);        \
  }
SIMULATOR_REDUCTION(sum, a + b)
SIMULATOR_REDUCTION(product, a* b)
SIMULATOR_REDUCTION(min, metal::min(a, b))
SIMULATOR_REDUCTION(max, metal::max(a, b))
SIMULATOR_REDUCTION(and, a& b)
SIMULATOR_REDUCTION(or, a | b)
SIMULATOR_REDUCTION(xor, a ^ b)
#undef SIMULATOR_REDUCTION

template <typename T>
SIMULATOR_FN T simd_prefix_inclusive_sum(T x, int line = __builtin_LINE()) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  T sum = 0;
  for (uint i = 0; i <= lanes.self; ++i) {
    sum = lanes.is_active(i) ? static_cast<T>(sum + lanes.value[i]) : sum;
  }
  return sum;
}
template <typename T>
SIMULATOR_FN T simd_prefix_exclusive_sum(T x, int line = __builtin_LINE()) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  T sum = 0;
  for (uint i = 0; i < lanes.self; ++i) {
    sum = lanes.is_active(i) ? static_cast<T>(sum + lanes.value[i]) : sum;
  }
  return sum;
}

template <typename T>
SIMULATOR_FN T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  return lanes.from(lane, line);
}
template <typename T>
SIMULATOR_FN T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return simd_shuffle(x, lane, line);
}
template <typename T>
SIMULATOR_FN T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  return lanes.value[ctz(lanes.active)];
}
template <typename T>
SIMULATOR_FN T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  return lanes.from(lanes.self ^ mask, line);
}
// The lanes at the end keep their own value, which in MSL is undefined.
template <typename T>
SIMULATOR_FN T simd_shuffle_up(T x, ushort delta, int line = __builtin_LINE()) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  return lanes.self >= delta ? lanes.from(lanes.self - delta, line) : x;
}
template <typename T>
SIMULATOR_FN T simd_shuffle_down(T x, ushort delta, int line = __builtin_LINE()) {
  simulator_lanes<T> lanes = simulator_meet(x, line);
  return lanes.is_active(lanes.self + delta) ? lanes.value[lanes.self + delta] : x;
}

SIMULATOR_FN bool simd_any(bool condition, int line = __builtin_LINE()) {
  return simd_or(static_cast<uint>(condition), line) != 0;
}
SIMULATOR_FN bool simd_all(bool condition, int line = __builtin_LINE()) {
  return simd_and(static_cast<uint>(condition), line) != 0;
}
SIMULATOR_FN bool simd_is_first(int line = __builtin_LINE()) {
  simulator_lanes<uint> lanes = simulator_meet(0u, line);
  return ctz(lanes.active) == lanes.self;
}

}  // namespace metal
