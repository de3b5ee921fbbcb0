#include "hyperparameters.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace flatstep {

namespace {

void require(bool ok, const std::string& name, double value, const char* allowed) {
  if (!ok) {
    std::ostringstream message;
    message << name << " should be " << allowed << ", " << value << " was provided instead";
    throw std::invalid_argument(message.str());
  }
}

// As a float, which is what the kernels are given.
bool is_finite(double x) {
  return std::isfinite(static_cast<float>(x));
}

bool is_zero_or_more(double x) {
  return is_finite(x) && x >= 0;
}

constexpr const char* kFinite = "finite in float32";
constexpr const char* kZeroOrMore = "finite in float32 and >=0";

SchedulePiece empty_piece(SchedulePieceKind kind, double init, int64_t steps) {
  SchedulePiece piece{};
  piece.start = -FLATSTEP_LAST_STEP;
  piece.steps = steps;
  piece.kind = kind;
  piece.init = split(init);
  return piece;
}

// Sums of boundaries that a user may have given as anything that fits an int64.
int64_t bounded_sum(int64_t a, int64_t b) {
  auto bounded = [](int64_t x) { return std::clamp(x, -FLATSTEP_LAST_STEP, FLATSTEP_LAST_STEP); };
  return bounded(bounded(a) + bounded(b));
}

}  // namespace

Pair split(double x) {
  float hi = static_cast<float>(x);
  return pair(hi, std::isfinite(hi) ? static_cast<float>(x - hi) : 0.0f);
}

Rule make_sgd(double momentum, double weight_decay, double dampening, bool nesterov) {
  require(is_zero_or_more(momentum), "SGD momentum", momentum, kZeroOrMore);
  require(is_finite(weight_decay), "SGD weight_decay", weight_decay, kFinite);
  require(is_zero_or_more(dampening), "SGD dampening", dampening, kZeroOrMore);
  if (nesterov && (momentum <= 0 || dampening != 0)) {
    throw std::invalid_argument("Nesterov momentum requires a momentum and zero dampening.");
  }
  Rule rule{RuleKind::sgd, {}, weight_decay != 0, momentum > 0};
  rule.values.weight_decay = split(weight_decay);
  rule.values.momentum = split(momentum);
  rule.values.one_minus_dampening = split(1.0 - dampening);
  rule.values.nesterov = nesterov;
  return rule;
}

Rule make_adam(
    const std::vector<double>& betas,
    double eps,
    double weight_decay,
    bool bias_correction,
    const std::string& name) {
  if (betas.size() != 2) {
    std::ostringstream message;
    message << name << " betas should be two numbers, " << betas.size() << " were provided instead";
    throw std::invalid_argument(message.str());
  }
  for (size_t i = 0; i < 2; ++i) {
    require(
        betas[i] >= 0.0 && betas[i] < 1.0,
        name + " beta" + std::to_string(i + 1),
        betas[i],
        "in [0, 1)");
  }
  require(is_zero_or_more(eps), name + " epsilon", eps, kZeroOrMore);
  require(is_finite(weight_decay), name + " weight_decay", weight_decay, kFinite);

  Rule rule{RuleKind::adam, {}, false, false};
  Hyperparameters& h = rule.values;
  h.weight_decay = split(weight_decay);
  h.beta1 = split(betas[0]);
  h.one_minus_beta1 = split(1.0 - betas[0]);
  h.log_beta1 = split(std::log(betas[0]));
  h.beta2 = split(betas[1]);
  h.one_minus_beta2 = split(1.0 - betas[1]);
  h.log_beta2 = split(std::log(betas[1]));
  h.eps = split(eps);
  h.bias_correction = bias_correction;
  return rule;
}

SchedulePiece linear_piece(double init, double end, int64_t steps) {
  SchedulePiece piece = empty_piece(SCHEDULE_LINEAR, init, steps);
  piece.end = split(end);
  piece.slope = split((end - init) / static_cast<double>(steps));
  return piece;
}

SchedulePiece cosine_piece(double init, double end, int64_t steps) {
  SchedulePiece piece = empty_piece(SCHEDULE_COSINE, init, steps);
  piece.end = split(end);
  return piece;
}

SchedulePiece exponential_piece(double init, double decay_rate, int64_t step_size) {
  SchedulePiece piece = empty_piece(SCHEDULE_EXPONENTIAL, init, step_size);
  piece.log_rate = decay_rate == 0 ? pair(0.0f) : split(std::log(std::abs(decay_rate)));
  piece.rate_sign = decay_rate > 0 ? 1 : (decay_rate < 0 ? -1 : 0);
  return piece;
}

std::vector<SchedulePiece> join_pieces(
    const std::vector<std::vector<SchedulePiece>>& parts, const std::vector<int64_t>& boundaries) {
  std::vector<SchedulePiece> joined = parts.at(0);
  for (size_t i = 0; i < boundaries.size(); ++i) {
    for (SchedulePiece piece : parts.at(i + 1)) {
      piece.start = std::max(boundaries[i], bounded_sum(piece.start, boundaries[i]));
      piece.origin = bounded_sum(piece.origin, boundaries[i]);
      joined.push_back(piece);
    }
  }
  return joined;
}

}  // namespace flatstep
