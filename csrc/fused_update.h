// The primitive that updates one bucket: every parameter in it and their state, in one pass.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "layout.h"
#include "mlx/distributed/distributed.h"
#include "operands.h"
#include "plain_schedule.h"
#include "update_primitive.h"

namespace flatstep {

// What a user sets for a step besides the rule.
struct StepSettings {
  PassSettings pass{};
  Rounding rounding{Rounding::nearest};  // of half-precision parameters
  bool has_ema{false};
};

// How many lists of state arrays a step has, and where among them those are that lie beside the
// rule's.
struct StateLists {
  StateLists(const Rule& rule, const StepSettings& settings)
      : rests(rule.num_states()),
        ema(rests + (settings.rounding >= Rounding::keep_8_bits)),
        accumulated(ema + settings.has_ema),
        count(accumulated + (settings.pass.accumulate_steps > 0)) {
  }

  size_t rests;
  size_t ema;
  size_t accumulated;
  size_t count;
};

// What a step is given besides its layout. Parameters and gradients are in the order in which the
// leaves were given, and may have any layout in memory; those of a bucket are moved from when it is
// updated, and so is its state.
struct StepInputs {
  Rule rule;
  std::shared_ptr<const Schedule> schedule;  // or null, and there is a learning rate
  StepSettings settings;
  std::array<std::optional<mx::array>, NUM_STEP_SCALARS> scalars;
  std::vector<mx::array> parameters;
  std::vector<mx::array> gradients;           // none where their sum is in the state
  std::vector<std::vector<mx::array>> state;  // by list, then bucket
  mx::Stream stream;
  Groups groups{};
  std::optional<mx::distributed::Group> norm_group{};  // over which gradients are sharded
  std::optional<mx::array> constants{};                // from Advance
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
  // then the state. To accumulate, gradients are added to the sum of gradients, which takes the
  // parameters' place.
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
  Operands& operands() {
    return operands_;
  }
  size_t num_states() const {
    return rule_.num_states();
  }
  // The rule's, then those of these that there are.
  size_t num_state_arrays() const {
    return num_state_arrays_;
  }
  const std::optional<size_t>& rests() const {
    return rests_;
  }
  const std::optional<size_t>& ema() const {
    return ema_;
  }
  const std::optional<size_t>& accumulated() const {
    return accumulated_;
  }
  Storage p_storage() const {
    return p_storage_;
  }
  // Of the rule's state number k.
  Storage state_storage(size_t k, const mx::array& state) const {
    return state.dtype() == mx::uint8 ? code_storage(rule_.has_sign(k)) : storage_of(state.dtype());
  }
  size_t num_segments() const {
    return plan_->segments.size();
  }
  // Whether the parameters, or the gradients, are one flat array.
  bool has_flat_parameters() const {
    return home_.has_value() || is_accumulation_;
  }
  bool is_accumulation() const {
    return is_accumulation_;
  }
  bool has_flat_gradients() const {
    return has_flat_gradients_;
  }

  // Gives each output its memory: that of the input it replaces where nobody else holds that,
  // fresh memory otherwise. `settle` is called where queued work may be what stands in the way of
  // writing parameters, or the sum of gradients, in place. Returns whether parameters are.
  bool place_outputs(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      const std::function<void()>& settle);

 private:
  // Whether an array of the state is written in place.
  bool place_state(
      Operand operand,
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      size_t output,
      const std::function<void()>& settle);
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
  bool is_accumulation_;
  Storage p_storage_;
  size_t num_state_arrays_{0};
  std::optional<size_t> rests_, ema_, accumulated_;
  bool has_norm_;  // of what is accumulated, which work that is queued still reads
  Operands operands_;
  // Of flat parameters: somebody may hold one of them.
  std::vector<mx::array> leaves_;
  std::optional<Home> home_;
  bool has_flat_gradients_{false};
};

}  // namespace flatstep
