// The update rules: what one step does to one element. The only place where their arithmetic
// stands; C++ and Metal compile this same text.
//
// A rule has three parts, in this order: its constants (a plain struct, filled on the host), what
// is the same for every element of a step (computed once), and the update of an element.
// Arithmetic is float32 in pairs (pair.h), so that each result is rounded once, at the store. Adam
// takes a half-precision parameter's update in plain float32: a unit of what is stored is 2^13 of
// its units or more.
#pragma once

#include "pair_math.h"

namespace flatstep {

// One parameter and its state. A rule leaves the fields that it does not use as they are.
struct Element {
  float p;
  float m;
  float v;
};

// Everything a user sets on an optimizer except the learning rate. Pairs hold the Python doubles.
struct Hyperparameters {
  Pair weight_decay;
  // SGD
  Pair momentum;
  Pair one_minus_dampening;
  uint32_t nesterov;
  // Adam and AdamW; logarithms are natural
  Pair beta1;
  Pair one_minus_beta1;
  Pair log_beta1;
  Pair beta2;
  Pair one_minus_beta2;
  Pair log_beta2;
  Pair eps;
  uint32_t bias_correction;
};

// ---- SGD with momentum, as mlx.optimizers.SGD ----

struct SgdStep {
  float learning_rate;
  Pair weight_decay;
  Pair momentum;
  Pair one_minus_dampening;
};

FLATSTEP_FN SgdStep prepare_sgd(FLATSTEP_CONSTANT Hyperparameters& h, float learning_rate) {
  SgdStep s;
  s.learning_rate = learning_rate;
  s.weight_decay = pair(h.weight_decay.hi, h.weight_decay.lo);
  s.momentum = pair(h.momentum.hi, h.momentum.lo);
  s.one_minus_dampening = pair(h.one_minus_dampening.hi, h.one_minus_dampening.lo);
  return s;
}

//   g' = g + weight_decay p
//   v  = momentum v + (1 - dampening) g'
//   p  = p - learning_rate (v, or g' + momentum v with Nesterov)
template <bool HAS_WEIGHT_DECAY, bool HAS_MOMENTUM, bool NESTEROV>
FLATSTEP_FN Element sgd(SgdStep s, Element e, float g) {
  Pair gradient = pair(g);
  if (HAS_WEIGHT_DECAY) {
    gradient = normalized(add(gradient, multiply(s.weight_decay, e.p)));
  }
  Pair update = gradient;
  if (HAS_MOMENTUM) {
    Pair share = HAS_WEIGHT_DECAY ? multiply(s.one_minus_dampening, gradient)
                                  : multiply(s.one_minus_dampening, g);
    Pair v = add(multiply(s.momentum, e.v), share);
    e.v = rounded(v);
    update = v;
    if (NESTEROV) {
      update = add(gradient, multiply(s.momentum, normalized(v)));
    }
  }
  e.p = rounded(subtract(pair(e.p), multiply(update, s.learning_rate)));
  return e;
}

// ---- Adam and AdamW (Kingma and Ba 2015, Loshchilov and Hutter 2019), as mlx.optimizers ----

struct AdamStep {
  Pair beta1;
  Pair one_minus_beta1;
  Pair beta2;
  Pair one_minus_beta2;
  Pair eps;
  Pair step_size;
  Pair decay;
};

// With bias correction the paper's m / (1 - beta1^t) and v / (1 - beta2^t) are folded into two
// scalars: multiplying numerator and denominator by c = sqrt(1 - beta2^t) leaves
//   learning_rate c / (1 - beta1^t) * m / (sqrt(v) + eps c),
// where t counts from 1: the steps taken before this one, and this one.
FLATSTEP_FN AdamStep
prepare_adam(FLATSTEP_CONSTANT Hyperparameters& h, float learning_rate, Step steps_before) {
  AdamStep s;
  s.beta1 = pair(h.beta1.hi, h.beta1.lo);
  s.one_minus_beta1 = pair(h.one_minus_beta1.hi, h.one_minus_beta1.lo);
  s.beta2 = pair(h.beta2.hi, h.beta2.lo);
  s.one_minus_beta2 = pair(h.one_minus_beta2.hi, h.one_minus_beta2.lo);
  s.eps = pair(h.eps.hi, h.eps.lo);
  s.step_size = pair(learning_rate);
  s.decay = normalized(
      subtract(pair(1.0f), multiply(pair(h.weight_decay.hi, h.weight_decay.lo), learning_rate)));
  if (h.bias_correction) {
    // 1 - beta^t = -(exp(t log beta) - 1) loses nothing when beta^t is close to 1.
    Pair steps = pair_from_step(steps_before + 1);
    Pair log_beta1 = pair(h.log_beta1.hi, h.log_beta1.lo);
    Pair log_beta2 = pair(h.log_beta2.hi, h.log_beta2.lo);
    Pair correction1 = negated(exp_minus_one(multiply(log_beta1, steps)));
    Pair correction2 = negated(exp_minus_one(multiply(log_beta2, steps)));
    Pair c = square_root(correction2);
    s.eps = normalized(multiply(s.eps, c));
    s.step_size = normalized(divide(multiply(c, learning_rate), correction1));
  }
  return s;
}

//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   p = (1 - learning_rate weight_decay) p - step_size m / (sqrt(v) + eps)
//
// HALF_PARAMETER: p is stored in float16 or bfloat16.
template <bool HALF_PARAMETER>
FLATSTEP_FN Element adam(AdamStep s, Element e, float g) {
  Pair m = add(multiply(s.beta1, e.m), multiply(s.one_minus_beta1, g));
  Pair v = add(multiply(s.beta2, e.v), multiply(s.one_minus_beta2, two_product(g, g)));
  e.m = rounded(m);
  e.v = rounded(v);
  if (HALF_PARAMETER) {
    float update = e.m / (square_root(e.v) + s.eps.hi);
    e.p = s.decay.hi * e.p - s.step_size.hi * update;
  } else {
    Pair update = divide_by_root_plus(m, v, s.eps);
    e.p = rounded(subtract(multiply(s.decay, e.p), multiply(s.step_size, update)));
  }
  return e;
}

}  // namespace flatstep
