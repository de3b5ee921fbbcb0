// What Python sees, and nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "backend/backend.h"
#include "backend/cpu_loops.h"
#include "backend/floor.h"
#include "backend/thread_pool.h"
#include "convert.h"
#include "fused_update.h"
#include "mlx/transforms.h"
#include "step.h"
#include "step_bindings.h"
#include "tree.h"
#include "view.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace flatstep;

template <>
struct nanobind::detail::type_caster<mx::Shape> : list_caster<mx::Shape, mx::ShapeElem> {};

namespace {

// The value of a scalar of a floating type, unless that would take an evaluation.
std::optional<double> known_value(const mx::array& a) {
  if (a.size() != 1 || a.is_tracer() || !a.is_available()) {
    return std::nullopt;
  }
  if (a.dtype() == mx::float64) {
    return *a.data<double>();
  }
  if (!is_supported(a.dtype())) {
    return std::nullopt;
  }
  float value;
  auto storage = static_cast<size_t>(storage_of(a.dtype()));
  cpu_loops().load[storage](a.data<void>(), nullptr, &value, 1);
  return value;
}

void bind_rules(nb::module_& m) {
  nb::class_<Rule>(m, "Rule", "An update rule with its hyperparameters.")
      .def(
          nb::init<const std::string&, const std::map<std::string, double>&>(),
          "name"_a,
          "values"_a)
      .def_prop_ro("num_states", &Rule::num_states, "How many state arrays a step updates.")
      .def(
          "has_sign", &Rule::has_sign, "k"_a, "Whether values of state number k may be below zero.")
      .def_prop_ro(
          "type",
          [](const Rule& rule) { return rule.traits().type; },
          "The name of its struct in csrc/rules.h.")
      .def_prop_ro(
          "groups",
          [](const Rule& rule) {
            std::vector<nb::bytes> groups;
            for (const ParameterGroup& group : rule.groups()) {
              groups.emplace_back(group.hyperparameters.data(), sizeof(Hyperparameters));
            }
            return groups;
          },
          "The hyperparameters of each group of parameters, as a kernel gets them.")
      .def(
          "with_group",
          [](const Rule& rule,
             const std::map<std::string, double>& values,
             RateSource source,
             float scale,
             const PlainSchedule* schedule) {
            return rule.with_group(values, source, scale, schedule ? schedule->data() : nullptr);
          },
          "values"_a,
          "source"_a,
          "scale"_a = 1.0f,
          "schedule"_a.none() = nb::none(),
          "The rule with one more group of parameters.");
}

void bind_storages(nb::module_& m) {
  nb::enum_<Rounding>(m, "Rounding", "How half-precision parameters are rounded.")
      .value("NEAREST", Rounding::nearest)
      .value("STOCHASTIC", Rounding::stochastic)
      .value("KEEP_8_BITS", Rounding::keep_8_bits)
      .value("KEEP_16_BITS", Rounding::keep_16_bits);
  m.def(
      "block_bytes",
      [] { return traits_of(code_storage(true)).block_bytes; },
      "Of a block of 8-bit codes with its scale.");
  m.def(
      "rest_bytes",
      [](Rounding rounding, mx::Dtype dtype) {
        return traits_of(parameter_storage(dtype, rounding)).rest_bytes;
      },
      "rounding"_a,
      "dtype"_a,
      "Of what lies beside a block of parameters; 0: nothing.");
  m.def(
      "load_codes",
      [](const mx::array& blocks, bool has_sign) {
        return load_blocks(code_storage(has_sign), {blocks});
      },
      "blocks"_a,
      "has_sign"_a,
      "Codes and scales as float32 of shape (blocks, 64).");
  m.def(
      "store_codes",
      [](const mx::array& values, bool has_sign) {
        return store_blocks(code_storage(has_sign), values)[0];
      },
      "values"_a,
      "has_sign"_a,
      "Codes and scales of float32 of shape (blocks, 64).");
  m.def(
      "load_split",
      [](const mx::array& parameters, const mx::array& rests, Rounding rounding) {
        return load_blocks(parameter_storage(parameters.dtype(), rounding), {parameters, rests});
      },
      "parameters"_a,
      "rests"_a,
      "rounding"_a,
      "Master weights as float32 of shape (blocks, 64).");
  m.def(
      "store_split",
      [](const mx::array& values, mx::Dtype dtype, Rounding rounding) {
        auto stored = store_blocks(parameter_storage(dtype, rounding), values);
        return std::pair(stored.at(0), stored.at(1));
      },
      "values"_a,
      "dtype"_a,
      "rounding"_a,
      "Parameters of this dtype, of shape (blocks, 64), and their rests.");
}

void bind_schedules(nb::module_& m) {
  nb::class_<PlainSchedule>(m, "PlainSchedule", "A schedule as data that a kernel evaluates.")
      .def_prop_ro(
          "fits_kernel",
          [](const PlainSchedule& s) { return s.data() != nullptr; },
          "False when a join has more pieces than a kernel takes.")
      .def(
          "__call__",
          [](const PlainSchedule& s, uint64_t step_count) {
            if (!s.data()) {
              throw std::invalid_argument("[PlainSchedule] too many pieces for a kernel.");
            }
            return schedule_value(*s.data(), step_count);
          },
          "step"_a,
          "The float32 learning rate at a step, as the kernels compute it.");
  m.def("linear_schedule", &PlainSchedule::linear, "init"_a, "end"_a, "steps"_a);
  m.def("cosine_decay", &PlainSchedule::cosine, "init"_a, "end"_a, "steps"_a);
  m.def("exponential_decay", &PlainSchedule::exponential, "init"_a, "decay_rate"_a, "step_size"_a);
  m.def("join_schedules", &PlainSchedule::join, "schedules"_a, "boundaries"_a);
}

void bind_layout(nb::module_& m) {
  nb::class_<Layout>(m, "Layout", "Where each leaf of a tree lies in flat memory.")
      .def(
          nb::init<
              const std::vector<std::string>&,
              const std::vector<mx::Shape>&,
              const std::vector<mx::Dtype>&,
              const std::vector<uint32_t>&,
              size_t>(),
          "paths"_a,
          "shapes"_a,
          "dtypes"_a,
          "kinds"_a,
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
}

void bind_cpu(nb::module_& m) {
  m.def(
      "reuse_counters",
      &reuse_counters,
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
  bind_storages(m);
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
  bind_steps(m);
  m.def(
      "views",
      &parts_of,
      "flat"_a,
      "specs"_a,
      "stream"_a = nb::none(),
      "Parts of a flat array, given as (shape, first element). They share its memory unless they "
      "would keep much of it that is not theirs.");
}
