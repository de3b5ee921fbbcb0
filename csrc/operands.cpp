#include "operands.h"

#include <iterator>

namespace flatstep {

std::vector<mx::array>& Operands::place_next(Operand operand, bool is_available) {
  bool is_held = may_hold_ && is_available;
  std::vector<mx::array>& list = is_held ? *held_ : inputs_;
  places_[static_cast<size_t>(operand)] = {static_cast<uint32_t>(list.size()), true, is_held};
  return list;
}

void Operands::add(Operand operand, mx::array value) {
  place_next(operand, value.is_available()).push_back(std::move(value));
}

void Operands::add(Operand operand, std::vector<mx::array> values, bool are_available) {
  auto& list = place_next(operand, are_available);
  if (list.empty()) {
    list = std::move(values);
    return;
  }
  std::move(values.begin(), values.end(), std::back_inserter(list));
}

}  // namespace flatstep
