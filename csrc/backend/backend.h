// What a backend offers. Which files implement it is decided by what is linked.
//
// Besides what is declared here, cpu_eval.cpp defines the eval_cpu of FusedUpdate, SquaredNorm,
// Advance and View, and either metal.cpp or no_gpu.cpp their eval_gpu.
#pragma once

#include <vector>

#include "advance.h"
#include "fused_update.h"
#include "squared_norm.h"
#include "view.h"

namespace flatstep {

// Throws std::invalid_argument when this build can't run on `device`.
void require_backend(mx::Device device);

// Whether work on this device keeps the operands that its primitive holds until it has run. (MLX
// keeps only the inputs of a node.)
bool holds_operands(mx::Device device);

// Whether work on the CPU may wait for all that is queued on its stream. With a GPU in the machine
// that may itself wait for commands which MLX has not handed to the GPU yet, and never would.
bool may_wait_for_queue();

// The GPU backend of this build; null when it has none.
const char* gpu_backend_name();

// Evaluates an update on the CPU: gives the outputs their memory, in place where it may be, and
// writes them.
void cpu_fused_update(
    FusedUpdate& update, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

// Writes the sum of the squares of all gradients to fresh memory.
void cpu_squared_norm(
    SquaredNorm& norm, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

// Writes the constants of a step, and what it leaves besides arrays of elements, to fresh memory.
void cpu_advance(
    Advance& advance, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

// Makes the leaves: views of the flat array, and copies of those that are apart.
void cpu_view(View& view, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs);

}  // namespace flatstep
