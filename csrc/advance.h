// The primitive that counts a step, gives its learning rate and, on a GPU, its constants.
//
// It stands apart from the update of the buckets, whose every output carries a copy of the list of
// all gradients: the fewer outputs there, the less there is to copy.
#pragma once

#include <memory>
#include <vector>

#include "fused_update.h"
#include "update_primitive.h"

namespace flatstep {

class Advance : public UpdatePrimitive {
 public:
  // The inputs are the step, and where constants are made without a schedule the learning rate. The
  // outputs are the next step; with a schedule the learning rate, its value at `step`; and on a GPU
  // the constants of the updates.
  Advance(const StepInputs& in, std::vector<mx::Shape> shapes)
      : UpdatePrimitive(in.stream, std::move(shapes)),
        schedule_(in.schedule),
        rule_(in.rule),
        seed_(in.seed) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  DEFINE_NAME(FlatstepAdvance)

  const std::shared_ptr<const Schedule>& schedule() const {
    return schedule_;
  }
  const Rule& rule() const {
    return rule_;
  }
  uint32_t seed() const {
    return seed_;
  }

 private:
  std::shared_ptr<const Schedule> schedule_;
  Rule rule_;
  uint32_t seed_;
};

}  // namespace flatstep
