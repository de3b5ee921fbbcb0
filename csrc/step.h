// A whole optimizer step: all buckets of a tree.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "fused_update.h"

namespace flatstep {

struct StepResult {
  std::vector<mx::array> parameters;          // in the order of the leaves given
  std::vector<std::vector<mx::array>> state;  // by slot, then bucket
  mx::array step;
  std::optional<mx::array> learning_rate;  // only with a schedule
};

// `state[slot][bucket]` are the flat arrays of the layout; buckets without a gradient keep theirs.
StepResult update_leaves(
    const Layout& layout,
    const Rule& rule,
    std::shared_ptr<const Schedule> schedule,
    const std::vector<size_t>& leaves,
    std::vector<mx::array> parameters,
    std::vector<mx::array> gradients,
    std::vector<std::vector<mx::array>> state,
    mx::array step,
    std::optional<mx::array> learning_rate,
    mx::StreamOrDevice s = {});

// The same for one parameter of any shape and its state, with no layout.
StepResult update_single(
    const Rule& rule,
    std::shared_ptr<const Schedule> schedule,
    mx::array parameter,
    mx::array gradient,
    std::vector<mx::array> state,
    mx::array step,
    std::optional<mx::array> learning_rate,
    mx::StreamOrDevice s = {});

// Whether the given leaves lie in their buckets' buffers as a step leaves them. They must have been
// evaluated.
bool are_flat(
    const Layout& layout,
    const std::vector<size_t>& leaves,
    const std::vector<mx::array>& parameters);

}  // namespace flatstep
