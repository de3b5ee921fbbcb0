// The CPU backend's small nodes: the count of steps, and leaves as views.
#include <cstring>

#include "allocate.h"
#include "backend/backend.h"
#include "mlx/backend/cpu/encoder.h"

namespace flatstep {

void cpu_view(View& view, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  struct Copy {
    std::shared_ptr<mx::array::Data> target;  // MLX keeps the memory of inputs only
    char* to;
    const char* from;
    size_t bytes;
  };
  std::vector<Copy> copies;
  for (auto& [i, part] : view.place_outputs(inputs[0], outputs)) {
    mx::array& out = outputs[i];
    copies.push_back({out.data_shared_ptr(), out.data<char>(), part.data<char>(), out.nbytes()});
  }
  if (!copies.empty()) {
    auto& encoder = mx::cpu::get_command_encoder(view.stream());
    encoder.dispatch([copies = std::move(copies)] {
      for (const Copy& copy : copies) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      }
    });
  }
}

void cpu_advance(
    Advance& advance, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_all(outputs);
  const uint64_t* step = inputs[0].data<uint64_t>();
  uint64_t* next = outputs[0].data<uint64_t>();
  auto schedule = advance.schedule();
  float* learning_rate = schedule ? outputs[1].data<float>() : nullptr;
  auto& encoder = mx::cpu::get_command_encoder(advance.stream());
  encoder.dispatch([step, next, schedule = std::move(schedule), learning_rate] {
    if (schedule) {
      *learning_rate = schedule_value(*schedule, *step);
    }
    *next = *step + 1;
  });
}

}  // namespace flatstep
