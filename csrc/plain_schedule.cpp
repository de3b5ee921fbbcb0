#include "plain_schedule.h"

#include <algorithm>
#include <cmath>

namespace flatstep {

namespace {

SchedulePiece piece_of(SchedulePieceKind kind, double init, double end, int64_t steps) {
  SchedulePiece piece{};
  piece.start = -FLATSTEP_LAST_STEP;
  piece.steps = steps;
  piece.init = split(init);
  piece.end = split(end);
  piece.kind = kind;
  return piece;
}

// Sums of boundaries that a user may have given as anything that fits an int64.
int64_t bounded_sum(int64_t a, int64_t b) {
  auto bounded = [](int64_t x) { return std::clamp(x, -FLATSTEP_LAST_STEP, FLATSTEP_LAST_STEP); };
  return bounded(bounded(a) + bounded(b));
}

}  // namespace

PlainSchedule::PlainSchedule(std::vector<SchedulePiece> pieces) : pieces_(std::move(pieces)) {
  if (pieces_.size() <= FLATSTEP_MAX_SCHEDULE_PIECES) {
    auto filled = std::make_shared<Schedule>(Schedule{});
    filled->num_pieces = static_cast<int32_t>(pieces_.size());
    std::copy(pieces_.begin(), pieces_.end(), filled->pieces);
    data_ = std::move(filled);
  }
}

PlainSchedule PlainSchedule::linear(double init, double end, int64_t steps) {
  return PlainSchedule({piece_of(SCHEDULE_LINEAR, init, end, steps)});
}

PlainSchedule PlainSchedule::cosine(double init, double end, int64_t steps) {
  return PlainSchedule({piece_of(SCHEDULE_COSINE, init, end, steps)});
}

PlainSchedule PlainSchedule::exponential(double init, double decay_rate, int64_t step_size) {
  SchedulePiece piece = piece_of(SCHEDULE_EXPONENTIAL, init, init, step_size);
  piece.log_rate = decay_rate == 0 ? Pair{} : split(std::log(std::abs(decay_rate)));
  piece.rate_sign = decay_rate > 0 ? 1 : (decay_rate < 0 ? -1 : 0);
  return PlainSchedule({piece});
}

PlainSchedule PlainSchedule::join(
    const std::vector<const PlainSchedule*>& parts, const std::vector<int64_t>& boundaries) {
  std::vector<SchedulePiece> joined = parts.at(0)->pieces_;
  for (size_t i = 0; i < boundaries.size(); ++i) {
    for (SchedulePiece piece : parts.at(i + 1)->pieces_) {
      piece.start = std::max(boundaries[i], bounded_sum(piece.start, boundaries[i]));
      piece.origin = bounded_sum(piece.origin, boundaries[i]);
      joined.push_back(piece);
    }
  }
  return PlainSchedule(std::move(joined));
}

}  // namespace flatstep
