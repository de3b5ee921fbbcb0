// What an update reads. Each operand is there or not, and is an input of the graph or held by the
// primitive.
//
// MLX's evaluator does some work for each input of a node, and copies their list for each output.
// So operands that are evaluated already need not be inputs where a backend keeps them until its
// work has run.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "mlx/array.h"
#include "tables.h"

namespace flatstep {

// `parameters` and `gradients` are an array for each segment, or one flat array.
enum class Operand : uint8_t {
  constants,  // of each group, as Advance has written them
  parameters,
  gradients,
  grad_scale,   // float32 scalar
  accumulated,  // uint64 scalar: how many gradients are summed up
  state,        // and those that follow, one flat array each
};

inline constexpr Operand state_operand(size_t k) {
  return static_cast<Operand>(static_cast<size_t>(Operand::state) + k);
}

class Operands {
 public:
  // Holds what is evaluated, if it `may_hold` at all.
  explicit Operands(bool may_hold) : may_hold_(may_hold) {
  }

  void add(Operand operand, mx::array value);
  void add(Operand operand, std::vector<mx::array> values, bool are_available);

  bool has(Operand operand) const {
    return place(operand).is_there;
  }
  bool holds(Operand operand) const {
    return place(operand).is_held;
  }
  // The first of its arrays, which lie one after the other; `inputs` are the node's.
  const mx::array* get(Operand operand, const std::vector<mx::array>& inputs) const {
    return (holds(operand) ? held_->data() : inputs.data()) + place(operand).first;
  }

  // What the node has for inputs; they are then its own.
  std::vector<mx::array> take_inputs() {
    return std::move(inputs_);
  }
  // What a backend keeps until its work has run.
  std::shared_ptr<const std::vector<mx::array>> held() const {
    return held_;
  }

 private:
  struct Place {
    uint32_t first;
    bool is_there;
    bool is_held;
  };

  const Place& place(Operand operand) const {
    return places_[static_cast<size_t>(operand)];
  }
  std::vector<mx::array>& place_next(Operand operand, bool is_available);

  bool may_hold_;
  std::array<Place, static_cast<size_t>(Operand::state) + kMaxStateArrays> places_{};
  std::vector<mx::array> inputs_;
  std::shared_ptr<std::vector<mx::array>> held_{std::make_shared<std::vector<mx::array>>()};
};

}  // namespace flatstep
