// The CPU backend: a step of one bucket as one task on MLX's stream, shared among threads. A task
// also does what the next ones would, as far as that is ready: threads then wait for each other
// once for many buckets.
//
// The task walks the bucket in parts that fit in the first-level cache. Float32 is read and written
// where it lies, and so are a parameter and its gradient in one plain storage; what is stored
// otherwise goes through float32 scratch, and what is not contiguous through a panel.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>

#include "backend/backend.h"
#include "backend/cpu_job.h"
#include "backend/thread_pool.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/stream.h"

namespace flatstep {

namespace {

constexpr size_t kMinGrain = 64;  // in blocks of a bucket
// Where each array has its own pass over a part: small enough that the processor overlaps them.
constexpr size_t kCodedElements = 512;

// One thread's update of a part of a segment.
class SegmentUpdate {
 public:
  // The part ends before element `end`.
  SegmentUpdate(const Job& job, size_t index, size_t end)
      : job_(job),
        segment_(job.plan->segments[index]),
        constants_(job.constants + segment_.group * FLATSTEP_GROUP_WORDS),
        g_storage_(job.gradient(index).storage),
        storage_(job.p_out.storage),
        g_offset_(job.gradients.empty() ? segment_.state_offset : 0),
        p_offset_(job.is_accumulation ? segment_.p_offset : 0),
        gradient_(job.gradient(index), g_offset_ + end, 0),
        parameter_(job.parameter(index), p_offset_ + end, 1) {
    size_t end_of_state = segment_.state_offset + end;
    for (size_t k = 0; k < job.states.size(); ++k) {
      states_[k].emplace(job.states[k].in, end_of_state, 2 + k);
    }
    if (job.ema) {
      ema_.emplace(job.ema->in, end_of_state, 2 + kMaxStates);
    }
    // An average is of the parameters before they are rounded.
    if (traits_of(g_storage_).dtype != traits_of(storage_).dtype || job.ema) {
      g_storage_ = storage_ = Storage::Float32;
    }
    if (job.has_codes || !is_plain(job.p_out.storage) || job.ema) {
      for (uint32_t k = 0; k < kNumKeys; ++k) {
        starts_[k] = start_of(job.pass.seed, segment_.name, k);
      }
    }
  }

  // Updates elements [begin, end) of the segment.
  void run(size_t begin, size_t end) {
    for (size_t i = begin, n = 0; i < end; i += n) {
      n = length_of_part(i, end - i);
      size_t state_at = segment_.state_offset + i;
      BlockArrays a{};
      if (job_.rests) {
        a.rests_in = job_.rests->in.at(state_at);
        a.rests_out = job_.rests->out.at(state_at);
      }
      a.g = gradient_.exactly(n, g_offset_ + i, g_storage_, loops_, nullptr, g_);
      a.p_in = parameter_.exactly(n, p_offset_ + i, storage_, loops_, a.rests_in, p_);
      a.p_out = job_.p_out.target(segment_.p_offset + i, p_, storage_);
      for (size_t k = 0; k < job_.states.size(); ++k) {
        a.state_in[k] = static_cast<const float*>(
            states_[k]->exactly(n, state_at, Storage::Float32, loops_, nullptr, state_[k]));
        a.state_out[k] = job_.states[k].out.floats(state_at, state_[k]);
      }
      if (job_.ema) {
        ask_for(job_.ema->in, state_at, n);
      }
      auto update = loops_.update[job_.rule][static_cast<size_t>(storage_)];
      RoundingKey key = key_of(0, i);
      update(constants_, a, n, key);
      if (job_.ema) {
        average(n, state_at, static_cast<const float*>(a.p_out), key_of(kEmaKey, i));
      }
      job_.p_out.store(loops_, segment_.p_offset + i, n, p_, storage_, key, a.rests_out);
      for (size_t k = 0; k < job_.states.size(); ++k) {
        key = key_of(1 + k, i);
        job_.states[k].out.store(loops_, state_at, n, state_[k], Storage::Float32, key);
      }
      if (job_.accumulated) {
        job_.accumulated->out.clear(state_at, state_at + n);
      }
    }
  }

 private:
  // As many elements from `i` on as can be had at once of each array, in whole units.
  size_t length_of_part(size_t i, size_t left) {
    size_t n = std::min(job_.has_codes ? kCodedElements : kBlockElements, left);
    gradient_.limit(g_offset_ + i, n);
    parameter_.limit(p_offset_ + i, n);
    for (size_t k = 0; k < job_.states.size(); ++k) {
      states_[k]->limit(segment_.state_offset + i, n);
    }
    if (ema_) {
      ema_->limit(segment_.state_offset + i, n);
    }
    size_t unit = std::min(job_.unit(), left);
    return n == left ? n : std::max(n / unit * unit, unit);
  }

