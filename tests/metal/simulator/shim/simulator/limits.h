// numeric_limits and the constants of the Metal Shading Language Specification, sections 6.5, 6.6.
#pragma once

#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
#define MAXFLOAT 3.402823466e+38f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920928955e-07f
#define HALF_MAX (static_cast<half>(65504.0f))
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-LONG_MAX - 1)
#define ULONG_MAX 18446744073709551615ul
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f

namespace metal {

template <typename T>
struct numeric_limits;

#define SIMULATOR_INTEGER_LIMITS(T, LOWEST, HIGHEST)  \
  template <>                                         \
  struct numeric_limits<T> {                          \
    static constexpr constant bool is_integer = true; \
    static constexpr T min() {                        \
      return LOWEST;                                  \
    }                                                 \
    static constexpr T lowest() {                     \
      return LOWEST;                                  \
    }                                                 \
    static constexpr T max() {                        \
      return HIGHEST;                                 \
    }                                                 \
  };
SIMULATOR_INTEGER_LIMITS(char, -128, 127)
SIMULATOR_INTEGER_LIMITS(uchar, 0, 255)
SIMULATOR_INTEGER_LIMITS(short, -32768, 32767)
SIMULATOR_INTEGER_LIMITS(ushort, 0, 65535)
SIMULATOR_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
SIMULATOR_INTEGER_LIMITS(uint, 0, UINT_MAX)
SIMULATOR_INTEGER_LIMITS(long, LONG_MIN, LONG_MAX)
SIMULATOR_INTEGER_LIMITS(ulong, 0, ULONG_MAX)
#undef SIMULATOR_INTEGER_LIMITS

#define SIMULATOR_FLOAT_LIMITS(T, LEAST, HIGHEST, EPSILON) \
  template <>                                              \
  struct numeric_limits<T> {                               \
    static constexpr constant bool is_integer = false;     \
    static constexpr T min() {                             \
      return static_cast<T>(LEAST);                        \
    }                                                      \
    static constexpr T lowest() {                          \
      return static_cast<T>(-HIGHEST);                     \
    }                                                      \
    static constexpr T max() {                             \
      return static_cast<T>(HIGHEST);                      \
    }                                                      \
    static constexpr T epsilon() {                         \
      return static_cast<T>(EPSILON);                      \
    }                                                      \
    static constexpr T infinity() {                        \
      return static_cast<T>(__builtin_inff());             \
    }                                                      \
    static constexpr T quiet_NaN() {                       \
      return static_cast<T>(__builtin_nanf(""));           \
    }                                                      \
  };
SIMULATOR_FLOAT_LIMITS(float, FLT_MIN, FLT_MAX, FLT_EPSILON)
SIMULATOR_FLOAT_LIMITS(half, 6.103515625e-05f, 65504.0f, 9.765625e-04f)
SIMULATOR_FLOAT_LIMITS(bfloat, FLT_MIN, 3.3895313892515355e38f, 7.8125e-03f)
#undef SIMULATOR_FLOAT_LIMITS

}  // namespace metal
