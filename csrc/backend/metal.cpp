// The GPU backend for Apple's Metal: which kernels a step of a bucket dispatches, on what.
//
// Parameters and state are flat, so each is one buffer; gradients, and parameters that do not lie
// flat yet, are bound some twenty to a dispatch. Dispatches write disjoint parts of the flat
// arrays, so they stand in one concurrent block, where MLX puts no barrier between them.
#include <algorithm>
#include <string>

#include "allocate.h"
#include "backend/backend.h"
#include "backend/metal_dispatch.h"
#include "backend/metal_source.h"
#include "mlx/backend/metal/device.h"

namespace flatstep {

namespace {

namespace metal = mx::metal;

// ---- Kernels: compiled when first asked for, and kept by MLX. ----

std::string metal_type(mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float16:
      return "half";
    case mx::Dtype::Val::bfloat16:
      return "bfloat";
    default:
      return "float";
  }
}

std::string metal_rule(const Rule& rule) {
  if (rule.kind == RuleKind::adam) {
    return "Adam";
  }
  auto text = [](bool x) { return std::string(x ? "true" : "false"); };
  return "Sgd<" + text(rule.has_weight_decay) + ", " + text(rule.has_momentum) + ", " +
         text(rule.values.nesterov) + ">";
}

MTL::ComputePipelineState* update_kernel(
    metal::Device& device,
    const std::string& rule,
    const std::vector<mx::Dtype>& dtypes,  // of p, m and v
    bool has_tiles) {
  std::string arguments = rule;
  for (mx::Dtype dtype : dtypes) {
    arguments += ", " + metal_type(dtype);
  }
  arguments += has_tiles ? ", true" : ", false";
  auto* library = device.get_library("flatstep update " + arguments, [&arguments] {
    return kMetalSource + ("FLATSTEP_INSTANTIATE(\"update\", " + arguments + ")\n");
  });
  return device.get_kernel("update", library);
}

MTL::ComputePipelineState* advance_kernel(metal::Device& device) {
  auto* library = device.get_library("flatstep advance", [] { return std::string(kMetalSource); });
  return device.get_kernel("advance", library);
}

MTL::Size threads_for(MTL::ComputePipelineState* kernel) {
  size_t most = kernel->maxTotalThreadsPerThreadgroup();
  return MTL::Size(std::min<size_t>(most, FLATSTEP_THREADS), 1, 1);
}

// ---- A dispatch. ----

// The flat arrays that the update kernel works on. Those that a rule does not have are null.
struct FlatBuffers {
  const mx::array* p_in;
  mx::array* p_out;
  mx::array* m{nullptr};
  mx::array* v{nullptr};
  const mx::array* step{nullptr};
  const mx::array* learning_rate{nullptr};
};

// Every index that a kernel declares is bound; this takes the place of what it will not look at.
void bind_spare(metal::CommandEncoder& encoder, const FlatBuffers& flat, int index) {
  encoder.set_output_array(*flat.p_out, index);
}

void bind_input(
    metal::CommandEncoder& encoder, const FlatBuffers& flat, const mx::array* a, int index) {
  if (a) {
    encoder.set_input_array(*a, index);
  } else {
    bind_spare(encoder, flat, index);
  }
}

void bind_output(metal::CommandEncoder& encoder, const FlatBuffers& flat, mx::array* a, int index) {
  if (a) {
    encoder.set_output_array(*a, index);
  } else {
    bind_spare(encoder, flat, index);
  }
}

void encode(
    metal::CommandEncoder& encoder,
    MTL::ComputePipelineState* kernel,
    const FlatBuffers& flat,
    const StepArguments& arguments,
    const Dispatch& dispatch) {
  encoder.set_compute_pipeline_state(kernel);
  bind_input(encoder, flat, flat.p_in, FLATSTEP_P_IN);
  bind_output(encoder, flat, flat.p_out, FLATSTEP_P_OUT);
  bind_output(encoder, flat, flat.m, FLATSTEP_M);
  bind_output(encoder, flat, flat.v, FLATSTEP_V);
  bind_input(encoder, flat, flat.step, FLATSTEP_STEP);
  bind_input(encoder, flat, flat.learning_rate, FLATSTEP_LEARNING_RATE);
  encoder.set_bytes(arguments, FLATSTEP_CONSTANTS);
  encoder.set_bytes(dispatch.arguments, FLATSTEP_DISPATCH);
  encoder.set_vector_bytes(dispatch.segments, FLATSTEP_SEGMENTS);
  encoder.set_vector_bytes(dispatch.dimensions, FLATSTEP_DIMENSIONS);
  for (size_t k = 0; k < FLATSTEP_MAX_SOURCES; ++k) {
    int index = FLATSTEP_FIRST_SOURCE + static_cast<int>(k);
    bind_input(encoder, flat, k < dispatch.sources.size() ? dispatch.sources[k] : nullptr, index);
  }
  encoder.dispatch_threadgroups(MTL::Size(dispatch.num_groups, 1, 1), threads_for(kernel));
}

// ---- A step of a bucket. ----

// The dispatches over one list of sources, with their kernels compiled.
class Pass {
 public:
  Pass(
      metal::Device& device,
      const std::string& rule,
      const std::vector<mx::Dtype>& dtypes,  // of p, m and v
      const std::vector<Source>& sources)
      : dispatches_(make_dispatches(sources)) {
    for (const Dispatch& dispatch : dispatches_) {
      auto*& kernel = kernels_[dispatch.has_tiles];
      if (!kernel) {
        kernel = update_kernel(device, rule, dtypes, dispatch.has_tiles);
      }
    }
  }

