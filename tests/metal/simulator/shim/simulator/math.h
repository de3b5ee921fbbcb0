// Math on scalars. Each function is that of the C library, which rounds better than a GPU does:
// compare what depends on exp, log, pow, sin or cos by tolerance. For half they are computed in
// float and rounded once. There are none for bfloat, as in MSL 3.1: go through float.
#pragma once

namespace metal {

#define SIMULATOR_UNARY(NAME, EXPRESSION)                  \
  SIMULATOR_FN float NAME(float x) {                       \
    return EXPRESSION;                                     \
  }                                                        \
  SIMULATOR_FN half NAME(half x) {                         \
    return static_cast<half>(NAME(static_cast<float>(x))); \
  }
#define SIMULATOR_BINARY(NAME, EXPRESSION)                                        \
  SIMULATOR_FN float NAME(float x, float y) {                                     \
    return EXPRESSION;                                                            \
  }                                                                               \
  SIMULATOR_FN half NAME(half x, half y) {                                        \
    return static_cast<half>(NAME(static_cast<float>(x), static_cast<float>(y))); \
  }

#define SIMULATOR_MATH                              \
  SIMULATOR_UNARY(exp, __builtin_expf(x))           \
  SIMULATOR_UNARY(exp2, __builtin_exp2f(x))         \
  SIMULATOR_UNARY(exp10, __builtin_powf(10.0f, x))  \
  SIMULATOR_UNARY(log, __builtin_logf(x))           \
  SIMULATOR_UNARY(log2, __builtin_log2f(x))         \
  SIMULATOR_UNARY(log10, __builtin_log10f(x))       \
  SIMULATOR_UNARY(sin, __builtin_sinf(x))           \
  SIMULATOR_UNARY(cos, __builtin_cosf(x))           \
  SIMULATOR_UNARY(tan, __builtin_tanf(x))           \
  SIMULATOR_UNARY(tanh, __builtin_tanhf(x))         \
  SIMULATOR_UNARY(sqrt, __builtin_sqrtf(x))         \
  SIMULATOR_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  SIMULATOR_UNARY(ceil, __builtin_ceilf(x))         \
  SIMULATOR_UNARY(floor, __builtin_floorf(x))       \
  SIMULATOR_UNARY(trunc, __builtin_truncf(x))       \
  SIMULATOR_UNARY(round, __builtin_roundf(x))       \
  SIMULATOR_UNARY(rint, __builtin_rintf(x))         \
  SIMULATOR_UNARY(fabs, __builtin_fabsf(x))         \
  SIMULATOR_BINARY(pow, __builtin_powf(x, y))       \
  SIMULATOR_BINARY(powr, __builtin_powf(x, y))      \
  SIMULATOR_BINARY(fmod, __builtin_fmodf(x, y))     \
  SIMULATOR_BINARY(atan2, __builtin_atan2f(x, y))   \
  SIMULATOR_BINARY(fmin, __builtin_fminf(x, y))     \
  SIMULATOR_BINARY(fmax, __builtin_fmaxf(x, y))     \
  SIMULATOR_BINARY(divide, x / y)
SIMULATOR_MATH
namespace fast {
SIMULATOR_MATH
}  // namespace fast
namespace precise {
SIMULATOR_MATH
}  // namespace precise
#undef SIMULATOR_MATH

SIMULATOR_BINARY(copysign, __builtin_copysignf(x, y))
SIMULATOR_BINARY(fdim, __builtin_fdimf(x, y))
SIMULATOR_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
SIMULATOR_UNARY(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))

SIMULATOR_FN float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
// The product of two halves is exact in float.
SIMULATOR_FN half fma(half a, half b, half c) {
  return static_cast<half>(static_cast<float>(a) * static_cast<float>(b) + static_cast<float>(c));
}
SIMULATOR_FN float mix(float x, float y, float a) {
  return x + (y - x) * a;
}
SIMULATOR_FN half mix(half x, half y, half a) {
  return x + (y - x) * a;
}
SIMULATOR_FN float ldexp(float x, int k) {
  return __builtin_ldexpf(x, k);
}
SIMULATOR_FN float frexp(float x, thread int& exponent) {
  int e;
  float mantissa = __builtin_frexpf(x, &e);
  exponent = e;
  return mantissa;
}

#define SIMULATOR_CLASSIFY(NAME)                    \
  SIMULATOR_FN bool NAME(float x) {                 \
    return __builtin_##NAME(x);                     \
  }                                                 \
  SIMULATOR_FN bool NAME(half x) {                  \
    return __builtin_##NAME(static_cast<float>(x)); \
  }
SIMULATOR_CLASSIFY(isnan)
SIMULATOR_CLASSIFY(isinf)
SIMULATOR_CLASSIFY(isfinite)
SIMULATOR_CLASSIFY(signbit)
#undef SIMULATOR_CLASSIFY

// One overload for each type, so that max(uint, int) is ambiguous here as it is in MSL. Of floats
// they take the one that is a number.
#define SIMULATOR_ORDER(T, MIN, MAX)                         \
  SIMULATOR_FN constexpr T min(T x, T y) {                   \
    return MIN;                                              \
  }                                                          \
  SIMULATOR_FN constexpr T max(T x, T y) {                   \
    return MAX;                                              \
  }                                                          \
  SIMULATOR_FN constexpr T clamp(T x, T lowest, T highest) { \
    return min(max(x, lowest), highest);                     \
  }
#define SIMULATOR_INTEGER(T) SIMULATOR_ORDER(T, y < x ? y : x, x < y ? y : x)
SIMULATOR_INTEGER(char)
SIMULATOR_INTEGER(uchar)
SIMULATOR_INTEGER(short)
SIMULATOR_INTEGER(ushort)
SIMULATOR_INTEGER(int)
SIMULATOR_INTEGER(uint)
SIMULATOR_INTEGER(long)
SIMULATOR_INTEGER(ulong)
#undef SIMULATOR_INTEGER
SIMULATOR_ORDER(float, y < x || x != x ? y : x, x < y || x != x ? y : x)
SIMULATOR_ORDER(half, y < x || x != x ? y : x, x < y || x != x ? y : x)
#undef SIMULATOR_ORDER

#define SIMULATOR_ABS(T, EXPRESSION)  \
  SIMULATOR_FN constexpr T abs(T x) { \
    return EXPRESSION;                \
  }
SIMULATOR_ABS(char, x < 0 ? -x : x)
SIMULATOR_ABS(short, x < 0 ? -x : x)
SIMULATOR_ABS(int, x < 0 ? -x : x)
SIMULATOR_ABS(long, x < 0 ? -x : x)
#undef SIMULATOR_ABS
SIMULATOR_UNARY(abs, __builtin_fabsf(x))

template <typename T>
SIMULATOR_FN T select(T a, T b, bool condition) {
  return condition ? b : a;
}

SIMULATOR_FN uint popcount(uint x) {
  return static_cast<uint>(__builtin_popcount(x));
}
SIMULATOR_FN uint clz(uint x) {
  return x == 0 ? 32 : static_cast<uint>(__builtin_clz(x));
}
SIMULATOR_FN uint ctz(uint x) {
  return x == 0 ? 32 : static_cast<uint>(__builtin_ctz(x));
}
SIMULATOR_FN uint mulhi(uint a, uint b) {
  return static_cast<uint>(static_cast<ulong>(a) * b >> 32);
}

#undef SIMULATOR_UNARY
#undef SIMULATOR_BINARY

}  // namespace metal
