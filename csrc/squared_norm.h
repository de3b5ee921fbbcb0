// The primitive that reads all gradients once for their global norm: the sum of their squares.
#pragma once

#include <memory>
#include <vector>

#include "fused_update.h"
#include "operands.h"
#include "update_primitive.h"

namespace flatstep {

// Float32, of the gradients as they are scaled and clipped by value: of these plans' leaves, or of
// their sums in the state. In a step that accumulates only it is zero; where steps are skipped it
// is NaN if any gradient is not finite.
mx::array sum_of_squares(const BucketPlans& plans, const StepInputs& in);

// The 2-norm of all elements of some arrays, float32.
mx::array global_norm(const std::vector<mx::array>& arrays, mx::Stream stream);

class SquaredNorm : public UpdatePrimitive {
 public:
  // A part of one of the gradients' arrays, in elements.
  struct Part {
    size_t array;
    size_t first;
    size_t size;
  };

  SquaredNorm(
      const PassSettings& settings,
      std::vector<mx::array> arrays,
      std::vector<Part> parts,
      const std::optional<mx::array>& grad_scale,
      const std::optional<mx::array>& accumulated,
      mx::Stream stream);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  DEFINE_NAME(FlatstepSquaredNorm)

  Operands& operands() {
    return operands_;
  }
  const std::vector<Part>& parts() const {
    return parts_;
  }
  const PassSettings& settings() const {
    return settings_;
  }

 private:
  PassSettings settings_;
  Operands operands_;
  std::vector<Part> parts_;
};

}  // namespace flatstep
