// Arithmetic on pairs of floats: a value held as hi + lo, about 46 bits wide.
//
// The update rules and the schedules are written in terms of it, so that one rounding at the store
// is all the rounding that a step does. C++ and Metal compile this same text: nothing here needs
// a double in the hot loop, a header of the standard library, or an exception.
//
// Sources: Dekker 1971 (two-sum, two-product), Joldes, Muller and Popescu 2017 (error bounds).
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define FLATSTEP_FN static inline
#define FLATSTEP_CONSTANT constant
#define FLATSTEP_OUT(T) thread T&
namespace flatstep {
FLATSTEP_FN float fused_multiply_add(float a, float b, float c) {
  return metal::fma(a, b, c);
}
FLATSTEP_FN float square_root(float x) {
  return metal::precise::sqrt(x);
}
FLATSTEP_FN uint bits_of(float x) {
  return as_type<uint>(x);
}
typedef uint uint32_t;
typedef ulong Step;
typedef long SignedStep;
}  // namespace flatstep
#else
#include <cstdint>
#define FLATSTEP_FN static inline
#define FLATSTEP_CONSTANT const
#define FLATSTEP_OUT(T) T&
namespace flatstep {
// Only ever used where a * b + c is exact or cancels, so a processor without the instruction gets
// the same bits through a double, which holds every product of two floats.
FLATSTEP_FN float fused_multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}
FLATSTEP_FN float square_root(float x) {
  return __builtin_sqrtf(x);
}
FLATSTEP_FN uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
typedef uint64_t Step;
typedef int64_t SignedStep;
}  // namespace flatstep
#endif

namespace flatstep {

struct Pair {
  float hi;
  float lo;
};

FLATSTEP_FN Pair pair(float hi, float lo) {
  Pair result;
  result.hi = hi;
  result.lo = lo;
  return result;
}

FLATSTEP_FN Pair pair(float x) {
  return pair(x, 0.0f);
}

// The low half of an overflowed or NaN value is noise (inf - inf); the high half says it all.
// Written on the bits, so that no fast-math mode can fold it away.
FLATSTEP_FN float finite_or_zero(float x) {
  return (bits_of(x) & 0x7f800000u) == 0x7f800000u ? 0.0f : x;
}

FLATSTEP_FN Pair two_sum(float a, float b) {
  float sum = a + b;
  float b_part = sum - a;
  float a_part = sum - b_part;
  return pair(sum, (a - a_part) + (b - b_part));
}

// Needs |a| >= |b| or a == 0.
FLATSTEP_FN Pair quick_two_sum(float a, float b) {
  float sum = a + b;
  return pair(sum, b - (sum - a));
}

FLATSTEP_FN Pair two_product(float a, float b) {
  float product = a * b;
  return pair(product, fused_multiply_add(a, b, -product));
}

FLATSTEP_FN float rounded(Pair a) {
  return a.hi + finite_or_zero(a.lo);
}

FLATSTEP_FN Pair normalized(Pair a) {
  return quick_two_sum(a.hi, finite_or_zero(a.lo));
}

FLATSTEP_FN Pair negated(Pair a) {
  return pair(-a.hi, -a.lo);
}

FLATSTEP_FN Pair add(Pair a, Pair b) {
  Pair sum = two_sum(a.hi, b.hi);
  return pair(sum.hi, sum.lo + (a.lo + b.lo));
}

FLATSTEP_FN Pair subtract(Pair a, Pair b) {
  return add(a, negated(b));
}

FLATSTEP_FN Pair multiply(Pair a, float b) {
  Pair product = two_product(a.hi, b);
  return pair(product.hi, product.lo + a.lo * b);
}

FLATSTEP_FN Pair multiply(Pair a, Pair b) {
  Pair product = two_product(a.hi, b.hi);
  return pair(product.hi, product.lo + (a.hi * b.lo + a.lo * b.hi));
}

// Newton's correction of the correctly rounded root: sqrt(a) = s + (a - s^2) / 2s.
FLATSTEP_FN Pair square_root(Pair a) {
  float root = square_root(a.hi);
  float residual = fused_multiply_add(-root, root, a.hi) + finite_or_zero(a.lo);
  return pair(root, finite_or_zero(residual * (0.5f / root)));
}

FLATSTEP_FN Pair divide(Pair a, Pair b) {
  float inverse = 1.0f / b.hi;
  float quotient = a.hi * inverse;
  float residual = fused_multiply_add(-quotient, b.hi, a.hi);
  residual += finite_or_zero(a.lo) - quotient * finite_or_zero(b.lo);
  return pair(quotient, finite_or_zero(residual * inverse));
}

}  // namespace flatstep
