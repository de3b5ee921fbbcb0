#include "backend/metal_dispatch.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "backend/strided.h"

namespace flatstep {

namespace {

constexpr size_t kElementsPerPass = FLATSTEP_THREADS * FLATSTEP_RUN;
// What a threadgroup prepares costs a few microseconds, so it should have work for longer; but
// there should be more groups than a large GPU runs at once.
constexpr size_t kMaxPasses = 16;
constexpr size_t kManyGroups = 256;
// What Metal's setBytes takes.
constexpr size_t kMaxDimensions = 4096 / sizeof(SourceDimension);

static_assert(FLATSTEP_MAX_SOURCES * sizeof(SourceSegment) <= 4096, "setBytes takes no more");

size_t ceil_div(size_t a, size_t b) {
  return (a + b - 1) / b;
}

SourceType source_type(mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float16:
      return SOURCE_FLOAT16;
    case mx::Dtype::Val::bfloat16:
      return SOURCE_BFLOAT16;
    default:
      return SOURCE_FLOAT32;
  }
}

// The tiles that cover a source whose last two dimensions are transposed, so that its rows lie side
// by side; 0 when they are not, or when there are more than the kernel counts.
size_t num_tiles(const StridedLayout& layout, size_t size) {
  size_t n = layout.shape().size();
  if (n < 2 || layout.strides()[n - 2] != 1 || !layout.crosses_lines()) {
    return 0;
  }
  size_t rows = layout.shape()[n - 2];
  size_t columns = layout.shape()[n - 1];
  size_t tiles =
      size / (rows * columns) * ceil_div(rows, FLATSTEP_TILE) * ceil_div(columns, FLATSTEP_TILE);
  return tiles <= std::numeric_limits<int32_t>::max() ? tiles : 0;
}

// A source as the kernel sees it, and how many passes of a threadgroup it takes.
struct Described {
  SourceSegment segment{};
  std::vector<SourceDimension> dimensions;
  size_t passes;
};

Described describe(const Source& source) {
  const mx::array& a = *source.array;
  Described result;
  result.passes = ceil_div(source.size, kElementsPerPass);
  SourceSegment& segment = result.segment;
  segment.size = source.size;
  segment.p_offset = source.p_offset;
  segment.state_offset = source.state_offset;
  segment.source_type = source_type(a.dtype());
  if (a.flags().row_contiguous) {
    bool is_aligned = a.offset() % static_cast<int64_t>(FLATSTEP_RUN * a.itemsize()) == 0;
    segment.source_layout = is_aligned ? SOURCE_ALIGNED : SOURCE_UNALIGNED;
    return result;
  }
  StridedLayout layout(a);
  for (size_t d = 0; d < layout.shape().size(); ++d) {
    result.dimensions.push_back({layout.shape()[d], layout.strides()[d]});
  }
  segment.num_dimensions = static_cast<uint32_t>(result.dimensions.size());
  segment.source_layout = SOURCE_STRIDED;
  if (size_t tiles = num_tiles(layout, source.size)) {
    segment.source_layout = SOURCE_TILED;
    result.passes = tiles;
  }
  return result;
}

// Deals the passes of a dispatch out to threadgroups.
void make_groups(Dispatch& dispatch, const std::vector<size_t>& passes) {
  size_t total = 0;
  for (size_t n : passes) {
    total += n;
  }
  size_t per_group = std::clamp<size_t>(total / kManyGroups, 1, kMaxPasses);
  dispatch.arguments.num_segments = static_cast<uint32_t>(dispatch.segments.size());
  dispatch.arguments.passes = static_cast<uint32_t>(per_group);
  dispatch.num_groups = 0;
  for (size_t i = 0; i < passes.size(); ++i) {
    dispatch.segments[i].first_group = static_cast<uint32_t>(dispatch.num_groups);
    dispatch.num_groups += ceil_div(passes[i], per_group);
  }
  if (dispatch.num_groups > std::numeric_limits<uint32_t>::max()) {
    throw std::runtime_error("[flatstep] a parameter is too large for the GPU.");
  }
}

}  // namespace

std::vector<Dispatch> make_dispatches(const std::vector<Source>& sources) {
  std::vector<Dispatch> dispatches;
  std::vector<std::vector<size_t>> passes;
  for (const Source& source : sources) {
    if (source.size == 0) {
      continue;
    }
    Described described = describe(source);
    if (described.dimensions.size() > kMaxDimensions) {
      throw std::runtime_error("[flatstep] a gradient has too many dimensions for the GPU.");
    }
    bool fits = !dispatches.empty() && dispatches.back().sources.size() < FLATSTEP_MAX_SOURCES &&
                dispatches.back().dimensions.size() + described.dimensions.size() <= kMaxDimensions;
    if (!fits) {
      dispatches.emplace_back();
      passes.emplace_back();
    }
    Dispatch& dispatch = dispatches.back();
    described.segment.first_dimension = static_cast<uint32_t>(dispatch.dimensions.size());
    dispatch.has_tiles |= described.segment.source_layout == SOURCE_TILED;
    dispatch.sources.push_back(source.array);
    dispatch.segments.push_back(described.segment);
    dispatch.dimensions.insert(
        dispatch.dimensions.end(), described.dimensions.begin(), described.dimensions.end());
    passes.back().push_back(described.passes);
  }
  for (size_t i = 0; i < dispatches.size(); ++i) {
    make_groups(dispatches[i], passes[i]);
  }
  return dispatches;
}

}  // namespace flatstep
