// Arithmetic on pairs of floats, hi + lo, for what is computed once per step: the schedules and the
// bias corrections. About 44 bits, so that the rounding to float32 is all the error there is.
//
// Sources: Dekker 1971 (two-sum, two-product), Joldes, Muller and Popescu 2017 (error bounds).
#pragma once

#include "dialect.h"

namespace flatstep {

// lo is at most half a unit of hi, which is the value rounded to float32.
struct Pair {
  float hi;
  float lo;
};

FLATSTEP_FN Pair pair(float hi, float lo = 0.0f) {
  float rounded = hi + lo;
  return {rounded, lo - (rounded - hi)};
}

// Steps beyond it are taken as this one: far enough, and no sum of two overflows.
#define FLATSTEP_LAST_STEP (SignedStep(1) << 61)

FLATSTEP_FN SignedStep limited(Step step) {
  return step > Step(FLATSTEP_LAST_STEP) ? FLATSTEP_LAST_STEP : SignedStep(step);
}

FLATSTEP_FN Pair pair_from_step(SignedStep step) {
  float hi = float(step);
  return pair(hi, float(step - SignedStep(hi)));
}

FLATSTEP_FN Pair sum(Pair a, Pair b) {
  float hi = a.hi + b.hi;
  float b_part = hi - a.hi;
  float lost = (a.hi - (hi - b_part)) + (b.hi - b_part);
  return pair(hi, lost + (a.lo + b.lo));
}

FLATSTEP_FN Pair product(Pair a, Pair b) {
  float hi = a.hi * b.hi;
  return pair(hi, FLATSTEP_FMA(a.hi, b.hi, -hi) + (a.hi * b.lo + a.lo * b.hi));
}

FLATSTEP_FN Pair quotient(Pair a, Pair b) {
  float hi = a.hi / b.hi;
  return pair(hi, (FLATSTEP_FMA(-hi, b.hi, a.hi) + (a.lo - hi * b.lo)) / b.hi);
}

// For a > 0.
FLATSTEP_FN Pair square_root(Pair a) {
  float hi = FLATSTEP_SQRT(a.hi);
  return pair(hi, (FLATSTEP_FMA(-hi, hi, a.hi) + a.lo) * (0.5f / hi));
}

FLATSTEP_FN Pair scaled(Pair a, float power_of_two) {
  return {a.hi * power_of_two, a.lo * power_of_two};
}

// 2^k for -126 <= k <= 127.
FLATSTEP_FN float power_of_two(int k) {
  return FLATSTEP_BITS(float, uint32_t(k + 127) << 23);
}

// exp(x) = 2^k (1 + series) for |x| <= 200. The series is one of at most 0.35, its 14th term below
// 2^-57.
struct Exponential {
  int k;
  Pair series;
};

FLATSTEP_FN Exponential exponential(Pair x) {
  float turns = x.hi * 1.44269502f;
  int k = int(turns + (turns < 0.0f ? -0.5f : 0.5f));
  Pair rest = sum(x, product(pair(0.693147182f, -1.90465421e-9f), pair(float(-k))));
  Pair tail = pair(1.0f);
  for (int n = 14; n >= 2; --n) {
    tail = sum(pair(1.0f), product(tail, quotient(rest, pair(float(n)))));
  }
  return {k, product(rest, tail)};
}

// 1 - exp(x) for x <= 0, without cancellation where it is small.
FLATSTEP_FN Pair one_minus_exponential(Pair x) {
  if (x.hi < -80.0f) {
    return pair(1.0f);
  }
  Exponential e = exponential(x);
  float power = power_of_two(e.k);
  return sum(sum(pair(1.0f), pair(-power)), scaled(e.series, -power));
}

// factor exp(x), also where exp(x) alone is no float.
FLATSTEP_FN float scaled_exponential(Pair factor, Pair x) {
  if (factor.hi == 0.0f || x.hi < -200.0f) {
    return 0.0f;
  }
  if (x.hi > 200.0f) {
    return factor.hi * FLATSTEP_BITS(float, 0x7f800000u);
  }
  Exponential e = exponential(x);
  // 2^k in three factors, each of them a float: on the way the product stays between `factor` and
  // the result.
  float third = power_of_two(e.k / 3);
  float value = product(scaled(factor, third), sum(pair(1.0f), e.series)).hi;
  return value * third * power_of_two(e.k - 2 * (e.k / 3));
}

// sin(x) for 0 <= x <= pi / 4 by its series.
FLATSTEP_FN Pair small_sine(Pair x) {
  Pair minus_square = scaled(product(x, x), -1.0f);
  Pair tail = pair(1.0f);
  for (int n = 16; n >= 2; n -= 2) {
    tail = sum(pair(1.0f), product(tail, quotient(minus_square, pair(float(n * (n + 1))))));
  }
  return product(x, tail);
}

}  // namespace flatstep
