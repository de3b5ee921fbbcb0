#include "step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "advance.h"
#include "backend/backend.h"
#include "mlx/distributed/ops.h"
#include "mlx/ops.h"
#include "squared_norm.h"
#include "view.h"

namespace flatstep {

namespace {

constexpr mx::Dtype kScalarTypes[NUM_STEP_SCALARS] = {
#define FLATSTEP_SCALAR(name, Type, dtype) mx::dtype,
    FLATSTEP_STEP_SCALARS(FLATSTEP_SCALAR)
#undef FLATSTEP_SCALAR
};

// Parameters and gradients are as the layout says.
void check(const StepInputs& in) {
  for (size_t k = 0; k < NUM_STEP_SCALARS; ++k) {
    const auto& a = in.scalars[k];
    size_t size = k == SCALAR_group_learning_rates ? in.rule.groups().size() - 1 : 1;
    if (a && (a->size() != size || a->dtype() != kScalarTypes[k])) {
      throw std::invalid_argument(
          "[step] " + std::string(kScalarNames[k]) + " has another size or dtype.");
    }
  }
  bool needs_rate = !in.schedule && !in.settings.pass.is_accumulation;
  bool needs_rates = in.rule.groups().size() > 1;
  if (!in.scalars[SCALAR_step] || (needs_rate && !in.scalars[SCALAR_learning_rate]) ||
      (needs_rates && !in.scalars[SCALAR_group_learning_rates]) ||
      (in.settings.pass.accumulate_steps > 0 && !in.scalars[SCALAR_accumulated])) {
    throw std::invalid_argument("[step] a scalar is missing.");
  }
  if (in.state.size() != StateLists(in.rule, in.settings).count) {
    throw std::invalid_argument(
        "[step] state should have a list for each that the rule and the settings have.");
  }
}

// With a fixed rate, and a rule and storages that do not ask for it, nothing does.
bool depends_on_step(const StepInputs& in) {
  auto has_codes = [](const std::vector<mx::array>& buckets) {
    return std::any_of(
        buckets.begin(), buckets.end(), [](const auto& a) { return a.dtype() == mx::uint8; });
  };
  const PassSettings& pass = in.settings.pass;
  return in.schedule || in.rule.traits().reads_step || in.settings.rounding != Rounding::nearest ||
         in.rule.groups().size() > 1 || in.settings.has_ema || pass.accumulate_steps > 0 ||
         pass.has_norm != 0 || std::any_of(in.state.begin(), in.state.end(), has_codes);
}

// Moves on what a step leaves besides arrays of elements, and makes the constants.
void advance(StepInputs& in) {
  Advance::Places written;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  auto write = [&](StepScalar scalar, bool is_written) {
    if (is_written) {
      written[scalar] = static_cast<uint8_t>(shapes.size());
      int count = static_cast<int>(in.rule.groups().size()) - 1;
      shapes.push_back(scalar == SCALAR_group_learning_rates ? mx::Shape{count} : mx::Shape{});
      dtypes.push_back(kScalarTypes[scalar]);
    }
  };
  bool is_step = !in.settings.pass.is_accumulation;
  if (auto& rates = in.scalars[SCALAR_group_learning_rates]) {
    bool is_known = rates->is_available() && rates->flags().row_contiguous;
    rates = is_known ? *rates : mx::contiguous(*rates, false, in.stream);
  }
  auto is_there = [&](StepScalar scalar) { return in.scalars[scalar].has_value(); };
  write(SCALAR_step, is_step);
  write(SCALAR_learning_rate, is_step && in.schedule);
  write(SCALAR_group_learning_rates, is_there(SCALAR_group_learning_rates));
  write(SCALAR_grad_norm, is_step && is_there(SCALAR_grad_norm));
  write(SCALAR_skipped_steps, is_step && is_there(SCALAR_skipped_steps));
  write(SCALAR_accumulated, is_there(SCALAR_accumulated));
  shapes.push_back({static_cast<int>(in.rule.groups().size()), FLATSTEP_GROUP_WORDS});
  dtypes.push_back(mx::uint32);
  auto made = [&](const mx::array& step) {
    std::vector<mx::array> inputs;
    for (size_t k = 0; k < NUM_STEP_SCALARS; ++k) {
      if (in.scalars[k]) {
        inputs.push_back(k == SCALAR_step ? step : *in.scalars[k]);
      }
    }
    auto node = std::make_shared<Advance>(in, written, shapes);
    return mx::array::make_arrays(shapes, dtypes, node, inputs);
  };
  auto next = made(*in.scalars[SCALAR_step]);
  // Where a compiled function does not return its state, there is no step to read at a replay.
  in.constants =
      depends_on_step(in) || !is_tracing() ? next.back() : made(mx::array(uint64_t{0})).back();
  for (size_t k = 0; k < NUM_STEP_SCALARS; ++k) {
    if (written[k]) {
      in.scalars[k] = next[*written[k]];
    }
  }
}

}  // namespace

const char* const kScalarNames[NUM_STEP_SCALARS] = {
#define FLATSTEP_SCALAR(name, Type, dtype) #name,
    FLATSTEP_STEP_SCALARS(FLATSTEP_SCALAR)
#undef FLATSTEP_SCALAR
};

Advance::Advance(const StepInputs& in, const Places& written, std::vector<mx::Shape> shapes)
    : UpdatePrimitive(in.stream, std::move(shapes)),
      schedule_(in.schedule),
      rule_(in.rule),
      settings_(in.settings.pass),
      written_(written) {
  uint8_t count = 0;
  for (size_t k = 0; k < NUM_STEP_SCALARS; ++k) {
    if (in.scalars[k]) {
      read_[k] = count++;
    }
  }
}

StepInputs update_leaves(const Layout& layout, const std::vector<size_t>& leaves, StepInputs in) {
  require_backend(in.stream.device);
  check(in);
  // A trace is replayed with the same leaves.
  auto plans = layout.plan(leaves, /* recurs */ is_tracing(), in.groups);
  if (in.settings.pass.has_norm) {
    mx::array sum = sum_of_squares(*plans, in);
    in.scalars[SCALAR_sum_of_squares] =
        in.norm_group ? mx::distributed::all_sum(sum, in.norm_group, in.stream) : sum;
  }
  advance(in);
  StateLists lists(in.rule, in.settings);
  // A step leaves no sum behind, of what it is not given neither.
  auto drop_sums = [&](size_t bucket) {
    mx::array& sum = in.state[lists.accumulated][bucket];
    mx::array is_step =
        mx::equal(*in.scalars[SCALAR_accumulated], mx::array(uint64_t{0}), in.stream);
    sum = mx::where(is_step, mx::zeros({1}, sum.dtype(), in.stream), sum, in.stream);
  };
  if (lists.accumulated < lists.count && !in.settings.pass.is_accumulation) {
    for (size_t bucket = 0, next = 0; bucket < layout.buckets().size(); ++bucket) {
      bool is_planned = next < plans->size() && (*plans)[next]->bucket == bucket;
      next += is_planned;
      if (!is_planned) {
        drop_sums(bucket);
      }
    }
  }
  for (const auto& plan : *plans) {
    if (in.settings.pass.is_accumulation) {
      auto out = fused_update(plan->of_state, in);
      in.state[lists.accumulated][plan->bucket] = std::move(out[0]);
      continue;
    }
    bool has_rests = traits_of(parameter_storage(plan->dtype, in.settings.rounding)).rest_bytes > 0;
    bool is_part = !plan->untouched.empty();
    auto out = fused_update(plan, in);
    for (size_t list = 0, k = 1; list < lists.count; ++list) {
      if (list != lists.rests || lists.rests == lists.ema || has_rests) {
        in.state[list][plan->bucket] = std::move(out[k++]);
      }
    }
    if (is_part && lists.accumulated < lists.count) {
      drop_sums(plan->bucket);
    }
    auto updated = views(out[0], plan->views, in.stream);
    for (size_t i = 0; i < updated.size(); ++i) {
      in.parameters[plan->segments[i].position] = std::move(updated[i]);
    }
  }
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
