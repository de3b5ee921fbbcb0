#include "step.h"

#include <algorithm>
#include <stdexcept>

#include "advance.h"
#include "backend/backend.h"
#include "backend/metal_arguments.h"
#include "view.h"

namespace flatstep {

namespace {

// Parameters and gradients are as the layout says.
void check(const StepInputs& in) {
  auto is_scalar = [](const mx::array& a, mx::Dtype dtype) {
    return a.size() == 1 && a.dtype() == dtype;
  };
  if (!is_scalar(in.step, mx::uint64)) {
    throw std::invalid_argument("[step] step should be a uint64 scalar.");
  }
  if (!in.schedule && !(in.learning_rate && is_scalar(*in.learning_rate, mx::float32))) {
    throw std::invalid_argument("[step] learning_rate should be a float32 scalar.");
  }
  if (in.state.size() != in.num_lists()) {
    throw std::invalid_argument(
        "[step] state should have a list for each that the rule and the rounding have.");
  }
}

// With a fixed rate, and a rule and storages that do not ask for it, nothing does.
bool depends_on_step(const StepInputs& in) {
  auto has_codes = [](const std::vector<mx::array>& buckets) {
    return std::any_of(
        buckets.begin(), buckets.end(), [](const auto& a) { return a.dtype() == mx::uint8; });
  };
  return in.schedule || in.rule.traits().reads_step || in.rounding != Rounding::nearest ||
         std::any_of(in.state.begin(), in.state.begin() + in.rule.num_states(), has_codes);
}

// The outputs of an Advance of this step.
std::vector<mx::array> advance(const StepInputs& in, const mx::array& step) {
  std::vector<mx::array> inputs{step};
  std::vector<mx::Shape> shapes{{}};
  std::vector<mx::Dtype> dtypes{mx::uint64};
  if (in.schedule) {
    shapes.push_back({});
    dtypes.push_back(mx::float32);
  }
  if (!holds_operands(in.stream.device)) {
    auto groups = static_cast<mx::ShapeElem>(in.rule.groups().size());
    shapes.push_back({groups, FLATSTEP_GROUP_WORDS});
    dtypes.push_back(mx::uint32);
    if (!in.schedule) {
      inputs.push_back(*in.learning_rate);
    }
  }
  auto node = std::make_shared<Advance>(in, shapes);
  return mx::array::make_arrays(std::move(shapes), dtypes, node, inputs);
}

}  // namespace

StepInputs update_leaves(const Layout& layout, const std::vector<size_t>& leaves, StepInputs in) {
  require_backend(in.stream.device);
  check(in);
  in.reads_step = depends_on_step(in);
  auto next = advance(in, in.step);
  if (!holds_operands(in.stream.device)) {
    // Where a compiled function does not return its state, there is no step to read at a replay.
    in.constants =
        in.reads_step || !is_tracing() ? next.back() : advance(in, mx::array(uint64_t{0})).back();
  }
  // A trace is replayed with the same leaves.
  auto plans = layout.plan(leaves, /* recurs */ is_tracing());
  for (const auto& plan : *plans) {
    auto out = fused_update(plan, in);
    for (size_t k = 0; k + 1 < out.size(); ++k) {
      in.state[k][plan->bucket] = std::move(out[1 + k]);
    }
    auto updated = views(out[0], plan->views, in.stream);
    for (size_t i = 0; i < updated.size(); ++i) {
      in.parameters[plan->segments[i].position] = std::move(updated[i]);
    }
  }
  in.step = std::move(next[0]);
  in.learning_rate = in.schedule ? std::optional(std::move(next[1])) : std::nullopt;
  return in;
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
