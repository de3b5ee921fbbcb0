// The primitive that updates one bucket: every parameter in it and their state, in one pass.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "layout.h"
#include "operands.h"
#include "plain_schedule.h"
#include "update_primitive.h"

namespace flatstep {

// What a step is given besides its layout. Parameters and gradients are in the order in which the
// leaves were given, and may have any layout in memory; those of a bucket are moved from when it is
// updated, and so is its state.
struct StepInputs {
  Rule rule;
  std::shared_ptr<const Schedule> schedule;  // or null, and
  std::optional<mx::array> learning_rate;    // a float32 scalar
  mx::array step;                            // a uint64 scalar: steps taken so far
  std::vector<mx::array> parameters;
  std::vector<mx::array> gradients;
  std::vector<std::vector<mx::array>> state;  // by number, then bucket
  mx::Stream stream;
  Rounding rounding{Rounding::nearest};  // of half-precision parameters
  uint32_t seed{0};                      // of what is rounded by chance
  std::optional<mx::array> constants{};  // on a GPU, from Advance
  bool reads_step{true};                 // what this step does depends on which it is

  // How many lists of state arrays there are: what is kept of parameters follows the rule's.
  size_t num_lists() const {
    return rule.num_states() + (rounding >= Rounding::keep_8_bits);
  }
};

// Adds the update of a bucket to the graph: the flat parameters, then the state. Throws
// std::invalid_argument.
std::vector<mx::array> fused_update(std::shared_ptr<const BucketPlan> plan, StepInputs& inputs);

// Where the leaves of a plan lie in one buffer, each in its place and large enough to be written as
// a whole, as a step of the plan leaves its parameters. Some may lie elsewhere.
class Home {
 public:
  // Looks no further than the first leaf where it is to have all.
  Home(const BucketPlan& plan, const mx::array* leaves, bool must_have_all = false);

  // Whether the leaf of this segment lies in it.
  bool has(size_t i) const {
    const mx::array& leaf = leaves_[i];
    return leaf.data_shared_ptr().get() == memory_ && leaf.offset() == start_ + place(i) &&
           leaf.flags().row_contiguous && leaf.data_size() == leaf.size() &&
           leaf.dtype() == leaves_[0].dtype();
  }
  bool has_all() const {
    return count_ == plan_->segments.size();
  }
  // How many do. 0: there is no such buffer.
  size_t count() const {
    return count_;
  }
  const std::shared_ptr<mx::array::Data>& memory() const {
    return leaves_[first_].data_shared_ptr();
  }
  // A flat array over its memory.
  mx::array flat() const;

 private:
  // Of this leaf in the flat array, in bytes.
  int64_t place(size_t i) const {
    return static_cast<int64_t>(plan_->segments[i].p_offset * leaves_[0].itemsize());
  }

  const BucketPlan* plan_;
  const mx::array* leaves_;
  const mx::array::Data* memory_{nullptr};
  int64_t start_{0};  // of the flat array, in bytes
  size_t first_{0};   // of those in it
  size_t count_{0};
};

// How often a buffer was written in place, and how often into fresh memory, since the start.
std::map<std::string, uint64_t> reuse_counters();

class FusedUpdate : public UpdatePrimitive {
 public:
  // Takes what it needs from the inputs. The outputs, of these shapes, are the flat parameters,
  // then the state.
  FusedUpdate(
      std::shared_ptr<const BucketPlan> plan, StepInputs& inputs, std::vector<mx::Shape> shapes);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  DEFINE_NAME(FlatstepUpdate)

  const std::shared_ptr<const BucketPlan>& plan_ptr() const {
    return plan_;
  }
  const Rule& rule() const {
    return rule_;
  }
  const std::shared_ptr<const Schedule>& schedule() const {
    return schedule_;
  }
  Operands& operands() {
    return operands_;
  }
  size_t num_states() const {
    return rule_.num_states();
  }
  // With what lies beside the parameters.
  size_t num_state_arrays() const {
    return num_states() + (traits_of(p_storage_).rest_bytes > 0);
  }
  Storage p_storage() const {
    return p_storage_;
  }
  // Of the rule's state number k.
  Storage state_storage(size_t k, const mx::array& state) const {
    return state.dtype() == mx::uint8 ? code_storage(rule_.has_sign(k)) : storage_of(state.dtype());
  }
  uint32_t seed() const {
    return seed_;
  }
  size_t num_segments() const {
    return plan_->segments.size();
  }
  // Whether the parameters, or the gradients, are one flat array.
  bool has_flat_parameters() const {
    return home_.has_value();
  }
  bool has_flat_gradients() const {
    return has_flat_gradients_;
  }

  // Gives each output its memory: that of the input it replaces where nobody else holds that,
  // fresh memory otherwise. `settle` is called once where queued work may be what stands in the
  // way of writing parameters in place. Returns whether they are.
  bool place_outputs(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const std::function<void()>& settle);

 private:
  bool place_parameters(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const std::function<void()>& settle);
  // How many hold an operand that nobody else does: this, or each output's list of inputs.
  long own_uses(Operand operand, const std::vector<mx::array>& outputs) const {
    return operands_.holds(operand) ? 1 : static_cast<long>(outputs.size());
  }

  std::shared_ptr<const BucketPlan> plan_;
  Rule rule_;
  std::shared_ptr<const Schedule> schedule_;
  Storage p_storage_;
  uint32_t seed_;
  Operands operands_;
  // Of flat parameters: somebody may hold one of them.
  std::vector<mx::array> leaves_;
  std::optional<Home> home_;
  bool has_flat_gradients_{false};
};

}  // namespace flatstep
