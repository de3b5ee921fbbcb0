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

namespace {

// The bucket's array in a list of the state. Throws std::invalid_argument where it is too short, or
// not in blocks as it should be.
const mx::array& checked(
    const BucketPlan& plan, const std::vector<mx::array>& list, size_t block_bytes) {
  const mx::array& state = list.at(plan.bucket);
  const Segment& last = plan.segments.back();
  size_t end = last.state_offset + last.size;
  bool fits = state.size() >= end;
  if (block_bytes > 0) {
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
  return state;
}

}  // namespace

std::vector<mx::array> fused_update(std::shared_ptr<const BucketPlan> plan, StepInputs& in) {
  StateLists lists(in.rule, in.settings);
  std::vector<const mx::array*> arrays;
  for (size_t k = 0; k < in.rule.num_states(); ++k) {
    bool has_codes = in.state[k].at(plan->bucket).dtype() == mx::uint8;
    size_t block_bytes = has_codes ? traits_of(Storage::SignedCodes).block_bytes : 0;
    arrays.push_back(&checked(*plan, in.state[k], block_bytes));
  }
  Storage p_storage = parameter_storage(plan->dtype, in.settings.rounding);
  if (size_t bytes = traits_of(p_storage).rest_bytes) {
    arrays.push_back(&checked(*plan, in.state[lists.rests], bytes));
  }
  for (size_t list = lists.ema; list < lists.count; ++list) {
    arrays.push_back(&checked(*plan, in.state[list], 0));
  }
  std::vector<mx::Shape> shapes{plan->p_shape()};
  std::vector<mx::Dtype> dtypes{plan->dtype};
  if (in.settings.pass.is_accumulation) {
    shapes = {arrays.back()->shape()};
    dtypes = {arrays.back()->dtype()};
  } else {
    for (const mx::array* array : arrays) {
      shapes.push_back(array->shape());
      dtypes.push_back(array->dtype());
    }
  }
  auto node = std::make_shared<FusedUpdate>(std::move(plan), in, shapes);
  return mx::array::make_arrays(std::move(shapes), dtypes, node, node->operands().take_inputs());
}

FusedUpdate::FusedUpdate(
    std::shared_ptr<const BucketPlan> plan, StepInputs& in, std::vector<mx::Shape> shapes)
    : UpdatePrimitive(in.stream, std::move(shapes)),
      plan_(std::move(plan)),
      rule_(in.rule),
      is_accumulation_(in.settings.pass.is_accumulation != 0),
      p_storage_(parameter_storage(plan_->dtype, in.settings.rounding)),
      has_norm_(in.settings.pass.has_norm != 0),
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
    // Where parameters lie as the state does, only they are flat.
    if (is_available && !is_tracing() && !is_accumulation_) {
      Home home(*plan_, leaves.data(), /* must_have_all */ true);
      if (home.has_all()) {
        operands_.add(operand, home.flat());
        return home;
      }
    }
    operands_.add(operand, std::exchange(leaves, {}), is_available);
    return {};
  };
  StateLists lists(rule_, in.settings);
  auto add_state = [&](size_t list) {
    operands_.add(state_operand(num_state_arrays_), std::move(in.state[list][plan_->bucket]));
    return num_state_arrays_++;
  };
  if (!in.gradients.empty()) {
    // These first, since their list becomes that of the operands, with room for the others.
    std::vector<mx::array> gradients = take(in.gradients, kMaxStateArrays + 2);
    has_flat_gradients_ = add(Operand::gradients, gradients).has_value();
  }
  operands_.add(Operand::constants, *in.constants);
  if (is_accumulation_) {
    const mx::array& sum = in.state[lists.accumulated][plan_->bucket];
    p_storage_ = chance_storage(sum.dtype());
    operands_.add(Operand::parameters, std::move(in.state[lists.accumulated][plan_->bucket]));
    return;
  }
  leaves_ = take(in.parameters, 0);
  home_ = add(Operand::parameters, leaves_);
  for (size_t k = 0; k < num_states(); ++k) {
    add_state(k);
  }
  if (traits_of(p_storage_).rest_bytes > 0) {
    rests_ = add_state(lists.rests);
  }
  if (lists.ema < lists.accumulated) {
    ema_ = add_state(lists.ema);
  }
  if (lists.accumulated < lists.count) {
    accumulated_ = add_state(lists.accumulated);
  }
}

bool FusedUpdate::place_outputs(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const std::function<void()>& settle) {
  if (is_accumulation_) {
    return place_state(Operand::parameters, inputs, outputs, 0, settle);
  }
  bool in_place = place_parameters(inputs, outputs, settle);
  for (size_t k = 0; k < num_state_arrays(); ++k) {
    // Gradients may have been added just before, and read for their norm.
    bool is_queued = k == accumulated_;
    place_state(state_operand(k), inputs, outputs, 1 + k, is_queued ? settle : [] {});
  }
  return in_place;
}

bool FusedUpdate::place_state(
    Operand operand,
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    size_t output,
    const std::function<void()>& settle) {
  const mx::array& in = *operands_.get(operand, inputs);
  // Nobody but this update holds the array, and nothing but the array its memory.
  bool is_ours = is_whole(in) && descriptor_uses(in) == own_uses(operand, outputs);
  bool is_on_gpu = !holds_operands(stream().device);
  if (is_ours && memory_uses(in) > 1) {
    settle();
  }
  // What this evaluation has made or reads is held until it has run: waiting would be in vain.
  bool is_read = has_norm_ && accumulated_ && operand == state_operand(*accumulated_);
  bool may_wait = is_on_gpu && in.is_available() && !is_read;
  if (is_ours && (memory_uses(in) == 1 || (may_wait && is_let_go_soon(in)))) {
    share(in, outputs[output]);
    ++state_written.in_place;
    return true;
  }
  allocate(outputs[output]);
  ++state_written.fresh;
  return false;
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
