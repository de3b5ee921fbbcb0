// Memory for an output of a primitive.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"

namespace flatstep {

// Throws where MLX's allocator returns null, so that running out of memory is a Python exception.
inline void allocate(mlx::core::array& out) {
  auto data = mlx::core::allocator::malloc(out.nbytes());
  if (out.nbytes() > 0 && data.buffer().ptr() == nullptr) {
    throw std::runtime_error(
        "[flatstep] out of memory: could not allocate " + std::to_string(out.nbytes()) + " bytes.");
  }
  out.set_data(std::move(data));
}

inline void allocate_all(std::vector<mlx::core::array>& outputs) {
  for (auto& out : outputs) {
    allocate(out);
  }
}

}  // namespace flatstep
