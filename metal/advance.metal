// Counts a step, gives its learning rate, and makes the constants of each group of parameters.
#include "load.h"

using namespace flatstep;

// A thread for each group. With a schedule the learning rate is written, without one it is read.
template <typename R>
[[kernel]] void advance(
    const device Step* step [[buffer(FLATSTEP_ADVANCE_STEP)]],
    device Step* next_step [[buffer(FLATSTEP_ADVANCE_NEXT_STEP)]],
    device float* learning_rate [[buffer(FLATSTEP_ADVANCE_LEARNING_RATE)]],
    device uint* constants [[buffer(FLATSTEP_ADVANCE_CONSTANTS)]],
    constant Schedule& schedule [[buffer(FLATSTEP_ADVANCE_SCHEDULE)]],
    constant uint* hyperparameters [[buffer(FLATSTEP_ADVANCE_HYPERPARAMETERS)]],
    constant uint& seed [[buffer(FLATSTEP_ADVANCE_SEED)]],
    uint group [[thread_position_in_grid]]) {
  typedef typename R::Hyperparameters Hyperparameters;
  Step now = step[0];
  bool has_schedule = schedule.num_pieces > 0;
  float rate = 0.0f;
  if (has_schedule) {
    constant SchedulePiece* piece = schedule.pieces + active_piece(schedule, now);
    rate = piece_value(from_words<SchedulePiece>((constant uint*)piece), now);
  } else {
    rate = learning_rate[0];
  }
  Words<typename R::Constants> prepared;
  prepared.value = R::prepare(
      from_words<Hyperparameters>(hyperparameters + group * FLATSTEP_HYPERPARAMETER_WORDS),
      rate,
      now);
  device uint* own = constants + group * FLATSTEP_GROUP_WORDS;
  own[0] = uint(now);
  own[1] = seed;
  for (uint k = 0; k < sizeof(prepared) / 4; ++k) {
    own[FLATSTEP_KEY_WORDS + k] = prepared.at[k];
  }
  if (group == 0) {
    next_step[0] = now + 1;
    if (has_schedule) {
      learning_rate[0] = rate;
    }
  }
}
