// What a function transformation through an optimizer update says: one text for all primitives.
#pragma once

#include <stdexcept>
#include <string>

namespace flatstep {

[[noreturn]] inline void refuse_jvp() {
  throw std::invalid_argument(
      "[flatstep] mx.jvp through an optimizer update is not supported: take the derivative of the "
      "loss alone and pass the gradients to the optimizer.");
}

[[noreturn]] inline void refuse_vjp() {
  throw std::invalid_argument(
      "[flatstep] mx.grad through an optimizer update is not supported: take the gradient of the "
      "loss alone; to differentiate through the update itself use the same class of "
      "mlx.optimizers.");
}

[[noreturn]] inline void refuse_vmap() {
  throw std::invalid_argument(
      "[flatstep] mx.vmap through an optimizer update is not supported: stack the parameters along "
      "a new axis and update the stacked arrays in one call, or use the same class of "
      "mlx.optimizers.");
}

// The transformations of a primitive that has none.
#define FLATSTEP_REFUSE_TRANSFORMS()                                                         \
  std::vector<mx::array> jvp(                                                                \
      const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&) \
      override {                                                                             \
    refuse_jvp();                                                                            \
  }                                                                                          \
  std::vector<mx::array> vjp(                                                                \
      const std::vector<mx::array>&,                                                         \
      const std::vector<mx::array>&,                                                         \
      const std::vector<int>&,                                                               \
      const std::vector<mx::array>&) override {                                              \
    refuse_vjp();                                                                            \
  }                                                                                          \
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(                                  \
      const std::vector<mx::array>&, const std::vector<int>&) override {                     \
    refuse_vmap();                                                                           \
  }

}  // namespace flatstep
