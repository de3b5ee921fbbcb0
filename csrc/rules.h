// The update rules: what one step does to one element. The only place where their arithmetic
// stands; C++ and Metal compile this same text.
//
// A rule is a struct: how many state values an element has and which of them are never below zero
// (a bit for each), whether the number of a step matters, what a user sets, what is the same for
// every element of a step (Constants, from `prepare`), and the update of an element, in plain
// float32 as its paper reads. The table at the end lists them; loops, kernels, bindings and tests
// follow from it.
#pragma once

#include "pair.h"

namespace flatstep {

// What a user sets: the Python double, what is left to 1, and the logarithm, each from the double.
struct Number {
  float value;
  float one_minus;
  Pair log;
};

#ifdef __METAL_VERSION__
#define FLATSTEP_NAMES(...)
#else
#define FLATSTEP_NAMES(...) static constexpr const char* NAMES = #__VA_ARGS__;
#endif
#define FLATSTEP_HYPERPARAMETERS(...) \
  struct Hyperparameters {            \
    Number __VA_ARGS__;               \
  };                                  \
  FLATSTEP_NAMES(__VA_ARGS__)

// A parameter and its state.
template <int NUM_STATES>
struct Element {
  float p;
  float state[NUM_STATES > 0 ? NUM_STATES : 1];
};

// rate * p, what decays of a parameter; one that is infinite (a mask) stays as it is, and without
// decay one that is NaN leaves the state alone.
FLATSTEP_FN float decay_of(float p, float rate) {
  bool is_infinite = (FLATSTEP_BITS(uint32_t, p) & 0x7fffffffu) == 0x7f800000u;
  return is_infinite || rate == 0.0f ? 0.0f : rate * p;
}

// SGD, as in mlx.optimizers; without momentum v is g' and not kept:
//   g' = g + weight_decay p
//   v  = momentum v + (1 - dampening) g'
//   p  = p - learning_rate (v, or g' + momentum v with Nesterov)
template <int HAS_MOMENTUM>
struct SgdRule {
  enum { NUM_STATES = HAS_MOMENTUM, UNSIGNED_STATES = 0, READS_STEP = 0 };
  FLATSTEP_HYPERPARAMETERS(weight_decay, momentum, dampening, nesterov)

  struct Constants {
    float learning_rate, weight_decay, momentum, one_minus_dampening, nesterov;
  };

  static Constants prepare(Hyperparameters h, float rate, Step) {
    return {rate, h.weight_decay.value, h.momentum.value, h.dampening.one_minus, h.nesterov.value};
  }

  static Element<HAS_MOMENTUM> update(Constants c, Element<HAS_MOMENTUM> e, float g) {
    float gradient = g + decay_of(e.p, c.weight_decay);
    float v = HAS_MOMENTUM ? c.momentum * e.state[0] + c.one_minus_dampening * gradient : gradient;
    e.p -= c.learning_rate * (c.nesterov != 0.0f ? gradient + c.momentum * v : v);
    e.state[0] = v;
    return e;
  }
};
typedef SgdRule<0> Sgd;
typedef SgdRule<1> Momentum;

// Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), as in mlx.optimizers:
//   m = beta1 m + (1 - beta1) g
//   v = beta2 v + (1 - beta2) g^2
//   p = p - learning_rate weight_decay p - step_size m / (sqrt(v) + eps')
// With bias correction m / (1 - beta1^t) and v / (1 - beta2^t), where t counts from 1, are folded
// into the constants: multiplying numerator and denominator by c = sqrt(1 - beta2^t) leaves
//   step_size = learning_rate c / (1 - beta1^t) and eps' = eps c
struct Adam {
  enum { NUM_STATES = 2, UNSIGNED_STATES = 2, READS_STEP = 1 };
  FLATSTEP_HYPERPARAMETERS(weight_decay, beta1, beta2, eps, bias_correction)

  struct Constants {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, decay;
  };

  static Constants prepare(Hyperparameters h, float learning_rate, Step steps_before) {
    Pair root = pair(1.0f);
    Pair correction1 = pair(1.0f);
    if (h.bias_correction.value != 0.0f) {
      Pair t = pair_from_step(limited(steps_before) + 1);
      root = square_root(one_minus_exponential(product(h.beta2.log, t)));
      correction1 = one_minus_exponential(product(h.beta1.log, t));
    }
    float step_size = quotient(product(root, pair(learning_rate)), correction1).hi;
    float decay = learning_rate * h.weight_decay.value;
    return {
        h.beta1.value,
        h.beta1.one_minus,
        h.beta2.value,
        h.beta2.one_minus,
        h.eps.value * root.hi,
        step_size,
        decay};
  }

  static Element<2> update(Constants c, Element<2> e, float g) {
    float m = c.beta1 * e.state[0] + c.one_minus_beta1 * g;
    float v = c.beta2 * e.state[1] + c.one_minus_beta2 * (g * g);
    e.p -= decay_of(e.p, c.decay) + c.step_size * (m / (FLATSTEP_SQRT(v) + c.eps));
    e.state[0] = m;
    e.state[1] = v;
    return e;
  }
};

// Lion (Chen et al. 2023), as in mlx.optimizers:
//   c = beta1 m + (1 - beta1) g
//   m = beta2 m + (1 - beta2) g
//   p = p - learning_rate weight_decay p - learning_rate sign(c)
struct Lion {
  enum { NUM_STATES = 1, UNSIGNED_STATES = 0, READS_STEP = 0 };
  FLATSTEP_HYPERPARAMETERS(weight_decay, beta1, beta2)

  struct Constants {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, learning_rate, decay;
  };

  static Constants prepare(Hyperparameters h, float rate, Step) {
    float decay = rate * h.weight_decay.value;
    return {h.beta1.value, h.beta1.one_minus, h.beta2.value, h.beta2.one_minus, rate, decay};
  }

  static Element<1> update(Constants c, Element<1> e, float g) {
    float direction = c.beta1 * e.state[0] + c.one_minus_beta1 * g;
    float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;  // of NaN too
    e.p -= decay_of(e.p, c.decay) + c.learning_rate * sign;
    e.state[0] = c.beta2 * e.state[0] + c.one_minus_beta2 * g;
    return e;
  }
};

// Not a user's: gradients are added up, p being their sum.
struct Accumulate {
  enum { NUM_STATES = 0, UNSIGNED_STATES = 0, READS_STEP = 0 };
  struct Hyperparameters {};
  FLATSTEP_NAMES()

  struct Constants {};

  static Constants prepare(Hyperparameters, float, Step) {
    return {};
  }

  static Element<0> update(Constants, Element<0> e, float g) {
    e.p += g;
    return e;
  }
};

#define FLATSTEP_RULES(RULE) \
  RULE(Sgd, "sgd")           \
  RULE(Momentum, "momentum") \
  RULE(Adam, "adam")         \
  RULE(Lion, "lion")         \
  RULE(Accumulate, "accumulate")

}  // namespace flatstep
