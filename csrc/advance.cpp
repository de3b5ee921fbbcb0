#include "advance.h"

#include "backend/backend.h"

namespace flatstep {

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

}  // namespace flatstep
