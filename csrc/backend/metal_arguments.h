// What the host hands to the GPU kernels. C++ and Metal compile this same text, so that the two
// sides cannot disagree about a layout or a buffer's index.
#pragma once

#include "../pass.h"
#include "../rules.h"
#include "../schedule.h"
#include "../storage.h"

// Metal binds at most 31 buffers to a kernel: so many for arrays that lie apart, the rest as below.
#define FLATSTEP_MAX_SOURCES 19
#define FLATSTEP_P_IN 0
#define FLATSTEP_P_OUT 1
#define FLATSTEP_STATE 2  // and the two that follow
#define FLATSTEP_RESTS 5
#define FLATSTEP_EMA 6
#define FLATSTEP_ACCUMULATED 7
#define FLATSTEP_CONSTANTS 8
#define FLATSTEP_DISPATCH 9
#define FLATSTEP_SEGMENTS 10
#define FLATSTEP_DIMENSIONS 11
#define FLATSTEP_FIRST_SOURCE 12

// In place of a source's number: the sum of gradients, which is cleared as it is read.
#define FLATSTEP_SUM_AS_SOURCE FLATSTEP_MAX_SOURCES

// A threadgroup has so many threads, or fewer SIMD-groups where the GPU has it so; a thread updates
// so many elements at a time. A row of a tile is a block, and is followed by an element, so that a
// tile's column lies in different banks of memory.
#define FLATSTEP_SIMD_WIDTH 32
#define FLATSTEP_THREADS 256
#define FLATSTEP_RUN 4
#define FLATSTEP_TILE_ROWS 32
#define FLATSTEP_TILE_COLUMNS FLATSTEP_BLOCK
#define FLATSTEP_TILE_PITCH (FLATSTEP_TILE_COLUMNS + 1)

// Arrays that are rounded by chance: the parameter, the rule's state, and the average.
#define FLATSTEP_EMA_KEY 4
#define FLATSTEP_NUM_KEYS 5

// The buffers of `advance`: each scalar as it is read and as it is written has its number in the
// table, and these.
#define FLATSTEP_ADVANCE_WRITTEN 8  // and those that follow
#define FLATSTEP_ADVANCE_CONSTANTS 16
#define FLATSTEP_ADVANCE_ARGUMENTS 17
#define FLATSTEP_ADVANCE_SCHEDULE 18
#define FLATSTEP_ADVANCE_GROUPS 19

// The buffers of the sum of squares, besides a dispatch's.
#define FLATSTEP_NORM_GRAD_SCALE 0
#define FLATSTEP_NORM_ACCUMULATED 1
#define FLATSTEP_NORM_SUMS 2
#define FLATSTEP_NORM_RESULT 3
#define FLATSTEP_NORM_ARGUMENTS 4

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

struct AdvanceArguments {
  PassSettings settings;
  uint32_t read;  // a bit for each scalar that is there
  uint32_t written;
};

// A group of parameters. What `advance` gets is one for each, and after them their schedules, each
// no longer than it has pieces.
struct GroupArguments {
  uint32_t source;
  float scale;
  uint32_t schedule;  // where it lies, in words
  uint32_t padding;
  Number hyperparameters[8];
};

struct NormArguments {
  PassSettings settings;
  uint32_t has_grad_scale;
  uint32_t has_accumulated;
  uint32_t num_sums;
  uint32_t padding;
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
  Step p_offset;         // in elements; of what only is read, its first one
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
    sizeof(Number) == 16 && sizeof(SchedulePiece) == 56 && sizeof(SourceSegment) == 64 &&
        sizeof(PassSettings) == 56 && sizeof(AdvanceArguments) == 64 &&
        sizeof(GroupArguments) == 144 && sizeof(NormArguments) == 72,
    "C++ and Metal should lay these out alike");
static_assert(sizeof(PassConstants) == FLATSTEP_PASS_WORDS * 4, "`advance` writes so many words");
static_assert(NUM_STEP_SCALARS == FLATSTEP_ADVANCE_WRITTEN, "each scalar has a buffer");
static_assert(sizeof(Schedule) <= 4096, "Metal's setBytes takes no more");

}  // namespace flatstep
