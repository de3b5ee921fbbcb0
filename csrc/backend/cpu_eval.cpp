// How MLX's evaluator enters the CPU backend.
#include "allocate.h"
#include "backend/backend.h"
#include "mlx/stream.h"

namespace flatstep {

bool holds_operands(mx::Device device) {
  return device == mx::Device::cpu;
}

void FusedUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  // Work that is still queued holds the buffers that it reads, the backward pass's reads of the
  // weights above all. Waiting for it costs nothing: this step needs its gradients anyway.
  place_outputs(inputs, outputs, [this] { mx::synchronize(stream()); });
  cpu_fused_update(*this, inputs, outputs);
}

void Advance::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_all(outputs);
  cpu_advance(*this, inputs, outputs);
}

}  // namespace flatstep
