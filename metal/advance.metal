// Counts a step, and gives its learning rate.
#include "../csrc/schedule.h"

using namespace flatstep;

[[kernel]] void advance(
    const device Step* step [[buffer(0)]],
    device Step* next_step [[buffer(1)]],
    device float* learning_rate [[buffer(2)]],
    constant Schedule& schedule [[buffer(3)]]) {
  // Without a schedule the learning rate has no array here.
  if (schedule.num_pieces > 0) {
    learning_rate[0] = schedule_value(schedule, step[0]);
  }
  next_step[0] = step[0] + 1;
}
