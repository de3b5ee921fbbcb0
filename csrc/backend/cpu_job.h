// All that a task needs which updates a bucket on the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "backend/cpu_arrays.h"
#include "fused_update.h"
#include "mlx/stream.h"

namespace flatstep {

struct State {
  State(const mx::array& a, mx::array& written, Storage storage, Extent extent)
      : in(a, storage, extent),
        out(written, storage, extent, a.data_shared_ptr() == written.data_shared_ptr()) {
  }

  Input in;
  Output out;
};

// All that a task needs. MLX keeps the memory of the node's inputs until it has run.
struct Job {
  Job(FusedUpdate& update,
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      bool p_in_place)
      : held(update.operands().held()),
        plan(update.plan_ptr()),
        rule(update.rule().index()),
        is_accumulation(update.is_accumulation()),
        p_out(outputs[0], update.p_storage(), extent_of(update.p_storage()), p_in_place),
        stream(update.stream()) {
    const Operands& operands = update.operands();
    auto operand = [&](Operand which) { return operands.get(which, inputs); };
    // The leaves, or the parts of a flat array, that the segments name.
    auto add_inputs = [&](std::vector<Input>& to,
                          const mx::array* arrays,
                          bool is_flat,
                          std::optional<Storage> stored_as = {}) {
      to.reserve(plan->segments.size());
      for (const Segment& segment : plan->segments) {
        const mx::array& a = is_flat ? *arrays : *arrays++;
        Storage storage = stored_as ? *stored_as : storage_of(a.dtype());
        to.emplace_back(a, storage, extent_of(storage), is_flat ? segment.p_offset : 0);
      }
    };
    constants = operand(Operand::constants)->data<uint32_t>();
    const mx::array* p = operand(Operand::parameters);
    if (is_accumulation) {
      parameters.emplace_back(*p, p_out.storage, extent_of(p_out.storage));
    } else {
      add_inputs(parameters, p, update.has_flat_parameters(), p_out.storage);
    }
    if (operands.has(Operand::gradients)) {
      add_inputs(gradients, operand(Operand::gradients), update.has_flat_gradients());
    }
    for (size_t k = 0; k < update.num_states(); ++k) {
      const mx::array& in = *operand(state_operand(k));
      Storage storage = update.state_storage(k, in);
      states.emplace_back(in, outputs[1 + k], storage, extent_of(storage));
      has_codes |= traits_of(storage).is_codes;
    }
    if (auto k = update.rests()) {
      Extent extent = extent_of_rests(p_out.storage);
      rests.emplace(*operand(state_operand(*k)), outputs[1 + *k], Storage::count, extent);
    }
    auto add_sum = [&](std::optional<State>& sum, std::optional<size_t> k) {
      if (k) {
        const mx::array& in = *operand(state_operand(*k));
        Storage storage = chance_storage(in.dtype());
        sum.emplace(in, outputs[1 + *k], storage, extent_of(storage));
      }
    };
    add_sum(ema, update.ema());
    add_sum(accumulated, update.accumulated());
  }

  // What a part of a segment ends at: this many elements from its start, or all.
  size_t unit() const {
    return has_codes || rests ? kBlock : 1;
  }
  // Calls with each array of the state.
  template <typename F>
  void for_states(F f) const {
    std::for_each(states.begin(), states.end(), f);
    for (const std::optional<State>* other : {&rests, &ema, &accumulated}) {
      if (*other) {
        f(**other);
      }
    }
  }
  bool is_in_place() const {
    bool result = p_out.in_place;
    for_states([&](const State& state) { result &= state.out.in_place; });
    return result;
  }
  // A segment's parameter, or the sum of all gradients.
  const Input& parameter(size_t segment) const {
    return parameters[is_accumulation ? 0 : segment];
  }
  // A segment's gradient, or the sum of all gradients.
  const Input& gradient(size_t segment) const {
    return gradients.empty() ? accumulated->in : gradients[segment];
  }

  std::shared_ptr<const std::vector<mx::array>> held;
  std::shared_ptr<const BucketPlan> plan;
  size_t rule;
  bool is_accumulation;
  const CpuLoops& loops{cpu_loops()};
  const uint32_t* constants;  // of each group
  std::vector<Input> parameters;
  std::vector<Input> gradients;  // none where their sum is there
  std::vector<State> states;
  std::optional<State> rests;  // of the parameters
  std::optional<State> ema;    // their average
  std::optional<State> accumulated;
  bool has_codes{false};
  Output p_out;
  mx::Stream stream;
  // The next job that the same thread queued on the stream, where that is ready: all that it reads,
  // besides this one's constants, was there when its graph was built, and it writes that memory.
  // Its task is queued behind this one's, so it outlives this one's.
  std::atomic<Job*> next{nullptr};
  // For the stream's thread:
  PassConstants pass{};
  bool has_run{false};
  size_t start{0};  // its first block, counted through the jobs that are done at once
};

}  // namespace flatstep
