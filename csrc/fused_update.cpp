#include "fused_update.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "allocate.h"
#include "array_uses.h"
#include "backend/backend.h"

namespace flatstep {

namespace {

struct Counter {
  std::atomic<uint64_t> in_place{0};
  std::atomic<uint64_t> fresh{0};
};
Counter parameters_written;
Counter state_written;

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

// A GPU's work lets go of memory a little after MLX says that it has run. Waits for that, for a
// millisecond at most, and not again soon where it was in vain: then it is somebody else.
bool is_let_go_soon(const mx::array& a) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kPatience = std::chrono::milliseconds(1);
  constexpr auto kPause = std::chrono::milliseconds(100);
  static std::atomic<Clock::duration> not_before{Clock::duration::min()};
  auto start = Clock::now();
  if (start.time_since_epoch() < not_before.load()) {
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

// Gives a flat array the memory of another, from `offset` elements before or after its start.
void share(const mx::array& source, mx::array& flat, int64_t offset = 0) {
  flat.copy_shared_buffer(
      source, flat.strides(), {true, true, flat.size() <= 1}, flat.size(), offset);
}

}  // namespace

Home::Home(const BucketPlan& plan, const mx::array* leaves, bool must_have_all)
    : plan_(&plan), leaves_(leaves) {
  size_t n = plan.segments.size();
  for (size_t i = 0; i < n; ++i) {
    const mx::array& leaf = leaves[i];
    if (leaf.size() == 0 || leaf.data_shared_ptr().get() == memory_) {
      continue;
    }
    if (is_whole(leaf)) {
      memory_ = leaf.data_shared_ptr().get();
      start_ = leaf.offset() - place(i);
      size_t bytes = plan.p_blocks * kBlock * leaf.itemsize();
      size_t end = static_cast<size_t>(start_) + bytes;
      if (start_ >= 0 && start_ % kAlignment == 0 && leaf.buffer_size() >= end &&
          leaf.buffer_size() <= end + std::max(bytes / 2, kSlack)) {
        first_ = i;
        for (size_t k = 0; k < n; ++k) {
          count_ += has(k);
        }
      }
    }
    if (count_ > 0 || must_have_all) {
      return;
    }
  }
}

mx::array Home::flat() const {
  mx::array result(plan_->p_shape(), leaves_[0].dtype(), nullptr, {});
  share(leaves_[first_], result, -static_cast<int64_t>(plan_->segments[first_].p_offset));
  result.set_status(mx::array::Status::available);
  return result;
}

std::map<std::string, uint64_t> reuse_counters() {
  return {
      {"parameters_in_place", parameters_written.in_place},
      {"parameters_fresh", parameters_written.fresh},
      {"state_in_place", state_written.in_place},
      {"state_fresh", state_written.fresh}};
}

std::vector<mx::array> fused_update(std::shared_ptr<const BucketPlan> plan, StepInputs& in) {
  std::vector<mx::Shape> shapes{plan->p_shape()};
  std::vector<mx::Dtype> dtypes{plan->dtype};
  const Segment& last = plan->segments.back();
  size_t end = last.state_offset + last.size;
  size_t rest_bytes = traits_of(parameter_storage(plan->dtype, in.rounding)).rest_bytes;
  for (size_t k = 0; k < in.rule.num_states() + (rest_bytes > 0); ++k) {
    const mx::array& state = in.state[k].at(plan->bucket);
    bool is_rest = k == in.rule.num_states();
    bool fits = state.size() >= end;
    if (is_rest || state.dtype() == mx::uint8) {
      size_t block_bytes = is_rest ? rest_bytes : traits_of(Storage::SignedCodes).block_bytes;
      size_t blocks = (end + kBlock - 1) / kBlock;
      fits = state.dtype() == mx::uint8 && state.ndim() == 2 &&
             static_cast<size_t>(state.shape(1)) == block_bytes &&
             static_cast<size_t>(state.shape(0)) >= blocks;
    } else {
      storage_of(state.dtype());
    }
    if (!fits) {
      throw std::invalid_argument(
          "[step] a state array has too few elements, or is not in blocks as it should be.");
    }
    shapes.push_back(state.shape());
    dtypes.push_back(state.dtype());
  }
  auto node = std::make_shared<FusedUpdate>(std::move(plan), in, shapes);
  return mx::array::make_arrays(std::move(shapes), dtypes, node, node->operands().take_inputs());
}

FusedUpdate::FusedUpdate(
    std::shared_ptr<const BucketPlan> plan, StepInputs& in, std::vector<mx::Shape> shapes)
    : UpdatePrimitive(in.stream, std::move(shapes)),
      plan_(std::move(plan)),
      rule_(in.rule),
      schedule_(in.schedule),
      p_storage_(parameter_storage(plan_->dtype, in.rounding)),
      seed_(in.seed),
      operands_(holds_operands(in.stream.device) && !is_tracing()) {
  auto take = [this](std::vector<mx::array>& given, size_t room) {
    std::vector<mx::array> leaves;
    leaves.reserve(num_segments() + room);
    for (const Segment& segment : plan_->segments) {
      leaves.push_back(std::move(given[segment.position]));
    }
    return leaves;
  };
  // Adds leaves, as the one flat array in which they lie if they do.
  auto add = [this](Operand operand, std::vector<mx::array>& leaves) -> std::optional<Home> {
    bool is_available = std::all_of(
        leaves.begin(), leaves.end(), [](const mx::array& leaf) { return leaf.is_available(); });
    if (is_available && !is_tracing()) {
      Home home(*plan_, leaves.data(), /* must_have_all */ true);
      if (home.has_all()) {
        operands_.add(operand, home.flat());
        return home;
      }
    }
    operands_.add(operand, std::exchange(leaves, {}), is_available);
    return {};
  };
  // These first, since their list becomes that of the operands, with room for the others.
  std::vector<mx::array> gradients = take(in.gradients, num_state_arrays() + 3);
  has_flat_gradients_ = add(Operand::gradients, gradients).has_value();
  leaves_ = take(in.parameters, 0);
  home_ = add(Operand::parameters, leaves_);
  for (size_t k = 0; k < num_state_arrays(); ++k) {
    operands_.add(state_operand(k), std::move(in.state[k][plan_->bucket]));
  }
  if (in.constants) {
    operands_.add(Operand::constants, *in.constants);
    return;
  }
  if (in.reads_step) {
    operands_.add(Operand::step, in.step);
  }
  if (!schedule_) {
    operands_.add(Operand::learning_rate, *in.learning_rate);
  }
}

bool FusedUpdate::place_outputs(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<void()>& settle) {
  bool in_place = place_parameters(inputs, outputs, settle);
  bool is_on_gpu = !holds_operands(stream().device);
  for (size_t k = 0; k < num_state_arrays(); ++k) {
    const mx::array& in = *operands_.get(state_operand(k), inputs);
    mx::array& out = outputs[1 + k];
    long uses = own_uses(state_operand(k), outputs);
    // Nobody but this update holds the array, and nothing but the array its memory.
    if (is_whole(in) && descriptor_uses(in) == uses &&
        (memory_uses(in) == 1 || (is_on_gpu && is_let_go_soon(in)))) {
      share(in, out);
      ++state_written.in_place;
    } else {
      allocate(out);
      ++state_written.fresh;
    }
  }
  return in_place;
}

bool FusedUpdate::place_parameters(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<void()>& settle) {
  plan_->kept->review();
  const mx::array* first = operands_.get(Operand::parameters, inputs);
  const mx::array* leaves = home_ ? leaves_.data() : first;
  long leaf_uses = home_ ? 1 : own_uses(Operand::parameters, outputs);
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
  if (home.count() > 0 && !is_alone()) {
    settle();
  }
  if (home.count() > 0 && is_alone()) {
    share(home.flat(), outputs[0]);
    ++parameters_written.in_place;
    return true;
  }
  allocate(outputs[0]);
  ++parameters_written.fresh;
  if (home.count() > 0) {
    // On a GPU the work that reads the parameters holds their memory at every step.
    if (auto leaves_held = held(); !leaves_held.empty() || holds_operands(stream().device)) {
      plan_->kept->suspect(home.memory(), leaves_held, plan_->p_blocks);
    } else {
      plan_->kept->watch(home.memory(), plan_->p_blocks);
    }
  }
  return false;
}

}  // namespace flatstep
