// What Python sees of a step: its settings, the step itself, and what stands beside it.
#pragma once

#include <nanobind/nanobind.h>

namespace flatstep {

void bind_steps(nanobind::module_& m);

}  // namespace flatstep
