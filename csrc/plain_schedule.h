// A schedule that kernels evaluate, from what a user writes (Python doubles).
#pragma once

#include <memory>
#include <vector>

#include "schedule.h"

namespace flatstep {

// The double as the nearest float and the float nearest to what is left.
inline Pair split(double x) {
  auto hi = static_cast<float>(x);
  return {hi, static_cast<float>(x - hi)};
}

class PlainSchedule {
 public:
  static PlainSchedule linear(double init, double end, int64_t steps);
  static PlainSchedule cosine(double init, double end, int64_t steps);
  static PlainSchedule exponential(double init, double decay_rate, int64_t step_size);
  // Flattens: `parts[i + 1]` takes over at step `boundaries[i]` and counts from there.
  static PlainSchedule join(
      const std::vector<const PlainSchedule*>& parts, const std::vector<int64_t>& boundaries);

  // Null when there are more pieces than a kernel takes.
  const std::shared_ptr<const Schedule>& data() const {
    return data_;
  }

 private:
  explicit PlainSchedule(std::vector<SchedulePiece> pieces);

  std::vector<SchedulePiece> pieces_;
  std::shared_ptr<const Schedule> data_;
};

inline float schedule_value(const Schedule& schedule, Step step) {
  return piece_value(schedule.pieces[active_piece(schedule, step)], step);
}

}  // namespace flatstep
