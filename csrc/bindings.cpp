// What Python sees, and nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "backend/backend.h"
#include "backend/cpu_dispatch.h"
#include "backend/floor.h"
#include "backend/thread_pool.h"
#include "fused_update.h"
#include "mlx/transforms.h"
#include "step.h"
#include "tree.h"
#include "view.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace flatstep;

namespace {

using Pieces = std::vector<SchedulePiece>;

// What the stubs say of the lists, tuples and dicts that are read and written by hand.
using ArrayList = nb::typed<nb::list, mx::array>;
using StateLists = nb::typed<nb::list, ArrayList>;
using StepTuple = nb::typed<nb::tuple, nb::object, StateLists, mx::array, std::optional<mx::array>>;
using SingleStepTuple =
    nb::typed<nb::tuple, mx::array, ArrayList, mx::array, std::optional<mx::array>>;
using Counts = nb::typed<nb::dict, std::string, uint64_t>;

// A schedule that Python holds: its pieces, for joining, and what the kernels read.
struct PlainSchedule {
  explicit PlainSchedule(Pieces p) : pieces(std::move(p)) {
    if (pieces.size() > FLATSTEP_MAX_SCHEDULE_PIECES) {
      return;
    }
    auto filled = std::make_shared<Schedule>(Schedule{});
    filled->num_pieces = static_cast<int32_t>(pieces.size());
    std::copy(pieces.begin(), pieces.end(), filled->pieces);
    data = std::move(filled);
  }

