// The GPU backend for Apple's Metal: which kernels a step of a bucket dispatches, on what.
//
// Parameters and state are flat, so each is one buffer. Flat gradients are one too, and so are
// their sums; others, and parameters that do not lie flat yet, are bound some twenty to a dispatch.
// Dispatches write disjoint parts of the flat arrays, so they stand in one concurrent block, where
// MLX puts no barrier between them.
#include <optional>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/metal_kernels.h"

namespace flatstep {

namespace {

// One bucket's step on its way into the command buffer. All that can fail, a kernel that does not
// compile above all, is done before anything is encoded.
class UpdateEncoder {
 public:
  UpdateEncoder(
      FusedUpdate& update, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs)
      : update_(update),
        inputs_(inputs),
        outputs_(outputs),
        device_(metal::device(update.stream().device)),
        pass_(device_, instance(), gradients()) {
  }

  // Called once the outputs have their memory.
  void run(bool p_in_place) {
    std::vector<BlocksCopy> blocks;
    std::vector<Pass> passes = make_copies(p_in_place, blocks);
    pass_.flat.p_out = &outputs_[0];
    for (size_t k = 0; k < update_.num_states(); ++k) {
      pass_.flat.state[k] = &outputs_[1 + k];
    }
    auto flat_output = [&](std::optional<size_t> k) { return k ? &outputs_[1 + *k] : nullptr; };
    pass_.flat.rests = flat_output(update_.rests());
    pass_.flat.ema = flat_output(update_.ema());
    pass_.flat.accumulated = flat_output(update_.accumulated());
    pass_.flat.constants = operand(Operand::constants);
    passes.push_back(std::move(pass_));
    auto& encoder = metal::get_command_encoder(update_.stream());
    for (BlocksCopy& copy : blocks) {
      copy.encode(encoder);
    }
    for (Pass& pass : passes) {
      pass.encode(encoder);
    }
  }

 private:
  Instance instance() const {
    Instance result{update_.rule().traits().type, {update_.p_storage()}};
    for (size_t k = 0; k < update_.num_states(); ++k) {
      result.storages.push_back(update_.state_storage(k, outputs_[1 + k]));
    }
    if (auto k = update_.ema()) {
      result.ema = chance_storage(outputs_[1 + *k].dtype());
    }
    return result;
  }

  // Where they are summed up they lie as the state does.
  std::vector<Source> gradients() const {
    auto sum = update_.accumulated();
    if (!sum) {
      return leaves(Operand::gradients, update_.has_flat_gradients());
    }
    std::vector<Source> sources = leaves(state_operand(*sum), true);
    for (Source& source : sources) {
      source.is_sum = true;
    }
    return sources;
  }

  std::vector<Pass> make_copies(bool p_in_place, std::vector<BlocksCopy>& blocks) {
    std::vector<Pass> copies;
    // Whole, gaps and leaves without a gradient included.
    auto add = [&](const mx::array* in, mx::array& out) {
      if (out.data_shared_ptr() == in->data_shared_ptr()) {
        return;
      }
      if (out.dtype() == mx::uint8) {
        blocks.emplace_back(device_, *in, out);
      } else {
        copies.push_back(make_copy(device_, {{.array = in, .size = out.size()}}, out));
      }
    };
    for (size_t k = 0; k < update_.num_state_arrays(); ++k) {
      add(operand(state_operand(k)), outputs_[1 + k]);
    }
    pass_.flat.p_in = operand(Operand::parameters);
    if (update_.is_accumulation()) {
      add(pass_.flat.p_in, outputs_[0]);
      pass_.flat.p_in = &outputs_[0];
      return copies;
    }
    if (update_.has_flat_parameters()) {
      return copies;
    }
    Home home(*update_.plan_ptr(), pass_.flat.p_in);
    if (!home.has_all()) {
      // Those that lie in what is written in place are where they belong.
      auto apart = leaves(Operand::parameters, false, p_in_place ? &home : nullptr);
      copies.push_back(make_copy(device_, apart, outputs_[0]));
      pass_.flat.p_in = &outputs_[0];
    }
    return copies;
  }

  const mx::array* operand(Operand which) const {
    return update_.operands().get(which, inputs_);
  }

  // The segments' parts of an operand, an array for each or a flat one, besides those at home.
  std::vector<Source> leaves(Operand which, bool is_flat, const Home* home = nullptr) const {
    const mx::array* first = operand(which);
    std::vector<Source> sources;
    for (size_t i = 0; i < update_.num_segments(); ++i) {
      const Segment& s = update_.plan_ptr()->segments[i];
      if (!home || !home->has(i)) {
        const mx::array* array = is_flat ? first : first + i;
        size_t begin = is_flat ? s.p_offset : 0;
        sources.push_back({array, begin, s.size, s.p_offset, s.state_offset, s.group, s.name});
      }
    }
    return sources;
  }

  FusedUpdate& update_;
  const std::vector<mx::array>& inputs_;
  std::vector<mx::array>& outputs_;
  metal::Device& device_;
  Pass pass_;
};

}  // namespace

void require_backend(mx::Device) {
}

const char* gpu_backend_name() {
  return "metal";
}

void FusedUpdate::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  UpdateEncoder encoder(*this, inputs, outputs);
  // Never synchronise here: MLX's evaluator still holds the command buffer that it would end.
  // Parameters that queued work still reads go to fresh memory, which MLX's cache recycles.
  encoder.run(place_outputs(inputs, outputs, [] {}));
}

}  // namespace flatstep
