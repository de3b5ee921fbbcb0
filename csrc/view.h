// Leaves as views of a flat array: no copy, no work, only descriptors.
#pragma once

#include <vector>

#include "mlx/primitives.h"
#include "mlx/utils.h"
#include "transforms.h"

namespace flatstep {

namespace mx = mlx::core;

struct ViewSpec {
  mx::Shape shape;
  size_t offset;  // in elements from the start of the flat array
};

// Each node makes a few of them. More to a node means fewer nodes, but MLX keeps a list of
// siblings in every output, so the bookkeeping grows with the square.
inline constexpr size_t kViewsPerNode = 4;

// The parts of `flat` that `specs` name, row-contiguous, sharing its memory.
// Throws std::invalid_argument when a part does not lie within the array.
std::vector<mx::array> views(
    const mx::array& flat, std::vector<ViewSpec> specs, mx::StreamOrDevice s = {});

class View : public mx::Primitive {
 public:
  View(mx::Stream stream, std::vector<ViewSpec> specs)
      : mx::Primitive(stream), specs_(std::move(specs)) {
  }

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  FLATSTEP_REFUSE_TRANSFORMS()

  const char* name() const override {
    return "FlatstepView";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

  const std::vector<ViewSpec>& specs() const {
    return specs_;
  }

 private:
  void eval(const mx::array& flat, std::vector<mx::array>& outputs);

  std::vector<ViewSpec> specs_;
};

}  // namespace flatstep
