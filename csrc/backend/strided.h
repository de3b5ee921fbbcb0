// Reads an array of any layout in row-major order: a transposed gradient, a broadcast, a slice.
//
// The gradient of a linear layer's weight arrives transposed, so this is no rare case. Walking such
// an array along its rows touches a new cache line for every element; a panel of rows is copied
// instead, tile by tile, into a buffer that stays in the second-level cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "mlx/array.h"

namespace flatstep {

namespace mx = mlx::core;

// What is copied at once: so many rows, to use whole cache lines of a transposed array, of at most
// so many columns. A walk that goes through one panel after the other copies each element once.
inline constexpr size_t kPanelRows = 64;
inline constexpr size_t kPanelColumns = 1024;
inline constexpr size_t kSpareColumns = 64;

// The layout of an array, without the array: neighbouring dimensions that one stride can walk are
// merged. What is left is a number of rows, and the dimension of their elements.
class StridedLayout {
 public:
  explicit StridedLayout(const mx::array& a);

  const std::vector<size_t>& shape() const {
    return shape_;
  }
  const std::vector<int64_t>& strides() const {
    return strides_;
  }
  size_t row_length() const {
    return shape_.back();
  }
  int64_t column_stride() const {
    return strides_.back();
  }
  // True when a walk along a row touches a new cache line for every element.
  bool crosses_lines() const {
    return column_stride() != 0 && column_stride() != 1;
  }
  // Where row `row` starts, in elements from the start of the array.
  int64_t row_start(size_t row) const;

 private:
  std::vector<size_t> shape_;
  std::vector<int64_t> strides_;
};

// Columns [column, column + num_columns) of some rows.
struct Panel {
  size_t row;
  size_t num_rows;
  size_t column;
  size_t num_columns;
  size_t pitch;  // from row to row in the buffer
};

inline constexpr size_t kPanelBuffers = 8;

// One of this thread's own, kept from task to task. Null where there is no memory for it.
uint32_t* panel_buffer(size_t number, size_t words) noexcept;

// One thread's walk through an array.
class StridedReader {
 public:
  // `walk_end` is where the walk will end; `number` is that of the panel buffer that it uses.
  StridedReader(
      const StridedLayout& layout,
      const char* data,
      size_t itemsize,
      size_t walk_end,
      size_t number)
      : layout_(layout), data_(data), itemsize_(itemsize), walk_end_(walk_end), number_(number) {
  }

  // The elements with row-major numbers from `begin`, contiguous: at most `n` of them, and `n` is
  // set to how many, at least one.
  const char* read(size_t begin, size_t& n);
  // The same elements, all n of them, to `out`: one by one where the panel ends, for the walk is
  // not there yet.
  void copy(size_t begin, size_t n, char* out) const;

 private:
  bool has(size_t row, size_t column) const;
  // Where an element of the panel is, from the panel's start.
  size_t place(size_t row, size_t column) const {
    return (row - panel_.row) * panel_.pitch + column - panel_.column;
  }
  void fill(size_t row, size_t column);

  const StridedLayout& layout_;
  const char* data_;
  size_t itemsize_;
  size_t walk_end_;
  size_t number_;
  Panel panel_{};
  const uint32_t* elements_{nullptr};  // the panel's
  // Takes the buffer's place where there is no memory: a step that has begun cannot fail.
  uint32_t spare_[kSpareColumns];
};

}  // namespace flatstep