  // Of an element of the parameter, array 0, or of state number `array - 1`.
  RoundingKey key_of(size_t array, size_t i) const {
    return rounding_key(starts_[array], job_.pass.tick, i);
  }

  // What has a loop of its own is read at memory's speed only if that begins during the one before:
  // a twentieth of an update with an average.
  static void ask_for(const Input& in, size_t begin, size_t n) {
    const char* first = in.at(begin);
    for (size_t byte = 0; byte < in.extent.bytes(n); byte += 64) {
      __builtin_prefetch(first + byte, /* to write */ 1);
    }
  }

  // Takes n parameters into their average, which may be stored as they are read.
  void average(size_t n, size_t at, const float* p, RoundingKey key) {
    const Output& out = job_.ema->out;
    const void* in = ema_->exactly(n, at, Storage::Float32, loops_, nullptr, ema_floats_);
    float* to = out.floats(at, ema_floats_);
    loops_.average(job_.pass, p, static_cast<const float*>(in), to, n);
    out.store(loops_, at, n, ema_floats_, Storage::Float32, key);
  }

  // The arrays that are rounded by chance: the parameter, the rule's state, and the average.
  static constexpr size_t kEmaKey = 1 + kMaxStates;
  static constexpr size_t kNumKeys = kEmaKey + 1;

