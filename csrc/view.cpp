#include "view.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "mlx/utils.h"

namespace flatstep {

namespace {

size_t size_of_shape(const mx::Shape& shape) {
  size_t size = 1;
  for (auto dimension : shape) {
    size *= static_cast<size_t>(dimension);
  }
  return size;
}

// Appends the outputs of one node: what array::make_arrays does, without growing vectors, since
// this runs for every tensor at every step.
void add_node(
    const mx::array& flat,
    mx::Stream stream,
    std::vector<ViewSpec> specs,
    std::vector<mx::array>& result) {
  size_t first = result.size();
  size_t count = specs.size();
  auto node = std::make_shared<View>(stream, std::move(specs));
  for (const ViewSpec& spec : node->specs()) {
    result.emplace_back(spec.shape, flat.dtype(), node, std::vector<mx::array>{flat});
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

}  // namespace

std::vector<mx::array> views(
    const mx::array& flat, std::vector<ViewSpec> specs, mx::StreamOrDevice s) {
  for (const auto& spec : specs) {
    if (spec.offset + size_of_shape(spec.shape) > flat.size()) {
      std::ostringstream message;
      message << "[view] a view of shape " << spec.shape << " at element " << spec.offset
              << " does not lie within an array of " << flat.size() << " elements.";
      throw std::invalid_argument(message.str());
    }
  }
  auto stream = mx::to_stream(s);
  std::vector<mx::array> result;
  result.reserve(specs.size());
  for (size_t first = 0; first < specs.size(); first += kViewsPerNode) {
    size_t last = std::min(first + kViewsPerNode, specs.size());
    std::vector<ViewSpec> part(
        std::make_move_iterator(specs.begin() + first),
        std::make_move_iterator(specs.begin() + last));
    add_node(flat, stream, std::move(part), result);
  }
  return result;
}

void View::eval(const mx::array& flat, std::vector<mx::array>& outputs) {
  // State that no step has touched yet is mx.zeros: one element, broadcast.
  bool is_one_element = flat.size() > 1 && flat.data_size() == 1;
  if (!is_one_element && !flat.flags().row_contiguous) {
    throw std::runtime_error("[view] the flat array is not contiguous.");
  }
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
    out.copy_shared_buffer(
        flat, strides, flags, out.size(), static_cast<int64_t>(specs_[i].offset));
  }
}

void View::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  eval(inputs[0], outputs);
}

void View::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  eval(inputs[0], outputs);
}

bool View::is_equivalent(const mx::Primitive& other) const {
  const auto& specs = static_cast<const View&>(other).specs_;
  return std::equal(
      specs_.begin(), specs_.end(), specs.begin(), specs.end(), [](const auto& a, const auto& b) {
        return a.offset == b.offset && a.shape == b.shape;
      });
}

std::vector<mx::Shape> View::output_shapes(const std::vector<mx::array>&) {
  std::vector<mx::Shape> shapes;
  for (const auto& spec : specs_) {
    shapes.push_back(spec.shape);
  }
  return shapes;
}

}  // namespace flatstep
