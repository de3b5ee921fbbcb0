// The primitive that counts a step and gives its learning rate.
//
// It stands apart from the update of the buckets, whose every output carries a copy of the list of
// all gradients: the fewer outputs there, the less there is to copy.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "schedule.h"
#include "transforms.h"

namespace flatstep {

namespace mx = mlx::core;

struct NextStep {
  mx::array step;
  std::optional<mx::array> learning_rate;  // only with a schedule
};

// `step` (a uint64 scalar, steps taken so far) plus one, and the schedule's value at `step`.
NextStep advance(
    const mx::array& step, std::shared_ptr<const Schedule> schedule, mx::StreamOrDevice s = {});

class Advance : public mx::Primitive {
 public:
  // Without a schedule there is no learning rate among the outputs.
  Advance(mx::Stream stream, std::shared_ptr<const Schedule> schedule)
      : mx::Primitive(stream), schedule_(std::move(schedule)) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  FLATSTEP_REFUSE_TRANSFORMS()

  const char* name() const override {
    return "FlatstepAdvance";
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override {
    return std::vector<mx::Shape>(schedule_ ? 2 : 1);
  }

  const std::shared_ptr<const Schedule>& schedule() const {
    return schedule_;
  }

 private:
  std::shared_ptr<const Schedule> schedule_;
};

}  // namespace flatstep
