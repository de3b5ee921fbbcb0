// The GPU backend for Apple's Metal: which kernels a step of a bucket dispatches, on what.
//
// Parameters and state are flat, so each is one buffer. Flat gradients are one too; others, and
// parameters that do not lie flat yet, are bound some twenty to a dispatch. Dispatches write
// disjoint parts of the flat arrays, so they stand in one concurrent block, where MLX puts no
// barrier between them.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "allocate.h"
#include "backend/backend.h"
#include "backend/metal_dispatch.h"
#include "mlx/backend/metal/device.h"

namespace flatstep {

namespace {

namespace metal = mx::metal;

// ---- Kernels: compiled when first asked for, and kept by MLX. ----

static_assert(FLATSTEP_STATE + kMaxStates == FLATSTEP_CONSTANTS);
static_assert(sizeof(Constants) == FLATSTEP_RULE_WORDS * sizeof(uint32_t));
static_assert(sizeof(Hyperparameters) == FLATSTEP_HYPERPARAMETER_WORDS * sizeof(uint32_t));

MTL::ComputePipelineState* kernel_for(
    metal::Device& device, const std::string& function, const std::string& arguments) {
  std::string instance = function + ", " + arguments;
  auto* library = device.get_library("flatstep " + instance, [&] {
    return kMetalSource + ("FLATSTEP_INSTANTIATE(\"" + function + "\", " + instance + ")\n");
  });
  return device.get_kernel(function, library);
}

// A rule's name, and the storages of p and the state.
struct Instance {
  std::string rule;
  std::vector<Storage> storages;

  bool has_blocks() const {
    return std::any_of(storages.begin(), storages.end(), [](Storage storage) {
      return traits_of(storage).is_codes || traits_of(storage).rest_bytes > 0;
    });
  }
};

MTL::ComputePipelineState* update_kernel(
    metal::Device& device, const Instance& instance, bool has_tiles) {
  std::string arguments = instance.rule + (has_tiles ? ", true" : ", false");
  for (size_t k = 0; k <= kMaxStates; ++k) {
    // What a rule does not have is never looked at.
    Storage storage = k < instance.storages.size() ? instance.storages[k] : Storage::Float32;
    arguments += std::string(", ") + traits_of(storage).type;
  }
  return kernel_for(device, "update", arguments);
}

// ---- A dispatch. ----

// The arrays that the update kernel works on besides the sources. Those that a rule does not have
// are null.
struct FlatBuffers {
  const mx::array* p_in{nullptr};
  mx::array* p_out{nullptr};
  mx::array* state[kMaxStates]{};
  const mx::array* constants{nullptr};
};

void encode_dispatch(
    metal::CommandEncoder& encoder,
    MTL::ComputePipelineState* kernel,
    const FlatBuffers& flat,
    const Dispatch& dispatch) {
  // Every index that a kernel declares is bound; the parameters take the place of what it will not
  // look at.
  auto bind_input = [&](const mx::array* a, int index) {
    encoder.set_input_array(a ? *a : *flat.p_out, index);
  };
  encoder.set_compute_pipeline_state(kernel);
  bind_input(flat.p_in, FLATSTEP_P_IN);
  encoder.set_output_array(*flat.p_out, FLATSTEP_P_OUT);
  for (size_t k = 0; k < kMaxStates; ++k) {
    mx::array* state = flat.state[k];
    encoder.set_output_array(state ? *state : *flat.p_out, FLATSTEP_STATE + static_cast<int>(k));
  }
  bind_input(flat.constants, FLATSTEP_CONSTANTS);
  encoder.set_bytes(dispatch.arguments, FLATSTEP_DISPATCH);
  encoder.set_vector_bytes(dispatch.segments, FLATSTEP_SEGMENTS);
  encoder.set_vector_bytes(dispatch.dimensions, FLATSTEP_DIMENSIONS);
  for (size_t k = 0; k < FLATSTEP_MAX_SOURCES; ++k) {
    int index = FLATSTEP_FIRST_SOURCE + static_cast<int>(k);
    bind_input(k < dispatch.sources.size() ? dispatch.sources[k] : nullptr, index);
  }
  // Whole SIMD-groups, so that all lanes of a block are there.
  size_t threads = std::min<size_t>(kernel->maxTotalThreadsPerThreadgroup(), FLATSTEP_THREADS);
  threads -= threads % FLATSTEP_SIMD_WIDTH;
  encoder.dispatch_threadgroups(MTL::Size(dispatch.num_groups, 1, 1), MTL::Size(threads, 1, 1));
}

// ---- A step of a bucket. ----

// The dispatches over one list of sources, with their kernels compiled.
class Pass {
 public:
  Pass(metal::Device& device, const Instance& instance, const std::vector<Source>& sources)
      : dispatches_(make_dispatches(sources, instance.has_blocks())) {
    for (const Dispatch& dispatch : dispatches_) {
      auto*& kernel = kernels_[dispatch.has_tiles];
      if (!kernel) {
        kernel = update_kernel(device, instance, dispatch.has_tiles);
      }
    }
  }

  void encode(metal::CommandEncoder& encoder) {
    auto concurrent = encoder.start_concurrent();
    for (Dispatch& dispatch : dispatches_) {
      dispatch.arguments.p_in_place =
          flat.p_in && flat.p_in->buffer().ptr() == flat.p_out->buffer().ptr();
      encode_dispatch(encoder, kernels_[dispatch.has_tiles], flat, dispatch);
    }
  }

