#include "backend/metal_kernels.h"

#include <algorithm>
#include <stdexcept>

namespace flatstep {

namespace {

static_assert(FLATSTEP_STATE + kMaxStates == FLATSTEP_RESTS);
static_assert(FLATSTEP_EMA_KEY == 1 + kMaxStates);

MTL::ComputePipelineState* update_kernel(
    metal::Device& device, const Instance& instance, bool has_tiles) {
  std::string arguments = instance.rule + (has_tiles ? ", true" : ", false");
  for (size_t k = 0; k <= kMaxStates; ++k) {
    // What a rule does not have is never looked at.
    Storage storage = k < instance.storages.size() ? instance.storages[k] : Storage::Float32;
    arguments += std::string(", ") + traits_of(storage).type;
  }
  bool has_ema = instance.ema != Storage::count;
  return kernel_for(
      device, "update", arguments + ", " + (has_ema ? traits_of(instance.ema).type : "Absent"));
}

void encode_dispatch(
    metal::CommandEncoder& encoder,
    MTL::ComputePipelineState* kernel,
    const FlatBuffers& flat,
    const Dispatch& dispatch) {
  auto bind_input = [&](const mx::array* a, int index) {
    encoder.set_input_array(a ? *a : *flat.p_out, index);
  };
  auto bind_output = [&](mx::array* a, int index) {
    encoder.set_output_array(a ? *a : *flat.p_out, index);
  };
  encoder.set_compute_pipeline_state(kernel);
  bind_input(flat.p_in, FLATSTEP_P_IN);
  bind_output(flat.p_out, FLATSTEP_P_OUT);
  for (size_t k = 0; k < kMaxStates; ++k) {
    bind_output(flat.state[k], FLATSTEP_STATE + static_cast<int>(k));
  }
  bind_output(flat.rests, FLATSTEP_RESTS);
  bind_output(flat.ema, FLATSTEP_EMA);
  bind_output(flat.accumulated, FLATSTEP_ACCUMULATED);
  bind_input(flat.constants, FLATSTEP_CONSTANTS);
  bind_sources(encoder, dispatch, *flat.p_out);
  encoder.dispatch_threadgroups(
      MTL::Size(dispatch.num_groups, 1, 1), MTL::Size(threads_of(kernel), 1, 1));
}

}  // namespace

MTL::ComputePipelineState* kernel_for(
    metal::Device& device, const std::string& function, const std::string& arguments) {
  std::string instance = function + ", " + arguments;
  auto* library = device.get_library("flatstep " + instance, [&] {
    return kMetalSource + ("FLATSTEP_INSTANTIATE(\"" + function + "\", " + instance + ")\n");
  });
  return device.get_kernel(function, library);
}

size_t threads_of(MTL::ComputePipelineState* kernel) {
  size_t threads = std::min<size_t>(kernel->maxTotalThreadsPerThreadgroup(), FLATSTEP_THREADS);
  return threads - threads % FLATSTEP_SIMD_WIDTH;
}

void bind_sources(
    metal::CommandEncoder& encoder, const Dispatch& dispatch, const mx::array& spare) {
  encoder.set_bytes(dispatch.arguments, FLATSTEP_DISPATCH);
  encoder.set_vector_bytes(dispatch.segments, FLATSTEP_SEGMENTS);
  encoder.set_vector_bytes(dispatch.dimensions, FLATSTEP_DIMENSIONS);
  for (size_t k = 0; k < FLATSTEP_MAX_SOURCES; ++k) {
    const mx::array& source = k < dispatch.sources.size() ? *dispatch.sources[k] : spare;
    encoder.set_input_array(source, FLATSTEP_FIRST_SOURCE + static_cast<int>(k));
  }
}

bool Instance::has_blocks() const {
  return std::any_of(storages.begin(), storages.end(), [](Storage storage) {
    return traits_of(storage).is_codes || traits_of(storage).rest_bytes > 0;
  });
}

Pass::Pass(metal::Device& device, const Instance& instance, const std::vector<Source>& sources)
    : dispatches_(
          make_dispatches(sources, instance.has_blocks() ? Order::rows_in_blocks : Order::rows)) {
  for (const Dispatch& dispatch : dispatches_) {
    auto*& kernel = kernels_[dispatch.has_tiles];
    if (!kernel) {
      kernel = update_kernel(device, instance, dispatch.has_tiles);
    }
  }
}

void Pass::encode(metal::CommandEncoder& encoder) {
  auto concurrent = encoder.start_concurrent();
  for (Dispatch& dispatch : dispatches_) {
    dispatch.arguments.p_in_place =
        flat.p_in && flat.p_in->buffer().ptr() == flat.p_out->buffer().ptr();
    encode_dispatch(encoder, kernels_[dispatch.has_tiles], flat, dispatch);
  }
}

Pass make_copy(metal::Device& device, const std::vector<Source>& sources, mx::array& out) {
  Pass copy(device, {"Copy", {storage_of(out.dtype())}}, sources);
  copy.flat.p_out = &out;
  return copy;
}

BlocksCopy::BlocksCopy(metal::Device& device, const mx::array& from, mx::array& to)
    : from_(&from), to_(&to) {
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

void BlocksCopy::encode(metal::CommandEncoder& encoder) {
  constexpr size_t kMaxThreads = size_t(1) << 20;
  encoder.set_compute_pipeline_state(kernel_);
  encoder.set_input_array(*from_, FLATSTEP_COPY_FROM);
  encoder.set_output_array(*to_, FLATSTEP_COPY_TO);
  encoder.set_bytes(arguments_, FLATSTEP_COPY_ARGUMENTS);
  size_t group = std::min<size_t>(kernel_->maxTotalThreadsPerThreadgroup(), FLATSTEP_THREADS);
  size_t threads = std::clamp<size_t>(arguments_.size, 1, kMaxThreads);
  encoder.dispatch_threads(MTL::Size(threads, 1, 1), MTL::Size(std::min(group, threads), 1, 1));
}

}  // namespace flatstep
