// The GPU backend's small nodes: the count of steps with the constants, and leaves as views.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#include "allocate.h"
#include "backend/backend.h"
#include "backend/metal_kernels.h"

namespace flatstep {

namespace {

static_assert(sizeof(GroupArguments::hyperparameters) == sizeof(Hyperparameters));

// Of each group its arguments, then the schedules that are a group's own.
std::vector<uint32_t> group_table(const Rule& rule) {
  constexpr size_t kWords = sizeof(GroupArguments) / sizeof(uint32_t);
  std::vector<uint32_t> words(rule.groups().size() * kWords);
  for (size_t g = 0; g < rule.groups().size(); ++g) {
    const ParameterGroup& group = rule.groups()[g];
    GroupArguments arguments{};
    arguments.source = group.source;
    arguments.scale = group.scale;
    std::memcpy(arguments.hyperparameters, &group.hyperparameters, sizeof(Hyperparameters));
    if (group.schedule) {
      size_t pieces = static_cast<size_t>(group.schedule->num_pieces);
      size_t bytes = offsetof(Schedule, pieces) + pieces * sizeof(SchedulePiece);
      arguments.schedule = static_cast<uint32_t>(words.size());
      words.resize(words.size() + bytes / sizeof(uint32_t));
      std::memcpy(&words[arguments.schedule], group.schedule.get(), bytes);
    }
    std::memcpy(&words[g * kWords], &arguments, sizeof(arguments));
  }
  return words;
}

}  // namespace

void View::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto& device = metal::device(stream().device);
  auto& encoder = metal::get_command_encoder(stream());
  for (auto& [i, part] : place_outputs(inputs[0], outputs)) {
    if (part.dtype() == mx::uint8) {
      BlocksCopy(device, part, outputs[i]).encode(encoder);
    } else {
      make_copy(device, {{.array = &part, .size = outputs[i].size()}}, outputs[i]).encode(encoder);
    }
  }
}

void Advance::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto* kernel = kernel_for(metal::device(stream().device), "advance", rule().traits().type);
  allocate_all(outputs);
  mx::array& constants = outputs.back();
  auto& encoder = metal::get_command_encoder(stream());
  encoder.set_compute_pipeline_state(kernel);
  AdvanceArguments arguments{settings(), 0, 0};
  for (int k = 0; k < NUM_STEP_SCALARS; ++k) {
    // An array of no rates has no memory.
    auto place = read()[k];
    bool is_read = place && inputs[*place].size() > 0;
    encoder.set_input_array(is_read ? inputs[*place] : constants, k);
    arguments.read |= static_cast<uint32_t>(is_read) << k;
    place = written()[k];
    bool is_written = place && outputs[*place].size() > 0;
    encoder.set_output_array(
        is_written ? outputs[*place] : constants, FLATSTEP_ADVANCE_WRITTEN + k);
    arguments.written |= static_cast<uint32_t>(is_written) << k;
  }
  encoder.set_output_array(constants, FLATSTEP_ADVANCE_CONSTANTS);
  encoder.set_bytes(arguments, FLATSTEP_ADVANCE_ARGUMENTS);
  encoder.set_bytes(schedule() ? *schedule() : Schedule{}, FLATSTEP_ADVANCE_SCHEDULE);
  std::vector<uint32_t> groups = group_table(rule());
  if (groups.size() * sizeof(uint32_t) <= kMaxBytes) {
    encoder.set_vector_bytes(groups, FLATSTEP_ADVANCE_GROUPS);
  } else {
    mx::array table(groups.data(), {static_cast<int>(groups.size())}, mx::uint32);
    encoder.set_input_array(table, FLATSTEP_ADVANCE_GROUPS);
    encoder.add_temporary(std::move(table));
  }
  size_t threads = rule().groups().size();
  encoder.dispatch_threads(
      MTL::Size(threads, 1, 1), MTL::Size(std::min(threads, threads_of(kernel)), 1, 1));
}

}  // namespace flatstep
