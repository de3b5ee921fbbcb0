// How MLX's evaluator enters the CPU backend.
#include "backend/backend.h"
#include "mlx/device.h"

namespace flatstep {

bool holds_operands(mx::Device device) {
  return device == mx::Device::cpu;
}

bool may_wait_for_queue() {
  return !mx::is_available(mx::Device::gpu);
}

void FusedUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  cpu_fused_update(*this, inputs, outputs);
}

void SquaredNorm::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  cpu_squared_norm(*this, inputs, outputs);
}

void Advance::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  cpu_advance(*this, inputs, outputs);
}

void View::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  cpu_view(*this, inputs, outputs);
}

}  // namespace flatstep
