// What all primitives of flatstep have in common: outputs of given shapes, and no function
// transformation.
#pragma once

#include <stdexcept>
#include <utility>
#include <vector>

#include "mlx/primitives.h"

namespace flatstep {

namespace mx = mlx::core;

// True while a function is traced: what is evaluated then is read again at every replay.
inline bool is_tracing() {
  // MLX tells it only of an array that is marked as a tracer.
  static const mx::array* probe = [] {
    auto* a = new mx::array(0.0f);
    a->set_tracer(true);
    return a;
  }();
  return probe->is_tracer();
}

class UpdatePrimitive : public mx::Primitive {
 public:
  UpdatePrimitive(mx::Stream stream, std::vector<mx::Shape> shapes)
      : mx::Primitive(stream), shapes_(std::move(shapes)) {
  }

  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override {
    return shapes_;
  }

  std::vector<mx::array> jvp(
      const std::vector<mx::array>&,
      const std::vector<mx::array>&,
      const std::vector<int>&) override {
    throw std::invalid_argument(
        "[flatstep] mx.jvp through an optimizer update is not supported: take the derivative of "
        "the loss alone and pass the gradients to the optimizer.");
  }

  std::vector<mx::array> vjp(
      const std::vector<mx::array>&,
      const std::vector<mx::array>&,
      const std::vector<int>&,
      const std::vector<mx::array>&) override {
    throw std::invalid_argument(
        "[flatstep] mx.grad through an optimizer update is not supported: take the gradient of "
        "the loss alone; to differentiate through the update itself use the same class of "
        "mlx.optimizers.");
  }

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>&, const std::vector<int>&) override {
    throw std::invalid_argument(
        "[flatstep] mx.vmap through an optimizer update is not supported: stack the parameters "
        "along a new axis and update the stacked arrays in one call, or use the same class of "
        "mlx.optimizers.");
  }

 private:
  std::vector<mx::Shape> shapes_;
};

}  // namespace flatstep
