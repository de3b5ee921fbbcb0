// The time that memory allows: what every benchmark is compared with.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace flatstep {

// Reads p, g and each state array once and writes p and state once, all float32, evaluated, and of
// one size. Runs at once, in place, on all threads; the sums keep the compiler from leaving a read
// out. The arrays' values are spoilt.
void floor_pass(
    mlx::core::array& p, const mlx::core::array& g, std::vector<mlx::core::array>& state);

}  // namespace flatstep
