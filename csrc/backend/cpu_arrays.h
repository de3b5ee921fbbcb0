// What an update on the CPU reads and writes: arrays of any supported dtype and layout, as blocks
// of floats.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "backend/cpu_loops.h"
#include "backend/strided.h"
#include "mlx/array.h"

namespace flatstep {

inline constexpr size_t kBlockElements = 1024;
static_assert(2 + kMaxStates <= kPanelBuffers);

using Scratch = float[kBlockElements];

// Where one kind of value (a parameter, a gradient, a state) comes from.
struct Input {
  // Of a contiguous array from its element `first` on.
  explicit Input(const mx::array& a, size_t first = 0)
      : storage(storage_of(a.dtype())),
        data(a.data<char>() + first * a.itemsize()),
        layout(a.flags().row_contiguous ? nullptr : std::make_shared<StridedLayout>(a)) {
  }

  // The length of the rows that are read a panel at a time; 0 where they lie in one piece.
  size_t scattered_row() const {
    return layout && layout->crosses_lines() ? layout->row_length() : 0;
  }

  Storage storage;
  const char* data;
  std::shared_ptr<const StridedLayout> layout;  // null for a contiguous array
};

// One thread's walk through an input.
class Walk {
 public:
  // The walk ends before element `end`; `number` tells walks of one thread apart.
  Walk(const Input& input, size_t end, size_t number)
      : input_(input), itemsize_(traits_of(input.storage).bytes) {
    if (input.layout) {
      reader_.emplace(*input.layout, input.data, itemsize_, end, number);
    }
  }

  // Elements from `begin` in the storage `as`: where they lie, or converted into `scratch` if that
  // is float32. At most `n` of them; `n` becomes smaller where fewer can be had at once.
  const void* read(const CpuLoops& loops, size_t begin, size_t& n, float* scratch, Storage as) {
    const void* raw = reader_ ? reader_->read(begin, n) : input_.data + begin * itemsize_;
    if (input_.storage == as) {
      return raw;
    }
    loops.load[static_cast<size_t>(input_.storage)](raw, scratch, n);
    return scratch;
  }
  const float* read(const CpuLoops& loops, size_t begin, size_t& n, float* scratch) {
    return static_cast<const float*>(read(loops, begin, n, scratch, Storage::float32));
  }

 private:
  const Input& input_;
  size_t itemsize_;
  std::optional<StridedReader> reader_;
};

// Where a flat array of values goes.
struct Output {
  Output(mx::array& a, bool is_in_place)
      : data(a.data<char>()),
        size(a.size()),
        storage(storage_of(a.dtype())),
        in_place(is_in_place) {
  }

  // Where to write what is in the storage `as`: in place, or into `scratch` for `store`.
  void* target(size_t begin, float* scratch, Storage as) const {
    return storage == as ? at(begin) : static_cast<void*>(scratch);
  }
  float* target(size_t begin, float* scratch) const {
    return static_cast<float*>(target(begin, scratch, Storage::float32));
  }

  // Writes n values to `begin` on, unless they are there; `key` is that of no element.
  void store(
      const CpuLoops& loops,
      RoundingKey key,
      size_t begin,
      size_t n,
      const float* scratch,
      Storage as = Storage::float32) const {
    if (storage != as) {
      key.element = begin;
      loops.store[static_cast<size_t>(storage)](scratch, at(begin), n, key);
    }
  }

  // Zeros from `begin` to `end`, or to the end of the array.
  void clear(size_t begin, size_t end) const {
    if (begin < std::min(end, size)) {
      std::memset(at(begin), 0, at(std::min(end, size)) - at(begin));
    }
  }

  char* at(size_t element) const {
    return data + element * traits_of(storage).bytes;
  }

  char* data;
  size_t size;
  Storage storage;
  bool in_place;  // where its input lies
};

}  // namespace flatstep
