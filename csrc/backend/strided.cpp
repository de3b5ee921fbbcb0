#include "backend/strided.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>

#include "tables.h"

namespace flatstep {

namespace {

// What a panel can be copied as.
static_assert(std::all_of(kStorages, kStorages + kNumPlainStorages, [](const StorageTraits& s) {
  size_t bytes = s.block_bytes / FLATSTEP_BLOCK;
  return bytes == sizeof(uint32_t) || bytes == sizeof(uint16_t);
}));

// A panel of columns is so wide, and so many of its elements stay in the cache.
constexpr size_t kPanelElements = size_t(1) << 16;
constexpr size_t kTile = 16;

// Rows of a panel that lie a power of two apart share a few sets of the cache and evict each other.
size_t pitch_of(size_t num_columns) {
  return num_columns < kPanelColumns / 2 ? num_columns : (num_columns | 15) + 33;
}

typedef float Float4 __attribute__((vector_size(16)));

#if defined(__clang__)
#define FLATSTEP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has had that only since version 12
typedef int32_t Int4 __attribute__((vector_size(16)));
#define FLATSTEP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int4{__VA_ARGS__})
#endif

// out[r * out_stride + c] = in[c * in_stride + r] for 4 x 4 elements.
void transpose_4x4(const float* in, int64_t in_stride, float* out, size_t out_stride) {
  Float4 a, b, c, d;
  std::memcpy(&a, in, 16);
  std::memcpy(&b, in + in_stride, 16);
  std::memcpy(&c, in + 2 * in_stride, 16);
  std::memcpy(&d, in + 3 * in_stride, 16);
  Float4 ab_low = FLATSTEP_SHUFFLE(a, b, 0, 4, 1, 5);
  Float4 ab_high = FLATSTEP_SHUFFLE(a, b, 2, 6, 3, 7);
  Float4 cd_low = FLATSTEP_SHUFFLE(c, d, 0, 4, 1, 5);
  Float4 cd_high = FLATSTEP_SHUFFLE(c, d, 2, 6, 3, 7);
  Float4 rows[4] = {
      FLATSTEP_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5),
      FLATSTEP_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7),
      FLATSTEP_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5),
      FLATSTEP_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7)};
  for (size_t r = 0; r < 4; ++r) {
    std::memcpy(out + r * out_stride, &rows[r], 16);
  }
}

// Copies a tile: out[r * out_stride + c] = data[starts[r] + c * column_stride].
template <typename T>
void copy_tile(
    const T* data,
    const int64_t* starts,
    size_t num_rows,
    size_t num_columns,
    int64_t column_stride,
    T* out,
    size_t out_stride) {
  if constexpr (sizeof(T) == 4) {
    bool rows_are_adjacent = num_rows == kTile;
    for (size_t r = 1; r < num_rows; ++r) {
      rows_are_adjacent &= starts[r] == starts[r - 1] + 1;
    }
    if (rows_are_adjacent && num_columns == kTile) {
      auto* in = reinterpret_cast<const float*>(data + starts[0]);
      auto* to = reinterpret_cast<float*>(out);
      for (size_t c = 0; c < kTile; c += 4) {
        for (size_t r = 0; r < kTile; r += 4) {
          const float* from = in + static_cast<int64_t>(c) * column_stride + r;
          transpose_4x4(from, column_stride, to + r * out_stride + c, out_stride);
        }
      }
      return;
    }
  }
  for (size_t c = 0; c < num_columns; ++c) {
    const T* column = data + static_cast<int64_t>(c) * column_stride;
    for (size_t r = 0; r < num_rows; ++r) {
      out[r * out_stride + c] = column[starts[r]];
    }
  }
}

template <typename T>
void copy_panel(const StridedLayout& layout, const Panel& panel, const T* data, T* out) {
  size_t length = panel.num_columns;
  int64_t stride = layout.column_stride();
  data += static_cast<int64_t>(panel.column) * stride;
  int64_t starts[kPanelRows];
  for (size_t r = 0; r < panel.num_rows; ++r) {
    starts[r] = layout.row_start(panel.row + r);
  }
  if (stride == 1) {
    for (size_t r = 0; r < panel.num_rows; ++r) {
      std::memcpy(out + r * panel.pitch, data + starts[r], length * sizeof(T));
    }
    return;
  }
  constexpr size_t kLine = 64 / sizeof(T);
  for (size_t c = 0; c < length; c += kTile) {
    // Each column lies in a page of its own, which no hardware prefetcher foresees.
    for (size_t ahead = c + kTile; ahead < std::min(c + 2 * kTile, length); ++ahead) {
      const T* column = data + static_cast<int64_t>(ahead) * stride;
      for (size_t r = 0; r < panel.num_rows; r += kLine) {
        __builtin_prefetch(column + starts[r]);
      }
    }
    for (size_t r = 0; r < panel.num_rows; r += kTile) {
      copy_tile(
          data + static_cast<int64_t>(c) * stride,
          starts + r,
          std::min(kTile, panel.num_rows - r),
          std::min(kTile, length - c),
          stride,
          out + r * panel.pitch + c,
          panel.pitch);
    }
  }
}

}  // namespace

