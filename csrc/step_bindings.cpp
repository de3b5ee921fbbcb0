#include "step_bindings.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <limits>

#include "mlx/transforms.h"
#include "plain_schedule.h"
#include "squared_norm.h"
#include "step.h"
#include "tree.h"

namespace flatstep {

using namespace nb::literals;

namespace {

using State = std::vector<std::vector<mx::array>>;
// As the stubs have it.
using StateArrays = nb::typed<nb::list, nb::typed<nb::list, mx::array>>;

using Scalars = std::map<std::string, mx::array>;
// Of each leaf its group; kFrozenGroup: a step leaves it as it is.
constexpr uint32_t kFrozenGroup = UINT32_MAX;
struct LeafGroups {
  Groups groups;
};

StepInputs step_inputs(
    const Rule& rule,
    const StateArrays& state,
    const Scalars& scalars,
    const StepSettings& settings,
    const LeafGroups* groups,
    mx::StreamOrDevice s) {
  StepInputs in{rule, nullptr, settings, {}, {}, {}, nb::cast<State>(state), mx::to_stream(s)};
  for (size_t k = 0; k < NUM_STEP_SCALARS; ++k) {
    if (auto found = scalars.find(kScalarNames[k]); found != scalars.end()) {
      in.scalars[k] = found->second;
    }
  }
  in.groups = groups ? groups->groups : nullptr;
  return in;
}

// What a step returns of them: those that it was given or has made.
Scalars scalars_of(StepInputs& in) {
  Scalars result;
  for (size_t k = 0; k < NUM_STEP_SCALARS; ++k) {
    if (in.scalars[k] && k != SCALAR_sum_of_squares) {
      result.emplace(kScalarNames[k], std::move(*in.scalars[k]));
    }
  }
  return result;
}

std::vector<size_t> taken_leaves(GivenLeaves& given, const LeafGroups* groups) {
  std::vector<size_t> leaves = std::move(given.leaves);
  for (size_t& leaf : leaves) {
    if (groups && groups->groups->at(leaf) == kFrozenGroup) {
      leaf = kFrozen;
    }
  }
  return leaves;
}

std::optional<std::tuple<nb::object, State, Scalars>> step(
    const Layout& layout,
    nb::handle skeleton,
    nb::handle gradients,
    nb::handle parameters,
    const Rule& rule,
    const PlainSchedule* schedule,
    const StateArrays& state,
    const Scalars& scalars,
    const StepSettings& settings,
    const LeafGroups* groups,
    std::optional<mx::distributed::Group> norm_group,
    mx::StreamOrDevice s) {
  GivenLeaves given = collect_leaves(layout, skeleton, gradients, parameters);
  if (given.dtype_changed) {
    return std::nullopt;
  }
  StepInputs in = step_inputs(rule, state, scalars, settings, groups, s);
  in.schedule = schedule ? schedule->data() : nullptr;
  in.norm_group = std::move(norm_group);
  in.parameters = std::move(given.parameters);
  if (settings.pass.accumulate_steps == 0) {
    in.gradients = std::move(given.gradients);
  }
  in = update_leaves(layout, taken_leaves(given, groups), std::move(in));
  return std::tuple(
      rebuild_tree(gradients, std::move(in.parameters)), std::move(in.state), scalars_of(in));
}

std::tuple<std::vector<mx::array>, Scalars> accumulate(
    const Layout& layout,
    nb::handle skeleton,
    nb::handle gradients,
    const StateArrays& sums,
    const Scalars& scalars,
    uint32_t seed,
    const LeafGroups* groups,
    mx::StreamOrDevice s) {
  GivenLeaves given = collect_leaves(layout, skeleton, gradients, {});
  StepSettings settings{};
  settings.pass.is_accumulation = 1;
  settings.pass.accumulate_steps = 1;
  settings.pass.clip_value = std::numeric_limits<float>::infinity();
  settings.pass.seed = seed;
  StepInputs in = step_inputs({"accumulate", {}}, sums, scalars, settings, nullptr, s);
  in.gradients = std::move(given.gradients);
  in = update_leaves(layout, taken_leaves(given, groups), std::move(in));
  return std::tuple(std::move(in.state[0]), scalars_of(in));
}

void bind_settings(nb::module_& m) {
  nb::enum_<RateSource>(m, "RateSource", "Where the learning rate of a group comes from.")
      .value("ALL", RATE_OF_ALL)
      .value("OWN", RATE_OWN)
      .value("SCHEDULE", RATE_SCHEDULE);
  nb::class_<LeafGroups>(m, "LeafGroups", "The group of parameters of each leaf.")
      .def(
          "__init__",
          [](LeafGroups* self, std::vector<uint32_t> groups) {
            new (self) LeafGroups{std::make_shared<std::vector<uint32_t>>(std::move(groups))};
          },
          "groups"_a);
  m.attr("FROZEN") = kFrozenGroup;
  constexpr float kNone = std::numeric_limits<float>::infinity();
  nb::class_<StepSettings>(m, "StepSettings", "What a user sets for a step besides the rule.")
      .def(
          "__init__",
          [](StepSettings* self,
             Rounding rounding,
             uint32_t seed,
             float max_grad_norm,
             float clip_value,
             bool has_norm,
             bool skips_nonfinite,
             uint64_t accumulate_steps,
             std::optional<double> ema,
             uint64_t ema_start,
             uint64_t ema_every) {
            PassSettings pass{};
            pass.accumulate_steps = accumulate_steps;
            pass.ema_start = ema_start;
            pass.ema_every = ema_every;
            pass.max_grad_norm = max_grad_norm;
            pass.clip_value = clip_value;
            pass.ema_decay = static_cast<float>(ema.value_or(0.0));
            pass.one_minus_ema_decay = static_cast<float>(1.0 - ema.value_or(0.0));
            pass.has_norm = has_norm;
            pass.skips_nonfinite = skips_nonfinite;
            pass.seed = seed;
            new (self) StepSettings{pass, rounding, ema.has_value()};
          },
          "rounding"_a = Rounding::nearest,
          "seed"_a = 0,
          "max_grad_norm"_a = kNone,
          "clip_value"_a = kNone,
          "has_norm"_a = false,
          "skips_nonfinite"_a = false,
          "accumulate_steps"_a = 0,
          "ema"_a = nb::none(),
          "ema_start"_a = 0,
          "ema_every"_a = 1);
}

}  // namespace

void bind_steps(nb::module_& m) {
  bind_settings(m);
  m.def(
      "step",
      &step,
      "layout"_a,
      "skeleton"_a,
      "gradients"_a.none(),
      "parameters"_a.none(),
      "rule"_a,
      "schedule"_a.none(),
      "state"_a,
      "scalars"_a,
      "settings"_a,
      "groups"_a.none() = nb::none(),
      "norm_group"_a = nb::none(),
      "stream"_a = nb::none(),
      "One step over a tree: (parameters, state, scalars), or None when a parameter's dtype is not "
      "the layout's.");
  m.def(
      "are_flat",
      [](const Layout& layout,
         nb::handle skeleton,
         nb::handle parameters,
         const LeafGroups* groups) {
        GivenLeaves given = collect_leaves(layout, skeleton, parameters, parameters);
        {
          nb::gil_scoped_release release;
          mx::eval(given.parameters);
        }
        return !given.dtype_changed &&
               are_flat(layout, taken_leaves(given, groups), given.parameters);
      },
      "layout"_a,
      "skeleton"_a,
      "parameters"_a,
      "groups"_a.none() = nb::none(),
      "Whether the parameters lie in their buckets, once they are evaluated.");
  m.def(
      "accumulate",
      &accumulate,
      "layout"_a,
      "skeleton"_a,
      "gradients"_a.none(),
      "sums"_a,
      "scalars"_a,
      "seed"_a = 0,
      "groups"_a.none() = nb::none(),
      "stream"_a = nb::none(),
      "Adds gradients to their sums: (sums, scalars).");
  m.def(
      "global_norm",
      [](const std::vector<mx::array>& gradients, mx::StreamOrDevice s) {
        return global_norm(gradients, mx::to_stream(s));
      },
      "gradients"_a,
      "stream"_a = nb::none(),
      "The 2-norm of all elements of some arrays.");
}

}  // namespace flatstep
