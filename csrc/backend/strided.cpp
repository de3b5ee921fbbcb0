#include "backend/strided.h"

#include <algorithm>

namespace flatstep {

StridedReader::StridedReader(const mx::array& a) : itemsize_(a.itemsize()) {
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

template <typename T>
void StridedReader::read_as(const T* data, size_t begin, size_t n, T* to) const {
  size_t last = shape_.size() - 1;
  // The coordinates of `begin`.
  std::vector<size_t> index(shape_.size());
  size_t rest = begin;
  for (size_t d = shape_.size(); d-- > 0;) {
    index[d] = rest % shape_[d];
    rest /= shape_[d];
  }
  int64_t inner_stride = strides_[last];
  while (n > 0) {
    int64_t at = 0;
    for (size_t d = 0; d < shape_.size(); ++d) {
      at += static_cast<int64_t>(index[d]) * strides_[d];
    }
    size_t run = std::min(n, shape_[last] - index[last]);
    const T* from = data + at;
    for (size_t i = 0; i < run; ++i) {
      to[i] = from[static_cast<int64_t>(i) * inner_stride];
    }
    to += run;
    n -= run;
    index[last] = 0;
    for (size_t d = last; d-- > 0;) {
      if (++index[d] < shape_[d]) {
        break;
      }
      index[d] = 0;
    }
  }
}

void StridedReader::read(const char* data, size_t begin, size_t n, char* to) const {
  if (itemsize_ == 4) {
    read_as(reinterpret_cast<const uint32_t*>(data), begin, n, reinterpret_cast<uint32_t*>(to));
  } else {
    read_as(reinterpret_cast<const uint16_t*>(data), begin, n, reinterpret_cast<uint16_t*>(to));
  }
}

}  // namespace flatstep
