#include "backend/metal_dispatch.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "backend/strided.h"
#include "tables.h"

namespace flatstep {

namespace {

constexpr size_t kElementsPerPass = FLATSTEP_THREADS * FLATSTEP_RUN;
// A threadgroup first finds its segment and loads its constants, so it should have work for longer;
// but there should be more groups than a large GPU runs at once.
constexpr size_t kMaxPasses = 16;
constexpr size_t kManyGroups = 256;
constexpr size_t kMaxSegments = kMaxBytes / sizeof(SourceSegment);
constexpr size_t kMaxDimensions = kMaxBytes / sizeof(SourceDimension);

size_t ceil_div(size_t a, size_t b) {
  return (a + b - 1) / b;
}

// The tiles that cover a source whose last two dimensions are transposed, so that its rows lie side
// by side; 0 when they are not, when a row ends within a block, or when there are more than the
// kernel counts.
size_t num_tiles(const StridedLayout& layout, size_t size, Order order) {
  size_t n = layout.shape().size();
  if (order == Order::any || n < 2 || layout.strides()[n - 2] != 1 || !layout.crosses_lines()) {
    return 0;
  }
  size_t rows = layout.shape()[n - 2];
  size_t columns = layout.shape()[n - 1];
  if (order == Order::rows_in_blocks && columns % FLATSTEP_BLOCK != 0) {
    return 0;
  }
  size_t tiles = size / (rows * columns) * ceil_div(rows, FLATSTEP_TILE_ROWS) *
                 ceil_div(columns, FLATSTEP_TILE_COLUMNS);
  return tiles <= std::numeric_limits<int32_t>::max() ? tiles : 0;
}

// A source as the kernel sees it, and how many passes of a threadgroup it takes.
struct Described {
  SourceSegment segment{};
  std::vector<SourceDimension> dimensions;
  size_t passes;
};

// Whether the elements lie one after the other, in an order that will do.
bool is_in_one_piece(const Source& source, Order order) {
  const mx::array& a = *source.array;
  bool is_all = source.size == a.size() && a.data_size() == a.size();
  return source.is_sum || a.flags().row_contiguous ||
         (order == Order::any && is_all && a.flags().contiguous);
}

Described describe(const Source& source, Order order) {
  const mx::array& a = *source.array;
  Described result;
  result.passes = ceil_div(source.size, kElementsPerPass);
  SourceSegment& segment = result.segment;
  segment.size = source.size;
  segment.p_offset = source.p_offset;
  segment.state_offset = source.state_offset;
  size_t first = source.is_sum ? source.state_offset : source.first;
  segment.source_offset = first * a.itemsize();
  segment.group = source.group;
  segment.name = source.name;
  segment.storage = static_cast<uint32_t>(storage_of(a.dtype()));
  if (is_in_one_piece(source, order)) {
    // A sum starts where a flat array may.
    size_t start = (source.is_sum ? 0 : static_cast<size_t>(a.offset())) + segment.source_offset;
    bool is_aligned = start % (FLATSTEP_RUN * a.itemsize()) == 0;
    segment.source_layout = is_aligned ? SOURCE_ALIGNED : SOURCE_UNALIGNED;
    return result;
  }
  StridedLayout layout(a);
  for (size_t d = 0; d < layout.shape().size(); ++d) {
    result.dimensions.push_back({layout.shape()[d], layout.strides()[d]});
  }
  segment.num_dimensions = static_cast<uint32_t>(result.dimensions.size());
  segment.source_layout = SOURCE_STRIDED;
  if (size_t tiles = num_tiles(layout, source.size, order)) {
    segment.source_layout = SOURCE_TILED;
    result.passes = tiles;
  }
  return result;
}

// Deals the passes of a dispatch out to threadgroups.
void make_groups(Dispatch& dispatch) {
  const std::vector<size_t>& passes = dispatch.passes;
  size_t total = std::accumulate(passes.begin(), passes.end(), size_t{0});
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

std::vector<Dispatch> make_dispatches(const std::vector<Source>& sources, Order order) {
  std::vector<Dispatch> dispatches;
  for (const Source& source : sources) {
    if (source.size == 0) {
      continue;
    }
    Described described = describe(source, order);
    if (described.dimensions.size() > kMaxDimensions) {
      throw std::runtime_error("[flatstep] a gradient has too many dimensions for the GPU.");
    }
    auto has_source = [&](const Dispatch& dispatch) {
      return source.is_sum ||
             (!dispatch.sources.empty() && dispatch.sources.back() == source.array);
    };
    auto fits = [&](const Dispatch& dispatch) {
      return dispatch.segments.size() < kMaxSegments &&
             (has_source(dispatch) || dispatch.sources.size() < FLATSTEP_MAX_SOURCES) &&
             dispatch.dimensions.size() + described.dimensions.size() <= kMaxDimensions;
    };
    if (dispatches.empty() || !fits(dispatches.back())) {
      dispatches.emplace_back();
    }
    Dispatch& dispatch = dispatches.back();
    if (!has_source(dispatch)) {
      dispatch.sources.push_back(source.array);
    }
    described.segment.source =
        source.is_sum ? FLATSTEP_SUM_AS_SOURCE : static_cast<uint32_t>(dispatch.sources.size() - 1);
    described.segment.first_dimension = static_cast<uint32_t>(dispatch.dimensions.size());
    dispatch.has_tiles |= described.segment.source_layout == SOURCE_TILED;
    dispatch.segments.push_back(described.segment);
    dispatch.dimensions.insert(
        dispatch.dimensions.end(), described.dimensions.begin(), described.dimensions.end());
    dispatch.passes.push_back(described.passes);
  }
  std::for_each(dispatches.begin(), dispatches.end(), make_groups);
  return dispatches;
}

}  // namespace flatstep
