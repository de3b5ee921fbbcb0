// The functions of math.h on vectors, element by element, and those that only vectors have.
#pragma once

namespace metal {

#define SIMULATOR_UNARY(NAME)                                          \
  template <typename T, int N>                                         \
  SIMULATOR_FN simulator_vector<T, N> NAME(simulator_vector<T, N> x) { \
    simulator_vector<T, N> result;                                     \
    for (int i = 0; i < N; ++i) {                                      \
      result[i] = NAME(static_cast<T>(x[i]));                          \
    }                                                                  \
    return result;                                                     \
  }
#define SIMULATOR_BINARY(NAME)                                                                   \
  template <typename T, int N>                                                                   \
  SIMULATOR_FN simulator_vector<T, N> NAME(simulator_vector<T, N> x, simulator_vector<T, N> y) { \
    simulator_vector<T, N> result;                                                               \
    for (int i = 0; i < N; ++i) {                                                                \
      result[i] = NAME(static_cast<T>(x[i]), static_cast<T>(y[i]));                              \
    }                                                                                            \
    return result;                                                                               \
  }                                                                                              \
  template <typename T, int N>                                                                   \
  SIMULATOR_FN simulator_vector<T, N> NAME(simulator_vector<T, N> x, simulator_same<T> y) {      \
    return NAME(x, static_cast<simulator_vector<T, N>>(y));                                      \
  }
#define SIMULATOR_TERNARY(NAME)                                                             \
  template <typename T, int N>                                                              \
  SIMULATOR_FN simulator_vector<T, N> NAME(                                                 \
      simulator_vector<T, N> x, simulator_vector<T, N> y, simulator_vector<T, N> z) {       \
    simulator_vector<T, N> result;                                                          \
    for (int i = 0; i < N; ++i) {                                                           \
      result[i] = NAME(static_cast<T>(x[i]), static_cast<T>(y[i]), static_cast<T>(z[i]));   \
    }                                                                                       \
    return result;                                                                          \
  }                                                                                         \
  template <typename T, int N>                                                              \
  SIMULATOR_FN simulator_vector<T, N> NAME(                                                 \
      simulator_vector<T, N> x, simulator_same<T> y, simulator_same<T> z) {                 \
    return NAME(                                                                            \
        x, static_cast<simulator_vector<T, N>>(y), static_cast<simulator_vector<T, N>>(z)); \
  }
#define SIMULATOR_VECTOR_MATH \
  SIMULATOR_UNARY(exp)        \
  SIMULATOR_UNARY(exp2)       \
  SIMULATOR_UNARY(log)        \
  SIMULATOR_UNARY(log2)       \
  SIMULATOR_UNARY(sin)        \
  SIMULATOR_UNARY(cos)        \
  SIMULATOR_UNARY(tanh)       \
  SIMULATOR_UNARY(sqrt)       \
  SIMULATOR_UNARY(rsqrt)      \
  SIMULATOR_UNARY(ceil)       \
  SIMULATOR_UNARY(floor)      \
  SIMULATOR_UNARY(trunc)      \
  SIMULATOR_UNARY(round)      \
  SIMULATOR_UNARY(rint)       \
  SIMULATOR_UNARY(fabs)       \
  SIMULATOR_BINARY(pow)       \
  SIMULATOR_BINARY(fmod)      \
  SIMULATOR_BINARY(fmin)      \
  SIMULATOR_BINARY(fmax)
SIMULATOR_VECTOR_MATH
namespace fast {
SIMULATOR_VECTOR_MATH
}  // namespace fast
namespace precise {
SIMULATOR_VECTOR_MATH
}  // namespace precise
#undef SIMULATOR_VECTOR_MATH
SIMULATOR_UNARY(abs)
SIMULATOR_UNARY(sign)
SIMULATOR_UNARY(saturate)
SIMULATOR_BINARY(min)
SIMULATOR_BINARY(max)
SIMULATOR_BINARY(copysign)
SIMULATOR_TERNARY(fma)
SIMULATOR_TERNARY(mix)
SIMULATOR_TERNARY(clamp)
#undef SIMULATOR_UNARY
#undef SIMULATOR_BINARY
#undef SIMULATOR_TERNARY

#define SIMULATOR_CLASSIFY(NAME)                                          \
  template <typename T, int N>                                            \
  SIMULATOR_FN simulator_vector<char, N> NAME(simulator_vector<T, N> x) { \
    simulator_vector<char, N> result;                                     \
    for (int i = 0; i < N; ++i) {                                         \
      result[i] = NAME(static_cast<T>(x[i]));                             \
    }                                                                     \
    return result;                                                        \
  }
SIMULATOR_CLASSIFY(isnan)
SIMULATOR_CLASSIFY(isinf)
SIMULATOR_CLASSIFY(isfinite)
#undef SIMULATOR_CLASSIFY

// The condition is what a comparison of vectors gives: integers as wide as what was compared.
template <typename T, typename C, int N>
SIMULATOR_FN simulator_vector<T, N> select(
    simulator_vector<T, N> a, simulator_vector<T, N> b, simulator_vector<C, N> condition) {
  simulator_vector<T, N> result;
  for (int i = 0; i < N; ++i) {
    result[i] = condition[i] ? b[i] : a[i];
  }
  return result;
}
template <typename C, int N>
SIMULATOR_FN bool any(simulator_vector<C, N> condition) {
  bool result = false;
  for (int i = 0; i < N; ++i) {
    result |= condition[i] != 0;
  }
  return result;
}
template <typename C, int N>
SIMULATOR_FN bool all(simulator_vector<C, N> condition) {
  bool result = true;
  for (int i = 0; i < N; ++i) {
    result &= condition[i] != 0;
  }
  return result;
}
template <typename T, int N>
SIMULATOR_FN T dot(simulator_vector<T, N> a, simulator_vector<T, N> b) {
  T result = 0;
  for (int i = 0; i < N; ++i) {
    result += a[i] * b[i];
  }
  return result;
}

}  // namespace metal
