// The GPU backend's sum of squares: dispatches over all gradients, each threadgroup with a sum of
// its own, then one threadgroup that adds those up.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "allocate.h"
#include "backend/backend.h"
#include "backend/metal_kernels.h"

namespace flatstep {

void SquaredNorm::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  const mx::array* arrays = operands_.get(Operand::gradients, inputs);
  std::vector<Source> sources;
  for (const Part& part : parts_) {
    sources.push_back({.array = arrays + part.array, .size = part.size, .p_offset = part.first});
  }
  std::vector<Dispatch> dispatches = make_dispatches(sources, Order::any);
  auto& device = metal::device(stream().device);
  std::string threads = std::to_string(FLATSTEP_THREADS);
  auto* sum_squares = kernel_for(device, "sum_squares", threads);
  auto* add_sums = kernel_for(device, "add_sums", threads);

  allocate_all(outputs);
  mx::array& result = outputs[0];
  NormArguments arguments{};
  arguments.settings = settings_;
  arguments.has_grad_scale = operands_.has(Operand::grad_scale);
  arguments.has_accumulated = operands_.has(Operand::accumulated);
  for (const Dispatch& dispatch : dispatches) {
    arguments.num_sums += static_cast<uint32_t>(dispatch.num_groups);
  }
  mx::array sums({static_cast<int>(std::max(arguments.num_sums, 1u))}, mx::float32, nullptr, {});
  allocate(sums);

  auto& encoder = metal::get_command_encoder(stream());
  auto bind = [&](MTL::ComputePipelineState* kernel) {
    auto scalar = [&](Operand which) -> const mx::array& {
      return operands_.has(which) ? *operands_.get(which, inputs) : result;
    };
    encoder.set_compute_pipeline_state(kernel);
    encoder.set_input_array(scalar(Operand::grad_scale), FLATSTEP_NORM_GRAD_SCALE);
    encoder.set_input_array(scalar(Operand::accumulated), FLATSTEP_NORM_ACCUMULATED);
    encoder.set_bytes(arguments, FLATSTEP_NORM_ARGUMENTS);
    return MTL::Size(threads_of(kernel), 1, 1);
  };
  {
    auto concurrent = encoder.start_concurrent();
    size_t first_sum = 0;
    for (const Dispatch& dispatch : dispatches) {
      MTL::Size group = bind(sum_squares);
      auto offset = static_cast<int64_t>(first_sum * sizeof(float));
      encoder.set_output_array(sums, FLATSTEP_NORM_SUMS, offset);
      bind_sources(encoder, dispatch, sums);
      encoder.dispatch_threadgroups(MTL::Size(dispatch.num_groups, 1, 1), group);
      first_sum += dispatch.num_groups;
    }
  }
  MTL::Size group = bind(add_sums);
  encoder.set_input_array(sums, FLATSTEP_NORM_SUMS);
  encoder.set_output_array(result, FLATSTEP_NORM_RESULT);
  encoder.dispatch_threadgroups(MTL::Size(1, 1, 1), group);
  encoder.add_temporary(std::move(sums));
}

}  // namespace flatstep