  FlatBuffers flat{};

 private:
  std::vector<Dispatch> dispatches_;
  MTL::ComputePipelineState* kernels_[2]{};  // without and with tiles
};

// Writes arrays that lie apart, or do not start where a flat array may, into a flat one.
Pass make_copy(metal::Device& device, const std::vector<Source>& sources, mx::array& out) {
  Pass copy(device, {"Copy", {storage_of(out.dtype())}}, sources);
  copy.flat.p_out = &out;
  return copy;
}

// The same of blocks, which lie in one piece, or are still what `init` makes: one zero.
class BlocksCopy {
 public:
  BlocksCopy(metal::Device& device, const mx::array& from, mx::array& to) : from_(&from), to_(&to) {
    bool is_one = from.size() > 1 && from.data_size() == 1;
    if (!is_one && !from.flags().row_contiguous) {
      throw std::runtime_error("[flatstep] an array of blocks of the state is not contiguous.");
    }
    bool has_words =
        !is_one && from.offset() % sizeof(uint32_t) == 0 && to.nbytes() % sizeof(uint32_t) == 0;
    arguments_.size = to.nbytes() / (has_words ? sizeof(uint32_t) : 1);
    arguments_.stride = is_one ? 0 : 1;
    kernel_ = kernel_for(device, "copy", has_words ? "uint32_t" : "uint8_t");
  }

  void encode(metal::CommandEncoder& encoder) {
    encoder.set_compute_pipeline_state(kernel_);
    encoder.set_input_array(*from_, FLATSTEP_COPY_FROM);
    encoder.set_output_array(*to_, FLATSTEP_COPY_TO);
    encoder.set_bytes(arguments_, FLATSTEP_COPY_ARGUMENTS);
    size_t group = std::min<size_t>(kernel_->maxTotalThreadsPerThreadgroup(), FLATSTEP_THREADS);
    size_t threads = std::clamp<size_t>(arguments_.size, 1, kMaxThreads);
    encoder.dispatch_threads(MTL::Size(threads, 1, 1), MTL::Size(std::min(group, threads), 1, 1));
  }

 private:
  static constexpr size_t kMaxThreads = size_t(1) << 20;

  const mx::array* from_;
  mx::array* to_;
  CopyArguments arguments_{};
  MTL::ComputePipelineState* kernel_;
};

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
        pass_(device_, instance(), leaves(Operand::gradients, update.has_flat_gradients())) {
  }

  // Called once the outputs have their memory.
  void run(bool p_in_place) {
    std::vector<BlocksCopy> blocks;
    std::vector<Pass> passes = make_copies(p_in_place, blocks);
    pass_.flat.p_out = &outputs_[0];
    for (size_t k = 0; k < update_.num_state_arrays(); ++k) {
      pass_.flat.state[k] = &outputs_[1 + k];
    }
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
    return result;
  }

  std::vector<Pass> make_copies(bool p_in_place, std::vector<BlocksCopy>& blocks) {
    std::vector<Pass> copies;
    for (size_t k = 0; k < update_.num_state_arrays(); ++k) {
      const mx::array* state = operand(state_operand(k));
      mx::array& out = outputs_[1 + k];
      if (out.data_shared_ptr() == state->data_shared_ptr()) {
        continue;
      }
      // Whole, gaps and leaves without a gradient included.
      if (out.dtype() == mx::uint8) {
        blocks.emplace_back(device_, *state, out);
      } else {
        copies.push_back(make_copy(device_, {{.array = state, .size = out.size()}}, out));
      }
    }
    pass_.flat.p_in = operand(Operand::parameters);
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
  const auto& groups = rule().groups();
  if (groups.size() * sizeof(Hyperparameters) > 4096) {  // what Metal's setBytes takes
    throw std::runtime_error("[flatstep] too many groups of parameters for the GPU.");
  }
  auto* kernel = kernel_for(metal::device(stream().device), "advance", rule().traits().type);
  allocate_all(outputs);
  auto& encoder = metal::get_command_encoder(stream());
  encoder.set_compute_pipeline_state(kernel);
  encoder.set_input_array(inputs[0], FLATSTEP_ADVANCE_STEP);
  encoder.set_output_array(outputs[0], FLATSTEP_ADVANCE_NEXT_STEP);
  if (schedule()) {
    encoder.set_output_array(outputs[1], FLATSTEP_ADVANCE_LEARNING_RATE);
  } else {
    encoder.set_input_array(inputs[1], FLATSTEP_ADVANCE_LEARNING_RATE);
  }
  encoder.set_output_array(outputs.back(), FLATSTEP_ADVANCE_CONSTANTS);
  encoder.set_bytes(schedule() ? *schedule() : Schedule{}, FLATSTEP_ADVANCE_SCHEDULE);
  encoder.set_vector_bytes(groups, FLATSTEP_ADVANCE_HYPERPARAMETERS);
  encoder.set_bytes(seed(), FLATSTEP_ADVANCE_SEED);
  MTL::Size threads(groups.size(), 1, 1);
  encoder.dispatch_threads(threads, threads);
}

}  // namespace flatstep
