// What the host hands to the GPU kernels. C++ and Metal compile this same text, so that the two
// sides cannot disagree about a layout or a buffer's index.
#pragma once

#include "../rules.h"
#include "../schedule.h"

// Metal binds at most 31 buffers to a kernel: twenty for arrays that lie apart, the rest as below.
#define FLATSTEP_MAX_SOURCES 20
#define FLATSTEP_P_IN 0
#define FLATSTEP_P_OUT 1
#define FLATSTEP_M 2
#define FLATSTEP_V 3
#define FLATSTEP_STEP 4
#define FLATSTEP_LEARNING_RATE 5
#define FLATSTEP_CONSTANTS 6
#define FLATSTEP_DISPATCH 7
#define FLATSTEP_SEGMENTS 8
#define FLATSTEP_DIMENSIONS 9
#define FLATSTEP_FIRST_SOURCE 10

// A threadgroup has so many threads, or fewer where the GPU has it so; a thread updates so many
// elements at a time; a tile has so many rows and columns.
#define FLATSTEP_THREADS 256
#define FLATSTEP_RUN 4
#define FLATSTEP_TILE 32

namespace flatstep {

// The same for all dispatches of a bucket.
struct StepArguments {
  Hyperparameters hyperparameters;
  uint32_t reads_step;  // 0: the step's array is not there to be read
  uint32_t p_in_place;  // 1: parameters are read where they are written: Metal's compiler takes it
                        // that two buffers do not overlap
  Schedule schedule;    // without pieces: the learning rate's array is there to be read
};

struct DispatchArguments {
  uint32_t num_segments;
  uint32_t passes;  // how often a threadgroup goes on to its next run of elements, or tile
};

enum SourceLayout {
  SOURCE_ALIGNED = 0,    // contiguous, and vector loads may start at each run of elements
  SOURCE_UNALIGNED = 1,  // contiguous
  SOURCE_STRIDED = 2,
  SOURCE_TILED = 3,  // the last two dimensions are transposed
};

enum SourceType {
  SOURCE_FLOAT32 = 0,
  SOURCE_FLOAT16 = 1,
  SOURCE_BFLOAT16 = 2,
};

// A leaf in a dispatch: its gradient is the source with its number.
struct SourceSegment {
  uint64_t size;
  uint64_t p_offset;      // in elements, like all that follow
  uint64_t state_offset;  // in m and v
  uint32_t first_group;   // the first threadgroup that works on it
  uint32_t source_type;
  uint32_t source_layout;
  uint32_t first_dimension;
  uint32_t num_dimensions;
  uint32_t padding;
};

// Of a source that is not contiguous; neighbouring ones that one stride can walk are merged.
struct SourceDimension {
  uint64_t extent;
  int64_t stride;
};

static_assert(sizeof(Hyperparameters) == 88, "C++ and Metal should lay this out alike");
static_assert(sizeof(SchedulePiece) == 64, "C++ and Metal should lay this out alike");
static_assert(
    sizeof(StepArguments) == 104 + 64 * FLATSTEP_MAX_SCHEDULE_PIECES,
    "C++ and Metal should lay this out alike");
static_assert(sizeof(StepArguments) <= 4096, "Metal's setBytes takes no more");
static_assert(sizeof(SourceSegment) == 48, "C++ and Metal should lay this out alike");
static_assert(sizeof(SourceDimension) == 16, "C++ and Metal should lay this out alike");

}  // namespace flatstep