  Pieces pieces;
  std::shared_ptr<const Schedule> data;  // null when there are too many pieces
};

mx::Shape to_shape(const std::vector<int>& dimensions) {
  return mx::Shape(dimensions.begin(), dimensions.end());
}

std::shared_ptr<const Schedule> data_of(const PlainSchedule* schedule) {
  return schedule ? schedule->data : nullptr;
}

// nanobind has no caster for MLX's vectors of arrays of other modules to move from: a list of
// lists of arrays is read and written by hand.
std::vector<std::vector<mx::array>> state_from(const nb::list& slots) {
  std::vector<std::vector<mx::array>> state;
  for (nb::handle slot : slots) {
    std::vector<mx::array>& buckets = state.emplace_back();
    for (nb::handle flat : nb::cast<nb::list>(slot)) {
      buckets.push_back(nb::cast<mx::array>(flat));
    }
  }
  return state;
}

nb::list state_to_python(std::vector<std::vector<mx::array>> state) {
  nb::list slots;
  for (auto& slot : state) {
    nb::list buckets;
    for (auto& flat : slot) {
      buckets.append(nb::cast(std::move(flat)));
    }
    slots.append(buckets);
  }
  return slots;
}

std::optional<StepTuple> step(
    const Layout& layout,
    nb::handle skeleton,
    nb::handle gradients,
    nb::handle parameters,
    const Rule& rule,
    const PlainSchedule* schedule,
    const StateLists& state,
    const mx::array& step_count,
    std::optional<mx::array> learning_rate,
    mx::StreamOrDevice s) {
  GivenLeaves given = collect_leaves(layout, skeleton, gradients, parameters);
  if (given.dtype_changed) {
    return std::nullopt;
  }
  StepResult result = update_leaves(
      layout,
      rule,
      data_of(schedule),
      given.leaves,
      std::move(given.parameters),
      std::move(given.gradients),
      state_from(state),
      step_count,
      std::move(learning_rate),
      s);
  return nb::make_tuple(
      rebuild_tree(gradients, std::move(result.parameters)),
      state_to_python(std::move(result.state)),
      nb::cast(std::move(result.step)),
      nb::cast(std::move(result.learning_rate)));
}

SingleStepTuple single_step(
    const mx::array& parameter,
    const mx::array& gradient,
    std::vector<mx::array> state,
    const Rule& rule,
    const PlainSchedule* schedule,
    const mx::array& step_count,
    std::optional<mx::array> learning_rate,
    mx::StreamOrDevice s) {
  StepResult result = update_single(
      rule,
      data_of(schedule),
      parameter,
      gradient,
      std::move(state),
      step_count,
      std::move(learning_rate),
      s);
  nb::list new_state;
  for (auto& slot : result.state) {
    new_state.append(nb::cast(std::move(slot.front())));
  }
  return nb::make_tuple(
      nb::cast(std::move(result.parameters.front())),
      new_state,
      nb::cast(std::move(result.step)),
      nb::cast(std::move(result.learning_rate)));
}

// The value of a scalar of a floating type, unless that would take an evaluation.
std::optional<double> known_value(const mx::array& a) {
  if (a.size() != 1 || a.is_tracer() || !a.is_available()) {
    return std::nullopt;
  }
  switch (a.dtype().val()) {
    case mx::Dtype::Val::float64:
      return *a.data<double>();
    case mx::Dtype::Val::float32:
      return *a.data<float>();
    case mx::Dtype::Val::float16:
      return static_cast<float>(*a.data<mx::float16_t>());
    case mx::Dtype::Val::bfloat16:
      return static_cast<float>(*a.data<mx::bfloat16_t>());
    default:
      return std::nullopt;
  }
}

void bind_rules(nb::module_& m) {
  nb::class_<Rule>(m, "Rule", "An update rule with its hyperparameters.")
      .def_prop_ro("num_slots", &Rule::num_slots, "How many state arrays a step updates.");
  m.def("sgd_rule", &make_sgd, "momentum"_a, "weight_decay"_a, "dampening"_a, "nesterov"_a);
  m.def(
      "adam_rule", &make_adam, "betas"_a, "eps"_a, "weight_decay"_a, "bias_correction"_a, "name"_a);
}

void bind_schedules(nb::module_& m) {
  nb::class_<PlainSchedule>(m, "PlainSchedule", "A schedule as data that a kernel evaluates.")
      .def_prop_ro(
          "fits_kernel",
          [](const PlainSchedule& s) { return s.data != nullptr; },
          "False when a join has more pieces than a kernel takes.")
      .def(
          "__call__",
          [](const PlainSchedule& s, uint64_t step_count) {
            if (!s.data) {
              throw std::invalid_argument("[PlainSchedule] too many pieces for a kernel.");
            }
            return schedule_value(*s.data, step_count);
          },
          "step"_a,
          "The float32 learning rate at a step, as the kernels compute it.");
  m.def(
      "linear_schedule",
      [](double init, double end, int64_t steps) {
        return PlainSchedule({linear_piece(init, end, steps)});
      },
      "init"_a,
      "end"_a,
      "steps"_a);
  m.def(
      "cosine_decay",
      [](double init, double end, int64_t steps) {
        return PlainSchedule({cosine_piece(init, end, steps)});
      },
      "init"_a,
      "end"_a,
      "steps"_a);
  m.def(
      "exponential_decay",
      [](double init, double decay_rate, int64_t step_size) {
        return PlainSchedule({exponential_piece(init, decay_rate, step_size)});
      },
      "init"_a,
      "decay_rate"_a,
      "step_size"_a);
  m.def(
      "join_schedules",
      [](const std::vector<const PlainSchedule*>& schedules,
         const std::vector<int64_t>& boundaries) {
        std::vector<Pieces> parts;
        for (const auto* schedule : schedules) {
          parts.push_back(schedule->pieces);
        }
        return PlainSchedule(join_pieces(parts, boundaries));
      },
      "schedules"_a,
      "boundaries"_a);
}

void bind_layout(nb::module_& m) {
  nb::class_<Layout>(m, "Layout", "Where each leaf of a tree lies in flat memory.")
      .def(
          "__init__",
          [](Layout* self,
             const std::vector<std::string>& paths,
             const std::vector<std::vector<int>>& shapes,
             const std::vector<mx::Dtype>& dtypes,
             size_t bucket_bytes) {
            std::vector<mx::Shape> mlx_shapes;
            for (const auto& shape : shapes) {
              mlx_shapes.push_back(to_shape(shape));
            }
            new (self) Layout(paths, mlx_shapes, dtypes, bucket_bytes);
          },
          "paths"_a,
          "shapes"_a,
          "dtypes"_a,
          "bucket_bytes"_a)
      .def_prop_ro(
          "segments",
          [](const Layout& layout) {
            std::vector<std::pair<size_t, size_t>> segments;
            for (const Leaf& leaf : layout.leaves()) {
              segments.emplace_back(leaf.bucket, leaf.offset);
            }
            return segments;
          },
          "The bucket and the first element of each leaf.")
      .def_prop_ro(
          "bucket_blocks",
          [](const Layout& layout) {
            std::vector<size_t> blocks;
            for (const Bucket& bucket : layout.buckets()) {
              blocks.push_back(bucket.blocks);
            }
            return blocks;
          },
          "The length of each bucket in blocks of 64 elements.");
  m.def(
      "are_flat",
      [](const Layout& layout, nb::handle skeleton, nb::handle parameters) {
        GivenLeaves given = collect_leaves(layout, skeleton, parameters, parameters);
        {
          nb::gil_scoped_release release;
          mx::eval(given.parameters);
        }
        return !given.dtype_changed && are_flat(layout, given.leaves, given.parameters);
      },
      "layout"_a,
      "skeleton"_a,
      "parameters"_a,
      "Whether the parameters lie in their buckets, once they are evaluated.");
}

void bind_cpu(nb::module_& m) {
  m.def(
      "reuse_counters",
      [] {
        ReuseCounters c = reuse_counters();
        Counts result;
        result["parameters_in_place"] = c.parameters_in_place;
        result["parameters_fresh"] = c.parameters_fresh;
        result["state_in_place"] = c.state_in_place;
        result["state_fresh"] = c.state_fresh;
        return result;
      },
      "How often a bucket's buffer was written in place, and how often to fresh memory.");
  m.def(
      "gpu_backend",
      [] {
        const char* name = gpu_backend_name();
        return name ? std::optional<std::string>(name) : std::nullopt;
      },
      "The GPU backend of this build, or None.");
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, "n"_a);
  m.def("cpu_loops", [] { return std::string(cpu_loops().name); });
  m.def("available_cpu_loops", &available_cpu_loops);
  m.def("set_cpu_loops", &set_cpu_loops, "name"_a);
  m.def(
      "floor_pass",
      [](mx::array& p, const mx::array& g, std::vector<mx::array> state) {
        nb::gil_scoped_release release;
        floor_pass(p, g, state);
      },
      "p"_a,
      "g"_a,
      "state"_a,
      "Moves the bytes of a step, with next to no arithmetic: the time that memory allows.");
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "The compiled engine of flatstep.";
  nb::module_::import_("mlx.core");
  bind_rules(m);
  bind_schedules(m);
  bind_layout(m);
  bind_cpu(m);
  m.attr("MAX_TREE_DEPTH") = kMaxTreeDepth;
  m.def("is_tracing", &is_tracing, "True while a function is traced.");
  m.def(
      "known_value",
      &known_value,
      "array"_a,
      "The value of a floating scalar that is evaluated; None of any other array.");
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
      "step"_a,
      "learning_rate"_a.none(),
      "stream"_a = nb::none(),
      "One step over a tree: (parameters, state, step, learning_rate), or None when a parameter's "
      "dtype is not the layout's.");
  m.def(
      "single_step",
      &single_step,
      "parameter"_a,
      "gradient"_a,
      "state"_a,
      "rule"_a,
      "schedule"_a.none(),
      "step"_a,
      "learning_rate"_a.none(),
      "stream"_a = nb::none(),
      "One step of one array: (parameter, state, step, learning_rate).");
  m.def(
      "views",
      [](const mx::array& flat,
         const std::vector<std::pair<std::vector<int>, size_t>>& specs,
         mx::StreamOrDevice s) {
        std::vector<ViewSpec> view_specs;
        for (const auto& [dimensions, offset] : specs) {
          auto shape = to_shape(dimensions);
          bool is_apart = keeps_much_else(size_of_shape(shape), flat.size());
          view_specs.push_back({std::move(shape), offset, is_apart ? always() : nullptr});
        }
        auto shared = std::make_shared<const std::vector<ViewSpec>>(std::move(view_specs));
        // A leaf that is read is no part of a graph, which would keep the whole bucket.
        return flat.is_available() && !is_tracing() ? views_of_available(flat, std::move(shared))
                                                    : views(flat, std::move(shared), s);
      },
      "flat"_a,
      "specs"_a,
      "stream"_a = nb::none(),
      "Parts of a flat array, given as (shape, first element). They share its memory unless they "
      "would keep much of it that is not theirs.");
}
