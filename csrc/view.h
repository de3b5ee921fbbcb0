// Leaves as views of a flat array: no copy, no work, only descriptors, but for those that get
// memory of their own (see kept_leaves.h).
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "mlx/utils.h"
#include "update_primitive.h"

namespace flatstep {

// How many elements an array of this shape has.
size_t size_of_shape(const mx::Shape& shape);

struct ViewSpec {
  mx::Shape shape;
  size_t offset;  // in elements from the start of the flat array
  // Looked at when the view is made: whether it gets a copy instead. Null: never.
  std::shared_ptr<const std::atomic<bool>> is_apart{};
};

// For a view that always gets a copy.
std::shared_ptr<const std::atomic<bool>> always();

// Each node makes a few of them. More to a node means fewer nodes, but MLX keeps a list of
// siblings in every output, so the bookkeeping grows with the square.
inline constexpr size_t kViewsPerNode = 8;

// The same for every step, so it is made once and shared.
using ViewSpecs = std::shared_ptr<const std::vector<ViewSpec>>;

// The parts of `flat` that `specs` name, row-contiguous, sharing its memory unless they are apart.
std::vector<mx::array> views(const mx::array& flat, ViewSpecs specs, mx::StreamOrDevice s);

// Parts of any array, each a shape and its first element: at once where the array is available.
// They are apart if they would keep much that is not theirs. Throws std::invalid_argument when one
// does not lie within the array.
std::vector<mx::array> parts_of(
    const mx::array& flat,
    const std::vector<std::pair<mx::Shape, size_t>>& parts,
    mx::StreamOrDevice s);

class View : public UpdatePrimitive {
 public:
  // Makes views number `first` to `first + count - 1` of the specs.
  View(mx::Stream stream, ViewSpecs specs, size_t first, size_t count)
      : UpdatePrimitive(stream, {}), specs_(std::move(specs)), first_(first), count_(count) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  DEFINE_NAME(FlatstepView)
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

  // An output that is apart, by its number, and its part of the flat array.
  struct Copy {
    size_t output;
    mx::array part;
  };

  // Gives each output its memory. Returns what is to be copied.
  std::vector<Copy> place_outputs(const mx::array& flat, std::vector<mx::array>& outputs) const;

 private:
  const ViewSpec& spec(size_t i) const {
    return (*specs_)[first_ + i];
  }

  ViewSpecs specs_;
  size_t first_;
  size_t count_;
};

}  // namespace flatstep
