// Which leaves a dispatch of the update kernel works on, and the tables that it reads.
//
// Leaves that lie in buffers of their own are the only thing that a kernel cannot be given as one
// array, so a bucket takes one dispatch for every FLATSTEP_MAX_SOURCES of them.
#pragma once

#include <vector>

#include "backend/metal_arguments.h"
#include "mlx/array.h"

namespace flatstep {

namespace mx = mlx::core;

// An array in a buffer of its own, and where the leaf that it belongs to lies in flat memory.
struct Source {
  const mx::array* array;
  size_t size;
  size_t p_offset;
  size_t state_offset;
};

struct Dispatch {
  std::vector<const mx::array*> sources;
  std::vector<SourceSegment> segments;
  std::vector<SourceDimension> dimensions;
  DispatchArguments arguments;
  size_t num_groups;
  bool has_tiles;
};

// Sources without elements take part in none. Throws std::runtime_error when a source has more
// dimensions, merged, than a dispatch can describe.
std::vector<Dispatch> make_dispatches(const std::vector<Source>& sources);

}  // namespace flatstep
