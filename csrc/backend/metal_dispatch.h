// Which leaves a dispatch of the update kernel works on, and the tables that it reads.
//
// Leaves that lie in buffers of their own are the only thing that a kernel cannot be given as one
// array, so a bucket takes one dispatch for every FLATSTEP_MAX_SOURCES of them. Of those that lie
// in one buffer a dispatch takes as many as its tables have room for.
#pragma once

#include <vector>

#include "backend/metal_arguments.h"
#include "mlx/array.h"

namespace flatstep {

// What Metal's setBytes takes.
inline constexpr size_t kMaxBytes = 4096;

namespace mx = mlx::core;

// An array, which element of it is the first of a leaf, and where the leaf lies in flat memory.
// Only of a contiguous array the first may be another than number 0.
struct Source {
  const mx::array* array;
  size_t first{0};
  size_t size;
  size_t p_offset{0};
  size_t state_offset{0};
  uint32_t group{0};
  uint32_t name{0};
  bool is_sum{false};  // of gradients, which the update reads and clears where its state lies
};

// In which order the elements of sources are taken.
enum class Order {
  rows,
  rows_in_blocks,  // and tiles are made of whole blocks
  any,             // that of memory, where all of it is the source's
};

struct Dispatch {
  std::vector<const mx::array*> sources;  // each once, if its leaves follow each other
  std::vector<SourceSegment> segments;
  std::vector<SourceDimension> dimensions;
  std::vector<size_t> passes;  // of a threadgroup, for each segment
  DispatchArguments arguments{};
  size_t num_groups{0};
  bool has_tiles{false};
};

// The text of the kernels, which scripts/metal_source.py writes into a file of its own.
extern const char* const kMetalSource;

// Sources without elements take part in none. Throws std::runtime_error when a source has more
// dimensions, merged, than a dispatch can describe.
std::vector<Dispatch> make_dispatches(const std::vector<Source>& sources, Order order);

}  // namespace flatstep
