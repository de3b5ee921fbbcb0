#include "fused_update.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>

#include "allocate.h"
#include "array_uses.h"
#include "backend/backend.h"
#include "dtypes.h"
#include "mlx/utils.h"

namespace flatstep {

namespace {

struct AtomicCounters {
  std::atomic<uint64_t> parameters_in_place{0};
  std::atomic<uint64_t> parameters_fresh{0};
  std::atomic<uint64_t> state_in_place{0};
  std::atomic<uint64_t> state_fresh{0};
};

AtomicCounters& counters() {
  static AtomicCounters instance;
  return instance;
}

// Where a flat array may start in its memory, in bytes: a GPU's vector loads need it.
constexpr int64_t kAlignment = 16;

// True when nobody but this update, in `own_uses` places, holds the array, and nothing but the
// array its memory.
bool is_ours_alone(const mx::array& a, long own_uses) {
  return descriptor_uses(a) == own_uses && memory_uses(a) == 1 && a.data_shared_ptr()->is_owned() &&
         a.flags().row_contiguous && a.data_size() == a.size() && a.offset() % kAlignment == 0;
}

// Of parameters in one buffer: true when nobody else holds one of them, or the buffer. What is
// still queued holds what it reads, on a GPU until its command buffer has run; nothing else keeps
// an update in place behind the work that reads the old values.
bool are_ours_alone(const BucketPlan& plan, const mx::array* parameters, long own_uses) {
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    if (descriptor_uses(parameters[i]) != own_uses) {
      return false;
    }
  }
  return memory_uses(parameters[0]) == static_cast<long>(plan.segments.size());
}

void share_whole(const mx::array& source, mx::array& out) {
  mx::Strides strides = out.strides();
  out.copy_shared_buffer(source, strides, {true, true, out.size() <= 1}, out.size());
}

bool are_available(const std::vector<mx::array>& arrays) {
  return std::all_of(
      arrays.begin(), arrays.end(), [](const mx::array& a) { return a.is_available(); });
}

void require(bool ok, const char* message) {
  if (!ok) {
    throw std::invalid_argument(std::string("[fused_update] ") + message);
  }
}

void check(const BucketPlan& plan, const Rule& rule, bool has_schedule, const UpdateInputs& in) {
  require(!plan.segments.empty(), "there should be a parameter to update.");
  require(in.step.size() == 1 && in.step.dtype() == mx::uint64, "step should be a uint64 scalar.");
  require(
      has_schedule || (in.learning_rate && in.learning_rate->size() == 1 &&
                       in.learning_rate->dtype() == mx::float32),
      "learning_rate should be a float32 scalar.");
  require(
      in.state.size() == static_cast<size_t>(rule.num_slots()),
      "there should be a state array for each slot of the rule.");
  for (const Segment& segment : plan.segments) {
    require(
        segment.position < in.parameters.size() && segment.position < in.gradients.size(),
        "there should be a parameter and a gradient for each segment.");
    const mx::array& p = in.parameters[segment.position];
    const mx::array& g = in.gradients[segment.position];
    require(
        p.size() == segment.size && g.size() == segment.size,
        "a parameter or gradient does not have the size of its segment.");
    require(p.dtype() == plan.dtype, "a parameter has another dtype than its bucket.");
    require(is_supported(g.dtype()), "a gradient should be float32, float16 or bfloat16.");
  }
  for (const auto& state : in.state) {
    require(is_supported(state.dtype()), "state should be float32, float16 or bfloat16.");
    require(
        state.size() >= plan.segments.back().state_offset + plan.segments.back().size,
        "a state array is too small.");
  }
}

}  // namespace

bool is_tracing() {
  // MLX tells it only of an array that is marked as a tracer.
  static const mx::array* probe = [] {
    auto* a = new mx::array(0.0f);
    a->set_tracer(true);
    return a;
  }();
  return probe->is_tracer();
}

bool lie_in_one_buffer(const BucketPlan& plan, const mx::array* parameters) {
  const mx::array& first = parameters[0];
  const auto& memory = first.data_shared_ptr();
  size_t itemsize = first.itemsize();
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const mx::array& p = parameters[i];
    auto expected = first.offset() + static_cast<int64_t>(plan.segments[i].p_offset * itemsize);
    if (p.data_shared_ptr() != memory || p.offset() != expected || !p.flags().row_contiguous ||
        p.data_size() != p.size()) {
      return false;
    }
  }
  size_t needed = static_cast<size_t>(first.offset()) + plan.p_blocks * kBlock * itemsize;
  return memory->is_owned() && first.offset() % kAlignment == 0 && first.buffer_size() >= needed;
}

