// What the host hands to the GPU kernels. C++ and Metal compile this same text, so that the two
// sides cannot disagree about a layout or a buffer's index.
#pragma once

#include "../rules.h"
#include "../schedule.h"
#include "../storage.h"

// Metal binds at most 31 buffers to a kernel: twenty for arrays that lie apart, the rest as below.
#define FLATSTEP_MAX_SOURCES 20
#define FLATSTEP_P_IN 0
#define FLATSTEP_P_OUT 1
#define FLATSTEP_STATE 2  // and the three that follow
#define FLATSTEP_CONSTANTS 6
#define FLATSTEP_DISPATCH 7
#define FLATSTEP_SEGMENTS 8
#define FLATSTEP_DIMENSIONS 9
#define FLATSTEP_FIRST_SOURCE 10

// A threadgroup has so many threads, or fewer SIMD-groups where the GPU has it so; a thread updates
// so many elements at a time. A row of a tile is a block, and is followed by an element, so that a
// tile's column lies in different banks of memory.
#define FLATSTEP_SIMD_WIDTH 32
#define FLATSTEP_THREADS 256
#define FLATSTEP_RUN 4
#define FLATSTEP_TILE_ROWS 32
#define FLATSTEP_TILE_COLUMNS FLATSTEP_BLOCK
#define FLATSTEP_TILE_PITCH (FLATSTEP_TILE_COLUMNS + 1)

// The constants of a group, as `advance` writes them in words of 32 bits: the step, as far as
// rounding asks for it, the seed, two that are not used, and the rule's.
#define FLATSTEP_KEY_WORDS 4
#define FLATSTEP_RULE_WORDS 16
#define FLATSTEP_GROUP_WORDS (FLATSTEP_KEY_WORDS + FLATSTEP_RULE_WORDS)

// The buffers of `advance`, and the room for a group's hyperparameters.
#define FLATSTEP_ADVANCE_STEP 0
#define FLATSTEP_ADVANCE_NEXT_STEP 1
#define FLATSTEP_ADVANCE_LEARNING_RATE 2
#define FLATSTEP_ADVANCE_CONSTANTS 3
#define FLATSTEP_ADVANCE_SCHEDULE 4
#define FLATSTEP_ADVANCE_HYPERPARAMETERS 5
#define FLATSTEP_ADVANCE_SEED 6
#define FLATSTEP_HYPERPARAMETER_WORDS 32

// The buffers of `copy`.
#define FLATSTEP_COPY_FROM 0
#define FLATSTEP_COPY_TO 1
#define FLATSTEP_COPY_ARGUMENTS 2

namespace flatstep {

struct DispatchArguments {
  uint32_t num_segments;
  uint32_t passes;  // how often a threadgroup goes on to its next run of elements, or tile
  // 1: parameters are read where they are written, since Metal's compiler takes it that two buffers
  // do not overlap
  uint32_t p_in_place;
};

struct CopyArguments {
  Step size;
  Step stride;
};

enum SourceLayout {
  SOURCE_ALIGNED = 0,    // contiguous, and vector loads may start at each run of elements
  SOURCE_UNALIGNED = 1,  // contiguous
  SOURCE_STRIDED = 2,
  SOURCE_TILED = 3,  // the last two dimensions are transposed
};

// A leaf in a dispatch, and where its gradient lies.
struct SourceSegment {
  Step size;
  Step p_offset;         // in elements
  Step state_offset;     // in elements of each state array
  Step source_offset;    // in its source, in bytes
  uint32_t source;       // its number
  uint32_t group;        // of parameters
  uint32_t first_group;  // the first threadgroup that works on it
  uint32_t storage;      // of the source, its number in the table
  uint32_t source_layout;
  uint32_t first_dimension;
  uint32_t num_dimensions;
  uint32_t name;  // a hash of the leaf's, by which it is rounded
};

// Of a source that is not contiguous; neighbouring ones that one stride can walk are merged.
struct SourceDimension {
  Step extent;
  SignedStep stride;
};

static_assert(
    sizeof(Number) == 16 && sizeof(SchedulePiece) == 56 && sizeof(SourceSegment) == 64,
    "C++ and Metal should lay these out alike");
static_assert(sizeof(Schedule) <= 4096, "Metal's setBytes takes no more");

}  // namespace flatstep
