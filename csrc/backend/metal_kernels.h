// The GPU kernels as the host asks for them: compiled when first needed, and kept by MLX; and the
// dispatches that bring arrays into flat memory, which several primitives need.
#pragma once

#include <string>
#include <vector>

#include "backend/metal_dispatch.h"
#include "mlx/backend/metal/device.h"
#include "tables.h"

namespace flatstep {

namespace metal = mx::metal;

// The kernel `function<arguments>`.
MTL::ComputePipelineState* kernel_for(
    metal::Device& device, const std::string& function, const std::string& arguments);

// Whole SIMD-groups, as many threads as a threadgroup may have of this kernel.
size_t threads_of(MTL::ComputePipelineState* kernel);

// The tables of a dispatch and its sources. Every index that a kernel declares is bound: `spare`
// takes the place of what it will not look at.
void bind_sources(metal::CommandEncoder& encoder, const Dispatch& dispatch, const mx::array& spare);

// Of an update: a rule's name, the storages of p and the state, and of the average of p, if any.
struct Instance {
  std::string rule;
  std::vector<Storage> storages;
  Storage ema{Storage::count};

  bool has_blocks() const;
};

// The arrays that the update kernel works on besides the sources; null where there is none.
struct FlatBuffers {
  const mx::array* p_in{nullptr};
  mx::array* p_out{nullptr};
  mx::array* state[kMaxStates]{};
  mx::array* rests{nullptr};
  mx::array* ema{nullptr};
  mx::array* accumulated{nullptr};
  const mx::array* constants{nullptr};
};

// The dispatches of an update over one list of sources, with their kernels compiled.
class Pass {
 public:
  Pass(metal::Device& device, const Instance& instance, const std::vector<Source>& sources);

  void encode(metal::CommandEncoder& encoder);

  FlatBuffers flat{};

 private:
  std::vector<Dispatch> dispatches_;
  MTL::ComputePipelineState* kernels_[2]{};  // without and with tiles
};

// Writes arrays that lie apart, or do not start where a flat array may, into a flat one.
Pass make_copy(metal::Device& device, const std::vector<Source>& sources, mx::array& out);

// The same of blocks, which lie in one piece, or are still what `init` makes: one zero.
class BlocksCopy {
 public:
  BlocksCopy(metal::Device& device, const mx::array& from, mx::array& to);

  void encode(metal::CommandEncoder& encoder);

 private:
  const mx::array* from_;
  mx::array* to_;
  CopyArguments arguments_{};
  MTL::ComputePipelineState* kernel_;
};

}  // namespace flatstep
