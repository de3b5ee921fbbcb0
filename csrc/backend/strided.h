// Reads an array of any layout in row-major order: a transposed gradient, a broadcast, a slice.
#pragma once

#include <cstddef>
#include <vector>

#include "mlx/array.h"

namespace flatstep {

namespace mx = mlx::core;

class StridedReader {
 public:
  // Keeps the layout, not the array.
  explicit StridedReader(const mx::array& a);

  // Copies the elements with row-major numbers [begin, begin + n) to `to`.
  void read(const char* data, size_t begin, size_t n, char* to) const;

 private:
  template <typename T>
  void read_as(const T* data, size_t begin, size_t n, T* to) const;

  size_t itemsize_;
  // Neighbouring dimensions that one stride can walk are merged.
  std::vector<size_t> shape_;
  std::vector<int64_t> strides_;
};

}  // namespace flatstep
