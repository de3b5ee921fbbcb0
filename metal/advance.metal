// Moves on what a step leaves besides arrays of elements, and makes the constants of each group of
// parameters.
#include "load.h"

namespace flatstep {

FLATSTEP_FN float rate_at(constant Schedule& schedule, Step step) {
  constant SchedulePiece* piece = schedule.pieces + active_piece(schedule, step);
  return piece_value(from_words<SchedulePiece>((constant uint*)piece), step);
}

}  // namespace flatstep

using namespace flatstep;

// clang-format off
#define FLATSTEP_READ(name, Type, dtype) const device Type* name [[buffer(SCALAR_##name)]],
#define FLATSTEP_WRITTEN(name, Type, dtype) \
  device Type* next_##name [[buffer(FLATSTEP_ADVANCE_WRITTEN + SCALAR_##name)]],
// clang-format on

#define FLATSTEP_GET(name, Type, dtype)    \
  if ((read >> SCALAR_##name & 1u) != 0) { \
    now.name = name[0];                    \
  }
#define FLATSTEP_PUT(name, Type, dtype)       \
  if ((written >> SCALAR_##name & 1u) != 0) { \
    next_##name[0] = next.name;               \
  }

// A thread for each group.
template <typename R>
[[kernel]] void advance(
    FLATSTEP_STEP_SCALARS(FLATSTEP_READ) FLATSTEP_STEP_SCALARS(FLATSTEP_WRITTEN)
        device uint* constants [[buffer(FLATSTEP_ADVANCE_CONSTANTS)]],
    constant AdvanceArguments& arguments [[buffer(FLATSTEP_ADVANCE_ARGUMENTS)]],
    constant Schedule& schedule [[buffer(FLATSTEP_ADVANCE_SCHEDULE)]],
    constant uint* groups [[buffer(FLATSTEP_ADVANCE_GROUPS)]],
    uint group [[thread_position_in_grid]]) {
  // Rates are an array, a place for each group after the first.
  uint is_scalar = ~(1u << SCALAR_group_learning_rates);
  uint read = arguments.read & is_scalar;
  uint written = arguments.written & is_scalar;
  StepScalars now = {};
  now.grad_scale = 1.0f;
  FLATSTEP_STEP_SCALARS(FLATSTEP_GET)
  PassSettings settings = from_words<PassSettings>((constant uint*)&arguments.settings);
  Words<PassConstants> pass;
  pass.value = prepare_pass(settings, now);
  // A step that is not taken leaves the rates as they are.
  bool is_taken = pass.value.action == ACTION_UPDATE;
  float rate_of_all = now.learning_rate;
  if (schedule.num_pieces > 0) {
    rate_of_all = rate_at(schedule, now.step);
  }
  constant uint* words = groups + group * (sizeof(GroupArguments) / 4);
  GroupArguments of_group = from_words<GroupArguments>(words);
  float rate = rate_of_all;
  if (of_group.source == RATE_OWN) {
    rate = group_learning_rates[group - 1];
  } else if (of_group.source == RATE_SCHEDULE) {
    rate = rate_at(*(constant Schedule*)(groups + of_group.schedule), now.step);
  }
  rate = rate_of_group(RateSource(of_group.source), rate, of_group.scale);

  constant uint* numbers = words + (sizeof(GroupArguments) - sizeof(of_group.hyperparameters)) / 4;
  Words<typename R::Constants> prepared;
  prepared.value = R::prepare(from_words<typename R::Hyperparameters>(numbers), rate, now.step);
  device uint* own = constants + group * FLATSTEP_GROUP_WORDS;
  for (uint k = 0; k < FLATSTEP_PASS_WORDS; ++k) {
    own[k] = pass.at[k];
  }
  for (uint k = 0; k < sizeof(typename R::Constants) / 4; ++k) {
    own[FLATSTEP_PASS_WORDS + k] = prepared.at[k];
  }
  if (group > 0) {
    next_group_learning_rates[group - 1] = is_taken ? rate : group_learning_rates[group - 1];
    return;
  }
  StepScalars next = advanced(settings, now, pass.value);
  next.learning_rate = is_taken ? rate_of_all : now.learning_rate;
  FLATSTEP_STEP_SCALARS(FLATSTEP_PUT)
}
