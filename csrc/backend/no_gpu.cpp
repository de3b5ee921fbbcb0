// The GPU backend of a build that has none: a clear error.
#include <stdexcept>

#include "backend/backend.h"

namespace flatstep {

void require_backend(mx::Device device) {
  if (device == mx::Device::gpu) {
    throw std::invalid_argument(
        "[flatstep] this build has no GPU backend: update on the CPU, with "
        "mx.set_default_device(mx.cpu) or inside `with mx.stream(mx.cpu):`.");
  }
}

const char* gpu_backend_name() {
  return nullptr;
}

void FusedUpdate::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  require_backend(mx::Device::gpu);
}

void SquaredNorm::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  require_backend(mx::Device::gpu);
}

void Advance::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  require_backend(mx::Device::gpu);
}

void View::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  require_backend(mx::Device::gpu);
}

}  // namespace flatstep
