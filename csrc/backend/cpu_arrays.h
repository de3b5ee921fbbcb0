// What an update on the CPU reads and writes: arrays of any supported dtype and layout, as blocks
// of floats.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "backend/cpu_loops.h"
#include "backend/strided.h"
#include "mlx/array.h"

namespace flatstep {

namespace mx = mlx::core;

inline constexpr size_t kBlockElements = 1024;
inline constexpr size_t kMaxSlots = 2;
static_assert(2 + kMaxSlots <= kPanelBuffers);

using Scratch = float[kBlockElements];

// Where one kind of value (a parameter, a gradient, a state slot) comes from.
class Input {
 public:
  // Of a contiguous array from its element `first` on.
  explicit Input(const mx::array& a, size_t first = 0)
      : data_(a.data<char>() + first * a.itemsize()),
        dtype_(a.dtype()),
        layout_(a.flags().row_contiguous ? nullptr : std::make_shared<StridedLayout>(a)) {
  }

  mx::Dtype dtype() const {
    return dtype_;
  }

  // The length of the rows that are read a panel at a time; 0 where they lie in one piece.
  size_t scattered_row() const {
    return layout_ && layout_->crosses_lines() ? layout_->row_length() : 0;
  }

  // The length of the rows that are best walked a panel at a time; 0 where any order will do.
  size_t long_row() const {
    return scattered_row() > kPanelColumns ? scattered_row() : 0;
  }

 private:
  friend class Walk;

  const char* data_;
  mx::Dtype dtype_;
  std::shared_ptr<const StridedLayout> layout_;  // null for a contiguous array
};

// One thread's walk through an input.
class Walk {
 public:
  // The walk ends before element `end`; `number` tells walks of one thread apart.
  Walk(const Input& input, size_t end, size_t number) : input_(input) {
    if (input.layout_) {
      reader_.emplace(
          *input.layout_, input.data_, mx::size_of(input.dtype_), end, panel_buffer(number));
    }
  }

  // Elements from `begin`, as they are stored. At most `n` of them; `n` becomes smaller where fewer
  // can be had at once.
  const void* read(size_t begin, size_t& n) {
    return reader_ ? reader_->read(begin, n, n) : input_.data_ + begin * mx::size_of(input_.dtype_);
  }

  mx::Dtype dtype() const {
    return input_.dtype_;
  }

  // What `read` gave, as floats: where it lies, or converted into `scratch`.
  const float* as_floats(const CpuLoops& loops, const void* raw, size_t n, float* scratch) const {
    if (input_.dtype_ == mx::float32) {
      return static_cast<const float*>(raw);
    }
    auto load = input_.dtype_ == mx::float16 ? loops.load_float16 : loops.load_bfloat16;
    load(static_cast<const uint16_t*>(raw), scratch, n);
    return scratch;
  }

 private:
  const Input& input_;
  std::optional<StridedReader> reader_;
};

// Where a flat array of values goes.
class Output {
 public:
  explicit Output(mx::array& a) : data_(a.data<char>()), dtype_(a.dtype()) {
  }

  // Where to write n floats for [begin, begin + n): in place, or into `scratch` for `store`.
  float* target(size_t begin, float* scratch) const {
    return dtype_ == mx::float32 ? reinterpret_cast<float*>(data_) + begin : scratch;
  }

  void store(const CpuLoops& loops, size_t begin, size_t n, const float* scratch) const {
    auto* to = reinterpret_cast<uint16_t*>(data_) + begin;
    if (dtype_ == mx::float16) {
      loops.store_float16(scratch, to, n);
    } else if (dtype_ == mx::bfloat16) {
      loops.store_bfloat16(scratch, to, n);
    }
  }

  char* at(size_t element) const {
    return data_ + element * mx::size_of(dtype_);
  }
  size_t itemsize() const {
    return mx::size_of(dtype_);
  }

 private:
  char* data_;
  mx::Dtype dtype_;
};

}  // namespace flatstep
