// The text of the kernels in metal/, complete, as scripts/metal_source.py embeds it.
#pragma once

namespace flatstep {

extern const char* const kMetalSource;

}  // namespace flatstep
