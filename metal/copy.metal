// Brings blocks, which are no numbers, from one buffer to another as they are.
#include "load.h"

using namespace flatstep;

// A stride of 0: all of `to` becomes the one element of `from`.
template <typename T>
[[kernel]] void copy(
    const device T* from [[buffer(FLATSTEP_COPY_FROM)]],
    device T* to [[buffer(FLATSTEP_COPY_TO)]],
    constant CopyArguments& arguments [[buffer(FLATSTEP_COPY_ARGUMENTS)]],
    uint thread_index [[thread_position_in_grid]],
    uint num_threads [[threads_per_grid]]) {
  for (uint64_t i = thread_index; i < arguments.size; i += num_threads) {
    to[i] = from[i * arguments.stride];
  }
}
