#include "fused_update.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <iterator>
#include <stdexcept>
#include <thread>

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

// What a buffer may be too large for a bucket, or half of it: MLX's caches hand out larger ones,
// but a leaf is not to keep a large buffer of the user's for ever.
constexpr size_t kSlack = size_t(1) << 15;

// True for an array that is all of the memory that MLX has given it.
bool is_whole(const mx::array& a) {
  return a.data_shared_ptr()->is_owned() && a.flags().row_contiguous && a.data_size() == a.size() &&
         a.offset() % kAlignment == 0;
}

// True when nobody but this update, in `own_uses` places, holds the array, and nothing but the
// array its memory.
bool is_ours_alone(const mx::array& a, long own_uses) {
  return descriptor_uses(a) == own_uses && memory_uses(a) == 1;
}

// A GPU's work lets go of memory a little after MLX says that it has run. Waits for that, for a
// millisecond at most, and not again soon where it was in vain: then it is somebody else.
bool is_let_go_soon(const mx::array& a, long own_uses) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kPatience = std::chrono::milliseconds(1);
  constexpr auto kPause = std::chrono::milliseconds(100);
  static std::atomic<Clock::duration> not_before{Clock::duration::min()};
  auto start = Clock::now();
  if (descriptor_uses(a) != own_uses || start.time_since_epoch() < not_before.load()) {
    return false;
  }
  while (memory_uses(a) > 1) {
    if (Clock::now() - start > kPatience) {
      not_before = (Clock::now() + kPause).time_since_epoch();
      return false;
    }
    std::this_thread::yield();
  }
  return true;
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

Home::Home(const BucketPlan& plan, const mx::array* parameters)
    : plan_(plan), parameters_(parameters), itemsize_(mx::size_of(plan.dtype)) {
  size_t n = plan.segments.size();
  for (size_t i = 0; i < n && count_ == 0; ++i) {
    const mx::array& p = parameters[i];
    if (p.size() == 0 || p.data_shared_ptr().get() == memory_ || !is_whole(p)) {
      continue;
    }
    memory_ = p.data_shared_ptr().get();
    start_ = p.offset() - place(i);
    size_t bytes = plan.p_blocks * kBlock * itemsize_;
    size_t end = static_cast<size_t>(start_) + bytes;
    if (start_ >= 0 && start_ % kAlignment == 0 && p.buffer_size() >= end &&
        p.buffer_size() <= end + std::max(bytes / 2, kSlack)) {
      first_ = i;
      for (size_t k = 0; k < n; ++k) {
        count_ += has(k);
      }
    }
  }
}

void Home::share(mx::array& flat) const {
  auto before = -static_cast<int64_t>(plan_.segments[first_].p_offset);
  flat.copy_shared_buffer(
      parameters_[first_], flat.strides(), {true, true, flat.size() <= 1}, flat.size(), before);
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
  std::vector<mx::array> parameters;
  std::vector<mx::array> gradients;
  parameters.reserve(node->num_segments());
  gradients.reserve(node->num_segments());
  for (const Segment& segment : plan->segments) {
    parameters.push_back(std::move(in.parameters[segment.position]));
    gradients.push_back(std::move(in.gradients[segment.position]));
  }
  auto inputs = node->connect(std::move(own), std::move(parameters), std::move(gradients));
  auto outputs = mx::array::make_arrays(std::move(shapes), dtypes, node, inputs);
  UpdateOutputs result{std::move(outputs[0]), {}};
  std::move(outputs.begin() + 1, outputs.end(), std::back_inserter(result.state));
  return result;
}

std::vector<mx::array> FusedUpdate::connect(
    std::vector<mx::array> own,
    std::vector<mx::array> parameters,
    std::vector<mx::array> gradients) {
  auto append = [](std::vector<mx::array>& to, std::vector<mx::array>& from) {
    to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
  };
  bool is_live = !is_tracing();
  bool holds = is_live && holds_operands(stream().device);
  bool is_available = is_live && are_available(own) && are_available(parameters);
  if (is_available) {
    Home home(*plan_, parameters.data());
    if (home.has_all()) {
      own.push_back(mx::array(plan_->p_shape(), plan_->dtype, nullptr, {}));
      mx::array& flat = own.back();
      home.share(flat);
      flat.set_status(mx::array::Status::available);
      leaves_ = std::move(parameters);
      home_.emplace(*plan_, leaves_.data());
    }
  }
  if (!home_) {
    append(own, parameters);
  }
  if (is_available && holds) {
    held_ = std::make_shared<const std::vector<mx::array>>(std::exchange(own, {}));
  }
  if (holds && are_available(gradients)) {
    held_gradients_ = std::make_shared<const std::vector<mx::array>>(std::exchange(gradients, {}));
  }
  append(own, gradients);
  return own;
}

bool FusedUpdate::place_outputs(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<void()>& settle) {
  // How many hold an operand that nobody else does: this, or each output's list of inputs.
  long own_uses = held_ ? 1 : static_cast<long>(outputs.size());
  bool in_place = place_parameters(inputs, outputs[0], own_uses, settle);
  for (size_t k = 0; k < num_slots(); ++k) {
    const mx::array& in = operand(inputs, first_state_operand() + k);
    mx::array& out = outputs[1 + k];
    bool is_on_gpu = !holds_operands(stream().device);
    if (is_whole(in) &&
        (is_ours_alone(in, own_uses) || (is_on_gpu && is_let_go_soon(in, own_uses)))) {
      share_whole(in, out);
      ++counters().state_in_place;
    } else {
      allocate(out);
      ++counters().state_fresh;
    }
  }
  return in_place;
}

bool FusedUpdate::place_parameters(
    const std::vector<mx::array>& inputs,
    mx::array& out,
    long own_uses,
    const std::function<void()>& settle) {
  plan_->kept->review();
  const mx::array* first = &operand(inputs, first_parameter_operand());
  const mx::array* leaves = home_ ? leaves_.data() : first;
  long leaf_uses = home_ ? 1 : own_uses;
  Home home = home_ ? *home_ : Home(*plan_, first);
  auto held = [&] {
    std::vector<size_t> result;
    for (size_t i = 0; i < num_segments(); ++i) {
      if (descriptor_uses(leaves[i]) != leaf_uses && home.has(i)) {
        result.push_back(plan_->segments[i].leaf);
      }
    }
    return result;
  };
  // What is still queued holds what it reads, on a GPU until its command buffer has run; nothing
  // else keeps an update in place behind the work that reads the old values.
  auto is_alone = [&] {
    auto uses = static_cast<long>(home.count()) + has_flat_parameters();
    return home.memory().use_count() == uses && held().empty();
  };
  if (home.is_there() && !is_alone()) {
    settle();
  }
  if (home.is_there() && is_alone()) {
    home.share(out);
    ++counters().parameters_in_place;
    return true;
  }
  allocate(out);
  ++counters().parameters_fresh;
  if (home.is_there()) {
    // On a GPU the work that reads the parameters holds their memory at every step.
    if (auto leaves_held = held(); !leaves_held.empty() || holds_operands(stream().device)) {
      plan_->kept->suspect(home.memory(), leaves_held, plan_->p_blocks);
    } else {
      plan_->kept->watch(home.memory(), plan_->p_blocks);
    }
  }
  return false;
}

std::vector<mx::Shape> FusedUpdate::output_shapes(const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes{plan_->p_shape()};
  for (size_t k = 0; k < num_slots(); ++k) {
    shapes.push_back(operand(inputs, first_state_operand() + k).shape());
  }
  return shapes;
}

}  // namespace flatstep
