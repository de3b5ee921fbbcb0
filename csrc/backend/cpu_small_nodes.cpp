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

namespace {

// All that a task of Advance needs.
struct AdvanceTask {
  Rule rule;
  std::shared_ptr<const Schedule> schedule;
  PassSettings settings;
  std::array<const void*, NUM_STEP_SCALARS> read{};
  std::array<void*, NUM_STEP_SCALARS> written{};
  uint32_t* constants{nullptr};

  void run() const {
    StepScalars now{};
    now.grad_scale = 1.0f;
    get(SCALAR_step, now.step);
    get(SCALAR_learning_rate, now.learning_rate);
    get(SCALAR_grad_scale, now.grad_scale);
    get(SCALAR_sum_of_squares, now.sum_of_squares);
    get(SCALAR_grad_norm, now.grad_norm);
    get(SCALAR_skipped_steps, now.skipped_steps);
    get(SCALAR_accumulated, now.accumulated);
    PassConstants pass = prepare_pass(settings, now);
    bool is_taken = pass.action == ACTION_UPDATE;
    const auto* rates = static_cast<const float*>(read[SCALAR_group_learning_rates]);
    auto* next_rates = static_cast<float*>(written[SCALAR_group_learning_rates]);
    float rate_of_all = schedule ? schedule_value(*schedule, now.step) : now.learning_rate;
    for (size_t g = 0; g < rule.groups().size(); ++g) {
      const ParameterGroup& group = rule.groups()[g];
      float rate = group.source == RATE_OWN        ? rates[g - 1]
                   : group.source == RATE_SCHEDULE ? schedule_value(*group.schedule, now.step)
                                                   : rate_of_all;
      rate = rate_of_group(group.source, rate, group.scale);
      uint32_t* words = constants + g * FLATSTEP_GROUP_WORDS;
      std::memcpy(words, &pass, sizeof(pass));
      rule.traits().prepare(group.hyperparameters, rate, now.step, words + FLATSTEP_PASS_WORDS);
      if (g > 0) {
        next_rates[g - 1] = is_taken ? rate : rates[g - 1];
      }
    }
    StepScalars next = advanced(settings, now, pass);
    put(SCALAR_step, next.step);
    put(SCALAR_learning_rate, is_taken ? rate_of_all : now.learning_rate);
    put(SCALAR_grad_norm, next.grad_norm);
    put(SCALAR_skipped_steps, next.skipped_steps);
    put(SCALAR_accumulated, next.accumulated);
  }

  template <typename T>
  void get(StepScalar scalar, T& value) const {
    if (const void* from = read[scalar]) {
      std::memcpy(&value, from, sizeof(value));
    }
  }
  template <typename T>
  void put(StepScalar scalar, T value) const {
    if (void* to = written[scalar]) {
      std::memcpy(to, &value, sizeof(value));
    }
  }
};

}  // namespace

void cpu_advance(
    Advance& advance, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate_all(outputs);
  AdvanceTask task{advance.rule(), advance.schedule(), advance.settings()};
  for (size_t k = 0; k < NUM_STEP_SCALARS; ++k) {
    if (auto place = advance.read()[k]) {
      task.read[k] = inputs[*place].data<void>();
    }
    if (auto place = advance.written()[k]) {
      task.written[k] = outputs[*place].data<void>();
    }
  }
  task.constants = outputs.back().data<uint32_t>();
  auto& encoder = mx::cpu::get_command_encoder(advance.stream());
  encoder.dispatch([task = std::move(task)] { task.run(); });
}

}  // namespace flatstep
