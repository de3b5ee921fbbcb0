// The primitive that updates one bucket: every parameter in it and their state, in one pass.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "hyperparameters.h"
#include "layout.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "transforms.h"

namespace flatstep {

// Inputs of a step of one bucket. Parameters and gradients are those of the whole step, in the
// order in which it was given its leaves, and may have any layout in memory; those of the bucket
// are moved from. `state` holds one flat array for each slot of the rule.
struct UpdateInputs {
  // uint64 scalar: steps taken so far. Left out of the graph when the update does not depend on it.
  mx::array step;
  std::optional<mx::array> learning_rate;  // float32 scalar; none when there is a schedule
  std::vector<mx::array> state;
  std::vector<mx::array>& parameters;
  std::vector<mx::array>& gradients;
};

struct UpdateOutputs {
  mx::array parameters;  // flat
  std::vector<mx::array> state;
};

// What an update reads, its operands, are in this order the step (if it is read), the learning rate
// (without a schedule), the state, the parameters (a leaf for each segment, or the flat array that
// they lie in), and the gradients.
//
// MLX's evaluator does some work for each input of a node, and copies their list for each output.
// So operands that are evaluated already need not be inputs: the primitive holds them.
using HeldArrays = std::shared_ptr<const std::vector<mx::array>>;

// Adds the update of a bucket to the graph. Throws std::invalid_argument.
UpdateOutputs fused_update(
    std::shared_ptr<const BucketPlan> plan,
    const Rule& rule,
    std::shared_ptr<const Schedule> schedule,
    UpdateInputs inputs,
    mx::StreamOrDevice s = {});

// True while a function is traced: what is evaluated then is read again at every replay.
bool is_tracing();

// What a step of the same plan leaves behind: a buffer, large enough to be written as a whole, in
// which parameters lie in their places. Some may lie elsewhere.
class Home {
 public:
  Home(const BucketPlan& plan, const mx::array* parameters);

  bool is_there() const {
    return count_ > 0;
  }
  // Whether the parameter of this segment lies in it.
  bool has(size_t i) const {
    const mx::array& p = parameters_[i];
    return p.data_shared_ptr().get() == memory_ && p.offset() == start_ + place(i) &&
           p.flags().row_contiguous && p.data_size() == p.size();
  }
  bool has_all() const {
    return is_there() && count_ == plan_.segments.size();
  }
  size_t count() const {
    return count_;
  }
  const std::shared_ptr<mx::array::Data>& memory() const {
    return parameters_[first_].data_shared_ptr();
  }
  // Gives a flat array this memory.
  void share(mx::array& flat) const;

 private:
  // Of this parameter in the flat array, in bytes.
  int64_t place(size_t i) const {
    return static_cast<int64_t>(plan_.segments[i].p_offset * itemsize_);
  }

  const BucketPlan& plan_;
  const mx::array* parameters_;
  size_t itemsize_;
  const mx::array::Data* memory_{nullptr};
  int64_t start_{0};  // of the flat array, in bytes
  size_t first_{0};   // of those in it
  size_t count_{0};
};

// How often a buffer was written in place, and how often into fresh memory, since the start.
struct ReuseCounters {
  uint64_t parameters_in_place;
  uint64_t parameters_fresh;
  uint64_t state_in_place;
  uint64_t state_fresh;
};
ReuseCounters reuse_counters();

class FusedUpdate : public mx::Primitive {
 public:
  FusedUpdate(
      mx::Stream stream,
      std::shared_ptr<const BucketPlan> plan,
      const Rule& rule,
      std::shared_ptr<const Schedule> schedule)
      : mx::Primitive(stream), plan_(std::move(plan)), rule_(rule), schedule_(std::move(schedule)) {
  }

  // Holds what may be held; the rest are the inputs. `own` are all operands before the parameters.
  std::vector<mx::array> connect(
      std::vector<mx::array> own,
      std::vector<mx::array> parameters,
      std::vector<mx::array> gradients);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  FLATSTEP_REFUSE_TRANSFORMS()

  const char* name() const override {
    return "FlatstepUpdate";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

  const std::shared_ptr<const BucketPlan>& plan_ptr() const {
    return plan_;
  }
  const Rule& rule() const {
    return rule_;
  }
  const std::shared_ptr<const Schedule>& schedule() const {
    return schedule_;
  }

  // Where each operand stands. The outputs are the flat parameters, then the state.
  size_t num_slots() const {
    return static_cast<size_t>(rule_.num_slots());
  }
  size_t num_segments() const {
    return plan_->segments.size();
  }
  // With a fixed rate and no bias correction nothing that is computed here depends on the step.
  bool reads_step() const {
    return schedule_ || rule_.values.bias_correction;
  }
  size_t learning_rate_operand() const {
    return reads_step() ? 1 : 0;
  }
  size_t first_state_operand() const {
    return learning_rate_operand() + (schedule_ ? 0 : 1);
  }
  size_t first_parameter_operand() const {
    return first_state_operand() + num_slots();
  }
  size_t first_gradient_operand() const {
    return first_parameter_operand() + (has_flat_parameters() ? 1 : num_segments());
  }

  // True when the parameters are one operand, the flat array.
  bool has_flat_parameters() const {
    return home_.has_value();
  }
  const mx::array& operand(const std::vector<mx::array>& inputs, size_t i) const {
    if (i < first_gradient_operand()) {
      return held_ ? (*held_)[i] : inputs[i];
    }
    i -= first_gradient_operand();
    if (held_gradients_) {
      return (*held_gradients_)[i];
    }
    return inputs[held_ ? i : first_gradient_operand() + i];
  }
  // What a backend that holds operands keeps until its work has run.
  std::pair<HeldArrays, HeldArrays> held() const {
    return {held_, held_gradients_};
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
      mx::array& out,
      long own_uses,
      const std::function<void()>& settle);

  std::shared_ptr<const BucketPlan> plan_;
  Rule rule_;
  std::shared_ptr<const Schedule> schedule_;
  // Of flat parameters: somebody may hold one of them.
  std::vector<mx::array> leaves_;
  std::optional<Home> home_;
  HeldArrays held_;            // all operands but the gradients, or null
  HeldArrays held_gradients_;  // all of them, or null
};

}  // namespace flatstep
