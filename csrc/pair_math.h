// The few functions of a pair that the schedules and the bias corrections need.
//
// They run once per step (once per threadgroup on a GPU), so they are written for accuracy and
// shortness: about 40 bits, which leaves the single rounding to float32 as the only error.
#pragma once

#include "pair.h"

namespace flatstep {

FLATSTEP_FN Pair pair_from_step(Step step) {
  float hi = static_cast<float>(step);
  // Beyond 2^62 the remainder could not be taken in 64 signed bits, and nothing depends on it.
  float lo = step < (Step(1) << 62)
                 ? static_cast<float>(static_cast<SignedStep>(step) - static_cast<SignedStep>(hi))
                 : 0.0f;
  return quick_two_sum(hi, lo);
}

// 2^k for -126 <= k <= 127.
FLATSTEP_FN float power_of_two(int k) {
  return from_bits(static_cast<uint32_t>(k + 127) << 23);
}

FLATSTEP_FN Pair scaled(Pair a, float power) {
  return pair(a.hi * power, a.lo * power);
}

// exp(x) - 1 for |x| <= 0.35 by its series; the 14th term is below 2^-57.
FLATSTEP_FN Pair small_exp_minus_one(Pair x) {
  Pair sum = pair(1.0f);
  for (int n = 14; n >= 2; --n) {
    sum = normalized(add(pair(1.0f), multiply(sum, divide(x, pair(static_cast<float>(n))))));
  }
  return normalized(multiply(x, sum));
}

// x = k ln 2 + remainder with |remainder| <= 0.35, where |k| stays within the limit.
FLATSTEP_FN int split_by_ln2(Pair x, int limit, FLATSTEP_OUT(Pair) remainder) {
  const Pair ln2 = pair(0.693147182f, -1.90465421e-9f);
  float scaled_x = x.hi * 1.44269502f;
  int k = static_cast<int>(scaled_x + (scaled_x < 0.0f ? -0.5f : 0.5f));
  k = k < -limit ? -limit : (k > limit ? limit : k);
  remainder = normalized(subtract(x, multiply(ln2, static_cast<float>(k))));
  return k;
}

FLATSTEP_FN Pair exp_minus_one(Pair x) {
  if (x.hi < -80.0f) {
    return pair(-1.0f);
  }
  Pair remainder;
  int k = split_by_ln2(x, 126, remainder);
  Pair power = pair(power_of_two(k));
  Pair scaled_series = scaled(small_exp_minus_one(remainder), power.hi);
  return normalized(add(subtract(power, pair(1.0f)), scaled_series));
}

// factor exp(x), also where exp(x) alone is no float.
FLATSTEP_FN Pair scaled_exponential(Pair factor, Pair x) {
  if (factor.hi == 0.0f || x.hi < -200.0f) {
    return pair(0.0f);
  }
  if (x.hi > 200.0f) {
    return pair(factor.hi * from_bits(0x7f800000u));
  }
  Pair remainder;
  int k = split_by_ln2(x, 290, remainder);
  Pair value = normalized(add(pair(1.0f), small_exp_minus_one(remainder)));
  // 2^k in three factors, each of them a float: on the way the product stays between `factor` and
  // the result.
  int third = k / 3;
  value = normalized(multiply(scaled(factor, power_of_two(third)), value));
  return scaled(scaled(value, power_of_two(third)), power_of_two(k - 2 * third));
}

// sin(x) for 0 <= x <= pi / 4 by its series.
FLATSTEP_FN Pair small_sine(Pair x) {
  Pair square = normalized(multiply(x, x));
  Pair sum = pair(1.0f);
  for (int n = 16; n >= 2; n -= 2) {
    Pair term = divide(square, pair(static_cast<float>(n * (n + 1))));
    sum = normalized(subtract(pair(1.0f), multiply(sum, term)));
  }
  return normalized(multiply(x, sum));
}

}  // namespace flatstep
