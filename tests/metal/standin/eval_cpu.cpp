// In the place of csrc/backend/cpu_eval.cpp: updates on the CPU's streams take the GPU backend.
//
// What it encodes is run by a task of the stream, after all that was queued before, as a GPU would.
#include <chrono>
#include <thread>

#include "backend/backend.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/backend/metal/device.h"
#include "settings.h"
#include "standin.h"

namespace flatstep {

namespace {

template <typename Primitive>
void eval_as_gpu(
    Primitive& primitive, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  mx::Stream stream = primitive.stream();
  auto& recorded = mx::metal::get_command_encoder(stream).get_command_buffer()->encoder;
  recorded.take();  // what an error has left
  primitive.eval_gpu(inputs, outputs);
  std::vector<std::shared_ptr<mx::array::Data>> written;
  if (standin::settings().late > 0) {
    for (const mx::array& out : outputs) {
      written.push_back(out.data_shared_ptr());
    }
  }
  mx::cpu::get_command_encoder(stream).dispatch([commands = recorded.take(), written] {
    standin::run(commands);
    if (!written.empty()) {
      auto let_go = [written] {
        std::this_thread::sleep_for(std::chrono::microseconds(standin::settings().late));
      };
      std::thread(let_go).detach();
    }
  });
}

}  // namespace

bool holds_operands(mx::Device) {
  return !standin::settings().use_gpu;
}

bool may_wait_for_queue() {
  return !standin::settings().has_pending_gpu;
}

void FusedUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  if (standin::settings().use_gpu) {
    eval_as_gpu(*this, inputs, outputs);
    return;
  }
  cpu_fused_update(*this, inputs, outputs);
}

void SquaredNorm::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  if (standin::settings().use_gpu) {
    eval_as_gpu(*this, inputs, outputs);
    return;
  }
  cpu_squared_norm(*this, inputs, outputs);
}

void Advance::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  if (standin::settings().use_gpu) {
    eval_as_gpu(*this, inputs, outputs);
    return;
  }
  cpu_advance(*this, inputs, outputs);
}

void View::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  if (standin::settings().use_gpu) {
    eval_as_gpu(*this, inputs, outputs);
    return;
  }
  cpu_view(*this, inputs, outputs);
}

}  // namespace flatstep
