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
// The rounding error of a sum is itself computed, which no rearranging or contraction survives.
// Metal before 3.2 has no such pragma: there the option that MLX compiles with turns fast math off.
#if __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#else
#pragma STDC FP_CONTRACT OFF
#pragma clang fp contract(off)
#endif
#define FLATSTEP_FN static inline
#define FLATSTEP_CONSTANT constant
#define FLATSTEP_OUT(T) thread T&
namespace flatstep {
using namespace metal;
FLATSTEP_FN float fused_multiply_add(float a, float b, float c) {
  return fma(a, b, c);
}
FLATSTEP_FN float square_root(float x) {
  return precise::sqrt(x);
}
// On the bits, so that no fast-math mode can fold it away.
FLATSTEP_FN bool is_nan(float x) {
  return (as_type<uint>(x) & 0x7fffffffu) > 0x7f800000u;
}
FLATSTEP_FN uint bits_of(float x) {
  return as_type<uint>(x);
}
FLATSTEP_FN float from_bits(uint bits) {
  return as_type<float>(bits);
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
FLATSTEP_FN bool is_nan(float x) {
  return x != x;
}
FLATSTEP_FN uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
FLATSTEP_FN float from_bits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
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

// The one rounding. High halves never depend on low ones, so noise in those is dropped only here.
FLATSTEP_FN float rounded(Pair a) {
  float sum = a.hi + a.lo;
  return is_nan(sum) ? a.hi : sum;
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

FLATSTEP_FN Pair square_root(Pair a) {
  float root = square_root(a.hi);
  float residual = fused_multiply_add(-root, root, a.hi) + a.lo;
  return pair(root, residual * (0.5f / root));
}

FLATSTEP_FN Pair divide(Pair a, Pair b) {
  float inverse = 1.0f / b.hi;
  float quotient = a.hi * inverse;
  float residual = fused_multiply_add(-quotient, b.hi, a.hi);
  residual += a.lo - quotient * b.lo;
  return pair(quotient, residual * inverse);
}

// a / (sqrt(b) + c) for c >= 0, with one root and one division. What those and the sum round off
// is put back to first order; dividing the root's part by the whole denominator instead of by the
// root leaves at most a quarter of 2^-24.
FLATSTEP_FN Pair divide_by_root_plus(Pair a, Pair b, Pair c) {
  float root = square_root(b.hi);
  Pair denominator = two_sum(root, c.hi);
  float inverse = 1.0f / denominator.hi;
  float quotient = a.hi * inverse;
  float root_residual = fused_multiply_add(-root, root, b.hi) + b.lo;
  float rest = denominator.lo + c.lo + root_residual * (0.5f * inverse);
  float residual = fused_multiply_add(-quotient, denominator.hi, a.hi) + (a.lo - quotient * rest);
  return pair(quotient, residual * inverse);
}

}  // namespace flatstep