  const Job& job_;
  const CpuLoops& loops_{job_.loops};
  const Segment& segment_;
  const uint32_t* constants_;
  Storage g_storage_;  // in which the loop takes the gradient, and below the parameter
  Storage storage_;
  size_t g_offset_;  // where the segment starts in the gradient's array, and in the parameter's
  size_t p_offset_;
  std::array<uint32_t, kNumKeys> starts_{};  // of the keys, where there are any
  Walk gradient_;
  Walk parameter_;
  std::array<std::optional<Walk>, kMaxStates> states_;
  std::optional<Walk> ema_;
  alignas(64) Scratch ema_floats_;
  alignas(64) Scratch p_;
  alignas(64) Scratch g_;
  alignas(64) Scratch state_[kMaxStates];
};

// Updates elements [begin, end) of the segment with this index in the plan: from front to back, or
// panel by panel where the gradient lies across long rows. A unit belongs to the panel in which it
// begins.
void update_segment(const Job& job, size_t index, size_t begin, size_t end) {
  SegmentUpdate update(job, index, end);
  size_t length = job.gradient(index).scattered_row();
  if (length <= kPanelColumns) {
    update.run(begin, end);
    return;
  }
  auto first_unit = [unit = job.unit()](size_t i) { return (i + unit - 1) / unit * unit; };
  size_t last_row = (end - 1) / length + 1;
  for (size_t first_row = begin / length; first_row < last_row; first_row += kPanelRows) {
    size_t end_row = std::min(first_row + kPanelRows, last_row);
    for (size_t column = 0; column < length; column += kPanelColumns) {
      size_t end_column = std::min(column + kPanelColumns, length);
      for (size_t row = first_row; row < end_row; ++row) {
        update.run(
            std::max(begin, first_unit(row * length + column)),
            std::min(end, first_unit(row * length + end_column)));
      }
    }
  }
}

// Copies elements [begin, end) of the input, which start at `first` in the output.
void copy(const Input& in, const Output& out, size_t begin, size_t end, size_t first) {
  Walk walk(in, end, 0);
  for (size_t i = begin, n = 0; i < end; i += n) {
    n = std::min(kBlockElements, end - i);
    const char* from = walk.raw(i, n);
    std::memcpy(out.at(first + i - begin), from, out.extent.bytes(n));
  }
}

// Zeros after a leaf, up to the next one.
void clear_gap(const Output& out, size_t end_of_leaf) {
  out.clear(end_of_leaf, (end_of_leaf + kBlock - 1) / kBlock * kBlock);
}

// What fresh memory needs besides the update: the state of leaves that this step brings no gradient
// for, and zeros between leaves. These are never read, but users can reach them.
void fill_fresh(const Job& job) {
  const BucketPlan& plan = *job.plan;
  auto fill = [&](const Input& in, const Output& out) {
    for (const Segment& segment : plan.segments) {
      clear_gap(out, segment.state_offset + segment.size);
    }
    // A single parameter's state may be longer than the parameter.
    out.clear(plan.state_blocks * kBlock, SIZE_MAX);
    for (const Range& range : plan.untouched) {
      copy(in, out, range.begin, range.end, range.begin);
      clear_gap(out, range.end);
    }
  };
  if (!job.p_out.in_place && job.is_accumulation) {
    fill(job.parameters[0], job.p_out);
  } else if (!job.p_out.in_place) {
    for (const Segment& segment : plan.segments) {
      clear_gap(job.p_out, segment.p_offset + segment.size);
    }
  }
  job.for_states([&](const State& state) {
    if (!state.out.in_place) {
      fill(state.in, state.out);
    }
  });
}

// A step that is not taken: what is not in place is copied. Where parameters are, some may still
// lie elsewhere, as those that a user has replaced.
void keep(const Job& job) {
  const auto& segments = job.plan->segments;
  for (size_t k = 0; k < segments.size(); ++k) {
    const Segment& segment = segments[k];
    if (job.parameters[k].at(0) != job.p_out.at(segment.p_offset)) {
      copy(job.parameters[k], job.p_out, 0, segment.size, segment.p_offset);
    }
    size_t end = segment.state_offset + segment.size;
    job.for_states([&](const State& state) {
      if (!state.out.in_place) {
        copy(state.in, state.out, segment.state_offset, end, segment.state_offset);
      }
    });
    if (job.accumulated && job.pass.action == ACTION_DROP) {
      job.accumulated->out.clear(segment.state_offset, end);
    }
  }
}

// Updates blocks [begin, end) of the bucket.
void update_blocks(const Job& job, size_t begin_block, size_t end_block) {
  const auto& segments = job.plan->segments;
  size_t begin = begin_block * kBlock;
  size_t end = end_block * kBlock;
  auto segment = std::upper_bound(
      segments.begin(), segments.end(), begin, [](size_t offset, const Segment& s) {
        return offset < s.p_offset;
      });
  // A leaf of size 0 has the offset of the one that follows it, and where gradients are accumulated
  // the first one may lie behind others that have none.
  if (segment != segments.begin()) {
    --segment;
  }
  for (; segment != segments.end() && segment->p_offset < end; ++segment) {
    size_t first = begin > segment->p_offset ? begin - segment->p_offset : 0;
    size_t last = std::min(segment->size, end - segment->p_offset);
    if (first < last) {
      update_segment(job, segment - segments.begin(), first, last);
    }
  }
}

// What comes before the update of a bucket's elements.
void prepare(Job& job) {
  std::memcpy(&job.pass, job.constants, sizeof(job.pass));
  fill_fresh(job);
  if (job.pass.action != ACTION_UPDATE) {
    keep(job);
  }
}

// Does this job and all that follow it, unless an earlier task has done so already. Needs no
// memory: what has begun cannot fail.
void run(Job& first) {
  if (first.has_run) {
    return;
  }
  size_t total = 0;
  size_t longest_row = 0;
  Job* last = nullptr;
  for (Job* job = &first; job != nullptr; job = job->next) {
    job->has_run = true;
    prepare(*job);
    job->start = total;
    total += job->plan->p_blocks;
    for (const Input& gradient : job->gradients) {
      longest_row = std::max(longest_row, gradient.scattered_row());
    }
    last = job;
  }
  if (first.pass.action != ACTION_UPDATE) {
    return;  // nor is that of the others, which have the same constants
  }
  // A thread takes enough to find whole panels, but no more than its share.
  size_t share = (total + num_threads() - 1) / num_threads();
  size_t grain = std::max(kMinGrain, std::min(longest_row * kPanelRows / kBlock, share));
  parallel_for(total, grain, [&first, last](size_t begin, size_t end) {
    for (Job* job = &first;; job = job->next) {
      size_t job_end = job->start + job->plan->p_blocks;
      size_t from = std::max(begin, job->start);
      size_t to = std::min(end, job_end);
      if (from < to) {
        update_blocks(*job, from - job->start, to - job->start);
      }
      if (job == last || job_end >= end) {
        return;
      }
    }
  });
}

}  // namespace

void cpu_fused_update(
    FusedUpdate& update, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  // Work that is still queued holds the buffers that it reads, the backward pass's reads of the
  // weights above all. Waiting for it costs little: this step needs its gradients anyway.
  bool p_in_place = update.place_outputs(inputs, outputs, [&] {
    if (may_wait_for_queue()) {
      mx::synchronize(update.stream());
    }
  });
  auto job = std::make_shared<Job>(update, inputs, outputs, p_in_place);
  mx::cpu::get_command_encoder(job->stream).dispatch([job] { run(*job); });
  // An earlier task of the stream with the same constants may do it as well, if it is ready. What
  // is held was there when the graph was built; another input may be an output of what is still
  // queued, which MLX does not tell. And fresh memory may have been that of an output which was
  // dropped before its task has written it.
  bool is_ready = inputs.size() <= 1 && job->is_in_place();
  thread_local std::weak_ptr<Job> last;
  auto before = last.lock();
  if (is_ready && before && before->stream == job->stream && before->constants == job->constants) {
    before->next = job.get();
  }
  last = job;
}

}  // namespace flatstep