// Not thread_local: where there is no memory for such a variable the C library ends the process.
uint32_t* panel_buffer(size_t number, size_t words) noexcept {
  using Buffers = std::array<std::vector<uint32_t>, kPanelBuffers>;
  static const pthread_key_t key = [] {
    pthread_key_t made{};
    pthread_key_create(&made, [](void* buffers) { delete static_cast<Buffers*>(buffers); });
    return made;
  }();
  try {
    auto* buffers = static_cast<Buffers*>(pthread_getspecific(key));
    if (buffers == nullptr) {
      auto fresh = std::make_unique<Buffers>();
      if (pthread_setspecific(key, fresh.get()) != 0) {
        return nullptr;
      }
      buffers = fresh.release();
    }
    auto& buffer = (*buffers)[number];
    buffer.resize(std::max(buffer.size(), words));
    return buffer.data();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

StridedLayout::StridedLayout(const mx::array& a) {
  for (size_t i = 0; i < a.ndim(); ++i) {
    auto size = static_cast<size_t>(a.shape()[i]);
    int64_t stride = a.strides()[i];
    if (size == 1) {
      continue;
    }
    if (!shape_.empty() && strides_.back() == stride * static_cast<int64_t>(size)) {
      shape_.back() *= size;
      strides_.back() = stride;
    } else {
      shape_.push_back(size);
      strides_.push_back(stride);
    }
  }
  if (shape_.empty()) {
    shape_.push_back(1);
    strides_.push_back(1);
  }
}

int64_t StridedLayout::row_start(size_t row) const {
  int64_t start = 0;
  for (size_t d = shape_.size() - 1; d-- > 0;) {
    start += static_cast<int64_t>(row % shape_[d]) * strides_[d];
    row /= shape_[d];
  }
  return start;
}

const char* StridedReader::read(size_t begin, size_t& n) {
  size_t length = layout_.row_length();
  size_t row = begin / length;
  size_t column = begin % length;
  if (!has(row, column)) {
    fill(row, column);
  }
  const Panel& p = panel_;
  size_t at = place(row, column);
  // Rows that are whole and follow each other can be read on.
  bool is_whole = p.num_columns == length && p.pitch == length;
  n = std::min(n, is_whole ? p.num_rows * length - at : p.column + p.num_columns - column);
  return reinterpret_cast<const char*>(elements_) + at * itemsize_;
}

void StridedReader::copy(size_t begin, size_t n, char* out) const {
  size_t length = layout_.row_length();
  for (size_t i = begin; i < begin + n; ++i, out += itemsize_) {
    size_t row = i / length;
    size_t column = i % length;
    auto in_data = static_cast<int64_t>(column) * layout_.column_stride() + layout_.row_start(row);
    const char* from =
        has(row, column) ? reinterpret_cast<const char*>(elements_) + place(row, column) * itemsize_
                         : data_ + in_data * static_cast<int64_t>(itemsize_);
    std::memcpy(out, from, itemsize_);
  }
}

bool StridedReader::has(size_t row, size_t column) const {
  const Panel& p = panel_;
  return row >= p.row && row < p.row + p.num_rows && column >= p.column &&
         column < p.column + p.num_columns;
}

void StridedReader::fill(size_t row, size_t column) {
  size_t length = layout_.row_length();
  size_t first_column = column / kPanelColumns * kPanelColumns;
  size_t columns = std::min(kPanelColumns, length - first_column);
  size_t rows_left = (walk_end_ - 1) / length + 1 - row;
  size_t rows = std::min(rows_left, std::clamp(kPanelElements / columns, size_t(16), kPanelRows));
  panel_ = {row, rows, first_column, columns, rows == 1 ? columns : pitch_of(columns)};
  size_t bytes = panel_.num_rows * panel_.pitch * itemsize_;
  uint32_t* out = panel_buffer(number_, (bytes + sizeof(uint32_t) - 1) / sizeof(uint32_t));
  if (out == nullptr) {
    panel_ = {row, 1, column, std::min(kSpareColumns, length - column), kSpareColumns};
    out = spare_;
  }
  elements_ = out;
  if (itemsize_ == 4) {
    copy_panel(layout_, panel_, reinterpret_cast<const uint32_t*>(data_), out);
  } else {
    auto* halves = reinterpret_cast<uint16_t*>(out);
    copy_panel(layout_, panel_, reinterpret_cast<const uint16_t*>(data_), halves);
  }
}

}  // namespace flatstep
