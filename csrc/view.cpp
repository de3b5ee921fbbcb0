#include "view.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "allocate.h"
#include "mlx/utils.h"

namespace flatstep {

size_t size_of_shape(const mx::Shape& shape) {
  size_t size = 1;
  for (auto dimension : shape) {
    size *= static_cast<size_t>(dimension);
  }
  return size;
}

namespace {

// Appends the outputs of one node: what array::make_arrays does, without growing vectors, since
// this runs for every tensor at every step.
void add_node(
    const mx::array& flat,
    mx::Stream stream,
    const ViewSpecs& specs,
    size_t first,
    size_t count,
    std::vector<mx::array>& result) {
  auto node = std::make_shared<View>(stream, specs, first, count);
  for (size_t i = first; i < first + count; ++i) {
    result.emplace_back((*specs)[i].shape, flat.dtype(), node, std::vector<mx::array>{flat});
  }
  for (size_t i = 0; i < count; ++i) {
    std::vector<mx::array> siblings;
    siblings.reserve(count - 1);
    for (size_t k = 0; k < count; ++k) {
      if (k != i) {
        siblings.push_back(result[first + k]);
      }
    }
    result[first + i].set_siblings(std::move(siblings), i);
  }
}

void check(const mx::array& flat, const std::vector<ViewSpec>& specs) {
  for (const ViewSpec& spec : specs) {
    if (spec.offset + size_of_shape(spec.shape) > flat.size()) {
      std::ostringstream message;
      message << "[view] a view of shape " << spec.shape << " at element " << spec.offset
              << " does not lie within an array of " << flat.size() << " elements.";
      throw std::invalid_argument(message.str());
    }
  }
}

}  // namespace

std::vector<mx::array> views(const mx::array& flat, ViewSpecs specs, mx::StreamOrDevice s) {
  check(flat, *specs);
  auto stream = mx::to_stream(s);
  std::vector<mx::array> result;
  result.reserve(specs->size());
  for (size_t first = 0; first < specs->size(); first += kViewsPerNode) {
    add_node(flat, stream, specs, first, std::min(kViewsPerNode, specs->size() - first), result);
  }
  return result;
}

std::vector<mx::array> views_of_available(const mx::array& flat, ViewSpecs specs) {
  check(flat, *specs);
  std::vector<mx::array> outputs;
  for (const ViewSpec& spec : *specs) {
    outputs.push_back(mx::array(spec.shape, flat.dtype(), nullptr, {}));
    outputs.back().set_status(mx::array::Status::available);
  }
  View view(mx::default_stream(mx::Device::cpu), specs, 0, specs->size());
  for (auto& [i, part] : view.place_outputs(flat, outputs)) {
    std::memcpy(outputs[i].data<char>(), part.data<char>(), part.nbytes());
  }
  return outputs;
}

std::shared_ptr<const std::atomic<bool>> always() {
  static const auto instance = std::make_shared<const std::atomic<bool>>(true);
  return instance;
}

std::vector<View::Copy> View::place_outputs(
    const mx::array& flat, std::vector<mx::array>& outputs) const {
  // State that no step has touched yet is one zero, broadcast.
  bool is_one_element = flat.size() > 1 && flat.data_size() == 1;
  if (!is_one_element && !flat.flags().row_contiguous) {
    throw std::runtime_error("[view] the flat array is not contiguous.");
  }
  std::vector<Copy> copies;
  for (size_t i = 0; i < outputs.size(); ++i) {
    mx::array& out = outputs[i];
    if (is_one_element) {
      mx::array::Flags flags{true, out.size() <= 1, out.size() <= 1};
      out.copy_shared_buffer(flat, mx::Strides(out.ndim(), 0), flags, 1);
      continue;
    }
    // The strides that a new array of this shape has, read before the buffer is shared.
    mx::Strides strides = out.strides();
    size_t dimensions_over_one =
        std::count_if(out.shape().begin(), out.shape().end(), [](auto n) { return n > 1; });
    mx::array::Flags flags{/* contiguous */ true,
                           /* row_contiguous */ true,
                           /* col_contiguous */ dimensions_over_one <= 1};
    std::optional<mx::array> part;
    if (spec(i).is_apart && *spec(i).is_apart) {
      part.emplace(out.shape(), out.dtype(), nullptr, std::vector<mx::array>{});
    }
    (part ? *part : out)
        .copy_shared_buffer(flat, strides, flags, out.size(), static_cast<int64_t>(spec(i).offset));
    if (part) {
      allocate(out);
      copies.push_back({i, std::move(*part)});
    }
  }
  return copies;
}

bool View::is_equivalent(const mx::Primitive& other) const {
  const auto& that = static_cast<const View&>(other);
  if (count_ != that.count_) {
    return false;
  }
  for (size_t i = 0; i < count_; ++i) {
    if (spec(i).offset != that.spec(i).offset || spec(i).shape != that.spec(i).shape) {
      return false;
    }
  }
  return true;
}

std::vector<mx::Shape> View::output_shapes(const std::vector<mx::array>&) {
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i < count_; ++i) {
    shapes.push_back(spec(i).shape);
  }
  return shapes;
}

}  // namespace flatstep
