// How MLX's evaluator enters the CPU backend.
#include "backend/backend.h"

namespace flatstep {

bool holds_operands(mx::Device device) {
  return device == mx::Device::cpu;
}

void FusedUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  cpu_fused_update(*this, inputs, outputs);
}

void Advance::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  cpu_advance(*this, inputs, outputs);
}

}  // namespace flatstep