  void encode_all(
      metal::CommandEncoder& encoder,
      const FlatBuffers& flat,
      const StepArguments& arguments) const {
    auto concurrent = encoder.start_concurrent();
    for (const Dispatch& dispatch : dispatches_) {
      encode(encoder, kernels_[dispatch.has_tiles], flat, arguments, dispatch);
    }
  }

 private:
  std::vector<Dispatch> dispatches_;
  MTL::ComputePipelineState* kernels_[2]{};  // without and with tiles
};

// Writes arrays that lie apart, or do not start where a flat array may, into a flat one.
class Copy {
 public:
  Copy(metal::Device& device, const std::vector<Source>& sources, mx::array& out)
      : pass_(device, "Copy", {out.dtype(), mx::float32, mx::float32}, sources), out_(out) {
  }

  void encode(metal::CommandEncoder& encoder) const {
    StepArguments arguments{};
    arguments.schedule.num_pieces = 1;  // a constant, so that no learning rate is read
    pass_.encode_all(encoder, FlatBuffers{nullptr, &out_}, arguments);
  }

 private:
  Pass pass_;
  mx::array& out_;
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
        pass_(
            device_,
            metal_rule(update.rule()),
            stored_dtypes(),
            leaves(update.first_gradient_operand(), [](size_t) { return false; })) {
  }

  // Called once the outputs have their memory.
  void run(bool p_in_place) {
    std::vector<Copy> copies = make_copies(p_in_place);
    auto& encoder = metal::get_command_encoder(update_.stream());
    for (const Copy& copy : copies) {
      copy.encode(encoder);
    }
    encode_update(encoder);
  }

 private:
  std::vector<Copy> make_copies(bool p_in_place) {
    std::vector<Copy> copies;
    for (size_t k = 0; k < update_.num_slots(); ++k) {
      const mx::array& state = operand(update_.first_state_operand() + k);
      mx::array& out = outputs_[1 + k];
      if (out.data_shared_ptr() != state.data_shared_ptr()) {
        // Whole, gaps and leaves without a gradient included.
        copies.emplace_back(device_, std::vector<Source>{{&state, out.size(), 0, 0}}, out);
      }
    }
    p_in_ = &operand(update_.first_parameter_operand());
    if (update_.has_flat_parameters()) {
      return copies;
    }
    Home home(*update_.plan_ptr(), p_in_);
    if (!home.has_all()) {
      // Those that lie in what is written in place are where they belong.
      auto is_there = [&](size_t i) { return p_in_place && home.has(i); };
      auto sources = leaves(update_.first_parameter_operand(), is_there);
      copies.emplace_back(device_, sources, outputs_[0]);
      p_in_ = &outputs_[0];
    }
    return copies;
  }

  void encode_update(metal::CommandEncoder& encoder) {
    FlatBuffers flat{p_in_, &outputs_[0]};
    flat.m = update_.num_slots() == 2 ? &outputs_[1] : nullptr;
    flat.v = update_.num_slots() > 0 ? &outputs_.back() : nullptr;
    flat.step = update_.reads_step() ? &operand(0) : nullptr;
    flat.learning_rate = update_.schedule() ? nullptr : &operand(update_.learning_rate_operand());

    StepArguments arguments{};
    arguments.hyperparameters = update_.rule().values;
    arguments.reads_step = update_.reads_step();
    arguments.p_in_place = p_in_->buffer().ptr() == outputs_[0].buffer().ptr();
    if (update_.schedule()) {
      arguments.schedule = *update_.schedule();
    }
    pass_.encode_all(encoder, flat, arguments);
  }

  const mx::array& operand(size_t i) const {
    return update_.operand(inputs_, i);
  }

  // The operands from `first` on, an array for each segment that is not to be skipped.
  template <typename Skip>
  std::vector<Source> leaves(size_t first, Skip&& skip) const {
    std::vector<Source> sources;
    for (size_t i = 0; i < update_.num_segments(); ++i) {
      const Segment& s = update_.plan_ptr()->segments[i];
      if (!skip(i)) {
        sources.push_back({&operand(first + i), s.size, s.p_offset, s.state_offset});
      }
    }
    return sources;
  }

  // Of p, m and v; a rule without one of these has no loads of it.
  std::vector<mx::Dtype> stored_dtypes() const {
    mx::Dtype m = update_.num_slots() == 2 ? outputs_[1].dtype() : mx::float32;
    mx::Dtype v = update_.num_slots() > 0 ? outputs_.back().dtype() : mx::float32;
    return {outputs_[0].dtype(), m, v};
  }

  FusedUpdate& update_;
  const std::vector<mx::array>& inputs_;
  std::vector<mx::array>& outputs_;
  metal::Device& device_;
  Pass pass_;
  const mx::array* p_in_{nullptr};
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
  for (auto& [i, part] : place_outputs(inputs[0], outputs)) {
    flatstep::Copy copy(device, {{&part, outputs[i].size(), 0, 0}}, outputs[i]);
    copy.encode(metal::get_command_encoder(stream()));
  }
}

void Advance::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto* kernel = advance_kernel(metal::device(stream().device));
  allocate_all(outputs);
  auto& encoder = metal::get_command_encoder(stream());
  encoder.set_compute_pipeline_state(kernel);
  encoder.set_input_array(inputs[0], 0);
  encoder.set_output_array(outputs[0], 1);
  encoder.set_output_array(outputs.back(), 2);
  encoder.set_bytes(schedule() ? *schedule() : Schedule{}, 3);
  encoder.dispatch_threads(MTL::Size(1, 1, 1), MTL::Size(1, 1, 1));
}

}  // namespace flatstep
