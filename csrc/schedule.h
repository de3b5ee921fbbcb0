// A learning-rate schedule as plain data, and its value at a step. The only place where a
// schedule's arithmetic stands; C++ and Metal compile this same text.
//
// A schedule is a list of pieces. join_schedules, nested as deep as one likes, flattens to it:
// each piece says from which step on it replaces those before it (`start`) and which step it
// counts from (`origin`). The last piece that has started gives the value.
#pragma once

#include "pair.h"

namespace flatstep {

enum SchedulePieceKind {
  SCHEDULE_LINEAR,
  SCHEDULE_COSINE,
  SCHEDULE_EXPONENTIAL,  // step_decay too: an exponential of step / step_size
};

struct SchedulePiece {
  SignedStep start;
  SignedStep origin;
  // Linear and cosine reach their end after this many steps; an exponential decays once in so many.
  SignedStep steps;
  Pair init;
  Pair end;
  Pair log_rate;  // exponential: log |decay_rate|
  int32_t kind;
  int32_t rate_sign;  // exponential: sign of decay_rate, 0 for a decay_rate of 0
};

// Fits into the 4 KB that Metal's setBytes takes.
#define FLATSTEP_MAX_SCHEDULE_PIECES 24

struct Schedule {
  int32_t num_pieces;  // 0: there is no schedule, the learning rate comes as an array
  int32_t padding;
  SchedulePiece pieces[FLATSTEP_MAX_SCHEDULE_PIECES];
};

// Linear and cosine, from the end that is nearer, so that nothing cancels: a cosine's part
// (1 - cos(pi x)) / 2 is sin(pi x / 2)^2.
FLATSTEP_FN float ramp_value(SchedulePiece piece, SignedStep since) {
  SignedStep left = since < piece.steps ? piece.steps - since : 0;
  bool is_first_half = since < left;
  Pair from = is_first_half ? piece.init : piece.end;
  Pair to = is_first_half ? piece.end : piece.init;
  Pair part = quotient(pair_from_step(is_first_half ? since : left), pair_from_step(piece.steps));
  if (piece.kind == SCHEDULE_COSINE) {
    Pair sine = small_sine(product(pair(1.57079637f, -4.37113883e-8f), part));
    part = product(sine, sine);
  }
  return sum(from, product(part, sum(to, scaled(from, -1.0f)))).hi;
}

// init rate^n, with the signs and zeros that an integer power has.
FLATSTEP_FN float exponential_value(SchedulePiece piece, SignedStep n) {
  if (n == 0 || piece.rate_sign == 0) {
    return n == 0 ? piece.init.hi : 0.0f;
  }
  float value = scaled_exponential(piece.init, product(piece.log_rate, pair_from_step(n)));
  return piece.rate_sign < 0 && (n & 1) != 0 ? -value : value;
}

// Which piece gives the learning rate at `step`, counted from 0, and the rate.
FLATSTEP_FN int32_t active_piece(FLATSTEP_CONSTANT Schedule& schedule, Step step) {
  int32_t active = 0;
  for (int32_t i = 1; i < schedule.num_pieces; ++i) {
    active = limited(step) >= schedule.pieces[i].start ? i : active;
  }
  return active;
}

FLATSTEP_FN float piece_value(SchedulePiece piece, Step step) {
  SignedStep since = limited(step) - piece.origin;  // never negative: no piece starts before it
  return piece.kind == SCHEDULE_EXPONENTIAL ? exponential_value(piece, since / piece.steps)
                                            : ramp_value(piece, since);
}

}  // namespace flatstep
