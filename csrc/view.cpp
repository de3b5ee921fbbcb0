#include "view.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "allocate.h"
#include "kept_leaves.h"
#include "mlx/utils.h"

namespace flatstep {

size_t size_of_shape(const mx::Shape& shape) {
  size_t size = 1;
  for (auto dimension : shape) {
    size *= static_cast<size_t>(dimension);
  }
  return size;
}

// Makes nodes as array::make_arrays does, but without growing vectors, since this runs for every
// tensor at every step.
std::vector<mx::array> views(const mx::array& flat, ViewSpecs specs, mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  std::vector<mx::array> result;
  result.reserve(specs->size());
  for (size_t first = 0; first < specs->size(); first += kViewsPerNode) {
    size_t end = std::min(first + kViewsPerNode, specs->size());
    auto node = std::make_shared<View>(stream, specs, first, end - first);
    for (size_t i = first; i < end; ++i) {
      result.emplace_back((*specs)[i].shape, flat.dtype(), node, std::vector<mx::array>(1, flat));
    }
    for (size_t i = first; i < end; ++i) {
      std::vector<mx::array> siblings;
      siblings.reserve(end - first - 1);
      siblings.insert(siblings.end(), result.begin() + first, result.begin() + i);
      siblings.insert(siblings.end(), result.begin() + i + 1, result.end());
      result[i].set_siblings(std::move(siblings), i - first);
    }
  }
  return result;
}

std::vector<mx::array> parts_of(
    const mx::array& flat,
    const std::vector<std::pair<mx::Shape, size_t>>& parts,
    mx::StreamOrDevice s) {
  auto specs = std::make_shared<std::vector<ViewSpec>>();
  for (const auto& [shape, offset] : parts) {
    size_t size = size_of_shape(shape);
    if (offset + size > flat.size()) {
      std::ostringstream message;
      message << "[view] a view of shape " << shape << " at element " << offset
              << " does not lie within an array of " << flat.size() << " elements.";
      throw std::invalid_argument(message.str());
    }
    specs->push_back({shape, offset, keeps_much_else(size, flat.size()) ? always() : nullptr});
  }
  // A leaf that is read is no part of a graph, which would keep the whole bucket.
  if (!flat.is_available() || is_tracing()) {
    return views(flat, std::move(specs), s);
  }
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
    std::optional<mx::array> part;
    if (spec(i).is_apart && *spec(i).is_apart) {
      part.emplace(out.shape(), out.dtype(), nullptr, std::vector<mx::array>{});
    }
    mx::array& target = part ? *part : out;
    size_t dimensions_over_one =
        std::count_if(out.shape().begin(), out.shape().end(), [](auto n) { return n > 1; });
    mx::array::Flags flags{/* contiguous */ true,
                           /* row_contiguous */ true,
                           /* col_contiguous */ dimensions_over_one <= 1};
    auto offset = static_cast<int64_t>(spec(i).offset);
    target.copy_shared_buffer(flat, target.strides(), flags, target.size(), offset);
    if (part) {
      allocate(out);
      copies.push_back({i, std::move(*part)});
    }
  }
  return copies;
}

std::vector<mx::Shape> View::output_shapes(const std::vector<mx::array>&) {
  std::vector<mx::Shape> shapes;
  for (size_t i = 0; i < count_; ++i) {
    shapes.push_back(spec(i).shape);
  }
  return shapes;
}

}  // namespace flatstep
