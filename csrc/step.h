// A whole optimizer step: all buckets of a tree.
#pragma once

#include <vector>

#include "fused_update.h"

namespace flatstep {

// The names of what a step reads and changes besides arrays of elements.
extern const char* const kScalarNames[NUM_STEP_SCALARS];

// The state has the layout's flat arrays; buckets without a gradient keep theirs. Returns what the
// next step is given. A leaf that is kFrozen stays as it is.
StepInputs update_leaves(const Layout& layout, const std::vector<size_t>& leaves, StepInputs in);

// Whether the given leaves lie in their buckets' buffers as a step leaves them. They must have been
// evaluated.
bool are_flat(
    const Layout& layout,
    const std::vector<size_t>& leaves,
    const std::vector<mx::array>& parameters);

}  // namespace flatstep
