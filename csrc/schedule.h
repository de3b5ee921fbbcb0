// A learning-rate schedule as plain data, and its value at a step. The only place where a
// schedule's arithmetic stands; C++ and Metal compile this same text.
//
// A schedule is a list of pieces. join_schedules, nested as deep as one likes, flattens to it:
// each piece says from which step on it replaces those before it (`start`) and which step it
// counts from (`origin`). The last piece that has started gives the value.
#pragma once

#include "pair_math.h"

namespace flatstep {

enum SchedulePieceKind {
  SCHEDULE_CONSTANT = 0,
  SCHEDULE_LINEAR = 1,
  SCHEDULE_COSINE = 2,
  SCHEDULE_EXPONENTIAL = 3,  // step_decay too: an exponential of step / step_size
};

struct SchedulePiece {
  SignedStep start;
  SignedStep origin;
  // Linear and cosine reach their end after this many steps; an exponential decays once in so many.
  SignedStep steps;
  Pair init;
  Pair end;
  Pair slope;     // linear: (end - init) / steps
  Pair log_rate;  // exponential: log |decay_rate|
  int32_t kind;
  int32_t rate_sign;  // exponential: sign of decay_rate, 0 for a decay_rate of 0
};

// Fits with all else that a kernel is given into the 4 KB that Metal's setBytes takes.
#define FLATSTEP_MAX_SCHEDULE_PIECES 24

// Steps and boundaries beyond it are taken as this one: far enough, and no sum of two overflows.
#define FLATSTEP_LAST_STEP (SignedStep(1) << 61)

struct Schedule {
  int32_t num_pieces;  // 0: there is no schedule, the learning rate comes as an array
  int32_t padding;
  SchedulePiece pieces[FLATSTEP_MAX_SCHEDULE_PIECES];
};

// end + (init - end) (1 + cos(pi s / steps)) / 2, where (1 + cos(2 x)) / 2 = cos(x)^2 is taken as
// 1 - sin(x)^2 in the first half and sin(pi/2 - x)^2 in the second: no cancellation.
FLATSTEP_FN Pair cosine_value(Pair init, Pair end, SignedStep s, SignedStep steps) {
  const Pair half_pi = pair(1.57079637f, -4.37113883e-8f);
  bool first_half = s < steps - s;
  Pair angle = normalized(divide(
      multiply(half_pi, pair_from_step(static_cast<Step>(first_half ? s : steps - s))),
      pair_from_step(static_cast<Step>(steps))));
  Pair sine = small_sine(angle);
  Pair weight = normalized(multiply(sine, sine));
  Pair from = first_half ? init : end;
  Pair to = first_half ? end : init;
  return add(from, multiply(weight, normalized(subtract(to, from))));
}

// init rate^n, with the signs and zeros that an integer power has.
FLATSTEP_FN Pair exponential_value(Pair init, Pair log_rate, int32_t rate_sign, SignedStep n) {
  if (n == 0) {
    return init;
  }
  if (rate_sign == 0) {
    return pair(0.0f);
  }
  Pair steps = pair_from_step(static_cast<Step>(n));
  Pair value = scaled_exponential(init, normalized(multiply(log_rate, steps)));
  if (rate_sign < 0 && (n & 1) != 0) {
    return negated(value);
  }
  return value;
}

FLATSTEP_FN Pair piece_value(FLATSTEP_CONSTANT SchedulePiece& piece, SignedStep step) {
  // Never negative: no piece starts before its origin.
  SignedStep since = step - piece.origin;
  Pair init = pair(piece.init.hi, piece.init.lo);
  Pair end = pair(piece.end.hi, piece.end.lo);
  SignedStep limited = since < piece.steps ? since : piece.steps;
  switch (piece.kind) {
    case SCHEDULE_LINEAR: {
      if (since >= piece.steps) {
        return end;
      }
      Pair slope = pair(piece.slope.hi, piece.slope.lo);
      return add(init, multiply(slope, pair_from_step(static_cast<Step>(since))));
    }
    case SCHEDULE_COSINE:
      return cosine_value(init, end, limited, piece.steps);
    case SCHEDULE_EXPONENTIAL: {
      Pair log_rate = pair(piece.log_rate.hi, piece.log_rate.lo);
      return exponential_value(init, log_rate, piece.rate_sign, since / piece.steps);
    }
    default:
      return init;
  }
}

// The learning rate at `step`, counted from 0.
FLATSTEP_FN float schedule_value(FLATSTEP_CONSTANT Schedule& schedule, Step step) {
  const SignedStep last = FLATSTEP_LAST_STEP;
  SignedStep now = step > static_cast<Step>(last) ? last : static_cast<SignedStep>(step);
  int32_t active = 0;
  for (int32_t i = 1; i < schedule.num_pieces; ++i) {
    if (now >= schedule.pieces[i].start) {
      active = i;
    }
  }
  return rounded(piece_value(schedule.pieces[active], now));
}

}  // namespace flatstep
