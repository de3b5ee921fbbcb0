// The primitive that counts a step: it gives the learning rates, what a step leaves besides arrays
// of elements, and the constants that the updates of the buckets read.
//
// It stands apart from the update of the buckets, whose every output carries a copy of the list of
// all gradients: the fewer outputs there, the less there is to copy.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "fused_update.h"
#include "update_primitive.h"

namespace flatstep {

class Advance : public UpdatePrimitive {
 public:
  // An array, if it is there: its place in the list of inputs or outputs.
  using Places = std::array<std::optional<uint8_t>, NUM_STEP_SCALARS>;

  // The inputs are the scalars that there are, the outputs those that `written` has a place for,
  // then the constants.
  Advance(const StepInputs& in, const Places& written, std::vector<mx::Shape> shapes);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  DEFINE_NAME(FlatstepAdvance)

  const std::shared_ptr<const Schedule>& schedule() const {
    return schedule_;
  }
  const Rule& rule() const {
    return rule_;
  }
  const PassSettings& settings() const {
    return settings_;
  }
  // Where each is read and written.
  const Places& read() const {
    return read_;
  }
  const Places& written() const {
    return written_;
  }

 private:
  std::shared_ptr<const Schedule> schedule_;
  Rule rule_;
  PassSettings settings_;
  Places read_{};
  Places written_;
};

}  // namespace flatstep
