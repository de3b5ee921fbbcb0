#include "squared_norm.h"

#include <algorithm>
#include <limits>

#include "backend/backend.h"
#include "mlx/ops.h"

namespace flatstep {

namespace {

mx::array make(std::shared_ptr<SquaredNorm> node) {
  auto inputs = node->operands().take_inputs();
  return mx::array(mx::Shape{}, mx::float32, std::move(node), std::move(inputs));
}

}  // namespace

mx::array sum_of_squares(const BucketPlans& plans, const StepInputs& in) {
  size_t sums = StateLists(in.rule, in.settings).accumulated;
  bool are_summed = in.settings.pass.accumulate_steps > 0;
  std::vector<mx::array> arrays;
  std::vector<SquaredNorm::Part> parts;
  for (const auto& plan : plans) {
    if (are_summed) {
      arrays.push_back(in.state[sums].at(plan->bucket));
    }
    for (const Segment& segment : plan->segments) {
      if (are_summed) {
        parts.push_back({arrays.size() - 1, segment.state_offset, segment.size});
      } else {
        parts.push_back({arrays.size(), 0, segment.size});
        arrays.push_back(in.gradients[segment.position]);
      }
    }
  }
  return make(
      std::make_shared<SquaredNorm>(
          in.settings.pass,
          std::move(arrays),
          std::move(parts),
          in.scalars[SCALAR_grad_scale],
          in.scalars[SCALAR_accumulated],
          in.stream));
}

mx::array global_norm(const std::vector<mx::array>& arrays, mx::Stream stream) {
  require_backend(stream.device);
  PassSettings settings{};
  settings.clip_value = std::numeric_limits<float>::infinity();
  std::vector<SquaredNorm::Part> parts;
  for (size_t i = 0; i < arrays.size(); ++i) {
    storage_of(arrays[i].dtype());
    parts.push_back({i, 0, arrays[i].size()});
  }
  return mx::sqrt(
      make(
          std::make_shared<SquaredNorm>(
              settings, arrays, std::move(parts), std::nullopt, std::nullopt, stream)),
      stream);
}

SquaredNorm::SquaredNorm(
    const PassSettings& settings,
    std::vector<mx::array> arrays,
    std::vector<Part> parts,
    const std::optional<mx::array>& grad_scale,
    const std::optional<mx::array>& accumulated,
    mx::Stream stream)
    : UpdatePrimitive(stream, {{}}),
      settings_(settings),
      operands_(holds_operands(stream.device) && !is_tracing()),
      parts_(std::move(parts)) {
  // A sum of gradients that was held would not be updated in place.
  bool are_available = !accumulated && std::all_of(arrays.begin(), arrays.end(), [](const auto& a) {
    return a.is_available();
  });
  operands_.add(Operand::gradients, std::move(arrays), are_available);
  if (grad_scale) {
    operands_.add(Operand::grad_scale, *grad_scale);
  }
  if (accumulated) {
    operands_.add(Operand::accumulated, *accumulated);
  }
}

}  // namespace flatstep
