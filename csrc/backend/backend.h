// What a backend offers. Which files implement it is decided by what is linked.
#pragma once

#include <vector>

#include "advance.h"
#include "fused_update.h"

namespace flatstep {

// Throws std::invalid_argument when this build can't run on `device`.
void require_backend(mx::Device device);

// Both find the outputs with their memory in place: an output that shares an input's memory is
// updated in place, any other is written afresh.
void cpu_fused_update(
    FusedUpdate& update, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);
void gpu_fused_update(
    FusedUpdate& update, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

// Both write the next step and, with a schedule, the learning rate, to outputs with fresh memory.
void cpu_advance(
    Advance& advance, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);
void gpu_advance(
    Advance& advance, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

}  // namespace flatstep
