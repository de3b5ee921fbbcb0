#include "advance.h"

#include "allocate.h"
#include "backend/backend.h"

namespace flatstep {

namespace {

void allocate_all(std::vector<mx::array>& outputs) {
  for (mx::array& out : outputs) {
    allocate(out);
  }
}

}  // namespace

NextStep advance(
    const mx::array& step, std::shared_ptr<const Schedule> schedule, mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  require_backend(stream.device);
  std::vector<mx::Dtype> dtypes{mx::uint64};
  if (schedule) {
    dtypes.push_back(mx::float32);
  }
  auto node = std::make_shared<Advance>(stream, std::move(schedule));
  auto outputs =
      mx::array::make_arrays(std::vector<mx::Shape>(dtypes.size()), dtypes, node, {step});
  NextStep next{std::move(outputs[0]), {}};
  if (outputs.size() > 1) {
    next.learning_rate = std::move(outputs[1]);
  }
  return next;
}

void Advance::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_all(outputs);
  cpu_advance(*this, inputs, outputs);
}

void Advance::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_all(outputs);
  gpu_advance(*this, inputs, outputs);
}

}  // namespace flatstep
