// What a step does besides its rule: whether it is taken, what a gradient becomes before the rule
// sees it, and the average of the weights. The only place where that arithmetic stands; C++ and
// Metal compile this same text.
#pragma once

#include "pair.h"

namespace flatstep {

// What a user sets for all groups of parameters. What is not asked for is zero, a limit infinite.
struct PassSettings {
  Step accumulate_steps;  // as many gradients are summed up for a step; 0: none are
  Step ema_start;         // the average is the weights up to this step,
  Step ema_every;         // and then takes them in every so many steps
  float max_grad_norm;
  float clip_value;
  float ema_decay;
  float one_minus_ema_decay;
  uint32_t has_norm;
  uint32_t skips_nonfinite;
  uint32_t is_accumulation;  // no step: gradients are added to their sum
  uint32_t seed;
};

// What a step reads and changes besides arrays of elements, each by itself an array that a user
// sees, if it is there: its name, and its type here and in MLX.
#define FLATSTEP_STEP_SCALARS(SCALAR)          \
  SCALAR(step, Step, uint64)                   \
  SCALAR(learning_rate, float, float32)        \
  SCALAR(group_learning_rates, float, float32) \
  SCALAR(grad_scale, float, float32)           \
  SCALAR(sum_of_squares, float, float32)       \
  SCALAR(grad_norm, float, float32)            \
  SCALAR(skipped_steps, Step, uint64)          \
  SCALAR(accumulated, Step, uint64)

enum StepScalar {
#define FLATSTEP_SCALAR(name, Type, dtype) SCALAR_##name,
  FLATSTEP_STEP_SCALARS(FLATSTEP_SCALAR)
#undef FLATSTEP_SCALAR
      NUM_STEP_SCALARS
};

// Their values; those that are not there are zero. Of `group_learning_rates`, an array, not any.
struct StepScalars {
#define FLATSTEP_SCALAR(name, Type, dtype) Type name;
  FLATSTEP_STEP_SCALARS(FLATSTEP_SCALAR)
#undef FLATSTEP_SCALAR
};

enum StepAction {
  ACTION_UPDATE,
  ACTION_DROP,  // a gradient was not finite: nothing changes, but what was accumulated is gone
  ACTION_HOLD,  // gradients are still to be accumulated: nothing changes
};

// Where the learning rate of a group of parameters comes from.
enum RateSource {
  RATE_OF_ALL,   // the optimizer's
  RATE_OWN,      // its own place in `group_learning_rates`
  RATE_SCHEDULE  // a schedule of its own
};

// One that is a group's own is its learning rate as it is.
FLATSTEP_FN float rate_of_group(RateSource source, float rate, float scale) {
  return source == RATE_OWN ? rate : scale * rate;
}

// What is the same for every element in a step, whatever its group.
struct PassConstants {
  uint32_t tick;  // which step it is, as far as rounding asks for it
  uint32_t seed;
  uint32_t action;
  float grad_scale;
  float clip_value;
  float clip_factor;
  float ema_decay;
  float ema_weight;
};

// The constants of a group as `advance` writes them, in words of 32 bits: these and the rule's.
#define FLATSTEP_PASS_WORDS 8
#define FLATSTEP_RULE_WORDS 16
#define FLATSTEP_GROUP_WORDS (FLATSTEP_PASS_WORDS + FLATSTEP_RULE_WORDS)

FLATSTEP_FN bool is_finite(float x) {
  return (FLATSTEP_BITS(uint32_t, x) & 0x7fffffffu) < 0x7f800000u;
}

// A sum with one more value, infinite or NaN as a float's would be.
FLATSTEP_FN Pair with_value(Pair total, float value) {
  float plain = total.hi + value;
  return is_finite(plain) ? sum(total, pair(value)) : pair(plain);
}

FLATSTEP_FN bool holds(PassSettings s, StepScalars now) {
  return now.accumulated < s.accumulate_steps;
}

// What gradients are multiplied by as they are read: their average where they were summed up.
FLATSTEP_FN float scale_of(PassSettings s, StepScalars now) {
  return s.accumulate_steps > 0 && !holds(s, now) ? now.grad_scale / float(now.accumulated)
                                                  : now.grad_scale;
}

// A gradient before it is clipped by the norm of all, which is made of these.
FLATSTEP_FN float scaled_gradient(float scale, float clip_value, float g) {
  float scaled = g * scale;
  scaled = scaled > clip_value ? clip_value : scaled;
  return scaled < -clip_value ? -clip_value : scaled;
}

FLATSTEP_FN float used_gradient(PassConstants c, float g) {
  return scaled_gradient(c.grad_scale, c.clip_value, g) * c.clip_factor;
}

// An average is of the weights as they are before they are rounded to be stored.
FLATSTEP_FN float averaged(PassConstants c, float average, float p) {
  float mixed = c.ema_decay * average + c.ema_weight * p;
  return c.ema_weight == 0.0f ? average : c.ema_weight == 1.0f ? p : mixed;
}

FLATSTEP_FN PassConstants prepare_pass(PassSettings s, StepScalars now) {
  PassConstants c = {};
  c.tick = uint32_t(now.step);
  c.seed = s.seed;
  c.grad_scale = s.is_accumulation != 0 ? 1.0f : scale_of(s, now);
  c.clip_value = s.clip_value;
  c.clip_factor = 1.0f;
  if (s.is_accumulation != 0) {
    c.tick = uint32_t(now.step) * 4099u + uint32_t(now.accumulated);
    c.seed = s.seed ^ 0x5bd1e995u;
    return c;
  }
  if (s.has_norm != 0) {
    // As MLX's clip_grad_norm and torch's have it.
    float norm = FLATSTEP_SQRT(now.sum_of_squares);
    float factor = s.max_grad_norm / (norm + 1e-6f);
    c.clip_factor = factor >= 1.0f || !is_finite(s.max_grad_norm) ? 1.0f : factor;
    c.action = s.skips_nonfinite != 0 && !is_finite(norm) ? ACTION_DROP : ACTION_UPDATE;
  }
  c.action = holds(s, now) ? uint32_t(ACTION_HOLD) : c.action;
  Step after = now.step + 1;
  bool is_due =
      after > s.ema_start && (after - s.ema_start) % (s.ema_every > 0 ? s.ema_every : 1) == 0;
  c.ema_decay = after <= s.ema_start ? 0.0f : is_due ? s.ema_decay : 1.0f;
  c.ema_weight = after <= s.ema_start ? 1.0f : is_due ? s.one_minus_ema_decay : 0.0f;
  return c;
}

// What a step leaves; rates are not its matter.
FLATSTEP_FN StepScalars advanced(PassSettings s, StepScalars now, PassConstants c) {
  StepScalars next = now;
  if (s.is_accumulation != 0) {
    next.accumulated += 1;
  } else if (c.action != ACTION_HOLD) {
    next.accumulated = 0;
    next.step += c.action == ACTION_UPDATE;
    next.skipped_steps += c.action == ACTION_DROP;
    next.grad_norm = c.action == ACTION_UPDATE ? FLATSTEP_SQRT(now.sum_of_squares) : now.grad_norm;
  }
  return next;
}

}  // namespace flatstep