ReuseCounters reuse_counters() {
  auto& c = counters();
  return {c.parameters_in_place, c.parameters_fresh, c.state_in_place, c.state_fresh};
}

UpdateOutputs fused_update(
    std::shared_ptr<const BucketPlan> plan,
    const Rule& rule,
    std::shared_ptr<const Schedule> schedule,
    UpdateInputs in,
    mx::StreamOrDevice s) {
  check(*plan, rule, schedule != nullptr, in);
  auto stream = mx::to_stream(s);
  require_backend(stream.device);

  auto node = std::make_shared<FusedUpdate>(stream, plan, rule, schedule);
  std::vector<mx::array> own;
  own.reserve(node->first_gradient_operand());
  if (node->reads_step()) {
    own.push_back(std::move(in.step));
  }
  if (!schedule) {
    own.push_back(std::move(*in.learning_rate));
  }
  std::vector<mx::Shape> shapes{plan->p_shape()};
  std::vector<mx::Dtype> dtypes{plan->dtype};
  for (auto& state : in.state) {
    shapes.push_back(state.shape());
    dtypes.push_back(state.dtype());
    own.push_back(std::move(state));
  }
  std::vector<mx::array> gradients;
  gradients.reserve(node->num_segments());
  for (const Segment& segment : plan->segments) {
    own.push_back(std::move(in.parameters[segment.position]));
    gradients.push_back(std::move(in.gradients[segment.position]));
  }
  auto inputs = node->connect(std::move(own), std::move(gradients));
  auto outputs = mx::array::make_arrays(std::move(shapes), dtypes, node, inputs);
  UpdateOutputs result{std::move(outputs[0]), {}};
  std::move(outputs.begin() + 1, outputs.end(), std::back_inserter(result.state));
  return result;
}

std::vector<mx::array> FusedUpdate::connect(
    std::vector<mx::array> own, std::vector<mx::array> gradients) {
  if (!is_tracing()) {
    bool holds = holds_operands(stream().device);
    if (are_available(own)) {
      const mx::array* leaves = &own[first_parameter_operand()];
      if (lie_in_one_buffer(*plan_, leaves)) {
        mx::array flat(plan_->p_shape(), plan_->dtype, nullptr, {});
        share_whole(*leaves, flat);
        flat.set_status(mx::array::Status::available);
        own.erase(own.begin() + static_cast<long>(first_parameter_operand()), own.end());
        own.push_back(std::move(flat));
        has_flat_parameters_ = true;
      }
      if (holds) {
        held_ = std::make_shared<const std::vector<mx::array>>(std::exchange(own, {}));
      }
    }
    if (holds && are_available(gradients)) {
      held_gradients_ =
          std::make_shared<const std::vector<mx::array>>(std::exchange(gradients, {}));
    }
  }
  std::vector<mx::array> inputs = std::move(own);
  inputs.insert(
      inputs.end(),
      std::make_move_iterator(gradients.begin()),
      std::make_move_iterator(gradients.end()));
  return inputs;
}

void FusedUpdate::place_outputs(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<void()>& settle) const {
  // How many hold an operand that nobody else does: this, or each output's list of inputs.
  long own_uses = held_ ? 1 : static_cast<long>(outputs.size());
  const mx::array* parameters = &operand(inputs, first_parameter_operand());
  bool in_place = has_flat_parameters_ || lie_in_one_buffer(*plan_, parameters);
  auto are_alone = [&] {
    return has_flat_parameters_ ? is_ours_alone(*parameters, own_uses)
                                : are_ours_alone(*plan_, parameters, own_uses);
  };
  if (in_place && !are_alone()) {
    settle();
    in_place = are_alone();
  }
  if (in_place) {
    share_whole(*parameters, outputs[0]);
    ++counters().parameters_in_place;
  } else {
    allocate(outputs[0]);
    ++counters().parameters_fresh;
  }
  for (size_t k = 0; k < num_slots(); ++k) {
    const mx::array& in = operand(inputs, first_state_operand() + k);
    mx::array& out = outputs[1 + k];
    if (is_ours_alone(in, own_uses)) {
      share_whole(in, out);
      ++counters().state_in_place;
    } else {
      allocate(out);
      ++counters().state_fresh;
    }
  }
}

std::vector<mx::Shape> FusedUpdate::output_shapes(const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes{plan_->p_shape()};
  for (size_t k = 0; k < num_slots(); ++k) {
    shapes.push_back(operand(inputs, first_state_operand() + k).shape());
  }
  return shapes;
}

}  // namespace flatstep
