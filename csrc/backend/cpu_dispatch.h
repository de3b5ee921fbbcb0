// Which instruction set's loops run.
#pragma once

#include <string>
#include <vector>

#include "backend/cpu_loops.h"

namespace flatstep {

// The fastest that this processor has, unless `set_cpu_loops` chose another.
const CpuLoops& cpu_loops();

// Names of those that this processor can run, slowest first.
std::vector<std::string> available_cpu_loops();

// Throws std::invalid_argument for a name that is not available.
void set_cpu_loops(const std::string& name);

}  // namespace flatstep
