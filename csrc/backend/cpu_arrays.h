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
static_assert(2 + kMaxStateArrays <= kPanelBuffers);

using Scratch = float[kBlockElements];

// How long parts of an array are.
struct Extent {
  size_t block_bytes;
  bool has_blocks;  // and parts of it are whole ones

  // Before an element, which is the first of a block where there are blocks.
  size_t bytes(size_t elements) const {
    return has_blocks ? (elements + kBlock - 1) / kBlock * block_bytes
                      : elements * (block_bytes / kBlock);
  }
};

inline Extent extent_of(Storage storage) {
  return {traits_of(storage).block_bytes, traits_of(storage).is_codes};
}
// Of what lies beside parameters in a split storage.
inline Extent extent_of_rests(Storage storage) {
  return {traits_of(storage).rest_bytes, true};
}

// Blocks before the first step has written them.
alignas(64) inline constexpr char kZeroBlocks[kBlockElements * 4]{};

// Where one kind of value (a parameter, a gradient, a state) comes from.
struct Input {
  // Of a contiguous array from its element `first` on.
  Input(const mx::array& a, Storage stored_as, Extent how_long, size_t first = 0)
      : storage(stored_as),
        extent(how_long),
        data(a.data<char>() + extent.bytes(first)),
        layout(a.flags().row_contiguous ? nullptr : std::make_shared<StridedLayout>(a)) {
    // Blocks are contiguous, or still what `init` makes: one zero.
    if (extent.has_blocks && layout) {
      if (a.data_size() != 1) {
        throw std::runtime_error("[flatstep] an array of blocks of the state is not contiguous.");
      }
      data = nullptr;
      layout = nullptr;
    }
  }

  // Of elements that lie in one piece, in whatever order.
  Input(const char* first, Storage stored_as)
      : storage(stored_as), extent(extent_of(stored_as)), data(first) {
  }

  // Of a contiguous array.
  const char* at(size_t element) const {
    return data ? data + extent.bytes(element) : kZeroBlocks;
  }
  // The length of the rows that are read a panel at a time; 0 where they lie in one piece.
  size_t scattered_row() const {
    return layout && layout->crosses_lines() ? layout->row_length() : 0;
  }

  Storage storage;
  Extent extent;
  const char* data;                             // null: blocks of zeros
  std::shared_ptr<const StridedLayout> layout;  // null for a contiguous array
};

// One thread's walk through an input.
class Walk {
 public:
  // The walk ends before element `end`; `number` tells walks of one thread apart.
  Walk(const Input& input, size_t end, size_t number) : input_(input) {
    if (input.layout) {
      reader_.emplace(*input.layout, input.data, input.extent.bytes(1), end, number);
    }
  }

  // Elements from `begin` where they lie: at most `n` of them; `n` becomes smaller where fewer can
  // be had at once.
  const char* raw(size_t begin, size_t& n) {
    return reader_ ? reader_->read(begin, n) : input_.at(begin);
  }
  // Makes `n` that small where fewer can be had at once.
  void limit(size_t begin, size_t& n) {
    if (reader_) {
      reader_->read(begin, n);
    }
  }
  // Neither more nor fewer than n, at most a block of them where they lie in pieces: as they are
  // stored, with these rests if the storage has any, or in float32.
  const void* exactly(
      size_t n,
      size_t begin,
      Storage as,
      const CpuLoops& loops,
      const void* rests,
      float* scratch) {
    size_t length = n;
    const char* stored = raw(begin, length);
    if (length < n) {
      reader_->copy(begin, n, pieces_);
      stored = pieces_;
    }
    return in(as, loops, stored, rests, n, scratch);
  }

 private:
  const void* in(
      Storage as,
      const CpuLoops& loops,
      const char* stored,
      const void* rests,
      size_t n,
      float* scratch) const {
    if (input_.storage == as) {
      return stored;
    }
    loops.load[static_cast<size_t>(input_.storage)](stored, rests, scratch, n);
    return scratch;
  }

  const Input& input_;
  std::optional<StridedReader> reader_;
  alignas(64) char pieces_[kBlock * sizeof(float)];
};

// Where a flat array of values goes.
struct Output {
  Output(mx::array& a, Storage stored_as, Extent how_long, bool is_in_place)
      : data(a.data<char>()),
        bytes(a.nbytes()),
        storage(stored_as),
        extent(how_long),
        in_place(is_in_place) {
  }

  // Where to write what is in the storage `as`: in place, or into `scratch` for `store`.
  void* target(size_t begin, float* scratch, Storage as) const {
    return storage == as ? at(begin) : static_cast<void*>(scratch);
  }
  float* floats(size_t begin, float* scratch) const {
    return static_cast<float*>(target(begin, scratch, Storage::Float32));
  }

  // Writes n values to `begin` on, unless they are there; `rests` is where those of a split storage
  // go, and `key` that of the first element.
  void store(
      const CpuLoops& loops,
      size_t begin,
      size_t n,
      const float* scratch,
      Storage as,
      RoundingKey key,
      void* rests = nullptr) const {
    if (storage != as) {
      loops.store[static_cast<size_t>(storage)](scratch, at(begin), rests, n, key);
    }
  }

  // Zeros from `begin` to `end`, or to the end of the array.
  void clear(size_t begin, size_t end) const {
    size_t first = extent.bytes(begin);
    size_t last = end == SIZE_MAX ? bytes : std::min(extent.bytes(end), bytes);
    if (first < last) {
      std::memset(data + first, 0, last - first);
    }
  }

  char* at(size_t element) const {
    return data + extent.bytes(element);
  }

  char* data;
  size_t bytes;  // of all of it
  Storage storage;
  Extent extent;
  bool in_place;  // where its input lies
};

}  // namespace flatstep
