#include "step.h"

#include "advance.h"
#include "view.h"

namespace flatstep {

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
    mx::StreamOrDevice s) {
  NextStep next = advance(step, schedule, s);
  std::vector<std::optional<mx::array>> updated(leaves.size());
  // A trace is replayed with the same leaves.
  auto plans = layout.plan(leaves, is_tracing() || layout.recurs(leaves));
  for (const auto& plan : *plans) {
    UpdateInputs in{step, learning_rate, {}, parameters, gradients};
    for (int slot = 0; slot < rule.num_slots(); ++slot) {
      in.state.push_back(std::move(state[slot][plan->bucket]));
    }
    auto out = fused_update(plan, rule, schedule, std::move(in), s);
    for (size_t slot = 0; slot < out.state.size(); ++slot) {
      state[slot][plan->bucket] = std::move(out.state[slot]);
    }
    auto leaf_views = views(out.parameters, plan->views, s);
    for (size_t k = 0; k < leaf_views.size(); ++k) {
      updated[plan->segments[k].position] = std::move(leaf_views[k]);
    }
  }
  std::vector<mx::array> result;
  result.reserve(updated.size());
  for (auto& leaf : updated) {
    result.push_back(std::move(*leaf));
  }
  return {std::move(result), std::move(state), std::move(next.step), std::move(next.learning_rate)};
}

StepResult update_single(
    const Rule& rule,
    std::shared_ptr<const Schedule> schedule,
    mx::array parameter,
    mx::array gradient,
    std::vector<mx::array> state,
    mx::array step,
    std::optional<mx::array> learning_rate,
    mx::StreamOrDevice s) {
  Layout layout({"parameter"}, {parameter.shape()}, {parameter.dtype()}, /* bucket_bytes */ 0);
  std::vector<std::vector<mx::array>> by_slot;
  for (auto& slot : state) {
    by_slot.push_back({std::move(slot)});
  }
  return update_leaves(
      layout,
      rule,
      std::move(schedule),
      {0},
      {std::move(parameter)},
      {std::move(gradient)},
      std::move(by_slot),
      std::move(step),
      std::move(learning_rate),
      s);
}

bool are_flat(
    const Layout& layout,
    const std::vector<size_t>& leaves,
    const std::vector<mx::array>& parameters) {
  for (const auto& plan : *layout.plan(leaves, /* recurs */ true)) {
    std::vector<mx::array> in_order;
    for (const Segment& segment : plan->segments) {
      in_order.push_back(parameters[segment.position]);
    }
    if (!Home(*plan, in_order.data()).has_all()) {
      return false;
    }
  }
  return true;
}

}  // namespace flatstep
