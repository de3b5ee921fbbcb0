// From what a user writes (Python doubles) to the plain structs that the kernels read.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "rules.h"
#include "schedule.h"

namespace flatstep {

enum class RuleKind { sgd, adam };

struct Rule {
  RuleKind kind;
  Hyperparameters values;
  // SGD: whether the doubles that the user gave are not 0. Their floats may be.
  bool has_weight_decay;
  bool has_momentum;

  // How many state arrays a step reads and writes: (m, v) for Adam, (v) for SGD with momentum.
  int num_slots() const {
    return kind == RuleKind::adam ? 2 : (has_momentum ? 1 : 0);
  }
};

// The double x as the nearest float and the float nearest to what is left.
Pair split(double x);

// Both throw std::invalid_argument, naming the argument, its value and what is allowed.
Rule make_sgd(double momentum, double weight_decay, double dampening, bool nesterov);
Rule make_adam(
    const std::vector<double>& betas,
    double eps,
    double weight_decay,
    bool bias_correction,
    const std::string& name);

SchedulePiece linear_piece(double init, double end, int64_t steps);
SchedulePiece cosine_piece(double init, double end, int64_t steps);
SchedulePiece exponential_piece(double init, double decay_rate, int64_t step_size);

// Flattens a join: `parts[i + 1]` takes over at step `boundaries[i]` and counts from there.
std::vector<SchedulePiece> join_pieces(
    const std::vector<std::vector<SchedulePiece>>& parts, const std::vector<int64_t>& boundaries);

}  // namespace flatstep
